"""Streams of random numbers, with and without GPUs."""

from itertools import product

import pytest
import torch

from tie_ext.utils.random import seeded


def drawn(*key: int) -> int:
    with seeded(*key):
        return torch.randint(2**62, ()).item()


def test_every_key_is_a_stream_of_its_own():
    keys = [(1,), (1, 0), (1, 0, 0), (1, 0, 0, 0)]
    keys += product(range(2, 5), range(20), range(8))  # seeds, epochs, ranks
    assert len({drawn(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(("started", "forked"), [(False, []), (True, [0, 1])])
def test_gpus_are_forked_where_in_use(monkeypatch, started, forked):
    asked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda gpus: asked.append(list(gpus)) or fork([])
    )
    before = torch.get_rng_state()
    assert drawn(3, 1) == drawn(3, 1)
    assert asked == [forked] * 2
    assert torch.equal(torch.get_rng_state(), before)
