"""Others' OOD scores on cached features, and how they are judged. Larger score = more OOD.

Symbols: ``h (N, F)`` penultimate features, ``W (n, F)`` and ``b (n,)`` the last layer, so that
logits are ``h W^T + b``; ``y (N,)`` labels of the images fitted on.

pytorch-ood's detectors have its defaults; ViM, which has none, keeps half of the dimensions. ASH,
SCALE, ReAct and VRA shape the pooled features. Mahalanobis++ is pytorch-ood's Mahalanobis on
features of length 1. CADRef and WeiPer + KLD are written here.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_ood import detector as theirs
from torch import Tensor, nn

Score = Callable[[Tensor], Tensor]
"""Scores ``(N,)`` of features ``(N, F)``."""
BINS, COPIES = 100, 100


def makers(fc: nn.Linear, h: Tensor, y: Tensor) -> dict[str, Callable[[], Score]]:
    """How each score is fitted, by its name; one that cannot be raises an error."""
    weight, bias, unit = fc.weight.detach(), fc.bias.detach(), F.normalize

    def logits(cls: type) -> Score:
        return lambda z: cls(None).predict_logits(fc(z))

    def features(detector) -> Score:
        return detector.fit_features(h, y).predict_features

    def clipped(cls: type) -> Score:
        return cls(None, fc).fit_feature_maps(h, y).predict_feature_maps

    def shaped(cls: type) -> Score:
        detector = cls(None, lambda maps: fc(maps.flatten(1)))
        return lambda z: detector.predict_feature_maps(z[:, :, None, None])

    def on_unit() -> Score:
        fitted = theirs.Mahalanobis(None).fit_features(unit(h), y)
        return lambda z: fitted.predict_features(unit(z))

    return {
        "MSP": lambda: logits(theirs.MaxSoftmax),
        "energy": lambda: logits(theirs.EnergyBased),
        "MaxLogit": lambda: logits(theirs.MaxLogit),
        "GEN": lambda: logits(theirs.GEN),
        "KNN": lambda: features(theirs.KNN(None)),
        "ViM": lambda: features(theirs.ViM(None, h.shape[1] // 2, weight, bias)),
        "Mahalanobis": lambda: features(theirs.Mahalanobis(None)),
        "Mahalanobis++": on_unit,
        "RMD": lambda: features(theirs.RMD(None)),
        "fDBD": lambda: features(theirs.fDBD(None, fc)),
        "NCI": lambda: features(theirs.NCI(None, fc)),
        "SHE": lambda: features(theirs.SHE(None, fc)),
        "ReAct": lambda: clipped(theirs.ReAct),
        "ASH": lambda: shaped(theirs.ASH),
        "SCALE": lambda: shaped(theirs.SCALE),
        "VRA": lambda: clipped(theirs.VRA),
        "NNGuide": lambda: features(theirs.NNGuide(None, fc)),
        "CADRef": lambda: cadref(fc, h),
        "WeiPer+KLD": lambda: weiper(fc, h),
    }


FAILURES = (AssertionError, ValueError, RuntimeError, IndexError)
"""How hosts' detectors say that they cannot be fitted."""


