r"""Pictures of a classifier: what each class looks like to it, and which of its layers find an image unlike all that it knows.

Symbols: ``x (B, C, S, S)`` images; ``s (B, S)`` the statistics of every layer (:mod:`tie_ext.models.head`); ``z`` statistics standardised on ID images,
of all classes or of one.

.. math:: L = \mathrm{CE}(y, \mathrm{softmax}(\mathrm{logits})) + \lambda \, \mathrm{mean}_i \log(1 + z_i^2)

A generator that starts afresh minimises this: images that the network takes for the class *and* that every layer finds to be as images of the class
are, wherever in the frame they stand. The first term alone finds fooling images (docs/research/fooling.md). The logarithm is there because statistics
start thousands of deviations away. Images are blurred a little, or the generator's stripes would be in them, and moved before the network sees them,
anew in each step: what is left is what networks trained apart see too. Any classifier will do; it needs no garbage class.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tie_ext.models.generator import Generator
from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import find_layers
from tie_ext.models.network import TIENet
from tie_ext.models.statistics import MAX_CHANNELS, STATISTICS
from tie_ext.outliers.base import Loader
from tie_ext.outliers.inversion import CLEAR, soft_code
from tie_ext.utils.checks import check_images, check_labels
from tie_ext.utils.modules import evaluating, frozen
from tie_ext.utils.random import seeded

STEPS, BATCH, RATE = 600, 32, 2e-3
"""How the generator learns: steps, images a step, Adam's learning rate."""
LIKE = 1.0
"""Weight of the statistics in its loss: lambda."""


MOVED = 8
"""Images are moved by at most this part of their size, as in training."""


class Outside(NamedTuple):
    """How far outside ID images each layer finds images to be."""

    far: Tensor
    """``(B, L)`` root mean square of a layer's standardised statistics; 1 is usual, larger = more OOD."""
    times: Tensor
    """``(B, L)`` the same as a multiple of what 5 % of held-out ID images exceed; above 1 = outside."""
    share: Tensor
    """``(B, L)`` share of held-out ID images that are as far or farther, in [0, 1]; smaller = more OOD."""


class Layers:
    """What every layer of a classifier says of ID images, and so how unlike them it finds others.

    Arguments:
        net: The network, with a head on every layer; of the head only what it reads counts.
        batches: ID images ``(x, y)``; its training images will do.

    Raises:
        ValueError: If the network has another garbage logit, an image is not as it takes them, or there are fewer than two of a class.
    """

    def __init__(self, net: TIENet, batches: Loader):
        if not isinstance(net.garbage, GarbageHead):
            raise ValueError(
                "Expected a network with a head on every layer, but got one with a linear garbage logit"
            )
        self.net, self.head = net, net.garbage
        self.names = (*self.head.layers, "features")
        self.sizes = [
            STATISTICS * min(channels, MAX_CHANNELS) for channels in self.head.layers.values()
        ]
        n, size = net.num_classes, self.head.mean.numel()
        count, total, square = (
            torch.zeros(n),
            torch.zeros(n, size, dtype=torch.float64),
            torch.zeros(n, size, dtype=torch.float64),
        )
        for x, y in batches:
            check_labels(y, len(x), n)
            s = self.read(x).double().cpu()
            count.index_add_(0, y.cpu(), torch.ones(len(y)))
            total.index_add_(0, y.cpu(), s)
            square.index_add_(0, y.cpu(), s.square())
        if (count < 2).any():
            raise ValueError(
                f"Expected two images of each class or more, but got {int(count.min())} of class {int(count.argmin())}"
            )
        self.of_class = _scale(count[:, None], total, square)
        self.of_all = tuple(
            part[0]
            for part in _scale(
                count.sum()[None, None], total.sum(0, keepdim=True), square.sum(0, keepdim=True)
            )
        )
        self.held = torch.empty(0, len(self.names))

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """The statistics ``(B, S)`` of images ``(B, C, S, S)``.

        Raises:
            ValueError: If they are not finite and floating-point, of the shape and in the value range of training.
        """
        self.net.check(x)
        with evaluating(self.net):
            return self.net.statistics(x.to(self.net.low.device))[1]

    def far(self, x: Tensor) -> Tensor:
        """Root mean square ``(B, L)`` of each layer's standardised statistics, of images ``(B, C, S, S)``; 1 is usual, larger = more OOD."""
        mean, deviation = (part.to(self.net.low.device) for part in self.of_all)
        squares = ((self.read(x) - mean) / deviation).square()
        features, *layers = squares.split([self.head.feature_size, *self.sizes], dim=1)
        return torch.stack([part.mean(1).sqrt() for part in (*layers, features)], dim=1).cpu()

    def hold(self, batches: Iterable) -> None:
        """Take ID images that nothing was trained on, batches ``x`` or ``(x, y)``, as what is usual."""
        self.held = (
            torch.cat(
                [self.far(batch if isinstance(batch, Tensor) else batch[0]) for batch in batches]
            )
            .sort(0)
            .values
        )

    def outside(self, x: Tensor) -> Outside:
        """Which layers find images ``(B, C, S, S)`` unlike ID ones, and how far; :meth:`hold` comes first.

        Raises:
            ValueError: If nothing was held out, or the images are not as :meth:`read` wants them.
        """
        if not len(self.held):
            raise ValueError(
                "Expected held-out ID images to compare with, but got none; call hold(batches) first"
            )
        far = self.far(x)
        below = torch.searchsorted(self.held.T.contiguous(), far.T.contiguous()).T
        return Outside(
            far, far / self.held.quantile(0.95, dim=0), 1 - below.to(far) / len(self.held)
        )


