"""TIE's loop: train, invert, exclude, once an epoch, as in the paper's algorithm 1.

Symbols: ``x (B, C, H, W)``, ``y (B,)`` in ``[0, n)``; garbage index ``n``; ``logits (B, n+1)``; ``u`` uncertainties; ``tau`` the threshold.
"""

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from tie_ext.checks import check_images, check_labels, check_number
from tie_ext.decision import uncertainty
from tie_ext.distributed import average_gradients, average_statistics, broadcast, gathered, rank, share, total
from tie_ext.exclusion import GarbagePool, cutoff
from tie_ext.files import load_state, save_state
from tie_ext.metrics import CandidateTally
from tie_ext.networks import PRECISIONS, TIENet
from tie_ext.outliers import SYNTHESIZERS, make
from tie_ext.synthesis import Batches, Noise, Synthesizer, frozen

GARBAGE_SHARE = 1 / 3
"""Garbage images for each ID image of a batch. Its weight in the loss comes from the class weights; this is what it costs in time. The same
from the first epoch on, so that batches, and with them memory and time, do not grow while the pool fills."""
STATISTICS_BATCHES = 100
"""Most batches that BatchNorm's statistics are computed from: 17 000 images at the default batch size, where a whole epoch would
cost as much again as scoring it."""


@dataclass(frozen=True)
class TIEConfig:
    """Every setting of a run. The defaults are the paper's, or say why not in ``docs/defaults.md``.

    Raises:
        ValueError: If a setting is out of range.
    """

    epochs: int = 20
    """T, the length of the run; the schedules of learning rate and gamma span it."""
    lr: float = 1e-3
    """Learning rate of the classifier (Adam) in the first epoch; it falls along half a cosine (the paper: 1e-4 throughout, ``docs/defaults.md``)."""
    lam: float = 2.0
    """lambda in ``tau = mean + lambda * std`` (the paper: 0.5, ``docs/defaults.md``); -inf excludes every inversion (``--lam=-inf``)."""
    candidates_per_class: int = 1000
    """Inversions proposed an epoch and output, garbage included."""
    pool_size: int = 20_000
    """Most garbage images kept, as uint8: 16 MB at 28x28 grey, 60 MB at 32x32 colour, 3 GB at 224x224 colour."""
    prior: str = "multiscale"
    """What the pool starts with: ``multiscale`` noise, ``white`` as in the paper, or ``none``: the first epoch then has ID images alone."""
    synthesizer: str = "inversion"
    """Who proposes outliers: ``inversion`` (TIE) or others of :data:`tie_ext.outliers.SYNTHESIZERS`, with commas between."""
    garbage_weight: float = 1.0
    """Weight of the garbage class in the loss, where an ID class has 1 (Vernekar et al.: 0.1)."""
    garbage_shift: int = 0
    """Most pixels a garbage image is moved by whenever it is drawn, as loaders move ID images. Measured in ``docs/ledger.md``: outliers made
    of MNIST images rank better with 3, those of FashionMNIST do not."""
    objective: str = "garbage"
    """What the network learns of garbage: ``garbage``, that it is a class of its own; ``weighted``, the same, but an image counts by the UE of
    its ID outputs (future work of both TIE papers; measured in ``docs/synthesizers.md``); ``uniform``, that all n+1 outputs are equally
    likely (ASCOOD's), so that it is level 2 that rejects."""
    generator_steps: int = 200
    """Steps of the generator an epoch; 200 against 100: more inversions land where they were asked (``docs/defaults.md``)."""
    generator_lr: float = 1e-3
    """Learning rate of the generator (Adam)."""
    generator_width: int = 32
    """Width of the generator."""
    alpha: float = 0.1
    """Weight of the KL term of the inversion loss."""
    beta: float = 1.0
    """Weight of its CE term."""
    gamma_start: float = 1.0
    """Weight of its cosine term at the start of the run (the paper: 10)."""
    gamma_end: float = 1.0
    """Weight of its cosine term at the end of the run (the paper: 100)."""
    code_margin: float = 0.0
    """How clearly codes ask for a class: the largest of a code's normals leads by at least as much. Measured in ``docs/ledger.md``: with 0.5
    fewer of MNIST's ID images land in the garbage class, and fewer clothes; of FashionMNIST nothing is uncertain then, and nothing expelled."""
    precision: str = "float32"
    """Arithmetic inside the backbone: ``float32``, or ``bfloat16`` (autocast: weights, features and logits stay float32), which is faster on
    GPUs and CPUs that have it, and slower on others."""
    seed: int = 0
    """Seed of all that is random inside an epoch."""

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, 1, 10**6, integer=True)
        check_number("candidates_per_class", self.candidates_per_class, 1, 10**6, integer=True)
        check_number("pool_size", self.pool_size, 1, 10**9, integer=True)
        check_number("generator_steps", self.generator_steps, 1, 10**6, integer=True)
        check_number("generator_width", self.generator_width, 1, 4096, integer=True)
        check_number("seed", self.seed, 0, 2**31 - 1, integer=True)
        check_number("garbage_shift", self.garbage_shift, 0, 10**4, integer=True)
        for name in ("lr", "generator_lr"):
            check_number(name, getattr(self, name), 0, 1, above=True)
        for name in ("alpha", "beta", "gamma_start", "gamma_end"):
            check_number(name, getattr(self, name), 0, 1e6)
        check_number("code_margin", self.code_margin, 0, 100)
        check_number("lam", self.lam, -math.inf, 1e6)
        check_number("garbage_weight", self.garbage_weight, 0, 1e6, above=True)
        for name in self.synthesizer.split(","):
            if name not in SYNTHESIZERS:
                raise ValueError(f"Expected synthesizer to name {', '.join(SYNTHESIZERS)}, with commas between, but got {name!r}")
        if self.objective not in ("garbage", "weighted", "uniform"):
            raise ValueError(f"Expected objective to be 'garbage', 'weighted' or 'uniform', but got {self.objective!r}")
        if self.prior not in ("multiscale", "white", "none"):
            raise ValueError(f"Expected prior to be 'multiscale', 'white' or 'none', but got {self.prior!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"Expected precision to be 'float32' or 'bfloat16', but got {self.precision!r}")

    def lr_in(self, epoch: int) -> float:
        """Learning rate of the classifier in an epoch, counted from 0; past the run's length it stays that of the last."""
        return self.lr * (1 + math.cos(math.pi * min(epoch, self.epochs - 1) / self.epochs)) / 2


@dataclass(frozen=True)
class EpochLog:
    """What one epoch did. Lists have one entry for each of the n+1 outputs, garbage last; NaN never occurs, an absent value is None."""

    epoch: int
    """From 1."""
    losses: dict[str, float]
    """``classifier``: weighted cross-entropy; ``kl``, ``ce``, ``cosine``: the terms of the inversion loss, unweighted."""
    accuracy: float
    """Share of the ID training images whose n+1 outputs name their class, after training, in [0, 1]."""
    tau: float | None
    """Threshold on UE; None where there is none (lambda = -inf)."""
    proposed: list[int]
    """Candidates aimed at each output."""
    excluded: list[int]
    """Of these, how many were expelled into the garbage class."""
    pool: int
    """Images in the garbage pool after the epoch."""
    agreement: list[float | None]
    """Share of the candidates that landed in the output they were aimed at, in [0, 1]."""
    entropy: list[float | None]
    """Mean entropy of the candidates' outputs, nats."""
    confidence: list[float | None]
    """Their mean largest probability."""
    margin: list[float | None]
    """Mean difference of their two largest probabilities."""
    uncertainty: list[float | None]
    """Their mean UE."""
    seconds: dict[str, float]
    """Wall-clock time of ``train``, ``invert`` and ``exclude``; the one part of a log that differs between equal runs."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix the random state inside, and leave it outside as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class TIETrainer:
    """Trains a :class:`~tie_ext.networks.TIENet`, one epoch a call.

    Each epoch draws its randomness from ``config.seed`` and its own number, so a run that was stopped between epochs and resumed is the
    same as one that was not. Under ``torch.distributed`` each process gives its own share of the batches and keeps its own share of the
    pool; networks, generators and tau stay the same in all of them, and each saves and resumes its own file.

    Arguments:
        net: The network, with its ``image_shape``. Move it to its device first; all else follows it.
        config: The settings.
        synthesizers: Who proposes outliers; None for those that the settings name, an empty list for a garbage class that stays as it
            began (the paper's "No TIE").
        progress: Show progress bars.

    Raises:
        ValueError: If the network has no image shape, or one that no generator can make.

    Example:
        >>> trainer = TIETrainer(TIENet(Conv3(), 10, (1, 28, 28)), TIEConfig(epochs=1))
        >>> log = trainer.epoch(batches)  # doctest: +SKIP
    """

    def __init__(
        self,
        net: TIENet,
        config: TIEConfig | None = None,
        synthesizers: Sequence[Synthesizer] | None = None,
        progress: bool = False,
    ):
        self.net, self.config = net, config or TIEConfig()
        if net.image_shape is None:
            raise ValueError("Expected a TIENet with an image_shape to invert, but got None; give it as TIENet(..., image_shape=(C, S, S))")
        self.image_shape = net.image_shape
        c = self.config
        net.precision = c.precision
        self.device = next(net.parameters()).device
        broadcast(net)
        with seeded(c.seed + rank()):
            size = share(c.pool_size)
            self.pool = GarbagePool(size, self.image_shape, net.low, net.high, c.garbage_shift)
            if c.prior != "none":
                noise = Noise(c.prior == "multiscale", net.low.cpu(), net.high.cpu())
                # As much noise as an epoch proposes, and at most half the pool, so that the first inversions find room.
                self.pool.add(noise.draw((min(share(c.candidates_per_class * (net.num_classes + 1)), (size + 1) // 2), *self.image_shape)))
            self.synthesizers = [self._synthesizer(name) for name in c.synthesizer.split(",")] if synthesizers is None else list(synthesizers)
        for synthesizer in self.synthesizers:
            synthesizer.to(self.device)
            broadcast(synthesizer)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=c.lr)
        self.counts: Tensor | None = None
        self.log: list[EpochLog] = []
        self.progress = progress

    def _synthesizer(self, name: str) -> Synthesizer:
        c = self.config
        if name != "inversion":
            return make(name, self.net)
        weights = {"alpha": c.alpha, "beta": c.beta, "gamma": (c.gamma_start, c.gamma_end)}
        return make(name, self.net, steps=c.generator_steps, lr=c.generator_lr, **weights, margin=c.code_margin, width=c.generator_width)

    def epoch(self, batches: Batches) -> EpochLog:
        """Train, invert, exclude.

        Arguments:
            batches: Any re-iterable of ``(x, y)``: images ``(B, C, S, S)`` in ``[low, high]``, integer labels ``(B,)`` in ``[0, n)``.

        Returns:
            The :class:`EpochLog`, also appended to ``self.log``.

        Raises:
            ValueError: If the data is empty, of the wrong shape, type or range, or lacks a class; nothing has been trained then.
            FloatingPointError: If the loss is no longer finite.
        """
        t = len(self.log)
        with seeded((self.config.seed * 100_003 + t + 1) * (1 + rank())):
            if self.counts is None:
                self.counts = self._survey(batches)
            start = time.perf_counter()
            losses = self.train(batches, self.class_weights())
            trained = time.perf_counter()
            losses |= self.invert(batches, t / max(1, self.config.epochs - 1))
            inverted = time.perf_counter()
            outcome = self.exclude(batches)
            excluded = time.perf_counter()
        seconds = {"train": trained - start, "invert": inverted - trained, "exclude": excluded - inverted}
        self.log.append(EpochLog(epoch=t + 1, losses=losses, pool=self._pooled(), seconds=seconds, **outcome))
        return self.log[-1]

    def class_weights(self) -> Tensor:
        """Weights ``(n+1,)`` of the cross-entropy, from this epoch's counts: every ID class weighs the same in sum, their mean is 1.

        Paper: "proportions". Here: inverse proportions, because only these correct the imbalance that the growing garbage class brings.
        """
        assert self.counts is not None  # epoch() has surveyed the data
        garbage = self.counts.sum() * GARBAGE_SHARE
        counts = torch.cat([self.counts.float(), garbage.reshape(1).float()])
        weights = counts.sum() / (len(counts) * counts)
        weights[-1] *= self.config.garbage_weight
        return weights.to(self.device)

    def train(self, batches: Batches, weights: Tensor) -> dict[str, float]:
        """Stage 1: weighted cross-entropy on the ID data and a draw from the garbage pool."""
        self.net.train()
        self.optimizer.param_groups[0]["lr"] = self.config.lr_in(len(self.log))
        losses = []
        for x, y in self._with_garbage(batches, "train"):
            loss = self._loss(self.net(x, garbage=True), y, weights)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(self.net)
            self.optimizer.step()
            losses.append(loss.detach())
        if not losses:
            raise ValueError("Expected batches in every epoch, but got an empty loader (an iterator can be read only once)")
        mean = float(gathered(torch.stack(losses), self.device).mean())
        if not math.isfinite(mean):
            raise FloatingPointError(f"Expected a finite training loss, but got {mean} in epoch {len(self.log) + 1}; lower `lr`")
        # BatchNorm's running statistics lag behind the weights, and behind garbage that is new in every epoch: measured on the demo, ID accuracy
        # fell from 100 to 77 % between two epochs and came back in the next. A forward pass over the same mixture settles them.
        update_bn((x for x, _ in islice(self._with_garbage(batches, "statistics"), STATISTICS_BATCHES)), self.net)
        average_statistics(self.net)
        return {"classifier": mean}

    def _loss(self, logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        garbage = y == self.net.num_classes
        if self.config.objective == "garbage":
            return F.cross_entropy(logits, y, weights)
        if self.config.objective == "weighted":
            counts = torch.where(garbage, uncertainty(logits[:, :-1].detach().softmax(1)), 1.0)
            return (counts * F.cross_entropy(logits, y, weights, reduction="none")).sum() / weights[y].sum()
        # ASCOOD, equation 5, with a sum over n+1 outputs: cross-entropy on ID images, KL(uniform || p) on garbage, up to a constant.
        exposed = -logits[garbage].log_softmax(1).mean() if garbage.any() else 0.0
        return F.cross_entropy(logits[~garbage], y[~garbage], weights) + self.config.garbage_weight * exposed

    def _with_garbage(self, batches: Batches, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """ID batches, each with its share of the garbage pool once that holds any, on the device of the network."""
        for x, y in self._bar(batches, name):
            check_images(x, self.image_shape)
            garbage = self.pool.draw(max(1, round(len(x) * GARBAGE_SHARE)) if len(self.pool) else 0)
            target = torch.cat([y, torch.full((len(garbage),), self.net.num_classes, device=y.device)])
            yield torch.cat([x.to(self.device), garbage.to(self.device)]), target.to(self.device)

    def invert(self, batches: Batches, progress: float) -> dict[str, float]:
        """Stage 2: every synthesizer learns from the frozen classifier."""
        losses: dict[str, float] = {}
        for synthesizer in self.synthesizers:
            losses |= synthesizer.fit(self.net, batches, progress)
        return losses

    @torch.no_grad()
    def exclude(self, batches: Batches) -> dict:
        """Stage 3: tau from the ID uncertainties; candidates above it join the pool."""
        with frozen(self.net):
            u, accuracy = self._uncertainties(batches)
            tau = cutoff(gathered(u, self.device), self.config.lam)
            self.net.tau.fill_(tau if math.isfinite(tau) else 1.0)
            tally = CandidateTally(self.net.num_classes + 1)
            for synthesizer in self.synthesizers:
                for x, y in self._draws(batches):
                    candidates = synthesizer.sample(self.net, x, y)
                    p = self.net(candidates.x, garbage=True).softmax(1)
                    out = uncertainty(p) > tau
                    self.pool.add(candidates.x[out])
                    tally.add(p, candidates.y, out)
            tally.proposed, tally.excluded, tally.sums = (total(x, self.device) for x in (tally.proposed, tally.excluded, tally.sums))
        return {"tau": tau if math.isfinite(tau) else None, "accuracy": accuracy, **tally.result()}

    def _uncertainties(self, batches: Batches) -> tuple[Tensor, float]:
        """UE of all ID samples ``(N,)``, and the share whose class the n+1 outputs name."""
        u, right = [], 0
        for x, y in self._bar(batches, "tau"):
            logits = self.net(x.to(self.device), garbage=True)
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

    def _survey(self, batches: Batches) -> Tensor:
        """Look at all data once, before any work: shapes, types, ranges, labels, and how many samples each class has ``(n,)``."""
        n, low, high = self.net.num_classes, self.net.low.cpu(), self.net.high.cpu()
        counts, steps = torch.zeros(n, dtype=torch.long), 0
        for batch in self._bar(batches, "check"):
            if not isinstance(batch, Sequence) or len(batch) != 2:
                raise ValueError(f"Expected batches of (images, labels), but got {type(batch).__name__}")
            x, y = batch
            check_images(x.cpu() if isinstance(x, Tensor) else x, self.image_shape, low, high)
            check_labels(y, len(x), n)
            counts += y.cpu().bincount(minlength=n)
            steps += 1
        each = gathered(torch.tensor([steps]), self.device).tolist()
        if len(set(each)) > 1:
            raise ValueError(f"Expected as many batches in every process, as a DistributedSampler gives them, but got {each}")
        counts = total(counts, self.device)
        if counts.sum() == 0:
            raise ValueError("Expected at least one batch of training data, but got an empty loader (an iterator can be read only once)")
        if (counts == 0).any():
            raise ValueError(f"Expected samples of all {n} classes, but got none of class {(counts == 0).nonzero().flatten().tolist()}")
        return counts

    def _bar(self, batches: Iterable, name: str) -> Iterable:
        return tqdm(batches, desc=f"epoch {len(self.log) + 1}: {name}", leave=False, disable=not self.progress)

    def save(self, path: str | os.PathLike) -> None:
        """Write all that resuming needs: network, optimiser, pool, synthesizers and log; atomically, as safetensors + JSON.

        Raises:
            OSError: If it cannot be written; an earlier file is intact.
        """
        state = {
            "config": asdict(self.config),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": self.pool.state_dict(),
            "synthesizers": [s.state_dict() for s in self.synthesizers],
            "counts": self.counts,
            "log": [asdict(entry) for entry in self.log],
        }
        save_state(path, "training", state)

    def load(self, path: str | os.PathLike) -> None:
        """Go on where :meth:`save` was called, on a trainer made with the same arguments.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, foreign, or of a run with other settings, saying which.
        """
        state = load_state(path, "training")
        try:
            mine = asdict(self.config) | {"synthesizers": len(self.synthesizers)}
            # A setting that came after the file had its default.
            theirs = asdict(TIEConfig()) | state["config"] | {"synthesizers": len(state["synthesizers"])}
            other = [f"{key} {theirs[key]!r} instead of {mine[key]!r}" for key in mine if theirs[key] != mine[key]]
            if other:
                raise ValueError(f"Expected the training state of a run with the settings of this one in {path}, but got {', '.join(other)}")
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.pool.load_state_dict(state["pool"])
            for synthesizer, saved in zip(self.synthesizers, state["synthesizers"], strict=True):
                synthesizer.load_state_dict(saved)
            self.counts = state["counts"]
            self.log = [EpochLog(**{f.name: entry[f.name] for f in fields(EpochLog)}) for entry in state["log"]]
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected the training state of this network in {path}, but got: {error}") from error
