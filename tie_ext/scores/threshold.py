r"""Thresholds from ID scores: the split-conformal one, and the paper's tau of exclusion.

Symbols: ``scores (N,)`` of ID inputs, larger = more OOD; :math:`\alpha` = ``false_alarm``, the
share of new ID inputs that may be rejected.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Binomial

from tie_ext.scores.combination import FORMULAS, Reference, Weights, reference
from tie_ext.utils.checks import check_choice, check_finite, check_number

SPLIT_SEED = 0
"""Seed of the split into a scale half and a threshold half."""
MAX_REPEATED = 0.05
"""Share of held-out images that may be training images. A network is more certain of these, so
that with more of them it rejects more new images than the threshold says."""


GUARANTEES = ("average", "pac")
"""What ``false_alarm`` bounds: the rate on average over held-out sets, or of the one at hand."""


@dataclass(frozen=True)
class Guarantee:
    """What a threshold promises, by name.

    Arguments:
        kind: ``average``: on average over draws of the held-out images, at most ``false_alarm`` of
            new ID images are rejected. ``pac`` (probably approximately correct): the rate of the
            held-out images at hand is at most that, with probability ``confidence`` over draws of
            them.
        confidence: In (0, 1); for ``pac``.
        per_class: Keep the promise for the images of each predicted class, by a threshold of its
            own.

    Raises:
        ValueError: If there is no guarantee of that name, or ``confidence`` is out of range.
    """

    kind: str = "average"
    confidence: float = 0.95
    per_class: bool = False

    def __post_init__(self) -> None:
        check_choice("a guarantee,", self.kind, GUARANTEES)
        check_number("confidence", self.confidence, 0, 1, above=True)
        if self.confidence == 1:
            raise ValueError("Expected confidence below 1, but got 1")

    @property
    def probability(self) -> float | None:
        """The confidence of ``pac``; None for ``average``."""
        return self.confidence if self.kind == "pac" else None

    def threshold(self, scores: Tensor, labels: Tensor | None, false_alarm: float) -> Tensor:
        """Largest score of an accepted input: a scalar, or one for each class
        (:func:`class_thresholds`).

        Raises:
            ValueError: As :func:`conformal_threshold` does, or if ``per_class`` has no labels.
        """
        if not self.per_class:
            return conformal_threshold(scores, false_alarm, self.probability)
        if labels is None:
            raise ValueError(
                "Expected the predicted class of each calibration image for a threshold per "
                "class, but got none; fit the detector again"
            )
        return class_thresholds(scores, labels, false_alarm, self.probability)


class Calibration(NamedTuple):
    """What held-out ID images give a combination of scores."""

    reference: Reference
    """The scale of each score, from the scale half."""
    scores: Tensor | None
    """Combined scores ``(M,)`` of the threshold half; None without a false-alarm rate."""
    labels: Tensor | None
    """Predicted classes ``(M,)`` of the threshold half; None where they are not given."""
    threshold: Tensor | None
    """Largest score of an accepted input; None without a false-alarm rate."""


def calibrate(
    scores: Tensor,
    rule: str,
    false_alarm: float | None,
    weights: Weights | None = None,
    labels: Tensor | None = None,
    guarantee: Guarantee = Guarantee(),
    names: Sequence[str] = (),
) -> Calibration:
    """Learn the scale of each score on one half of the ID images, and the threshold on the other.

    As no image is in both halves, the false-alarm rate of the threshold holds whatever the rule
    and the dependence between the scores. The split is random, with a fixed seed.

    Arguments:
        scores: Scores ``(N, k)`` of held-out ID images by k detectors, larger = more OOD.
        rule: How they are combined, a name in :data:`tie_ext.scores.combination.FORMULAS`.
        false_alarm: Share of new ID images that may be rejected, in (0, 1]; None for no threshold,
            and all images set the scale.
        weights: How much each counts, as :func:`tie_ext.scores.combination.reference` takes it.
        labels: Predicted classes ``(N,)``, which a guarantee per class needs.
        guarantee: What ``false_alarm`` bounds.
        names: What gave each score, for errors.

    Raises:
        ValueError: If there are too few images, or a score is not finite or the same for all.
    """
    scale_rows, threshold_rows = split(len(scores), false_alarm, guarantee.probability)
    learned = reference(scores[scale_rows.to(scores.device)], weights, names)
    if false_alarm is None:
        return Calibration(learned, None, None, None)
    combined = FORMULAS[rule](learned, scores[threshold_rows.to(scores.device)])
    labels = None if labels is None else labels[threshold_rows.to(labels.device)]
    threshold = guarantee.threshold(combined, labels, false_alarm)
    return Calibration(learned, combined, labels, threshold)


def split(
    count: int, false_alarm: float | None, confidence: float | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of a scale half and of a threshold half, none in common; all set the scale where there
    is no false-alarm rate.

    Raises:
        ValueError: If there are fewer than :func:`images_needed`.
    """
    if count < (needed := images_needed(false_alarm, confidence)):
        purpose = (
            "to set the scale of the scores"
            if false_alarm is None
            else f"for a false-alarm rate of {false_alarm}{_with(confidence)}, half of them to "
            "set the threshold"
        )
        raise ValueError(f"Expected at least {needed} ID images {purpose}, but got {count}")
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    half = count if false_alarm is None else count // 2
    return rows[:half], rows[half:]


