"""Several scores made one: the formulas, what they must not depend on, and the guarantee that
conformal calibration gives them.
"""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores.combination import FORMULAS, body_and_tails, check_rule, reference
from tie_ext.scores.threshold import conformal_threshold

rules = pytest.mark.parametrize("rule", list(FORMULAS))
seeds = st.integers(0, 10**6)


def draw(
    seed: int, count: int, k: int = 3, correlation: float = 0.8, step: float = 0.0
) -> torch.Tensor:
    """Correlated scores ``(count, k)`` of different scales and shapes; tied on a grid where there
    is a step.
    """
    rng = torch.Generator().manual_seed(seed)
    common, own = torch.randn(count, 1, generator=rng), torch.randn(count, k, generator=rng)
    scores = correlation * common + (1 - correlation**2) ** 0.5 * own
    scores = torch.round(scores / step) * step if step else scores
    return (
        torch.where(torch.arange(k) % 2 == 1, scores.exp(), scores) * 10.0 ** torch.arange(k) - 5
    )


def test_p_values_count_who_scores_as_high_ties_and_the_image_itself_included():
    learned = reference(torch.tensor([[1.0], [2.0], [2.0], [3.0]]))
    p = learned.p_values(torch.tensor([[0.0], [1.0], [2.0], [2.5], [3.0], [9.0]]))
    assert (p.flatten() * 5).tolist() == pytest.approx([5, 5, 4, 2, 2, 1])


@given(seeds, st.sampled_from([0.0, 0.5]))
def test_p_values_of_scores_that_are_not_finite(seed, step):
    learned, new = reference(draw(seed, 40, step=step)), draw(seed + 1, 30, step=step)
    new[0, 0], new[1, 1], new[2, 2] = math.nan, math.inf, -math.inf
    by_search = torch.searchsorted(learned.ordered.T.contiguous(), new.T.contiguous()).T
    torch.testing.assert_close(learned.p_values(new), (41 - by_search) / 41)


def test_every_rule_is_the_formula_of_its_paper():
    learned = reference(
        torch.tensor([[0.0, 10.0], [1.0, 30.0], [2.0, 20.0]])
    )  # deviations 1 and 10
    score = torch.tensor([[2.0, 15.0]])  # z of 1 and -1/2, p of 2/4 and 3/4
    found = {name: rule(learned, score).item() for name, rule in FORMULAS.items()}
    half, most = torch.tensor(0.5), torch.tensor(0.75)
    assert found["tails"] == pytest.approx((1 - 0.5) / 2)
    assert found["zsum"] == pytest.approx((1 - 0.5) / 2**0.5)
    assert found["fisher"] == pytest.approx(-2 * (half.log() + most.log()).item())
    assert found["simes"] == pytest.approx(-most.log().item())  # of 2 * 2/4 and 3/4
    assert found["max"] == pytest.approx(1)


def test_simes_is_the_smallest_of_the_weighted_ordered_p_values():
    scores = draw(0, 50)
    learned, new = reference(scores), draw(1, 20)
    p = learned.p_values(new).sort(dim=1).values
    by_hand = torch.stack([3 * p[:, 0], 3 * p[:, 1] / 2, p[:, 2]], dim=1).amin(dim=1)
    torch.testing.assert_close(FORMULAS["simes"](learned, new), -by_hand.log())


@rules
@given(seeds, st.integers(0, 2), st.floats(0, 1e3))
def test_a_larger_score_of_a_member_never_makes_the_combination_smaller(rule, seed, column, more):
    learned, new = reference(draw(seed, 40)), draw(seed + 1, 10)
    raised = new.clone()
    raised[:, column] += more
    assert (FORMULAS[rule](learned, raised) >= FORMULAS[rule](learned, new)).all()


@rules
@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_the_order_of_the_members_is_nothing(rule, order):
    ours, new = draw(3, 60, step=0.5), draw(4, 20)
    torch.testing.assert_close(
        FORMULAS[rule](reference(ours[:, order]), new[:, order]),
        FORMULAS[rule](reference(ours), new),
    )


