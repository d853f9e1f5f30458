"""fDBD: how far features lie from the decision boundaries of the last layer.

Symbols: ``z (B, F)`` features; ``w (n, F)`` and ``b (n,)`` the last layer, whose logits are
``z w^T + b``; ``mean (F,)`` of the features of training images.
"""

import torch
from torch import Tensor

from tie_ext.scores.knn import pairwise_distances


def boundary_score(z: Tensor, w: Tensor, b: Tensor, mean: Tensor, gaps: Tensor) -> Tensor:
    r"""Negative distance to the boundaries of the predicted class c, averaged over the other
    classes, per distance from the mean: :math:`-\frac{1}{n-1} \sum_{k \neq c}
    \frac{\text{logit}_c - \text{logit}_k}{\|w_c - w_k\|} / \|z - \text{mean}\|`.

    Arguments:
        z: ``(B, F)``.
        w: ``(n, F)``.
        b: ``(n,)``.
        mean: ``(F,)``.
        gaps: ``(n, n)``, what :func:`weight_gaps` gives of w.

    Returns:
        Score ``(B,)``, <= 0, larger = more OOD.

    References:
        L. Liu, Y. Qin. *Fast Decision Boundary based Out-of-Distribution Detector*. ICML 2024,
        arXiv:2312.11536.
    """
    logits = z @ w.T + b
    largest, label = logits.max(dim=1)
    distances = (largest[:, None] - logits) / gaps[label]
    length = (z - mean).square().sum(dim=1).sqrt().clamp_min(1e-8)
    return -distances.sum(dim=1) / ((len(w) - 1) * length)


def weight_gaps(w: Tensor) -> Tensor:
    """Distances ``(n, n)`` between the weights ``(n, F)`` of classes; infinite where they are the
    same, as they are of a class and itself, and there is no boundary.
    """
    gaps = pairwise_distances(w, w)
    return gaps.masked_fill(gaps <= 1e-6 * gaps.amax(), torch.inf)
