"""Mahalanobis distance of features ``(N, F)``: one Gaussian per class, one covariance for all."""

from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.utils.checks import check_finite, check_labels, describe


class Gaussians(NamedTuple):
    """Gaussians of C classes."""

    mu: Tensor
    """``(C, F)`` means."""
    precision: Tensor
    """``(F, F)`` inverse of the covariance within classes."""

    def distance(self, z: Tensor) -> Tensor:
        """Half the squared Mahalanobis distance to the nearest mean.

        Arguments:
            z: Features ``(B, F)``.

        Returns:
            Score ``(B,)``, >= 0, larger = more OOD.
        """
        # Class by class: all differences at once are (B, C, F), and the expanded square loses
        # digits.
        squares = [((z - mu) @ self.precision * (z - mu)).sum(dim=1) for mu in self.mu]
        return torch.stack(squares, dim=1).amin(dim=1) / 2


def fit_gaussians(z: Tensor, y: Tensor) -> Gaussians:
    """Means and common covariance of labelled features.

    The covariance is pseudo-inverted, so that directions in which the features never vary, such as
    dead units, do not count. It takes more images than features to be estimated well.

    Arguments:
        z: Features ``(N, F)``.
        y: Labels ``(N,)`` in [0, C), each with an image.

    Raises:
        ValueError: If the features are not a finite floating-point matrix, or a label is negative
            or has no image.

    References:
        K. Lee et al. *A simple unified framework for detecting out-of-distribution samples and
        adversarial attacks*. NeurIPS 2018.
    """
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or not len(z):
        raise ValueError(
            f"Expected floating-point features of shape (N, F), but got {describe(z)}"
        )
    check_finite(z, "features")
    check_labels(y, len(z), int(y.max()) + 1 if isinstance(y, Tensor) and len(y) else 1)
    counts = torch.bincount(y)
    if (counts == 0).any():
        raise ValueError(
            f"Expected images of every class in [0, {len(counts)}), "
            f"but got none of class {int((counts == 0).nonzero()[0])}"
        )
    y, wide = y.to(z.device), z.double()
    sums = wide.new_zeros(len(counts), z.shape[1]).index_add_(0, y, wide)
    mu = sums / counts.to(z.device)[:, None]
    centred = wide - mu[y]
    precision = torch.linalg.pinv(centred.T @ centred / len(z), rtol=1e-10, hermitian=True)
    return Gaussians(mu.to(z.dtype), precision.to(z.dtype))
