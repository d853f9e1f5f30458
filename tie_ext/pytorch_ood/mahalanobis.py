"""Mahalanobis++ as a pytorch-ood detector. Larger score = more OOD."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pytorch_ood.api import DetectorInfo, Paper, RequiresFittingException, Task
from pytorch_ood.detector import Mahalanobis
from torch import Tensor

from tie_ext.pytorch_ood.base import FeatureScore
from tie_ext.scores.mahalanobis import Gaussians, fit_gaussians


class MahalanobisPlusPlus(FeatureScore, Mahalanobis):
    """Mahalanobis distance between features of length 1: of an image to the nearest class.

    The norm of a feature varies with the network more than with the image, and breaks the
    assumption of one covariance for all classes. The covariance is shrunk by Ledoit and Wolf's
    formula, which the paper's is not, so that a hundred images are enough to fit it.

    Arguments:
        encoder: Penultimate features ``(B, ...) -> (B, F)`` of the classifier; None to use
            features alone.

    References:
        M. Müller, M. Hein. *Mahalanobis++: Improving OOD detection via feature normalization*.
        ICML 2025, arXiv:2505.18032. O. Ledoit, M. Wolf. *A well-conditioned estimator for
        large-dimensional covariance matrices*. Journal of Multivariate Analysis, 2004.
    """

    info: ClassVar = DetectorInfo(
        paper=Paper(
            title="Mahalanobis++: Improving OOD Detection via Feature Normalization",
            venue="ICML",
            year=2025,
            url="https://arxiv.org/abs/2505.18032",
            code="https://github.com/mueller-mp/maha-norm",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    labelled: ClassVar = True
    _gaussians: Gaussians | None = None

    def fit_features(self, z: Tensor, y: Tensor | None) -> "MahalanobisPlusPlus":
        """Learn the class means and their common covariance from features ``(N, F)`` and labels
        ``(N,)``; without labels, or with fewer than two images a class, one mean for all.

        Raises:
            ValueError: If the features are not finite, or a label is negative.
        """
        z = F.normalize(z.detach().to(self.device or z.device))
        found = fit_gaussians(z, y, shrinkage=True)
        self.mu, self.precision = found.mu, found.precision
        return self

    @torch.no_grad()
    def predict_features(self, z: Tensor) -> Tensor:
        """Half the squared distance ``(B,)`` of features ``(B, F)`` to the nearest class; larger =
        more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        return self.gaussians().distance(F.normalize(z))

    def gaussians(self) -> Gaussians:
        """What was fitted; made once for each fit, load or move.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        if self.mu is None:
            raise RequiresFittingException
        found = self._gaussians
        if found is None or found.mu is not self.mu or found.precision is not self.precision:
            found = self._gaussians = Gaussians(self.mu, self.precision)
        return found
