r"""Whether a stream of scores comes as the held-out ones came: an exchangeability martingale.

Symbols: ``z`` scores, of M held-out inputs and then of a stream; ``p`` conformal p-values of the
stream; ``t`` inputs of the stream so far; ``k`` bets.

As long as all scores are exchangeable, the rank of each among itself and *all earlier ones*, ties
broken at random, makes independent uniform p-values. (Ranks among the held-out scores alone are
uniform but dependent: a martingale on them raises false alarms in 4 streams of 10.) Money bet on p
at fair odds then exceeds ``1 / alarm`` with probability at most ``alarm``, over any number of
inputs (Ville's inequality).

Scores are counted in bins that are fixed before any score is seen: :func:`bins` of exchangeable
scores are exchangeable, and ties are broken at random, so that the p-values stay exact. Edges
taken from the held-out scores would not leave them so.

References:
    V. Vovk. *Testing randomness online*. Statistical Science, 2021. V. Vovk, I. Nouretdinov, A.
    Gammerman. *Testing exchangeability on-line*, ICML 2003 (the power bets, and their mixture). J.
    Shin, A. Ramdas, A. Rinaldo. *E-detectors*, 2023 (money kept for changes that come later).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FINENESS = 256
"""Bins in a unit of a score near 0. Far from it bins are as wide as 1/256 of the score."""
LIMIT = 90 * FINENESS
"""The largest bin, of scores around 1e38, and minus the smallest."""
POWERS = np.array([0.25, 0.5])
"""Exponents of the bets that find extreme scores soon."""
SLOPES = np.array([0.5, 1.0])
"""Slopes of the bets that find small shifts, and need fewer held-out scores for it."""
BETS = 2 * (len(POWERS) + len(SLOPES))
"""The first half wins where scores rise, the second where they fall."""


def bins(scores: ArrayLike) -> NDArray[np.int64]:
    """The bin ``(N,)`` of each score ``(N,)``; a larger score has the same or a larger bin."""
    near = FINENESS * np.arcsinh(np.asarray(scores, dtype=np.float64))
    return np.rint(near).clip(-LIMIT, LIMIT).astype(np.int64)


def p_value(above: ArrayLike, ties: ArrayLike, count: ArrayLike, u: ArrayLike) -> NDArray:
    """Conformal p-value in (0, 1], small where a score is high.

    Arguments:
        above: Earlier scores that are higher.
        ties: Earlier scores that are equal.
        count: Earlier scores.
        u: Uniform in (0, 1], which breaks ties.
    """
    return (np.asarray(above) + np.asarray(u) * (np.asarray(ties) + 1)) / (np.asarray(count) + 1)


def gains(p: ArrayLike) -> NDArray:
    r"""What each bet pays for p-values ``(...)`` in (0, 1]: ``(..., k)``.

    :math:`\epsilon p^{\epsilon - 1}` for each power, :math:`1 + a (1 - 2p)` for each slope, and
    the same of :math:`1 - p`; each integrates to 1 over p.
    """
    p = np.asarray(p, dtype=np.float64)[..., None]
    sides = (p, np.maximum(1 - p, 1e-12))
    paid = ((POWERS * q ** (POWERS - 1), 1 + SLOPES * (1 - 2 * q)) for q in sides)
    return np.concatenate([part for side in paid for part in side], axis=-1)


def kept(t: ArrayLike) -> NDArray:
    """Money not yet bet after ``t`` inputs, of 1: a change that comes late still finds some."""
    return 1 / np.sqrt(1 + np.asarray(t, dtype=np.float64))


def bet(capital: NDArray, t: int, gain: NDArray) -> NDArray:
    """Money ``(..., k)`` on each bet after the input ``t``, counted from 1, of ``gain (..., k)``.

    Before the input some of what was kept is added to all bets alike. Capital and what is still
    kept together are a martingale that begins with 1.
    """
    return (capital + (kept(t - 1) - kept(t)) / BETS) * gain
