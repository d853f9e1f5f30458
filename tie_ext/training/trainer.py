"""TIE's loop: train, invert, exclude, once an epoch, as in the paper's algorithm 1.

Symbols: ``x (B, C, H, W)``; ``y (B,)`` in ``[0, n)``; garbage index ``n``; ``logits (B, n+1)``;
``u`` uncertainties (UE); ``tau`` the threshold on them.
"""

import copy
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Loader, Prior, Synthesizer
from tie_ext.outliers.inversion import Inversion
from tie_ext.training.checkpoint import load_training, save_training
from tie_ext.training.config import HeadConfig, SampleConfig, TIEConfig
from tie_ext.training.exclusion import Pairs, exclude
from tie_ext.training.log import EpochLog
from tie_ext.training.pool import GarbagePool
from tie_ext.training.strategies import (
    Criterion,
    LinearGarbage,
    MultilayerGarbage,
    class_weights,
)
from tie_ext.training.survey import check_counts, survey
from tie_ext.utils.distributed import (
    average_gradients,
    broadcast,
    gathered,
    rank,
    share,
    total,
    world,
)
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.progress import Progress
from tie_ext.utils.random import FIRST_POOL, FIRST_WEIGHTS, SURVEY, seeded
from tie_ext.utils.reservoir import Reservoir


