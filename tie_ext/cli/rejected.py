"""``tie-ext report RUN --images FOLDER``: what is rejected, in groups, on an HTML page.

RUN/rejected.html   the page, which needs no other file
"""

import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tie_ext.cli import page
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.folder import load_run
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.reading import list_images, register_heif
from tie_ext.cli.score import BATCH, transform_of
from tie_ext.pytorch_ood.base import Thresholded
from tie_ext.pytorch_ood.monitor import rate_interval
from tie_ext.pytorch_ood.rejects import Group, Rejects, rejects

SHOWN = 16
"""Thumbnails of a group."""
SIDE = 112
"""Pixels of a thumbnail's longer side."""


def run(flags: Namespace) -> None:
    """Score the images, group what is rejected, write page and folders, print the page's path."""
    net, detector, _ = load_run(flags.run)
    folder = flags.run if flags.run.is_dir() else flags.run.parent
    transform, _ = transform_of(net, flags.run)
    files = list_images([flags.images])
    images = ImageFiles.of(files, transform)
    found = rejects(detector, ImageBatches(images, BATCH, scale=net))
    for number, group in enumerate(found.groups if flags.export else (), 1):
        place = flags.export / f"group-{number:02d}-{group.kind}"
        export([files[row] for row in group.rows.tolist()], place)
    names = net.class_names or tuple(map(str, range(net.num_classes)))
    body = list(_body(found, files, names))
    about = lead(found, detector)
    print(page.write_page(folder / "rejected.html", "What is rejected", about, body))


def export(files: Sequence[str], folder: Path) -> None:
    """Copy files into a new folder; two of one name get a number.

    Raises:
        ValueError: If the folder exists.
        OSError: If a file cannot be read or written.
    """
    if folder.exists():
        raise ValueError(f"Expected a new folder for --export, but got {folder}, which exists")
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        place = folder / Path(file).name
        if place.exists():
            place = place.with_name(f"{place.stem}-{number}{place.suffix}")
        shutil.copyfile(file, place)


def lead(found: Rejects, detector: Thresholded) -> str:
    """How many images are rejected, in a sentence or two."""
    low, high = (100 * end for end in rate_interval(found.rejected, found.images))
    about = (
        f"{found.rejected} of {found.images} images are rejected; 95 % interval of the rate: "
        f"{low:.1f} to {high:.1f} %."
    )
    if detector.false_alarm is not None:
        about += f" The threshold may reject {100 * detector.false_alarm:.3g} % of ID images."
    return about


def _body(found: Rejects, files: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    for number, group in enumerate(found.groups, 1):
        yield _group(number, group, files, names)
    if len(found.others):
        title = f"{len(found.others)} others, alike to none of these"
        yield page.section(title, thumbnails([files[row] for row in found.others.tolist()]))
    if not found.groups:
        yield page.paragraph("Too few to group." if found.rejected else "Nothing to group.")


def _group(number: int, group: Group, files: Sequence[str], names: Sequence[str]) -> str:
    first, second = (names[label] for label in group.labels)
    about = {
        "far": "far: the garbage class",
        "near": f"near: between {first} and {second}",
        "preprocessing": "unusual preprocessing",
    }
    odd = [f"{layer} ({value:.1f})" for layer, value in group.layers.items() if value > 1]
    return page.section(
        f"Group {number}: {len(group.rows)} images, {about[group.kind]}",
        page.paragraph(ADVICE[group.kind]),
        thumbnails([files[row] for row in group.rows.tolist()]),
        page.paragraph(
            f"Nearest class: {first} ({group.share:.0%} of them). Layers that find them odd, the "
            f"first layer first: {', '.join(odd) or 'none'}."
        ),
    )


def thumbnails(files: Sequence[str]) -> str:
    """Small copies of the first images."""
    return page.gallery("", (page.Shown(_small(file), Path(file).name) for file in files[:SHOWN]))


def _small(file: str) -> Tensor:
    from PIL import Image

    register_heif()  # workers have read the images
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


ADVICE = {
    "far": "None of your classes looks like this. Junk stays rejected. If it is something new "
    "that you want to recognise, export the group and train a class on it.",
    "near": "They resemble your classes and belong to none for certain: a new class beside them, "
    "or a rare kind of one. Add a class, or add them to the training images of theirs.",
    "preprocessing": "They show what your classes show, and come otherwise: another camera, size, "
    "compression, light or blur. Look at the camera. If it is to stay, set the threshold anew: "
    "tie-ext calibrate with good images from there.",
}
"""What to do about a group, by its kind."""
