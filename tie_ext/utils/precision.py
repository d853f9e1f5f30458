"""Arithmetic in the types of a module's tensors, whatever the caller's autocast."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")
DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Types of devices that have an autocast."""


def _autocast_devices() -> list[str]:
    """Types of devices for which autocast is on."""
    if torch.__version__ < "2.4":
        on = {"cpu": torch.is_autocast_cpu_enabled(), "cuda": torch.is_autocast_enabled()}
        return [device for device, enabled in on.items() if enabled]
    return [device for device in DEVICES if torch.is_autocast_enabled(device)]


def without_autocast(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that the caller's autocast does not reach: a threshold is valid for scores of
    one precision.
    """

    @wraps(function)
    def exact(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        if not (devices := _autocast_devices()):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return exact