class Explanation(NamedTuple):
    """What :func:`explain` finds."""

    layers: Layers
    """What each layer says."""
    inversions: Tensor
    """``(n, k, C, S, S)`` what each class looks like to the network, in its value range."""
    nearest: Tensor
    """``(n, k, C, S, S)`` beside each the training image of its class that is nearest in penultimate features."""
    agreement: float
    """Share of the inversions that the network takes for the class asked for, in [0, 1]."""


def explain(
    model: nn.Module | TIENet,
    batches: Loader,
    num_classes: int | None = None,
    low: float | Sequence[float] = 0.0,
    high: float | Sequence[float] = 1.0,
    per_class: int = 4,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = False,
) -> Explanation:
    """Invert a trained classifier, and learn what each of its layers finds usual.

    Arguments:
        model: A :class:`TIENet`, or any classifier ``(B, C, S, S) -> (B, n)`` in evaluation mode; it is copied.
        batches: ID images ``(x, y)`` as the model takes them; its training images will do. Something that can be read twice.
        num_classes: n; None for a TIENet's own.
        low: Smallest value of the images; a TIENet has its own.
        high: Largest value; a TIENet has its own.
        per_class: Inversions of each class: k.
        steps: Of the generator.
        seed: Of the generator.
        progress: Show a progress bar.

    Raises:
        ValueError: If num_classes is missing, or model or images are not as expected.
    """
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("Expected at least one batch of ID images, but got an empty loader")
    check_images(first[0])
    with seeded(seed):
        net = _readable(model, tuple(first[0].shape[1:]), num_classes, low, high)
        layers = Layers(net, batches)
        x, agreement = _invert(layers, per_class, steps, progress)
    n = net.num_classes
    return Explanation(
        layers,
        x.reshape(n, per_class, *x.shape[1:]),
        _nearest(net, x, per_class, batches),
        agreement,
    )


