"""The network in what is wrapped around it."""

import copy
from typing import Any

import torch
from torch import nn


def unwrapped(model: Any) -> nn.Module:
    """The network in what ``torch.compile`` and parallel training wrap around it.

    Raises:
        TypeError: If it is no ``nn.Module``.
        ValueError: If it is one that cannot be looked into.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected a network, an nn.Module, but got a {type(model).__name__}; give the module "
            "that it calls"
        )
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while "_orig_mod" in model._modules or isinstance(model, parallel):
        model = model._modules["module" if isinstance(model, parallel) else "_orig_mod"]  # type: ignore[assignment]
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "Expected a network in Python, but got a torch.jit.ScriptModule, whose layers cannot "
            "be read; give the module that it was made of, with its weights"
        )
    if any("quantized" in type(part).__module__ for part in model.modules()):
        raise ValueError(
            f"Expected a network in floating point, but got a quantised {type(model).__name__}; "
            "attach to the network before it is quantised"
        )
    return model


def bare_copy(model: Any) -> nn.Module:
    """A copy of a network, as :func:`unwrapped` gives it, without compiled parts."""
    model = copy.deepcopy(unwrapped(model))
    for part in list(model.modules()):
        for name, child in part._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                part._modules[name] = child._modules["_orig_mod"]
    return model
