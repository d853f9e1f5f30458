"""What thresholds promise: on average, of one held-out set with a confidence, per class."""

import math
from fractions import Fraction

import pytest
import torch
from conftest import close, refused
from hypothesis import assume, given
from hypothesis import strategies as st

from tie_ext.scores.combination import zsum
from tie_ext.scores.decision import decide_by_score
from tie_ext.scores.threshold import (
    Guarantee,
    calibrate,
    calibration_size,
    class_thresholds,
    conformal_threshold,
    exclusion_threshold,
    images_needed,
    split,
)


@pytest.mark.parametrize(
    ("count", "false_alarm", "place"),
    [
        (9, 0.1, 8),
        (19, 0.1, 17),
        (99, 0.29, 70),
        (3, 0.5, 1),
        (4, 0.99, 0),
        (1, 0.5, 0),
        (3, 1, 0),
    ],
)
def test_place_of_the_conformal_quantile(count, false_alarm, place):
    scores = torch.arange(float(count))[torch.randperm(count)]
    assert conformal_threshold(scores, false_alarm) == place


@pytest.mark.parametrize(
    ("scores", "false_alarm", "message"),
    [
        (
            torch.zeros(8),
            0.1,
            "at least 9 ID images to guarantee a false-alarm rate of 0.1, but got 8",
        ),
        (torch.zeros(98), 0.01, "at least 99 ID images"),
        (torch.zeros(8), 0.0, r"Expected false_alarm to be a number in \(0, 1\], but got 0.0"),
        (torch.zeros(8), 1.1, "Expected false_alarm"),
        (
            torch.tensor([0.0] * 9 + [math.nan]),
            0.2,
            "1 NaN or infinite values, the first in row 9",
        ),
    ],
)
def test_scores_that_guarantee_nothing(scores, false_alarm, message):
    with refused(message):
        conformal_threshold(scores, false_alarm)


@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=60),
    st.sampled_from([0.01, 0.05, 0.1, 0.29, 0.5, 0.99]),
)
def test_false_alarms_among_exchangeable_scores(values, false_alarm):
    # Each of the N+1 is as likely as any other to be the new one. Averaging over them all is the
    # guarantee itself, for any values and ties.
    s, share = torch.tensor(values), 1 - Fraction(str(false_alarm))
    assume((1 - share) * len(s) >= 1)
    others = [torch.cat([s[:i], s[i + 1 :]]) for i in range(len(s))]
    accepted = sum(
        bool(new <= conformal_threshold(rest, false_alarm))
        for new, rest in zip(s, others, strict=True)
    )
    assert accepted >= share * len(s)
    if len(set(values)) == len(values):  # without ties no more than one input above it
        assert accepted <= share * len(s) + 1


def rates(count: int, sets: int, false_alarm: float, confidence: float | None) -> torch.Tensor:
    """The false-alarm rate of each of many held-out sets, of uniform scores."""
    place = int(conformal_threshold(torch.arange(float(count)), false_alarm, confidence))
    return 1 - torch.rand(sets, count).sort(dim=1).values[:, place]


@pytest.mark.parametrize("count", [59, 100, 400])
def test_false_alarm_bound_of_one_held_out_set(count):
    # Of 59 images none may lie above, so that 4.85 % of the sets break the bound.
    found = (rates(count, 4000, 0.05, 0.95) > 0.05).double().mean()
    assert 0.01 < found < 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5
    average = rates(count, 4000, 0.05, None)
    assert average.mean() < 0.0505
    assert (average > 0.05).double().mean() > 0.3  # which the average does not prevent


@given(st.integers(1, 3000), st.floats(0.005, 0.9), st.floats(0.05, 0.999))
def test_binomial_tail_above_the_threshold(count, false_alarm, confidence):
    binom = pytest.importorskip("scipy.stats").binom
    if count < calibration_size(false_alarm, confidence):
        assert binom.cdf(0, count, false_alarm) > 1 - confidence
        return
    place = int(conformal_threshold(torch.arange(float(count)), false_alarm, confidence))
    above = count - 1 - place
    assert binom.cdf(above, count, false_alarm) <= (1 - confidence) * (1 + 1e-9)
    more = binom.cdf(above + 1, count, false_alarm)
    assert more >= (1 - confidence) * (1 - 1e-9) or above == count - 1


