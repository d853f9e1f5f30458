"""``tie-ext report RUN --images FOLDER``: what is rejected, in groups, on an HTML page.

RUN/rejected.html   the page, which needs no other file
"""

import base64
import html
import io
import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tie_ext.cli.batches import scaled
from tie_ext.cli.flags import interactive
from tie_ext.cli.folder import load_run
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.report import write_page
from tie_ext.cli.score import BATCH, check_square, list_images
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.base import Thresholded
from tie_ext.pytorch_ood.monitor import rate_interval
from tie_ext.pytorch_ood.rejects import Group, Rejects, rejects

SHOWN = 16
"""Thumbnails of a group."""
SIDE = 112
"""Pixels of a thumbnail's longer side."""


def run(flags: Namespace) -> None:
    """Score the images, group what is rejected, write page and folders, print the page's path."""
    detector, _ = load_run(flags.run)
    net: TIENet = detector.network  # type: ignore[assignment]
    check_square(net)
    files = list_images([flags.images])
    images = ImageFiles.of(files, *net.image_shape[:2])  # type: ignore[index]
    with tqdm(total=len(files), desc="report", unit=" images", disable=not interactive()) as bar:
        found = rejects(detector, _batches(images, net, bar))
    for number, group in enumerate(found.groups, 1):
        if flags.export is not None:
            export([files[row] for row in group.rows.tolist()], flags.export / name(number, group))
    folder = flags.run if flags.run.is_dir() else flags.run.parent
    names = net.class_names or tuple(map(str, range(net.num_classes)))
    body = list(_body(found, detector, files, names))
    print(write_page(folder / "rejected.html", "what is rejected", body))


def _batches(images: ImageFiles, net: TIENet, bar: tqdm) -> Iterator[Tensor]:
    for pixels in images.parts(torch.arange(len(images)).split(BATCH)):
        yield scaled(pixels, net)
        bar.update(len(pixels))


def name(number: int, group: Group) -> str:
    """Name of a group's folder."""
    return f"group-{number:02d}-{group.kind}"


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


def _body(
    found: Rejects, detector: Thresholded, files: Sequence[str], names: Sequence[str]
) -> Iterator[str]:
    yield STYLE
    yield "<h1>What is rejected</h1>"
    low, high = (100 * end for end in rate_interval(found.rejected, found.images))
    about = (
        f"<p>{found.rejected} of {found.images} images are rejected; 95 % interval of the rate: "
        f"{low:.1f} to {high:.1f} %."
    )
    if detector.false_alarm is not None:
        about += f" The threshold may reject {100 * detector.false_alarm:.3g} % of ID images."
    yield f"{about}</p>"
    for number, group in enumerate(found.groups, 1):
        yield from _group(number, group, files, names)
    if len(found.others):
        yield f"<h2>{len(found.others)} others, alike to none of these</h2>"
        yield thumbnails([files[row] for row in found.others.tolist()[:SHOWN]])
    if not found.groups:
        yield f"<p>{'Too few to group.' if found.rejected else 'Nothing to group.'}</p>"


def _group(number: int, group: Group, files: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    first, second = (html.escape(names[label]) for label in group.labels)
    about = {
        "far": "far: the garbage class",
        "near": f"near: between {first} and {second}",
        "preprocessing": "unusual preprocessing",
    }
    yield f"<h2>Group {number}: {len(group.rows)} images, {about[group.kind]}</h2>"
    yield f"<p>{ADVICE[group.kind]}</p>"
    yield thumbnails([files[row] for row in group.rows.tolist()[:SHOWN]])
    odd = [f"{layer} ({value:.1f})" for layer, value in group.layers.items() if value > 1]
    yield (
        f"<p>Nearest class: {first} ({group.share:.0%} of them). Layers that find them odd, the "
        f"first layer first: {html.escape(', '.join(odd)) or 'none'}.</p>"
    )


def thumbnails(files: Sequence[str]) -> str:
    """Small copies of images, as HTML."""
    return f'<div class="thumbnails">{"".join(map(_thumbnail, files))}</div>'


def _thumbnail(file: str) -> str:
    from PIL import Image

    data = io.BytesIO()
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    small.save(data, "png" if max(small.size) < SIDE else "jpeg")
    source = base64.b64encode(data.getvalue()).decode()
    title = html.escape(os.fspath(file))
    return f'<img alt="{title}" title="{title}" src="data:image;base64,{source}">'


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
STYLE = """<style>.thumbnails{display:flex;flex-wrap:wrap;gap:4px}
.thumbnails img{width:84px;height:84px;object-fit:contain;image-rendering:auto}</style>"""
