"""TIE's loop: train, invert, exclude, once an epoch, as in the paper's algorithm 1.

Symbols: ``x (B, C, H, W)``, ``y (B,)`` in ``[0, n)``; garbage index ``n``; ``logits (B, n+1)``; ``u`` uncertainties; ``tau`` the threshold.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tie_ext.checkpoint import load_training, save_training
from tie_ext.config import TIEConfig
from tie_ext.decision import uncertainty, widened
from tie_ext.exclusion import GarbagePool, cutoff
from tie_ext.head import GarbageHead
from tie_ext.log import CandidateTally, EpochLog
from tie_ext.network import TIENet
from tie_ext.outliers.inversion import Inversion
from tie_ext.outliers.noise import Noise
from tie_ext.support.checks import check_images, check_labels
from tie_ext.support.distributed import average_gradients, average_statistics, broadcast, gathered, rank, share, total, world
from tie_ext.support.modules import frozen, settle_statistics
from tie_ext.support.random import seeded
from tie_ext.synthesis import Batches, Prior, Synthesizer
from tie_ext.teaching import MEMORY, OUTLIERS, WEIGHT, Sample, teach

GARBAGE_SHARE = 1 / 3
"""Garbage images for each ID image of a batch. Its weight in the loss comes from the class weights; this is what it costs in time. The same
from the first epoch on, so that batches, and with them memory and time, do not grow while the pool fills."""
STATISTICS_BATCHES = 100
"""Most batches that BatchNorm's statistics are computed from: 17 000 images at the default batch size, where a whole epoch would
cost as much again as scoring it."""
HEAD_STEPS = 400
"""Steps a garbage head on every layer learns in an epoch, from where it stood: 2 s on a CPU."""
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss of logits ``(B, n+1)``, targets ``(B,)`` in ``[0, n]`` and class weights ``(n+1,)``; a scalar."""


