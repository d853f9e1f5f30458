"""Procedural images: objects, strokes, waves, flat areas with an edge, and noise, drawn from nothing.

A garbage class is only as wide as what it has seen. Noise covers textures that fill the frame; these families add what it lacks. Two more are
made of ID images, for those who ask: shuffled tiles have their details without their layout, permuted pixels their colours alone.

Symbols: images ``(M, C, H, W)``; a family from nothing gives values in [0, 1], one made of images ``x`` keeps their range.
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
from tie_ext.outliers.primitives import Rng, clouds, covered, fills, grid, multiscale, silhouettes
from tie_ext.utils.settings import Settings, setting

TILES = 4
"""Tiles along each side of a shuffled image."""


def shapes(shape: Sequence[int], rng: Rng) -> Tensor:
    """A background with 1 to 24 shapes painted over each other: one is an object, many are dead leaves."""
    M, C, H, W = shape
    count = rng.log_uniform(1, 25, M).long().sort(descending=True).values
    canvas = fills(shape, rng)
    # Images with the most shapes stand first, so that those which get a k-th shape are a slice.
    for n in (count > torch.arange(24, device=count.device)[:, None]).sum(1).tolist():
        if n:
            canvas[:n].lerp_(fills((n, C, H, W), rng), silhouettes((n, H, W), rng))
    return canvas[torch.randperm(M, device=rng.device, generator=rng.generator)]


def waves(shape: Sequence[int], rng: Rng) -> Tensor:
    """Two fills blended by 1 to 4 sinusoids, from half a period in an image to one in 2.5 pixels, of contrast 0.1 to 10."""
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
    """Smooth noise cut at a level: one fill inside, one outside."""
    M, _, H, W = shape
    coarse = multiscale((M, 1, math.ceil(H / 4), math.ceil(W / 4)), rng)
    field = F.interpolate(coarse, (H, W), mode="bicubic") - 0.5 * rng.normal(M, 1, 1, 1)
    down, right = (
        F.pad(field.diff(dim=dim), pad) for dim, pad in ((2, (0, 0, 0, 1)), (3, (0, 1, 0, 0)))
    )
    distance = field / torch.hypot(down, right).clamp(
        min=1e-6
    )  # in pixels, so that the edge is sharp at any scale of the noise
    return fills(shape, rng).lerp(fills(shape, rng), covered(distance))


def leaves(shape: Sequence[int], rng: Rng) -> Tensor:
    """Dead leaves: 48 discs over each other whose radii follow the power law of natural images, density proportional to r^-3.

    References:
        A. Lee, D. Mumford, J. Huang. *Occlusion models for natural images*. IJCV 2001.
    """
    M, _, H, W = shape
    canvas, smallest, largest = fills(shape, rng), 0.08, 1.0
    for _ in range(48):
        x, y = grid((M, H, W), rng, spread=1.0)
        uniform = rng.uniform(M, 1, 1)
        radius = (
            smallest**-2 + uniform * (largest**-2 - smallest**-2)
        ) ** -0.5  # the inverse of the law's distribution function
        canvas.lerp_(
            fills(shape, rng), covered((torch.hypot(x, y) - radius) * (min(H, W) / 2))[:, None]
        )
    return canvas


def fractals(shape: Sequence[int], rng: Rng) -> Tensor:
    """The density of the attractors of 2 to 4 random affine maps, as a blend of two fills.

    References:
        M. Barnsley. *Fractals Everywhere*, 1988: the chaos game.
    """
    M, _, H, W = shape
    points = chaos_game(M, max(64, H * W // 8), rng)
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    zoom, size = rng.log_uniform(0.7, 2, M, 1, 1), torch.tensor([H, W], device=rng.device)
    at = (((points - low) / (high - low).clamp(min=1e-6) - 0.5) * zoom + 0.5) * size
    inside = ((at >= 0) & (at < size)).all(2)
    row, column = at.long().unbind(2)
    bins = torch.where(inside, row * W + column, H * W)  # a bin more for those that miss the image
    density = torch.zeros(M, H * W + 1, device=rng.device).scatter_add_(
        1, bins, torch.ones_like(at[..., 0])
    )[:, :-1]
    blend = 1 - (-density * rng.log_uniform(0.3, 3, M, 1)).exp()
    return fills(shape, rng).lerp(fills(shape, rng), blend.view(M, 1, H, W))


def chaos_game(count: int, walkers: int, rng: Rng) -> Tensor:
    """Points ``(count, 16 * walkers, 2)`` of the attractors of ``count`` random systems of affine maps."""
    turn, back = (rotation(rng.uniform(count, 4, high=2 * math.pi)) for _ in range(2))
    A = (
        turn @ torch.diag_embed(rng.uniform(count, 4, 2, low=0.2, high=0.85)) @ back
    )  # each map shrinks, so that there is an attractor
    b, maps = rng.uniform(count, 4, 2, low=-1, high=1), 2 + rng.integers(3, count, 1)
    p, visited = rng.uniform(count, walkers, 2, low=-1, high=1), []
    for step in range(24):
        which = (rng.uniform(count, walkers) * maps).long()
        rows = A.flatten(2).gather(1, which[..., None].expand(-1, -1, 4)).unflatten(2, (2, 2))
        p = (rows * p[:, :, None]).sum(3) + b.gather(1, which[..., None].expand(-1, -1, 2))
        if step >= 8:  # by then a walker has come within a hundredth or so of the attractor
            visited.append(p)
    return torch.cat(visited, 1)


def rotation(angle: Tensor) -> Tensor:
    """Rotations ``(..., 2, 2)`` by angles ``(...)``."""
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(
        -1, (2, 2)
    )


def greyed(images: Tensor, rng: Rng) -> Tensor:
    """Images of which half have lost nearly all their colour; grey ones ``(M, 1, H, W)`` come back as they are."""
    if images.shape[1] == 1:
        return images
    # One channel is the grey: the mean of all would have less contrast.
    saturation = rng.uniform(len(images), 1, 1, 1, high=0.1).masked_fill(
        rng.uniform(len(images), 1, 1, 1) < 0.5, 1.0
    )
    return images[:, :1].lerp(images, saturation)


def shuffled_tiles(x: Tensor, rng: Rng) -> Tensor:
    """Images whose 4 x 4 tiles have changed places; rows and columns that are left over stay."""
    M, C, H, W = x.shape
    rows, columns = min(TILES, H), min(TILES, W)
    h, w = H // rows, W // columns
    inner = (..., slice(rows * h), slice(columns * w))
    tiles = (
        x[inner]
        .reshape(M, C, rows, h, columns, w)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(M, rows * columns, C * h * w)
    )
    order = rng.uniform(M, rows * columns).argsort(1)
    tiles = tiles.gather(1, order[..., None].expand_as(tiles)).view(M, rows, columns, C, h, w)
    out = x.clone()
    out[inner] = tiles.permute(0, 3, 1, 4, 2, 5).reshape(M, C, rows * h, columns * w)
    return out


def permuted_pixels(x: Tensor, rng: Rng) -> Tensor:
    """Noise of several scales made of the pixels of each image, slightly blurred: its colours without anything that they were.

    The pixels, ordered by a random mix of their channels, are laid out in the order of the noise. So the noise is as smooth as it likes, and the
    histogram is the image's; a blur of pixels in random order, smooth enough to show, would leave the mean colour alone.
    """
    M, C, H, W = x.shape
    colour, place = (
        (x * rng.normal(M, C, 1, 1)).sum(1).flatten(1),
        multiscale((M, 1, H, W), rng)[:, 0].flatten(1),
    )
    order, goal = (key.argsort(1)[:, None].expand(-1, C, -1) for key in (colour, place))
    pixels = x.flatten(2).gather(2, order)
    laid = torch.empty_like(pixels).scatter_(2, goal, pixels).view(M, C, H, W)
    blurred = F.avg_pool2d(F.pad(laid, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    low, high = pixels.amin(2)[..., None, None], pixels.amax(2)[..., None, None]
    return torch.minimum(
        torch.maximum(laid.lerp(blurred, rng.uniform(M, 1, 1, 1)), low), high
    )  # a mean may miss the range by rounding


FAMILIES: dict[str, tuple[float, Callable[[Sequence[int], Rng], Tensor]]] = {
    "noise": (0.1, clouds),
    "shapes": (0.7, shapes),
    "waves": (0.05, waves),
    "masks": (0.15, masks),
    "leaves": (0.0, leaves),
    "fractals": (0.0, fractals),
}
"""Families from nothing: share of the mixture, and the function that draws ``(M, C, H, W)``. Those of share 0 wait for a measurement."""


@dataclass(frozen=True)
class ProceduralSettings(Settings):
    """How much is made of ID images."""

    from_images: float = setting(
        0.0,
        "Share of candidates made of ID images, half as shuffled tiles and half as permuted pixels; a pool begins without them.",
        low=0,
        high=1,
    )


class Procedural(Prior):
    """Procedural images: 70 % shapes, 15 % masks, 10 % multi-scale noise, 5 % waves; half of colour images nearly grey.

    Arguments:
        domain: The network the images are for, or the :class:`tie_ext.outliers.base.Domain` of the data.
        settings: How much of a batch of candidates is made of ID images.
    """

    settings_class: ClassVar = ProceduralSettings

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Images of shape ``(M, C, H, W)`` from nothing, in ``[low, high]``, on the device of the range.

        Half are drawn, the others are their mirrored negatives: as likely, and to a network as new, for nothing.
        """
        rng, mixture = (
            Rng(self.low.device),
            [(share, draw) for share, draw in FAMILIES.values() if share],
        )
        images, twins = torch.empty(*shape, device=rng.device), shape[0] // 2
        family = rng.deal(len(images) - twins, [share for share, _ in mixture])
        for i, (_, draw) in enumerate(mixture):
            for chosen in rng.split((family == i).nonzero()[:, 0], math.prod(shape[1:])):
                if len(chosen):
                    drawn = greyed(draw((len(chosen), *shape[1:]), rng), rng)
                    images[chosen] = self.scaled(drawn)
                    paired = chosen < twins
                    images[len(family) + chosen[paired]] = self.scaled(1 - drawn[paired].flip(3))
        return images

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """As many images as ``x``, some of them made of it, all aimed at the garbage class."""
        rng, share = Rng(x.device), self.settings.from_images
        images = x.detach().float().clone()
        made = rng.deal(len(x), (1 - share, share / 2, share / 2))
        drawn, tiled, permuted = ((made == i).nonzero()[:, 0] for i in range(3))
        images[drawn] = self.draw((len(drawn), *x.shape[1:])).to(images)
        images[tiled] = shuffled_tiles(images[tiled], rng)
        images[permuted] = permuted_pixels(images[permuted], rng)
        return self._garbage(images)
