r"""What each class looks like to a classifier, and which of its layers find an image unusual.

Symbols: ``x (B, C, S, S)`` images; ``s (B, S)`` the statistics of every layer
(:mod:`tie_ext.models.head`); ``z`` statistics standardised on ID images, of all classes or of one.

.. math:: L = \mathrm{CE}(y, \mathrm{softmax}(\mathrm{logits}))
    + \lambda \, \mathrm{mean}_i \log(1 + z_i^2)

A new generator minimises this. It finds images that the network assigns to the class *and* whose
statistics are, in every layer, like those of the class. The first term alone finds fooling images
(docs/research/fooling.md). The logarithm is needed because statistics start thousands of
deviations away. Images are blurred, against the generator's stripes, and shifted before the
network sees them, anew in each step: what remains is what networks trained separately recognise
too. Any classifier will do; it needs no garbage class.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from tie_ext.models.generator import Generator
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet, multilayer_head
from tie_ext.models.statistics import EVERY
from tie_ext.outliers.base import Loader
from tie_ext.outliers.inversion import CLEAR, soft_code
from tie_ext.scores.decision import upcast
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.progress import Progress
from tie_ext.utils.random import FIRST_BATCH, seeded
from tie_ext.utils.views import eval_view, frozen_view

STEPS, BATCH, LR = 600, 32, 2e-3
"""Steps of the generator, images in a step, and Adam's learning rate in the first, which falls
along half a cosine."""
MAX_SHIFT = 8
"""Images are shifted by at most this fraction of their size: 1/8, as in training."""


class LayerDistances(NamedTuple):
    """How far each layer finds images from ID images."""

    distance: Tensor
    """``(B, L)`` root mean square of a layer's standardised statistics; about 1 for ID images,
    larger = more OOD."""
    relative_distance: Tensor
    """``(B, L)`` the distance divided by the one that 5 % of calibration images exceed; above 1 =
    unusual."""
    p_value: Tensor
    """``(B, L)`` share of calibration images that are as far or farther, in [0, 1]; smaller = more
    OOD."""


class Layers:
    """How unlike ID images every layer of a classifier finds others.

    Arguments:
        net: The network, with a head on every layer, of which only the choice of layers counts.
        loader: ID images with labels (:mod:`tie_ext.utils.loader`); the training images will do.

    Raises:
        ValueError: If the network has a linear garbage logit, an image is of another shape or
            range, or a class has fewer than two images.
    """

    def __init__(self, net: TIENet, loader: Iterable):
        if not isinstance(net.garbage, GarbageHead):
            raise ValueError(
                "Expected a network with a head on every layer, but got one with a linear garbage "
                "logit"
            )
        self.net, self.head = net, net.garbage
        self.names = (*self.head.layers, "features")
        self.sizes = self.head.sizes
        n, size = net.num_classes, self.head.mean.numel()
        count, total = torch.zeros(n), torch.zeros(n, size, dtype=torch.float64)
        square = torch.zeros_like(total)
        for x, y in _labelled(net, loader):
            s, y = self.read(x).double().cpu(), y.cpu()
            count.index_add_(0, y, torch.ones(len(y)))
            total.index_add_(0, y, s)
            square.index_add_(0, y, s.square())
        if (count < 2).any():
            raise ValueError(
                f"Expected two images of each class or more, but got {int(count.min())} of class "
                f"{int(count.argmin())}"
            )
        self.of_class = _mean_and_deviation(count[:, None], total, square)
        of_all = (part.sum(0, keepdim=True) for part in (count[:, None], total, square))
        self.of_all = tuple(part[0] for part in _mean_and_deviation(*of_all))
        self.calibration = torch.empty(0, len(self.names))

    @torch.no_grad()
    def read(self, x: Tensor) -> Tensor:
        """The statistics ``(B, S)`` of images ``(B, C, S, S)``.

        Raises:
            ValueError: If they are not finite and floating-point, of the shape and in the value
                range of training.
        """
        self.net.check(x)
        return eval_view(self.net).statistics(x.to(self.net.low.device))[1]

    def distance(self, x: Tensor) -> Tensor:
        """Distance ``(B, L)`` of images ``(B, C, S, S)`` from ID images, of each layer: the root
        mean square of its standardised statistics; about 1 for ID images, larger = more OOD.
        """
        mean, deviation = (part.to(self.net.low.device) for part in self.of_all)
        squares = ((self.read(x) - mean) / deviation).square()
        features, *layers = squares.split([self.head.feature_size, *self.sizes], dim=1)
        return torch.stack([part.mean(1).sqrt() for part in (*layers, features)], dim=1).cpu()

    def calibrate(self, loader: Iterable) -> None:
        """Take the distances of held-out ID images, which nothing was trained on, as usual.

        Raises:
            ValueError: If an image is not as :meth:`read` expects it, or there is none.
        """
        distances = [self.distance(batch.images) for batch in _reader(self.net, loader)]
        self.calibration = torch.cat(distances).sort(0).values

    def compare(self, x: Tensor) -> LayerDistances:
        """Compare images ``(B, C, S, S)`` with those of :meth:`calibrate`, which comes first.

        Raises:
            ValueError: If there are no calibration images, or the images are not as :meth:`read`
                expects them.
        """
        if not len(self.calibration):
            raise ValueError(
                "Expected calibration images to compare with, but got none; call "
                "calibrate(calibration_loader) first"
            )
        distance, columns = self.distance(x), self.calibration.T.contiguous()
        below = torch.searchsorted(columns, distance.T.contiguous()).T
        relative = distance / self.calibration.quantile(0.95, dim=0)
        return LayerDistances(distance, relative, 1 - below.to(distance) / len(self.calibration))


class Explanation(NamedTuple):
    """What :func:`explain` finds."""

    layers: Layers
    """The statistics of every layer."""
    inversions: Tensor
    """``(n, k, C, S, S)`` what each class looks like to the network, in its value range."""
    nearest: Tensor
    """``(n, k, C, S, S)`` for each the training image of its class that is nearest in penultimate
    features."""
    agreement: float
    """Share of the inversions that the network assigns to their class, in [0, 1]."""


@without_autocast
def explain(
    model: nn.Module | TIENet,
    loader: Iterable,
    num_classes: int | None = None,
    low: float | Sequence[float] = 0.0,
    high: float | Sequence[float] = 1.0,
    per_class: int = 4,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = False,
    statistics_weight: float = 1.0,
) -> Explanation:
    """Invert a trained classifier, and measure the statistics of its layers on ID images.

    Arguments:
        model: A :class:`TIENet`, or any classifier ``(B, C, S, S) -> (B, n)``; it is copied.
        loader: ID images with labels as the model takes them (:mod:`tie_ext.utils.loader`); its
            training images will do. Something that can be read more than once.
        num_classes: n; None for a TIENet's own.
        low: Smallest value of the images; a TIENet has its own.
        high: Largest value; a TIENet has its own.
        per_class: Inversions of each class: k.
        steps: Steps of the generator.
        seed: Seed of the generator.
        progress: Show a progress bar.
        statistics_weight: lambda, the weight of the statistics in the generator's loss.

    Raises:
        ValueError: If num_classes is missing, or model or images are not as expected.
    """
    with seeded(seed, FIRST_BATCH):
        shape = BatchReader(loader).first().images.shape[1:]
    with seeded(seed), torch.inference_mode(False):
        net = _with_head(model, shape, num_classes, low, high)
        layers = Layers(net, loader)
        x, agreement = _invert(layers, per_class, steps, statistics_weight, progress)
    inversions = x.reshape(net.num_classes, per_class, *shape)
    return Explanation(layers, inversions, _nearest(net, inversions, loader), agreement)


def _reader(net: TIENet, loader: Iterable, labelled: bool = False) -> BatchReader:
    bounds = net.num_classes, net.image_shape, net.low, net.high
    return BatchReader(loader, *bounds, labelled=labelled, id_only=True, rereadable=False)


def _labelled(net: TIENet, loader: Iterable) -> Loader:
    return cast(Loader, _reader(net, loader, labelled=True))


def _with_head(
    model: nn.Module | TIENet,
    shape: Sequence[int],
    n: int | None,
    low: float | Sequence[float],
    high: float | Sequence[float],
) -> TIENet:
    """A copy of the network with a head that reads every statistic of every layer."""
    if isinstance(model, TIENet):
        net = copy.deepcopy(model).eval()
    elif n is None:
        raise ValueError("Expected num_classes for a network that is no TIENet, but got None")
    else:
        net = TIENet(model, n, shape, low, high).eval()
    head = net.garbage
    if not isinstance(head, GarbageHead):
        head = multilayer_head(net, shape)
    net.garbage = GarbageHead(head.layers, net.feature_size, per_channel=EVERY).to(net.low.device)
    return net


def _invert(
    layers: Layers, per_class: int, steps: int, statistics_weight: float, progress: bool
) -> tuple[Tensor, float]:
    """Inversions ``(n k, C, S, S)``, class by class, and the share assigned to their class."""
    net, n, device = frozen_view(layers.net), layers.net.num_classes, layers.net.low.device
    means, deviations = (part.to(device) for part in layers.of_class)

    def generate(generator: Generator, y: Tensor) -> Tensor:
        z = torch.randn(len(y), generator.latent_size, device=device)
        return _blur(generator(z, soft_code(y, n, CLEAR)))

    generator = Generator(net.image_shape or (), n, low=net.low.cpu(), high=net.high.cpu())
    generator = generator.to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=LR)
    schedule = CosineAnnealingLR(optimizer, max(1, steps))
    with torch.enable_grad():
        for _ in Progress(range(steps), "explain: inversion", disable=not progress):
            y = torch.randint(n, (BATCH,), device=device)
            h, s = net.statistics(_shift(generate(generator, y)))
            unlike = ((s - means[y]) / deviations[y]).square().log1p().mean()
            loss = F.cross_entropy(upcast(net.fc(h)), y) + statistics_weight * unlike
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    generator, y = generator.eval(), torch.arange(n, device=device).repeat_interleave(per_class)
    with torch.no_grad():
        x = torch.cat([generate(generator, part) for part in y.split(BATCH)])
        label = torch.cat([net(part).argmax(1) for part in x.split(BATCH)])
    return x.cpu(), (label == y).double().mean().item()


def _blur(x: Tensor) -> Tensor:
    """Images ``(B, C, S, S)`` under a binomial filter, 1 2 1 in both directions."""
    pairs = F.avg_pool2d(F.pad(x, (1,) * 4, mode="replicate"), 2, stride=1)
    return F.avg_pool2d(pairs, 2, stride=1)


def _shift(x: Tensor) -> Tensor:
    """Images ``(B, C, S, S)``, all shifted by the same few pixels; their border is continued."""
    H, W = x.shape[-2:]
    reach = min(H, W) // MAX_SHIFT
    top, left = torch.randint(2 * reach + 1, (2,)).tolist()
    return F.pad(x, (reach,) * 4, mode="replicate")[..., top : top + H, left : left + W]


@torch.no_grad()
def _nearest(net: TIENet, inversions: Tensor, loader: Iterable) -> Tensor:
    """The nearest training image of its class for each inversion ``(n, k, C, S, S)``."""
    view, device = eval_view(net), net.low.device
    h = upcast(view.features(inversions.flatten(0, 1).to(device)))
    nearest, least = torch.zeros_like(inversions), torch.full(inversions.shape[:2], math.inf)
    classes = torch.arange(net.num_classes)[:, None, None]
    for x, y in _labelled(net, loader):
        distance = (
            torch.cdist(h, upcast(view.features(x.to(device)))).cpu().reshape(*least.shape, -1)
        )
        value, place = distance.masked_fill(y.cpu() != classes, math.inf).min(2)
        closer = value < least
        nearest[closer], least[closer] = x.cpu()[place[closer]], value[closer]
    return nearest


def _mean_and_deviation(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``(K, S)`` of sums ``(K, S)`` over ``count (K, 1)`` images.

    A statistic that never varies counts in units of its own size, as in the head.
    """
    mean = total / count
    deviation = ((square - count * mean.square()) / (count - 1)).clamp_min(0).sqrt()
    unit = 1 + mean.abs()
    return mean.float(), torch.where(deviation > 1e-4 * unit, deviation, unit).float()
