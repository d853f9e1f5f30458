"""The threshold, and the bounded pool."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tie_ext import GarbagePool
from tie_ext.exclusion import cutoff


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=50), st.floats(-2, 2))
def test_cutoff_is_mean_plus_lambda_std(values, lam):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    assert cutoff(torch.tensor(values), lam) == pytest.approx(mean + lam * std, abs=1e-9)


def test_cutoff_of_minus_infinity_excludes_everything():
    assert cutoff(torch.zeros(5), -math.inf) == -math.inf


@given(st.integers(1, 30), st.lists(st.integers(1, 20), max_size=8))
def test_the_pool_never_outgrows_its_size(capacity, sizes):
    pool = GarbagePool(capacity, (1, 2, 2))
    held = pool.images.untyped_storage().nbytes()
    for size in sizes:
        pool.add(torch.rand(size, 1, 2, 2))
    assert len(pool) == min(capacity, sum(sizes))
    assert pool.images.untyped_storage().nbytes() == held == capacity * 4


def test_old_and_new_garbage_are_equally_likely_to_be_held():
    pool = GarbagePool(2000, (1, 1, 1))
    for i in range(20):  # 20 epochs of 1000, each its own shade
        pool.add(torch.full((1000, 1, 1, 1), i / 255))
    shares = pool.state_dict()["images"].flatten().bincount(minlength=20)
    assert shares.sum() == 2000
    assert (shares > 50).all()  # 100 expected, standard deviation 9.2
    assert (shares < 150).all()


def test_images_come_back_to_within_half_a_step_of_uint8():
    low, high = torch.tensor([-2.0, 0.0, 1.0]).view(3, 1, 1), torch.tensor([2.0, 1.0, 5.0]).view(3, 1, 1)
    pool = GarbagePool(1, (3, 4, 4), low, high)
    x = low + (high - low) * torch.rand(1, 3, 4, 4)
    pool.add(x)
    assert ((pool.draw(1) - x).abs() <= (high - low) / 255 / 2 + 1e-6).all()


def test_an_empty_pool_has_nothing_to_draw():
    with pytest.raises(ValueError, match="Expected a garbage pool that holds images"):
        GarbagePool(3, (1, 2, 2)).draw(1)


def test_a_pool_of_another_shape_is_refused():
    pool = GarbagePool(3, (1, 2, 2))
    pool.add(torch.rand(3, 1, 2, 2))
    with pytest.raises(ValueError, match="Expected 3 uint8 garbage images"):
        GarbagePool(3, (1, 4, 4)).load_state_dict(pool.state_dict())