def scores_of(
    make: Mapping[str, Callable[[], Score]], sets: Mapping[str, Sequence[Tensor]]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Scores by name and set (given as batches), and why some have none."""
    found, failed = {}, {}
    for name, fit in make.items():
        try:
            torch.manual_seed(0)  # Gram holds a random part of the images out
            score = fit()
            of = {
                place: torch.cat([score(x).detach().float() for x in xs])
                for place, xs in sets.items()
            }
            if not all(bool(one.isfinite().all()) for one in of.values()):
                raise ValueError("scores that are not finite")
            found[name] = of
        except FAILURES as error:
            failed[name] = str(error) or type(error).__name__
    return found, failed


def image_makers(
    model: nn.Module, stages: list, layers: list, last: nn.Module, num_classes: int, batches: list
) -> dict[str, Callable[[], Score]]:
    """As :func:`makers`, of scores that read images, for gradients or early layers.

    Arguments:
        model: The classifier.
        stages: Its parts, each of which takes what the one before gives; for Gram.
        layers: The modules that the stages end in; for NAC.
        last: What makes logits of the last stage's maps.
        num_classes: n.
        batches: Images ``(x, y)`` to fit on.
    """
    return {
        "ODIN": lambda: theirs.ODIN(model).predict,
        "Gram": lambda: theirs.Gram(last, stages, num_classes).fit(batches).predict,
        "NAC": lambda: theirs.NACUE(model, layers).fit(batches[:20]).predict,  # of 1000 images
    }


def cadref(fc: nn.Linear, h: Tensor) -> Score:
    """How far features are from the mean of the predicted class, for and against it apart.

    References:
        Z. Ling et al. *CADRef: Robust Out-of-Distribution Detection via Class-Aware Decoupled
        Relative Feature Leveraging*. CVPR 2025.
    """
    logits = fc(h)
    members = F.one_hot(logits.argmax(1), len(fc.weight)).float()
    if (members.sum(0) == 0).any():
        raise ValueError(
            "a class that the network predicts for no image that is fitted on has no mean"
        )
    means, energy = members.T @ h / members.sum(0)[:, None], logits.logsumexp(1).mean()

    def score(z: Tensor) -> Tensor:
        logits = fc(z)
        label = logits.argmax(1)
        signed = (z - means[label]) * fc.weight[label].sign()
        for_it, against = (part.relu().sum(1) / z.abs().sum(1) for part in (signed, -signed))
        return for_it / logits.logsumexp(1) + against / energy

    return score


class WeiPer(NamedTuple):
    """Its settings, as its authors have them for CIFAR-10; below for other networks."""

    delta: float = 1.8
    of_copies: float = 2.5
    of_msp: float = 0.1
    smooth: int = 4
    smooth_copies: int = 15


CIFAR100, IMAGENET = WeiPer(2.4, 0.1, 1.0, 4, 40), WeiPer(2.4, 2.5, 0.25, 40, 15)


def weiper(fc: nn.Linear, h: Tensor) -> Score:
    """How unlike those of training images are histograms of features, and of noisy copies' logits.

    Settings: the authors' for CIFAR-10 up to 10 classes, CIFAR-100 up to 100, ImageNet beyond.

    References:
        M. Granz, M. Heurich, T. Landgraf. *WeiPer: OOD Detection using Weight Perturbations of
        Class Projections*. NeurIPS 2024.
    """
    n = len(fc.weight)
    of = WeiPer() if n <= 10 else CIFAR100 if n <= 100 else IMAGENET
    noise = F.normalize(
        torch.randn((COPIES, *fc.weight.shape), generator=torch.Generator().manual_seed(0)), dim=2
    )
    copies = (fc.weight + of.delta * fc.weight.norm(dim=1, keepdim=True) * noise).flatten(0, 1)
    bias = fc.bias.repeat(COPIES)

    def parts(z: Tensor) -> list[Tensor]:
        return [z, z @ copies.T + bias]

    pieces = h.split(200)
    ends = [
        tuple(torch.stack([end(parts(z)[i]) for z in pieces]) for end in (torch.amin, torch.amax))
        for i in (0, 1)
    ]
    ends = [(low.min(), high.max()) for low, high in ends]
    normal = [
        torch.cat([histogram(parts(z)[i], *ends[i]) for z in pieces]).mean(0) for i in (0, 1)
    ]

    def score(z: Tensor) -> Tensor:
        return torch.cat([of_piece(piece) for piece in z.split(200)])

    def of_piece(z: Tensor) -> Tensor:
        both = parts(z)
        seen = [histogram(values, *end) for values, end in zip(both, ends, strict=True)]
        plain = divergence(smoothed(seen[0], of.smooth), normal[0], 0.01)
        copied = divergence(smoothed(seen[1], of.smooth_copies), normal[1], 0.025)
        msp = both[1].view(len(z), COPIES, n).softmax(2).amax(2).mean(1)
        return plain + of.of_copies * copied - of.of_msp * msp

    return score


def histogram(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Shares ``(N, BINS)`` of each row's values ``(N, K)`` in equal bins from low to high; what
    lies beyond is in none."""
    place = ((values - low) / (high - low) * BINS).floor().clamp(-1, BINS).long()
    place = torch.where((place == BINS) & (values <= high), BINS - 1, place) + 1
    counts = torch.zeros(len(values), BINS + 2).scatter_add_(1, place, torch.ones_like(values))
    return counts[:, 1:-1] / values.shape[1]


def smoothed(shares: Tensor, width: int) -> Tensor:
    """The mean of each ``width`` neighbouring bins; the outermost go on beyond the ends."""
    left = (width - 1) // 2
    wide = F.pad(shares[:, None], (left, width - 1 - left), mode="replicate")
    return F.avg_pool1d(wide, width, 1)[:, 0]


def divergence(p: Tensor, q: Tensor, least: float) -> Tensor:
    """Symmetric Kullback-Leibler divergence ``(N,)`` of shares ``(N, K)`` and ``(K,)``, to each of
    which ``least`` is added."""
    p, q = (F.normalize(of + least, p=1, dim=-1) for of in (p, q))
    return ((p - q) * (p.log() - q.log())).sum(1)


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an OOD image scores higher than an ID one, ties counted half."""
    ordered = inside.double().sort().values
    below, upto = (
        torch.searchsorted(ordered, outside.double(), right=right) for right in (False, True)
    )
    return ((below + upto).double().mean() / (2 * len(inside))).item()


def fpr95(inside: Tensor, outside: Tensor) -> float:
    """Share of OOD images accepted where 95 % of the ID images are."""
    return (
        (outside <= inside.double().quantile(0.95, interpolation="higher")).double().mean().item()
    )


Table = Mapping[str, Mapping[str, float | None]]
"""AUROC by column and score; None where a score cannot be computed."""


def regrets(table: Table, name: str, ours: Sequence[str]) -> dict[str, tuple[float, str]]:
    """By column, AUROC of a score minus that of the best rival, and which that is.

    Arguments:
        table: Of all scores.
        name: Whose regret; a column in which it cannot be computed is left out.
        ours: Scores that are no rivals.
    """
    found = {}
    for column, of in table.items():
        rivals = {
            rival: value for rival, value in of.items() if value is not None and rival not in ours
        }
        best = max(rivals, key=rivals.__getitem__)
        value = of.get(name)
        if value is not None:
            found[column] = (value - rivals[best], best)
    return found


def worst_and_mean(table: Table, name: str, ours: Sequence[str]) -> tuple[float, float, int]:
    """Worst regret of a score, its mean, and how many columns it has."""
    values = [value for value, _ in regrets(table, name, ours).values()]
    return min(values), mean(values), len(values)