@rules
@given(seeds, st.floats(0.01, 100), st.floats(-100, 100))
def test_the_unit_of_a_member_is_nothing(rule, seed, scale, shift):
    ours, new = draw(seed, 40).double(), draw(seed + 1, 10).double()
    a, b = torch.tensor([1.0, scale, 1.0]).double(), torch.tensor([0.0, shift, 0.0]).double()
    torch.testing.assert_close(
        FORMULAS[rule](reference(ours * a + b), new * a + b),
        FORMULAS[rule](reference(ours), new),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("rule", ["fisher", "simes"])
def test_rules_on_p_values_see_the_order_of_scores_alone(rule):
    ours, new = draw(5, 60), draw(6, 20)
    assert torch.equal(
        FORMULAS[rule](reference(ours.atan()), new.atan()), FORMULAS[rule](reference(ours), new)
    )


@rules
def test_one_member_alone_is_ranked_as_by_itself(rule):
    ours, new = draw(7, 400, k=1), draw(8, 50, k=1)
    combined = FORMULAS[rule](reference(ours), new)
    order = new.flatten().argsort()
    assert (combined[order].diff() >= 0).all()


def test_standardised_scores_go_on_ranking_where_p_values_have_ended():
    learned = reference(draw(0, 50))
    far = torch.tensor([[1e3] * 3, [1e4] * 3])
    assert FORMULAS["zsum"](learned, far).diff() > 0
    assert FORMULAS["max"](learned, far).diff() > 0
    assert FORMULAS["fisher"](learned, far).diff() == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(5), r"shape \(N, k\)"),
        (torch.zeros(1, 2), "N >= 2"),
        (torch.zeros(5, 0), "k >= 1"),
        (torch.zeros(5, 2).long(), "floating-point"),
        (torch.tensor([[0.0], [float("nan")]]), "1 NaN or infinite values, the first in row 1"),
        (
            torch.tensor([[0.0, 3.0], [1.0, 3.0]]),
            "differ between ID images, but got 3 for all in column 1",
        ),
        ([[1.0]], "got list"),
    ],
)
def test_scores_that_set_no_scale_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        reference(scores)


def test_a_rule_that_is_none_is_refused():
    assert check_rule("max") == "max"
    for bad in ("mean", "fisher", None, ["max"]):
        with pytest.raises(ValueError, match="one of tails, zsum, max, but got"):
            check_rule(bad)


# Body and tails.

WEIGHTS = torch.tensor([1.0, 0.0, 2.0])
weightings = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=3, max_size=3).map(
    torch.tensor
)


def test_body_and_tails_is_its_formula():
    scores = torch.arange(20.0)[:, None] * torch.tensor([1.0, 10.0, 100.0])
    learned, deviation = reference(scores, WEIGHTS), scores[:, 0].std()
    new = torch.tensor([[0.0, 170.0, 0.0], [9.5, 190.0, 950.0], [19.0, 270.0, 950.0]])
    body = torch.tensor([-9.5, 0, 9.5 / 3])  # the third counts twice
    tail = torch.tensor([0, 2.0, 10.0])  # above 17, the eighteenth of twenty
    torch.testing.assert_close(
        body_and_tails(learned, new), (body + 0.75 * tail) / deviation, rtol=1e-5, atol=1e-5
    )


@given(seeds, weightings, st.integers(0, 2), st.floats(0, 1e3))
def test_a_larger_score_never_makes_body_and_tails_smaller(seed, weights, column, more):
    learned, new = reference(draw(seed, 40), weights), draw(seed + 1, 10)
    raised = new.clone()
    raised[:, column] += more
    assert (body_and_tails(learned, raised) >= body_and_tails(learned, new) - 1e-5).all()


