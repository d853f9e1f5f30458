"""Corruptions: what each does, that none is too strong, and that a head accepts them."""

import math

import pytest
import torch
from conftest import SHAPE, TINY, close, make_batches, make_small
from hypothesis import given
from hypothesis import strategies as st

from tie_ext import TIETrainer, attach
from tie_ext.models.backbones import Conv3
from tie_ext.outliers.primitives import Rng
from tie_ext.training.augmentation import CorruptionConfig, blur, corrupt, warp
from tie_ext.training.config import HeadConfig

CONFIG = CorruptionConfig()


def rng(seed: int = 0) -> Rng:
    return Rng("cpu", torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 5),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_shape_type_and_range_of_corrupted_images(seed, count, channels, size, dtype):
    x = (torch.rand(count, channels, *size) * (1 + 2e-6) - 1e-6).to(dtype)
    before, y = x.clone(), corrupt(x, rng(seed))
    assert (y.shape, y.dtype) == (x.shape, torch.float32)
    assert torch.equal(x, before)
    assert ((y >= 0) & (y <= 1)).all()
    assert torch.equal(corrupt(x, rng(seed)), y)


def test_corruptions_of_each_image_and_seed():
    x = torch.rand(1, 1, 16, 16).repeat(640, 1, 1, 1)
    y = corrupt(x, rng())
    same = (y == x).flatten(1).all(1)
    assert 1 <= int(same.sum()) <= 30  # each of six changes is made to half: one in 64 has none
    assert len(y[~same].unique(dim=0)) == int((~same).sum())
    assert not torch.equal(y, corrupt(x, rng(1)))


def test_tone_and_noise_of_a_corrupted_flat_image():
    y = corrupt(torch.full((400, 1, 20, 20), 0.5), rng())
    mean, deviation = y.mean((1, 2, 3)), y.std((1, 2, 3))
    # Gamma first, then brightness: 0.5 ** 1.25 - 0.075 to 0.5 ** 0.8 + 0.075.
    assert 0.5**CONFIG.gamma - 0.08 < float(mean.min()) < 0.42
    assert 0.6 < float(mean.max()) < 0.5 ** (1 / CONFIG.gamma) + 0.08
    assert 0.015 < float(deviation.max()) < 0.022


def test_gaussian_blur_of_each_images_own_width():
    x = torch.zeros(3, 2, 21, 21)
    x[:, :, 10, 10] = 1
    y = blur(x, torch.tensor([0.0, 1.0, 2.0]))
    close(y.sum((2, 3)), torch.ones(3, 2))
    close(y[0], x[0])  # no width, no blur
    for image, sigma in ((y[1], 1.0), (y[2], 2.0)):
        width = (image[0].sum(0) * (torch.arange(21.0) - 10) ** 2).sum().sqrt()
        assert width.item() == pytest.approx(sigma, rel=0.02)
        close(image[0], image[0].T)


def test_rotation_and_shift_of_warped_images():
    x = torch.zeros(300, 1, 32, 128)
    x[:, :, :, 64] = 1  # an upright line
    y = warp(x, rng(), CONFIG)[:, 0]
    place = (y * torch.arange(128)).sum(2) / y.sum(2).clamp(min=1e-6)
    tilt = ((place[:, 28] - place[:, 3]) / 25).atan().rad2deg().abs()
    assert 4 < float(tilt.max()) < 7
    x = torch.zeros(200, 1, 41, 41)
    x[:, :, 20, 32] = 1  # 12 to the right of the middle
    y = warp(x, rng(), CONFIG).clamp(min=0)[:, 0]
    row, column = ((y.sum(dim) * torch.arange(41)).sum(1) / y.sum((1, 2)) for dim in (2, 1))
    turned, moved = 12 * math.sin(math.radians(6)), 0.05 * 20.5
    assert 1.5 < float((row - 20).abs().max()) < 1.05 * turned + moved + 0.6
    assert 1.0 < float((column - 32).abs().max()) < 0.05 * 12 + moved + 0.7


@pytest.mark.slow
def test_blurred_images_and_a_head_fitted_to_corruptions(monkeypatch):
    blocks = (torch.rand(600, 1, 14, 14) < 0.5).float()  # with sharp edges
    x = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
    softer, rejected = blur(x, torch.full((len(x),), 0.5)), []
    for process in (corrupt, lambda x, *_: x):
        monkeypatch.setattr("tie_ext.training.fit_head.corrupt", process)
        net = attach(Conv3(1, 10).eval(), [x], 10, head_config=HeadConfig(steps=1600, outliers=3))
        assert float((net.decide(x).level == 1).float().mean()) < 0.02
        rejected.append(float((net.decide(softer).level == 1).float().mean()))
    assert rejected[0] < 0.05
    assert rejected[1] > 0.3


def test_corruptions_that_the_settings_of_a_head_ask_for(monkeypatch):
    seen, corruption = [], CorruptionConfig(degrees=3)
    monkeypatch.setattr(
        "tie_ext.training.fit_head.corrupt", lambda x, rng, config: seen.append(config) or x
    )
    head = HeadConfig(steps=1, corruption=corruption)
    attach(Conv3(1, 3).eval(), [torch.rand(6, *SHAPE)], 3, head_config=head)
    TIETrainer(make_small("multilayer"), TINY, [], head_config=head).epoch(make_batches())
    assert len(seen) > 1
    assert set(seen) == {corruption}
