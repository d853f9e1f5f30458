"""How far distances are trusted: a formula of ID images, and what it must not depend on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores.trust import BLIND, TRUSTED, error_auroc, trust

seeds = st.integers(0, 10**6)


def draw(seed: int, count: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, some of them equal, and confidences."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=rng) * 4).round(), torch.rand(count, generator=rng)


@given(seeds)
def test_expectation_over_pairs(seed):
    scores, p = draw(seed)
    above = (scores[:, None] > scores).double() + 0.5 * (scores[:, None] == scores)
    mass = (1 - p.double())[:, None] * p.double()
    assert error_auroc(scores, p) == pytest.approx(float((above * mass).sum() / mass.sum()))


def test_errors_that_are_known():
    right = torch.tensor([1.0, 1, 1, 0])  # the last is certainly wrong
    assert error_auroc(torch.tensor([1.0, 2, 3, 4]), right) == 1
    assert error_auroc(torch.tensor([2.0, 3, 4, 1]), right) == 0
    assert error_auroc(torch.tensor([1.0, 3, 2, 2]), right) == 0.5
    assert error_auroc(torch.randn(4), torch.ones(4)) == 0.5  # none is known


@given(seeds, st.floats(0.1, 10), st.floats(-5, 5))
def test_orders_and_scales(seed, scale, shift):
    scores, p = draw(seed)
    rows = torch.randperm(len(p), generator=torch.Generator().manual_seed(seed))
    found = error_auroc(scores, p)
    assert error_auroc((scale * scores + shift)[rows], p[rows]) == pytest.approx(found)
    assert error_auroc(-scores, p) == pytest.approx(1 - found)
    assert 0 <= trust(scores, p) <= 1


def test_share_of_the_weight_by_auroc():
    for share in (0.0, 0.25, 0.5, 1.0):
        wanted = BLIND + share * (TRUSTED - BLIND)
        # One image is wrong for certain, and is above so many of a thousand that are right.
        scores = torch.cat([torch.arange(1000.0), torch.tensor([1000 * wanted - 0.5])])
        p = torch.cat([torch.ones(1000), torch.zeros(1)])
        assert trust(scores, p) == pytest.approx(share, abs=1e-6)
    assert trust(torch.arange(3.0), torch.tensor([0.0, 1, 1])) == 0
    assert trust(torch.arange(3.0), torch.tensor([1.0, 1, 0])) == 1


@given(seeds)
def test_same_as_the_weighted_auroc_of_scikit_learn(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    scores, p = draw(seed)
    wrong, weights = torch.arange(2 * len(p)) < len(p), torch.cat([1 - p, p])
    expected = metrics.roc_auc_score(wrong, scores.repeat(2), sample_weight=weights)
    assert error_auroc(scores, p) == pytest.approx(expected)
