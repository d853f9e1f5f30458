"""OpenOOD on a machine without a GPU: its code calls ``.cuda()`` everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def without_cuda(wanted: bool) -> Iterator[None]:
    """Inside, ``.cuda()`` leaves tensors and modules where they are, and ``torch.load`` reads onto the CPU; outside, all is as before.

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
        (torch, "load", lambda *args, **kwargs: load(*args, **{"map_location": "cpu", "weights_only": True, **kwargs})),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
