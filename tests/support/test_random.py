"""Streams of random numbers, with and without GPUs."""

import pytest
import torch

from tie_ext.utils.random import seeded


@pytest.mark.parametrize(("started", "forked"), [(False, []), (True, [0, 1])])
def test_gpus_are_forked_where_they_are_in_use(monkeypatch, started, forked):
    asked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.random, "fork_rng", lambda gpus: asked.append(list(gpus)) or fork([])
    )
    before = torch.get_rng_state()
    with seeded(3, 1):
        first = torch.rand(2)
    with seeded(3, 1):
        assert torch.equal(torch.rand(2), first)
    with seeded(3):
        assert not torch.equal(torch.rand(2), first)
    assert asked == [forked] * 3
    assert torch.equal(torch.get_rng_state(), before)
