"""Images with labels, in memory or on disk; those on disk are decoded in worker processes as they are asked for.

Images are uint8 ``(N, C, S, S)``. Where they lie changes nothing: the same rows give the same bytes.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tie_ext.utils.checks import check_number

if TYPE_CHECKING:
    from PIL import Image

PIECE = 32
"""Images that a worker decodes at once: what waits to be used stays small, whatever the batch."""
WORKERS = 8
"""Processes that decode at most; no more than there are processors."""
ALONE = 128
"""Images that this process decodes itself, as workers would take longer to start."""
Some = TypeVar("Some", bound="Images")


class Images(ABC):
    """Images with labels, wherever they lie."""

    y: Tensor
    """int64 ``(N,)``; -1 where there are no labels."""
    classes: tuple[str, ...]
    """Name of each class, by label."""
    note: str
    """How the test images were come by, where a person has to know."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """``(C, S, S)``."""

    @abstractmethod
    def take(self: Some, rows: Tensor) -> Some:
        """The images of some rows, indices or a mask, in their order."""

    @abstractmethod
    def labelled(self: Some, y: Tensor, classes: tuple[str, ...] = ()) -> Some:
        """The same images with other labels ``(N,)``."""

    @abstractmethod
    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices, uint8 ``(B, C, S, S)``.

        Raises:
            ValueError: If one cannot be read.
        """

    def __len__(self) -> int:
        return len(self.y)

    def check(self) -> None:
        """Read each once, so that what is wrong with the last is known before the work that comes before it.

        Raises:
            ValueError: If one cannot be read.
        """
        for _ in self.parts(torch.arange(len(self)).split(PIECE)):
            pass

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(C, S, S)`` as float in [0, 1], and its label: so that it is a data set for torch's DataLoader."""
        (x,) = self.parts([torch.tensor([index])])
        return x[0].float() / 255, int(self.y[index])

    def loaded(self) -> "ImageSet":
        """The same in memory.

        Raises:
            ValueError: If one cannot be read.
        """
        x = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        rows = torch.arange(len(self)).split(PIECE)
        for at, part in zip(rows, self.parts(rows), strict=True):
            x[at] = part
        return ImageSet(x, self.y, self.classes, self.note)

    def first(self: Some, count: int | None, seed: int = 0) -> Some:
        """A random subset of ``count`` images, the same for the same seed; all of them for None or too large a count."""
        if count is None or count >= len(self):
            return self
        check_number("count", count, 1, len(self), integer=True)
        return self.take(
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        )

    def classes_between(self: Some, first: int, last: int) -> Some:
        """The images of the classes ``first`` to ``last``, relabelled from 0.

        Raises:
            ValueError: If there are no such classes.
        """
        if not 0 <= first <= last < len(self.classes):
            raise ValueError(
                f"Expected classes among 0 to {len(self.classes) - 1}, but got {first} to {last}"
            )
        part = self.take((self.y >= first) & (self.y <= last))
        return part.labelled(part.y - first, self.classes[first : last + 1])

    def without(self: Some, labels: Sequence[int]) -> Some:
        """The images of all other classes, unlabelled: OOD for a network that knows these."""
        return self.take(~torch.isin(self.y, torch.tensor(labels))).unlabelled()

    def unlabelled(self: Some) -> Some:
        """The same images as nobody's."""
        return self.labelled(torch.full((len(self),), -1))


@dataclass(frozen=True)
class ImageSet(Images):
    """Images with labels, in memory."""

    x: Tensor
    """uint8 ``(N, C, S, S)``."""
    y: Tensor
    """int64 ``(N,)``; -1 where there are no labels."""
    classes: tuple[str, ...] = ()
    """Name of each class, by label."""
    note: str = ""
    """How the test images were come by, where a person has to know."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, S, S)``."""
        return tuple(self.x.shape[1:])

    def take(self, rows: Tensor) -> "ImageSet":
        """The images of some rows, indices or a mask, in their order."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def labelled(self, y: Tensor, classes: tuple[str, ...] = ()) -> "ImageSet":
        """The same images with other labels ``(N,)``."""
        return replace(self, y=y, classes=classes)

    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices, uint8 ``(B, C, S, S)``."""
        return (self.x[part] for part in rows)

    def loaded(self) -> "ImageSet":
        """Itself."""
        return self

    def check(self) -> None:
        """Nothing, as they have been read."""


