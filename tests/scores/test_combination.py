"""Several scores made one: the formulas, what they must not depend on, and the guarantee that
conformal calibration gives them.
"""

import math
from itertools import permutations

import pytest
import torch
from conftest import close, refused
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores.combination import FORMULAS, Weights, body_and_tail, check_rule, reference
from tie_ext.scores.threshold import conformal_threshold

rules = pytest.mark.parametrize("rule", list(FORMULAS))
seeds = st.integers(0, 10**6)
columns = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3)
weightings = st.builds(Weights, columns.map(torch.tensor), columns.map(torch.tensor))
WEIGHTS = Weights(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.5, 0.5]))


def draw(seed: int, count: int, correlation: float = 0.8, step: float = 0.0) -> torch.Tensor:
    """Correlated scores ``(count, 3)`` of different scales and shapes; tied on a grid where there
    is a step.
    """
    rng = torch.Generator().manual_seed(seed)
    common, own = torch.randn(count, 1, generator=rng), torch.randn(count, 3, generator=rng)
    scores = (correlation * common + (1 - correlation**2) ** 0.5 * own).double()
    scores = torch.round(scores / step) * step if step else scores
    scores[:, 1] = scores[:, 1].exp()
    return scores * 10.0 ** torch.arange(3) - 5


def test_p_values_with_ties_and_the_image_itself():
    learned = reference(torch.tensor([[1.0], [2.0], [2.0], [3.0]]))
    p = learned.p_values(torch.tensor([[0.0], [1.0], [2.0], [2.5], [3.0], [9.0]]))
    assert (p.flatten() * 5).tolist() == pytest.approx([5, 5, 4, 2, 2, 1])


@given(seeds, st.sampled_from([0.0, 0.5]))
def test_p_values_of_scores_that_are_not_finite(seed, step):
    learned, new = reference(draw(seed, 40, step=step)), draw(seed + 1, 30, step=step)
    new[0, 0], new[1, 1], new[2, 2] = math.nan, math.inf, -math.inf
    by_search = torch.searchsorted(learned.ordered.T.contiguous(), new.T.contiguous()).T
    close(learned.p_values(new), (41 - by_search).double() / 41)


def test_rules_by_the_formulas_of_their_papers():
    learned = reference(torch.tensor([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]]))  # deviations 1, 10
    score = torch.tensor([[2.0, 15.0]])  # z of 1 and -1/2, p of 2/4 and 3/4
    found = {name: rule(learned, score).item() for name, rule in FORMULAS.items()}
    expected = {
        "tail": (1 - 0.5) / 2,
        "tails": (1 - 0.5) / 2,
        "zsum": (1 - 0.5) / 2**0.5,
        "max": 1,
        "fisher": -2 * math.log(0.5 * 0.75),
        "simes": -math.log(0.75),  # of 2 * 2/4 and 3/4
    }
    assert found == pytest.approx(expected)


def test_body_and_tail_by_its_formula():
    scores = torch.arange(20.0)[:, None] * torch.tensor([1.0, 10.0, 100.0])
    learned, deviation = reference(scores, WEIGHTS), scores[:, 0].std()
    new = torch.tensor([[0.0, 170.0, 1700.0], [9.5, 190.0, 1800.0], [19.0, 270.0, 2200.0]])
    body = torch.tensor([-9.5 + 15, 17, 9.5 + 25]) / 3  # the third counts twice
    # Above 17, the eighteenth of twenty; the second counts three times as much as the third.
    tail = torch.tensor([0, (3 * 2 + 1) / 4, (3 * 10 + 5) / 4])
    close(body_and_tail(learned, new), (body + tail) / deviation, rtol=1e-5, atol=1e-5)
    # Of 0.3.0: the second alone, which has no weight in the body.
    old = torch.tensor([0, 2.0, 10.0])
    close(FORMULAS["tails"](learned, new), (body + 0.75 * old) / deviation, rtol=1e-5, atol=1e-5)


