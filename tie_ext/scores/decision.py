r"""From logits to a decision: what the network says, how sure it is, and whether to believe it.

Symbols: ``n`` in-distribution (ID) classes; ``logits (B, n+1)`` whose last column is the garbage class;
``p = softmax(logits)``; ``tau`` the uncertainty above which a prediction is rejected.

.. math:: \mathrm{UE}(p) = 1 - \frac{\sum_i (p_i - 1/K)^2}{\sum_i (\delta_{ik} - 1/K)^2}, \quad k = \arg\max_i p_i

Level 1 is read before level 2: UE of a confident garbage hit is near 0, so UE alone would call the pgd outliers the pgd ID samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.utils.checks import check_logits


class Decision(NamedTuple):
    """What TIE says of a batch of ``B`` inputs."""

    label: Tensor
    """``(B,)`` most likely ID class in ``[0, n)``, also where the input is rejected."""
    uncertainty: Tensor
    """``(B,)`` UE over the n+1 outputs in ``[0, 1]``: 0 one-hot, 1 uniform."""
    score: Tensor
    """``(B,)`` larger = more OOD, see :func:`ood_score`."""
    level: Tensor
    """``(B,)`` 0 accepted, 1 rejected by the garbage class, 2 rejected as too uncertain."""


def uncertainty(p: Tensor) -> Tensor:
    """Uncertainty estimate (UE): how far ``p`` is from one-hot, on the way to uniform.

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
    r"""Log-odds of the garbage class against all ID classes, the single scalar that both levels are ranked by.

    ``logit_garbage - logsumexp(logits of the ID classes)`` = ``log(p_n / (1 - p_n))``: a confident garbage hit is far above 0, a confident
    ID prediction far below, an undecided one between. As it is a difference of logits it does not saturate where ``p_n`` rounds to 0 or 1,
    so that it still ranks the inputs about which the network is sure. How it was chosen: ``docs/research/score.md``.

    Arguments:
        logits: ``(B, n+1)``, the garbage logit last.
        t: Temperature > 0 of the ID classes' log-sum-exp, as in the energy score. 1 gives the log-odds; towards 0 only the largest ID logit
            counts.

    Returns:
        Score ``(B,)``, unbounded, larger = more OOD; with t = 1, 0 where garbage is as likely as all ID classes together.
    """
    return logits[:, -1] - t * (logits[:, :-1] / t).logsumexp(dim=1)


def upcast(logits: Tensor) -> Tensor:
    """Logits of half precision as float32, in which sums of their exponentials keep their digits; others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def decide(logits: Tensor, tau: float | Tensor = 1.0, t: float = 1.0) -> Decision:
    """Reject at two levels: the garbage class first, uncertainty second.

    Arguments:
        logits: ``(B, n+1)``, the garbage logit last; n >= 2.
        tau: Largest UE in ``[0, 1]`` of an accepted prediction. 1, the default, leaves level 2 off.
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


def decide_at(logits: Tensor, threshold: float | Tensor, t: float = 1.0) -> Decision:
    """Reject by a threshold on the score, as :func:`tie_ext.scores.threshold.conformal_threshold` gives it.

    What is accepted depends on the score alone, so that the rate of false alarms is that of the threshold; the level says which of the two
    the rejected input is: garbage (1), or uncertain (2).

    Arguments:
        logits: ``(B, n+1)``, the garbage logit last; n >= 2.
        threshold: Largest score of an accepted input.
        t: Temperature of the score.

    Returns:
        The :class:`Decision`, each field ``(B,)``.

    Raises:
        ValueError: If ``logits`` is not a finite floating-point matrix of three or more columns.
    """
    return rejected_above(threshold, decide(logits, t=t))


def rejected_above(threshold: float | Tensor, decision: Decision) -> Decision:
    """A decision whose score alone says what is rejected; its level only says as which of the two."""
    rejected = torch.where(decision.level == 1, 1, 2)
    return decision._replace(level=torch.where(decision.score > threshold, rejected, 0))
