"""The garbage pool: a bounded, uniform sample of all images that were excluded."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tie_ext.outliers.base import Prior
from tie_ext.utils.checks import check_number
from tie_ext.utils.reservoir import replacements

CONVERTED = 2**20
"""Values converted to uint8 at once."""


class GarbagePool:
    """A bounded sample of all garbage ever offered, kept as uint8.

    Reservoir sampling (Vitter's algorithm R): every image offered so far is in the pool with the
    same probability, so that garbage of early epochs stays represented while memory is bounded.

    Arguments:
        capacity: Images kept at most, >= 1.
        image_shape: ``(C, H, W)``.
        low: Smallest value of the images, a number or ``(C, 1, 1)``; uint8 0.
        high: Largest value of the images; uint8 255.

    Raises:
        ValueError: If the capacity is out of range, or more than fits into memory.
    """

    def __init__(
        self,
        capacity: int,
        image_shape: Sequence[int],
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
    ):
        check_number("pool_size", capacity, 1, 10**9, integer=True)
        self.image_shape = tuple(image_shape)
        try:
            self.images = torch.empty((capacity, *image_shape), dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(
                f"Expected a pool that fits into memory, but got pool_size {capacity} for images "
                f"{self.image_shape}"
            ) from error
        self.low = torch.as_tensor(low, dtype=torch.float32, device="cpu")
        self.high = torch.as_tensor(high, dtype=torch.float32, device="cpu")
        self.offered = 0

    def __len__(self) -> int:
        return min(self.offered, len(self.images))

    def begin(self, prior: Sequence[Prior], most: int, at_once: int) -> None:
        """Fill half the pool with images of some priors, so that the first candidates find room.

        Arguments:
            prior: Each gives the same number, the first ones the remainder.
            most: Images of all priors together, at most.
            at_once: Images drawn at once, at most.
        """
        whole = min((len(self.images) + 1) // 2, most)
        for i, each in enumerate(prior):
            count = whole // len(prior) + (i < whole % len(prior))
            for images in draw(each, count, self.image_shape, at_once):
                self.add(images)

    def add(self, x: Tensor, chosen: Tensor | None = None) -> None:
        """Offer images; a full pool keeps a uniform sample of all it was offered.

        Arguments:
            x: Images ``(M, C, H, W)`` in ``[low, high]``.
            chosen: Which of them are offered ``(M,)``, bool; None for all.
        """
        rows = torch.arange(len(x)) if chosen is None else chosen.nonzero()[:, 0].cpu()
        chance = torch.rand(len(rows), dtype=torch.float64)
        kept, places = replacements(self.offered, len(self.images), chance)
        # Only these are converted, as a full pool keeps few; in pieces, which bounds memory.
        step = max(1, CONVERTED // max(1, self.images[0].numel()))
        for of, to in zip(rows[kept].split(step), places.split(step), strict=True):
            images = x.detach()[of.to(x.device)].float().cpu()
            images = (images - self.low) / (self.high - self.low) * 255
            self.images[to] = images.round().clamp(0, 255).to(torch.uint8)
        self.offered += len(rows)

    def draw(self, k: int) -> Tensor:
        """``k`` images ``(k, C, H, W)`` in ``[low, high]``, drawn with replacement.

        Raises:
            ValueError: If the pool is empty and k > 0.
        """
        if k and len(self) == 0:
            raise ValueError(
                "Expected a garbage pool that holds images to draw from, but got an empty one"
            )
        x = self.images[torch.randint(max(1, len(self)), (k,))]
        return self.low + (self.high - self.low) * (x.float() / 255)

    def state_dict(self) -> dict:
        """The images, and how many were offered."""
        return {"images": self.images[: len(self)], "offered": self.offered}

    def load_state_dict(self, state: dict) -> None:
        """Restore the pool.

        Raises:
            ValueError: If the images do not fit this pool.
        """
        images, offered = state["images"], state["offered"]
        check_number("offered", offered, 0, 2**53, integer=True)
        size = min(offered, len(self.images))
        if images.dtype != torch.uint8 or images.shape != (size, *self.image_shape):
            raise ValueError(
                f"Expected {size} uint8 garbage images of shape {self.image_shape}, but got "
                f"{images.dtype} {tuple(images.shape)}"
            )
        self.images[:size] = images
        self.offered = offered


def draw(prior: Prior, count: int, image_shape: Sequence[int], at_once: int) -> Iterator[Tensor]:
    """New images ``(M, C, H, W)`` of a prior, at most ``at_once`` at a time."""
    for first in range(0, count, at_once):
        yield prior.draw((min(at_once, count - first), *image_shape))
