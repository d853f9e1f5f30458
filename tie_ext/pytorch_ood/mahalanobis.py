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
    assumption of one covariance for all classes.

    Arguments:
        encoder: Penultimate features ``(B, ...) -> (B, F)`` of the classifier; None to use
            features alone.

    References:
        M. Müller, M. Hein. *Mahalanobis++: Improving OOD detection via feature normalization*.
        ICML 2025, arXiv:2505.18032.
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

    def fit_features(self, z: Tensor, y: Tensor) -> "MahalanobisPlusPlus":
        """Learn the class means and their common covariance from features ``(N, F)`` and labels
        ``(N,)``.

        Raises:
            ValueError: If the features are not finite, or a label is negative or has no image.
        """
        z = F.normalize(z.detach().to(self.device or z.device))
        self.mu, self.precision = fit_gaussians(z, y)
        return self

    @torch.no_grad()
    def predict_features(self, z: Tensor) -> Tensor:
        """Half the squared distance ``(B,)`` of features ``(B, F)`` to the nearest class; larger =
        more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        if self.mu is None:
            raise RequiresFittingException
        return Gaussians(self.mu, self.precision).distance(F.normalize(z))
