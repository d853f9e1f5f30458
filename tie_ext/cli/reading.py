"""Image files: which there are in a folder, and pixels that Pillow converts wrongly."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
    | {".avif", ".heic", ".heif"}
)
"""Suffixes of image files."""


@cache
def register_heif() -> None:
    """Let Pillow read .heic where pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images, by its name."""
    return name.startswith(".") or name == "__MACOSX"


def images_below(folder: str | os.PathLike[str]) -> Iterator[str]:
    """All image files in a folder and below it, by name; hidden entries and links to folders are
    left out.
    """
    for place, folders, files in os.walk(os.fspath(folder)):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in SUFFIXES and not is_hidden(name):
                yield os.path.join(place, name)


def list_images(places: Sequence[Path]) -> list[str]:
    """Image files, and those in folders and below them, by name.

    Raises:
        ValueError: If there is nothing at a path, or a folder holds no image.
    """
    files: list[str] = []
    for place in map(str, places):
        if not os.path.exists(place):
            raise ValueError(
                f"Expected an image file at {place}, or a folder of them, but there is nothing"
            )
        found = list(images_below(place)) if os.path.isdir(place) else [place]
        if not found:
            raise ValueError(f"Expected images in {place} or below it, but got none")
        files += found
    return files


def eight_bits(image: "Image.Image") -> "Image.Image":
    """An image that Pillow converts to grey or colour correctly.

    16 bits become 8 over their full range. Transparency is dropped, as torchvision's and OpenOOD's
    loaders do: a clear pixel shows the colour it is stored with.

    Raises:
        ValueError: If its pixels have neither 8 nor 16 bits.
    """
    from PIL import Image

    # 16 bits, which older Pillows open as 32; Pillow's own conversion clips all above 255.
    if image.mode[0] in "FI":
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("pixels of neither 8 nor 16 bits; save it with 8 or 16")
        return Image.fromarray(((values.astype(np.int64) + 128) // 257).astype(np.uint8))
    # Pillow warns of a palette with transparency.
    return image.convert("RGBA") if image.mode in ("P", "PA") else image
