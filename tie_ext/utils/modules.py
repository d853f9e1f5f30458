"""What the rooms do to modules: modes, flags, BatchNorm's statistics and the value range of the data, each left or kept as it should be."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that weights can have."""


def check_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state that ``load_state_dict`` would take without a word: of other types, or with NaN in it.

    Raises:
        ValueError: If a weight is no real number, or a count no integer.
    """
    for name, mine in module.state_dict().items():
        found = state.get(name)
        if (
            isinstance(mine, Tensor)
            and isinstance(found, Tensor)
            and found.dtype not in (FLOATS if mine.is_floating_point() else (mine.dtype,))
        ):
            raise ValueError(f"Expected {name} to be of type {mine.dtype}, but got {found.dtype}")
        if isinstance(found, Tensor) and bool(found.isnan().any()):
            raise ValueError(f"Expected numbers in {name}, but got NaN")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode of every part as it was outside."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; mode and flags of every part as they were outside.

    Gradients still flow *through* the classifier, to its input.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
    classifier.requires_grad_(False)
    try:
        with evaluating(classifier):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@torch.no_grad()
def settle_statistics(module: nn.Module, inputs: Iterable[Tensor]) -> None:
    """BatchNorm's running statistics anew, as their mean over some inputs; layers that are in evaluation mode keep theirs.

    Arguments:
        module: In training mode, but for the parts that are to stay as they are.
        inputs: Batches to pass through it; not read where no layer needs them.
    """
    layers = [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative mean
    try:
        for x in inputs:
            module(x)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class Bounded(nn.Module):
    """A module that knows the value range of the data, as buffers ``low`` and ``high``, each ``(1 or C, 1, 1)``.

    Arguments:
        low: Smallest value of the data, a number or one a channel.
        high: Largest value of the data.

    Raises:
        ValueError: If low is not below high, or they have different lengths.
    """

    low: Tensor
    high: Tensor
    exact: ClassVar[tuple[str, ...]] = ("low", "high")
    """Buffers that stay float32 when the module is made ``.double()`` or ``.bfloat16()``: a rounded range refuses good images."""

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
                f"Expected low < high, numbers or one for each channel, but got low={low!r}, high={high!r}"
            )
        self.register_buffer("low", bounds[0])
        self.register_buffer("high", bounds[1])

    def clip(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` brought into the value range."""
        return torch.minimum(torch.maximum(x, self.low), self.high)

    def unit(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` of the value range, in [0, 1]."""
        return (x - self.low) / (self.high - self.low)

    def scaled(self, x: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` in [0, 1], in the value range."""
        return self.low + (self.high - self.low) * x

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = getattr(self, name)
            if after.dtype != value.dtype and not value.is_meta:
                setattr(self, name, value.to(after.device))
        return self
