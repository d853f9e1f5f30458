"""Held-out images that are training images are found, whatever the loaders."""

import warnings

import pytest
import torch

from tie_ext.utils import duplicates
from tie_ext.utils.duplicates import Digests, warn_of_repeated


def of(x, size: int) -> Digests:
    found = Digests()
    for part in x[torch.randperm(len(x))].split(size):
        found.add(part)
    return found


@pytest.mark.parametrize("most", [100_000, 200])
@pytest.mark.parametrize(("same", "warned"), [(0, False), (15, False), (60, True), (300, True)])
def test_images_seen_before_are_found_in_any_order_and_batch(same, warned, most, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_DIGESTS", most)
    x, new = torch.rand(1000, 3, 12, 20), torch.rand(300, 3, 12, 20)
    training, held_out = of(x, 64), of(torch.cat([x[:same], new[same:]]).double(), 7)
    share = training.repeated(held_out)
    assert share == pytest.approx(same / 300, abs=0 if most > 1000 else 0.07)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warn_of_repeated(training, held_out)
    if most > 1000:
        assert bool(said) == warned
        assert not said or f"{share:.0%} of the held-out images are training images" in str(
            said[0]
        )


def test_images_that_differ_in_one_place_in_many_are_told_apart_where_they_differ_at_all():
    x = torch.rand(1, 1, 28, 28).repeat(2, 1, 1, 1)
    x[1] += 1e-6
    assert len(set(of(x, 2).found.tolist())) == 2
