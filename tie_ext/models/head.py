"""The garbage head: what every layer of a classifier says of an image, made into the log-odds of garbage.

Symbols: ``a (B, C, H, W)`` or ``(B, T, C)`` a layer's output before its ReLU; ``h (B, F)`` penultimate features; ``s (B, S)`` the statistics of an
image: ``h`` beside four numbers of each chosen channel of each chosen layer, over space or tokens: mean and deviation of what a ReLU lets
through, the largest and the smallest value.

The layers of a network leave what an image looks like behind as they find out what it is; an image that is nothing of what they have learned
is seen to be so early, and often only there. Mean and deviation tell textures; a thin stroke is told by the place where a filter answers most.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tie_ext.utils.modules import evaluating

MOST_LAYERS = 16
"""Layers read at most, evenly spaced from the first to the last."""
MOST_CHANNELS = 128
"""Channels read of each at most, evenly spaced."""
STATISTICS = 4
"""Numbers of a channel: with 16 layers of 128 channels no more than 8192 beside the penultimate features."""
PIECE = 2**17
"""Numbers of a layer's output that a CPU pools at once."""
LANES = 128
"""Numbers that lie side by side in what it pools, at most."""
FLAT = 1e-6
"""Deviations are no smaller."""
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
"""What may stand between a convolution and its ReLU."""


