r"""From logits to a decision: the class, how uncertain it is, and whether to reject the input.

Symbols: ``n`` in-distribution (ID) classes; ``logits (B, n+1)`` whose last column is the garbage
class; ``p = softmax(logits)``; ``tau`` the uncertainty above which a prediction is rejected.

.. math:: \mathrm{UE}(p) = 1 - \frac{\sum_i (p_i - 1/K)^2}{\sum_i (\delta_{ik} - 1/K)^2},
          \quad k = \arg\max_i p_i

Level 1, the garbage class, comes before level 2, the uncertainty: UE of a confident garbage
prediction is near 0, so that UE alone would accept it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.utils.checks import check_logits


class Decision(NamedTuple):
    """The decision on a batch of ``B`` inputs."""

    label: Tensor
    """``(B,)`` most likely ID class in ``[0, n)``, also where the input is rejected."""
    uncertainty: Tensor
    """``(B,)`` UE in ``[0, 1]``: 0 one-hot, 1 uniform."""
    score: Tensor
    """``(B,)`` larger = more OOD, see :func:`ood_score`."""
    level: Tensor
    """``(B,)`` 0 accepted, 1 rejected as garbage, 2 rejected as too uncertain."""


def uncertainty(p: Tensor) -> Tensor:
    """Uncertainty estimate (UE): the distance of ``p`` from one-hot, relative to uniform.

    Arguments:
        p: Probabilities of K >= 2 outputs ``(..., K)``, each row sums to 1.

    Returns:
        UE ``(...)`` in ``[0, 1]``: 0 for one-hot, 1 for uniform.

    References:
        TIE, section 4.4 (P. Suhail, R. Afroz, A. Sethi).
    """
    # The denominator is the same for every k: (1 - 1/K)^2 + (K-1)/K^2 = 1 - 1/K.
    K = p.shape[-1]
    return (1 - (p - 1 / K).square().sum(-1) / (1 - 1 / K)).clamp(0, 1)


def ood_score(logits: Tensor, t: float = 1.0) -> Tensor:
    r"""Log-odds of the garbage class against all ID classes: one score for both levels.

    ``logit_garbage - logsumexp(ID logits)`` = ``log(p_n / (1 - p_n))``: far above 0 for a
    confident garbage prediction, far below for a confident ID prediction, between for an undecided
    one. A difference of logits does not saturate where ``p_n`` rounds to 0 or 1, so that it ranks
    confident predictions too. How it was chosen: ``docs/research/defaults.md``.

    Arguments:
        logits: ``(B, n+1)``, the garbage logit last.
        t: Temperature > 0 of the ID classes' log-sum-exp, as in the energy score. 1 gives the
            log-odds; towards 0 only the largest ID logit counts.

    Returns:
        Score ``(B,)``, unbounded, larger = more OOD; with t = 1, 0 where garbage is as likely as
        all ID classes together.
    """
    return logits[:, -1] - t * (logits[:, :-1] / t).logsumexp(dim=1)


def upcast(logits: Tensor) -> Tensor:
    """Logits of half precision as float32, in which sums of their exponentials keep their digits;
    others as they are.
    """
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def decide(logits: Tensor, tau: float | Tensor = 1.0, t: float = 1.0) -> Decision:
    """Reject at two levels: the garbage class first, uncertainty second.

    Arguments:
        logits: ``(B, n+1)``, the garbage logit last; n >= 2.
        tau: Largest UE in ``[0, 1]`` of an accepted prediction. 1, the default, disables level 2.
        t: Temperature of the score; label and level do not depend on it.

    Returns:
        The :class:`Decision`, each field ``(B,)``.

    Raises:
        ValueError: If ``logits`` is not a finite floating-point matrix of three or more columns.

    References:
        TIE, algorithm 1, lines 24-32.
    """
    check_logits(logits)
    logits = upcast(logits)
    u = uncertainty(logits.softmax(dim=1))
    garbage = logits.argmax(dim=1) == logits.shape[1] - 1
    level = torch.where(garbage, 1, torch.where(u > tau, 2, 0))
    return Decision(logits[:, :-1].argmax(dim=1), u, ood_score(logits, t), level)


def decide_by_score(
    logits: Tensor, score: Tensor, threshold: float | Tensor, *, garbage: bool = True
) -> Decision:
    """Reject by a threshold on a score.

    The score alone says what is rejected, so that the false-alarm rate is that of the threshold.
    The level says as which: garbage (1) where that class is the most likely, else uncertain (2).

    Arguments:
        logits: ``(B, n+1)``, the garbage logit last; or ``(B, n)`` without ``garbage``.
        score: ``(B,)``, larger = more OOD.
        threshold: Largest score of an accepted input, as
            :func:`tie_ext.scores.threshold.conformal_threshold` gives it; or ``(m+1,)``, one for
            each class, as :func:`tie_ext.scores.threshold.class_thresholds` does.
        garbage: Whether the last logit is that of the garbage class.

    Returns:
        The :class:`Decision`, each field ``(B,)``.

    Raises:
        ValueError: If there is a garbage class, and ``logits`` is not a finite floating-point
            matrix of three or more columns.
    """
    if garbage:
        label, u, _, level = decide(logits)
        rejected = torch.where(level == 1, 1, 2)
    else:
        p = upcast(logits).softmax(dim=1)
        label, u = p.argmax(dim=1), uncertainty(p)
        rejected = torch.full_like(label, 2)
    if isinstance(threshold, Tensor) and threshold.ndim:
        threshold = threshold[label.clamp(max=len(threshold) - 1)]
    return Decision(label, u, score, torch.where(score > threshold, rejected, 0))