@pytest.mark.parametrize(
    ("false_alarm", "confidence", "size", "needed"),
    [
        (0.05, None, 19, 37),
        (0.05, 0.95, 59, 117),
        (0.01, 0.95, 299, 597),
        (0.05, 0.99, 90, 179),
        (1.0, 0.95, 1, 4),
    ],
)
def test_fewest_images_of_each_guarantee(false_alarm, confidence, size, needed):
    assert calibration_size(false_alarm, confidence) == size
    assert images_needed(false_alarm, confidence) == needed
    conformal_threshold(torch.rand(size), false_alarm, confidence)
    if size > 1:
        with refused(f"Expected at least {size} ID images to guarantee"):
            conformal_threshold(torch.rand(size - 1), false_alarm, confidence)


@pytest.mark.parametrize(("count", "false_alarm"), [(2, None), (41, None), (40, 0.1), (41, 0.1)])
def test_halves_for_the_scale_and_the_threshold(count, false_alarm):
    scale, threshold = split(count, false_alarm)
    assert sorted([*scale.tolist(), *threshold.tolist()]) == list(range(count))
    assert len(scale) == (count if false_alarm is None else count // 2)
    scores, labels = torch.rand(count, 2), torch.arange(count)
    found = calibrate(scores, "zsum", false_alarm, None, labels)
    close(found.reference.mean, scores[scale].mean(0))
    assert (found.threshold is None) == (false_alarm is None)
    if false_alarm:
        assert torch.equal(found.scores, zsum(found.reference, scores[threshold]))
        assert torch.equal(found.labels, labels[threshold])
        assert torch.equal(found.threshold, conformal_threshold(found.scores, false_alarm))


def test_false_alarms_of_each_predicted_class():
    # Class 1 scores three times as high as class 0; class 2 has too few held-out images.
    def draw(count):
        labels = torch.multinomial(torch.tensor([0.6, 0.37, 0.03]), count, replacement=True)
        return torch.randn(count) * torch.tensor([1.0, 3.0, 1.0])[labels], labels

    rejected, seen, one = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for _ in range(150):
        scores, labels = draw(120)
        thresholds, pooled = (
            class_thresholds(scores, labels, 0.1),
            conformal_threshold(scores, 0.1),
        )
        few = labels.bincount(minlength=3) < 9
        assert torch.equal(thresholds[:3] == pooled, few)
        assert thresholds[-1] == pooled
        scores, labels = draw(400)
        level = decide_by_score(torch.eye(3)[labels], scores, thresholds, garbage=False).level
        rejected += labels[level > 0].bincount(minlength=3)
        one += labels[scores > pooled].bincount(minlength=3)
        seen += labels.bincount(minlength=3)
    assert (rejected / seen)[:2].tolist() == pytest.approx([0.09, 0.09], abs=0.012)
    assert (one / seen)[1] > 0.15  # which one threshold for all does not


@pytest.mark.parametrize(
    ("guarantee", "count", "message"),
    [
        (Guarantee("pac"), 116, "at least 117 ID images .* 0.05 with confidence 0.95, half"),
        (Guarantee("pac", 0.5, True), 80, "at least 14 ID images of a predicted class"),
        (Guarantee(per_class=True), 60, "at least 19 ID images of a predicted class"),
    ],
)
def test_too_few_images_for_a_guarantee(guarantee, count, message):
    with refused(message):
        calibrate(torch.rand(count, 2), "zsum", 0.05, None, torch.arange(count) % 6, guarantee)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("sometimes",), "one of average, pac, but got 'sometimes'"),
        (("pac", 1.0), "confidence below 1"),
        (("pac", 0.0), r"confidence to be a number in \(0, 1\]"),
    ],
)
def test_guarantees_that_there_are_not(given, message):
    with refused(message):
        Guarantee(*given)


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=50), st.floats(-2, 2))
def test_exclusion_threshold_by_the_papers_formula(values, lam):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    found = exclusion_threshold(torch.tensor(values), lam)
    assert found == pytest.approx(mean + lam * std, abs=1e-9)
    assert exclusion_threshold(torch.tensor(values), -math.inf) == -math.inf
