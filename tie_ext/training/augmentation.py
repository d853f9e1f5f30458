"""ID images as another camera or program would have given them: turned, moved, blurred, darker or noisier by a little, the same to a person.

A head that has seen ID images as one program makes them takes that program for what makes an image ID, and rejects nearly all digits of MNIST
that were brought to 32 pixels and back (docs/research/attached.md). So it is taught both, the images and these.

Symbols: images ``x (B, C, H, W)`` in [0, 1]; each is changed by a strength of its own.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.outliers.primitives import Rng

SHARE = 0.5
"""How often each of the six changes is made to an image."""
TURN = 6.0
"""Largest rotation, in degrees."""
WARP = 0.05
"""Largest change of size, and move as a part of half the image."""
TONE = 1.25
"""Largest factor of contrast, and exponent of brightness; the smallest is its inverse."""
SHIFT = 0.075
"""Largest change of brightness."""
NOISE = 0.02
"""Largest standard deviation of noise."""


def corrupt(x: Tensor, rng: Rng) -> Tensor:
    """The same images ``(B, C, H, W)``, each with half of: a rotation with a change of size and a move, blur, contrast, gamma, brightness, noise.

    Arguments:
        x: Images in [0, 1], or beyond it by rounding.
        rng: Where random numbers come from, on the device of the images.

    Returns:
        Images in [0, 1], float32.
    """
    if not len(x):
        return x.float()
    return torch.cat([_processed(piece, rng) for piece in rng.split(x, x[0].numel())])


def _processed(x: Tensor, rng: Rng) -> Tensor:
    def some(change: Callable[[Tensor], Tensor]) -> None:
        rows = (rng.uniform(len(out)) < SHARE).nonzero()[:, 0]
        if len(rows):
            out[rows] = change(out[rows]).clamp(0, 1)

    def factor(x: Tensor) -> Tensor:
        return rng.log_uniform(1 / TONE, TONE, len(x), 1, 1, 1)

    out = x.float().clamp(
        0, 1
    )  # what was scaled back from another range may miss it by a last bit, and has no power
    some(lambda x: warped(x, rng))
    some(lambda x: blurred(x, rng.uniform(len(x), high=math.sqrt(min(x.shape[2:])) / 10)))
    some(lambda x: x.mean((1, 2, 3), keepdim=True).lerp(x, factor(x)))
    some(lambda x: x ** factor(x))
    some(lambda x: x + rng.uniform(len(x), 1, 1, 1, low=-SHIFT, high=SHIFT))
    some(lambda x: x + rng.uniform(len(x), 1, 1, 1, high=NOISE) * rng.normal(*x.shape))
    return out


def warped(x: Tensor, rng: Rng) -> Tensor:
    """Images ``(B, C, H, W)`` turned, of another size and moved, which also softens them; their border goes on outside."""
    B, _, H, W = x.shape
    angle, size = math.radians(TURN) * rng.uniform(B, low=-1), 1 + WARP * rng.uniform(B, low=-1)
    across, along = size * angle.cos(), size * angle.sin()
    move = WARP * rng.uniform(B, 2, low=-1)
    # Both sides are 2 long where the grid is concerned, whatever they are in pixels.
    rows = torch.stack(
        [
            torch.stack([across, -along * H / W, move[:, 0]], 1),
            torch.stack([along * W / H, across, move[:, 1]], 1),
        ],
        1,
    )
    return F.grid_sample(
        x,
        F.affine_grid(rows.to(x), list(x.shape), align_corners=False),
        padding_mode="border",
        align_corners=False,
    )


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Images ``(B, C, H, W)`` under Gaussian blur of standard deviations ``sigma (B,)``, in pixels."""
    radius = max(1, math.ceil(3 * float(sigma.amax())))
    at = torch.arange(-radius, radius + 1, device=x.device)
    weights = (-(at**2) / (2 * sigma.clamp_min(1e-3)[:, None] ** 2)).softmax(1).to(x.dtype)
    for dim, pad in ((3, [radius, radius, 0, 0]), (2, [0, 0, radius, radius])):
        padded, size, x = F.pad(x, pad, mode="replicate"), x.shape[dim], torch.zeros_like(x)
        for i, weight in enumerate(
            weights.T
        ):  # of large images three times as fast as a convolution with a kernel an image
            x.addcmul_(padded.narrow(dim, i, size), weight[:, None, None, None])
    return x
