"""How far a score of feature distances can be trusted to rank near images, from ID images alone.

A near OOD image is to a network what an ID image is that it gets wrong: one between its classes. A
distance that does not tell such images does not rank near ones either, and would blur a sum.
"""

import torch
from torch import Tensor

BLIND, TRUSTED = 0.45, 0.55
"""Expected AUROC of errors up to which a distance is not trusted, and from which it is in full. On
public networks KNN is below where it is blind to near images, and above where it ranks them."""


def error_auroc(scores: Tensor, confidence: Tensor) -> float:
    """The AUROC with which a score is expected to tell images that the network gets wrong from
    those that it gets right, if it is right as often as it says; no labels are needed.

    Arguments:
        scores: ``(N,)`` of ID images, larger = more OOD.
        confidence: ``(N,)`` largest probabilities of the network, in (0, 1].

    Returns:
        In [0, 1]; 0.5 where the network is sure of every image.

    Not scikit-learn's roc_auc_score with weights, which gives the same: scores need torch alone.
    """
    p, (ordered, order) = confidence.cpu().double(), scores.cpu().sort()
    right, wrong = p[order], 1 - p[order]
    if not wrong.sum() > 0:
        return 0.5
    # Of images with the same score half are below.
    mass = torch.cat([right.new_zeros(1), right.cumsum(0)])
    below, upto = (torch.searchsorted(ordered, ordered, right=side) for side in (False, True))
    return ((wrong * (mass[below] + mass[upto])).sum() / (2 * wrong.sum() * right.sum())).item()


def trust(scores: Tensor, confidence: Tensor) -> float:
    """The share, in [0, 1], of its weight that a distance has: from none at :data:`BLIND` to all
    at :data:`TRUSTED`.

    Arguments:
        scores: As for :func:`error_auroc`.
        confidence: Likewise.
    """
    share = (error_auroc(scores, confidence) - BLIND) / (TRUSTED - BLIND)
    return min(1.0, max(0.0, share))
