"""The value range of the data, kept in a module."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn


class Bounded(nn.Module):
    """A module with the value range of the data as buffers ``low`` and ``high``, ``(1 or C, 1,
    1)``.

    Arguments:
        low: Smallest value of the data, a number or one per channel.
        high: Largest value of the data.

    Raises:
        ValueError: If low is not below high, or they have different lengths.
    """

    low: Tensor
    high: Tensor
    exact: ClassVar[tuple[str, ...]] = ("low", "high")
    """Buffers that stay float32 when the module becomes ``.double()`` or ``.bfloat16()``, since a
    rounded range would refuse good images."""

    def __init__(
        self,
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
    ):
        super().__init__()
        bounds = [
            torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).clone()
            for value in (low, high)
        ]
        if bounds[0].shape != bounds[1].shape or not bool((bounds[0] < bounds[1]).all()):
            raise ValueError(
                "Expected low < high, numbers or one for each channel, "
                f"but got low={low!r}, high={high!r}"
            )
        self.register_buffer("low", bounds[0])
        self.register_buffer("high", bounds[1])

    def clip(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` clipped to the value range."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def to_unit(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` from the value range to [0, 1]."""
        return (x - self.low) / (self.high - self.low)

    def from_unit(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` from [0, 1] to the value range."""
        return self.low + (self.high - self.low) * x

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = getattr(self, name)
            if after.dtype != value.dtype and not value.is_meta:
                setattr(self, name, value.to(after.device))
        return self
