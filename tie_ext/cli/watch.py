"""``tie-ext score --monitor``: a monitor that is carried from run to run."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from tie_ext.pytorch_ood import Drift, Monitor
from tie_ext.pytorch_ood.base import Thresholded
from tie_ext.pytorch_ood.monitor import RECENT
from tie_ext.scores.decision import Decision


class Watch:
    """Notes what is decided in a run, for the monitor at its end.

    Arguments:
        path: State of the monitor, JSON; a new one where there is no file.
        detector: The detector.
        decide: Its decisions on a batch of images.

    Raises:
        ValueError: If the file is damaged or of another detector, or the detector has no scores of
            held-out images.
    """

    def __init__(self, path: Path, detector: Thresholded, decide: Callable[[Tensor], Decision]):
        self.path, self.detector, self.rule = path, detector, decide
        self.seen: list[Decision] = []
        self._monitor()  # an error comes before any image is read

    def _monitor(self) -> Monitor:
        if self.path.exists():
            return Monitor.load(self.path, self.detector)
        return Monitor(self.detector)

    def decide(self, x: Tensor) -> Decision:
        """The decision on images ``(B, C, H, W)``."""
        decision = self.rule(x)
        self.seen.append(Decision(*(part.cpu() for part in decision)))
        return decision

    def end(self, without: Sequence[int] = ()) -> bool:
        """Give the images to the monitor in random order, as folders are often sorted by class;
        write its state, and say on the standard error what it has found.

        Arguments:
            without: Indices of images that could not be read.

        Returns:
            Whether there is an alarm.
        """
        decision = Decision(*(torch.cat(part) for part in zip(*self.seen, strict=True)))
        keep = torch.ones(len(decision.score), dtype=torch.bool)
        keep[list(without)] = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            monitor = self._monitor()
            rows = keep.nonzero().flatten()
            generator = torch.Generator().manual_seed(monitor.images)
            rows = rows[torch.randperm(len(rows), generator=generator)]
            drift = monitor.update(Decision(*(part[rows] for part in decision)))
            monitor.save(self.path)
        print(tell(drift, monitor), file=sys.stderr)
        return drift.alarm is not None


def tell(drift: Drift, monitor: Monitor) -> str:
    """What a monitor has found, in two lines."""
    low, high = (100 * end for end in drift.interval)
    share = (
        f"monitor: {drift.rejected} of the last {min(RECENT, drift.images)} images rejected "
        f"(95 % interval of the rate: {low:.1f} to {high:.1f} %)"
    )
    if drift.alarm is None:
        return (
            f"monitor: no drift in {drift.images} images (evidence {drift.evidence:.3g}, alarm at "
            f"{1 / monitor.alarm:.3g})\n{share}"
        )
    return (
        f"monitor: DRIFT, found at image {drift.alarm} of {drift.images}: since about image "
        f"{drift.since} scores are {drift.direction} than those of the held-out images\n{share}; "
        "see what is rejected with tie-ext report RUN --images, or set the threshold anew with "
        "tie-ext calibrate"
    )
