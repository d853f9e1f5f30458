"""Corruptions: what each does, that none is too strong, and that a head accepts them."""

import math
import sys

import pytest
import torch
from conftest import SHAPE, TINY, make_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from tie_ext import TIENet, TIETrainer, attach
from tie_ext.models.backbones import Conv3
from tie_ext.outliers.primitives import CHUNK, Rng
from tie_ext.training.augmentation import CorruptionConfig, blur, corrupt, warp
from tie_ext.training.config import HeadConfig

CONFIG = CorruptionConfig()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(2, 40),
    width=st.integers(2, 40),
)
def test_corrupted_images_keep_shape_and_range(seed, count, channels, height, width):
    rng = Rng("cpu", torch.Generator().manual_seed(seed))
    x = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    y = corrupt(x, rng)
    assert y.shape == x.shape
    assert torch.equal(x, before)
    assert bool(((y >= 0) & (y <= 1)).all())


def test_corruptions_of_values_beyond_the_range():
    x = torch.full((200, 1, 8, 8), -1e-6)
    x[:, :, 4:] = 1 + 1e-6
    y = corrupt(x, Rng("cpu", torch.Generator().manual_seed(0)))
    assert bool(((y >= 0) & (y <= 1)).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_images_of_any_floating_point_type(kind):
    x = torch.rand(50, 3, 12, 12).to(kind)
    y = corrupt(x, Rng())
    assert y.dtype == torch.float32
    model = Conv3(3, 2).eval()
    assert attach(model, [torch.rand(8, 3, 28, 28, dtype=torch.float64)], 2).tau.isfinite()


def test_rotation_of_a_wide_image():
    x = torch.zeros(300, 1, 32, 128)
    x[:, :, :, 64] = 1  # an upright line
    y = warp(x, Rng("cpu", torch.Generator().manual_seed(0)), CONFIG)[:, 0]
    place = (y * torch.arange(128)).sum(2) / y.sum(2).clamp(min=1e-6)
    tilt = ((place[:, 28] - place[:, 3]) / 25).atan().rad2deg().abs()
    assert 4 < float(tilt.max()) < 7


def test_seeds_of_corruptions():
    x = torch.rand(20, 3, 16, 16)
    one, again, other = (
        corrupt(x, Rng("cpu", torch.Generator().manual_seed(seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_corruptions_differ_between_images():
    x = torch.rand(1, 1, 16, 16).repeat(640, 1, 1, 1)
    y = corrupt(x, Rng("cpu", torch.Generator().manual_seed(0)))
    same = (y == x).flatten(1).all(1)
    assert 1 <= int(same.sum()) <= 30  # each of six changes is made to half: one in 64 has none
    assert len(y[~same].unique(dim=0)) == int((~same).sum())


def test_large_images_are_changed_a_few_at_a_time(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "tie_ext.training.augmentation._corrupt_piece",
        lambda x, rng, config: seen.append(x) or x,
    )
    x = torch.rand(5, 3, 224, 224)
    assert torch.equal(corrupt(x, Rng()), x)
    assert all(piece.numel() <= CHUNK for piece in seen)


def test_a_flat_image_differs_in_tone_and_noise_alone():
    y = corrupt(torch.full((400, 1, 20, 20), 0.5), Rng("cpu", torch.Generator().manual_seed(0)))
    mean, deviation = y.mean((1, 2, 3)), y.std((1, 2, 3))
    # Gamma first, then brightness: 0.5 ** 1.25 - 0.075 to 0.5 ** 0.8 + 0.075.
    assert 0.5**CONFIG.gamma - 0.08 < float(mean.min()) < 0.42
    assert 0.6 < float(mean.max()) < 0.5 ** (1 / CONFIG.gamma) + 0.08
    assert 0.015 < float(deviation.max()) < 0.022


def test_blur_is_a_gaussians_of_each_images_own_width():
    x = torch.zeros(3, 2, 21, 21)
    x[:, :, 10, 10] = 1
    y = blur(x, torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(y.sum((2, 3)), torch.ones(3, 2))
    torch.testing.assert_close(y[0], x[0])  # no width, no blur
    at = torch.arange(21.0) - 10
    for image, sigma in ((y[1], 1.0), (y[2], 2.0)):
        torch.testing.assert_close(
            (image[0].sum(0) * at**2).sum().sqrt(), torch.tensor(sigma), rtol=0.02, atol=0
        )
        torch.testing.assert_close(image[0], image[0].T)


@pytest.mark.parametrize("size", [2, 3, 28])
def test_blur_and_warp_of_a_flat_image(size):
    x = torch.full((10, 3, size, size), 0.7)
    torch.testing.assert_close(blur(x, torch.full((10,), 1.5)), x)
    torch.testing.assert_close(warp(x, Rng(), CONFIG), x)


def test_a_warp_moves_a_point_by_no_more_than_a_few_pixels():
    x = torch.zeros(200, 1, 41, 41)
    x[:, :, 20, 32] = 1  # 12 to the right of the middle
    y = warp(x, Rng("cpu", torch.Generator().manual_seed(0)), CONFIG).clamp(min=0)[:, 0]
    total = y.sum((1, 2))
    row, column = ((y.sum(dim) * torch.arange(41)).sum(1) / total for dim in (2, 1))
    turned = 12 * math.sin(math.radians(6))
    moved = 0.05 * 20.5
    assert 1.5 < float((row - 20).abs().max()) < 1.05 * turned + moved + 0.6
    assert 1.0 < float((column - 32).abs().max()) < 0.05 * 12 + moved + 0.7


@pytest.mark.slow
def test_head_fitted_to_corruptions_accepts_blur(monkeypatch):
    torch.manual_seed(0)
    x = (
        (torch.rand(600, 1, 14, 14) < 0.5).float().repeat_interleave(2, 2).repeat_interleave(2, 3)
    )  # blocks with sharp edges
    softer = blur(x, torch.full((len(x),), 0.5))
    rejected = []
    for process in (corrupt, lambda x, *_: x):
        monkeypatch.setattr(sys.modules["tie_ext.training.fit_head"], "corrupt", process)
        net = attach(Conv3(1, 10).eval(), [x], 10, head_config=HeadConfig(steps=1600, outliers=3))
        assert float((net.decide(x).level == 1).float().mean()) < 0.02
        rejected.append(float((net.decide(softer).level == 1).float().mean()))
    assert rejected[0] < 0.05
    assert rejected[1] > 0.3


def test_settings_of_the_head_say_how_images_are_corrupted(monkeypatch):
    seen, corruption = [], CorruptionConfig(degrees=3)
    monkeypatch.setattr(
        "tie_ext.training.fit_head.corrupt", lambda x, rng, config: seen.append(config) or x
    )
    head = HeadConfig(steps=1, corruption=corruption)
    attach(Conv3(1, 3).eval(), [torch.rand(6, *SHAPE)], 3, head_config=head)
    assert seen == [corruption]
    net = TIENet(Conv3(1, 3), 3, SHAPE, head="multilayer")
    TIETrainer(net, TINY, [], head_config=head).epoch(make_batches())
    assert len(seen) > 1
    assert set(seen) == {corruption}
