"""Primitives of procedural images: noise, colours, fills and shapes, made without any data.

Symbols: images ``(M, C, H, W)`` in [0, 1]. The shorter side of an image reaches from -1 to 1, so
that a circle is round in any image; angles are in radians. A shape is a signed distance
``(N, H, W)`` in these units, negative inside.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**18
"""Values rendered at once on a CPU. Intermediate results take several times that, and so stay
small beside a pool of large images."""
WIDE = 2**24
"""Values rendered at once on an accelerator, which small batches would leave idle."""
CURVE = 10
"""Straight segments that approximate a quadratic curve."""


class Rng(NamedTuple):
    """A source of random numbers; the same seed gives the same images."""

    device: torch.device | str = "cpu"
    """Of the numbers, and so of the images."""
    generator: torch.Generator | None = None
    """On the same device; None for the global random state."""

    def split(self, rows: Tensor, size: int) -> tuple[Tensor, ...]:
        """Rows ``(N, ...)`` in parts that are rendered at once; a row takes ``size`` values."""
        chunk = CHUNK if torch.device(self.device).type == "cpu" else WIDE
        return rows.split(max(1, chunk // size))

    def uniform(self, *size: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers in ``[low, high)``, of shape ``size``."""
        return low + (high - low) * torch.rand(*size, device=self.device, generator=self.generator)

    def log_uniform(self, low: float, high: float, *size: int) -> Tensor:
        """Numbers in ``[low, high)`` whose logarithm is uniform, of shape ``size``."""
        return low * (high / low) ** self.uniform(*size)

    def normal(self, *size: int) -> Tensor:
        """Standard normal numbers of shape ``size``."""
        return torch.randn(*size, device=self.device, generator=self.generator)

    def integers(self, high: int, *size: int) -> Tensor:
        """Integers in ``[0, high)`` of shape ``size``."""
        return torch.randint(high, size, device=self.device, generator=self.generator)

    def stratified(self, count: int, shares: Sequence[float]) -> Tensor:
        """Integers ``(count,)`` in random order; each has its share of them, relative to the sum
        of all shares, to within one.
        """
        order = torch.randperm(count, device=self.device, generator=self.generator)
        edges = torch.tensor(shares, device=self.device).cumsum(0)
        places = (order + self.uniform(1)) / max(count, 1)
        return torch.bucketize(places, edges[:-1] / edges[-1], right=True)


def multiscale(shape: Sequence[int], rng: Rng) -> Tensor:
    """Random mixtures ``(M, C, H, W)`` of standard normals at S, S/2, S/4, ... 2 pixels,
    upsampled; of about unit deviation.
    """
    M, C, H, W = shape
    sizes = [(H, W)]
    while max(sizes[-1]) > 2:
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    # Squared uniforms make weights uneven, so that one or two scales dominate most images.
    weights = F.normalize(rng.uniform(M, len(sizes)).square(), dim=1)
    noise = torch.zeros(M, C, H, W, device=rng.device)
    for weight, size in zip(weights.T, sizes, strict=True):
        layer = rng.normal(M, C, *size)
        if size != (H, W):
            layer = F.interpolate(layer, (H, W), mode="bilinear")
        noise += weight.view(-1, 1, 1, 1) * layer
    return noise


def clouds(shape: Sequence[int], rng: Rng) -> Tensor:
    """Multi-scale noise ``(M, C, H, W)`` in [0, 1], of random contrast, level and brightness."""
    noise = multiscale(shape, rng)
    uniform, level, brightness = (
        f(len(noise), 1, 1, 1) for f in (rng.uniform, rng.normal, rng.normal)
    )
    # Contrast from 0.1, nearly flat, to 10, black and white. Where it ended at 2, a tenth of black
    # and white noise passed for ID images.
    return ((10 ** (2 * uniform - 1) * (noise + level) + brightness) / 2 + 0.5).clamp(0, 1)


def tones(count: int, channels: int, rng: Rng) -> Tensor:
    """Colours ``(count, channels, 1, 1)`` in [0, 1]: a third of them pure black or white."""
    tone = rng.uniform(count, channels, 1, 1)
    pure = rng.integers(6, count, 1, 1, 1)
    return tone.masked_fill(pure == 0, 0.0).masked_fill(pure == 1, 1.0)