class TIETrainer:
    """Trains a :class:`~tie_ext.network.TIENet`, one epoch a call.

    Each epoch draws its randomness from ``config.seed`` and its own number, so a run that was stopped between epochs and resumed is the
    same as one that was not. Under ``torch.distributed`` each process gives its own share of the batches and keeps its own share of the
    pool; networks, generators and tau stay the same in all of them, and each saves and resumes its own file.

    A network whose ``garbage`` is a head on every layer (:class:`~tie_ext.head.GarbageHead`) learns its n classes as any network does; after that
    the head learns, from what the layers say of it, the pool's garbage and the prior's, drawn anew in every epoch as :func:`tie_ext.attach` does. No
    gradient of garbage reaches the classifier.

    Parts of the network that are in evaluation mode while the whole is in training mode, such as a BatchNorm layer that was frozen by
    ``.eval()``, stay so.

    Arguments:
        net: The network, with its ``image_shape``. Move it to its device first; all else follows it.
        config: The settings of the loop.
        synthesizers: Who proposes outliers; None for TIE's own, ``[Inversion(net)]``; an empty list for a garbage class that stays as it
            began (the paper's "No TIE").
        prior: What the pool begins with; None for multi-scale noise, ``[Noise(net)]``; an empty list for nothing: the first epoch then
            trains on ID images alone.
        objective: What the network learns; the default, cross-entropy, that garbage is a class of its own.
        progress: Show progress bars.

    Raises:
        ValueError: If the network has no image shape, or one that no generator can make; or if its garbage head reads every layer, and there is
            no prior, or another objective than cross-entropy.

    Example:
        >>> trainer = TIETrainer(TIENet(Conv3(), 10, (1, 28, 28)), TIEConfig(epochs=1))
        >>> log = trainer.epoch(batches)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: TIENet,
        config: TIEConfig | None = None,
        synthesizers: Sequence[Synthesizer] | None = None,
        prior: Sequence[Prior] | None = None,
        objective: Objective = F.cross_entropy,
        progress: bool = False,
    ):
        self.net, self.config, self.objective, self.progress = net, config or TIEConfig(), objective, progress
        if self._apart and objective is not F.cross_entropy:
            raise ValueError("Expected cross-entropy beside a garbage head on every layer, which is a class of its own, but got another objective")
        if net.image_shape is None:
            raise ValueError("Expected a TIENet with an image_shape to invert, but got None; give it as TIENet(..., image_shape=(C, S, S))")
        self.image_shape = net.image_shape
        net.precision = self.config.precision
        self.device = next(net.parameters()).device
        broadcast(net)
        with seeded(self.config.seed, 0, rank(), 1):  # the stream of Recipe.trainer too
            self.synthesizers: list[Synthesizer] = [Inversion(net)] if synthesizers is None else list(synthesizers)
            self.prior: list[Prior] = [Noise(net)] if prior is None else list(prior)
        with seeded(self.config.seed, 0, rank(), 2):
            self.pool = self._first_pool()
        if self._apart and not len(self.pool):
            raise ValueError("Expected a prior for the garbage head on every layer to learn in the first epoch, but got none")
        for synthesizer in self.synthesizers:
            synthesizer.to(self.device)
            broadcast(synthesizer)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(net.parameters(), lr=self.config.lr)
        self.counts: Tensor | None = None  # ID images of each class (n,), once the data has been looked at
        self.log: list[EpochLog] = []
        self._surveyed = False
        self._evaluating: list[torch.nn.Module] = []  # the parts that stay in evaluation mode

    def _first_pool(self) -> GarbagePool:
        size = share(self.config.pool_size)
        pool = GarbagePool(size, self.image_shape, self.net.low, self.net.high)
        # As much as an epoch proposes, and at most half the pool, so that the first proposals find room.
        wanted = min(share(self.config.candidates_per_class * (self.net.num_classes + 1)), (size + 1) // 2)
        for i, prior in enumerate(self.prior):
            pool.add(prior.draw((wanted // len(self.prior) + (i < wanted % len(self.prior)), *self.image_shape)))
        return pool

    def epoch(self, batches: Batches) -> EpochLog:
        """Train, invert, exclude.

        Arguments:
            batches: Any re-iterable of ``(x, y)``: images ``(B, C, S, S)`` of a floating-point type in ``[low, high]``, integer labels ``(B,)``
                in ``[0, n)``.

        Returns:
            The :class:`EpochLog`, also appended to ``self.log``.

        Raises:
            ValueError: If the data is empty, of the wrong shape, type or range, lacks a class, or can be read only once; nothing has been
                trained then.
            FloatingPointError: If the loss is no longer finite.
        """
        t, batches = len(self.log), _Uniform(batches)
        if not self._surveyed:
            with seeded(self.config.seed, 0, rank(), 3):  # a stream of its own, so that the first epoch's order is that of any other method
                self._survey(batches)
        with seeded(self.config.seed, t + 1, rank()):
            start = time.perf_counter()
            losses = self._train(batches)
            trained = time.perf_counter()
            losses |= self._invert(batches, t / max(1, self.config.epochs - 1))
            inverted = time.perf_counter()
            outcome = self._exclude(batches)
            excluded = time.perf_counter()
        seconds = {"train": trained - start, "invert": inverted - trained, "exclude": excluded - inverted}
        self.log.append(EpochLog(epoch=t + 1, losses=losses, pool=self._pooled(), seconds=seconds, **outcome))
        return self.log[-1]

    # Stage 1.

    def _train(self, batches: Batches) -> dict[str, float]:
        """Weighted cross-entropy on the ID data and a draw from the garbage pool."""
        self._to_training_mode()
        self.optimizer.param_groups[0]["lr"] = self.config.lr_in(len(self.log))
        weights, losses = self._class_weights(), []
        for x, y in self._with_garbage(batches, "train"):
            logits = widened(self.net(x, garbage=not self._apart))
            loss = self.objective(logits, y, weights[: logits.shape[1]].to(logits.dtype))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(self.net)
            self.optimizer.step()
            losses.append(loss.detach())
        if not losses:
            raise ValueError("Expected batches of two or more images in every epoch, but got none")
        mean = float(gathered(torch.stack(losses), self.device).mean())
        if not math.isfinite(mean):
            raise FloatingPointError(f"Expected a finite training loss, but got {mean} in epoch {len(self.log) + 1}; lower `lr`")
        if self._apart:
            average_statistics(self.net)
            return {"classifier": mean, "head": self._teach(batches)}
        # BatchNorm's running statistics lag behind the weights, and behind garbage that is new in every epoch: measured on the demo, ID accuracy
        # fell from 100 to 77 % between two epochs and came back in the next. A forward pass over the same mixture settles them.
        settle_statistics(self.net, (x for x, _ in islice(self._with_garbage(batches, "statistics"), STATISTICS_BATCHES)))
        average_statistics(self.net)
        return {"classifier": mean}

    @property
    def _apart(self) -> bool:
        """Whether garbage is learned by a head of its own, from which no gradient reaches the classifier."""
        return isinstance(self.net.garbage, GarbageHead)

    def _teach(self, batches: Batches) -> float:
        """The head on every layer learns the pool's garbage, and new images of the prior, from the ID images; its mean loss."""
        head = cast(GarbageHead, self.net.garbage)
        most = max(2, MEMORY // (4 * head.mean.numel() * world()))
        inside, outside = Sample(most), Sample(most)
        with frozen(self.net), torch.no_grad():
            for x, _ in self._bar(batches, "statistics"):
                inside.add(self.net.statistics(x.to(self.device))[1])
                fresh = [part for prior in self.prior for part in prior.draw((OUTLIERS * len(x), *self.image_shape)).split(len(x))]
                for garbage in (self.pool.draw(len(x)), *fresh):
                    outside.add(self.net.statistics(garbage.to(self.device))[1])
        # The same statistics and the same randomness in every process, so that all heads stay one.
        with seeded(self.config.seed, len(self.log) + 1, 0, 4):
            rows, garbage = (gathered(sample.rows, self.device) for sample in (inside, outside))
            return teach(head, rows, garbage, HEAD_STEPS, WEIGHT * self.config.garbage_weight, self.progress)

    def _to_training_mode(self) -> None:
        """Training mode, but for the parts that were in evaluation mode while the whole was not."""
        if self.net.training:
            self._evaluating = [part for part in self.net.modules() if not part.training]
        self.net.train()
        for part in self._evaluating:
            part.training = False

    def _class_weights(self) -> Tensor:
        """Weights ``(n+1,)`` of the cross-entropy, from the counts of the data: every ID class weighs the same in sum, their mean is 1.

        Paper: "proportions". Here: inverse proportions, because only these correct the imbalance that the growing garbage class brings.
        """
        assert self.counts is not None  # epoch() has surveyed the data
        garbage = self.counts.sum() * GARBAGE_SHARE
        counts = torch.cat([self.counts.float(), garbage.reshape(1).float()])
        weights = counts.sum() / (len(counts) * counts)
        weights[-1] *= self.config.garbage_weight
        return weights.to(self.device)

    def _with_garbage(self, batches: Batches, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """ID batches, each with its share of the garbage pool once that holds any, on the device of the network."""
        # Asked of all processes, as one that skipped a batch alone would leave the others waiting for it.
        everywhere = not int(total(torch.tensor(int(len(self.pool) == 0 or self._apart)), self.device))
        for x, y in self._bar(batches, name):
            check_images(x, self.image_shape)
            garbage = self.pool.draw(max(1, round(len(x) * GARBAGE_SHARE)) if len(self.pool) and not self._apart else 0)
            if len(x) == 1 and not everywhere:
                continue  # BatchNorm cannot learn from one image
            target = torch.cat([y, torch.full((len(garbage),), self.net.num_classes, device=y.device)])
            yield torch.cat([x.to(self.device), garbage.to(self.device)]), target.to(self.device)

    # Stage 2.

    def _invert(self, batches: Batches, progress: float) -> dict[str, float]:
        """Every synthesizer learns from the frozen classifier."""
        losses: dict[str, float] = {}
        for synthesizer in self.synthesizers:
            losses |= synthesizer.fit(self.net, batches, progress)
        return losses

    # Stage 3.

    @torch.no_grad()
    def _exclude(self, batches: Batches) -> dict:
        """tau from the ID uncertainties; candidates above it join the pool."""
        with frozen(self.net):
            u, accuracy = self._uncertainties(batches)
            tau = cutoff(gathered(u, self.device), self.config.lam)
            self.net.tau.fill_(tau if math.isfinite(tau) else 1.0)
            tally = CandidateTally(self.net.num_classes + 1)
            for synthesizer in self.synthesizers:
                for x, y in self._draws(batches):
                    candidates = synthesizer.sample(self.net, x, y)
                    p = widened(self.net(candidates.x, garbage=True)).softmax(1)
                    out = uncertainty(p) > tau
                    self.pool.add(candidates.x[out])
                    tally.add(p, candidates.y, out)
            tally.proposed, tally.excluded, tally.sums = (total(x, self.device) for x in (tally.proposed, tally.excluded, tally.sums))
        return {"tau": tau if math.isfinite(tau) else None, "accuracy": accuracy, **tally.result()}

    def _uncertainties(self, batches: Batches) -> tuple[Tensor, float]:
        """UE of all ID samples ``(N,)``, and the share whose class the n+1 outputs name."""
        u, right = [], 0
        for x, y in self._bar(batches, "tau"):
            logits = widened(self.net(x.to(self.device), garbage=True))
            u.append(uncertainty(logits.softmax(1)).cpu())
            right += int((logits.argmax(1).cpu() == y.cpu()).sum())
        uncertainties = torch.cat(u)
        right, seen = total(torch.tensor([right, len(uncertainties)]), self.device).tolist()
        return uncertainties, right / seen

    def _draws(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        """ID batches, over and over, until ``candidates_per_class`` candidates for each output have been asked for."""
        left = share(self.config.candidates_per_class * (self.net.num_classes + 1))
        while left > 0:
            for x, y in batches:
                x, y = x[:left], y[:left]
                yield x.to(self.device), y.to(self.device)
                left -= len(x)
                if left <= 0:
                    break

    def _pooled(self) -> int:
        """Garbage images in the pools of all processes."""
        return int(total(torch.tensor(len(self.pool)), self.device))

    # The data, looked at once by each process that trains.

    def _survey(self, batches: Batches) -> None:
        """Look at all data before any work: shapes, types, ranges, labels, and how many samples each class has ``(n,)``."""
        error, counts, steps = None, torch.zeros(self.net.num_classes, dtype=torch.long), [0, 0]
        try:
            counts, steps = self._look(batches)
        except ValueError as found:
            error = found
        # What is wrong in one process is said in all of them: one that raised alone would leave the others waiting for it.
        failed = int(total(torch.tensor(int(error is not None)), self.device))
        if error is not None:
            raise error
        if failed:
            raise ValueError(f"Expected sound data in every process, but got an error in {failed} of them, which says more")
        each = gathered(torch.tensor([steps]), self.device).tolist()
        if any(other != each[0] for other in each):
            raise ValueError(
                f"Expected as many batches in every process, as a DistributedSampler gives them, but got {[steps for steps, _ in each]}, "
                f"of which {[one for _, one in each]} of one image"
            )
        counts = total(counts, self.device)
        if counts.sum() == 0:
            raise ValueError("Expected at least one batch of training data, but got an empty loader")
        if (counts == 0).any():
            missing = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(f"Expected samples of all {self.net.num_classes} classes, but got none of class {missing}")
        if self.counts is None:
            self.counts = counts
        elif abs(int(counts.sum()) - int(self.counts.sum())) > 0.1 * int(self.counts.sum()):  # a loader that drops its last batch may differ a little
            raise ValueError(f"Expected the data this run began with, {self.counts.tolist()} images of each class, but got {counts.tolist()}")
        self._surveyed = True

    def _look(self, batches: Batches) -> tuple[Tensor, list[int]]:
        """Samples of each class ``(n,)`` in this process's share, and its batches and those of one image."""
        n, low, high = self.net.num_classes, self.net.low.cpu(), self.net.high.cpu()
        counts, steps, singles = torch.zeros(n, dtype=torch.long), 0, 0
        for x, y in self._bar(batches, "check"):
            check_images(x.cpu(), self.image_shape, low, high)
            check_labels(y, len(x), n)
            counts += y.cpu().bincount(minlength=n)
            steps, singles = steps + 1, singles + (len(x) == 1)
        return counts, [steps, singles]

    def _bar(self, batches: Iterable, name: str) -> Iterable:
        return tqdm(batches, desc=f"epoch {len(self.log) + 1}: {name}", leave=False, disable=not self.progress)

    def save(self, path: str | os.PathLike) -> None:
        """Write all that resuming needs; see :func:`tie_ext.checkpoint.save_training`."""
        save_training(path, self)

    def load(self, path: str | os.PathLike) -> None:
        """Go on where :meth:`save` was called, on a trainer made with the same arguments; see :func:`tie_ext.checkpoint.load_training`."""
        load_training(path, self)
        self._surveyed = False  # the data of this process has not been looked at


class _Uniform:
    """The batches of a loader, its images as float32 and its labels as int64, whatever types it has.

    Raises:
        ValueError: If the loader can be read only once.
    """

    def __init__(self, batches: Batches):
        if isinstance(batches, Iterator):
            raise ValueError(f"Expected batches that can be read again and again, such as a DataLoader or a list, but got {type(batches).__name__}")
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # TypeError where the loader has none, as progress bars expect

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise ValueError(f"Expected batches of (images, labels), but got {type(batch).__name__}")
            x, y = batch
            if isinstance(x, Tensor) and x.is_floating_point():
                x = x.float()
            if isinstance(y, Tensor) and not y.is_floating_point() and y.dtype != torch.bool:
                y = y.long()
            yield x, y
