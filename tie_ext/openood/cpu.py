"""OpenOOD on a machine without a GPU: its code calls ``.cuda()`` everywhere, and names the device ``cuda`` here and there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _Here(TorchFunctionMode):
    """Inside, what is asked for on a device ``cuda`` is made on the CPU."""

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        if func is torch.device:  # whose own name torch itself goes by, as fork_rng does
            return func(*args, **(kwargs or {}))
        return func(
            *map(_on_cpu, args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        )


def _on_cpu(value):
    return (
        "cpu"
        if isinstance(value, str | torch.device) and str(value).partition(":")[0] == "cuda"
        else value
    )


@contextmanager
def without_cuda(wanted: bool) -> Iterator[None]:
    """Inside, tensors and modules stay on the CPU, whatever device they are sent to, and ``torch.load`` reads onto it; outside, all is as before.

    What is loaded so runs no code: tensors and plain containers alone are read, as torch from 2.6 on does by itself, unless a caller says otherwise.

    Arguments:
        wanted: Whether a GPU was asked for. Nothing is changed where one is there and was asked for.
    """
    if wanted and torch.cuda.is_available():
        yield
        return
    load = torch.load
    stand_ins = [
        (Tensor, "cuda", lambda self, *_, **__: self),
        (nn.Module, "cuda", lambda self, *_, **__: self),
        (torch.cuda, "FloatTensor", torch.FloatTensor),
        (
            torch,
            "load",
            lambda *args, **kwargs: load(
                *args, **{"map_location": "cpu", "weights_only": True, **kwargs}
            ),
        ),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        with _Here():
            yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
