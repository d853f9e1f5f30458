"""Image files: which there are in a folder, and what Pillow reads in them."""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
    | {".avif", ".heic", ".heif"}
)
"""Suffixes of image files."""
WITH_HEIF = frozenset({".heic", ".heif"})
"""Those that Pillow reads where pillow-heif is installed."""
NO_CLASSES = ("__MACOSX",)
"""Folders that programs leave behind; hidden ones, as ``.ipynb_checkpoints``, are skipped too."""
MAX_COMPARED = 1000
"""Test files that are compared with training files, at most."""
ORIENTATION = 0x0112
"""EXIF's tag of how a photograph is to be held; 1 where it is upright."""


@cache
def readable_suffixes() -> frozenset[str]:
    """Those of :data:`SUFFIXES` that this Pillow reads."""
    from PIL import Image

    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    known = Image.registered_extensions()
    return frozenset(suffix for suffix in SUFFIXES if known.get(suffix) in Image.OPEN)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images, by its name."""
    return name.startswith(".") or name in NO_CLASSES


def images_below(folder: str | os.PathLike[str]) -> Iterator[str]:
    """All image files in a folder and below it, by name, also those that Pillow cannot read here;
    hidden entries and links to folders are left out.
    """
    with os.scandir(os.fspath(folder)) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if is_hidden(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from images_below(entry.path)
        elif suffix_of(entry.name) in SUFFIXES and not entry.is_dir():
            yield entry.path


def suffix_of(path: str) -> str:
    """The suffix of a file, in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def is_readable(path: str) -> bool:
    """Whether this Pillow knows the format of an image file, by its suffix."""
    suffix = suffix_of(path)
    return suffix not in SUFFIXES or suffix in readable_suffixes()


def left_out(files: Iterable[str]) -> str:
    """That some image files were not read, by suffix; nothing where there are none."""
    counts = Counter(suffix_of(file) for file in files)
    if not counts:
        return ""
    listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    helps = "; pip install pillow-heif reads .heic" if counts.keys() & WITH_HEIF else ""
    return f"left out, as Pillow does not read them here: {listed}{helps}"


def open_image(path: str | os.PathLike) -> "Image.Image":
    """An image whose header is read, and whose pixels are not.

    Raises:
        ValueError: If it is no regular file; reading a pipe would wait for ever.
        OSError: If there is none, or Pillow does not know its format.
    """
    from PIL import Image

    readable_suffixes()  # registers what is installed
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no regular file")
    return Image.open(path)


def repeated(files: Sequence[bytes], others: Sequence[bytes]) -> float:
    """Share of files, in [0, 1], that are byte for byte among others; of many a sample."""
    sample = files[:: max(1, len(files) // MAX_COMPARED)]
    sizes = {os.path.getsize(file) for file in sample}
    prints = {_print(file) for file in others if os.path.getsize(file) in sizes}
    return sum(_print(file) in prints for file in sample) / len(sample)


def _print(file: bytes) -> bytes:
    with open(file, "rb") as f:
        return hashlib.blake2b(f.read(), digest_size=16).digest()


class Survey:
    """How many images of a set are not square, and how many carry an EXIF orientation."""

    def __init__(self) -> None:
        self.seen = self.oblong = self.turned = self.other = 0

    def add(self, path: str, shape: tuple[int, int]) -> None:
        """Look at the header of a file; ``shape`` is the height and width of a network's images.

        Raises:
            ValueError: If it has none that Pillow can read.
        """
        with reading_image(path), open_image(path) as image:
            self.seen += 1
            self.oblong += image.width * shape[0] != image.height * shape[1]
            self.other += (image.height, image.width) != shape
            self.turned += image.getexif().get(ORIENTATION, 1) not in (0, 1)


@contextmanager
def reading_image(path: str | os.PathLike) -> Iterator[None]:
    """Turn all that Pillow raises into one line.

    Raises:
        ValueError: ``Expected an image file at PATH, but got: ...``.
    """
    try:
        yield
    except Exception as error:  # of many types, by the byte that Pillow fails at
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise ValueError(
            f"Expected an image file at {os.fspath(path)}, but got: {reason}"
        ) from error


def eight_bits(image: "Image.Image") -> "Image.Image":
    """An image that Pillow converts to grey or colour correctly.

    16 bits become 8 over their full range. Transparency is dropped, as torchvision's and OpenOOD's
    loaders do: a clear pixel shows the colour it is stored with.

    Raises:
        ValueError: If its pixels have neither 8 nor 16 bits.
    """
    from PIL import Image

    if image.mode == "F":
        raise ValueError(
            "floating-point pixels (mode F), of which black and white are not known; "
            "save it with 8 or 16 bits"
        )
    # 16 bits, which older Pillows open as 32; Pillow's own conversion clips all above 255.
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"pixels in [{values.min()}, {values.max()}], outside [0, 65535]; "
                "save it with 8 or 16 bits"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    # Pillow warns of a palette with transparency.
    return image.convert("RGBA") if image.mode in ("P", "PA") else image
