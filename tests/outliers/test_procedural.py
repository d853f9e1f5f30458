"""Procedural images: each brush and family gives what its name says, in the shares asked for, fast
and in little memory.
"""

import math
import time
import weakref

import pytest
import torch
from conftest import domain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tie_ext.outliers import Procedural, ProceduralSettings, primitives
from tie_ext.outliers.primitives import CHUNK, Rng, clouds, fills, multiscale, tones
from tie_ext.outliers.procedural import (
    FAMILIES,
    greyed,
    masks,
    permuted_pixels,
    shapes,
    shuffled_tiles,
    waves,
)

RNG = Rng()
SIZES = [
    (4, 1, 28, 28),
    (4, 3, 32, 32),
    (3, 3, 40, 29),
    (2, 1, 30, 64),
    (2, 3, 224, 224),
    (1, 2, 28, 31),
    (3, 1, 2, 3),
]
BY_NAME = {name: draw for name, (_, draw) in FAMILIES.items()}
OF_IMAGES = {"tiles": shuffled_tiles, "pixels": permuted_pixels}


def rng(seed: int) -> Rng:
    return Rng("cpu", torch.Generator().manual_seed(seed))


@pytest.fixture
def one_core():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plain(monkeypatch):
    """Fills are flat tones, of which no two are near: what is left of an image is its outline."""

    def flat(shape, rng):
        flat.calls += 1
        return torch.full(tuple(shape), 0.9 if flat.calls % 2 else 0.1)

    flat.calls = 0
    monkeypatch.setattr("tie_ext.outliers.procedural.fills", flat)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("name", [*BY_NAME, *OF_IMAGES])
def test_any_family_gives_finite_images_of_any_size(name, shape):
    x = BY_NAME[name](shape, RNG) if name in BY_NAME else OF_IMAGES[name](torch.rand(shape), RNG)
    assert x.shape == shape
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert 0 <= x.min() <= x.max() <= 1


@pytest.mark.parametrize("name", [*BY_NAME, *OF_IMAGES])
def test_a_family_depends_on_its_generator_alone(name):
    images = torch.rand(5, 3, 32, 32)
    draw = (
        (lambda d: BY_NAME[name](images.shape, d))
        if name in BY_NAME
        else (lambda d: OF_IMAGES[name](images, d))
    )
    first, state = draw(rng(1)), torch.get_rng_state()
    torch.rand(7)
    again = draw(rng(1))
    torch.set_rng_state(state)
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(rng(2)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", BY_NAME)
def test_images_differ(name):
    x = BY_NAME[name]((60, 3, 32, 32), RNG)
    x = x[x.flatten(1).std(1) > 0.05]  # but for the flat ones: black may come twice
    assert len(x) > 30
    distance = torch.cdist(x.flatten(1), x.flatten(1)) + 9 * torch.eye(len(x))
    assert distance.min() > 0.5


def test_the_mixture_fills_the_range_of_the_data_channel_by_channel():
    low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 9.0])
    x = Procedural(domain()._replace(low=low, high=high)).draw((200, 3, 28, 33))
    assert torch.equal(x.amin((0, 2, 3)), low)
    assert torch.equal(x.amax((0, 2, 3)), high)
    assert ((x >= low[:, None, None]) & (x <= high[:, None, None])).all()