def images_needed(false_alarm: float | None, confidence: float | None = None) -> int:
    """Fewest ID images for :func:`calibrate`: two to set the scale, and in each half no fewer than
    :func:`calibration_size` less one.
    """
    if false_alarm is None:
        return 2
    return max(2 * calibration_size(false_alarm, confidence) - 1, 4)


def conformal_threshold(
    scores: Tensor, false_alarm: float, confidence: float | None = None
) -> Tensor:
    r"""Largest score of an accepted input, such that a new ID input is rejected with probability
    at most ``false_alarm``.

    On average, the split-conformal quantile: the k-th smallest of N calibration scores,
    :math:`k = \lceil (N+1)(1-\alpha) \rceil`. The bound holds for :math:`N \geq 1/\alpha - 1`
    and every distribution of scores, on average over calibration sets, as long as the input is
    exchangeable with the calibration inputs, on which the network must not have been trained.

    With a confidence :math:`1 - \delta`, for these calibration inputs: with r of N above the
    threshold, the rate has the distribution Beta(r+1, N-r), so that r is the largest for which a
    binomial variable of N trials with :math:`\alpha` is at most r with probability at most
    :math:`\delta`. The calibration inputs have to be independent draws.

    Arguments:
        scores: Scores ``(N,)`` of held-out ID inputs, larger = more OOD.
        false_alarm: :math:`\alpha` in (0, 1].
        confidence: :math:`1 - \delta` in (0, 1); None for the bound on average.

    Returns:
        The threshold, a scalar tensor; accept where ``score <= threshold``.

    Raises:
        ValueError: If ``false_alarm`` is out of range, or N is below :func:`calibration_size`,
            where only a threshold above all scores would keep the bound.

    References:
        V. Vovk, A. Gammerman, G. Shafer. *Algorithmic Learning in a Random World*, 2005; J. Lei et
        al., JASA 2018 (split conformal). V. Vovk. *Conditional validity of inductive conformal
        predictors*, 2012, proposition 2 (with a confidence).
    """
    needed = calibration_size(false_alarm, confidence)
    if len(scores) < needed:
        raise ValueError(
            f"Expected at least {needed} ID images to guarantee a false-alarm rate of "
            f"{false_alarm}{_with(confidence)}, but got {len(scores)}"
        )
    check_finite(scores, "scores")
    above = _above(len(scores), false_alarm, confidence)
    return scores.sort().values[max(len(scores) - 1 - above, 0)]


