"""What the rooms do to modules: modes, flags, BatchNorm's statistics and the value range of the data, each left or kept as it should be."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
