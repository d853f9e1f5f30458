"""Primitives: each gives what its name says, in the shares asked for."""

import pytest
import torch
from conftest import close
from torch.nn import functional as F

from tie_ext.outliers import primitives
from tie_ext.outliers.primitives import CHUNK, Rng, fills, tones

RNG = Rng()


def test_stratified_shares_on_average_and_at_once():
    counts = RNG.stratified(50, (0.4, 1.0, 0.6)).bincount(minlength=3)
    assert counts.tolist() == pytest.approx([10, 25, 15], abs=1)
    single = torch.cat([RNG.stratified(1, (0.4, 1.0, 0.6)) for _ in range(3000)])
    assert (single.bincount() / 3000).tolist() == pytest.approx([0.2, 0.5, 0.3], abs=0.04)


def test_pieces_on_a_cpu_and_an_accelerator():
    rows = torch.empty(1000, dtype=torch.long)
    on_cpu, elsewhere = (Rng(device).split(rows, 3 * 32 * 32) for device in ("cpu", "meta"))
    assert len(on_cpu) > len(elsewhere) == 1
    assert max(map(len, on_cpu)) * 3 * 32 * 32 <= CHUNK
    assert len(Rng().split(rows, 10 * CHUNK)) == 1000


def test_black_and_white_among_random_tones():
    tone = tones(6000, 3, RNG).view(6000, 3)
    pure = [(tone == value).all(1) for value in (0, 1)]
    for of in pure:
        assert abs(of.double().mean() - 1 / 6) < 0.02
    rest = tone[~pure[0] & ~pure[1]]
    assert abs(rest.mean() - 0.5) < 0.02
    assert abs(rest.var() - 1 / 12) < 0.01


def test_flat_linear_and_clouded_fills(monkeypatch):
    monkeypatch.setattr(
        primitives,
        "tones",
        lambda count, channels, rng: (
            torch.linspace(0.2, 0.8, count).view(-1, 1, 1, 1).repeat(1, channels, 1, 1)
        ),
    )
    monkeypatch.setattr(primitives, "clouds", lambda shape, rng: torch.rand(*shape))
    x = fills((2000, 2, 16, 16), RNG).double()

    def monotone(steps):
        return (steps >= -1e-7).flatten(1).all(1) | (steps <= 1e-7).flatten(1).all(1)

    flat = (x.amax((2, 3)) - x.amin((2, 3)) < 1e-6).all(1)
    linear = monotone(x.diff(dim=3)) & monotone(x.diff(dim=2)) & ~flat
    shares = [of.double().mean().item() for of in (flat, linear, ~flat & ~linear)]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.04)


@pytest.mark.parametrize("render", primitives.SHAPES)
def test_signed_distance_and_pieces_of_a_shape(render):
    d = render((200, 96, 96), RNG) * 48  # in pixels
    slope = torch.hypot(d.diff(dim=2)[:, :-1], d.diff(dim=1)[:, :, :-1])
    slope = slope[d[:, :-1, :-1].abs() < 1]
    assert 0.5 < slope.median() < 1.5
    assert (slope < 3).double().mean() > 0.98
    filled = d < 0
    runs = (filled.diff(dim=2) & filled[:, :, 1:]).sum(2) + filled[:, :, 0]  # pieces of a row
    assert 0.005 < filled.double().mean((1, 2)).median() < 0.4
    if render in (primitives.ellipses, primitives.boxes, primitives.polygons):
        assert (runs <= 1).all()  # convex
    else:
        assert (runs > 1).any(1).double().mean() > 0.3  # hollow or bent


@pytest.mark.parametrize("render", [primitives.ellipses, primitives.boxes])
def test_equal_half_axes_in_an_image_that_is_not_square(render, monkeypatch):
    half = torch.tensor([[[0.5]]])
    monkeypatch.setattr(
        primitives, "posed", lambda shape, rng: (*primitives.grid(shape, rng), half, half)
    )
    filled = render((1, 40, 120), RNG)[0] < 0
    assert filled.any(0).sum() == filled.any(1).sum() == 20


def test_distances_of_strokes_to_their_curves(monkeypatch):
    lines, real, widths = primitives.polyline(6, RNG), primitives.grid, []

    def log_uniform(self, low, high, *size):
        widths.append((low, high))
        return torch.full(size, 0.1)

    monkeypatch.setattr(primitives, "polyline", lambda count, rng: lines)
    monkeypatch.setattr(primitives, "grid", lambda shape, rng, spread: real(shape, rng))
    monkeypatch.setattr(Rng, "log_uniform", log_uniform)
    found = primitives.strokes((6, 24, 32), RNG)
    assert widths == [(0.03, 0.24)]
    dense = F.interpolate(lines.mT, 20 * 100 + 1, mode="linear", align_corners=True).mT
    x, y = real((1, 24, 32), RNG)
    pixels = torch.stack(torch.broadcast_tensors(x, y), dim=-1).reshape(1, -1, 2).expand(6, -1, -1)
    nearest = torch.cdist(pixels, dense).amin(2).view(6, 24, 32)
    close(found, nearest - 0.1, atol=2e-3, rtol=0)


def test_kinds_edges_and_mirror_images_of_coverage(monkeypatch):
    kinds = []
    spies = [
        lambda shape, rng, i=i, real=real: kinds.extend([i] * shape[0]) or real(shape, rng)
        for i, real in enumerate(primitives.SHAPES)
    ]
    monkeypatch.setattr(primitives, "SHAPES", spies)
    x = primitives.coverage((500, 32, 32), RNG)
    assert len(kinds) == 125  # one in four is rendered
    assert (torch.tensor(kinds).bincount(minlength=5) > 10).all()
    assert ((x > 0) & (x < 1)).double().mean() < 0.2
    assert (x == 1).flatten(1).any(1).double().mean() > 0.7
    of = {tuple(one.flatten().tolist()) for one in x}
    assert len(of) > 350
    for axes in ((2,), (3,), (2, 3)):
        assert {tuple(one.flatten().tolist()) for one in x.flip(axes)} == of
    assert not torch.equal(x[125:250].flip(2), x[:125])  # in random order
    assert primitives.coverage((1, 16, 16), RNG).shape == (1, 1, 16, 16)
