"""One reader of loaders: what a batch may be, and what is refused, is decided here for every
caller.

A batch is images ``(B, C, H, W)`` alone, ``(images, labels, ...)`` of which the rest is ignored,
or a mapping with images under one of :data:`IMAGE_KEYS` and labels under one of
:data:`LABEL_KEYS`. Tensors and numpy arrays are taken; labels are integers of any type or one-hot
rows. Labels < 0 are OOD by pytorch-ood's convention.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from tie_ext.utils.checks import check_images, check_labels, describe

log = logging.getLogger(__name__)

IMAGE_KEYS = ("image", "images", "pixel_values", "data")
"""Keys of the images in a batch that is a mapping; the first that is there counts."""
LABEL_KEYS = ("label", "labels", "target", "targets")
"""Keys of the labels."""
BATCHED = "put it into DataLoader({}, batch_size=128)"


class Batch(NamedTuple):
    """One batch, read and checked."""

    images: Tensor
    """``(B, C, H, W)``, float32."""
    labels: Tensor | None
    """``(B,)``, int64; None where the loader has none."""


class BatchReader:
    """The batches of a loader, read alike wherever they are used.

    Arguments:
        loader: A ``DataLoader``, a list of batches, or anything that can be iterated over.
        num_classes: n, which labels are checked against; None to leave labels unchecked.
        image_shape: ``(C, H, W)`` of every image; None for that of the first.
        low: Smallest value of an image, a number or ``(C, 1, 1)``; None to leave values unchecked.
        high: Largest value.
        labelled: Whether labels are needed.
        id_only: Leave out images whose label is < 0, counted in :attr:`ood`; else they are
            refused.
        name: What the loader is called in errors.
        rereadable: Whether it will be read more than once, which an iterator cannot be.

    Raises:
        TypeError: If the loader is no iterable.
        ValueError: If it gives single images, or can be read only once where twice is needed.
            While it is read: if a batch is of another kind, an image is not finite, or not of one
            shape and in the value range, labels are missing or not in [0, n), or nothing is left.
    """

    def __init__(
        self,
        loader: Iterable,
        num_classes: int | None = None,
        image_shape: Sequence[int] | None = None,
        low: Tensor | float | None = None,
        high: Tensor | float | None = None,
        *,
        labelled: bool = False,
        id_only: bool = False,
        name: str = "loader",
        rereadable: bool = True,
    ):
        check_loader(loader, name, rereadable)
        self.loader, self.num_classes, self.name = loader, num_classes, name
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self.low, self.high = (v.cpu() if isinstance(v, Tensor) else v for v in (low, high))
        self.labelled, self.id_only = labelled, id_only
        self.ood = 0  #: images left out of the last reading, their labels being < 0

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # TypeError, as progress bars expect

    def __iter__(self) -> Iterator[Batch]:
        left, self.ood = 0, 0
        for batch in self.loader:
            images, labels = self._checked(*read_batch(batch, self.name))
            if len(images):
                left += len(images)
                yield Batch(images, labels)
        if self.ood:
            log.info("%s: left out %d images with labels < 0, as OOD", self.name, self.ood)
        if not left:
            found = f"{self.ood} with labels < 0 alone" if self.ood else "an empty loader"
            raise ValueError(f"Expected ID images in {self.name}, but got {found}")

    def first(self) -> Batch:
        """The first batch that has ID images."""
        return next(iter(self))

    def _checked(self, images: Tensor, labels: Tensor | None) -> Batch:
        check_images(images.cpu(), self.image_shape, self.low, self.high)
        self.image_shape = tuple(images.shape[1:])
        if labels is None:
            if self.labelled:
                raise ValueError(
                    f"Expected labels beside the images of {self.name}, but got images alone; "
                    f"give batches (images, labels), or a dict with {' or '.join(LABEL_KEYS)}"
                )
            return Batch(images.float(), None)
        labels = _class_indices(labels, len(images), self.num_classes)
        if self.id_only:
            known = labels >= 0
            self.ood += int((~known).sum())
            images, labels = images[known.to(images.device)], labels[known]
        check_labels(labels, len(labels), self.num_classes)
        return Batch(images.float(), labels)


def read_batch(batch: Any, name: str = "loader") -> tuple[Tensor, Tensor | None]:
    """Images and, where there are any, labels of a batch of whatever kind; neither is checked.

    Arguments:
        batch: A tensor or array of images, a sequence ``(images, labels, ...)``, or a mapping.
        name: What the loader is called in errors.

    Raises:
        ValueError: If it is of another kind, saying which line helps.
    """
    if isinstance(batch, Mapping):
        keys = [next((key for key in of if key in batch), None) for of in (IMAGE_KEYS, LABEL_KEYS)]
        if keys[0] is None:
            raise ValueError(
                f"Expected images under one of {', '.join(IMAGE_KEYS)} in a batch of {name}, "
                f"but got the keys {', '.join(map(str, batch))}"
            )
        parts = [batch[key] for key in keys if key is not None]
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = list(batch[:2])
    else:
        parts = [batch]
    if not parts or not isinstance(parts[0], Tensor | np.ndarray):
        raise ValueError(_no_images(parts[0] if parts else batch, name))
    images = torch.as_tensor(parts[0])
    if images.ndim == 3 and not isinstance(batch, Mapping):
        raise ValueError(
            f"Expected batches (B, C, H, W) from {name}, but got an image {tuple(images.shape)}; "
            + BATCHED.format("dataset")
        )
    labels = parts[1] if len(parts) > 1 else None
    return images, None if labels is None else _labels(labels)


def _labels(labels: Any) -> Tensor:
    if isinstance(labels, Tensor):
        return labels
    labels = np.asarray(labels)
    if labels.dtype.kind == "u":  # of which older PyTorch has eight bits alone
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iubf":
        raise ValueError(f"Expected integer labels, but got an array of {labels.dtype}")
    return torch.as_tensor(labels)


def _class_indices(labels: Tensor, count: int, num_classes: int | None) -> Tensor:
    """Labels ``(B,)``, int64, of integers ``(B,)`` or ``(B, 1)``, or of one-hot rows ``(B,
    n)``.
    """
    if labels.shape == (count, 1) and not labels.is_floating_point():
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.shape[0] == count and labels.shape[1] > 1:
        one_hot = ((labels == 0) | (labels == 1)).all() and (labels.long().sum(1) == 1).all()
        if not bool(one_hot) or labels.shape[1] != (num_classes or labels.shape[1]):
            raise ValueError(
                f"Expected one label per image, an integer or a one-hot row"
                f"{f' of {num_classes}' if num_classes else ''}, but got {describe(labels)}"
            )
        labels = labels.long().argmax(1)
    check_labels(labels, count, None)
    return labels.long()


def check_loader(loader: Any, name: str, rereadable: bool = True) -> None:
    """Refuse what gives no batches; the arguments and errors are :class:`BatchReader`'s."""
    kind = type(loader).__name__
    if isinstance(loader, Tensor | np.ndarray):
        raise ValueError(
            f"Expected batches from {name}, but got one {kind}; put it into a list, [{name}]"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(
            f"Expected batches from {name}, but got {kind}, which gives one image at a time; "
            + BATCHED.format(name)
        )
    if not isinstance(loader, Iterable):
        raise TypeError(f"Expected {name} to be a DataLoader or a list of batches, but got {kind}")
    if rereadable and isinstance(loader, Iterator):
        raise ValueError(
            f"Expected {name} to be something that can be read more than once, as a DataLoader or "
            f"a list, but got a {kind}"
        )


def _no_images(part: Any, name: str) -> str:
    said = f"Expected batches of tensors from {name}, but got {describe(part)}"
    if type(part).__module__.startswith("PIL"):
        return (
            f"{said}; give the dataset transform=torchvision.transforms.ToTensor(), and "
            + BATCHED.format("dataset")
        )
    return said
