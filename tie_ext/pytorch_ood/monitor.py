"""Drift with a guarantee: whether images still come as the held-out ones came."""

import hashlib
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from tie_ext.pytorch_ood.base import Thresholded
from tie_ext.scores.decision import Decision
from tie_ext.scores.monitor import BETS, LIMIT, bet, bins, gains, kept, p_value
from tie_ext.utils.checks import check_finite, check_number, describe
from tie_ext.utils.files import read_json, reading, write_json

FORMAT = "tie_ext monitor"
VERSION = 1
RECENT = 200
"""Images at the end of the stream whose rejections are counted."""


class Drift(NamedTuple):
    """What a monitor has found so far. Images of the stream are counted from 1."""

    images: int
    """Images so far."""
    evidence: float
    """The largest value of the martingale; there is an alarm from ``1 / alarm`` on."""
    alarm: int | None
    """The image that raised the alarm; None where nothing has."""
    since: int | None
    """The image since which they look different, as estimated at the alarm."""
    direction: str | None
    """``higher`` or ``lower``: how scores look different; higher = more OOD."""
    rejected: int
    """Rejected images among the last :data:`RECENT`."""
    interval: tuple[float, float]
    """95 % confidence interval of the rejection rate of these, in [0, 1]."""


class Monitor:
    """An alarm for images that no longer come as the held-out images of a detector came.

    As long as they do, the probability of a false alarm is at most ``alarm``, over any number of
    images (:mod:`tie_ext.scores.monitor`). The order of the stream counts: shuffle images that
    come sorted, as by class. An alarm stays; calibrate the detector and start a new monitor.

    Arguments:
        detector: A fitted detector with the scores that set its threshold.
        alarm: Largest probability of a false alarm, in (0, 1).

    Raises:
        ValueError: If the detector has no calibration scores, or ``alarm`` is out of range.

    Example:
        >>> monitor = Monitor(detector, alarm=0.001)          # doctest: +SKIP
        >>> drift = monitor.update(detector.decide(x))        # doctest: +SKIP
        >>> drift.alarm, drift.since, drift.direction         # doctest: +SKIP
        (268, 251, 'higher')
    """

    def __init__(self, detector: Thresholded, alarm: float = 0.001):
        check_number("alarm", alarm, 0, 1, above=True)
        if detector.calibration_scores is None or detector.threshold is None:
            raise ValueError(
                "Expected a detector with the scores that set its threshold, but got one without, "
                "such as earlier versions saved; fit it again, or run tie-ext calibrate"
            )
        self.alarm, self.threshold = alarm, detector.threshold.cpu()
        scores = detector.calibration_scores.double().cpu().sort().values.numpy()
        self.detector = hashlib.sha256(scores.tobytes()).hexdigest()
        self.held_out, self.images = len(scores), 0
        self.counts = np.bincount(bins(scores) + LIMIT, minlength=2 * LIMIT + 1)
        self.capital, self.evidence = np.zeros(BETS), 1.0
        self.logs, self.starts = np.zeros(BETS), np.zeros(BETS, dtype=np.int64)
        self.recent: list[bool] = []
        self.found: tuple[int, int, str] | None = None

    def update(self, seen: Decision | Tensor | float) -> Drift:
        """Take the next images of the stream.

        Arguments:
            seen: What the detector decides on them, or their scores, a number or ``(N,)``; larger
                = more OOD.

        Raises:
            ValueError: If scores are not finite floating-point numbers, or scores alone do not say
                which images a detector with a threshold for each class rejects.
        """
        scores = torch.as_tensor(seen.score if isinstance(seen, Decision) else seen).cpu()
        if scores.ndim > 1 or not scores.is_floating_point():
            raise ValueError(
                f"Expected floating-point scores of shape (N,), but got {describe(scores)}"
            )
        scores = scores.reshape(-1)
        check_finite(scores, "scores")
        rejected = self._rejected(seen, scores)
        # One number of a stream of its own for each image: batches of any size do the same.
        rng = np.random.Generator(np.random.PCG64(0).advance(self.images))
        for place, u in zip(bins(scores.numpy()), 1 - rng.random(len(scores)), strict=True):
            self._take(int(place) + LIMIT, float(u))
        self.recent = (self.recent + rejected)[-RECENT:]
        return self.drift

    def _rejected(self, seen: Any, scores: Tensor) -> list[bool]:
        if isinstance(seen, Decision):
            return (seen.level > 0).tolist()
        if self.threshold.ndim:
            raise ValueError(
                "Expected decisions of a detector with a threshold for each class, but got scores "
                "alone; call update(detector.decide(x))"
            )
        return (scores > self.threshold).tolist()

    def _take(self, place: int, u: float) -> None:
        above, count = self.counts[place + 1 :].sum(), self.held_out + self.images
        gain = gains(p_value(above, self.counts[place], count, u))
        self.counts[place] += 1
        self.images += 1
        self.capital = bet(self.capital, self.images, gain)
        # When each bet, begun anew whenever it has lost all it had won, was last at its start.
        with np.errstate(divide="ignore"):
            self.logs = self.logs + np.log(gain)
        self.starts = np.where(self.logs <= 0, self.images, self.starts)
        self.logs = self.logs.clip(min=0)
        self.evidence = max(self.evidence, float(self.capital.sum() + kept(self.images)))
        if self.found is None and self.evidence >= 1 / self.alarm:
            best = int(self.capital.argmax())
            direction = "higher" if best < BETS // 2 else "lower"
            self.found = (self.images, int(self.starts[best]) + 1, direction)

    @property
    def drift(self) -> Drift:
        """What it has found so far."""
        rejected, interval = sum(self.recent), rate_interval(sum(self.recent), len(self.recent))
        alarm, since, direction = self.found or (None, None, None)
        return Drift(self.images, self.evidence, alarm, since, direction, rejected, interval)

    def save(self, path: str | os.PathLike) -> None:
        """Write its state as JSON, atomically; its length does not grow with the stream.

        Raises:
            OSError: If the file cannot be written.
        """
        (places,) = self.counts.nonzero()
        about = {"format": FORMAT, "version": VERSION, "alarm": self.alarm}
        state = {
            "detector": self.detector,
            "images": self.images,
            "evidence": self.evidence,
            "found": self.found,
            "capital": self.capital.tolist(),
            "logs": self.logs.tolist(),
            "starts": self.starts.tolist(),
            "recent": "".join("01"[rejected] for rejected in self.recent),
            "bins": {str(place - LIMIT): int(self.counts[place]) for place in places},
        }
        write_json(path, about | state)

    @classmethod
    def load(cls, path: str | os.PathLike, detector: Thresholded) -> "Monitor":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If it is damaged or foreign, or of another detector or calibration, whose
                scores are on another scale.
        """
        what = f"the state of a monitor at {path}"
        state = read_json(path, what)
        with reading(what):
            if (state["format"], state["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{state['format']!r}, version {state['version']!r}")
            monitor = cls(detector, state["alarm"])
            if state["detector"] != monitor.detector:
                raise ValueError(
                    f"Expected the state of a monitor of this detector at {path}, but got one of "
                    "another, or from before it was calibrated; give another file to start anew"
                )
            monitor._restore(state)
        return monitor

    def _restore(self, state: dict[str, Any]) -> None:
        self.images, self.evidence = int(state["images"]), float(state["evidence"])
        self.found = None if state["found"] is None else tuple(state["found"])
        for name in ("capital", "logs", "starts"):
            own = getattr(self, name)
            setattr(self, name, np.array(state[name], dtype=own.dtype).reshape(own.shape))
        self.recent = [{"0": False, "1": True}[mark] for mark in state["recent"]]
        self.counts[:] = 0
        for place, count in state["bins"].items():
            self.counts[int(place) + LIMIT] = count
        if self.counts.sum() != self.held_out + self.images or self.counts.min() < 0:
            raise ValueError("counts that are not of its images")
        if not np.isfinite([*self.capital, *self.logs, self.evidence]).all():
            raise ValueError("a number that is not finite")


def rate_interval(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact confidence interval of a rate of which ``count`` in ``of`` were seen, in [0, 1].

    References:
        C. Clopper, E. Pearson. *The use of confidence or fiducial limits*. Biometrika, 1934.
    """
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, count, of - count + 1)) if count else 0.0
    high = float(beta.isf(tail, count + 1, of - count)) if count < of else 1.0
    return low, high
