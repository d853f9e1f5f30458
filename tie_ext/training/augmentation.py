"""Corruptions that leave an image ID: as another camera or another program would have given it.

A head trained on unmodified images learns the preprocessing pipeline as an ID cue, and then
rejects nearly every MNIST digit resized to 32 pixels and back (docs/research/defaults.md). So it
is trained on both, the images as they are and corrupted.

Symbols: images ``x (B, C, H, W)`` in [0, 1]; each is corrupted by a strength of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.outliers.primitives import Rng
from tie_ext.utils.settings import Settings, setting


@dataclass(frozen=True)
class CorruptionConfig(Settings):
    """How strong each corruption is at most; the names are torchvision's and kornia's."""

    probability: float = setting(
        0.5, "Of each of the six corruptions, for each image.", low=0, high=1
    )
    degrees: float = setting(6.0, "Largest rotation, in degrees.", low=0, high=180)
    translate: float = setting(0.025, "Largest shift, as a share of a side.", low=0, high=1)
    scale: float = setting(0.05, "Largest relative change of size.", low=0, high=0.9)
    sigma: float = setting(
        0.1,
        "Largest standard deviation of the Gaussian blur, in pixels, for each square root of the "
        "shorter side in pixels.",
        low=0,
        high=10,
    )
    contrast: float = setting(
        1.25, "Largest factor of contrast; the smallest is its inverse.", low=1, high=10
    )
    gamma: float = setting(1.25, "Largest exponent; the smallest is its inverse.", low=1, high=10)
    brightness: float = setting(0.075, "Largest change of brightness.", low=0, high=1)
    noise: float = setting(0.02, "Largest standard deviation of the noise.", low=0, high=1)


def corrupt(x: Tensor, rng: Rng, config: CorruptionConfig | None = None) -> Tensor:
    """Corrupt images: an affine warp, blur, contrast, gamma, brightness and noise, each by chance.

    Arguments:
        x: Images ``(B, C, H, W)`` in [0, 1], or beyond it by rounding.
        rng: Source of random numbers, on the device of the images.
        config: Strengths; None for the defaults.

    Returns:
        Images ``(B, C, H, W)`` in [0, 1], float32.
    """
    if not len(x):
        return x.float()
    config = config or CorruptionConfig()
    return torch.cat([_corrupt_piece(piece, rng, config) for piece in rng.split(x, x[0].numel())])


def _corrupt_piece(x: Tensor, rng: Rng, config: CorruptionConfig) -> Tensor:
    def by_chance(change: Callable[[Tensor], Tensor]) -> None:
        rows = (rng.uniform(len(out)) < config.probability).nonzero()[:, 0]
        if len(rows):
            out[rows] = change(out[rows]).clamp(0, 1)

    def column(sample: Callable, *size: float, **bounds: float) -> Callable[[Tensor], Tensor]:
        """A number an image, ``(B, 1, 1, 1)``."""
        return lambda x: sample(*size, len(x), 1, 1, 1, **bounds)

    contrast = column(rng.log_uniform, 1 / config.contrast, config.contrast)
    gamma = column(rng.log_uniform, 1 / config.gamma, config.gamma)
    brightness = column(rng.uniform, low=-config.brightness, high=config.brightness)
    noise = column(rng.uniform, high=config.noise)
    sigma = config.sigma * math.sqrt(min(x.shape[2:]))
    # Rounding can leave a value just outside [0, 1], where a power is not a number.
    out = x.float().clamp(0, 1)
    by_chance(lambda x: warp(x, rng, config))
    by_chance(lambda x: blur(x, rng.uniform(len(x), high=sigma)))
    by_chance(lambda x: x.mean((1, 2, 3), keepdim=True).lerp(x, contrast(x)))
    by_chance(lambda x: x ** gamma(x))
    by_chance(lambda x: x + brightness(x))
    by_chance(lambda x: x + noise(x) * rng.normal(*x.shape))
    return out


def warp(x: Tensor, rng: Rng, config: CorruptionConfig) -> Tensor:
    """Images ``(B, C, H, W)`` rotated, scaled and shifted, which also softens them; their border
    is continued outside.
    """
    B, _, H, W = x.shape
    angle = math.radians(config.degrees) * rng.uniform(B, low=-1)
    size = 1 + config.scale * rng.uniform(B, low=-1)
    cos, sin = size * angle.cos(), size * angle.sin()
    # A side is 2 long in the coordinates of the grid.
    shift = 2 * config.translate * rng.uniform(B, 2, low=-1)
    rows = [[cos, -sin * H / W, shift[:, 0]], [sin * W / H, cos, shift[:, 1]]]
    theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images ``(B, C, H, W)``; standard deviations ``sigma (B,)`` in pixels."""
    radius = max(1, math.ceil(3 * float(sigma.amax())))
    offset = torch.arange(-radius, radius + 1, device=x.device)
    kernels = (-(offset**2) / (2 * sigma.clamp_min(1e-3)[:, None] ** 2)).softmax(1).to(x.dtype)
    for dim, pad in ((3, [radius, radius, 0, 0]), (2, [0, 0, radius, radius])):
        padded, size, x = F.pad(x, pad, mode="replicate"), x.shape[dim], torch.zeros_like(x)
        # Three times as fast on large images as a convolution with a kernel for each image.
        for i, weight in enumerate(kernels.T):
            x.addcmul_(padded.narrow(dim, i, size), weight[:, None, None, None])
    return x
