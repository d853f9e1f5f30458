"""Checks of user input, in one form everywhere: ``Expected ..., but got ...``."""

import math
import numbers
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

# Where torch 2.2 has it.
is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
MAX_VALUES = 2**24
"""Values of the largest image: 3 x 2364 x 2364."""


def check_logits(logits: Tensor) -> None:
    """Refuse anything but a finite floating-point matrix of n+1 >= 3 columns.

    Raises:
        ValueError: With what was expected and what was given.
    """
    if (
        not isinstance(logits, Tensor)
        or logits.ndim != 2
        or not logits.is_floating_point()
        or logits.shape[1] < 3
    ):
        raise ValueError(
            "Expected floating-point logits of shape (B, n+1) with n >= 2, "
            f"but got {describe(logits)}"
        )
    if is_compiling() or torch.jit.is_tracing():
        return  # an exported program has no exceptions to raise
    check_finite(logits, "logits")


def check_finite(x: Tensor, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: With the number of offending values and the first row that holds one.
    """
    bad = ~torch.isfinite(x)
    if bad.any():
        row = int(bad.flatten(1).any(1).nonzero()[0]) if x.ndim > 1 else int(bad.nonzero()[0])
        raise ValueError(
            f"Expected finite {name}, but got {int(bad.sum())} NaN or infinite values, "
            f"the first in row {row}"
        )


def check_images(
    x: Tensor,
    shape: Sequence[int] | None = None,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
) -> None:
    """Refuse anything but a finite floating-point batch of images ``(B, C, H, W)`` with B >= 1.

    Arguments:
        x: The batch.
        shape: ``(C, H, W)`` each image must have.
        low: Smallest value allowed, a number or ``(C, 1, 1)``.
        high: Largest value allowed.

    Raises:
        ValueError: With what was expected and what was given.
    """
    wanted = f"(B, {', '.join(map(str, shape))})" if shape is not None else "(B, C, H, W)"
    if (
        not isinstance(x, Tensor)
        or x.ndim != 4
        or (shape is not None and tuple(x.shape[1:]) != tuple(shape))
    ):
        raise ValueError(f"Expected images of shape {wanted}, but got {describe(x)}")
    if not x.is_floating_point():
        raise ValueError(
            f"Expected floating-point images (uint8 ones divided by 255), but got {describe(x)}"
        )
    if x.numel() == 0:
        raise ValueError(f"Expected at least one image of shape {wanted}, but got an empty batch")
    # Two passes over the images, as this is a part of the price of a score; both let NaN through.
    smallest, largest = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    if not (smallest.isfinite() & largest.isfinite()).all():
        check_finite(x, "images")
    if low is not None and high is not None:
        slack = 1e-4  # normalisation in float32 rounds
        low, high = (of.flatten() if isinstance(of, Tensor) else of for of in (low, high))
        if (smallest < low - slack).any() or (largest > high + slack).any():
            raise ValueError(
                f"Expected images in the value range {_range(low, high)} of the network, but got "
                f"values in [{x.min().item():.4g}, {x.max().item():.4g}]; bring them there "
                "(divide those of 0 to 255 by 255), or give their range as `low` and `high` where "
                "the network is made"
            )


def check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Refuse anything but the shape of an image.

    Returns:
        ``(C, H, W)``.

    Raises:
        ValueError: If it is not three positive integers, or has more than :data:`MAX_VALUES`
            values.
    """
    good = isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) == 3
    if not good or not all(
        isinstance(side, numbers.Integral) and not isinstance(side, bool) and side > 0
        for side in shape
    ):
        raise ValueError(
            f"Expected the shape (C, H, W) of an image, three positive integers, but got {shape!r}"
        )
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(
            f"Expected images of at most {MAX_VALUES} values, but got the shape {tuple(shape)}"
        )
    C, H, W = (int(side) for side in shape)
    return C, H, W


def check_labels(y: Tensor, batch: int, num_classes: int | None) -> None:
    """Refuse anything but ``batch`` integer labels in ``[0, num_classes)``; in any range where
    that is None.

    Raises:
        ValueError: With what was expected and what was given.
    """
    if (
        not isinstance(y, Tensor)
        or y.shape != (batch,)
        or y.is_floating_point()
        or y.dtype == torch.bool
    ):
        raise ValueError(f"Expected integer labels of shape ({batch},), but got {describe(y)}")
    if num_classes is not None and ((y < 0).any() or (y >= num_classes).any()):
        raise ValueError(
            f"Expected labels in [0, {num_classes}), "
            f"but got labels in [{int(y.min())}, {int(y.max())}]"
        )


def check_class_counts(counts: Tensor) -> None:
    """Refuse data without an image of some class.

    Arguments:
        counts: Images of each class ``(n,)``.

    Raises:
        ValueError: With the classes that have no image.
    """
    if (counts == 0).any():
        missing = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"Expected samples of all {len(counts)} classes, but got none of class {missing}"
        )


def check_number(
    name: str, value: float, low: float, high: float, *, integer: bool = False, above: bool = False
) -> None:
    """Refuse a setting outside ``[low, high]`` (``(low, high]`` where ``above``), NaN, or a
    fraction where an integer is needed.

    Raises:
        ValueError: With the name of the setting, its range and its value.
    """
    kind = numbers.Integral if integer else numbers.Real  # numpy's numbers are among them
    # Compared as it is, since the longest integers have no float; NaN fails the comparison.
    good = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    if not good or (above and value == low):
        left, what = "(" if above else "[", "an integer" if integer else "a number"
        raise ValueError(
            f"Expected {name} to be {what} in {left}{low}, {high}], but got {value!r}"
        )


def check_choice(what: str, value: object, choices: Collection[str]) -> None:
    """Refuse anything but one of some words; ``what`` is its description up to "one of".

    Raises:
        ValueError: With the words there are and what came.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"Expected {what} one of {', '.join(choices)}, but got {value!r}")


def describe(x: object) -> str:
    """A value as error messages name it: its type, and of a tensor dtype and shape."""
    if isinstance(x, Tensor):
        return f"a {x.dtype} tensor of shape {tuple(x.shape)}"
    return type(x).__name__


def _range(low: float | Tensor, high: float | Tensor) -> str:
    """A value range in words, by channel where the channels differ."""
    bounds = (torch.as_tensor(value).flatten().cpu() for value in (low, high))
    lows, highs = (bound.tolist() for bound in torch.broadcast_tensors(*bounds))
    ranges = [f"[{a:.4g}, {b:.4g}]" for a, b in zip(lows, highs, strict=True)]
    return ranges[0] if len(set(ranges)) == 1 else ", ".join(ranges) + " (by channel)"
