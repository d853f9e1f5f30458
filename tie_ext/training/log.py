"""The log of an epoch, with the classifier's answers to candidates (the paper's Figure 3)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tie_ext.scores.decision import uncertainty
from tie_ext.utils.distributed import total


@dataclass(frozen=True)
class EpochLog:
    """One epoch. Lists have an entry for each of the n+1 outputs, garbage last; a value that does
    not exist is None."""

    epoch: int
    """From 1."""
    losses: dict[str, float]
    """``classifier``: weighted cross-entropy, beside a head on every layer with adversarial steps
    plus :func:`tie_ext.training.adversarial.max_log_prob`; ``head``: that of such a head; ``kl``,
    ``ce``, ``cosine``: the terms of the inversion loss, unweighted."""
    accuracy: float
    """Accuracy of the n+1 outputs on ID training images, after training, in [0, 1]."""
    tau: float | None
    """Threshold on UE; None where there is none (lambda = -inf)."""
    proposed: list[int]
    """Candidates aimed at each output."""
    excluded: list[int]
    """Of these, how many were excluded into the garbage class."""
    pool: int
    """Images in the garbage pool after the epoch."""
    agreement: list[float | None]
    """Share of the candidates that landed in the output they were aimed at, in [0, 1]."""
    entropy: list[float | None]
    """Mean entropy of the candidates' outputs, nats."""
    confidence: list[float | None]
    """Their mean largest probability."""
    margin: list[float | None]
    """Mean difference of their two largest probabilities."""
    uncertainty: list[float | None]
    """Their mean UE."""
    seconds: dict[str, float]
    """Wall-clock time of ``train``, ``invert`` and ``exclude``, which alone differs
    between equal runs."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "EpochLog":
        """The log of an epoch in a file.

        Raises:
            KeyError: If a field is missing.
            ValueError: If one is not what it should be.
        """
        for f in fields(cls):
            if not _FITS[f.type](record[f.name]):
                kind = getattr(f.type, "__name__", f.type)
                raise ValueError(
                    f"Expected {f.name} of an epoch to be of type {kind}, but got "
                    f"{record[f.name]!r}"
                )
        if len({len(value) for value in record.values() if isinstance(value, list)}) > 1:
            raise ValueError(
                "Expected lists of one length in the log of an epoch, one entry an output, but "
                "got several lengths"
            )
        return cls(**{f.name: record[f.name] for f in fields(cls)})


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _finite(value: object) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _whole(value)


_FITS: dict[Any, Callable[[Any], bool]] = {
    int: _whole,
    float: _finite,
    float | None: lambda value: value is None or _finite(value),
    list[int]: lambda value: isinstance(value, list) and all(map(_whole, value)),
    list[float | None]: lambda value: (
        isinstance(value, list) and all(entry is None or _finite(entry) for entry in value)
    ),
    dict[str, float]: lambda value: (
        isinstance(value, dict) and {*map(type, value), *map(type, value.values())} <= {str, float}
    ),
}
"""Whether a value is of a field's type."""


class CandidateTally:
    """Means over candidates, for each of the n+1 outputs they were aimed at.

    Arguments:
        num_outputs: n+1.
    """

    NAMES = ("agreement", "entropy", "confidence", "margin", "uncertainty")

    def __init__(self, num_outputs: int):
        self.proposed = torch.zeros(num_outputs, dtype=torch.long)
        self.excluded = torch.zeros(num_outputs, dtype=torch.long)
        self.sums = torch.zeros(num_outputs, len(self.NAMES), dtype=torch.double)

    def add(self, p: Tensor, y: Tensor, out: Tensor) -> None:
        """Count candidates.

        Arguments:
            p: Their probabilities ``(M, n+1)``.
            y: The output each was aimed at ``(M,)``.
            out: Which were excluded into the garbage class ``(M,)``, bool.
        """
        top = p.topk(2, dim=1)
        entropy = -(p * p.clamp_min(1e-12).log()).sum(1)
        values = [
            (top.indices[:, 0] == y).float(),
            entropy,
            top.values[:, 0],
            top.values[:, 0] - top.values[:, 1],
            uncertainty(p),
        ]
        y = y.cpu()
        self.proposed += y.bincount(minlength=len(self.proposed))
        self.excluded += y[out.cpu()].bincount(minlength=len(self.proposed))
        self.sums.index_add_(0, y, torch.stack(values, dim=1).double().cpu())

    def result(self, device: torch.device) -> dict[str, list]:
        """Counts ``proposed`` and ``excluded``, and the mean of each of :attr:`NAMES`, of all
        processes, which communicate on a device; None where nothing was proposed.
        """
        self.proposed, self.excluded, self.sums = (
            total(x, device) for x in (self.proposed, self.excluded, self.sums)
        )
        counts = self.proposed.tolist()
        means = {
            name: [
                total / count if count else None
                for total, count in zip(column.tolist(), counts, strict=True)
            ]
            for name, column in zip(self.NAMES, self.sums.T, strict=True)
        }
        return {"proposed": counts, "excluded": self.excluded.tolist(), **means}