class TIETrainer:
    """Trains a :class:`tie_ext.models.network.TIENet`, one epoch a call.

    The random numbers of an epoch depend on ``config.seed`` and the epoch alone, so that a run
    that was stopped between epochs and resumed equals one that was not. Under
    ``torch.distributed`` each process reads its own share of the batches, keeps its own share of
    the pool, and saves its own file; networks, generators and tau are the same in all.

    A linear garbage logit is trained in the batches of the classifier
    (:class:`~tie_ext.training.strategies.LinearGarbage`). A head on every layer is fitted after it
    (:class:`~tie_ext.training.strategies.MultilayerGarbage`): the classifier is trained as any
    network is, unless ``config.adversarial_steps`` asks for more.

    Parts of the network that are in evaluation mode while the network is in training mode, such as
    a BatchNorm layer frozen by ``.eval()``, stay so.

    Arguments:
        net: The network, with its ``image_shape``, on its device.
        config: The settings of the loop.
        synthesizers: Propose the outliers; None for TIE's own, ``[Inversion(net)]``; an empty list
            for a pool that stays as it began (the paper's "No TIE").
        prior: What the pool begins with. None for procedural images with a head on every layer,
            and for multi-scale noise with a linear garbage logit; an empty list for nothing: the
            first epoch then trains on ID images alone.
        criterion: The loss of the classifier.
        progress: Show progress (:mod:`tie_ext.utils.progress`).
        head_config: How a head on every layer is fitted.
        sample_config: How many ID images of an epoch are kept for what follows training.

    Raises:
        ValueError: If the network has no image shape, or one that no generator can make; or if its
            garbage head reads every layer, and there is no prior, or another criterion than
            cross-entropy.

    Example:
        >>> trainer = TIETrainer(TIENet(Conv3(), 10, (1, 28, 28)), TIEConfig(epochs=1))
        >>> log = trainer.epoch(loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: TIENet,
        config: TIEConfig | None = None,
        synthesizers: Sequence[Synthesizer] | None = None,
        prior: Sequence[Prior] | None = None,
        criterion: Criterion = F.cross_entropy,
        progress: bool = False,
        head_config: HeadConfig | None = None,
        sample_config: SampleConfig | None = None,
    ):
        if net.image_shape is None:
            raise ValueError(
                "Expected a TIENet with an image_shape to invert, but got None; give it as "
                "TIENet(..., image_shape=(C, S, S))"
            )
        self.net, self.config, self.criterion = net, config or TIEConfig(), criterion
        self.head_config = head_config or HeadConfig()
        self.sample_config = sample_config or SampleConfig()
        self.image_shape, self.progress, self.device = net.image_shape, progress, net.low.device
        net.autocast_dtype = self.config.autocast_dtype
        broadcast(net)
        multilayer = isinstance(net.garbage, GarbageHead)
        strategy = MultilayerGarbage if multilayer else LinearGarbage
        with seeded(self.config.seed, 0, rank(), FIRST_WEIGHTS):
            if synthesizers is None:
                synthesizers = [Inversion(net)]
            if prior is None:
                prior = [strategy.prior_class(net)]
        self.synthesizers, self.prior = list(synthesizers), list(prior)
        self.pool = self._begun_pool(strategy.prior_images)
        self.garbage = strategy(
            net,
            self.config,
            self.pool,
            self.prior,
            criterion,
            self.head_config,
            self.sample_config,
            progress,
        )
        for synthesizer in self.synthesizers:
            broadcast(synthesizer.to(self.device))
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), self.config.lr)
        self.counts: Tensor | None = None  #: ID images of each class (n,), after the first epoch
        self.log: list[EpochLog] = []
        self._counted = False  # whether this process has read its data once

    def _begun_pool(self, most: int) -> GarbagePool:
        """The pool as a run begins, with so many images of the priors at most."""
        net, size = self.net, share(self.config.pool_size)
        pool = GarbagePool(size, self.image_shape, net.low, net.high)
        with seeded(self.config.seed, 0, rank(), FIRST_POOL):
            pool.begin(self.prior, share(most), self.sample_config.at_once(self.image_shape))
        return pool

    def epoch(self, loader: Iterable) -> EpochLog:
        """Train, invert, exclude.

        Arguments:
            loader: ID images ``(B, C, S, S)`` in ``[low, high]`` with labels ``(B,)`` in
                ``[0, n)``, in pairs or dicts (:mod:`tie_ext.utils.loader`); images with a label
                < 0 are left out. Something that can be read again and again.

        Returns:
            The :class:`EpochLog`, also appended to ``self.log``.

        Raises:
            ValueError: If the data is empty, of the wrong shape, type or range, lacks a class, or
                can be read only once. In the first epoch network and optimiser are as they were.
            FloatingPointError: If the loss is no longer finite.
        """
        t, n = len(self.log), self.net.num_classes
        bounds = self.image_shape, self.net.low, self.net.high
        reader = BatchReader(loader, n, *bounds, labelled=True, id_only=True)
        batches = cast(Loader, reader)  # labelled
        if world() > 1 and not self._counted:
            with seeded(self.config.seed, 0, rank(), SURVEY):
                self._count(survey(batches, n, self.device))
        with seeded(self.config.seed, t + 1, rank()):
            start = time.perf_counter()
            losses, sample = self._train(batches) if self._counted else self._train_first(batches)
            trained = time.perf_counter()
            for synthesizer in self.synthesizers:
                synthesizer.effort, synthesizer.title = self._effort, self._title("invert")
                losses |= synthesizer.fit(self.net, batches, t / max(1, self.config.epochs - 1))
            inverted = time.perf_counter()
            candidates = self.garbage.candidates(world() * sum(len(y) for _, y in sample))
            outcome = exclude(
                self.net, sample, self.synthesizers, self.pool, self.config, candidates, self._bar
            )
            excluded = time.perf_counter()
        stages = {"train": trained - start, "invert": inverted - trained}
        seconds = {**stages, "exclude": excluded - inverted}
        pool = int(total(torch.tensor(len(self.pool)), self.device))
        log = EpochLog(epoch=t + 1, losses=losses, pool=pool, seconds=seconds, **outcome)
        self.log.append(log)
        return log

    def _train(self, batches: Loader) -> tuple[dict[str, float], Pairs]:
        """A step on each batch of ID images and garbage; losses by name, and the sample."""
        self.garbage.begin()
        self.optimizer.param_groups[0]["lr"] = self.config.lr_in(len(self.log))
        seen, losses, sample = torch.zeros(self.net.num_classes).long(), [], self._reservoir()
        counts = seen if self.counts is None else self.counts
        bar = self._bar(None, "train", unit=" images")
        for x, y in self.garbage.mix(sample.passing(_counting(batches, seen, bar))):
            weights = class_weights(counts, self.config.garbage_weight).to(self.device)
            loss = self.garbage.loss(self.garbage.logits(x), y, weights)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(self.net)
            self.optimizer.step()
            bar.loss = loss.detach()
            losses.append(bar.loss)
        bar.close()
        if not losses:
            raise ValueError("Expected batches of two or more images in every epoch, but got none")
        mean = float(gathered(torch.stack(losses), self.device).mean())
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"Expected a finite training loss, but got {mean} in epoch {len(self.log) + 1}; "
                "lower `lr`"
            )
        if not self._counted:
            self._count(seen)
        kept = self._kept(sample)
        finished = self.garbage.finish(kept, len(self.log) + 1, self._last, self._effort)
        return {"classifier": mean, **finished}, kept

    def _train_first(self, batches: Loader) -> tuple[dict[str, float], Pairs]:
        """:meth:`_train`; bad data leaves network and optimiser as they were."""
        before = copy.deepcopy((self.net.state_dict(), self.optimizer.state_dict()))
        modes = [(part, part.training) for part in self.net.modules()]
        try:
            return self._train(batches)
        except ValueError:
            self.net.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            self.optimizer.zero_grad(set_to_none=True)
            for part, mode in modes:
                part.training = mode
            raise

    def _reservoir(self) -> Reservoir:
        """The sample of ID images that this epoch keeps at most."""
        size = min(self._sample_size, self.sample_config.capacity(self.image_shape))
        # A stream of its own, so that a classifier beside a head is trained on the images that any
        # other method would train it on.
        stream = torch.Generator().manual_seed((torch.initial_seed() + 1) % 2**63)
        return Reservoir(share(size), stream)

    def _kept(self, sample: Reservoir) -> Pairs:
        """The share of the sample that what follows training is computed from; in the last epoch,
        whose head people use, as many images as attach fits one to. It is taken now, as the first
        epoch has not known before how many images there are.
        """
        columns, count = sample.columns, round(self._effort * self._sample_size)
        if self._last:
            count = max(count, min(self._sample_size, self.garbage.head_config.max_images))
        count = share(count)
        if len(columns[0]) > count:
            rows = torch.randperm(len(columns[0]), generator=sample.generator)[:count]
            columns = tuple(column[rows.to(column.device)] for column in columns)
        size = self.sample_config.batch_size
        return list(zip(*(column.split(size) for column in columns), strict=True))

    @property
    def _effort(self) -> float:
        """The share of :meth:`~tie_ext.training.strategies.GarbageStrategy.effort` for the images
        of the first epoch.
        """
        return self.garbage.effort(int(cast(Tensor, self.counts).sum()))

    @property
    def _sample_size(self) -> int:
        """Images of the sample in full, of all processes."""
        return self.sample_config.last_size if self._last else self.sample_config.size

    @property
    def _last(self) -> bool:
        """Whether this is the last epoch, whose network will be used."""
        return len(self.log) + 1 >= self.config.epochs

    def _count(self, counts: Tensor) -> None:
        """Take note of the images of each class ``(n,)``, which this process has read once."""
        check_counts(counts, self.counts)
        self.counts, self._counted = counts if self.counts is None else self.counts, True

    def _bar(self, batches: Iterable | None, name: str, **how: str) -> Progress:
        return Progress(batches, self._title(name), disable=not self.progress, **how)

    def _title(self, name: str) -> str:
        return f"epoch {len(self.log) + 1}: {name}" if self.progress else ""

    def save(self, path: str | os.PathLike) -> None:
        """Write everything that resuming needs (:mod:`tie_ext.training.checkpoint`)."""
        save_training(path, self)

    def load(self, path: str | os.PathLike) -> None:
        """Resume from what :meth:`save` wrote, with a trainer made with the same arguments
        (:mod:`tie_ext.training.checkpoint`).
        """
        load_training(path, self)
        self._counted = False  # this process has not read its data


def _counting(batches: Loader, seen: Tensor, bar: Progress) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; their images of each class are added to ``seen (n,)``."""
    for x, y in batches:
        bar.total = bar.total or length_hint(batches) * len(x) or None
        bar.update(len(x))
        seen += y.cpu().bincount(minlength=len(seen))
        yield x, y
