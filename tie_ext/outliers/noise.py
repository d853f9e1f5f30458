"""Noise: outliers that need neither data nor a classifier, and what the garbage pool begins with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tie_ext.outliers.drawing import Dice, clouds
from tie_ext.support.settings import Settings, setting
from tie_ext.synthesis import Prior


@dataclass(frozen=True)
class NoiseSettings(Settings):
    """Which noise."""

    kind: str = setting("multiscale", "Several spatial scales, or white as in the paper.", choices=("multiscale", "white"))


class Noise(Prior):
    """Gaussian noise, white or of several spatial scales.

    White is the paper's: N(0, I) for data scaled to [-1, 1], clipped to the data's range. Multi-scale noise is a random mixture of standard
    normals drawn at S, S/2, S/4, ... 2 pixels and upsampled, with random contrast, level and brightness per image, clipped: blobs, clouds,
    gradients, flat areas and black and white shapes beside the speckle, as the spectrum of natural images falls with frequency and that of
    white noise does not.

    Arguments:
        domain: The network the noise is for, or the :class:`tie_ext.synthesis.Domain` of the data.
        settings: White, or of several scales (the default).
    """

    settings_class: ClassVar = NoiseSettings

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Noise images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the range."""
        dice, images = Dice(self.low.device), torch.empty(*shape, device=self.low.device)
        for part in dice.split(images, math.prod(shape[1:])):
            part.copy_(self.scaled(clouds(part.shape, dice) if self.settings.kind == "multiscale" else white(part.shape, dice)))
        return images


def white(shape: Sequence[int], dice: Dice) -> Tensor:
    """White noise ``(M, C, H, W)`` in [0, 1], as the paper's N(0, I) looks where images lie in [-1, 1]."""
    return (dice.normal(*shape) / 2 + 0.5).clamp(0, 1)