class GarbageHead(nn.Module):
    """One hidden layer on the standardised statistics of an image.

    Arguments:
        layers: Channels of each layer that is read, by the layer's name in the backbone.
        feature_size: F.
        hidden: Width of the hidden layer.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, layers: Mapping[str, int], feature_size: int, hidden: int = 128):
        super().__init__()
        self.layers, self.feature_size, self.hidden = dict(layers), feature_size, hidden
        size = feature_size + STATISTICS * sum(
            min(channels, MOST_CHANNELS) for channels in self.layers.values()
        )
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.network = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, statistics: Tensor) -> Tensor:
        """Log-odds of garbage ``(B, 1)`` of statistics ``(B, S)``; larger = more OOD."""
        return self.network((statistics.to(self.mean.dtype) - self.mean) / self.deviation)

    @torch.no_grad()
    def standardise(self, statistics: Tensor) -> None:
        """Take the mean and the deviation of ID images ``(N, S)``, N >= 2, as 0 and 1 from now on."""
        self.mean.copy_(statistics.mean(0))
        deviation = statistics.std(0)
        # A statistic that is the same for all ID images would make noise of its last bits; it counts in units of its own size.
        self.deviation.copy_(
            torch.where(deviation > 1e-4 * (1 + self.mean.abs()), deviation, 1 + self.mean.abs())
        )

    @contextmanager
    def reading(self, backbone: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Inside, a forward pass of the backbone leaves the statistics of each layer that is read, :func:`pooled`, in the dict that is given."""
        found: dict[str, Tensor] = {}
        # Pooled at once: a ReLU that works in place comes next, and the maps themselves need not be kept.
        hooks = [
            backbone.get_submodule(name).register_forward_hook(
                lambda module, args, output, name=name: found.__setitem__(name, pooled(output))
            )
            for name in self.layers
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def statistics(self, found: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """The statistics ``(B, S)`` of features ``h (B, F)`` and of what :meth:`reading` found."""
        return torch.cat(
            [h.to(self.mean.dtype), *(found[name].to(self.mean.dtype) for name in self.layers)],
            dim=1,
        )


def pooled(a: Tensor) -> Tensor:
    """Four statistics ``(B, 4c)`` over space or tokens of a layer's output ``(B, C, H, W)`` or ``(B, T, C)``, of c <= 128 channels."""
    a = a.permute(0, 2, 3, 1) if a.ndim == 4 else a[:, :, None]  # (B, H, W, C), or (B, T, 1, C)
    if a.shape[3] > MOST_CHANNELS:
        a = a[..., torch.linspace(0, a.shape[3] - 1, MOST_CHANNELS).round().long().to(a.device)]
    if a.requires_grad:
        a = (
            a.float().clone()
        )  # a ReLU that works in place comes next, and the gradient wants what was there before
    return _Statistics.apply(a) if a.requires_grad else _statistics(a)


class _Statistics(torch.autograd.Function):
    """:func:`_statistics` with its gradient in one expression: what autograd makes of it takes a CPU three times as long."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return _statistics(a)

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
            there = a == value
            out = out + there * (
                by / there.sum((1, 2), keepdim=True)
            )  # shared by all places that have it
        return out


def _statistics(a: Tensor) -> Tensor:
    """The four statistics ``(B, 4C)`` of ``(B, H, W, C)``."""
    places, channels = a.shape[1] * a.shape[2], a.shape[3]
    if a.stride(3) == 1:
        # Some places side by side, as a CPU does best with long rows; and an image in parts, each of which fits its cache.
        lanes = _power_of_two(LANES // channels, places)
        parts = _power_of_two(2 * -(-places * channels // PIECE) - 1, places // lanes)
        found = _moments(a.reshape(-1, places // (lanes * parts), lanes * channels), 1).view(
            4, -1, parts * lanes, channels
        )
    else:
        found = _moments(a.permute(0, 3, 1, 2).flatten(2), 2)[:, :, None]
    mean, square = found[:2].mean(2)
    return torch.cat(
        [
            mean,
            (square - mean.square()).clamp_min(FLAT**2).sqrt(),
            found[2].amax(1),
            found[3].amin(1),
        ],
        dim=1,
    )


def _power_of_two(most: int, divides: int) -> int:
    """The largest power of two up to ``most`` that divides a number; at least 1."""
    of = 1
    while 2 * of <= most and divides % (2 * of) == 0:
        of *= 2
    return of


def _moments(rows: Tensor, dim: int) -> Tensor:
    """Over a dimension of ``(N, ., .)``: mean and mean square of what a ReLU lets through, largest and smallest value; ``(4, N, .)``."""

    def of(piece: Tensor) -> Tensor:
        piece = piece.float()
        through = piece.relu()
        mean = through.mean(dim)
        return torch.stack([mean, through.square_().mean(dim), piece.amax(dim), piece.amin(dim)])

    # A CPU does best with pieces that fit its cache; a graph that is recorded for other batch sizes takes them whole.
    if not rows.is_cpu or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return of(rows)
    return torch.cat([of(piece) for piece in rows.split(max(1, PIECE // rows[0].numel()))], dim=1)


def find_layers(backbone: nn.Module, x: Tensor) -> dict[str, int]:
    """The layers whose statistics tell most, of any backbone: its convolutions, each with the normalisation that comes next, or where it has none
    on a map, the blocks of a transformer.

    Arguments:
        backbone: The network; left as it was.
        x: An image ``(1, C, H, W)`` to try it on.

    Returns:
        The channels of at most :data:`MOST_LAYERS` of them by name, in the order in which they are called.

    Raises:
        ValueError: If there is neither.
    """
    convolutions: dict[str, Tensor] = {}  # their maps, by the name of what gave them last
    blocks: dict[str, int] = {}

    def look(name: str, module: nn.Module, args: tuple, output: object) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if (
            output.ndim == 4
            and isinstance(module, nn.Conv2d)
            and output.shape[2] * output.shape[3] > 1
        ):
            convolutions[name] = output
        if (
            output.ndim == 4
            and isinstance(module, NORMS)
            and convolutions
            and args
            and args[0] is list(convolutions.values())[-1]
        ):
            convolutions.popitem()
            convolutions[name] = output
        if output.ndim == 3 and isinstance(
            backbone.get_submodule(name.rpartition(".")[0]), nn.Sequential | nn.ModuleList
        ):
            blocks[name] = output.shape[2]

    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: look(name, module, args, output)
        )
        for name, module in backbone.named_modules()
        if name
    ]
    try:
        with evaluating(backbone), torch.no_grad():
            backbone(x)
    finally:
        for hook in hooks:
            hook.remove()
    outer = {
        name: channels
        for name, channels in blocks.items()
        if not any(name.startswith(f"{other}.") for other in blocks)
    }
    # A transformer has one convolution, which cuts the image into patches.
    found = (
        outer
        if len(outer) >= len(convolutions)
        else {name: maps.shape[1] for name, maps in convolutions.items()}
    )
    if not found:
        raise ValueError(
            f"Expected a backbone with convolutions or transformer blocks, whose maps tell OOD images, but got {type(backbone).__name__}"
        )
    names = list(found)
    chosen = dict.fromkeys(
        names[round(i)]
        for i in torch.linspace(0, len(names) - 1, min(MOST_LAYERS, len(names))).tolist()
    )
    return {name: found[name] for name in chosen}
