"""How a network learns garbage in the loop: as one more output, or by a head of its own.

Symbols: ``x (B, C, H, W)``; ``y (B,)`` in ``[0, n]``, garbage ``n``; ``logits (B, n+1)``, or
``(B, n)`` of a classifier that is trained without the garbage output.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Prior
from tie_ext.outliers.noise import Noise
from tie_ext.outliers.procedural import Procedural
from tie_ext.scores.decision import upcast
from tie_ext.training.adversarial import max_log_prob, pgd
from tie_ext.training.config import HeadConfig, SampleConfig, TIEConfig
from tie_ext.training.exclusion import Pairs
from tie_ext.training.fit_head import StatisticsCollector, fit_head
from tie_ext.training.pool import GarbagePool, draw
from tie_ext.utils.batchnorm import settle_statistics
from tie_ext.utils.distributed import average_statistics, gathered, total, world
from tie_ext.utils.progress import Progress
from tie_ext.utils.random import HEAD, seeded

GARBAGE_SHARE = 1 / 4
"""Garbage images for each ID image of a batch: their cost in time. Their weight in the loss is
:func:`class_weights`'s. Constant, so that neither memory nor time grows while the pool fills."""
REFERENCE_CLASSES = 10
"""Garbage of weight 1 has the weight of one of so many ID classes. Among a thousand it would
otherwise have a thousandth of the loss."""
IGNORED = -100
"""Label that cross-entropy ignores."""
FULL = 100_000
"""ID images of an epoch after whose training a head on every layer is fitted in full, and
inversion takes all its steps. With fewer the share falls in proportion: docs/research/cost.md has
what TIE then adds to plain training."""
LEAST = 1 / 16
"""The smallest share."""
FEWEST_STEPS = 30
"""Steps of the head in an epoch at least, where so many are asked for."""
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Loss of logits ``(B, n+1)``, targets ``(B,)`` in ``[0, n]`` and class weights ``(n+1,)``."""


def class_weights(counts: Tensor, garbage_weight: float) -> Tensor:
    """Weights ``(n+1,)`` of the cross-entropy for images of each class ``(n,)``: every ID class
    has the same weight in sum, and garbage a tenth of theirs, whatever their number.

    Paper: "proportions". Here: inverse proportions, because only these correct the imbalance that
    the growing garbage class brings.
    """
    counts = counts.clamp(min=1)  # of the first epoch, which has not seen every class yet
    sizes = torch.cat([counts, (counts.sum() * GARBAGE_SHARE)[None]]).float()
    weights = sizes.sum() / (len(sizes) * sizes)
    weights[-1] *= garbage_weight * len(counts) / REFERENCE_CLASSES
    return weights


@dataclass
class GarbageStrategy(abc.ABC):
    """One way to learn garbage."""

    prior_class: ClassVar[type[Prior]]
    """The prior of a pool, unless another is given."""
    prior_images: ClassVar[int]
    """Images of priors that a pool begins with, at most."""
    net: TIENet
    """The network."""
    config: TIEConfig
    """The settings of the loop."""
    pool: GarbagePool
    """The garbage pool."""
    prior: Sequence[Prior]
    """Sources of new garbage images beside the pool."""
    criterion: Criterion
    """The loss of the classifier."""
    head_config: HeadConfig
    """How a head on every layer is fitted."""
    sample_config: SampleConfig
    """How many images are held in memory."""
    progress: bool
    """Whether to show progress bars."""
    frozen: list[nn.Module] = field(default_factory=list)
    """Parts that stay in evaluation mode, such as a BatchNorm layer frozen by ``.eval()``."""

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.net.low.device

    @property
    def in_batches(self) -> bool:
        """Whether the batches of the classifier contain garbage."""
        return len(self.pool) > 0

    @abc.abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """The logits that are trained."""

    @abc.abstractmethod
    def loss(self, logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The loss of logits, a scalar, with the weights ``(n+1,)`` of :func:`class_weights`."""

    @abc.abstractmethod
    def effort(self, images: int) -> float:
        """The share, in (0, 1], of all that follows training in an epoch of so many ID images:
        of the sample, and of the steps of head and synthesizers.
        """

    @abc.abstractmethod
    def candidates(self, sample: int) -> int:
        """Candidates of each synthesizer in an epoch whose sample has so many images."""

    @abc.abstractmethod
    def finish(
        self, sample: Pairs, epoch: int, last: bool, effort: float = 1.0
    ) -> dict[str, float]:
        """What follows the optimiser's steps: BatchNorm's statistics, and the fit of a head.

        Arguments:
            sample: ID images of the epoch.
            epoch: The epoch, from 1.
            last: Whether it is the last of the run.
            effort: The share of :meth:`effort`.

        Returns:
            Losses by name.
        """

    def begin(self) -> None:
        """Put the network into training mode, but for the parts that were in evaluation mode while
        the network was not.
        """
        if self.net.training:
            self.frozen = [part for part in self.net.modules() if not part.training]
        self.net.train()
        self.net.keep_training(None, None)  # of the weights before
        for part in self.frozen:
            part.training = False

    def mix(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """ID batches, each with its share of the garbage pool, on the device of the network."""
        # Asked of all processes: one that skipped a batch alone would leave the others waiting.
        everywhere = not int(total(torch.tensor(int(not self.in_batches)), self.device))
        for x, y in batches:
            count = max(1, round(len(x) * GARBAGE_SHARE)) if self.in_batches else 0
            garbage = self.pool.draw(count).to(self.device)
            if len(x) == 1 and not everywhere:
                continue  # BatchNorm cannot learn from one image
            if self.config.adversarial_steps and len(garbage):
                garbage = pgd(self.net, garbage, self.config.adversarial_steps)
            target = torch.full((len(garbage),), self.net.num_classes, device=y.device)
            x, y = torch.cat([x.to(self.device), garbage]), torch.cat([y, target])
            yield x, y.to(self.device)

    def _settle(self, sample: Pairs) -> None:
        """BatchNorm's running statistics, by a pass over ID images and garbage.

        They lag behind the weights, and behind garbage that is new in every epoch: measured on the
        demo, ID accuracy fell from 100 to 77 % between two epochs and came back in the next.

        Not torch.optim.swa_utils.update_bn, which puts every layer into training mode, also those
        that are frozen, and resets their statistics.
        """
        mixture = (x for x, _ in self.mix(sample))
        # PGD needs the statistics that the pass replaces.
        settle_statistics(self.net, list(mixture) if self.config.adversarial_steps else mixture)


class LinearGarbage(GarbageStrategy):
    """The paper's way: garbage is one more output of the classifier, trained in its batches."""

    prior_class = Noise
    prior_images = 10**9

    def effort(self, images: int) -> float:
        """All, as in the paper."""
        return 1.0

    def candidates(self, sample: int) -> int:
        """As many as the settings ask for."""
        return self.config.candidates

    def logits(self, x: Tensor) -> Tensor:
        """All n+1."""
        return upcast(self.net(x, garbage=True))

    def loss(self, logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The criterion, of all n+1 outputs."""
        return self.criterion(logits, y, weights.to(logits.dtype))

    def finish(
        self, sample: Pairs, epoch: int, last: bool, effort: float = 1.0
    ) -> dict[str, float]:
        """Settle BatchNorm's statistics."""
        self._settle(sample)
        average_statistics(self.net)
        return {}


@dataclass
class MultilayerGarbage(GarbageStrategy):
    """The classifier is trained as if there were no garbage; a head on every layer is fitted after
    it. With adversarial steps the classifier is trained on garbage as well, to be unsure of it.

    Raises:
        ValueError: If the pool is empty, or the criterion is not cross-entropy.
    """

    prior_class = Procedural
    prior_images = 2000  # the head is given new ones in every epoch

    def __post_init__(self) -> None:
        if self.criterion is not F.cross_entropy:
            raise ValueError(
                "Expected cross-entropy beside a garbage head on every layer, which is a class of "
                "its own, but got another criterion"
            )
        if not len(self.pool):
            raise ValueError(
                "Expected a prior for the garbage head on every layer to learn in the first "
                "epoch, but got none"
            )

    def effort(self, images: int) -> float:
        """In proportion to the images, between :data:`LEAST` and, from :data:`FULL` on, 1."""
        return min(1.0, max(LEAST, images / FULL))

    def candidates(self, sample: int) -> int:
        """One for each image of the sample, at most as many as the settings ask for."""
        return min(self.config.candidates, sample)

    @property
    def in_batches(self) -> bool:
        """With adversarial steps alone."""
        return self.config.adversarial_steps > 0

    def logits(self, x: Tensor) -> Tensor:
        """The n of the classifier."""
        return upcast(self.net(x))

    def loss(self, logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy of ID images; with adversarial steps, confidence on garbage as well."""
        weights = weights[:-1].to(logits.dtype)
        if not self.in_batches:
            return F.cross_entropy(logits, y, weights)
        classes = y.where(y < self.net.num_classes, IGNORED)
        adversarial = self.config.garbage_weight * max_log_prob(logits, y)
        return F.cross_entropy(logits, classes, weights, ignore_index=IGNORED) + adversarial

    def finish(
        self, sample: Pairs, epoch: int, last: bool, effort: float = 1.0
    ) -> dict[str, float]:
        """Settle BatchNorm's statistics where garbage moved them, and fit the head."""
        if self.in_batches:
            self._settle(sample)
        average_statistics(self.net)
        return {"head": self._fit_head(sample, epoch, last, effort)}

    def _fit_head(self, sample: Pairs, epoch: int, last: bool, effort: float) -> float:
        """Fit the head to the sample, to the pool, and to new images of the prior; its loss."""
        config = self.head_config
        few = min(config.epoch_steps, max(FEWEST_STEPS, round(effort * config.epoch_steps)))
        statistics = StatisticsCollector(self.net, config.memory // world(), config.corruption)
        bar = f"epoch {epoch}: head"
        for x, _ in Progress(sample, bar, disable=not self.progress):
            statistics.add_id(x.to(self.device))
        for images in self._garbage(sum(len(x) for x, _ in sample), last):
            statistics.add_ood(images, self.sample_config.batch_size)
        # The same statistics and random numbers in every process, so that all heads stay one.
        with seeded(self.config.seed, epoch, 0, HEAD):
            return fit_head(
                cast(GarbageHead, self.net.garbage),
                gathered(statistics.id.rows, self.device),
                gathered(statistics.ood.rows, self.device),
                replace(
                    config,
                    steps=config.steps if last else few,
                    weight=config.weight * self.config.garbage_weight,
                ),
                self.progress,
            )

    def _garbage(self, count: int, last: bool) -> Iterator[Tensor]:
        """So many images of the pool, and as many times so many new ones of each prior as the
        config says; a few at a time.
        """
        outliers = self.head_config.outliers if last else self.head_config.epoch_outliers
        shape = self.pool.image_shape
        at_once = self.sample_config.at_once(shape)
        for first in range(0, count, at_once):
            yield self.pool.draw(min(at_once, count - first))
        for prior in self.prior:
            yield from draw(prior, count * outliers, shape, at_once)
