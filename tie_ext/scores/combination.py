r"""Several OOD scores made one: each is brought to a common scale on ID images, and a rule of meta-analysis combines them.

Symbols: ``scores (N, k)``, the scores of N images by k detectors, larger = more OOD; ``z`` scores standardised, ``p`` conformal p-values.

The scale is learned from ID images alone, so no OOD image is needed to combine. It does not make the combination's false-alarm rate right:
:func:`tie_ext.scores.threshold.conformal_threshold` does, on ID images that the scale was not learned from, whatever the dependence of the scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.utils.checks import check_finite, describe


class Reference(NamedTuple):
    """What a new score is compared with: the scores of N ID images by k detectors."""

    mean: Tensor
    """``(k,)``."""
    deviation: Tensor
    """``(k,)`` standard deviations, > 0."""
    ordered: Tensor
    """``(N, k)`` each column in ascending order."""

    def standardised(self, scores: Tensor) -> Tensor:
        """Scores ``(B, k)`` in deviations from the ID mean, ``(B, k)``; larger = more OOD."""
        return (scores - self.mean) / self.deviation

    def p_values(self, scores: Tensor) -> Tensor:
        """Share of ID images that score as high as each of the scores ``(B, k)``, in [1 / (N+1), 1]; smaller = more OOD.

        The image itself is counted among them, so that p <= a has probability at most a for an ID image (Vovk et al., 2005; Bates et al.,
        *Testing for outliers with conformal p-values*, 2023). Scores above all N have one p-value: it does not rank them.
        """
        n = len(self.ordered)
        return (1 + n - self.below(scores)).to(scores.dtype) / (n + 1)

    def below(self, scores: Tensor) -> Tensor:
        """How many of the N scores are smaller than each of ``(B, k)``; ties are not."""
        return torch.searchsorted(self.ordered.T.contiguous(), scores.T.contiguous()).T


class Counting(Reference):
    """The same by comparing each with each, for ONNX, which knows no search in what is ordered."""

    def below(self, scores: Tensor) -> Tensor:
        """As :meth:`Reference.below`, where what is no number is above all too."""
        return len(self.ordered) - (self.ordered >= scores[:, None]).sum(dim=1)


def reference(scores: Tensor) -> Reference:
    """Learn the scale of each score.

    Arguments:
        scores: Scores ``(N, k)`` of ID images, larger = more OOD.

    Raises:
        ValueError: If they are not a finite floating-point matrix of two rows or more, or a score is the same for all images.
    """
    if (
        not isinstance(scores, Tensor)
        or scores.ndim != 2
        or not scores.is_floating_point()
        or len(scores) < 2
        or not scores.shape[1]
    ):
        raise ValueError(
            f"Expected floating-point scores of shape (N, k) with N >= 2 and k >= 1, but got {describe(scores)}"
        )
    check_finite(scores, "scores")
    ordered, deviation = scores.sort(dim=0).values, scores.std(dim=0)
    constant = (
        ((ordered[0] == ordered[-1]) | (deviation == 0)).nonzero().flatten()
    )  # of equal ones rounding can leave a deviation
    if len(constant):
        column = int(constant[0])
        raise ValueError(
            f"Expected scores that differ between ID images, but got {ordered[0, column].item():.4g} for all in column {column}"
        )
    return Reference(scores.mean(dim=0), deviation, ordered)


def zsum(learned: Reference, scores: Tensor) -> Tensor:
    r"""Combined score ``(B,)`` of scores ``(B, k)``: :math:`\sum_i z_i / \sqrt k`, larger = more OOD.

    Here z is the standardised score, where Stouffer has the normal quantile of a p-value: it goes on ranking where p-values have ended.

    References:
        S. Stouffer et al. *The American Soldier*, volume 1, 1949.
    """
    return learned.standardised(scores).sum(dim=1) / scores.shape[1] ** 0.5


def fisher(learned: Reference, scores: Tensor) -> Tensor:
    r"""Combined score ``(B,)`` of scores ``(B, k)``: :math:`-2 \sum_i \log p_i`, larger = more OOD.

    References:
        R. Fisher. *Statistical Methods for Research Workers*, 4th edition, 1932.
    """
    return -2 * learned.p_values(scores).log().sum(dim=1)


def simes(learned: Reference, scores: Tensor) -> Tensor:
    r"""Combined score ``(B,)`` of scores ``(B, k)``: :math:`-\log \min_i \frac{k}{i} p_{(i)}`, larger = more OOD.

    References:
        R. Simes. *An improved Bonferroni procedure for multiple tests of significance*. Biometrika 73, 1986.
    """
    ordered = learned.p_values(scores).sort(dim=1).values
    k = scores.shape[1]
    return -(ordered * k / torch.arange(1, k + 1, device=scores.device)).amin(dim=1).log()


def largest(learned: Reference, scores: Tensor) -> Tensor:
    """Combined score ``(B,)`` of scores ``(B, k)``: the largest standardised one, larger = more OOD.

    Tippett's rule, which takes the smallest p-value, on a scale that goes on where p-values have ended.

    References:
        L. Tippett. *The Methods of Statistics*, 1931.
    """
    return learned.standardised(scores).amax(dim=1)


RULES: dict[str, Callable[[Reference, Tensor], Tensor]] = {
    "zsum": zsum,
    "fisher": fisher,
    "simes": simes,
    "max": largest,
}
"""Rules by name, the default first."""


def check_rule(rule: object) -> str:
    """Refuse anything but the name of a rule.

    Raises:
        ValueError: With the names there are and what came.
    """
    if not isinstance(rule, str) or rule not in RULES:
        raise ValueError(f"Expected a rule, one of {', '.join(RULES)}, but got {rule!r}")
    return rule
