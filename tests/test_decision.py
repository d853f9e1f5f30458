"""The formulas: UE, the score and the two levels."""

from fractions import Fraction

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tie_ext.scores.decision import decide, decide_by_score, ood_score, uncertainty, upcast
from tie_ext.scores.threshold import conformal_threshold

logit_rows = hnp.arrays(
    "float32",
    st.tuples(st.integers(1, 5), st.integers(3, 12)),
    elements=st.floats(-30, 30, width=32),
).map(torch.from_numpy)


def test_uncertainty_is_the_papers_formula():
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.double)
    delta = torch.tensor([1.0, 0.0, 0.0], dtype=torch.double)
    by_hand = 1 - ((p - 1 / 3) ** 2).sum() / ((delta - 1 / 3) ** 2).sum()
    assert uncertainty(p).item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize("K", [2, 3, 11, 201])
def test_uncertainty_is_0_for_one_hot_and_1_for_uniform(K):
    assert uncertainty(torch.eye(K)).abs().max() < 1e-6
    assert uncertainty(torch.full((1, K), 1 / K)).item() == pytest.approx(1)


def test_uncertainty_is_of_the_last_axis():
    p = torch.rand(2, 3, 5).softmax(-1)
    assert torch.equal(uncertainty(p), torch.stack([uncertainty(rows) for rows in p]))
    assert torch.equal(uncertainty(p[0, 0]), uncertainty(p)[0, 0])


@given(logit_rows)
def test_uncertainty_lies_in_0_1_and_ignores_the_order_of_classes(logits):
    p = logits.softmax(1)
    u = uncertainty(p)
    assert ((u >= 0) & (u <= 1)).all()
    torch.testing.assert_close(uncertainty(p.flip(1)), u)


@given(logit_rows)
def test_level_1_is_read_before_level_2(logits):
    decision = decide(logits, tau=0.0)
    garbage = logits.argmax(1) == logits.shape[1] - 1
    assert (decision.level[garbage] == 1).all()
    assert (decision.level[~garbage] != 1).all()
    assert ((decision.level == 2) == (~garbage & (decision.uncertainty > 0))).all()


@given(logit_rows)
def test_tau_of_1_leaves_level_2_off(logits):
    assert (decide(logits).level != 2).all()


@given(logit_rows)
def test_label_is_always_an_id_class(logits):
    label = decide(logits, 0.1).label
    assert ((label >= 0) & (label < logits.shape[1] - 1)).all()


@given(logit_rows)
def test_score_is_the_log_odds_of_garbage(logits):
    p = logits.double().softmax(1)
    others = p[:, :-1].sum(1)  # 1 - p of garbage would lose its digits where that is near 1
    torch.testing.assert_close(
        ood_score(logits.double()), (p[:, -1] / others).log(), rtol=1e-6, atol=1e-6
    )


def test_score_has_no_hole_at_confident_garbage():
    sure_id, unsure, sure_garbage = [20.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 20.0]
    decision = decide(torch.tensor([sure_id, unsure, sure_garbage]))
    assert decision.score.argsort().tolist() == [0, 1, 2]
    assert decision.uncertainty.argmax() == 1  # which UE alone would rank as the most OOD


def test_score_still_ranks_where_probabilities_are_rounded_to_1():
    score = ood_score(torch.tensor([[0.0, 0.0, 50.0], [0.0, 0.0, 60.0]]))
    assert score[1] > score[0]


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(3),
        torch.zeros(2, 2),
        torch.zeros(2, 3, dtype=torch.long),
        torch.full((1, 3), float("nan")),
        [1.0],
    ],
)
def test_bad_logits_are_refused(bad):
    with pytest.raises(ValueError, match=r"Expected .* but got"):
        decide(bad)


@given(logit_rows, st.sampled_from([0.5, 2.0]))
def test_the_temperature_is_that_of_the_id_classes_energy(logits, t):
    energy = -t * (logits[:, :-1].double() / t).exp().sum(1).log()
    torch.testing.assert_close(
        ood_score(logits.double(), t), logits[:, -1].double() + energy, rtol=1e-6, atol=1e-6
    )
    assert torch.equal(decide(logits, t=t).score, ood_score(logits, t))


