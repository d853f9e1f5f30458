r"""Thresholds from ID scores: the split-conformal one, and the paper's tau of exclusion.

Symbols: ``scores (N,)`` of ID inputs, larger = more OOD; :math:`\alpha` = ``false_alarm``, the
share of new ID inputs that may be rejected.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.scores.combination import FORMULAS, Reference, reference
from tie_ext.utils.checks import check_finite, check_number

SPLIT_SEED = 0
"""Seed of the split into a scale half and a threshold half."""


class Calibration(NamedTuple):
    """What held-out ID images give a combination of scores."""

    reference: Reference
    """The scale of each score, from the scale half."""
    scores: Tensor | None
    """Combined scores ``(M,)`` of the threshold half; None without a false-alarm rate."""
    threshold: Tensor | None
    """Largest score of an accepted input, a scalar; None without a false-alarm rate."""


def calibrate(
    scores: Tensor,
    rule: str,
    false_alarm: float | None,
    weights: Tensor | None = None,
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
        weights: Weights ``(k,)`` of the scores, as
            :func:`tie_ext.scores.combination.reference` takes them.
        names: What gave each score, for errors.

    Raises:
        ValueError: If there are too few images, or a score is not finite or the same for all.
    """
    scale_rows, threshold_rows = split(len(scores), false_alarm)
    learned = reference(scores[scale_rows.to(scores.device)], weights, names)
    if false_alarm is None:
        return Calibration(learned, None, None)
    combined = FORMULAS[rule](learned, scores[threshold_rows.to(scores.device)])
    return Calibration(learned, combined, conformal_threshold(combined, false_alarm))


def split(count: int, false_alarm: float | None) -> tuple[Tensor, Tensor]:
    """Rows of a scale half and of a threshold half, none in common; all set the scale where there
    is no false-alarm rate.

    Raises:
        ValueError: If there are fewer than :func:`images_needed`.
    """
    if count < (needed := images_needed(false_alarm)):
        purpose = (
            "to set the scale of the scores"
            if false_alarm is None
            else f"for a false-alarm rate of {false_alarm}, half of them to set the threshold"
        )
        raise ValueError(f"Expected at least {needed} ID images {purpose}, but got {count}")
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    half = count if false_alarm is None else count // 2
    return rows[:half], rows[half:]


def images_needed(false_alarm: float | None) -> int:
    """Fewest ID images for :func:`calibrate`: two to set the scale, and in each half no fewer than
    :func:`calibration_size` less one.
    """
    return 2 if false_alarm is None else max(2 * calibration_size(false_alarm) - 1, 4)


def conformal_threshold(scores: Tensor, false_alarm: float) -> Tensor:
    r"""Largest score of an accepted input, such that a new ID input is rejected with probability
    at most ``false_alarm``.

    The split-conformal quantile: the k-th smallest of N calibration scores,
    :math:`k = \lceil (N+1)(1-\alpha) \rceil`. The bound holds for :math:`N \geq 1/\alpha - 1`
    and every distribution of scores, on average over calibration sets, as long as the input is
    exchangeable with the calibration inputs, on which the network must not have been trained.

    Arguments:
        scores: Scores ``(N,)`` of held-out ID inputs, larger = more OOD.
        false_alarm: :math:`\alpha` in (0, 1].

    Returns:
        The threshold, a scalar tensor; accept where ``score <= threshold``.

    Raises:
        ValueError: If ``false_alarm`` is out of range, or N is below :math:`1/\alpha - 1`, where
            only a threshold above all scores would keep the bound.

    References:
        V. Vovk, A. Gammerman, G. Shafer. *Algorithmic Learning in a Random World*, 2005; J. Lei et
        al., JASA 2018 (split conformal).
    """
    needed = calibration_size(false_alarm)
    # Of the decimal that was written, since 0.29 * 100 is 28.999999999999996 in floating point.
    rejected = int(Fraction(str(false_alarm)) * (len(scores) + 1))
    if rejected < 1:
        raise ValueError(
            f"Expected at least {needed} ID images to guarantee a false-alarm rate of "
            f"{false_alarm}, but got {len(scores)}"
        )
    check_finite(scores, "scores")
    return scores.sort().values[max(len(scores) - rejected, 0)]


def calibration_size(false_alarm: float) -> int:
    r"""Fewest ID images for :func:`conformal_threshold`, :math:`\lceil 1/\alpha \rceil - 1` and at
    least one.

    Raises:
        ValueError: If ``false_alarm`` is out of range.
    """
    check_number("false_alarm", false_alarm, 0, 1, above=True)
    return max(-(-1 // Fraction(str(false_alarm))) - 1, 1)


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
