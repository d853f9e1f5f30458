"""Noise: outliers that need neither data nor a classifier; the garbage pool can begin with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tie_ext.outliers.base import Prior
from tie_ext.outliers.primitives import Rng, clouds
from tie_ext.utils.settings import Settings, setting


@dataclass(frozen=True)
class NoiseSettings(Settings):
    """Which noise."""

    kind: str = setting(
        "multiscale",
        "Several spatial scales, or white as in the paper.",
        choices=("multiscale", "white"),
    )


class Noise(Prior):
    """Gaussian noise, white or of several spatial scales.

    White noise is the paper's: N(0, I) for data scaled to [-1, 1], clipped to the data's range.
    Multi-scale noise is a random mixture of standard normals at S, S/2, S/4, ... 2 pixels,
    upsampled, with random contrast, level and brightness per image, clipped: blobs, clouds,
    gradients, flat areas and black and white shapes, since the spectrum of natural images falls
    with frequency and that of white noise does not.

    Arguments:
        domain: The network that the noise is for, or the :class:`~tie_ext.outliers.base.Domain` of
            the data.
        settings: White, or of several scales (the default).
    """

    settings_class: ClassVar = NoiseSettings

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Noise images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the
        range.
        """
        rng, images = Rng(self.low.device), torch.empty(*shape, device=self.low.device)
        noise = clouds if self.settings.kind == "multiscale" else white
        for part in rng.split(images, math.prod(shape[1:])):
            part.copy_(self.from_unit(noise(part.shape, rng)))
        return images


def white(shape: Sequence[int], rng: Rng) -> Tensor:
    """White noise ``(M, C, H, W)`` in [0, 1]: the paper's N(0, I) for images in [-1, 1]."""
    return (rng.normal(*shape) / 2 + 0.5).clamp(0, 1)
