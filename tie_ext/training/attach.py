"""A garbage class for a trained classifier, which stays as it is: a head on every layer, taught by outliers made from nothing.

Symbols: ``s (N, S)`` statistics of images (:mod:`tie_ext.models.head`), ``t (N,)`` 1 where an image is an outlier, else 0.

One look at the ID images, one at the same processed another way (:mod:`tie_ext.training.augmentation`), one at three times as many outliers, and the head
learns ``t`` of ``s`` by binary cross-entropy. Its log-odds become the (n+1)-th logit, ``logsumexp(ID logits) + head(s)``, so that the softmax over
n+1 outputs gives the head's odds of garbage; no ID logit changes by a bit, unless the network is asked to compute in bfloat16.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.outliers.primitives import Rng
from tie_ext.outliers.procedural import Procedural
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.augmentation import corrupt
from tie_ext.training.fit_head import MEMORY, OUTLIERS, STEPS, WEIGHT, fit_head
from tie_ext.utils.checks import check_images, check_labels, describe
from tie_ext.utils.modules import frozen
from tie_ext.utils.random import seeded
from tie_ext.utils.reservoir import Reservoir

LAM = 2.0
"""lambda of level 2, as the loop's default."""


def attach(
    model: nn.Module,
    batches: Iterable,
    num_classes: int,
    low: float | Sequence[float] = 0.0,
    high: float | Sequence[float] = 1.0,
    class_names: Sequence[str] = (),
    synthesizers: Sequence[Synthesizer] | None = None,
    seed: int = 0,
    progress: bool = False,
    autocast_dtype: str = "float32",
) -> TIENet:
    """Give a trained classifier a garbage class, without training it again and without any OOD image.

    Arguments:
        model: A classifier ``(B, C, S, S) -> (B, n)`` in evaluation mode that returns what its last linear layer gives; it is copied. The
            batches are brought to its device.
        batches: ID images, each batch ``(x, y)`` or ``x`` alone, as the model takes them: floating-point ``(B, C, S, S)`` in ``[low, high]``.
            Its training images will do. A ``DataLoader`` or a list: something that can be read more than once.
        num_classes: n.
        low: Smallest value of the images, a number or one a channel (what ``Normalize`` makes of 0).
        high: Largest value of the images (what it makes of 1).
        class_names: Name of each ID class, by label.
        synthesizers: Who proposes outliers, each once fitted to model and images; None for procedural images.
        seed: Of the outliers and of the head.
        progress: Show progress bars.
        autocast_dtype: What the backbone computes in, now and in the network that is returned: ``"float32"``, which stands for the model's own type,
            or ``"bfloat16"``, which is faster where the hardware has it and gives the model's logits as nearly as it can.

    Returns:
        The network in evaluation mode, with tau set: ``net(x)`` gives the model's own logits, ``net.decide(x)`` decides.

    Raises:
        ValueError: If the model is in training mode, has not n outputs, no linear layer to end in, none with a map to read, or returns
            something else than its logits; if there are no images, or they can be read once alone, are not finite, of one shape and in the
            value range, or a class has no samples; if nobody proposes outliers, or autocast_dtype is none. The head has not been trained then.
    """
    if model.training:
        raise ValueError(
            f"Expected a trained model in evaluation mode, but got {type(model).__name__} in training mode; call model.eval()"
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            f"Expected batches that can be read more than once, as a DataLoader or a list, but got a {type(batches).__name__}"
        )
    if isinstance(batches, Dataset) and not isinstance(
        batches, IterableDataset
    ):  # of which some give batches
        raise ValueError(
            f"Expected batches, but got {type(batches).__name__}, which gives one image at a time; put it into DataLoader(..., 128)"
        )
    if synthesizers is not None and not synthesizers:
        raise ValueError(
            "`synthesizers` is empty; pass a Synthesizer, or None for procedural images"
        )
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("Expected at least one batch of ID images, but got an empty loader")
    x, _ = _pair(first)
    check_images(x)
    image_shape = tuple(x.shape[1:])
    with seeded(seed), torch.enable_grad():  # the head learns, whatever the caller needs
        net = TIENet(model, num_classes, image_shape, low, high, class_names, "multilayer").eval()
        net.autocast_dtype = autocast_dtype
        outputs = model(x[:1].to(next(model.parameters()))).shape[1]
        if outputs != num_classes:
            raise ValueError(
                f"Expected a model with {num_classes} outputs, as num_classes says, but got one with {outputs}"
            )
        proposers = [Procedural(net)] if synthesizers is None else list(synthesizers)
        for proposer in proposers:
            with frozen(net):
                proposer.to(net.low.device).fit(net, _Labelled(net, batches), progress=1.0)
        head = cast(GarbageHead, net.garbage)
        inside, logits, outside = _look(net, head, batches, proposers, progress)
        fit_head(head, inside, outside, STEPS, WEIGHT, progress)
        net.tau.fill_(_tau(net, inside, logits))
    return net