def _readable(
    model: nn.Module | TIENet,
    shape: tuple[int, ...],
    n: int | None,
    low: float | Sequence[float],
    high: float | Sequence[float],
) -> TIENet:
    """A copy of the network with a head that reads its layers."""
    if isinstance(model, TIENet):
        if isinstance(model.garbage, GarbageHead):
            return copy.deepcopy(model).eval()
        net = copy.deepcopy(model)
        device = net.low.device
        net.garbage = GarbageHead(
            find_layers(net.backbone, net.from_unit(torch.full((1, *shape), 0.5, device=device))),
            net.feature_size,
        ).to(device)
        return net.eval()
    if n is None:
        raise ValueError("Expected num_classes for a network that is no TIENet, but got None")
    return TIENet(model, n, shape, low, high, head="multilayer").eval()


def _invert(layers: Layers, per_class: int, steps: int, progress: bool) -> tuple[Tensor, float]:
    """Inversions ``(n k, C, S, S)``, class by class, and the share that the network takes for the class asked for."""
    net = layers.net
    device, n = net.low.device, net.num_classes
    means, deviations = (part.to(device) for part in layers.of_class)

    def generate(y: Tensor) -> Tensor:
        return _blurred(
            generator(
                torch.randn(len(y), generator.latent_size, device=device), soft_code(y, n, CLEAR)
            )
        )

    with frozen(net), torch.enable_grad():
        generator = Generator(net.image_shape or (), n, low=net.low.cpu(), high=net.high.cpu()).to(
            device
        )
        optimizer = torch.optim.Adam(generator.parameters(), lr=RATE)
        for step in tqdm(
            range(steps), desc="explain: inversion", leave=False, disable=not progress
        ):
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            y = torch.randint(n, (BATCH,), device=device)
            h, s = net.statistics(_moved(generate(y)))
            unlike = ((s - means[y]) / deviations[y]).square().log1p().mean()
            loss = F.cross_entropy(net.fc(h), y) + LIKE * unlike
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        y = torch.arange(n, device=device).repeat_interleave(per_class)
        with evaluating(generator), torch.no_grad():
            x = torch.cat([generate(part) for part in y.split(BATCH)])
            label = torch.cat([net(part).argmax(1) for part in x.split(BATCH)])
    return x.cpu(), (label == y).double().mean().item()


def _blurred(x: Tensor) -> Tensor:
    """Images ``(B, C, S, S)``, each pixel a mean of the nine around it, weighted 1 2 1 in both directions."""
    weights = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    kernel = torch.outer(weights, weights).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(F.pad(x, (1,) * 4, mode="replicate"), kernel, groups=x.shape[1])


def _moved(x: Tensor) -> Tensor:
    """Images ``(B, C, S, S)``, all moved by the same few pixels; their edge is drawn out."""
    size = x.shape[-1]
    most = size // MOVED
    top, left = torch.randint(2 * most + 1, (2,)).tolist()
    return F.pad(x, (most,) * 4, mode="replicate")[..., top : top + size, left : left + size]


@torch.no_grad()
def _nearest(net: TIENet, x: Tensor, per_class: int, batches: Loader) -> Tensor:
    """For inversions ``(n k, C, S, S)``, class by class, the nearest training image of their class, ``(n, k, C, S, S)``."""
    device, n = net.low.device, net.num_classes
    with evaluating(net):
        h = net.features(x.to(device)).reshape(n, per_class, -1)
        found, least = (
            torch.zeros(n, per_class, *x.shape[1:]),
            torch.full((n, per_class), math.inf),
        )
        for images, y in batches:
            distance = (
                torch.cdist(h.flatten(0, 1), net.features(images.to(device)))
                .cpu()
                .reshape(n, per_class, -1)
            )
            distance = distance.masked_fill(y.cpu() != torch.arange(n)[:, None, None], math.inf)
            value, place = distance.min(2)
            closer = value < least
            found[closer], least[closer] = images.cpu()[place[closer]].to(found), value[closer]
    return found


def _scale(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``(K, S)`` of sums; what never varies counts in units of its own size, as in the head."""
    mean = total / count
    deviation = ((square - count * mean.square()) / (count - 1)).clamp_min(0).sqrt()
    unit = 1 + mean.abs()
    return mean.float(), torch.where(deviation > 1e-4 * unit, deviation, unit).float()
