"""The threshold, and the bounded pool."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.pool import GarbagePool


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=50), st.floats(-2, 2))
def test_cutoff_is_mean_plus_lambda_std(values, lam):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    assert exclusion_threshold(torch.tensor(values), lam) == pytest.approx(
        mean + lam * std, abs=1e-9
    )


def test_cutoff_of_minus_infinity_excludes_everything():
    assert exclusion_threshold(torch.zeros(5), -math.inf) == -math.inf


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
    low, high = (
        torch.tensor([-2.0, 0.0, 1.0]).view(3, 1, 1),
        torch.tensor([2.0, 1.0, 5.0]).view(3, 1, 1),
    )
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


def test_images_of_a_filling_pool_keep_their_order():
    pool = GarbagePool(4, (1, 2, 2))
    assert len(pool) == 0
    first, second = torch.rand(3, 1, 2, 2), torch.rand(1, 1, 2, 2)
    pool.add(first)
    assert (len(pool), pool.offered) == (3, 3)
    pool.add(second)
    state = pool.state_dict()
    assert torch.equal(state["images"], (torch.cat([first, second]) * 255).round().to(torch.uint8))
    pool.add(torch.rand(5, 1, 2, 2))
    assert (len(pool), pool.offered, pool.state_dict()["offered"]) == (4, 9, 9)
    pool.add(torch.rand(0, 1, 2, 2))
    assert pool.offered == 9


def test_probability_and_slots_of_a_full_pool():
    torch.manual_seed(0)
    taken = 0
    for _ in range(300):
        pool = GarbagePool(2, (1, 1, 1))
        pool.add(torch.zeros(2, 1, 1, 1))
        pool.add(torch.ones(1, 1, 1, 1))
        taken += int((pool.state_dict()["images"] == 255).sum())
    assert 150 < taken < 250  # two in three
    pool = GarbagePool(1, (1, 1, 1))
    shades = [0.0, 0.25, 0.5, 0.75, 1.0]
    pool.add(torch.tensor(shades).view(5, 1, 1, 1))
    assert pool.state_dict()["images"].item() in {round(255 * shade) for shade in shades}


def test_pool_clamps_values_and_takes_any_type():
    pool = GarbagePool(6, (1, 1, 1), low=-1.0, high=3.0)
    pool.add(torch.tensor([-2.0, 4.0, 1.0]).view(3, 1, 1, 1).requires_grad_())
    pool.add(torch.tensor([-1.0, 3.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1))
    assert pool.state_dict()["images"].flatten().tolist() == [0, 255, 128, 0, 255, 128]
    assert {round(v, 2) for v in pool.draw(200).flatten().tolist()} == {-1.0, 3.0, 1.01}
    assert pool.draw(0).shape == (0, 1, 1, 1)


def test_drawing_is_with_replacement_from_what_is_held():
    pool = GarbagePool(10, (1, 1, 1))
    pool.add(torch.tensor([0.2, 0.8]).view(2, 1, 1, 1))
    drawn = pool.draw(300).flatten()
    assert drawn.unique().numel() == 2
    assert 100 < (drawn > 0.5).sum() < 200


@pytest.mark.parametrize("offered", [-1, 2.5, True, "3", 2**53 + 1])
def test_a_pool_was_offered_a_whole_number_of_images(offered):
    pool = GarbagePool(3, (1, 2, 2))
    with pytest.raises(ValueError, match=r"Expected offered "):
        pool.load_state_dict(
            {"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "offered": offered}
        )
    pool.load_state_dict({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8), "offered": 0})
    pool.load_state_dict({"images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8), "offered": 2**53})
    assert (len(pool), pool.offered) == (3, 2**53)


def test_a_pool_goes_on_where_its_state_was_taken():
    pool, other = GarbagePool(3, (1, 2, 2)), GarbagePool(3, (1, 2, 2))
    pool.add(torch.rand(7, 1, 2, 2))
    other.load_state_dict(pool.state_dict())
    assert (len(other), other.offered) == (3, 7)
    assert torch.equal(other.state_dict()["images"], pool.state_dict()["images"])
    with pytest.raises(
        ValueError,
        match=r"Expected 3 uint8 garbage images of shape \(1, 2, 2\), but got torch.float32",
    ):
        other.load_state_dict({"images": torch.zeros(3, 1, 2, 2), "offered": 7})
    with pytest.raises(ValueError, match="Expected 2 uint8 garbage images"):
        other.load_state_dict({"images": pool.state_dict()["images"], "offered": 2})


@pytest.mark.parametrize("capacity", [0, 2.5, 10**10])
def test_a_pool_of_no_size_is_refused(capacity):
    with pytest.raises(ValueError, match="Expected pool_size to be an integer in"):
        GarbagePool(capacity, (1, 2, 2))


def as_it_was(pool, x, out):
    """The pool's rule on images that were gathered and converted first, all of them."""
    x = (
        ((x[out].float() - pool.low) / (pool.high - pool.low) * 255)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )
    for i, u in enumerate(torch.rand(len(x), dtype=torch.float64)):
        count = pool.offered + i
        slot = count if count < len(pool.images) else int(u * (count + 1))
        if slot < len(pool.images):
            pool.images[slot] = x[i]
    pool.offered += len(x)


@pytest.mark.parametrize("converted", [1, 12, 2**20])
def test_conversion_of_the_kept_images_alone(converted, monkeypatch):
    monkeypatch.setattr("tie_ext.training.pool.CONVERTED", converted)
    pools = [GarbagePool(20, (1, 2, 2), low=-1.0, high=2.0) for _ in range(2)]
    for seed in range(12):
        rng = torch.Generator().manual_seed(seed)
        x, out = torch.rand(9, 1, 2, 2, generator=rng) * 3 - 1, torch.rand(9, generator=rng) < 0.6
        for pool, add in zip(pools, (GarbagePool.add, as_it_was), strict=True):
            torch.manual_seed(seed)
            add(pool, x, out)
    assert pools[0].offered == pools[1].offered > 40
    assert torch.equal(pools[0].images, pools[1].images)


def test_a_full_pool_converts_few(monkeypatch):
    pool = GarbagePool(10, (1, 2, 2))
    pool.offered = 10_000
    copied = []
    monkeypatch.setattr(
        torch.Tensor, "float", lambda self: copied.append(len(self)) or self.to(torch.float32)
    )
    pool.add(torch.rand(100, 1, 2, 2))
    assert sum(copied) < 10
