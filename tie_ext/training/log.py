"""What an epoch leaves for people: its log, and how the classifier answers proposed outliers (the paper's Figure 3)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tie_ext.scores.decision import uncertainty


@dataclass(frozen=True)
class EpochLog:
    """What one epoch did. Lists have one entry for each of the n+1 outputs, garbage last; NaN never occurs, an absent value is None."""

    epoch: int
    """From 1."""
    losses: dict[str, float]
    """``classifier``: weighted cross-entropy, with a search beside a head on every layer plus :func:`tie_ext.training.adversarial.max_log_prob`;
    ``kl``, ``ce``, ``cosine``: the terms of the inversion loss, unweighted."""
    accuracy: float
    """Share of the ID training images whose n+1 outputs name their class, after training, in [0, 1]."""
    tau: float | None
    """Threshold on UE; None where there is none (lambda = -inf)."""
    proposed: list[int]
    """Candidates aimed at each output."""
    excluded: list[int]
    """Of these, how many were expelled into the garbage class."""
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
    """Wall-clock time of ``train``, ``invert`` and ``exclude``; the one part of a log that differs between equal runs."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "EpochLog":
        """The log of an epoch as a file has it.

        Raises:
            KeyError: If a field is missing.
            ValueError: If one is not what it should be.
        """
        for f in fields(cls):
            if not _FITS[f.type](record[f.name]):
                raise ValueError(
                    f"Expected {f.name} of an epoch to be of type {getattr(f.type, '__name__', f.type)}, but got {record[f.name]!r}"
                )
        if len({len(value) for value in record.values() if isinstance(value, list)}) > 1:
            raise ValueError(
                "Expected lists of one length in the log of an epoch, one entry an output, but got several lengths"
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
"""What a value of each type of field has to be."""


class CandidateTally:
    """Running means over candidates, one for each of the n+1 outputs they were aimed at.

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
            p: What the classifier says of them, probabilities ``(M, n+1)``.
            y: The output each was aimed at ``(M,)``.
            out: Which were expelled into the garbage class ``(M,)``, bool.
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

    def result(self) -> dict[str, list]:
        """``proposed`` and ``excluded`` counts, and the mean of each of :attr:`NAMES`; None where nothing was proposed."""
        counts = self.proposed.tolist()
        means = {
            name: [
                total / count if count else None
                for total, count in zip(column.tolist(), counts, strict=True)
            ]
            for name, column in zip(self.NAMES, self.sums.T, strict=True)
        }
        return {"proposed": counts, "excluded": self.excluded.tolist(), **means}