def _pair(batch: object) -> tuple[Tensor, Tensor | None]:
    """Images and, where there are any, labels of a batch."""
    if isinstance(batch, Tensor):
        return batch, None
    if (
        isinstance(batch, Sequence)
        and len(batch) == 2
        and all(isinstance(part, Tensor) for part in batch)
    ):
        return batch[0], batch[1].long() if not batch[1].is_floating_point() else batch[1]
    raise ValueError(
        f"Expected batches of images, or of (images, labels), but got {describe(batch)}"
    )


class _Labelled:
    """Batches ``(x, y)`` as synthesizers learn from them; where there are no labels, the network's own."""

    def __init__(self, net: TIENet, batches: Iterable):
        self.net, self.batches = net, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        low, high = self.net.low.cpu(), self.net.high.cpu()
        for batch in self.batches:
            x, y = _pair(batch)
            check_images(x.cpu(), self.net.image_shape, low, high)
            if y is None:
                with torch.no_grad():
                    y = self.net(x.to(self.net.low.device)).argmax(1)
            check_labels(y, len(x), self.net.num_classes)
            yield x.to(self.net.low.device), y.to(self.net.low.device)


@torch.no_grad()
def _look(
    net: TIENet,
    head: GarbageHead,
    batches: Iterable,
    proposers: Sequence[Synthesizer],
    progress: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics ``(2N, S)`` and ID logits ``(2N, n)`` of ID images, as they are and processed, and ``(M, S)`` of outliers; each is read once."""
    device, low, high = net.low.device, net.low.cpu(), net.high.cpu()
    counts = torch.zeros(net.num_classes, dtype=torch.long)
    size = head.mean.numel()
    inside, outside = (
        Reservoir(2 * MEMORY // (4 * (size + net.num_classes))),
        Reservoir(MEMORY // (4 * size)),
    )
    labelled = False
    with frozen(net):
        for batch in tqdm(batches, desc="attach: images", leave=False, disable=not progress):
            x, y = _pair(batch)
            check_images(x.cpu(), net.image_shape, low, high)
            x = x.to(device)
            for images in (net.from_unit(corrupt(net.to_unit(x), Rng(device))), x):
                h, s = net.statistics(images)
                logits = net.fc(h)
                inside.add(torch.cat([s, logits], dim=1))
            if y is None:
                y = logits.argmax(1)
            else:
                check_labels(y, len(x), net.num_classes)
                counts, labelled = counts + y.cpu().bincount(minlength=net.num_classes), True
            for proposer in proposers:
                # Drawn together, which is faster, and read in pieces that fit a processor's cache.
                proposed = proposer.sample(
                    net, x.repeat(OUTLIERS, 1, 1, 1), y.to(device).repeat(OUTLIERS)
                ).x
                for piece in proposed.split(len(x)):
                    outside.add(net.statistics(piece)[1])
    if labelled and (counts == 0).any():
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"Expected samples of all {net.num_classes} classes, but got none of class {missing}"
        )
    if inside.seen < 4:
        raise ValueError(f"Expected at least two ID images, but got {inside.seen // 2}")
    return inside.rows[:, :size], inside.rows[:, size:], outside.rows


@torch.no_grad()
def _tau(net: TIENet, inside: Tensor, logits: Tensor) -> float:
    """The paper's threshold of the ID images' uncertainty. Training images as they are would set it too low: the network knows them by heart."""
    odds = torch.cat([net.garbage(rows) for rows in inside.split(4096)])
    every = torch.cat([logits, logits.logsumexp(1, keepdim=True) + odds], dim=1)
    return exclusion_threshold(uncertainty(upcast(every).softmax(1)), LAM)
