"""Statistics of a layer's output: two or four numbers per channel, over space or tokens.

Symbols: ``a (B, C, H, W)``, ``(B, H, W, C)`` or ``(B, T, C)`` output of a layer before its ReLU.
The four are mean and deviation after the ReLU, which describe textures, and the largest and the
smallest value, which reveal a thin stroke: the place where a filter responds most. A garbage head
reads mean and largest, which rank as well and are pooled in half the time; explanations and heads
that were saved before 0.3 read all four.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tie_ext.utils.checks import is_compiling

MAX_CHANNELS = 128
"""Channels read of a layer at most: the first, as channels have no order; evenly spaced ones where
all four statistics are read."""
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
"""What may stand between a convolution and its ReLU."""
STATISTICS, EVERY = 2, 4
"""Numbers of a channel: of a garbage head, and all there are."""
PIECE = 2**16
"""Values of a layer's output that a CPU pools at once."""
LANES = 128
"""Contiguous values in what it pools, at most."""
FLAT = 1e-6
"""Deviations are no smaller."""


def first_tensor(output: object) -> Tensor | None:
    """The tensor that a layer gives, or the first of several; None where it gives none."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def pool_statistics(a: Tensor, channels_last: bool = False, count: int = STATISTICS) -> Tensor:
    """Statistics ``(B, count c)``, over space or tokens, of a layer's output ``(B, C, H, W)``,
    ``(B, H, W, C)`` where ``channels_last``, or ``(B, T, C)``; c = min(C, 128).

    ``count`` is 2 for mean and largest, 4 for mean, deviation, largest and smallest.
    """
    if a.ndim == 3:
        a = a[:, :, None]  # (B, T, 1, C)
    elif not channels_last:
        a = a.permute(0, 2, 3, 1)  # (B, H, W, C)
    if a.shape[3] > MAX_CHANNELS:
        a = a[..., :MAX_CHANNELS] if count == STATISTICS else _spread(a)
    if not a.requires_grad:
        return _statistics(a, count)
    # A copy, as the gradient needs the values and an in-place ReLU may come next.
    four = _Statistics.apply(a.float().clone())
    mean, _, largest, _ = four.chunk(4, dim=1)
    return four if count == EVERY else torch.cat([mean, largest], dim=1)


def _spread(a: Tensor) -> Tensor:
    """Channels of ``(B, H, W, C)``, evenly spaced, which is a copy."""
    return a[..., torch.linspace(0, a.shape[3] - 1, MAX_CHANNELS).round().long().to(a.device)]


class _Statistics(torch.autograd.Function):
    """:func:`_statistics` with its gradient in one expression; autograd's own takes a CPU three
    times as long.
    """

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return _statistics(a, EVERY)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        a, statistics = ctx.saved_tensors
        size = a.shape[1] * a.shape[2]
        mean, deviation, largest, smallest = (
            part[:, None, None] for part in statistics.chunk(4, dim=1)
        )
        of_mean, of_deviation, of_largest, of_smallest = (
            part[:, None, None] for part in gradient.chunk(4, dim=1)
        )
        slope = torch.where(deviation > FLAT, of_deviation / (size * deviation), 0.0)
        out = torch.addcmul(of_mean / size - slope * mean, slope, a) * (a > 0)
        for value, by in ((largest, of_largest), (smallest, of_smallest)):
            there = a == value  # all places with that value share its gradient
            out = out + there * (by / there.sum((1, 2), keepdim=True))
        return out


def _statistics(a: Tensor, count: int) -> Tensor:
    """The statistics ``(B, count C)`` of ``(B, H, W, C)``."""
    places, channels = a.shape[1] * a.shape[2], a.shape[3]
    if a.stride(3) == 1:
        # Several places side by side, as a CPU is fast on long rows; and an image in parts, each
        # of which fits its cache.
        lanes = _power_of_two(LANES // channels, places)
        parts = _power_of_two(2 * -(-places * channels // PIECE) - 1, places // lanes)
        rows = a.reshape(-1, places // (lanes * parts), lanes * channels)
        found = _moments(rows, 1, count).view(count, -1, parts * lanes, channels)
    else:
        found = _moments(a.permute(0, 3, 1, 2).flatten(2), 2, count)[:, :, None]
    mean, largest = found[0].mean(1), found[1].amax(1)
    if count == STATISTICS:
        return torch.cat([mean, largest], dim=1)
    deviation = (found[2].mean(1) - mean.square()).clamp_min(FLAT**2).sqrt()
    return torch.cat([mean, deviation, largest, found[3].amin(1)], dim=1)


def _power_of_two(limit: int, divides: int) -> int:
    """The largest power of two up to ``limit`` that divides a number; at least 1."""
    of = 1
    while 2 * of <= limit and divides % (2 * of) == 0:
        of *= 2
    return of


def _moments(rows: Tensor, dim: int, count: int) -> Tensor:
    """Mean after a ReLU and largest value; where four are wanted, mean square after a ReLU and
    smallest value too: ``(count, N, .)``, over a dimension of ``(N, ., .)``.
    """

    def of(piece: Tensor) -> Tensor:
        piece = piece.float()
        through = piece.relu()
        found = [through.mean(dim), piece.amax(dim)]
        if count == EVERY:
            found += [through.square_().mean(dim), piece.amin(dim)]
        return torch.stack(found)

    # A CPU is fastest on pieces that fit its cache. A traced graph must not depend on their
    # number.
    if not rows.is_cpu or torch.jit.is_tracing() or is_compiling():
        return of(rows)
    return torch.cat([of(piece) for piece in rows.split(max(1, PIECE // rows[0].numel()))], dim=1)
