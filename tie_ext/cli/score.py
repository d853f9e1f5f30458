"""Images on disk to rows: what a network decides of each, as they come, in memory that does not grow with their number."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tie_ext.cli.data import scaled
from tie_ext.cli.images import ImageFiles, images_below
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision

LEVELS = ("accepted", "garbage", "uncertain")
"""What is said of an image, by level."""
UNREADABLE = "unreadable"
"""What is said of a file that is no image."""
BATCH = 64
"""Images scored at once."""
COLUMNS = ("image", "label", "level", "uncertainty", "score")
"""What a row says."""


def listed(places: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Image files, and those in folders and below them, in the order of their names.

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


def scored(
    net: TIENet,
    decide: Callable[[Tensor], Decision],
    files: Sequence[str],
    every_label: bool = False,
    progress: bool = False,
) -> Iterator[tuple[dict, str | None]]:
    """A row for each file, in their order.

    Arguments:
        net: The network, on its device.
        decide: Decides of its images.
        files: Paths.
        every_label: Name the likeliest class of a rejected image too.
        progress: Show a progress bar.

    Returns:
        The row, of :data:`COLUMNS`, and what is wrong with the file, if anything is; such a row has a level alone, :data:`UNREADABLE`.

    Raises:
        ValueError: If the network takes no square images of one or three channels.
    """
    if (
        net.image_shape is None
        or net.image_shape[0] not in (1, 3)
        or net.image_shape[1] != net.image_shape[2]
    ):
        raise ValueError(
            f"Expected a network for square images, grey or of three colours, but got one for images {net.image_shape}"
        )
    images = ImageFiles.of(files, *net.image_shape[:2])
    parts = torch.arange(len(images)).split(BATCH)
    with tqdm(total=len(images), desc="score", unit=" images", disable=not progress) as bar:
        for part, (x, broken) in zip(parts, images.decoded(parts), strict=True):
            decision = decide(scaled(x, net))
            for place, (label, u, score, level) in enumerate(
                zip(*(field.tolist() for field in decision), strict=True)
            ):
                path, name = (
                    images.path(int(part[place])),
                    (net.class_names[label] if net.class_names else label),
                )
                if place in broken:
                    yield (
                        dict.fromkeys(COLUMNS) | {"image": path, "level": UNREADABLE},
                        broken[place],
                    )
                else:
                    said = name if level == 0 or every_label else None
                    row = {
                        "image": path,
                        "label": said,
                        "level": LEVELS[level],
                        "uncertainty": round(u, 6),
                        "score": round(score, 4),
                    }
                    yield row, None
            bar.update(len(part))
