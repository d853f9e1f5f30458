"""The distance to the nearest of a sample of training features, on the unit sphere.

Symbols: ``z (B, F)`` features of images; ``sample (M, F)`` those of training images, of length 1,
as they are or as :class:`Prepared` once for all batches.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.scores.decision import upcast


class Prepared:
    """A sample, ready for a search in double precision, where the device has it: in single
    precision the expanded square loses its digits, see :func:`pairwise_distances`.

    Arguments:
        sample: ``(M, F)``.
    """

    def __init__(self, sample: Tensor):
        self.rows = F.normalize(sample if sample.device.type == "mps" else sample.double())
        self.squares = self.rows.square().sum(1)


def knn_score(z: Tensor, sample: Tensor | Prepared, k: int) -> Tensor:
    """Distance of features, brought to length 1, to the k-th nearest of a sample.

    Arguments:
        z: ``(B, F)``.
        sample: ``(M, F)``, of length 1, M >= k.
        k: Which neighbour counts, >= 1.

    Returns:
        Score ``(B,)`` in [0, 2], larger = more OOD.

    References:
        Y. Sun et al. *Out-of-Distribution Detection with Deep Nearest Neighbors*. ICML 2022.
    """
    z = upcast(z)
    sample = sample if isinstance(sample, Prepared) else Prepared(sample)
    rows = sample.rows
    if rows.device.type == "mps":
        return pairwise_distances(F.normalize(z), rows).topk(k, largest=False).values[:, -1]
    x = F.normalize(z.double())
    # Less what is the same for all of the sample: one product and no other pass over distances.
    nearness = torch.addmm(sample.squares / -2, x, rows.T).topk(k).values[:, -1]
    return (x.square().sum(1) - 2 * nearness).clamp_min(0).sqrt().to(z.dtype)


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances ``(A, B)`` of rows ``(A, F)`` and ``(B, F)``, in their type.

    By the expanded square in double precision: one matrix product, which also exports. In single
    precision it loses its digits where rows lie close together: of clusters on the unit sphere
    with a relative spread of 1e-3 the k-th distance was wrong by 13 %, here by 4e-8. Differences
    of rows (``torch.cdist``) are as good, and took eight times as long.
    """
    if a.device.type == "mps":  # which has no double precision
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    x, y = a.double(), b.double()
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp_min(0).sqrt().to(a.dtype)
