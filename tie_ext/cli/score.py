"""``tie-ext score``: a row per image, in memory that does not grow with their number."""

import csv
import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from tie_ext.cli.batches import scaled
from tie_ext.cli.flags import check_device
from tie_ext.cli.folder import load_run
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.reading import list_images
from tie_ext.cli.transform import Transform, load_transform
from tie_ext.cli.watch import Watch
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.utils.progress import Progress

LEVELS = ("accepted", "garbage", "uncertain")
"""Words for the levels of a decision."""
UNREADABLE = "unreadable"
"""Level of a file that is no image."""
ESCAPED = "backslashreplace"
BATCH = 64
"""Images scored at once, unless ``--batch-size`` says."""
COLUMNS = ("image", "label", "level", "uncertainty", "score")
DRIFT = 3
"""Exit code where the monitor has found drift."""


def run(flags: Namespace) -> int:
    """Load the detector of a run, and write a row for each image as it is scored; gives the exit
    code.
    """
    check_device(flags.device)
    net, detector, decide = load_run(flags.run, flags.false_alarm, flags.device)
    transform, known = transform_of(net, flags.run)
    if not known:
        print(
            f"tie-ext: images are {transform}, as the detector does not say how its images were "
            "read; if otherwise, score in Python, with your own transform",
            file=sys.stderr,
        )
    files, watch = list_images(flags.images), None
    if flags.monitor is not None:
        watch = Watch(flags.monitor, detector, decide)
        decide = watch.decide
    # A bar between rows on one terminal would tear them.
    progress = flags.out is not None or not (sys.stdout.isatty() and sys.stderr.isatty())
    how = (progress, flags.batch_size, flags.workers)
    errors = {}
    with _output(flags.out) as out:
        table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        table.writeheader()
        for i, (row, error) in enumerate(score(net, decide, files, transform, *how)):
            table.writerow(row)
            if error is not None:
                errors[i] = error
    drift = watch is not None and watch.end(without=list(errors))
    if errors:
        first, more = next(iter(errors.values())), len(errors) - 1
        others = f"; {more} more are unreadable too, see level {UNREADABLE!r}" if more else ""
        raise ValueError(first + others)
    return DRIFT if drift else 0


def transform_of(net: TIENet, place: Path) -> tuple[Transform, bool]:
    """How images are read for the network of a run or of a saved detector, and whether that is
    known; else they are squashed.

    Raises:
        ValueError: If the network takes no images of one shape, grey or of three colours.
    """
    shape = net.image_shape or (0, 0, 0)
    if shape[0] not in (1, 3):
        raise ValueError(
            "Expected a network for images of one shape, grey or of three colours, but got one "
            f"for images {net.image_shape}"
        )
    folder = place if place.is_dir() else place.parent
    found = load_transform(folder)
    if found is not None and found.shape != shape:
        raise ValueError(
            f"Expected a transform to images {shape} in {folder}, but got one to {found.shape}"
        )
    known = found is not None or (folder / "run.json").is_file()  # of 0.2.0, which squashed
    return found or Transform.squash(shape), known


def score(
    net: TIENet,
    decide: Callable[[Tensor], Decision],
    files: Sequence[str],
    transform: Transform,
    progress: bool = False,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> Iterator[tuple[dict, str | None]]:
    """Score image files.

    Arguments:
        net: The network, on its device.
        decide: Gives the decision on a batch of its images.
        files: Paths.
        transform: How they are read.
        progress: Show progress.
        batch_size: Images scored at once.
        workers: Processes that decode; 0 for this one, None for one a processor, 8 at most.

    Returns:
        For each file its row, of :data:`COLUMNS`, and what is wrong with it, or None. An
        unreadable file has a level alone, :data:`UNREADABLE`.
    """
    images = ImageFiles.of(files, transform)
    parts = torch.arange(len(images)).split(batch_size)
    with Progress(desc="score", total=len(images), unit=" images", disable=not progress) as bar:
        for part, (x, broken) in zip(parts, images.decoded(parts, workers), strict=True):
            decisions = zip(*(field.tolist() for field in decide(scaled(x, net))), strict=True)
            for place, (label, uncertainty, value, level) in enumerate(decisions):
                row = dict.fromkeys(COLUMNS) | {"image": files[int(part[place])]}
                if place in broken:
                    row["level"] = UNREADABLE
                else:
                    if level == 0:
                        row["label"] = net.class_names[label] if net.class_names else label
                    row |= {"level": LEVELS[level], "uncertainty": round(uncertainty, 6)}
                    row["score"] = round(value, 4)
                yield row, broken.get(place)
            bar.update(len(part))


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """A file for the rows; the standard output for None. Names that are no UTF-8 are escaped."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors=ESCAPED)
        yield sys.stdout
        return
    with open(path, "w", newline="", encoding="utf-8", errors=ESCAPED) as out:
        yield out
