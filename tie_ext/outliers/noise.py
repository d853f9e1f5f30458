"""Noise: outliers that need neither data nor a classifier, and what the garbage pool begins with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

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
        domain: The network the noise is for, or the :class:`~tie_ext.synthesis.Domain` of the data.
        settings: White, or of several scales (the default).
    """

    settings_class: ClassVar = NoiseSettings

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Noise images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the range."""
        noise = self._toned(self._mixture(shape)) if self.settings.kind == "multiscale" else torch.randn(*shape, device=self.low.device)
        return self.scaled((noise / 2 + 0.5).clamp(0, 1))

    def _mixture(self, shape: Sequence[int]) -> Tensor:
        M, C, H, W = shape
        device = self.low.device
        sizes = [(H, W)]
        while max(sizes[-1]) > 2:
            sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
        # Squared uniforms make weights uneven, so that most images are dominated by a scale or two.
        weights = F.normalize(torch.rand(M, len(sizes), device=device).square(), dim=1)
        noise = torch.zeros(M, C, H, W, device=device)
        for weight, size in zip(weights.T, sizes, strict=True):
            layer = torch.randn(M, C, *size, device=device)
            noise += weight.view(-1, 1, 1, 1) * (layer if size == (H, W) else F.interpolate(layer, (H, W), mode="bilinear"))
        return noise

    def _toned(self, noise: Tensor) -> Tensor:
        uniform, level, brightness = (f(len(noise), 1, 1, 1, device=noise.device) for f in (torch.rand, torch.randn, torch.randn))
        # Contrast from 0.1, nearly flat, to 10, black and white: where it ends at 2, a tenth of black and white noise passes for ID images.
        return 10 ** (2 * uniform - 1) * (noise + level) + brightness
