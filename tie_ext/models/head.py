"""The garbage head: from statistics of every layer of a classifier to the log-odds of garbage.

Deep layers discard low-level appearance, so that unfamiliar images are often detectable only in
the statistics of early layers.

Symbols: ``h (B, F)`` penultimate features; ``s (B, S)`` the statistics of an image: ``h`` beside
two numbers of each chosen channel of each chosen layer (:mod:`tie_ext.models.statistics`).
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tie_ext.models.statistics import (
    MAX_CHANNELS,
    NORMS,
    STATISTICS,
    first_tensor,
    pool_statistics,
)
from tie_ext.utils.views import add_hook, hook_view


class GarbageHead(nn.Module):
    """One hidden layer on the standardised statistics of an image.

    Arguments:
        layers: Channels of each layer that is read, by the layer's name in the backbone.
        feature_size: F.
        hidden: Width of the hidden layer.
        per_channel: Statistics of a channel, 2 or 4.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        layers: Mapping[str, int],
        feature_size: int,
        hidden: int = 128,
        per_channel: int = STATISTICS,
    ):
        super().__init__()
        self.layers, self.feature_size, self.hidden = dict(layers), feature_size, hidden
        self.per_channel = per_channel
        size = feature_size + sum(self.sizes)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("deviation", torch.ones(size))
        self.network = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    @property
    def sizes(self) -> list[int]:
        """Statistics of each layer that is read."""
        return [self.per_channel * min(count, MAX_CHANNELS) for count in self.layers.values()]

    def forward(self, statistics: Tensor) -> Tensor:
        """Log-odds of garbage ``(B, 1)`` of statistics ``(B, S)``; larger = more OOD."""
        return self.network((statistics.to(self.mean.dtype) - self.mean) / self.deviation)

    def _apply(self, fn, recurse=True):
        """In half precision it stays in float32, which the extremes of a layer can need."""

        def wide(t: Tensor) -> Tensor:
            after = fn(t)
            return t.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after

        return super()._apply(wide, recurse)

    @torch.no_grad()
    def standardise(self, statistics: Tensor) -> None:
        """Take mean and deviation of ID images ``(N, S)``, N >= 2, as 0 and 1 from now on.

        Raises:
            ValueError: If a statistic is not finite, with the layer that it is of.
        """
        self.mean.copy_(statistics.mean(0))
        deviation = statistics.std(0)
        names = "features", *self.layers
        parts = (both.split([self.feature_size, *self.sizes]) for both in (self.mean, deviation))
        features, *layers = zip(names, *parts, strict=True)
        for name, mean, spread in (*layers, features):
            if not (mean.isfinite() & spread.isfinite()).all():
                raise ValueError(
                    f"Expected finite statistics of ID images, but got NaN or infinite ones of "
                    f"{name}; give a float16 network in float32 or bfloat16"
                )
            # A statistic that is the same for all ID images would make noise of its last bits; it
            # counts in units of its own size, and of its layer's where that is small.
            unit = mean.abs() + (mean.abs().amax().clamp_max(1) if mean.any() else 1)
            spread.copy_(torch.where(spread > 1e-4 * unit, spread, unit))
        self.deviation.copy_(deviation)

    def watch(self, backbone: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        """A view of the backbone, and the dict that its forward pass fills with the statistics of
        each layer that is read, by name.
        """
        found: dict[str, Tensor] = {}
        view = hook_view(backbone)
        for name in self.layers:
            # Pooled at once: a ReLU that works in place comes next, and maps need not be kept.
            add_hook(view, name, partial(_pool_into, found, name, self.per_channel))
        return view, found

    def statistics(self, found: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """The statistics ``(B, S)`` of features ``h (B, F)`` and of what :meth:`watch` found."""
        parts = (h, *(found[name] for name in self.layers))
        return torch.cat([part.to(self.mean.dtype) for part in parts], dim=1)


def _pool_into(
    found: dict[str, Tensor],
    name: str,
    count: int,
    module: nn.Module,
    args: tuple,
    output: object,
) -> None:
    """The hook of a layer that is read. Maps of convolutions and their normalisations have
    channels first, those of blocks have them last.
    """
    maps = first_tensor(output)
    if maps is not None:
        found[name] = pool_statistics(maps, not isinstance(module, (nn.Conv2d, *NORMS)), count)
