"""The garbage pool: bounded, uniform over all that was offered, exact to half a step of uint8."""

import pytest
import torch
from conftest import SHAPE, refused
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.training.pool import GarbagePool


def flat(*shades: float) -> torch.Tensor:
    """Images of one value."""
    return torch.tensor(shades).view(-1, 1, 1, 1)


@given(st.integers(1, 30), st.lists(st.integers(1, 20), max_size=8))
def test_size_of_a_pool_and_of_its_memory(capacity, sizes):
    pool = GarbagePool(capacity, (1, 2, 2))
    for size in sizes:
        pool.add(torch.rand(size, 1, 2, 2))
    assert len(pool) == min(capacity, sum(sizes))
    assert pool.images.untyped_storage().nbytes() == capacity * 4


def test_probability_and_slots_of_a_full_pool():
    taken = 0
    for _ in range(300):
        pool = GarbagePool(2, (1, 1, 1))
        pool.add(flat(0, 0))
        pool.add(flat(1))
        taken += int((pool.state_dict()["images"] == 255).sum())
    assert 150 < taken < 250  # two in three
    pool = GarbagePool(1, (1, 1, 1))
    pool.add(flat(0, 0.25, 0.5, 0.75, 1))
    assert pool.state_dict()["images"].item() in (0, 64, 128, 191, 255)


def test_order_and_counts_of_a_filling_pool():
    pool, first, second = GarbagePool(4, (1, 2, 2)), torch.rand(3, 1, 2, 2), torch.rand(1, 1, 2, 2)
    with refused("Expected a garbage pool that holds images"):
        pool.draw(1)
    assert pool.draw(0).shape == (0, 1, 2, 2)
    for images, offered in ((first, 3), (second, 4)):
        pool.add(images)
        assert (len(pool), pool.offered) == (offered, offered)
    expected = (torch.cat([first, second]) * 255).round().byte()
    assert torch.equal(pool.state_dict()["images"], expected)
    pool.add(torch.rand(5, 1, 2, 2))
    pool.add(torch.rand(0, 1, 2, 2))
    assert (len(pool), pool.offered, pool.state_dict()["offered"]) == (4, 9, 9)


def test_values_that_come_back_from_a_pool():
    low, high = torch.tensor([-2.0, 0, 1]).view(3, 1, 1), torch.tensor([2.0, 1, 5]).view(3, 1, 1)
    pool, x = GarbagePool(1, (3, 4, 4), low, high), low + (high - low) * torch.rand(1, 3, 4, 4)
    pool.add(x)
    assert ((pool.draw(1) - x).abs() <= (high - low) / 255 / 2 + 1e-6).all()
    pool = GarbagePool(6, (1, 1, 1), low=-1.0, high=3.0)
    pool.add(flat(-2.0, 4, 1).requires_grad_())
    pool.add(flat(-1, 3, 1).double())
    assert pool.state_dict()["images"].flatten().tolist() == [0, 255, 128, 0, 255, 128]
    drawn = pool.draw(300).flatten()  # with replacement
    assert {round(v, 2) for v in drawn.tolist()} == {-1.0, 3.0, 1.01}
    assert 60 < (drawn == -1).sum() < 140
    assert not torch.equal(drawn[:6], drawn[6:12])  # in random order


@pytest.mark.parametrize("offered", [-1, 2.5, True, "3", 2**53 + 1])
def test_counts_of_a_state_that_are_refused(offered):
    pool = GarbagePool(3, (1, 2, 2))
    images = torch.zeros(3, 1, 2, 2).byte()
    with refused(r"Expected offered "):
        pool.load_state_dict({"images": images, "offered": offered})
    pool.load_state_dict({"images": images[:0], "offered": 0})
    pool.load_state_dict({"images": images, "offered": 2**53})
    assert (len(pool), pool.offered) == (3, 2**53)


def test_state_of_a_pool_and_of_other_pools():
    pool, other = GarbagePool(3, (1, 2, 2)), GarbagePool(3, (1, 2, 2))
    pool.add(torch.rand(7, 1, 2, 2))
    state = pool.state_dict()
    other.load_state_dict(state)
    assert (len(other), other.offered) == (3, 7)
    assert torch.equal(other.images, pool.images)
    for target, images, offered, message in (
        (other, state["images"].float(), 7, r"3 uint8 .* \(1, 2, 2\), but got torch.float32"),
        (other, state["images"], 2, "Expected 2 uint8 garbage images"),
        (GarbagePool(3, (1, 4, 4)), state["images"], 7, "Expected 3 uint8 garbage images"),
    ):
        with refused(message):
            target.load_state_dict({"images": images, "offered": offered})


@pytest.mark.parametrize("capacity", [0, 2.5, 10**10])
def test_capacities_that_are_refused(capacity):
    with refused("Expected pool_size to be an integer in"):
        GarbagePool(capacity, (1, 2, 2))


def add_one_by_one(pool, x, out):
    """The pool's rule on images that were gathered and converted first, all of them."""
    x = ((x[out].float() - pool.low) / (pool.high - pool.low) * 255).round().clamp(0, 255).byte()
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
        x, out = torch.rand(9, 1, 2, 2) * 3 - 1, torch.rand(9) < 0.6
        for pool, add in zip(pools, (GarbagePool.add, add_one_by_one), strict=True):
            torch.manual_seed(seed)
            add(pool, x, out)
    assert pools[0].offered == pools[1].offered > 40
    assert torch.equal(pools[0].images, pools[1].images)
    copied, as_float = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: copied.append(len(x)) or as_float(x))
    pools[0].offered = 10_000
    pools[0].add(torch.rand(100, 1, 2, 2))
    assert sum(copied) < 10


class Asked:
    """A prior that keeps what it was asked for."""

    def __init__(self):
        self.counts = []

    def draw(self, shape):
        self.counts.append(shape[0])
        return torch.rand(shape)


@pytest.mark.parametrize(
    ("most", "at_once", "counts"),
    [(99, 99, [[6], [5], [5]]), (7, 99, [[3], [2], [2]]), (99, 4, [[4, 2], [4, 1], [4, 1]])],
)
def test_shares_of_priors_in_the_first_pool(most, at_once, counts):
    pool, priors = GarbagePool(31, SHAPE), [Asked() for _ in range(3)]
    pool.begin(priors, most, at_once)
    assert [prior.counts for prior in priors] == counts
    assert len(pool) == sum(map(sum, counts))
