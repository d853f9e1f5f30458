r"""Several OOD scores combined: each is brought to a common scale on ID images, then summed.

Symbols: ``scores (N, k)``, those of N images by k detectors, larger = more OOD; ``z`` standardised
scores; ``w`` weights in the body, ``v`` in the tail; ``p`` conformal p-values.

The scale is learned from ID images alone, so that no OOD image is needed to combine. It does not
bound the false-alarm rate: the threshold of :func:`tie_ext.scores.threshold.calibrate` does, which
is set on other ID images, whatever the dependence between the scores.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.utils.checks import check_finite, describe

QUANTILE = 0.9
"""Share of ID images to which the tail adds nothing. What scores that do not rank near images say
of nine ID images in ten is noise in a sum."""
ROUNDING = 1e-6
"""Relative differences of float32 scores that say nothing."""


class Weights(NamedTuple):
    """How much each of k scores counts."""

    body: Tensor
    """``(k,)`` weights in the mean, >= 0."""
    tail: Tensor
    """``(k,)`` weights in the tail, >= 0."""


class Reference(NamedTuple):
    """The scores of N ID images by k detectors, which set the scale of a new score."""

    mean: Tensor
    """``(k,)``."""
    deviation: Tensor
    """``(k,)`` standard deviations, > 0."""
    ordered: Tensor
    """``(N, k)``, each column in ascending order."""
    weights: Tensor | None = None
    """``(k,)`` weights in the body, >= 0 and not all 0. None: all 1."""
    tail: Tensor | None = None
    """``(k,)`` weights in the tail, >= 0, with which its standard deviation is 1; None for no
    tail."""
    edge: Tensor | None = None
    """Where the tail begins, a scalar; None where ``tail`` is."""

    def standardise(self, scores: Tensor) -> Tensor:
        """Scores ``(B, k)`` in deviations from the ID mean, ``(B, k)``; larger = more OOD."""
        return (scores - self.mean) / self.deviation

    def p_values(self, scores: Tensor) -> Tensor:
        """Share of ID images that score at least as high as each of the scores ``(B, k)``.

        Returns:
            p ``(B, k)`` in [1 / (N+1), 1]; smaller = more OOD. The image itself is counted, so
            that p <= a has probability at most a for an ID image. All scores above the N share one
            p-value.

        References:
            S. Bates et al. *Testing for outliers with conformal p-values*. Annals of Statistics,
            2023.
        """
        as_high = (self.ordered >= scores[:, None]).sum(dim=1)
        return (1 + as_high).to(scores.dtype) / (len(self.ordered) + 1)


def reference(
    scores: Tensor, weights: Weights | None = None, names: Sequence[str] = ()
) -> Reference:
    """Learn the scale of each score.

    Arguments:
        scores: Scores ``(N, k)`` of ID images, larger = more OOD.
        weights: How much each counts; None for a plain mean. A body of zeros is one of ones.
        names: What gave each score, for errors.

    Raises:
        ValueError: If they are not a finite floating-point matrix of two rows or more, or a column
            has one value only.
    """
    good = isinstance(scores, Tensor) and scores.ndim == 2 and scores.is_floating_point()
    if not good or len(scores) < 2 or not scores.shape[1]:
        raise ValueError(
            f"Expected floating-point scores of shape (N, k) with N >= 2 and k >= 1, "
            f"but got {describe(scores)}"
        )
    check_finite(scores, "scores")
    ordered, deviation = scores.sort(dim=0).values, scores.std(dim=0)
    # Scores of equal images differ by rounding, as batches of other sizes round otherwise.
    rounding = ROUNDING * torch.maximum(ordered[0].abs(), ordered[-1].abs())
    constant = ((ordered[-1] - ordered[0] <= rounding) | (deviation == 0)).nonzero().flatten()
    if len(constant):
        column = int(constant[0])
        raise ValueError(
            f"Expected scores that differ between ID images, but got "
            f"{ordered[0, column].item():.4g} for all "
            + (f"from {names[column]}; leave it out" if names else f"in column {column}")
        )
    if weights is None:
        return Reference(scores.mean(dim=0), deviation, ordered)
    body, tail = (of.to(scores) for of in weights)
    body = torch.ones_like(body) if not bool((body > 0).any()) else body
    learned = Reference(scores.mean(dim=0), deviation, ordered, body)
    sums = (learned.standardise(scores) * tail).sum(dim=1).sort().values
    if not sums[-1] - sums[0] > ROUNDING * tail.sum():  # none has a tail, or they cancel
        return learned
    spread, last = sums.std(), math.ceil(QUANTILE * len(sums)) - 1
    return learned._replace(tail=tail / spread, edge=sums[last] / spread)


def body_and_tail(learned: Reference, scores: Tensor) -> Tensor:
    r"""Weighted mean of standardised scores, and a tail:
    :math:`\frac{\sum_i w_i z_i}{\sum_i w_i} + \max(0, \sum_i v_i z_i - q)`.

    Scores that find far images and are blind to near ones would blur the mean. Their own sum,
    which has standard deviation 1, adds nothing until it exceeds :math:`q`, its 0.9 quantile on ID
    images.

    Arguments:
        learned: The scale of the scores, the weights :math:`w` and :math:`v`, and :math:`q`.
        scores: ``(B, k)``, larger = more OOD.

    Returns:
        Combined score ``(B,)``, larger = more OOD.
    """
    z = learned.standardise(scores)
    if learned.weights is None:
        return z.mean(dim=1)
    body = (z * learned.weights).sum(dim=1) / learned.weights.sum()
    if learned.tail is None or learned.edge is None:
        return body
    return body + ((z * learned.tail).sum(dim=1) - learned.edge).clamp_min(0)


def zsum(learned: Reference, scores: Tensor) -> Tensor:
    r"""Sum of standardised scores, :math:`\sum_i z_i / \sqrt k`.

    Stouffer's rule sums normal quantiles of p-values. Here: standardised scores, because they also
    rank scores above those of all N ID images, which share one p-value.

    Arguments:
        learned: The scale of the scores.
        scores: ``(B, k)``, larger = more OOD.

    Returns:
        Combined score ``(B,)``, larger = more OOD.

    References:
        S. Stouffer et al. *The American Soldier*, volume 1, 1949.
    """
    return learned.standardise(scores).sum(dim=1) / scores.shape[1] ** 0.5


def largest(learned: Reference, scores: Tensor) -> Tensor:
    """The largest standardised score ``(B,)`` of scores ``(B, k)``; larger = more OOD.

    Tippett's rule takes the smallest p-value. Here: the largest standardised score, as in
    :func:`zsum`.

    References:
        L. Tippett. *The Methods of Statistics*, 1931.
    """
    return learned.standardise(scores).amax(dim=1)


def _fisher(learned: Reference, scores: Tensor) -> Tensor:
    r""":math:`-2 \sum_i \log p_i` (R. Fisher, 1932)."""
    return -2 * learned.p_values(scores).log().sum(dim=1)


def _simes(learned: Reference, scores: Tensor) -> Tensor:
    r""":math:`-\log \min_i \frac{k}{i} p_{(i)}` (R. Simes, 1986)."""
    ordered = learned.p_values(scores).sort(dim=1).values
    k = scores.shape[1]
    return -(ordered * k / torch.arange(1, k + 1, device=scores.device)).amin(dim=1).log()


def _separate_tails(learned: Reference, scores: Tensor) -> Tensor:
    r"""As 0.3.0 combined them: :math:`\frac{\sum_i w_i z_i}{\sum_i w_i} + 0.75 \sum_{j: w_j = 0}
    \max(0, z_j - q_j)` with the 0.9 quantile of each score."""
    z = learned.standardise(scores)
    if learned.weights is None:
        return z.mean(dim=1)
    row = learned.ordered[math.ceil(QUANTILE * len(learned.ordered)) - 1]
    excess = (z - learned.standardise(row)).clamp_min(0) * (learned.weights == 0)
    return (z * learned.weights).sum(dim=1) / learned.weights.sum() + 0.75 * excess.sum(dim=1)


Rule = Callable[[Reference, Tensor], Tensor]
RULES: dict[str, Rule] = {"tail": body_and_tail, "zsum": zsum, "max": largest}
"""Rules by name, the default first. The others know no weights."""
FORMULAS: dict[str, Rule] = {
    **RULES,
    "tails": _separate_tails,
    "fisher": _fisher,
    "simes": _simes,
}
""":data:`RULES`, and those that only detectors of 0.2.0 and 0.3.0 name."""


def check_rule(rule: object) -> str:
    """Refuse anything but the name of a rule.

    Raises:
        ValueError: With the names there are and what came.
    """
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"Expected a rule, one of {', '.join(RULES)}, but got {rule!r}")
    return rule