@given(seeds, weightings, st.sampled_from(list(permutations(range(3)))))
def test_weights_go_with_their_scores(seed, weights, order):
    ours, new = draw(seed, 40), draw(seed + 1, 10)
    torch.testing.assert_close(
        body_and_tails(reference(ours[:, order], weights[list(order)]), new[:, order]),
        body_and_tails(reference(ours, weights), new),
        rtol=1e-4,
        atol=1e-4,
    )


@given(seeds, st.floats(0.01, 100), st.floats(-100, 100))
def test_the_unit_of_a_tail_is_nothing(seed, scale, shift):
    ours, new = draw(seed, 40).double(), draw(seed + 1, 10).double()
    a, b = torch.tensor([1.0, scale, 1.0]).double(), torch.tensor([0.0, shift, 0.0]).double()
    torch.testing.assert_close(
        body_and_tails(reference(ours * a + b, WEIGHTS), new * a + b),
        body_and_tails(reference(ours, WEIGHTS), new),
        rtol=1e-6,
        atol=1e-6,
    )


@given(seeds)
def test_a_tail_adds_nothing_below_its_quantile_and_something_above(seed):
    ours, new = draw(seed, 40), draw(seed + 1, 10)
    learned, quantile = reference(ours, WEIGHTS), ours[:, 1].sort().values[35]
    below, above = new.clone(), new.clone()
    below[:, 1] = torch.minimum(below[:, 1], quantile)
    above[:, 1] = torch.maximum(above[:, 1], quantile) + ours[:, 1].std()
    body = (learned.standardise(new)[:, [0, 2]] * torch.tensor([1.0, 2.0])).sum(1) / 3
    torch.testing.assert_close(body_and_tails(learned, below), body, rtol=1e-4, atol=1e-4)
    assert (body_and_tails(learned, above) >= body + 0.7).all()


@given(seeds, st.sampled_from([None, torch.ones(3), torch.full((3,), 2.0), torch.zeros(3)]))
def test_without_tails_or_without_a_body_it_is_the_mean(seed, weights):
    ours, new = draw(seed, 40), draw(seed + 1, 10)
    learned = reference(ours, weights)
    torch.testing.assert_close(
        body_and_tails(learned, new), learned.standardise(new).mean(1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("rule", ["zsum", "max", "fisher", "simes"])
def test_the_other_rules_know_no_weights(rule):
    ours, new = draw(3, 60), draw(4, 20)
    weighted = FORMULAS[rule](reference(ours, WEIGHTS), new)
    assert torch.equal(weighted, FORMULAS[rule](reference(ours), new))


# The guarantee.


def false_alarms(
    rule: str,
    alpha: float,
    step: float,
    correlation: float,
    draws: int = 400,
    half: int = 39,
    k: int = 3,
) -> torch.Tensor:
    """Share of new ID images that are rejected, for each of many draws of held-out images."""
    rates = []
    for seed in range(draws):
        scores = draw(seed, 2 * half + 200, k, correlation, step)
        learned = reference(scores[:half], torch.arange(float(k)))
        threshold = conformal_threshold(FORMULAS[rule](learned, scores[half : 2 * half]), alpha)
        rates.append((FORMULAS[rule](learned, scores[2 * half :]) > threshold).float().mean())
    return torch.stack(rates)


@rules
@pytest.mark.parametrize(
    ("step", "correlation"), [(0.0, 0.0), (0.0, 0.95), (1.5, 0.0), (1.5, 0.95)]
)
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_false_alarm_rate_holds_whatever_the_dependence(rule, step, correlation, alpha):
    rates = false_alarms(rule, alpha, step, correlation)
    margin = (
        3 * rates.std() / len(rates) ** 0.5
    )  # standard errors of the mean: it is passed by chance once in 740
    assert rates.mean() <= alpha + margin
    if not step and rule in (
        "tails",
        "zsum",
        "max",
    ):  # without ties it is no smaller than it has to be: 39 + 1 images reject 2 or 8
        assert rates.mean() >= alpha - margin
