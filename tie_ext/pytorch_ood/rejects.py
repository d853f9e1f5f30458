"""What a detector rejected: groups of images that look alike to the network.

Symbols: ``h (M, F)`` penultimate features and ``s (M, S)`` statistics of every layer of M rejected
images; ``z`` both, standardised over the rejected images, in a few principal components.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.reservoir import Reservoir
from tie_ext.utils.views import eval_view

MAX_REJECTED = 2000
"""Rejected images that are grouped, a random sample where there are more."""
COMPONENTS = 30
"""Principal components that are clustered."""
MAX_GROUPS = 12
DISTINCT = 0.1
"""Silhouette, in [-1, 1], above which groups are told apart."""
SMALLEST = 5
"""Images of a group; fewer are left over."""
ODD = 2**0.5
"""Distance from which on a layer finds images odd: twice the mean square of ID images. About 5 %
of ID images are as far."""
KINDS = ("far", "near", "preprocessing")
"""``far``: the garbage class is the most likely for most of the images. Else ``preprocessing``:
a layer of the first half finds them odd, and none of the second half odder. Else ``near``."""


class Group(NamedTuple):
    """Rejected images that look alike to the network."""

    rows: Tensor
    """``(K,)`` places of its images in the loader; the most typical first."""
    kind: str
    """One of :data:`KINDS`."""
    labels: tuple[int, int]
    """The ID class that is nearest to the most of them, and the next."""
    share: float
    """Share of its images whose nearest class is the first, in [0, 1]."""
    layers: dict[str, float]
    """How far from ID images each layer finds them, from the first on: the median root mean
    square of its standardised statistics, divided by :data:`ODD`; above 1 = odd."""


class Rejects(NamedTuple):
    """What was rejected."""

    images: int
    """Images that were read."""
    rejected: int
    """Of which this many were rejected."""
    groups: tuple[Group, ...]
    """The largest first."""
    others: Tensor
    """``(K,)`` places of rejected images that are in no group."""


@torch.no_grad()
def rejects(detector: TIEDetector | Combined, loader: Iterable) -> Rejects:
    """Group the images that a detector rejects; scikit-learn has to be installed.

    Arguments:
        detector: A fitted detector on a :class:`tie_ext.TIENet`.
        loader: Batches of images, with or without labels, which are not read.

    Raises:
        TypeError: If the network is no TIENet.
        ValueError: If the images are not of the shape and value range of training, or there are
            none.
    """
    net = detector.network
    if not isinstance(net, TIENet):
        raise TypeError(f"Expected a detector on a TIENet, but got {type(net).__name__}")
    view, count = eval_view(net), 0
    kept = Reservoir(MAX_REJECTED, torch.Generator().manual_seed(0))
    for x, _ in BatchReader(loader, None, net.image_shape, net.low, net.high, rereadable=False):
        x = x.to(net.low.device)
        out = detector.decide(x).level > 0
        h, s = view.statistics(x)
        logits = view.all_logits(h, s)
        row = torch.arange(count, count + len(x), device=x.device)
        kept.add(row[out], h[out], s[out], logits[out])
        count += len(x)
    if not kept.seen:
        return Rejects(count, 0, (), torch.empty(0).long())
    rows, h, s, logits = (part.cpu() for part in kept.columns)
    distances = layer_distances(net, s) / ODD
    groups, others = [], [rows[:0]]
    for part in clusters(components(h, s)):
        if len(part) < SMALLEST:
            others.append(rows[part])
        else:
            groups.append(_group(net, rows[part], logits[part], distances[part]))
    return Rejects(count, kept.seen, tuple(groups), torch.cat(others))


def components(h: Tensor, s: Tensor) -> Tensor:
    """Principal components ``(M, k)`` of standardised features and statistics, which count alike;
    a typical image has length 1.
    """
    parts = []
    for x in (h.double(), s.double()):
        deviation = x.std(dim=0, correction=0)
        x = (x - x.mean(dim=0)) / torch.where(deviation > 0, deviation, 1)
        parts.append(x / x.shape[1] ** 0.5)
    x = torch.cat(parts, dim=1) / 2**0.5
    u, scale, _ = torch.linalg.svd(x, full_matrices=False)
    return (u * scale)[:, :COMPONENTS]


def clusters(z: Tensor) -> list[Tensor]:
    """Rows of each group of points ``(M, k)``, the largest group first, and in each the most
    typical point first.

    Ward's clustering; the number of groups is the one whose silhouette is the largest, and one
    where none is above :data:`DISTINCT`.

    References:
        J. Ward. *Hierarchical Grouping to Optimize an Objective Function*. JASA, 1963. P.
        Rousseeuw. *Silhouettes*. Journal of Computational and Applied Mathematics, 1987.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    points, best, label = z.numpy(), DISTINCT, torch.zeros(len(z), dtype=torch.long)
    for k in range(2, min(MAX_GROUPS, len(z) // SMALLEST) + 1):
        found = AgglomerativeClustering(k).fit_predict(points)
        value = silhouette_score(points, found)
        if value > best:
            best, label = value, torch.from_numpy(found).long()
    parts = [(label == k).nonzero().flatten() for k in range(int(label.max()) + 1)]
    parts.sort(key=len, reverse=True)
    return [part[(z[part] - z[part].mean(0)).norm(dim=1).argsort()] for part in parts]


def layer_names(net: TIENet) -> list[str]:
    """The layers that are read, from the first on; the last are the penultimate features."""
    head = net.garbage
    return [*(head.layers if isinstance(head, GarbageHead) else ()), "features"]


def layer_distances(net: TIENet, s: Tensor) -> Tensor:
    """Root mean square ``(B, L)`` of the standardised statistics ``(B, S)`` of each layer, about 1
    for ID images; ones where the network has no head that knows their scale.
    """
    head = net.garbage
    if not isinstance(head, GarbageHead):
        return s.new_ones(len(s), 1)
    squares = ((s - head.mean.to(s)) / head.deviation.to(s)).square()
    features, *layers = squares.split([head.feature_size, *head.sizes], dim=1)
    return torch.stack([part.mean(dim=1).sqrt() for part in (*layers, features)], dim=1)


def kind_of(garbage: float, distances: list[float]) -> str:
    """One of :data:`KINDS`.

    Arguments:
        garbage: Share of images whose most likely output is garbage, in [0, 1].
        distances: Of each layer, the first first; above 1 = odd.
    """
    half = len(distances) // 2
    if garbage > 0.5:
        return "far"
    return "preprocessing" if max([0.0, *distances[:half]]) > max(1, *distances[half:]) else "near"


def _group(net: TIENet, rows: Tensor, logits: Tensor, distances: Tensor) -> Group:
    """A group of the images in some rows."""
    garbage = (logits.argmax(dim=1) == net.num_classes).double().mean()
    nearest, second = logits[:, :-1].topk(2, dim=1).indices.T
    votes = nearest.bincount(minlength=net.num_classes)
    first = int(votes.argmax())
    next_votes = second[nearest == first].bincount(minlength=net.num_classes)
    middle = distances.median(dim=0).values.tolist()
    kind = kind_of(float(garbage), middle)
    labels = first, int(next_votes.argmax())
    layers = dict(zip(layer_names(net), middle, strict=True))
    return Group(rows, kind, labels, float(votes[first]) / len(rows), layers)
