"""Images with labels, in memory or on disk. Where they lie changes nothing: the same rows give the
same bytes, uint8 ``(N, C, H, W)``.

torchvision's ``ImageFolder`` is not used: it keeps two Python objects per image, follows links to
folders, reads hidden folders as classes and puts class 10 before class 2.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tie_ext.cli.transform import Transform

PIECE = 32
"""Images that a worker decodes at once, so that few wait in memory, whatever the batch size."""
WORKERS = 8
"""Most processes that decode; never more than there are processors."""
WITHOUT_WORKERS = 128
"""Up to so many images are decoded by this process, as workers would take longer to start."""


@dataclass(frozen=True)
class ImageSet(Dataset):
    """Images in memory, with labels.

    Arguments:
        x: The images, uint8 ``(N, C, H, W)``.
        y: Their labels ``(N,)``, int64; -1 where there are none.
        classes: Name of each class, by label.
        note: How the test images were chosen, where the user has to know.
    """

    x: Tensor
    y: Tensor
    classes: tuple[str, ...] = ()
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H, W)``."""
        return tuple(self.x.shape[1:])

    def take(self, rows: Tensor) -> "ImageSet":
        """The images of some rows, indices or a mask, in their order."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def parts(self, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each tensor of indices, uint8 ``(B, C, H, W)``.

        Raises:
            ValueError: If one cannot be read.
        """
        return (self.x[part] for part in rows)

    def loaded(self) -> "ImageSet":
        """The same images in memory.

        Raises:
            ValueError: If one cannot be read.
        """
        return self

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(C, H, W)`` in [0, 1] and its label, as torch's ``DataLoader`` asks."""
        (x,) = self.parts([torch.tensor([index])])
        return x[0].float() / 255, int(self.y[index])

    def first(self, count: int | None, seed: int = 0) -> "ImageSet":
        """A random subset of ``count`` images, the same for the same seed; all images for None or
        too large a count.
        """
        if count is None or count >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count])

    def classes_between(self, first: int, last: int) -> "ImageSet":
        """The images of the classes ``first`` to ``last``, relabelled from 0.

        Raises:
            ValueError: If there are no such classes.
        """
        if not 0 <= first <= last < len(self.classes):
            raise ValueError(
                f"Expected classes among 0 to {len(self.classes) - 1}, but got {first} to {last}"
            )
        part = self.take((self.y >= first) & (self.y <= last))
        return replace(part, y=part.y - first, classes=self.classes[first : last + 1])


@dataclass(frozen=True)
class ImageFiles(ImageSet):
    """Images on disk, decoded by worker processes when they are read.

    Arguments:
        x: Path of each, bytes ``(N,)``: paths as objects would take more memory than a network.
        transform: What makes an image of a file.
    """

    x: np.ndarray  # type: ignore[assignment]
    transform: Transform = field(kw_only=True)

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
        return cls(paths, y, transform=transform, **about)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H, W)``."""
        return self.transform.shape

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

    train: ImageSet
    """ID training images."""
    test: ImageSet
    """ID test images."""
    ood: dict[str, ImageSet]
    """OOD image sets by name."""
    transform: Transform
    """How they were read."""

    @property
    def sets(self) -> dict[str, ImageSet]:
        """The sets to score by name; the ID set is ``id``."""
        return {"id": self.test, **self.ood}


class _Decoder(Dataset):
    """Decodes the images of some rows, in a worker.

    It gives arrays: tensors from workers leave gaps in memory, which then grows by nearly every
    image (450 MB for 3000 of 224 pixels).
    """

    def __init__(self, images: ImageFiles):
        self.files, self.transform = images.x, images.transform

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
