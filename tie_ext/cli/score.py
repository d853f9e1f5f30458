"""``tie-ext score``: a row per image, in memory that does not grow with their number."""

import csv
import io
import itertools
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO, cast

import torch
from torch import Tensor

from tie_ext.cli.batches import scaled
from tie_ext.cli.flags import check_flags, usage
from tie_ext.cli.folder import load_run
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.reading import Survey, images_below, is_readable, left_out
from tie_ext.cli.transform import Transform, load_transform
from tie_ext.cli.watch import Watch
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.utils.checks import check_number
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
    check_flags({"device": flags.device})
    with usage():
        if flags.false_alarm is not None:
            check_number("--false-alarm", flags.false_alarm, 0, 1, above=True)
        check_number("--batch-size", flags.batch_size, 1, 10**6, integer=True)
        if flags.workers is not None:
            check_number("--workers", flags.workers, 0, 1000, integer=True)
    detector, decide = load_run(flags.run, flags.false_alarm, flags.device)
    net = cast(TIENet, detector.network)
    folder = flags.run if flags.run.is_dir() else flags.run.parent
    transform, known = transform_of(net, folder)
    files, unread = list_images(flags.images)
    watch = None
    if flags.monitor is not None:
        watch = Watch(flags.monitor, detector, decide)
        decide = watch.decide
    # A bar between rows on one terminal would tear them.
    progress = flags.out is not None or not (sys.stdout.isatty() and sys.stderr.isatty())
    found, how = Survey(), (flags.batch_size, flags.workers)
    rows = score(net, decide, files, transform, flags.every_label, progress, found, *how)
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
    for note in filter(None, (*notes(found, transform, known), left_out(unread))):
        print(f"tie-ext: {note}", file=sys.stderr)
    if errors:
        more = f"; {len(errors) - 1} more are unreadable too, see level {UNREADABLE!r}"
        raise ValueError(errors[0][1] + (more if len(errors) > 1 else ""))
    return DRIFT if drift else 0


def transform_of(net: TIENet, folder: Path) -> tuple[Transform, bool]:
    """How images are read for a network, and whether that is known; else they are squashed.

    Raises:
        ValueError: If the network takes no images of one shape, grey or of three colours.
    """
    shape = net.image_shape or (0, 0, 0)
    if shape[0] not in (1, 3):
        raise ValueError(
            "Expected a network for images of one shape, grey or of three colours, but got one "
            f"for images {net.image_shape}"
        )
    found = load_transform(folder)
    if found is not None and found.shape != shape:
        raise ValueError(
            f"Expected a transform to images {shape} in {folder}, but got one to {found.shape}"
        )
    known = found is not None or (folder / "run.json").is_file()  # of 0.2.0, which squashed
    return found or Transform.squash(shape), known


def notes(found: Survey, transform: Transform, known: bool) -> Iterator[str]:
    """What the user has to know of how images were read."""
    if found.other and not known:
        yield (
            f"{found.other} of {found.seen} images were squashed to {transform.shape[2]} x "
            f"{transform.shape[1]} pixels, as the detector does not say how its images were read; "
            "if otherwise, score in Python, with your own transform"
        )
    if found.turned:
        turned = "turned upright" if transform.exif_transpose else "not turned"
        yield (
            f"{found.turned} of {found.seen} images carry an EXIF orientation: they were "
            f"{turned}, as in the run"
        )


def list_images(places: Sequence[str | os.PathLike[str]]) -> tuple[list[str], list[str]]:
    """Image files, and those in folders and below them, by name; and those in folders that Pillow
    does not read here.

    Raises:
        ValueError: If there is nothing at a path, or a folder holds no image.
    """
    files: list[str] = []
    unread: list[str] = []
    for place in places:
        if not Path(place).exists():
            raise ValueError(
                f"Expected an image file at {place}, or a folder of them, but there is nothing"
            )
        if not Path(place).is_dir():
            files.append(os.fspath(place))
            continue
        found = list(images_below(place))
        if not found:
            raise ValueError(f"Expected images in {place} or below it, but got none")
        files += filter(is_readable, found)
        unread += itertools.filterfalse(is_readable, found)
    return files, unread


def score(
    net: TIENet,
    decide: Callable[[Tensor], Decision],
    files: Sequence[str],
    transform: Transform,
    every_label: bool = False,
    progress: bool = False,
    found: Survey | None = None,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> Iterator[tuple[dict, str | None]]:
    """Score image files.

    Arguments:
        net: The network, on its device.
        decide: Gives the decision on a batch of its images.
        files: Paths.
        transform: How they are read.
        every_label: Name the likeliest class of a rejected image too.
        progress: Show progress.
        found: Counts images that are not square or not upright.
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
                    if found is not None:
                        with suppress(ValueError):  # it vanished meanwhile
                            found.add(str(row["image"]), transform.shape[1:])
                    if level == 0 or every_label:
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
    try:
        with open(path, "w", newline="", encoding="utf-8", errors=ESCAPED) as out:
            yield out
    except OSError as error:
        if error.filename not in (None, os.fspath(path)):
            raise  # of an image, not of the rows
        raise OSError(
            f"Expected to write rows to {path}, but got: {error.strerror or error}"
        ) from error