@dataclass(frozen=True)
class ImageFiles(Images):
    """Images with labels, on disk: a path each in memory, as bytes, as many paths as objects would take more than the network."""

    files: np.ndarray
    """Path of each, bytes ``(N,)``."""
    y: Tensor
    """int64 ``(N,)``; -1 where there are no labels."""
    channels: int
    """C, 1 or 3."""
    size: int
    """S, which images are brought to."""
    classes: tuple[str, ...] = ()
    """Name of each class, by label."""
    note: str = ""
    """How the test images were come by, where a person has to know."""

    @classmethod
    def of(
        cls,
        files: Sequence[str | os.PathLike],
        channels: int,
        size: int,
        labels: Sequence[int] | None = None,
        **about: Any,
    ) -> "ImageFiles":
        """Files by path, with labels or without."""
        y = torch.full((len(files),), -1) if labels is None else torch.tensor(labels)
        return cls(
            np.array([os.fsencode(file) for file in files], dtype=np.bytes_),
            y,
            channels,
            size,
            **about,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, S, S)``."""
        return self.channels, self.size, self.size

    def path(self, row: int) -> str:
        """Where an image lies."""
        return os.fsdecode(self.files[row])

    def take(self, rows: Tensor) -> "ImageFiles":
        """The images of some rows, indices or a mask, in their order."""
        return replace(self, files=self.files[rows.numpy()], y=self.y[rows])

    def labelled(self, y: Tensor, classes: tuple[str, ...] = ()) -> "ImageFiles":
        """The same images with other labels ``(N,)``."""
        return replace(self, y=y, classes=classes)

    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices, uint8 ``(B, C, S, S)``.

        Raises:
            ValueError: If one cannot be read.
        """
        for x, broken in self.decoded(rows):
            for error in broken.values():
                raise ValueError(error)
            yield x

    def decoded(self, rows: Sequence[Tensor]) -> Iterator[tuple[Tensor, dict[int, str]]]:
        """As :meth:`parts`, beside the images that cannot be read, which are black: their places in the batch, and why."""
        pieces = [piece.numpy() for part in rows for piece in part.split(PIECE)]
        count = sum(map(len, pieces))
        workers = 0 if count <= ALONE else min(WORKERS, _processors(), len(pieces))
        # Of a random state of its own: the order of images shall not depend on where they lie.
        loader = DataLoader(
            _Decoder(self),
            batch_size=None,
            sampler=pieces,
            num_workers=workers,
            collate_fn=_as_is,
            generator=torch.Generator(),
        )  # type: ignore[arg-type]
        found = iter(loader)
        for part in rows:
            x = torch.empty((len(part), *self.shape), dtype=torch.uint8)
            broken: dict[int, str] = {}
            for start in range(0, len(part), PIECE):
                piece, errors = next(found)
                x[start : start + PIECE] = torch.from_numpy(piece)
                broken |= {start + place: error for place, error in errors.items()}
            yield x, broken


class _Decoder(Dataset):
    """What a worker does: the images of some rows, and what is wrong with those that are black.

    As an array, not a tensor: what torch remembers of each tensor that came from a worker lies between the batches in memory, so that what they
    leave is not used again, and memory grows by nearly every image (450 MB for 3000 of 224 pixels).
    """

    def __init__(self, images: ImageFiles):
        self.files, self.channels, self.size = images.files, images.channels, images.size

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        x, broken = (
            torch.zeros((len(rows), self.channels, self.size, self.size), dtype=torch.uint8),
            {},
        )
        for place, row in enumerate(rows):
            try:
                x[place] = read_image(os.fsdecode(self.files[row]), self.channels, self.size)
            except ValueError as error:
                broken[place] = str(error)
        return x.numpy(), broken


def _as_is(batch: Any) -> Any:
    return batch


def _processors() -> int:
    """Processors that this process may use."""
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
"""What names of image files end in."""


def images_below(folder: str | os.PathLike[str]) -> Iterator[str]:
    """All image files in a folder and those below it, in the order of their names; hidden files and folders, and links to folders, are left out."""
    with os.scandir(os.fspath(folder)) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from images_below(entry.path)
        elif Path(entry.name).suffix.lower() in SUFFIXES and not entry.is_dir():
            yield entry.path


def read_image(path: str | os.PathLike, channels: int, size: int) -> Tensor:
    """One image file as uint8 ``(C, S, S)``.

    16 bits become 8 over their full range. Transparency is dropped, as torchvision's and OpenOOD's loaders drop it: a clear pixel shows the
    colour that it is stored with. Of an animation, or a file of several pages, the first image is taken.

    Arguments:
        path: The file.
        channels: 1 (luma of colour images) or 3 (grey ones repeated).
        size: Height and width to bring it to, bilinear.

    Raises:
        ValueError: If it is not an image that Pillow can read, or its pixels are neither 8 nor 16 bits.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            eight = _eight_bits(image).convert("L" if channels == 1 else "RGB")
            if eight.size != (size, size):
                eight = eight.resize((size, size), Image.Resampling.BILINEAR)
            array = np.array(eight)
    except Exception as error:  # which depends on the byte that Pillow trips over: OSError, SyntaxError, struct.error, KeyError, ...
        raise ValueError(
            f"Expected an image file at {path}, but got: {error or type(error).__name__}"
        ) from error
    return torch.from_numpy(array).reshape(size, size, channels).permute(2, 0, 1)


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """An image that Pillow converts to grey or colour as it should."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError(
            "floating-point pixels (mode F), of which black and white are not known; save it with 8 or 16 bits"
        )
    if image.mode.startswith(
        "I"
    ):  # 16 bits, which older Pillows open as 32; its own conversion cuts all above 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"pixels in [{values.min()}, {values.max()}], outside [0, 65535]; save it with 8 or 16 bits"
            )
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return (
        image.convert("RGBA") if image.mode in ("P", "PA") else image
    )  # else Pillow warns of a palette with transparency