def test_a_decision_says_what_is_likeliest_how_unsure_it_is_and_why_it_rejects():
    decision = decide(
        torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.9, 0.0], [0.0, 0.0, 1.0, 1.5]]), tau=0.5
    )
    assert decision.label.tolist() == [0, 1, 2]
    assert decision.level.tolist() == [0, 2, 1]
    assert decision.uncertainty[0] < 0.01 < 0.5 < decision.uncertainty[1]
    assert decide(torch.tensor([[0.0, 1.0, 0.9, 0.0]])).level.tolist() == [0]


def test_an_input_as_uncertain_as_tau_is_accepted():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    u = uncertainty(logits.softmax(1))
    assert decide(logits, u).level.item() == 0
    assert decide(logits, u - 1e-4).level.item() == 2


def test_an_input_that_scores_as_much_as_the_threshold_is_accepted():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    score = ood_score(logits)
    for row, (value, level) in enumerate(zip(score, (2, 1), strict=True)):
        assert decide_by_score(logits, score, value).level[row] == 0
        assert decide_by_score(logits, score, value - 1e-3).level[row] == level


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_decided_in_float32(dtype):
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.5]])
    decision = decide(logits.to(dtype), 0.9)
    assert decision.score.dtype == decision.uncertainty.dtype == torch.float32
    assert torch.equal(decision.score, ood_score(logits))
    assert upcast(logits.double()).dtype == torch.float64


@given(logit_rows, st.floats(-20, 20))
def test_a_threshold_decides_by_the_score_alone_and_the_level_says_which_it_is(logits, threshold):
    decision = decide_by_score(logits, ood_score(logits, 2.0), threshold)
    plain = decide(logits, t=2.0)
    rejected = ood_score(logits, 2.0) > threshold
    garbage = logits.argmax(1) == logits.shape[1] - 1
    assert torch.equal(decision.level > 0, rejected)
    assert torch.equal(decision.level == 1, rejected & garbage)
    assert torch.equal(decision.level == 2, rejected & ~garbage)
    assert all(torch.equal(a, b) for a, b in zip(decision[:3], plain[:3], strict=True))


@pytest.mark.parametrize(
    ("count", "false_alarm", "place"),
    [(9, 0.1, 8), (19, 0.1, 17), (99, 0.29, 70), (3, 0.5, 1), (4, 0.99, 0), (1, 0.5, 0)],
)
def test_the_threshold_is_the_conformal_quantile(count, false_alarm, place):
    scores = torch.arange(float(count))[torch.randperm(count)]
    assert conformal_threshold(scores, false_alarm) == place


def test_a_rate_of_one_accepts_what_is_no_worse_than_the_best():
    assert conformal_threshold(torch.tensor([3.0, 1.0, 2.0]), 1.0) == 1.0


@pytest.mark.parametrize(
    ("scores", "false_alarm", "message"),
    [
        (
            torch.zeros(8),
            0.1,
            "Expected at least 9 ID images to guarantee a false-alarm rate of 0.1, but got 8",
        ),
        (
            torch.zeros(98),
            0.01,
            "Expected at least 99 ID images to guarantee a false-alarm rate of 0.01, but got 98",
        ),
        (torch.zeros(8), 0.0, r"Expected false_alarm to be a number in \(0, 1\], but got 0.0"),
        (torch.zeros(8), 1.1, r"Expected false_alarm to be a number in \(0, 1\], but got 1.1"),
        (
            torch.tensor([0.0] * 9 + [float("nan")]),
            0.2,
            "Expected finite scores, but got 1 NaN or infinite values, the first in row 9",
        ),
    ],
)
def test_scores_that_guarantee_nothing_are_refused(scores, false_alarm, message):
    with pytest.raises(ValueError, match=message):
        conformal_threshold(scores, false_alarm)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=60),
    st.sampled_from([0.01, 0.05, 0.1, 0.29, 0.5, 0.99]),
)
def test_of_exchangeable_inputs_the_threshold_accepts_the_share_it_promises(values, false_alarm):
    # Each of the N+1 is as likely as any other to be the new one. Averaging over them all is the
    # guarantee itself, for any values and ties.
    s = torch.tensor(values)
    assume(int(Fraction(str(false_alarm)) * len(s)) >= 1)
    accepted = sum(
        bool(s[i] <= conformal_threshold(torch.cat([s[:i], s[i + 1 :]]), false_alarm))
        for i in range(len(s))
    )
    assert accepted >= (1 - Fraction(str(false_alarm))) * len(s)
    if len(set(values)) == len(
        values
    ):  # and, where there are no ties, no more than one input above it
        assert accepted <= (1 - Fraction(str(false_alarm))) * len(s) + 1
