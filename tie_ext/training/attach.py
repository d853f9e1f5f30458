"""Attach a garbage class to a trained classifier, which stays as it is.

Symbols: ``s (N, S)`` statistics of images (:mod:`tie_ext.models.head`); ``t (N,)`` 1 for an
outlier, 0 for an ID image.

A head on every layer learns ``t`` from ``s`` by binary cross-entropy: from the ID images as they
are, from the same images corrupted (:mod:`tie_ext.training.augmentation`), and from twice as
many outliers. Its log-odds become the (n+1)-th logit, ``logsumexp(ID logits) + head(s)``, so that
the softmax over n+1 outputs gives the head's odds of garbage. No ID logit changes by a bit, unless
the network is asked to compute in bfloat16.

Some thousand ID images are drawn at random (:mod:`tie_ext.utils.subset`), so that attach takes the
same time for any number of them. What other scores need of them is kept in the network.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.outliers.procedural import Procedural
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.config import HeadConfig
from tie_ext.training.fit_head import StatisticsCollector, fit_head
from tie_ext.utils.checks import check_class_counts
from tie_ext.utils.distributed import broadcast, gathered, rank, share, total
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.progress import Progress
from tie_ext.utils.random import FIRST_BATCH, OUTLIERS, seeded
from tie_ext.utils.reservoir import Reservoir
from tie_ext.utils.subset import SampledLoader
from tie_ext.utils.unwrap import unwrapped
from tie_ext.utils.views import frozen_view

LAM = 2.0
"""lambda of level 2, the loop's default."""
ROWS = 4096
"""Statistics that the head scores at once."""
KEPT = 5000
"""ID images of which the network keeps features, at most. The head reads fewer, as each costs it
three passes more: corrupted, and two outliers."""


@without_autocast
@torch.inference_mode(False)
def attach(
    model: nn.Module,
    loader: Iterable,
    num_classes: int,
    low: float | Sequence[float] = 0.0,
    high: float | Sequence[float] = 1.0,
    class_names: Sequence[str] = (),
    synthesizers: Sequence[Synthesizer] | None = None,
    seed: int = 0,
    progress: bool = False,
    autocast_dtype: str = "float32",
    head_config: HeadConfig | None = None,
    logits: Callable[[Any], Tensor] | None = None,
) -> TIENet:
    """Attach a garbage class to a trained classifier, without training it and without OOD images.

    Arguments:
        model: A classifier ``(B, C, S, S) -> (B, n)`` in evaluation mode (docs/networks.md says
            which); it is copied. Images are moved to its device. One logit stands for two classes,
            whose logits are ``[0, z]``.
        loader: ID images ``(B, C, S, S)``, floating-point in ``[low, high]``, as the model takes
            them; its training images will do. Batches are images alone, pairs (images, labels) or
            dicts (:mod:`tie_ext.utils.loader`); images with a label < 0 are left out. A
            ``DataLoader`` or a list: something that can be read more than once. At most 5000
            images are read, ``head_config.max_images`` for the head: of a ``DataLoader`` whose
            data set has indices a random sample, through another sampler; of a list random
            batches; of a stream the first, so that it has to be in random order.
        num_classes: n.
        low: Smallest value of the images, a number or one per channel (``Normalize`` of 0).
        high: Largest value of the images (``Normalize`` of 1).
        class_names: Name of each ID class, by label.
        synthesizers: Propose the outliers; each is fitted once, to model and images. None for
            procedural images.
        seed: Seed of the outliers and of the head.
        progress: Show progress bars.
        autocast_dtype: Arithmetic of the backbone, now and in the network that is returned:
            ``"float32"`` stands for the model's own type; ``"bfloat16"`` is faster where the
            hardware supports it, and approximates the model's logits.
        head_config: How the head is fitted; None for the defaults.
        logits: Gives the logits ``(B, n)`` of what the model returns, where they are not found in
            it.

    Returns:
        The network in evaluation mode, with tau set: ``net(x)`` gives what the model gave,
        ``net.decide(x)`` decides. It keeps the features of ID images for
        :func:`tie_ext.combine`. In several processes (``torch.distributed``) each reads its share
        of the images, and all get the same network.

    Raises:
        TypeError: If the model is no ``nn.Module``.
        ValueError: If the model is in training mode, has not n outputs, does not end in a linear
            layer, has no layer for a head to read, or its logits are not found; if there are fewer
            than two images, they can be read only once, are not finite, of one shape and in the
            value range, or a class has no image; if ``synthesizers`` is empty or
            ``autocast_dtype`` unknown. The head has not been fitted then.
    """
    if unwrapped(model).training:
        raise ValueError(
            f"Expected a trained model in evaluation mode, but got {type(model).__name__} in "
            "training mode; call model.eval()"
        )
    if synthesizers is not None and not synthesizers:
        raise ValueError(
            "`synthesizers` is empty; pass a Synthesizer, or None for procedural images"
        )
    head_config = head_config or HeadConfig()
    with seeded(seed, FIRST_BATCH):
        sample = SampledLoader(loader, max(KEPT, head_config.max_images), seed)
        x = BatchReader(sample.peek()).first().images
    # A caller under inference_mode or no_grad gets the same head.
    with seeded(seed), torch.enable_grad():
        about = (num_classes, x.shape[1:], low, high, class_names)
        net = TIENet(model, *about, head="multilayer", logits=logits).eval()
        net.autocast_dtype = autocast_dtype
        if net.backbone_classes != num_classes:
            raise ValueError(
                f"Expected a model with {num_classes} outputs, as num_classes says, but got one "
                f"with {net.backbone_classes}"
            )
        reader = BatchReader(sample, num_classes, x.shape[1:], net.low, net.high, id_only=True)
        synthesizers = [Procedural(net)] if synthesizers is None else synthesizers
        for synthesizer in synthesizers:
            synthesizer.to(net.low.device).fit(frozen_view(net), _Labelled(net, reader), 1.0)
        statistics = _collect(net, reader, synthesizers, head_config, seed, progress)
    device = net.low.device
    inside, h = (gathered(part, device) for part in statistics.id.columns)
    outside = gathered(statistics.ood.rows, device)
    # The same statistics and random numbers in every process.
    with seeded(seed), torch.enable_grad():
        fit_head(cast(GarbageHead, net.garbage), inside, outside, head_config, progress)
    broadcast(net.garbage)  # machines may round differently
    net.tau.fill_(_tau(net, inside, h))
    return net