def fills(shape: Sequence[int], rng: Rng) -> Tensor:
    """Colours or textures of areas ``(N, C, H, W)``, in [0, 1]: half are flat, a quarter linear
    gradients, a quarter clouds mixed with a colour.
    """
    N, C, H, W = shape
    tone, kind = tones(N, C, rng), rng.integers(4, N)
    fill = tone.repeat(1, 1, H, W)
    graded, clouded = (kind == 0).nonzero()[:, 0], (kind == 1).nonzero()[:, 0]
    if len(graded):
        n = len(graded)
        fill[graded] = tone[graded].lerp(tones(n, C, rng), ramps((n, H, W), rng)[:, None])
    if len(clouded):
        n = len(clouded)
        fill[clouded] = tone[clouded].lerp(clouds((n, C, H, W), rng), rng.uniform(n, 1, 1, 1))
    return fill


def ramps(shape: Sequence[int], rng: Rng) -> Tensor:
    """Linear gradients ``(N, H, W)`` from 0 to 1, over the whole image or as little as a quarter
    of it, as small shapes have them.
    """
    x, y = grid(shape, rng)
    angle = rng.uniform(len(x), 1, 1, high=2 * math.pi)
    slope, shift = rng.log_uniform(0.5, 2, len(x), 1, 1), rng.uniform(len(x), 1, 1)
    along = angle.cos() * x + angle.sin() * y
    return (slope * (along + 1) - (2 * slope - 1).clamp(min=0) * shift).clamp(0, 1)


