"""What thresholds promise by name: on average, of one held-out set with a confidence, per class."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores.decision import decide_by_score
from tie_ext.scores.threshold import (
    Guarantee,
    calibrate,
    calibration_size,
    class_thresholds,
    conformal_threshold,
    images_needed,
)


def rates(count: int, sets: int, false_alarm: float, confidence: float | None) -> torch.Tensor:
    """The false-alarm rate of each of many held-out sets, of uniform scores."""
    place = int(conformal_threshold(torch.arange(float(count)), false_alarm, confidence))
    return 1 - torch.rand(sets, count).sort(dim=1).values[:, place]


@pytest.mark.parametrize("count", [59, 100, 400])
def test_the_bound_of_one_held_out_set(count):
    # Of 59 images none may lie above, so that 4.85 % of the sets break the bound.
    found = (rates(count, 4000, 0.05, 0.95) > 0.05).double().mean()
    assert 0.01 < found < 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5
    average = rates(count, 4000, 0.05, None)
    assert average.mean() < 0.0505
    assert (average > 0.05).double().mean() > 0.3  # which the average does not prevent


@given(st.integers(1, 3000), st.floats(0.005, 0.9), st.floats(0.05, 0.999))
def test_the_binomial_tail_of_the_threshold(count, false_alarm, confidence):
    binom = pytest.importorskip("scipy.stats").binom
    if count < calibration_size(false_alarm, confidence):
        assert binom.cdf(0, count, false_alarm) > 1 - confidence
        return
    above = (
        count - 1 - int(conformal_threshold(torch.arange(float(count)), false_alarm, confidence))
    )
    assert binom.cdf(above, count, false_alarm) <= (1 - confidence) * (1 + 1e-9)
    more = binom.cdf(above + 1, count, false_alarm)
    assert more >= (1 - confidence) * (1 - 1e-9) or above == count - 1


@pytest.mark.parametrize(
    ("false_alarm", "confidence", "size"),
    [(0.05, None, 19), (0.05, 0.95, 59), (0.01, 0.95, 299), (0.05, 0.99, 90), (1.0, 0.95, 1)],
)
def test_fewest_images_of_a_guarantee(false_alarm, confidence, size):
    assert calibration_size(false_alarm, confidence) == size
    conformal_threshold(torch.rand(size), false_alarm, confidence)
    if size > 1:
        with pytest.raises(ValueError, match=f"Expected at least {size} ID images to guarantee"):
            conformal_threshold(torch.rand(size - 1), false_alarm, confidence)


def test_each_class_with_enough_images_keeps_the_bound():
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
        logits = torch.eye(3)[labels]
        level = decide_by_score(logits, scores, thresholds, garbage=False).level > 0
        rejected += labels[level].bincount(minlength=3)
        one += labels[scores > pooled].bincount(minlength=3)
        seen += labels.bincount(minlength=3)
    assert (rejected / seen)[:2].tolist() == pytest.approx([0.09, 0.09], abs=0.012)
    assert (one / seen)[1] > 0.15  # which one threshold for all does not


@pytest.mark.parametrize(
    ("guarantee", "count", "message"),
    [
        (
            Guarantee("pac"),
            116,
            "at least 117 ID images .* rate of 0.05 with confidence 0.95, half",
        ),
        (Guarantee("pac", 0.5, True), 80, "at least 14 ID images of a predicted class"),
        (Guarantee(per_class=True), 60, "at least 19 ID images of a predicted class"),
    ],
)
def test_too_few_images_for_a_guarantee(guarantee, count, message):
    labels = torch.arange(count) % 6
    with pytest.raises(ValueError, match=message):
        calibrate(torch.rand(count, 2), "zsum", 0.05, None, labels, guarantee)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("sometimes",), "one of average, pac, but got 'sometimes'"),
        (("pac", 1.0), "confidence below 1"),
        (("pac", 0.0), r"confidence to be a number in \(0, 1\]"),
    ],
)
def test_guarantees_that_are_none(given, message):
    with pytest.raises(ValueError, match=message):
        Guarantee(*given)


def test_fewest_images_of_a_combination():
    assert images_needed(0.05) == 37
    assert images_needed(0.05, 0.95) == 117


def test_a_saved_guarantee_decides_as_before(tmp_path):
    pytest.importorskip("pytorch_ood")
    from conftest import make_net
    from pytorch_ood.detector import EnergyBased

    from tie_ext.pytorch_ood import Combined, TIEDetector, load_detector

    net, x = make_net(), torch.rand(120, 1, 28, 28)
    logits = net.eval()(x, garbage=True)
    promise = {"false_alarm": 0.2, "guarantee": "pac", "confidence": 0.6, "per_class": True}
    single = TIEDetector(net, **promise).fit_logits(logits.detach())
    both = Combined([TIEDetector(net), EnergyBased(net)], **promise).fit([x])
    for name, detector in {"single": single, "both": both}.items():
        detector.save(tmp_path / name)
        again = load_detector(tmp_path / name)
        assert {key: getattr(again, key) for key in promise} == promise
        assert again.threshold.tolist() == detector.threshold.tolist()
        assert again.threshold.ndim == 1
        for of in (detector.decide(x), detector.export_module()(x)):
            assert torch.equal(of.level, again.decide(x).level)
        assert torch.equal(again.recalibrate(0.2).threshold, detector.threshold)
        assert again.recalibrate(0.2, per_class=False).threshold.ndim == 0
        assert again.recalibrate(0.2, guarantee="average").threshold < detector.threshold.max()