@torch.no_grad()
def _collect(
    net: TIENet,
    reader: BatchReader,
    synthesizers: Sequence[Synthesizer],
    config: HeadConfig,
    seed: int,
    progress: bool,
) -> StatisticsCollector:
    """Statistics of ID images and of the outliers proposed beside them, in one pass; the network
    keeps features.
    """
    statistics, kept, labelled = (
        StatisticsCollector(net, config.memory, config.corruption),
        Reservoir(KEPT),
        True,
    )
    counts = torch.zeros(net.num_classes, dtype=torch.long)
    bar = Progress(reader, "attach: images", disable=not progress)
    for i, (x, y) in enumerate(bar):
        # Whatever the loader draws, the outliers are the same.
        with seeded(seed, OUTLIERS, rank(), i):
            x = x.to(net.low.device)
            taught, more = x.tensor_split([share(config.max_images) - statistics.id.seen // 2])
            ways = ((statistics.add_id, taught), (statistics.net.features, more))
            h = torch.cat([read(part) for read, part in ways if len(part)])
            if y is None:
                y, labelled = net.fc(h).argmax(1), False
            else:
                counts += y.cpu().bincount(minlength=net.num_classes)
            kept.add(h, y.to(h.device))
            for synthesizer in synthesizers if len(taught) else ():
                # Proposed together, which is faster, and read in pieces that fit a CPU's cache.
                times, labels = config.outliers, y[: len(taught)].to(x.device)
                repeated = taught.repeat(times, 1, 1, 1), labels.repeat(times)
                statistics.add_ood(synthesizer.sample(statistics.net, *repeated).x, len(x))
    _check_counts(counts, statistics, reader.loader.whole)  # type: ignore[attr-defined]
    features, labels = (gathered(column, net.low.device) for column in kept.columns)
    net.keep_training(features, labels if labelled else None)
    return statistics


def _check_counts(counts: Tensor, statistics: StatisticsCollector, whole: bool) -> None:
    """Refuse too few images, and classes without any where no image was left out."""
    counts = total(counts, statistics.net.low.device)
    if counts.any() and whole:
        check_class_counts(counts)
    if (seen := int(total(torch.tensor(statistics.id.seen), statistics.net.low.device))) < 4:
        raise ValueError(f"Expected at least two ID images, but got {seen // 2}")


@torch.no_grad()
def _tau(net: TIENet, statistics: Tensor, features: Tensor) -> float:
    """The paper's threshold on the uncertainty of ID images with statistics ``(N, S)`` and
    features ``(N, F)``.

    Of those that are corrupted too: training images alone would set it too low, because the
    network has memorised them.
    """
    pairs = zip(features.split(ROWS), statistics.split(ROWS), strict=True)
    logits = torch.cat([net.all_logits(h, s) for h, s in pairs])
    return exclusion_threshold(uncertainty(upcast(logits).softmax(1)), LAM)


class _Labelled:
    """Batches ``(x, y)`` for synthesizers, with the network's own labels where there are none."""

    def __init__(self, net: TIENet, reader: BatchReader):
        self.net, self.reader = frozen_view(net), reader

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.reader:
            x = x.to(self.net.low.device)
            yield x, self.net(x).argmax(1) if y is None else y.to(x.device)