def grid(shape: Sequence[int], rng: Rng, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels relative to random points.

    Arguments:
        shape: ``(N, H, W)``.
        rng: Of the points and their device.
        spread: Of the points around the centre: 0 all at the centre, 1 anywhere in the image.

    Returns:
        Horizontal ``(N, 1, W)`` and vertical ``(N, H, 1)`` positions; the shorter side is 2 long.
    """
    N, H, W = shape
    half = min(H, W) / 2
    x, y = ((torch.arange(size, device=rng.device) - (size - 1) / 2) / half for size in (W, H))
    at_x, at_y = (
        spread * rng.uniform(N, 1, 1, low=-1, high=1) * size / 2 / half for size in (W, H)
    )
    return x[None, None, :] - at_x, y[None, :, None] - at_y


def posed(shape: Sequence[int], rng: Rng) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random poses in the image: coordinates along the two axes of a shape, each ``(N, H, W)``,
    and its half-axes, each ``(N, 1, 1)``.
    """
    x, y = grid(shape, rng, spread=1.0)
    angle = rng.uniform(len(x), 1, 1, high=math.pi)
    a, aspect = rng.log_uniform(0.1, 1, len(x), 1, 1), rng.log_uniform(0.3, 1, len(x), 1, 1)
    return angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x, a, a * aspect


def ellipses(shape: Sequence[int], rng: Rng) -> Tensor:
    """Ellipses, to first order in the distance."""
    u, v, a, b = posed(shape, rng)
    reach = ((u / a).square() + (v / b).square()).sqrt()
    slope = ((u / a.square()).square() + (v / b.square()).square()).sqrt().clamp(min=1e-6)
    return reach * (reach - 1) / slope


def boxes(shape: Sequence[int], rng: Rng) -> Tensor:
    """Boxes with corners from sharp to fully rounded."""
    u, v, a, b = posed(shape, rng)
    radius = b * rng.uniform(len(b), 1, 1)
    du, dv = u.abs() - a + radius, v.abs() - b + radius
    outside = torch.hypot(du.clamp(min=0), dv.clamp(min=0))
    return outside + torch.maximum(du, dv).clamp(max=0) - radius


def rings(shape: Sequence[int], rng: Rng) -> Tensor:
    """Ellipses with a hole."""
    return ellipses(shape, rng).abs() - rng.log_uniform(0.03, 0.15, shape[0], 1, 1)


def polygons(shape: Sequence[int], rng: Rng) -> Tensor:
    """Convex polygons of 3 to 6 uneven sides."""
    u, v, a, b = posed(shape, rng)
    sides = 3 + rng.integers(4, len(a), 1, 1)
    u, v = u / a, v / b
    outside = torch.full_like(u, -torch.inf)
    for side in range(6):
        # A jitter of a fifth of the angle keeps the normals of neighbouring sides of a triangle
        # less than pi apart, so that it is closed.
        angle = 2 * math.pi * (side + rng.uniform(len(a), 1, 1, high=0.2)) / sides
        beyond = angle.cos() * u + angle.sin() * v - rng.uniform(len(a), 1, 1, low=0.4, high=0.9)
        outside = torch.where(side < sides, torch.maximum(outside, beyond), outside)
    return outside * b


def strokes(shape: Sequence[int], rng: Rng) -> Tensor:
    """Curved strokes: one quadratic curve or two that join smoothly; the half-width is 3 to 24 %
    of half the image.
    """
    N = shape[0]
    x, y = (axis[:, None] for axis in grid(shape, rng, spread=0.7))
    points = polyline(N, rng)
    ax, ay = points[:, :-1, :, None].unbind(2)
    dx, dy = points.diff(dim=1)[..., None].unbind(2)
    length = (dx.square() + dy.square()).clamp(min=1e-12)[..., None]
    from_x, from_y = x - ax[..., None], y - ay[..., None]
    # Place of the nearest point on the segment, 0 to 1; the squared distance follows from it
    # without a second pass over x and y.
    along = (from_x * dx[..., None] + from_y * dy[..., None]) / length
    nearest = along.clamp(0, 1)
    squared = from_x.square() + from_y.square() + length * nearest * (nearest - 2 * along)
    return squared.amin(1).clamp(min=0).sqrt() - rng.log_uniform(0.03, 0.24, N, 1, 1)


def polyline(count: int, rng: Rng) -> Tensor:
    """Points ``(count, 2 * CURVE + 1, 2)`` along one or two quadratic curves around the origin; a
    single curve repeats its last point.
    """
    size = rng.log_uniform(0.3, 1.2, count, 1, 1)
    start, bend, middle, end = (size * rng.uniform(count, 4, 2, low=-1, high=1)).split(1, dim=1)
    t = torch.linspace(0, 1, CURVE + 1, device=rng.device)[:, None]
    first = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * middle
    end = torch.where(rng.uniform(count, 1, 1) < 0.5, middle, end)
    # The second control point mirrors the first at the point where the curves meet, so that they
    # meet without a corner.
    bend = torch.where(end == middle, middle, 2 * middle - bend)
    second = (1 - t) ** 2 * middle + 2 * t * (1 - t) * bend + t**2 * end
    return torch.cat([first, second[:, 1:]], dim=1)


SHAPES = (ellipses, boxes, rings, polygons, strokes)
"""Each gives signed distances ``(N, H, W)``."""


def coverage(shape: Sequence[int], rng: Rng) -> Tensor:
    """Share of each pixel ``(N, 1, H, W)`` that a random shape covers, in [0, 1]; all kinds are
    equally likely, edges are a pixel wide.

    One in four is rendered and the others are its mirror images, for other images; rendering is
    what takes time.
    """
    N, H, W = shape
    count = -(-N // 4)
    distance = torch.empty(count, H, W, device=rng.device)
    kind = rng.integers(len(SHAPES), count)
    for i, render in enumerate(SHAPES):
        chosen = (kind == i).nonzero()[:, 0]
        if len(chosen):
            distance[chosen] = render((len(chosen), H, W), rng)
    inside = antialiased(distance * (min(H, W) / 2))[:, None]
    mirrored = torch.cat([inside, inside.flip(2), inside.flip(3), inside.flip(2, 3)])[:N]
    return mirrored[torch.randperm(N, device=rng.device, generator=rng.generator)]


def antialiased(distance: Tensor) -> Tensor:
    """Share of each pixel that lies inside, in [0, 1], from its signed distance in pixels."""
    return (0.5 - distance).clamp(0, 1)
