"""What a head is fitted to, and when the fit ends."""

import pytest
import torch
from conftest import refused

from tie_ext.models.head import GarbageHead
from tie_ext.training.config import HeadConfig
from tie_ext.training.fit_head import fit_head


def test_end_of_a_fit_and_the_best_weights(monkeypatch):
    monkeypatch.setattr("tie_ext.training.fit_head.ENOUGH", 100)
    head, noise = GarbageHead({}, 4), torch.randn(400, 4)
    seen: list[int] = []
    head.network[0].register_forward_hook(lambda part, args, output: seen.append(len(output)))
    fit_head(head, noise[:200], noise[200:], HeadConfig(steps=100_000, batch_size=50))
    steps = seen.count(50)
    assert 100 <= steps < 5000  # where there is nothing to learn
    assert seen.count(40) == steps // 25  # of those held out
    low, high = noise[:200] - 3, noise[200:] + 3
    fit_head(
        head, low, high, HeadConfig(steps=200, lr=0.01)
    )  # the weights of the smallest loss stay
    assert (head(high) > 0).all()
    assert (head(low) < 0).all()


def test_weight_of_outliers_in_a_fit():
    head, same = GarbageHead({}, 4), torch.randn(20, 4)
    fit_head(head, same, same.repeat(5, 1), HeadConfig(steps=300, lr=0.01, weight=3.0))
    assert head(same).sigmoid().mean().item() == pytest.approx(0.75, abs=0.02)


def test_statistics_that_no_head_is_fitted_to():
    statistics = torch.rand(9, 4)
    outside = statistics.clone()
    outside[0, 0] = torch.nan
    with refused("Expected a finite loss of the garbage head"):
        fit_head(GarbageHead({}, 4), statistics, outside, HeadConfig(steps=2))
