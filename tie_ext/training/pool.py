"""The garbage pool: a bounded, fair sample of all that was expelled into the garbage class."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tie_ext.utils.checks import check_number

CONVERTED = 2**20
"""Values made bytes at once."""


class GarbagePool:
    """A bounded sample of all garbage ever offered, kept as uint8.

    Reservoir sampling (Vitter's algorithm R): each image offered so far is in the pool with the same probability, so garbage of early epochs
    stays represented beside that of late ones while memory does not grow.

    Arguments:
        capacity: Most images kept, >= 1.
        image_shape: ``(C, H, W)``.
        low: Smallest value of the data, a number or ``(C, 1, 1)``; what uint8 0 stands for.
        high: Largest value of the data; what 255 stands for.

    Raises:
        ValueError: If the capacity is out of range, or more than memory holds.
    """

    def __init__(
        self,
        capacity: int,
        image_shape: Sequence[int],
        low: float | Tensor = 0.0,
        high: float | Tensor = 1.0,
    ):
        check_number("pool_size", capacity, 1, 10**9, integer=True)
        try:
            self.images = torch.empty((capacity, *image_shape), dtype=torch.uint8)
        except RuntimeError as error:
            raise ValueError(
                f"Expected a pool that fits into memory, but got pool_size {capacity} for images {tuple(image_shape)}"
            ) from error
        self.low = torch.as_tensor(low, dtype=torch.float32, device="cpu")
        self.high = torch.as_tensor(high, dtype=torch.float32, device="cpu")
        self.offered = 0

    def __len__(self) -> int:
        return min(self.offered, len(self.images))

    def add(self, x: Tensor, chosen: Tensor | None = None) -> None:
        """Offer images ``(M, C, H, W)`` in ``[low, high]``; a full pool keeps a fair share of them.

        Arguments:
            x: The images.
            chosen: Which of them are offered ``(M,)``, bool; None for all.
        """
        rows = torch.arange(len(x)) if chosen is None else chosen.nonzero()[:, 0].cpu()
        count = torch.arange(self.offered, self.offered + len(rows))
        slot = torch.where(
            count < len(self.images),
            count,
            (torch.rand(len(rows), dtype=torch.float64) * (count + 1)).long(),
        )
        # Of two images for one slot the later wins, as if they had come one by one.
        winner = list(
            {
                s: i
                for s, i in zip(slot.tolist(), rows.tolist(), strict=True)
                if s < len(self.images)
            }.items()
        )
        # Only these are copied and converted, as a full pool takes few; a few at a time, as that takes several times their place.
        step = max(1, CONVERTED // max(1, self.images[0].numel()))
        for first in range(0, len(winner), step):
            slots, of = zip(*winner[first : first + step], strict=True)
            kept = x.detach()[list(of)].float().cpu()
            self.images[list(slots)] = (
                ((kept - self.low) / (self.high - self.low) * 255)
                .round()
                .clamp(0, 255)
                .to(torch.uint8)
            )
        self.offered += len(rows)

    def draw(self, k: int) -> Tensor:
        """``k`` images ``(k, C, H, W)`` in ``[low, high]``, drawn with replacement.

        Raises:
            ValueError: If images are asked of an empty pool.
        """
        if k and len(self) == 0:
            raise ValueError(
                "Expected a garbage pool that holds images to draw from, but got an empty one"
            )
        x = self.images[torch.randint(max(1, len(self)), (k,))]
        return self.low + (self.high - self.low) * (x.float() / 255)

    def state_dict(self) -> dict:
        """What resumes the pool: the images held and how many were offered."""
        return {"images": self.images[: len(self)], "offered": self.offered}

    def load_state_dict(self, state: dict) -> None:
        """Put the pool back.

        Raises:
            ValueError: If the images do not fit this pool.
        """
        images, offered = state["images"], state["offered"]
        check_number("offered", offered, 0, 2**53, integer=True)
        size = min(offered, len(self.images))
        if images.dtype != torch.uint8 or images.shape != (size, *self.images.shape[1:]):
            raise ValueError(
                f"Expected {size} uint8 garbage images of shape {tuple(self.images.shape[1:])}, but got {images.dtype} {tuple(images.shape)}"
            )
        self.images[:size] = images
        self.offered = offered
