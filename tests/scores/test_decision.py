"""The formulas: UE, the score and the two levels."""

import hypothesis.extra.numpy as hnp
import pytest
import torch
from conftest import close, refused
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores.decision import decide, decide_by_score, ood_score, uncertainty, upcast

logit_rows = hnp.arrays(
    "float32",
    st.tuples(st.integers(1, 5), st.integers(3, 12)),
    elements=st.floats(-30, 30, width=32),
).map(torch.from_numpy)


def test_uncertainty_by_the_formula_of_the_paper():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.double)
    one_hot = torch.eye(3, dtype=torch.double)[p.argmax(1)]
    by_hand = 1 - (p - 1 / 3).square().sum(1) / (one_hot - 1 / 3).square().sum(1)
    close(uncertainty(p), by_hand)
    close(uncertainty(p[:, None]), by_hand[:, None])


@pytest.mark.parametrize("K", [2, 3, 201])
def test_uncertainty_of_one_hot_and_uniform_outputs(K):
    assert uncertainty(torch.eye(K)).abs().max() < 1e-6
    assert uncertainty(torch.full((1, K), 1 / K)).item() == pytest.approx(1)


@given(logit_rows)
def test_uncertainty_in_any_order_of_the_classes(logits):
    p = logits.softmax(1)
    u = uncertainty(p)
    assert ((u >= 0) & (u <= 1)).all()
    close(uncertainty(p.flip(1)), u)


@given(logit_rows, st.sampled_from([0.0, 0.3, 1.0]))
def test_levels_of_garbage_first_and_tau_second(logits, tau):
    decision, ids = decide(logits, tau), logits[:, :-1]
    garbage = logits[:, -1] > ids.amax(1)
    assert torch.equal(decision.uncertainty, uncertainty(logits.softmax(1)))
    assert torch.equal(decision.level == 1, garbage)
    assert torch.equal(decision.level == 2, ~garbage & (decision.uncertainty > tau))
    assert torch.equal(ids.gather(1, decision.label[:, None])[:, 0], ids.amax(1))
    assert (decide(logits).level != 2).all()  # by default there is no tau


@given(logit_rows, st.sampled_from([0.5, 1.0, 2.0]))
def test_score_as_garbage_logit_and_energy_of_classes(logits, t):
    energy = -t * (logits[:, :-1].double() / t).exp().sum(1).log()
    score = ood_score(logits.double(), t)
    close(score, logits[:, -1] + energy, rtol=1e-6, atol=1e-6)
    assert torch.equal(decide(logits, t=t).score, ood_score(logits, t))


def test_ranks_of_sure_unsure_and_garbage_logits():
    rows = [[20.0, 0, 0], [1, 1, 1], [0, 0, 20], [0, 0, 50], [0, 0, 60]]
    decision = decide(torch.tensor(rows))
    assert decision.score.argsort().tolist() == [0, 1, 2, 3, 4]
    assert decision.uncertainty.argmax() == 1  # which UE alone would rank as the most OOD


BAD_LOGITS = [torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, 3).long(), [1.0]]


@pytest.mark.parametrize("bad", [*BAD_LOGITS, torch.full((1, 3), float("nan"))])
def test_logits_that_are_no_finite_float_matrix(bad):
    with refused(r"Expected .* but got"):
        decide(bad)


def test_inputs_exactly_at_tau_and_the_threshold():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 5.0]])
    u, score = uncertainty(logits.softmax(1)), ood_score(logits)
    assert decide(logits, u).level.tolist() == [0, 1]
    assert decide(logits, u - 1e-4).level.tolist() == [2, 1]
    for row, level in enumerate((2, 1)):
        assert decide_by_score(logits, score, score[row]).level[row] == 0
        assert decide_by_score(logits, score, score[row] - 1e-3).level[row] == level


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decision_on_logits_of_half_precision(dtype):
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.5]])
    decision = decide(logits.to(dtype), 0.9)
    assert decision.score.dtype == decision.uncertainty.dtype == torch.float32
    assert torch.equal(decision.score, ood_score(logits))
    assert upcast(logits.double()).dtype == torch.float64


@given(logit_rows, st.floats(-20, 20))
def test_levels_of_a_threshold_on_the_score(logits, threshold):
    score, plain = ood_score(logits, 2.0), decide(logits, t=2.0)
    decision = decide_by_score(logits, score, threshold)
    assert torch.equal(decision.level > 0, score > threshold)
    assert torch.equal(decision.level == 1, (score > threshold) & (plain.level == 1))
    assert all(torch.equal(a, b) for a, b in zip(decision[:3], plain[:3], strict=True))


def test_threshold_of_each_predicted_class():
    logits, score = 9 * torch.eye(4), torch.tensor([1.0, 1.0, 3.0, 2.2])
    thresholds = torch.tensor([0.5, 2.0, 2.5])  # the last is of all other classes
    decision = decide_by_score(logits, score, thresholds, garbage=False)
    assert decision.label.tolist() == [0, 1, 2, 3]
    assert decision.level.tolist() == [2, 0, 2, 0]
    assert torch.equal(decision.uncertainty, uncertainty(logits.softmax(1)))