def test_same_seed_same_mixture():
    drawn = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        drawn.append(Procedural(domain()).draw((40, 3, 32, 32)))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert Procedural(domain()).draw((0, 3, 32, 32)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("count", [1, 7, 400])
def test_families_have_their_shares_in_random_order(count, monkeypatch):
    marked = {
        name: (share, lambda shape, rng, mark=i: torch.full(tuple(shape), mark / 20))
        for i, (name, (share, _)) in enumerate(FAMILIES.items())
    }
    monkeypatch.setattr("tie_ext.outliers.procedural.FAMILIES", marked)
    marks = (20 * Procedural(domain()).draw((count, 1, 32, 32))[:, 0, 0, 0]).round().long()
    drawn, negatives = marks.split([count - count // 2, count // 2])
    assert torch.equal(negatives, 20 - drawn[: count // 2])
    for i, share in enumerate((0.1, 0.7, 0.05, 0.15, 0, 0)):  # as validation chose
        assert (
            abs(int((drawn == i).sum()) - share * len(drawn)) < 1.01
            if share
            else not (drawn == i).any()
        )
    assert count < 400 or (drawn.diff() != 0).double().mean() > 0.3


def test_half_of_the_images_are_mirrored_negatives_of_the_others():
    low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 3.0, 5.0])
    x = Procedural(domain(low=low.tolist(), high=high.tolist())).draw((7, 3, 32, 32))
    torch.testing.assert_close(x[4:].flip(3), (low + high)[:, None, None] - x[:3])


def test_shapes_are_mirrored_once_along_each_axis():
    x = primitives.coverage((400, 16, 16), RNG)
    of = {tuple(one.flatten().tolist()) for one in x[:, 0]}
    mirrored = [
        axes
        for axes in ((1,), (2,), (1, 2))
        if all(tuple(one.flip([a - 1 for a in axes]).flatten().tolist()) in of for one in x[:, 0])
    ]
    assert len(mirrored) == 3
    assert len(of) > 300
    assert primitives.coverage((1, 16, 16), RNG).shape == (1, 1, 16, 16)
    assert not torch.equal(x[100:200].flip(2), x[:100])  # in random order


def test_dealt_shares_are_met_on_average_even_one_at_a_time():
    drawn = (
        torch.cat([RNG.stratified(1, (0.4, 1.0, 0.6)) for _ in range(3000)]).bincount(minlength=3)
        / 3000
    )
    torch.testing.assert_close(drawn, torch.tensor([0.2, 0.5, 0.3]), atol=0.04, rtol=0)


def test_half_of_colour_images_are_nearly_grey():
    x = Procedural(domain()).draw((600, 3, 32, 32))
    colour = (x.amax(1) - x.amin(1)).amax((1, 2))
    assert (
        0.45 < (colour <= 0.1).double().mean() < 0.75
    )  # and those that have no colour to begin with
    vivid = torch.rand(2000, 3, 8, 8)
    kept = (greyed(vivid, RNG) == vivid).flatten(1).all(1)
    assert abs(kept.double().mean() - 0.5) < 0.05
    x = greyed(vivid, rng(0))
    muted = ~(x == vivid).flatten(1).all(1)
    assert (x[muted].amax(1) - x[muted].amin(1)).max() <= 0.1
    assert x[muted].std() > 0.9 * vivid.std()
    grey = torch.rand(3, 1, 8, 8)
    assert greyed(grey, RNG) is grey


def test_a_third_of_tones_are_black_or_white():
    tone = tones(6000, 3, RNG).view(6000, 3)
    black, white = (tone == 0).all(1), (tone == 1).all(1)
    assert abs(black.double().mean() - 1 / 6) < 0.02
    assert abs(white.double().mean() - 1 / 6) < 0.02
    rest = tone[~black & ~white]
    assert abs(rest.mean() - 0.5) < 0.02
    assert abs(rest.var() - 1 / 12) < 0.01


def test_fills_are_half_flat_a_quarter_linear_a_quarter_clouds(monkeypatch):
    monkeypatch.setattr(
        primitives,
        "tones",
        lambda count, channels, rng: (
            torch.linspace(0.2, 0.8, count).view(-1, 1, 1, 1).repeat(1, channels, 1, 1)
        ),
    )
    monkeypatch.setattr(primitives, "clouds", lambda shape, rng: torch.rand(*shape))
    x = fills((2000, 2, 16, 16), RNG).double()
    flat = (x.amax((2, 3)) - x.amin((2, 3)) < 1e-6).all(1)
    across, down = x.diff(dim=3), x.diff(dim=2)
    monotone = ((across >= -1e-7).flatten(1).all(1) | (across <= 1e-7).flatten(1).all(1)) & (
        (down >= -1e-7).flatten(1).all(1) | (down <= 1e-7).flatten(1).all(1)
    )
    assert abs(flat.double().mean() - 0.5) < 0.04
    assert abs((monotone & ~flat).double().mean() - 0.25) < 0.04
    assert abs((~monotone & ~flat).double().mean() - 0.25) < 0.04


def test_gradients_are_linear_and_use_both_tones():
    x = primitives.ramps((300, 33, 33), RNG)
    inside = ((x > 0.02) & (x < 0.98))[:, 2:, 2:] & ((x > 0.02) & (x < 0.98))[:, :-2, :-2]
    assert (x[:, 2:, 2:] + x[:, :-2, :-2] - 2 * x[:, 1:-1, 1:-1]).abs()[inside].max() < 1e-5
    assert ((x.amax((1, 2)) - x.amin((1, 2))) > 0.4).all()


def inside(render, count=64, size=64):
    return render((count, size, size), RNG) < 0


def test_signed_distances_of_shapes():
    for render in primitives.SHAPES:
        d = render((64, 96, 96), RNG) * 48  # in pixels
        gradient = torch.hypot(d.diff(dim=2)[:, :-1], d.diff(dim=1)[:, :, :-1])[
            d[:, :-1, :-1].abs() < 1
        ]
        assert 0.5 < gradient.median() < 1.5, render.__name__
        assert (gradient < 3).double().mean() > 0.98, render.__name__


def test_ellipses_boxes_and_polygons_are_convex_and_rings_are_hollow():
    for render, convex in (
        (primitives.ellipses, True),
        (primitives.boxes, True),
        (primitives.polygons, True),
        (primitives.rings, False),
    ):
        filled = inside(render, 200)
        runs = (filled.diff(dim=2) & filled[:, :, 1:]).sum(2) + filled[
            :, :, 0
        ]  # how many separate pieces a row has
        assert (runs <= 1).all() if convex else (runs > 1).any(1).double().mean() > 0.3, (
            render.__name__
        )
        share = filled.double().mean((1, 2))
        assert 0.005 < share.median() < 0.4


@pytest.mark.parametrize("render", [primitives.ellipses, primitives.boxes])
def test_half_axes_are_the_same_both_ways_in_an_image_that_is_not_square(render, monkeypatch):
    monkeypatch.setattr(
        primitives,
        "posed",
        lambda shape, rng: (
            *primitives.grid(shape, rng),
            torch.tensor([[[0.5]]]),
            torch.tensor([[[0.5]]]),
        ),
    )
    filled = render((1, 40, 120), RNG)[0] < 0
    assert filled.any(0).sum() == filled.any(1).sum() == 20


def test_polygons_have_three_to_six_straight_sides(monkeypatch):
    drawn = []
    real = torch.where

    def spy(condition, *rest):
        drawn.append(condition)
        return real(condition, *rest)

    monkeypatch.setattr(torch, "where", spy)
    d = primitives.polygons((400, 24, 24), RNG)
    sides = torch.stack(drawn).sum(0).flatten()
    assert sorted(sides.unique().tolist()) == [3, 4, 5, 6]
    assert (sides.bincount()[3:] > 60).all()
    # Straight: along a side the distance is linear, so second differences vanish nearly
    # everywhere.
    bend = (d[:, 2:] + d[:, :-2] - 2 * d[:, 1:-1]).abs() < 1e-4
    assert bend.double().mean() > 0.85
    # Closed: none leaves its half-axes, of at most 1, by more than a corner of a triangle can.
    assert ((d < 0).double().mean((1, 2)) < 0.8).all()


def test_strokes_have_the_width_asked_for_and_one_or_two_curves(monkeypatch):
    widths = torch.tensor([0.03, 0.24])[:, None, None]
    real = Rng.log_uniform
    monkeypatch.setattr(
        Rng,
        "log_uniform",
        lambda self, low, high, *size: (
            widths if (low, high) == (0.03, 0.24) else real(self, low, high, *size)
        ),
    )
    depth = -torch.stack([primitives.strokes((2, 128, 128), RNG).amin((1, 2)) for _ in range(30)])
    assert (depth <= widths.flatten() + 1e-5).all()
    torch.testing.assert_close(
        depth.median(0).values, widths.flatten(), atol=0.012, rtol=0
    )  # a pixel's width; a few lie off the image
    lines = primitives.polyline(1000, RNG)
    single = (lines[:, primitives.CURVE :] - lines[:, primitives.CURVE, None]).abs().flatten(
        1
    ).amax(1) < 1e-5
    assert abs(single.double().mean() - 0.5) < 0.06
    # Smooth: the pieces before and after the meeting point go the same way.
    before, after = (
        lines[~single, primitives.CURVE - 2 : primitives.CURVE + 1].diff(dim=1),
        lines[~single, primitives.CURVE : primitives.CURVE + 3].diff(dim=1),
    )
    tangents = [1.5 * before[:, 1] - 0.5 * before[:, 0], 1.5 * after[:, 0] - 0.5 * after[:, 1]]
    assert torch.cosine_similarity(*tangents, dim=1).min() > 0.99
    curved = lines[:, 0] + lines[:, primitives.CURVE] - 2 * lines[:, primitives.CURVE // 2]
    assert curved.norm(dim=1).median() > 0.1


def test_strokes_are_distances_to_their_curves(monkeypatch):
    lines, real = primitives.polyline(6, RNG), primitives.grid
    monkeypatch.setattr(primitives, "polyline", lambda count, rng: lines)
    monkeypatch.setattr(primitives, "grid", lambda shape, rng, spread: real(shape, rng))
    monkeypatch.setattr(Rng, "log_uniform", lambda self, low, high, *size: torch.full(size, 0.1))
    dense = F.interpolate(
        lines.transpose(1, 2), 20 * 100 + 1, mode="linear", align_corners=True
    ).transpose(1, 2)
    x, y = real((1, 24, 32), RNG)
    pixels = torch.stack(torch.broadcast_tensors(x, y), dim=-1).reshape(1, -1, 2).expand(6, -1, -1)
    nearest = torch.cdist(pixels, dense).amin(2).view(6, 24, 32)
    torch.testing.assert_close(
        primitives.strokes((6, 24, 32), RNG), nearest - 0.1, atol=2e-3, rtol=0
    )


def test_all_kinds_of_shapes_and_edges_a_pixel_wide(monkeypatch):
    kinds = []
    spies = [
        lambda shape, rng, i=i, real=real: kinds.extend([i] * shape[0]) or real(shape, rng)
        for i, real in enumerate(primitives.SHAPES)
    ]
    monkeypatch.setattr(primitives, "SHAPES", spies)
    x = primitives.coverage((500, 64, 64), RNG)
    assert x.shape == (500, 1, 64, 64)
    assert (torch.tensor(kinds).bincount(minlength=5) > 15).all()  # one in four is drawn
    assert ((x > 0) & (x < 1)).double().mean() < 0.1
    assert (x == 1).flatten(1).any(1).double().mean() > 0.8


def test_shapes_paint_one_to_24_log_uniformly(monkeypatch):
    drawn = []

    def one_more(shape, rng):
        drawn.append(shape[0])
        return torch.ones(shape[0], 1, *shape[1:])

    monkeypatch.setattr("tie_ext.outliers.procedural.coverage", one_more)
    monkeypatch.setattr(
        "tie_ext.outliers.procedural.fills",
        lambda shape, rng: torch.full(tuple(shape), len(drawn) / 100),
    )
    x = shapes((2000, 1, 4, 4), RNG)
    count = (
        100 * x[:, 0, 0, 0]
    ).round().long() + 1  # the last fill of an image says how many it has
    share = count.bincount(minlength=26) / 2000
    assert share[0] == share[25] == 0
    assert share[24] > 0
    for n in (1, 2, 5):
        assert abs(share[n] - math.log((n + 1) / n) / math.log(25)) < 0.04
    assert (
        count[:1000].double().mean() / count[1000:].double().mean() < 1.2
    )  # the order does not tell


def test_shapes_are_flat_areas_with_edges():
    def flat_and_edged(
        x,
        # share of images of which a fifth of the 5 x 5 windows are flat, and another has a clear step
    ):
        spread = F.max_pool2d(x, 5, 1) + F.max_pool2d(-x, 5, 1)
        flat, step = spread < 0.004, spread > 0.15
        return (flat.flatten(1).double().mean(1).gt(0.2) & step.flatten(1).any(1)).double().mean()

    both, noise_both = (flat_and_edged(draw((400, 1, 32, 32), RNG)) for draw in (shapes, clouds))
    assert both > noise_both + 0.12


def test_waves_have_few_frequencies(plain):
    x = waves((400, 1, 32, 32), RNG) - 0.5
    window = torch.hann_window(32, periodic=False)
    power = (
        torch.fft.rfft2((x - x.mean((2, 3), keepdim=True)) * window * window[:, None])
        .abs()
        .square()[:, 0]
    )
    peak = power.flatten(1).topk(4).values.sum(1) / power.flatten(1).sum(
        1
    )  # one frequency and what the window spreads of it
    noise = multiscale((400, 1, 32, 32), RNG) * window * window[:, None]
    noise = torch.fft.rfft2(noise).abs().square()[:, 0].flatten(1)
    assert (peak > 0.6).double().mean() > 0.3
    assert peak.median() > 2 * (noise.topk(4).values.sum(1) / noise.sum(1)).quantile(0.25)
    strength = x.std((1, 2, 3))
    assert (strength > 0.3).double().mean() > 0.05
    assert (strength < 0.1).double().mean() > 0.1
    loudest = power.flatten(1).argmax(1)
    radius = torch.hypot(
        torch.fft.fftfreq(32)[loudest // 17], (loudest % 17) / 32
    )  # periods a pixel
    assert radius.min() < 0.06
    assert 0.3 < radius.max() < 0.5


def test_masks_are_two_fills_with_a_smooth_sharp_border(plain):
    x = masks((300, 1, 32, 32), RNG)
    at_a_fill = ((x - 0.1).abs() < 1e-3) | ((x - 0.9).abs() < 1e-3)
    assert at_a_fill.double().mean() > 0.8
    both = ((x > 0.8).flatten(1).any(1) & (x < 0.2).flatten(1).any(1)).double().mean()
    assert both > 0.7
    high = x > 0.5
    border = (high.diff(dim=3).double().mean() + high.diff(dim=2).double().mean()) / 2
    assert 0.02 < border < 0.15  # where pixels are independent, it is a half
    assert 0.35 < high.double().mean() < 0.65


def tiles_of(x, n=4):
    M, _, H, W = x.shape
    tiles = x.unfold(2, H // n, H // n).unfold(3, W // n, W // n)[:, :, :n, :n]
    return tiles.permute(0, 2, 3, 1, 4, 5).reshape(M, n * n, -1)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (30, 45)])
def test_shuffled_tiles_are_the_tiles_of_the_image(size):
    x = torch.rand(20, 3, *size)
    before = x.clone()
    made = shuffled_tiles(x, RNG)
    assert torch.equal(x, before)
    same = (tiles_of(made)[:, :, None] == tiles_of(x)[:, None]).all(3)  # made tile, old tile
    assert torch.equal(same.sum(1), torch.ones(20, 16, dtype=torch.long))
    assert torch.equal(same.sum(2), torch.ones(20, 16, dtype=torch.long))
    goes = same.double().mean(0)
    assert goes.max() < 0.5  # each image in its own order
    assert 0.02 < goes.diagonal().mean() < 0.12
    assert torch.equal(made[..., size[0] // 4 * 4 :, :], x[..., size[0] // 4 * 4 :, :])
    assert torch.equal(made[..., size[1] // 4 * 4 :], x[..., size[1] // 4 * 4 :])


def blobs(count=40, channels=3):
    """Images with a structure to lose: a bright disc of a colour on a dark ground."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = (torch.hypot(x - 16, y - 16) < 9).float()
    return (
        0.1
        + 0.1 * torch.rand(count, channels, 32, 32)
        + 0.7 * disc * torch.rand(count, channels, 1, 1)
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_permuted_pixels_keep_colours_and_lose_places(channels):
    x = blobs(channels=channels)
    before = x.clone()
    made = permuted_pixels(x, RNG)
    assert torch.equal(x, before)
    torch.testing.assert_close(made.mean((2, 3)), x.mean((2, 3)), atol=0.02, rtol=0)
    assert (made.amin((2, 3)) >= x.amin((2, 3))).all()
    assert (made.amax((2, 3)) <= x.amax((2, 3))).all()
    ratio = made.std((2, 3)) / x.std((2, 3))
    assert ratio.min() > 0.3
    assert ratio.median() > 0.65
    quantiles = torch.linspace(0, 1, 11)
    near = (
        (made.flatten(2).quantile(quantiles, 2) - x.flatten(2).quantile(quantiles, 2))
        .abs()
        .amax(0)
        .mean(1)
    )
    assert near.median() < 0.15
    means = [made.mean((0, 1)) - made.mean(), x.mean((0, 1)) - x.mean()]
    assert abs(torch.corrcoef(torch.stack([m.flatten() for m in means]))[0, 1]) < 0.4


def test_permuted_pixels_are_smoother_than_pixels_in_random_order():
    def smoothness(x):
        x = x - x.mean((2, 3), keepdim=True)
        return (x[..., 1:] * x[..., :-1]).mean() / x.square().mean()

    assert smoothness(permuted_pixels(torch.rand(100, 1, 32, 32), RNG)) > 0.5


def test_unblurred_they_are_the_very_pixels_of_the_image(monkeypatch):
    monkeypatch.setattr(F, "avg_pool2d", lambda x, *args, **kwargs: x[..., 1:-1, 1:-1])
    x = torch.rand(3, 3, 16, 16)
    made, old = permuted_pixels(x, RNG).flatten(2), x.flatten(2)
    for i in range(3):
        rows = [sorted(zip(*pixels[i].tolist(), strict=True)) for pixels in (made, old)]
        torch.testing.assert_close(torch.tensor(rows[0]), torch.tensor(rows[1]))


@pytest.mark.parametrize("share", [0.0, 1 / 3, 1.0])
def test_a_share_of_candidates_is_made_of_the_batch(share, net, monkeypatch):
    monkeypatch.setattr("tie_ext.outliers.procedural.shuffled_tiles", lambda x, rng: x + 10)
    monkeypatch.setattr("tie_ext.outliers.procedural.permuted_pixels", lambda x, rng: x + 20)
    x = torch.rand(60, 1, 28, 28)
    candidates = Procedural(domain(), ProceduralSettings(from_images=share)).sample(
        net, x, torch.zeros(60).long()
    )
    assert torch.equal(candidates.y, torch.full((60,), 3))
    tiled, permuted = (
        ((candidates.x - x - shift).abs() < 1e-5).flatten(1).all(1).sum().item()
        for shift in (10, 20)
    )
    assert abs(tiled - 30 * share) <= 1
    assert abs(permuted - 30 * share) <= 1
    assert (candidates.x <= 1).flatten(1).all(1).sum() == 60 - tiled - permuted


def test_a_share_above_one_is_refused():
    with pytest.raises(ValueError, match="from_images"):
        ProceduralSettings(from_images=1.2)


def test_500_small_colour_images_a_second(one_core):
    prior = Procedural(domain())
    prior.draw((100, 3, 32, 32))
    # of this process alone, so that a busy computer does not count; and half of the speed asked
    # for
    start = time.process_time()
    prior.draw((300, 3, 32, 32))
    assert 300 / (time.process_time() - start) > 250


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes alive at once of the tensors that are made inside."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key, size):
        self.seen.discard(key)
        self.alive -= size


@pytest.mark.slow
def test_memory_is_bounded_at_224_pixels():
    shape = (64, 3, 224, 224)
    with Peak() as memory:
        result = Procedural(domain()).draw(shape)
    assert result.nbytes <= memory.peak < 2 * result.nbytes


@settings(max_examples=15)
@given(st.integers(1, 5), st.sampled_from([1, 3]), st.integers(28, 70), st.integers(28, 70))
def test_the_mixture_takes_any_size(M, C, H, W):
    x = Procedural(domain()).draw((M, C, H, W))
    assert x.shape == (M, C, H, W)
    assert 0 <= x.min() <= x.max() <= 1


def test_what_an_accelerator_paints_at_once_is_larger():
    rows = torch.empty(1000, dtype=torch.long)
    on_cpu, elsewhere = (Rng(device).split(rows, 3 * 32 * 32) for device in ("cpu", "meta"))
    assert len(on_cpu) > len(elsewhere) == 1
    assert max(map(len, on_cpu)) * 3 * 32 * 32 <= CHUNK
    assert len(Rng().split(rows, 10 * CHUNK)) == 1000