@rules
@given(seeds, weightings, st.integers(0, 2), st.floats(0, 1e3))
def test_combination_with_a_larger_score_of_a_member(rule, seed, weights, column, more):
    learned, new = reference(draw(seed, 40), weights), draw(seed + 1, 10)
    raised = new.clone()
    raised[:, column] += more
    assert (FORMULAS[rule](learned, raised) >= FORMULAS[rule](learned, new) - 1e-9).all()


@rules
@given(
    seeds,
    weightings,
    st.sampled_from([list(order) for order in permutations(range(3))]),
    st.floats(0.01, 100),
    st.floats(-100, 100),
)
def test_combination_in_other_orders_and_units(rule, seed, weights, order, scale, shift):
    ours, new = draw(seed, 40), draw(seed + 1, 10)
    a, b = torch.tensor([[1.0, scale, 1.0], [0.0, shift, 0.0]]).double()
    moved = reference((ours * a + b)[:, order], Weights(*(of[order] for of in weights)))
    close(
        FORMULAS[rule](moved, (new * a + b)[:, order]),
        FORMULAS[rule](reference(ours, weights), new),
        rtol=1e-6,
        atol=1e-6,
    )


@given(seeds, st.sampled_from([None, 1.0, 2.0, 0.0]))
def test_mean_of_equal_weights(seed, weight):
    ours, new, none = draw(seed, 40), draw(seed + 1, 10), torch.zeros(3)
    weights = None if weight is None else Weights(none + weight, none)
    learned = reference(ours, weights)
    for rule in ("tail", "tails"):
        close(FORMULAS[rule](learned, new), learned.standardise(new).mean(1))
    if weight is not None:
        zeros, ones = (reference(ours, Weights(none + w, none + 1)) for w in (0, weight or 3))
        close(body_and_tail(zeros, new), body_and_tail(ones, new))


def test_tail_of_scores_that_cancel():
    scores = torch.tensor([[0.1, 2.7, 5.0], [0.7, -1.1, 6.0]])
    weights = Weights(torch.ones(3), torch.tensor([1.0, 1, 0]))
    learned = reference(scores, weights)
    assert learned.tail is learned.edge is None
    close(body_and_tail(learned, scores), learned.standardise(scores).mean(1))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(5), r"shape \(N, k\)"),
        (torch.zeros(1, 2), "N >= 2"),
        (torch.zeros(5, 0), "k >= 1"),
        (torch.zeros(5, 2).long(), "floating-point"),
        (torch.tensor([[0.0], [math.nan]]), "1 NaN or infinite values, the first in row 1"),
        (torch.tensor([[0.0, 3.0], [1.0, 3.0]]), "differ .* but got 3 for all in column 1"),
        ([[1.0]], "got list"),
    ],
)
def test_scores_that_set_no_scale(scores, message):
    with refused(message):
        reference(scores)


@pytest.mark.parametrize("rule", ["mean", "fisher", None, ["max"]])
def test_rules_that_there_are_not(rule):
    assert check_rule("max") == "max"
    with refused("one of tail, zsum, max, but got"):
        check_rule(rule)


@rules
@pytest.mark.parametrize("step", [0.0, 1.5])
@pytest.mark.parametrize("correlation", [0.0, 0.95])
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_false_alarm_rate_with_any_dependence(rule, alpha, step, correlation):
    found = []
    for seed in range(100):
        scores = draw(seed, 278, correlation, step)
        learned = reference(scores[:39], WEIGHTS)
        threshold = conformal_threshold(FORMULAS[rule](learned, scores[39:78]), alpha)
        found.append((FORMULAS[rule](learned, scores[78:]) > threshold).float().mean())
    rates = torch.stack(found)
    margin = 3 * rates.std() / len(rates) ** 0.5  # exceeded by chance once in 740
    assert rates.mean() <= alpha + margin
    # Without ties it is no smaller than it has to be: 39 + 1 images reject 2 or 8.
    if not step and rule in ("tail", "tails", "zsum", "max"):
        assert rates.mean() >= alpha - margin
