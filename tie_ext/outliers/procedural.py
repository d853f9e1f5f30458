"""Procedural images: objects, strokes, waves, flat areas with an edge, and noise, without any
data.

A garbage class covers only what it was trained on. Noise covers textures that fill the image;
these families add the rest. Two more are made of ID images, as an option: shuffled tiles have
their details without their layout, permuted pixels only their colours.

Symbols: images ``(M, C, H, W)``. A procedural family gives values in [0, 1], one made of images
``x`` keeps their range.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Candidates, Prior
from tie_ext.outliers.primitives import Rng, antialiased, clouds, coverage, fills, grid, multiscale
from tie_ext.utils.settings import Settings, setting

TILES = 4
"""Tiles along each side of a shuffled image."""
LARGE = 96
"""Shorter side in pixels from which images other than noise are rendered at half size, a quarter
of the time; their edges are then as soft as those of photographs."""


def shapes(shape: Sequence[int], rng: Rng) -> Tensor:
    """A background with 1 to 24 shapes over one another: one is an object, many are dead
    leaves.
    """
    M, C, H, W = shape
    count = rng.log_uniform(1, 25, M).long().sort(descending=True).values
    canvas = fills(shape, rng)
    # Images with the most shapes come first, so that those with a k-th shape are a slice.
    for n in (count > torch.arange(24, device=count.device)[:, None]).sum(1).tolist():
        if n:
            canvas[:n].lerp_(fills((n, C, H, W), rng), coverage((n, H, W), rng))
    return canvas[torch.randperm(M, device=rng.device, generator=rng.generator)]


def waves(shape: Sequence[int], rng: Rng) -> Tensor:
    """Two fills blended by 1 to 4 sinusoids of contrast 0.1 to 10, whose periods are from twice
    the image to 2.5 pixels.
    """
    M, _, H, W = shape
    x, y = grid((M, H, W), rng)
    sinusoids, total = 1 + rng.integers(4, M, 1, 1), torch.zeros(M, H, W, device=rng.device)
    for k in range(4):
        angle, phase = rng.uniform(2, M, 1, 1, high=2 * math.pi)
        turns = math.pi * rng.log_uniform(0.5, max(0.4 * min(H, W), 0.6), M, 1, 1)
        total += (k < sinusoids) * (turns * (angle.cos() * x + angle.sin() * y) + phase).sin()
    blend = (0.5 + rng.log_uniform(0.1, 10, M, 1, 1) * total / 2).clamp(0, 1)
    return fills(shape, rng).lerp(fills(shape, rng), blend[:, None])


def masks(shape: Sequence[int], rng: Rng) -> Tensor:
    """Smooth noise with a threshold: one fill above it, one below."""
    M, _, H, W = shape
    coarse = multiscale((M, 1, math.ceil(H / 4), math.ceil(W / 4)), rng)
    field = F.interpolate(coarse, (H, W), mode="bicubic") - 0.5 * rng.normal(M, 1, 1, 1)
    down, right = (
        F.pad(field.diff(dim=dim), pad) for dim, pad in ((2, (0, 0, 0, 1)), (3, (0, 1, 0, 0)))
    )
    # In pixels, so that the edge is sharp at any scale of the noise.
    distance = field / torch.hypot(down, right).clamp(min=1e-6)
    return fills(shape, rng).lerp(fills(shape, rng), antialiased(distance))


def greyed(images: Tensor, rng: Rng) -> Tensor:
    """Images of which half have lost nearly all colour; grey ones ``(M, 1, H, W)`` are returned as
    they are.
    """
    if images.shape[1] == 1:
        return images
    saturation = rng.uniform(len(images), 1, 1, 1, high=0.1)
    saturation = saturation.masked_fill(rng.uniform(len(images), 1, 1, 1) < 0.5, 1.0)
    # One channel is the grey, since the mean of all would have less contrast.
    return images[:, :1].lerp(images, saturation)


def shuffled_tiles(x: Tensor, rng: Rng) -> Tensor:
    """Images whose 4 x 4 tiles are permuted; remaining rows and columns stay."""
    M, C, H, W = x.shape
    rows, columns = min(TILES, H), min(TILES, W)
    h, w = H // rows, W // columns
    inner = (..., slice(rows * h), slice(columns * w))
    tiles = x[inner].reshape(M, C, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(M, rows * columns, C * h * w)
    order = rng.uniform(M, rows * columns).argsort(1)
    tiles = tiles.gather(1, order[..., None].expand_as(tiles)).view(M, rows, columns, C, h, w)
    out = x.clone()
    out[inner] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(M, C, rows * h, columns * w)
    return out


def permuted_pixels(x: Tensor, rng: Rng) -> Tensor:
    """Multi-scale noise made of the pixels of each image, slightly blurred: it keeps the colours
    alone.

    The pixels, in the order of a random mix of their channels, are placed in the order of the
    noise. So the result is as smooth as the noise and has the histogram of the image. Pixels in
    random order would have to be blurred so much that only the mean colour would be left.
    """
    M, C, H, W = x.shape
    colour = (x * rng.normal(M, C, 1, 1)).sum(1).flatten(1)
    place = multiscale((M, 1, H, W), rng)[:, 0].flatten(1)
    order, goal = (key.argsort(1)[:, None].expand(-1, C, -1) for key in (colour, place))
    pixels = x.flatten(2).gather(2, order)
    laid = torch.empty_like(pixels).scatter_(2, goal, pixels).view(M, C, H, W)
    blurred = F.avg_pool2d(F.pad(laid, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    low, high = pixels.amin(2)[..., None, None], pixels.amax(2)[..., None, None]
    mixed = laid.lerp(blurred, rng.uniform(M, 1, 1, 1))
    # A mean may be outside the range by rounding.
    return torch.minimum(torch.maximum(mixed, low), high)


def enlarged(
    render: Callable[[Sequence[int], Rng], Tensor], shape: Sequence[int], rng: Rng
) -> Tensor:
    """Images of a family ``(M, C, H, W)``, rendered at half size where they are large."""
    M, C, H, W = shape
    if min(H, W) < LARGE or render is clouds:
        return render(shape, rng)
    half = render((M, C, -(-H // 2), -(-W // 2)), rng)
    return F.interpolate(half, (H, W), mode="bilinear")


FAMILIES: dict[str, tuple[float, Callable[[Sequence[int], Rng], Tensor]]] = {
    "noise": (0.1, clouds),
    "shapes": (0.7, shapes),
    "waves": (0.05, waves),
    "masks": (0.15, masks),
}
"""Procedural families: share of the mixture, and function that renders ``(M, C, H, W)``. Dead
leaves and fractals, tried beside these, lowered the worst set (docs/research/tried.md)."""


@dataclass(frozen=True)
class ProceduralSettings(Settings):
    """Share of candidates that are made of ID images."""

    from_images: float = setting(
        0.0,
        "Share of candidates made of ID images, half as shuffled tiles and half as permuted "
        "pixels; a pool begins without them.",
        low=0,
        high=1,
    )


class Procedural(Prior):
    """Procedural images: 70 % shapes, 15 % masks, 10 % multi-scale noise, 5 % waves; half of
    colour images are nearly grey.

    Arguments:
        domain: The network that the images are for, or the
            :class:`~tie_ext.outliers.base.Domain` of its data.
        settings: Share of a batch of candidates that is made of ID images.
    """

    settings_class: ClassVar = ProceduralSettings

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the range.

        Half are rendered; the others are their mirrored negatives, which are as likely, as new to
        a network, and free.
        """
        rng = Rng(self.low.device)
        mixture = list(FAMILIES.values())
        images, twins = torch.empty(*shape, device=rng.device), shape[0] // 2
        family = rng.stratified(len(images) - twins, [share for share, _ in mixture])
        for i, (_, render) in enumerate(mixture):
            for chosen in rng.split((family == i).nonzero()[:, 0], math.prod(shape[1:])):
                if len(chosen):
                    rendered = greyed(enlarged(render, (len(chosen), *shape[1:]), rng), rng)
                    images[chosen] = self.from_unit(rendered)
                    paired = chosen < twins
                    negatives = self.from_unit(1 - rendered[paired].flip(3))
                    images[len(family) + chosen[paired]] = negatives
        return images

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """As many images as ``x``, some of them made of it, all for the garbage class."""
        rng, share = Rng(x.device), self.settings.from_images
        images = x.detach().float().clone()
        kind = rng.stratified(len(x), (1 - share, share / 2, share / 2))
        rendered, tiled, permuted = ((kind == i).nonzero()[:, 0] for i in range(3))
        images[rendered] = self.draw((len(rendered), *x.shape[1:])).to(images)
        images[tiled] = shuffled_tiles(images[tiled], rng)
        images[permuted] = permuted_pixels(images[permuted], rng)
        return self._garbage(images)
