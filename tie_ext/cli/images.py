"""Images with labels, in memory or on disk. Where they lie changes nothing: the same rows give the
same bytes, uint8 ``(N, C, H, W)``.

torchvision's ``ImageFolder`` is not used: it keeps two Python objects per image, follows links to
folders, reads hidden folders as classes and puts class 10 before class 2.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tie_ext.cli.transform import Transform
from tie_ext.utils.checks import check_number

PIECE = 32
"""Images that a worker decodes at once, so that few wait in memory, whatever the batch size."""
WORKERS = 8
"""Most processes that decode; never more than there are processors."""
WITHOUT_WORKERS = 128
"""Up to so many images are decoded by this process, as workers would take longer to start."""
AnyImages = TypeVar("AnyImages", bound="Images")


class Images(Dataset):
    """Images with labels; :class:`ImageSet` holds them in memory, :class:`ImageFiles` on disk."""

    y: Tensor
    """Labels ``(N,)``, int64; -1 where there are none."""
    classes: tuple[str, ...]
    """Name of each class, by label."""
    note: str
    """How the test images were chosen, where the user has to know."""
    shape: tuple[int, ...]
    """``(C, H, W)``."""

    def take(self: AnyImages, rows: Tensor) -> AnyImages:
        """The images of some rows, indices or a mask, in their order."""
        raise NotImplementedError

    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices, uint8 ``(B, C, H, W)``.

        Raises:
            ValueError: If one cannot be read.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(C, H, W)`` in [0, 1] and its label, as torch's ``DataLoader`` asks."""
        (x,) = self.parts([torch.tensor([index])])
        return x[0].float() / 255, int(self.y[index])

    def noted(self: AnyImages, note: str) -> AnyImages:
        """The same images with another note."""
        return replace(self, note=note)  # type: ignore[type-var]

    def first(self: AnyImages, count: int | None, seed: int = 0) -> AnyImages:
        """A random subset of ``count`` images, the same for the same seed; all images for None or
        too large a count.
        """
        if count is None or count >= len(self):
            return self
        check_number("count", count, 1, len(self), integer=True)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count])

    def classes_between(self: AnyImages, first: int, last: int) -> AnyImages:
        """The images of the classes ``first`` to ``last``, relabelled from 0.

        Raises:
            ValueError: If there are no such classes.
        """
        if not 0 <= first <= last < len(self.classes):
            raise ValueError(
                f"Expected classes among 0 to {len(self.classes) - 1}, but got {first} to {last}"
            )
        part = self.take((self.y >= first) & (self.y <= last))
        names = self.classes[first : last + 1]
        return replace(part, y=part.y - first, classes=names)  # type: ignore[type-var]

    def without(self: AnyImages, labels: Sequence[int]) -> AnyImages:
        """The images of all other classes: OOD for a network that knows these."""
        return self.take(~torch.isin(self.y, torch.tensor(labels)))

    def loaded(self) -> "ImageSet":
        """The same images in memory.

        Raises:
            ValueError: If one cannot be read.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ImageSet(Images):
    """Images in memory.

    Arguments:
        x: The images, uint8 ``(N, C, H, W)``.
        y: Their labels ``(N,)``, int64.
        classes: Name of each class.
        note: How the test images were chosen.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...] = ()
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """``(C, H, W)``."""
        return tuple(self.x.shape[1:])

    def take(self, rows: Tensor) -> "ImageSet":
        """The images of some rows."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices."""
        return (self.x[part] for part in rows)

    def loaded(self) -> "ImageSet":
        """Itself."""
        return self


@dataclass(frozen=True)
class ImageFiles(Images):
    """Images on disk, decoded by worker processes when they are read.

    Arguments:
        files: Path of each, bytes ``(N,)``: paths as objects would take more memory than a
            network.
        y: Their labels ``(N,)``, int64.
        transform: What makes an image of a file.
        classes: Name of each class.
        note: How the test images were chosen.
    """

    files: np.ndarray
    y: Tensor
    transform: Transform
    classes: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def of(
        cls,
        files: Sequence[str | os.PathLike],
        transform: Transform,
        labels: Sequence[int] | None = None,
        **about: Any,
    ) -> "ImageFiles":
        """Images by path, with labels or without; ``about`` holds what else the class has."""
        paths = np.array([os.fsencode(file) for file in files], dtype=np.bytes_)
        y = torch.full((len(files),), -1) if labels is None else torch.tensor(labels)
        return cls(paths, y, transform, **about)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """``(C, H, W)``."""
        return self.transform.shape

    def take(self, rows: Tensor) -> "ImageFiles":
        """The images of some rows."""
        return replace(self, files=self.files[rows.numpy()], y=self.y[rows])

    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices."""
        for x, broken in self.decoded(rows):
            for error in broken.values():
                raise ValueError(error)
            yield x

    def loaded(self) -> ImageSet:
        """The same images in memory."""
        x = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        rows = torch.arange(len(self)).split(PIECE)
        for part, images in zip(rows, self.parts(rows), strict=True):
            x[part] = images
        return ImageSet(x, self.y, self.classes, self.note)

    def decoded(
        self, rows: Sequence[Tensor], workers: int | None = None
    ) -> Iterator[tuple[Tensor, dict[int, str]]]:
        """As :meth:`parts`; an image that cannot be read is black, and reported instead of raised.

        Arguments:
            rows: Indices, a tensor for each batch.
            workers: Processes that decode; 0 for this one, None for as many as help.

        Returns:
            Images, and what is wrong with the broken ones by their index in the batch.
        """
        pieces = [piece.numpy() for part in rows for piece in part.split(PIECE)]
        if workers is None:
            alone = sum(map(len, pieces)) <= WITHOUT_WORKERS
            workers = 0 if alone else min(WORKERS, _processors())
        loader = DataLoader(
            _Decoder(self),
            batch_size=None,
            sampler=pieces,  # type: ignore[arg-type]
            num_workers=min(workers, len(pieces)),
            collate_fn=_unchanged,
            # A random state of its own: the order of images must not depend on where they lie.
            generator=torch.Generator(),
        )
        found = iter(loader)
        for part in rows:
            x = torch.empty((len(part), *self.shape), dtype=torch.uint8)
            broken: dict[int, str] = {}
            for start in range(0, len(part), PIECE):
                piece, errors = next(found)
                x[start : start + PIECE] = torch.from_numpy(piece)
                broken |= {start + place: error for place, error in errors.items()}
            yield x, broken


class RunImages(NamedTuple):
    """The images of a run."""

    train: Images
    """ID training images."""
    test: Images
    """ID test images."""
    ood: dict[str, Images]
    """OOD image sets by name."""
    transform: Transform | None = None
    """How they were read."""

    @property
    def sets(self) -> dict[str, Images]:
        """The sets to score by name; the ID set is ``id``."""
        return {"id": self.test, **self.ood}


class _Decoder(Dataset):
    """Decodes the images of some rows, in a worker.

    It gives arrays: tensors from workers leave gaps in memory, which then grows by nearly every
    image (450 MB for 3000 of 224 pixels).
    """

    def __init__(self, images: ImageFiles):
        self.files, self.transform = images.files, images.transform

    def __getitem__(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        x, broken = np.zeros((len(rows), *self.transform.shape), dtype=np.uint8), {}
        for place, row in enumerate(rows):
            try:
                x[place] = self.transform.read(os.fsdecode(self.files[row]))
            except ValueError as error:
                broken[place] = str(error)
        return x, broken


def _unchanged(batch: Any) -> Any:
    return batch


def _processors() -> int:
    """Processors that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
