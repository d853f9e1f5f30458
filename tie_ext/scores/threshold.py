"""Thresholds from ID scores: the split-conformal one of a guarantee, and the paper's tau of exclusion."""

from fractions import Fraction

from torch import Tensor

from tie_ext.utils.checks import check_finite, check_number


def conformal_threshold(scores: Tensor, false_alarm: float) -> Tensor:
    r"""Largest score of an accepted input, such that an ID input is rejected with probability at most ``false_alarm``.

    The split-conformal quantile: the k-th smallest of N calibration scores, :math:`k = \lceil (N+1)(1-\alpha) \rceil`. The bound holds for
    every N >= 1/alpha - 1 and every distribution of scores, on average over calibration sets, as long as the input is exchangeable with the
    calibration inputs, which the network must not have been trained on.

    Arguments:
        scores: Scores ``(N,)`` of held-out ID inputs, larger = more OOD.
        false_alarm: :math:`\alpha` in (0, 1).

    Returns:
        The threshold, a scalar tensor; accept where ``score <= threshold``.

    Raises:
        ValueError: If ``false_alarm`` is out of range, or N is below :math:`1/\alpha - 1`, where only accepting everything would be safe.

    References:
        V. Vovk, A. Gammerman, G. Shafer. *Algorithmic Learning in a Random World*, 2005; J. Lei et al., JASA 2018 (split conformal).
    """
    needed = calibration_size(false_alarm)
    # Of the decimal that was written, since 0.29 * 100 is 28.999999999999996 in floating point.
    rejected = int(Fraction(str(false_alarm)) * (len(scores) + 1))
    if rejected < 1:
        raise ValueError(
            f"Expected at least {needed} ID images to guarantee a false-alarm rate of {false_alarm}, but got {len(scores)}"
        )
    check_finite(scores, "scores")
    return scores.sort().values[max(len(scores) - rejected, 0)]


def calibration_size(false_alarm: float) -> int:
    r"""Fewest ID images for :func:`conformal_threshold`, :math:`\lceil 1/\alpha \rceil - 1`, and at least one.

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
