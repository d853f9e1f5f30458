"""The formulas: UE, the score and the two levels."""

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tie_ext import decide, ood_score, uncertainty

logit_rows = hnp.arrays("float32", st.tuples(st.integers(1, 5), st.integers(3, 12)), elements=st.floats(-30, 30, width=32)).map(torch.from_numpy)


def test_uncertainty_is_the_papers_formula():
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.double)
    delta = torch.tensor([1.0, 0.0, 0.0], dtype=torch.double)
    by_hand = 1 - ((p - 1 / 3) ** 2).sum() / ((delta - 1 / 3) ** 2).sum()
    assert uncertainty(p).item() == pytest.approx(by_hand.item())


@pytest.mark.parametrize("K", [2, 3, 11, 201])
def test_uncertainty_is_0_for_one_hot_and_1_for_uniform(K):
    assert uncertainty(torch.eye(K)).abs().max() < 1e-6
    assert uncertainty(torch.full((1, K), 1 / K)).item() == pytest.approx(1)


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
    torch.testing.assert_close(ood_score(logits.double()), (p[:, -1] / others).log(), rtol=1e-6, atol=1e-6)


def test_score_has_no_hole_at_confident_garbage():
    sure_id, unsure, sure_garbage = [20.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 20.0]
    decision = decide(torch.tensor([sure_id, unsure, sure_garbage]))
    assert decision.score.argsort().tolist() == [0, 1, 2]
    assert decision.uncertainty.argmax() == 1  # which UE alone would rank as the most OOD


def test_score_still_ranks_where_probabilities_are_rounded_to_1():
    score = ood_score(torch.tensor([[0.0, 0.0, 50.0], [0.0, 0.0, 60.0]]))
    assert score[1] > score[0]


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.long), torch.full((1, 3), float("nan")), [1.0]])
def test_bad_logits_are_refused(bad):
    with pytest.raises(ValueError, match=r"Expected .* but got"):
        decide(bad)
