"""``tie-ext score``: a row per image, in memory that does not grow with their number."""

import csv
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO, cast

import torch
from torch import Tensor
from tqdm import tqdm

from tie_ext.cli.batches import scaled
from tie_ext.cli.flags import check_flags, interactive, usage
from tie_ext.cli.folder import load_run
from tie_ext.cli.images import ImageFiles, images_below
from tie_ext.cli.watch import Watch
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.utils.checks import check_number

LEVELS = ("accepted", "garbage", "uncertain")
"""Words for the levels of a decision."""
UNREADABLE = "unreadable"
"""Level of a file that is no image."""
BATCH = 64
"""Images scored at once, unless ``--batch-size`` says."""
COLUMNS = ("image", "label", "level", "uncertainty", "score")
DRIFT = 3
"""Exit code where the monitor has found drift."""


def run(flags: Namespace) -> int:
    """Load the detector of a run, and write a row for each image as it is scored; gives the exit
    code.
    """
    check_flags({"device": flags.device})
    with usage():
        if flags.false_alarm is not None:
            check_number("--false-alarm", flags.false_alarm, 0, 1, above=True)
        check_number("--batch-size", flags.batch_size, 1, 10**6, integer=True)
        if flags.workers is not None:
            check_number("--workers", flags.workers, 0, 1000, integer=True)
    detector, decide = load_run(flags.run, flags.false_alarm, flags.device)
    net = cast(TIENet, detector.network)
    check_square(net)
    files, watch = list_images(flags.images), None
    if flags.monitor is not None:
        watch = Watch(flags.monitor, detector, decide)
        decide = watch.decide
    progress = interactive() and (flags.out is not None or not sys.stdout.isatty())
    how = (flags.batch_size, flags.workers)
    rows = score(net, decide, files, flags.every_label, progress, *how)
    errors = []
    with _output(flags.out) as out:
        table = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if flags.format == "csv":
            table.writeheader()
        for i, (row, error) in enumerate(rows, 1):
            if flags.format == "csv":
                table.writerow(row)
            else:
                out.write(json.dumps(row) + "\n")
            if error is not None:
                errors.append((i - 1, error))
            if i % flags.batch_size == 0:
                out.flush()
    drift = watch is not None and watch.end(without=[place for place, _ in errors])
    if errors:
        more = f"; {len(errors) - 1} more are unreadable too, see level {UNREADABLE!r}"
        raise ValueError(errors[0][1] + (more if len(errors) > 1 else ""))
    return DRIFT if drift else 0


def check_square(net: TIENet) -> None:
    """Refuse a network that takes no square images of one or three channels.

    Raises:
        ValueError: With the shape of its images.
    """
    C, H, W = net.image_shape or (0, 0, 0)
    if C not in (1, 3) or H != W:
        raise ValueError(
            "Expected a network for square images, grey or of three colours, but got one for "
            f"images {net.image_shape}"
        )


def list_images(places: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Image files, and those in folders and below them, by name.

    Raises:
        ValueError: If there is nothing at a path, or a folder holds no image.
    """
    files: list[str] = []
    for place in places:
        if not Path(place).exists():
            raise ValueError(
                f"Expected an image file at {place}, or a folder of them, but there is nothing"
            )
        found = list(images_below(place)) if Path(place).is_dir() else [os.fspath(place)]
        if not found:
            raise ValueError(f"Expected images in {place} or below it, but got none")
        files += found
    return files


def score(
    net: TIENet,
    decide: Callable[[Tensor], Decision],
    files: Sequence[str],
    every_label: bool = False,
    progress: bool = False,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> Iterator[tuple[dict, str | None]]:
    """Score image files.

    Arguments:
        net: The network, on its device.
        decide: Gives the decision on a batch of its images.
        files: Paths.
        every_label: Name the likeliest class of a rejected image too.
        progress: Show a progress bar.
        batch_size: Images scored at once.
        workers: Processes that decode; 0 for this one, None for one a processor, 8 at most.

    Returns:
        For each file its row, of :data:`COLUMNS`, and what is wrong with it, or None. An
        unreadable file has a level alone, :data:`UNREADABLE`.
    """
    images = ImageFiles.of(files, *net.image_shape[:2])  # type: ignore[index]
    parts = torch.arange(len(images)).split(batch_size)
    with tqdm(total=len(images), desc="score", unit=" images", disable=not progress) as bar:
        for part, (x, broken) in zip(parts, images.decoded(parts, workers), strict=True):
            decisions = zip(*(field.tolist() for field in decide(scaled(x, net))), strict=True)
            for place, (label, uncertainty, value, level) in enumerate(decisions):
                row = dict.fromkeys(COLUMNS) | {"image": files[int(part[place])]}
                if place in broken:
                    row["level"] = UNREADABLE
                else:
                    if level == 0 or every_label:
                        row["label"] = net.class_names[label] if net.class_names else label
                    row |= {"level": LEVELS[level], "uncertainty": round(uncertainty, 6)}
                    row["score"] = round(value, 4)
                yield row, broken.get(place)
            bar.update(len(part))


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """A file for the rows; the standard output for None."""
    if path is None:
        yield sys.stdout
        return
    try:
        with open(path, "w", newline="") as out:
            yield out
    except OSError as error:
        if error.filename not in (None, os.fspath(path)):
            raise  # of an image, not of the rows
        raise OSError(
            f"Expected to write rows to {path}, but got: {error.strerror or error}"
        ) from error
