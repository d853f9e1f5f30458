"""OpenOOD on a machine without a GPU.

Its code calls ``.cuda()`` everywhere, and names the device ``cuda`` in a few places.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Inside, what is asked for on a device ``cuda`` is made on the CPU."""

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.device:  # which torch itself calls by its name, as fork_rng does
            args, kwargs = map(_on_cpu, args), {key: _on_cpu(kwargs[key]) for key in kwargs}
        return func(*args, **kwargs)


def _on_cpu(value: Any) -> Any:
    named = isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
    return "cpu" if named else value


def _stay(self, *_, **__):
    """In place of ``.cuda()``."""
    return self


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other values of an object's attributes, inside."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextmanager
def without_cuda(wanted: bool) -> Iterator[None]:
    """Keep tensors and modules on the CPU, whatever device they are sent to.

    ``torch.load`` reads onto the CPU too, and runs no code unless a caller asks for it: it reads
    tensors and plain containers alone, as torch from 2.6 on does by default.

    Arguments:
        wanted: Whether a GPU was asked for. Nothing changes where one is there and was asked for.
    """
    if wanted and torch.cuda.is_available():
        yield
        return
    load, safe = torch.load, {"map_location": "cpu", "weights_only": True}
    with (
        replaced(Tensor, cuda=_stay),
        replaced(nn.Module, cuda=_stay),
        replaced(torch.cuda, FloatTensor=torch.FloatTensor),
        replaced(torch, load=lambda *args, **kwargs: load(*args, **{**safe, **kwargs})),
        _OnCPU(),
    ):
        yield