def _above(count: int, false_alarm: float, confidence: float | None) -> int:
    """How many of the calibration scores may lie above the threshold; -1 where the bound does not
    hold even with none.
    """
    if confidence is None:
        # Of the decimal that was written: 0.29 * 100 is 28.999999999999996 in floating point.
        return int(Fraction(str(false_alarm)) * (count + 1)) - 1
    above = Binomial(count, torch.tensor(false_alarm, dtype=torch.float64))
    log_p = above.log_prob(torch.arange(count, dtype=torch.float64))
    return int((log_p.logcumsumexp(0).exp() <= 1 - confidence).sum()) - 1


def class_thresholds(
    scores: Tensor, labels: Tensor, false_alarm: float, confidence: float | None = None
) -> Tensor:
    """A threshold for each predicted class that has :func:`calibration_size` images.

    For the inputs of such a class the bound of :func:`conformal_threshold` holds; with a
    confidence, for each class by itself. Other classes have the threshold of all inputs, and no
    bound of their own.

    Arguments:
        scores: Scores ``(N,)`` of held-out ID inputs, larger = more OOD.
        labels: Their predicted classes ``(N,)``.
        false_alarm: In (0, 1].
        confidence: In (0, 1); None for the bound on average.

    Returns:
        ``(m+1,)``: those of the classes 0 to m-1, then that of all inputs, for the classes from m
        on, which none of the inputs was predicted to be.

    Raises:
        ValueError: If a number is out of range, or no class has enough inputs.

    References:
        V. Vovk, A. Gammerman, G. Shafer. *Algorithmic Learning in a Random World*, 2005, section
        4.5 (Mondrian conformal prediction).
    """
    needed, counts = calibration_size(false_alarm, confidence), labels.bincount()
    if not len(counts) or counts.max() < needed:
        raise ValueError(
            f"Expected at least {needed} ID images of a predicted class to guarantee a "
            f"false-alarm rate of {false_alarm}{_with(confidence)} for it, but got at most "
            f"{int(counts.max()) if len(counts) else 0}"
        )
    found = conformal_threshold(scores, false_alarm, confidence).repeat(len(counts) + 1)
    for label in (counts >= needed).nonzero().flatten().tolist():
        found[label] = conformal_threshold(scores[labels == label], false_alarm, confidence)
    return found


def calibration_size(false_alarm: float, confidence: float | None = None) -> int:
    r"""Fewest ID images for :func:`conformal_threshold`: :math:`\lceil 1/\alpha \rceil - 1` and at
    least one; with a confidence :math:`1 - \delta` the smallest N with
    :math:`(1 - \alpha)^N \leq \delta`.

    Raises:
        ValueError: If ``false_alarm`` is out of range.
    """
    check_number("false_alarm", false_alarm, 0, 1, above=True)
    if confidence is None:
        return max(-(-1 // Fraction(str(false_alarm))) - 1, 1)
    if false_alarm == 1:
        return 1
    size = math.floor(math.log(1 - confidence) / math.log1p(-false_alarm))
    while _above(size, false_alarm, confidence) < 0:  # once or twice, at the edge of rounding
        size += 1
    return size


def _with(confidence: float | None) -> str:
    return "" if confidence is None else f" with confidence {confidence}"


def exclusion_threshold(u: Tensor, lam: float) -> float:
    """The dynamic threshold ``tau = mean + lam * std`` of the ID uncertainties.

    Arguments:
        u: UE of the ID samples ``(N,)``.
        lam: The paper's lambda; -inf excludes every candidate, as TIE's predecessor does.

    References:
        TIE, section 4.4 and algorithm 1, line 15.
    """
    if lam == -float("inf"):
        return lam
    u = u.double()  # a float32 sum over a large set would lose the digits that matter
    return float(u.mean() + lam * u.std(correction=0))
