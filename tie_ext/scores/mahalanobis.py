"""Mahalanobis distance of features ``(N, F)``: one Gaussian per class, one covariance for all."""

import torch
from torch import Tensor

from tie_ext.utils.checks import check_finite, check_labels, describe


class Gaussians:
    """Gaussians of C classes.

    Arguments:
        mu: ``(C, F)`` means.
        precision: ``(F, F)`` inverse of the covariance within classes.
    """

    def __init__(self, mu: Tensor, precision: Tensor):
        self.mu, self.precision = mu, precision
        # The expanded square loses digits: double precision keeps them, which MPS does not have.
        self._expands = mu.device.type != "mps"
        if self._expands:
            self._centre = mu.double().mean(dim=0)
            self._means = mu.double() - self._centre
            self._symmetric = (precision.double() + precision.double().T) / 2
            self._offsets = (self._means @ self._symmetric * self._means).sum(dim=1)

    def distance(self, z: Tensor) -> Tensor:
        """Half the squared Mahalanobis distance to the nearest mean.

        Arguments:
            z: Features ``(B, F)``.

        Returns:
            Score ``(B,)``, >= 0, larger = more OOD.
        """
        if not self._expands:
            squares = [((z - mu) @ self.precision * (z - mu)).sum(dim=1) for mu in self.mu]
            return torch.stack(squares, dim=1).amin(dim=1) / 2
        # One product with the precision, however many classes there are.
        x = z.double() - self._centre
        y = x @ self._symmetric
        nearest = (self._offsets - 2 * y @ self._means.T).amin(dim=1)
        return (((x * y).sum(dim=1) + nearest).clamp_min(0) / 2).to(z.dtype)


def fit_gaussians(z: Tensor, y: Tensor | None, shrinkage: bool = False) -> Gaussians:
    """Means and common covariance of features.

    The covariance is pseudo-inverted, so that directions in which the features never vary, such as
    dead units, do not count. To estimate it well takes more images than features, or shrinkage.

    Arguments:
        z: Features ``(N, F)``.
        y: Labels ``(N,)``, >= 0; a class without an image has no Gaussian. None, or fewer than two
            images a class on average, for one Gaussian of all images.
        shrinkage: Whether the covariance is that of :func:`ledoit_wolf`.

    Raises:
        ValueError: If the features are not a finite floating-point matrix, or a label is negative.

    References:
        K. Lee et al. *A simple unified framework for detecting out-of-distribution samples and
        adversarial attacks*. NeurIPS 2018.
    """
    if not isinstance(z, Tensor) or z.ndim != 2 or not z.is_floating_point() or not len(z):
        raise ValueError(
            f"Expected floating-point features of shape (N, F), but got {describe(z)}"
        )
    check_finite(z, "features")
    wide = z.double()
    mu, rows = _class_means(wide, y)
    centred = wide - mu[rows]
    covariance = ledoit_wolf(centred) if shrinkage else centred.T @ centred / len(z)
    precision = torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True)
    return Gaussians(mu.to(z.dtype), precision.to(z.dtype))


def ledoit_wolf(centred: Tensor) -> Tensor:
    """Covariance ``(F, F)`` of centred features ``(N, F)``, shrunk towards a multiple of the
    identity by as much as its error is estimated to be.

    References:
        O. Ledoit, M. Wolf. *A well-conditioned estimator for large-dimensional covariance
        matrices*. Journal of Multivariate Analysis, 2004.
    """
    count, size = centred.shape
    covariance = centred.T @ centred / count
    target = covariance.diagonal().mean() * torch.eye(size).to(centred)
    distance = (covariance - target).square().sum()
    fourth = centred.square().sum(dim=1).square().mean()
    error = ((fourth - covariance.square().sum()) / count).clamp_min(0)
    amount = torch.where(distance > 0, error / distance, 0).clamp_max(1)
    return torch.lerp(covariance, target, amount)


def _class_means(z: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Means ``(C, F)`` of the classes that have images, and for each image the row of its own."""
    if y is not None:
        check_labels(y, len(z), int(y.max()) + 1 if isinstance(y, Tensor) and len(y) else 1)
        classes, rows = y.to(z.device).unique(return_inverse=True)
        if 2 * len(classes) <= len(z):
            sums = z.new_zeros(len(classes), z.shape[1]).index_add_(0, rows, z)
            return sums / rows.bincount()[:, None], rows
    return z.mean(dim=0, keepdim=True), torch.zeros(len(z), dtype=torch.long, device=z.device)
