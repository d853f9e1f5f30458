"""What neither host measures: how the classifier answers proposed outliers (the paper's Figure 3), and detection error."""

import torch
from torch import Tensor

from tie_ext.decision import uncertainty


def detection_error(id_scores: Tensor, ood_scores: Tensor) -> float:
    """Smallest misclassification probability over all thresholds, where ID and OOD are equally likely; in [0, 0.5].

    Arguments:
        id_scores: ``(N,)``, larger = more OOD.
        ood_scores: ``(M,)``.

    References:
        S. Liang et al., ODIN, ICLR 2018, section 4.2; Vernekar et al., section 4.2.
    """
    scores = torch.cat([id_scores, ood_scores]).double()
    order = scores.argsort()
    is_ood = torch.arange(len(scores), device=scores.device)[order] >= len(id_scores)
    # A threshold above the k lowest: their share of OOD images is missed, the ID images above it are false alarms.
    missed = is_ood.double().cumsum(0) / len(ood_scores)
    false_alarms = 1 - (~is_ood).double().cumsum(0) / len(id_scores)
    apart = torch.cat([scores[order].diff() > 0, torch.ones(1, dtype=torch.bool, device=scores.device)])  # no threshold parts equal scores
    return min(0.5, float(((missed + false_alarms) / 2)[apart].min()))


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
        values = [(top.indices[:, 0] == y).float(), entropy, top.values[:, 0], top.values[:, 0] - top.values[:, 1], uncertainty(p)]
        y = y.cpu()
        self.proposed += y.bincount(minlength=len(self.proposed))
        self.excluded += y[out.cpu()].bincount(minlength=len(self.proposed))
        self.sums.index_add_(0, y, torch.stack(values, dim=1).double().cpu())

    def result(self) -> dict[str, list]:
        """``proposed`` and ``excluded`` counts, and the mean of each of :attr:`NAMES`; None where nothing was proposed."""
        counts = self.proposed.tolist()
        means = {
            name: [total / count if count else None for total, count in zip(column.tolist(), counts, strict=True)]
            for name, column in zip(self.NAMES, self.sums.T, strict=True)
        }
        return {"proposed": counts, "excluded": self.excluded.tolist(), **means}
