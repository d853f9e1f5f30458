"""The log of an epoch, with the classifier's answers to candidates (the paper's Figure 3)."""

from dataclasses import dataclass

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
            name: [part / count if count else None for part, count in zip(of, counts, strict=True)]
            for name, of in zip(self.NAMES, self.sums.T.tolist(), strict=True)
        }
        return {"proposed": counts, "excluded": self.excluded.tolist(), **means}
