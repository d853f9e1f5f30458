"""TIE's loop: train, invert, exclude, once an epoch, as in the paper's algorithm 1.

Symbols: ``x (B, C, H, W)``, ``y (B,)`` in ``[0, n)``; garbage index ``n``; ``logits (B, n+1)``; ``u`` uncertainties; ``tau`` the threshold.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Loader, Prior, Synthesizer
from tie_ext.outliers.inversion import Inversion
from tie_ext.outliers.noise import Noise
from tie_ext.outliers.primitives import Rng
from tie_ext.outliers.procedural import Procedural
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.adversarial import max_log_prob, pgd
from tie_ext.training.augmentation import corrupt
from tie_ext.training.checkpoint import load_training, save_training
from tie_ext.training.config import TIEConfig
from tie_ext.training.fit_head import MEMORY, OUTLIERS, STEPS, WEIGHT, fit_head
from tie_ext.training.log import CandidateTally, EpochLog
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.checks import check_images, check_labels
from tie_ext.utils.distributed import (
    average_gradients,
    average_statistics,
    broadcast,
    gathered,
    rank,
    share,
    total,
    world,
)
from tie_ext.utils.modules import frozen, settle_statistics
from tie_ext.utils.random import seeded
from tie_ext.utils.reservoir import Reservoir

GARBAGE_SHARE = 1 / 4
"""Garbage images for each ID image of a batch. Its weight in the loss comes from the class weights; this is what it costs in time. The same
from the first epoch on, so that batches, and with them memory and time, do not grow while the pool fills."""
KEPT, FINAL, KEPT_BYTES = 3000, 8192, 2**28
"""ID images of each epoch, of the last one, and bytes of them, that are kept as they go by in training: a random sample that the rest of the epoch
stands on, BatchNorm's statistics, garbage head, tau and candidates. So no image is read twice in an epoch, and what TIE adds to plain training does
not grow with the data."""
HEAD_STEPS = 200
"""Steps a garbage head on every layer learns in an epoch, from where it stood."""
CLASSES = 10
"""ID classes beside which garbage of weight 1 weighs as much as one of them. Among a thousand it would have a thousandth of the loss."""
IGNORED = -100
"""Label of what no class's loss counts."""
BATCH = 128
"""MemberSpec images that are passed through the network at once."""
EMPTY = "at least one batch of training data, but got an empty loader"
Pairs = Sequence[tuple[Tensor, Tensor]]
"""Batches ``(x, y)`` that are kept in memory."""
NEW = 2
"""New images of each prior that the head learns in an epoch, for each ID image that was kept."""
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss of logits ``(B, n+1)``, targets ``(B,)`` in ``[0, n]`` and class weights ``(n+1,)``; a scalar."""


class TIETrainer:
    """Trains a :class:`tie_ext.models.network.TIENet`, one epoch a call.

    Each epoch draws its randomness from ``config.seed`` and its own number, so a run that was stopped between epochs and resumed is the
    same as one that was not. Under ``torch.distributed`` each process gives its own share of the batches and keeps its own share of the
    pool; networks, generators and tau stay the same in all of them, and each saves and resumes its own file.

    A network whose ``garbage`` is a head on every layer (:class:`tie_ext.models.head.GarbageHead`) learns its n classes as any network does; after that
    the head learns, from what the layers say of it, the pool's garbage and the prior's, drawn anew in every epoch as :func:`tie_ext.attach` does. No
    gradient of garbage reaches the classifier, unless ``config.adversarial_steps`` asks for it: then the classifier learns to be unsure of what was searched
    for (:mod:`tie_ext.training.adversarial`).

    Parts of the network that are in evaluation mode while the whole is in training mode, such as a BatchNorm layer that was frozen by
    ``.eval()``, stay so.

    Arguments:
        net: The network, with its ``image_shape``. Move it to its device first; all else follows it.
        config: The settings of the loop.
        synthesizers: Who proposes outliers; None for TIE's own, ``[Inversion(net)]``; an empty list for a garbage class that stays as it
            began (the paper's "No TIE").
        prior: What the pool begins with; None for procedural images, ``[Procedural(net)]``, for a head on every layer, and for multi-scale noise,
            ``[Noise(net)]``, for a linear garbage logit; an empty list for nothing: the first epoch then trains on ID images alone.
        criterion: What the network learns; the default, cross-entropy, that garbage is a class of its own.
        progress: Show progress bars.

    Raises:
        ValueError: If the network has no image shape, or one that no generator can make; or if its garbage head reads every layer, and there is
            no prior, or another criterion than cross-entropy.

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
        criterion: Criterion = F.cross_entropy,
        progress: bool = False,
    ):
        self.net, self.config, self.criterion, self.progress = (
            net,
            config or TIEConfig(),
            criterion,
            progress,
        )
        if self._apart and criterion is not F.cross_entropy:
            raise ValueError(
                "Expected cross-entropy beside a garbage head on every layer, which is a class of its own, but got another criterion"
            )
        if net.image_shape is None:
            raise ValueError(
                "Expected a TIENet with an image_shape to invert, but got None; give it as TIENet(..., image_shape=(C, S, S))"
            )
        self.image_shape = net.image_shape
        net.autocast_dtype = self.config.autocast_dtype
        self.device = next(net.parameters()).device
        broadcast(net)
        with seeded(self.config.seed, 0, rank(), 1):  # the stream of Recipe.trainer too
            self.synthesizers: list[Synthesizer] = (
                [Inversion(net)] if synthesizers is None else list(synthesizers)
            )
            self.prior: list[Prior] = (
                [Procedural(net) if self._apart else Noise(net)] if prior is None else list(prior)
            )
        with seeded(self.config.seed, 0, rank(), 2):
            self.pool = self._first_pool()
        if self._apart and not len(self.pool):
            raise ValueError(
                "Expected a prior for the garbage head on every layer to learn in the first epoch, but got none"
            )
        for synthesizer in self.synthesizers:
            synthesizer.to(self.device)
            broadcast(synthesizer)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
            net.parameters(), lr=self.config.lr
        )
        self.counts: Tensor | None = (
            None  # ID images of each class (n,), once the data has been looked at
        )
        self.log: list[EpochLog] = []
        self._surveyed = False
        self._seen = torch.zeros(
            net.num_classes, dtype=torch.long
        )  # the same, of an epoch that is under way
        self._evaluating: list[torch.nn.Module] = []  # the parts that stay in evaluation mode

    def _first_pool(self) -> GarbagePool:
        size = share(self.config.pool_size)
        pool = GarbagePool(size, self.image_shape, self.net.low, self.net.high)
        # Half the pool, so that the first proposals find room.
        for i, prior in enumerate(self.prior):
            for images in self._drawn(
                prior, (size + 1) // 2 // len(self.prior) + (i < (size + 1) // 2 % len(self.prior))
            ):
                pool.add(images)
        return pool

    def _drawn(self, prior: Prior, count: int) -> Iterator[Tensor]:
        """So many new images of a prior, a few at a time."""
        step = min(KEPT, self._fitting)
        for first in range(0, count, step):
            yield prior.draw((min(step, count - first), *self.image_shape))

    @property
    def _fitting(self) -> int:
        """Images that fit the memory which is there for them, as floating-point numbers."""
        return max(2, KEPT_BYTES // (4 * math.prod(self.image_shape)))

    @property
    def _last(self) -> bool:
        """Whether this is the run's last epoch, whose network people will use: more images are kept, and the head learns as long as attach's."""
        return len(self.log) + 1 >= self.config.epochs

    def epoch(self, batches: Loader) -> EpochLog:
        """Train, invert, exclude.

        Arguments:
            batches: Any re-iterable of ``(x, y)``: images ``(B, C, S, S)`` of a floating-point type in ``[low, high]``, integer labels ``(B,)``
                in ``[0, n)``.

        Returns:
            The :class:`EpochLog`, also appended to ``self.log``.

        Raises:
            ValueError: If the data is empty, of the wrong shape, type or range, lacks a class, or can be read only once; network and optimiser
                are as they were before.
            FloatingPointError: If the loss is no longer finite.
        """
        t, batches = len(self.log), _Uniform(batches)
        if not self._surveyed and world() > 1:
            with seeded(
                self.config.seed, 0, rank(), 3
            ):  # a stream of its own, so that the first epoch's order is that of any other method
                self._survey(batches)
        with seeded(self.config.seed, t + 1, rank()):
            start = time.perf_counter()
            losses, kept = self._train(batches) if self._surveyed else self._train_looking(batches)
            trained = time.perf_counter()
            losses |= self._invert(batches, t / max(1, self.config.epochs - 1))
            inverted = time.perf_counter()
            outcome = self._exclude(kept)
            excluded = time.perf_counter()
        seconds = {
            "train": trained - start,
            "invert": inverted - trained,
            "exclude": excluded - inverted,
        }
        self.log.append(
            EpochLog(epoch=t + 1, losses=losses, pool=self._pooled(), seconds=seconds, **outcome)
        )
        return self.log[-1]

    # Stage 1.

    def _train(self, batches: Loader) -> tuple[dict[str, float], Pairs]:
        """Weighted cross-entropy on the ID data and a draw from the garbage pool; its mean, and the ID images that were kept of those seen."""
        self._to_training_mode()
        self.optimizer.param_groups[0]["lr"] = self.config.lr_in(len(self.log))
        losses = []
        # A stream of its own, so that the classifier beside a head sees the images that any other method would see.
        numbers = torch.Generator().manual_seed((torch.initial_seed() + 1) % 2**63)
        sample = Reservoir(share(min(FINAL if self._last else KEPT, self._fitting)), numbers)
        for x, y in self._with_garbage(sample.passing(self._bar(batches, "train"))):
            logits = upcast(self.net(x, garbage=not self._apart))
            loss = self._loss(logits, y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(self.net)
            self.optimizer.step()
            losses.append(loss.detach())
        if not losses:
            wanted = (
                "batches of two or more images in every epoch, but got none"
                if sample.seen
                else EMPTY
            )
            raise ValueError(f"Expected {wanted}")
        mean = float(gathered(torch.stack(losses), self.device).mean())
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"Expected a finite training loss, but got {mean} in epoch {len(self.log) + 1}; lower `lr`"
            )
        x, y = sample.columns
        kept = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        if self._apart and not self.config.adversarial_steps:
            average_statistics(self.net)
            return {"classifier": mean, "head": self._teach(kept)}, kept
        # BatchNorm's running statistics lag behind the weights, and behind garbage that is new in every epoch: measured on the demo, ID accuracy
        # fell from 100 to 77 % between two epochs and came back in the next. A forward pass over the same mixture settles them.
        mixture = (x for x, _ in self._with_garbage(kept))
        settle_statistics(
            self.net, list(mixture) if self.config.adversarial_steps else mixture
        )  # the search needs the statistics that it replaces
        average_statistics(self.net)
        return {"classifier": mean, **({"head": self._teach(kept)} if self._apart else {})}, kept

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of logits ``(B, n+1)``, or ``(B, n)`` of a classifier beside a head on every layer; a scalar."""
        weights = self._class_weights()[: logits.shape[1]].to(logits.dtype)
        if not (self._apart and self.config.adversarial_steps):
            return self.criterion(logits, y, weights)
        of_a_class = y.where(y < self.net.num_classes, IGNORED)
        return F.cross_entropy(
            logits, of_a_class, weights, ignore_index=IGNORED
        ) + self.config.garbage_weight * max_log_prob(logits, y)

    @property
    def _learns_garbage(self) -> bool:
        """Whether batches of the classifier have garbage in them."""
        return len(self.pool) > 0 and (not self._apart or self.config.adversarial_steps > 0)

    @property
    def _apart(self) -> bool:
        """Whether garbage is learned by a head of its own, from which no gradient reaches the classifier."""
        return isinstance(self.net.garbage, GarbageHead)

    def _teach(self, kept: Pairs) -> float:
        """The head on every layer tells the pool's garbage, and new images of the prior, from the ID images and the same processed; its mean loss."""
        head, count = cast(GarbageHead, self.net.garbage), sum(len(x) for x, _ in kept)
        most = max(2, MEMORY // (4 * head.mean.numel() * world()))
        inside, outside = Reservoir(2 * most), Reservoir(most)
        with frozen(self.net), torch.no_grad():
            for x, _ in self._bar(kept, "head"):
                x = x.to(self.device)
                for images in (
                    x,
                    self.net.from_unit(corrupt(self.net.to_unit(x), Rng(self.device))),
                ):
                    inside.add(self.net.statistics(images)[1])
            for part in (part for images in self._garbage(count) for part in images.split(BATCH)):
                outside.add(self.net.statistics(part.to(self.device))[1])
        # The same statistics and the same randomness in every process, so that all heads stay one.
        with seeded(self.config.seed, len(self.log) + 1, 0, 4):
            rows, others = (gathered(sample.rows, self.device) for sample in (inside, outside))
            return fit_head(
                head,
                rows,
                others,
                STEPS if self._last else HEAD_STEPS,
                WEIGHT * self.config.garbage_weight,
                self.progress,
            )

    def _garbage(self, count: int) -> Iterator[Tensor]:
        """As many images of the pool, and two or, in the last epoch, three times as many new ones of each prior."""
        for first in range(0, count, KEPT):
            yield self.pool.draw(min(KEPT, count - first))
        for prior in self.prior:
            yield from self._drawn(prior, count * (OUTLIERS if self._last else NEW))

    def _to_training_mode(self) -> None:
        """Training mode, but for the parts that were in evaluation mode while the whole was not."""
        if self.net.training:
            self._evaluating = [part for part in self.net.modules() if not part.training]
        self.net.train()
        for part in self._evaluating:
            part.training = False

    def _class_weights(self) -> Tensor:
        """Weights ``(n+1,)`` of the cross-entropy, from the counts of the data, in the first epoch of what has been seen of it: every ID class
        weighs the same in sum, and garbage a tenth of them all, whatever their number.

        Paper: "proportions". Here: inverse proportions, because only these correct the imbalance that the growing garbage class brings.
        """
        known = self._seen.clamp(min=1) if self.counts is None else self.counts
        garbage = known.sum() * GARBAGE_SHARE
        counts = torch.cat([known.float(), garbage.reshape(1).float()])
        weights = counts.sum() / (len(counts) * counts)
        weights[-1] *= self.config.garbage_weight * self.net.num_classes / CLASSES
        return weights.to(self.device)

    def _with_garbage(self, batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """ID batches, each with its share of the garbage pool once that holds any, on the device of the network."""
        # Asked of all processes, as one that skipped a batch alone would leave the others waiting for it.
        everywhere = not int(total(torch.tensor(int(not self._learns_garbage)), self.device))
        for x, y in batches:
            check_images(x, self.image_shape)
            garbage = self.pool.draw(
                max(1, round(len(x) * GARBAGE_SHARE)) if self._learns_garbage else 0
            ).to(self.device)
            if len(x) == 1 and not everywhere:
                continue  # BatchNorm cannot learn from one image
            if self.config.adversarial_steps and len(garbage):
                garbage = pgd(self.net, garbage, self.config.adversarial_steps)
            target = torch.cat(
                [y, torch.full((len(garbage),), self.net.num_classes, device=y.device)]
            )
            yield torch.cat([x.to(self.device), garbage]), target.to(self.device)

    # Stage 2.

    def _invert(self, batches: Loader, progress: float) -> dict[str, float]:
        """Every synthesizer learns from the frozen classifier."""
        losses: dict[str, float] = {}
        for synthesizer in self.synthesizers:
            losses |= synthesizer.fit(self.net, batches, progress)
        return losses

    # Stage 3.

    @torch.no_grad()
    def _exclude(self, kept: Pairs) -> dict:
        """tau from the ID uncertainties; candidates above it join the pool."""
        with frozen(self.net):
            u, accuracy = self._uncertainties(kept)
            tau = exclusion_threshold(gathered(u, self.device), self.config.lam)
            self.net.tau.fill_(tau if math.isfinite(tau) else 1.0)
            tally = CandidateTally(self.net.num_classes + 1)
            for synthesizer in self.synthesizers:
                for x, y in self._draws(kept):
                    candidates = synthesizer.sample(self.net, x, y)
                    p = upcast(self.net(candidates.x, garbage=True)).softmax(1)
                    out = uncertainty(p) > tau
                    self.pool.add(candidates.x, out)
                    tally.add(p, candidates.y, out)
            tally.proposed, tally.excluded, tally.sums = (
                total(x, self.device) for x in (tally.proposed, tally.excluded, tally.sums)
            )
        return {"tau": tau if math.isfinite(tau) else None, "accuracy": accuracy, **tally.result()}

    def _uncertainties(self, kept: Pairs) -> tuple[Tensor, float]:
        """UE of ID samples ``(N,)``, and the share whose class the n+1 outputs name."""
        u, right = [], []
        for x, y in self._bar(kept, "tau"):
            logits = upcast(self.net(x.to(self.device), garbage=True))
            u.append(uncertainty(logits.softmax(1)))
            right.append(logits.argmax(1) == y.to(self.device))
        uncertainties, hits = torch.cat(u).cpu(), torch.cat(right)
        named, seen = total(torch.tensor([int(hits.sum()), len(hits)]), self.device).tolist()
        return uncertainties, named / seen

    def _draws(self, kept: Pairs) -> Iterator[tuple[Tensor, Tensor]]:
        """ID batches, over and over, until ``candidates`` candidates have been asked for."""
        left = share(self.config.candidates)
        while left > 0:
            for x, y in kept:
                x, y = x[:left], y[:left]
                yield x.to(self.device), y.to(self.device)
                left -= len(x)
                if left <= 0:
                    break

    def _pooled(self) -> int:
        """Garbage images in the pools of all processes."""
        return int(total(torch.tensor(len(self.pool)), self.device))

    # The data, looked at once by each process that trains: shapes, types, ranges, labels, and how many samples each class has ``(n,)``.

    def _train_looking(self, batches: Loader) -> tuple[dict[str, float], Pairs]:
        """:meth:`_train`, each batch looked at before it is trained on; what is wrong with one leaves network and optimiser as they were."""
        before = copy.deepcopy((self.net.state_dict(), self.optimizer.state_dict()))
        self._seen.zero_()
        try:
            trained = self._train(self._checked(batches, self._seen))
            self._take(self._seen.clone())
        except ValueError:
            self.net.load_state_dict(before[0])
            self.optimizer.load_state_dict(before[1])
            raise
        return trained

    def _survey(self, batches: Loader) -> None:
        """Look at all data before any work, as a process that found something wrong while others train would leave them waiting for it."""
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
            raise ValueError(
                f"Expected sound data in every process, but got an error in {failed} of them, which says more"
            )
        each = gathered(torch.tensor([steps]), self.device).tolist()
        if any(other != each[0] for other in each):
            raise ValueError(
                f"Expected as many batches in every process, as a DistributedSampler gives them, but got {[steps for steps, _ in each]}, "
                f"of which {[one for _, one in each]} of one image"
            )
        self._take(total(counts, self.device))

    def _take(self, counts: Tensor) -> None:
        """Take note of how many images each class has."""
        if counts.sum() == 0:
            raise ValueError(f"Expected {EMPTY}")
        if (counts == 0).any():
            missing = (counts == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"Expected samples of all {self.net.num_classes} classes, but got none of class {missing}"
            )
        if self.counts is None:
            self.counts = counts
        elif abs(int(counts.sum()) - int(self.counts.sum())) > 0.1 * int(
            self.counts.sum()
        ):  # a loader that drops its last batch may differ a little
            raise ValueError(
                f"Expected the data this run began with, {self.counts.tolist()} images of each class, but got {counts.tolist()}"
            )
        self._surveyed = True

    def _look(self, batches: Loader) -> tuple[Tensor, list[int]]:
        """Samples of each class ``(n,)`` in this process's share, and its batches and those of one image."""
        counts, steps, singles = torch.zeros(self.net.num_classes, dtype=torch.long), 0, 0
        for x, _ in self._checked(self._bar(batches, "check"), counts):
            steps, singles = steps + 1, singles + (len(x) == 1)
        return counts, [steps, singles]

    def _checked(self, batches: Loader, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches, each refused if it is not as it should be, and else added to the samples of each class ``(n,)``."""
        n, low, high = self.net.num_classes, self.net.low.cpu(), self.net.high.cpu()
        for x, y in batches:
            check_images(x.cpu(), self.image_shape, low, high)
            check_labels(y, len(x), n)
            counts += y.cpu().bincount(minlength=n)
            yield x, y

    def _bar(self, batches: Iterable, name: str) -> Iterable:
        return tqdm(
            batches,
            desc=f"epoch {len(self.log) + 1}: {name}",
            leave=False,
            disable=not self.progress,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write all that resuming needs; see :func:`tie_ext.training.checkpoint.save_training`."""
        save_training(path, self)

    def load(self, path: str | os.PathLike) -> None:
        """Go on where :meth:`save` was called, on a trainer made with the same arguments; see :func:`tie_ext.training.checkpoint.load_training`."""
        load_training(path, self)
        self._surveyed = False  # the data of this process has not been looked at


class _Uniform:
    """The batches of a loader, its images as float32 and its labels as int64, whatever types it has.

    Raises:
        ValueError: If the loader can be read only once.
    """

    def __init__(self, batches: Loader):
        if isinstance(batches, Iterator):
            raise ValueError(
                f"Expected batches that can be read again and again, such as a DataLoader or a list, but got {type(batches).__name__}"
            )
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # TypeError where the loader has none, as progress bars expect

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.batches:
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise ValueError(
                    f"Expected batches of (images, labels), but got {type(batch).__name__}"
                )
            x, y = batch
            if isinstance(x, Tensor) and x.is_floating_point():
                x = x.float()
            if isinstance(y, Tensor) and not y.is_floating_point() and y.dtype != torch.bool:
                y = y.long()
            yield x, y
