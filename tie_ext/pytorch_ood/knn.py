"""KNN on a sample of the training images, as a pytorch-ood detector that any device computes and torch exports. Larger score = more OOD."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pytorch_ood.api import DetectorInfo, RequiresFittingException
from pytorch_ood.detector import KNN
from torch import Tensor

from tie_ext.scores.mahalanobis import unit
from tie_ext.utils.checks import check_number, describe


class SampledKNN(KNN):
    """Distance of an image's features to the k-th nearest of those of training images, all of length 1.

    Unlike pytorch-ood's it keeps a random sample of the features, and finds neighbours in torch: a saved detector stays small, an image takes
    little beside its forward pass, and it is computed where the network is.

    Arguments:
        encoder: Penultimate features ``(B, ...) -> (B, F)`` of the classifier, in evaluation mode; None to use features alone.
        k: Which neighbour counts.
        most: Features kept.

    Raises:
        ValueError: If a number is out of range.

    References:
        Y. Sun et al. *Out-of-Distribution Detection with Deep Nearest Neighbors*. ICML 2022, which also samples.
    """

    info: ClassVar = DetectorInfo(paper=KNN.info.paper, tasks=KNN.info.tasks, ai_coded=True)

    def __init__(self, encoder: Callable[[Tensor], Tensor] | None, k: int = 50, most: int = 5000):
        # KNN's own would ask for scikit-learn, which is not needed here.
        check_number("k", k, 1, 10**9, integer=True)
        check_number("most", most, k, 10**9, integer=True)
        self.encoder, self.k, self.most, self.normalize = encoder, k, most, True
        self._is_fitted = False
        self.sample: Tensor | None = None

    def fit_features(self, z: Tensor, labels: Tensor) -> "SampledKNN":
        """Keep a sample of features ``(N, F)``, those with labels ``(N,)`` < 0 left out; the same one each time.

        Raises:
            ValueError: If they are no matrix or not finite, or fewer than k are left.
        """
        if z.ndim != 2 or not z.is_floating_point() or not z.isfinite().all():
            raise ValueError(
                f"Expected finite floating-point features of shape (N, F), but got {describe(z)}"
            )
        known = z.detach()[(labels >= 0).to(z.device)]
        if len(known) < self.k:
            raise ValueError(f"Expected at least k = {self.k} ID samples, but got {len(known)}")
        rows = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[
            : max(self.most, self.k)
        ]
        self.sample = unit(known[rows.to(z.device)].to(self.device or z.device).float())
        self._is_fitted = True
        return self

    @torch.no_grad()
    def predict_features(self, z: Tensor) -> Tensor:
        """Distance ``(B,)`` of features ``(B, F)`` to the k-th nearest of the sample; larger = more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
            ValueError: If k has been set to more than it has kept.
        """
        if self.sample is None:
            raise RequiresFittingException
        if self.k > len(self.sample):
            raise ValueError(
                f"Expected k to be at most the {len(self.sample)} features kept, but got {self.k}; fit the detector again"
            )
        z = unit(z.to(self.sample.dtype))
        # By the expanded square, which is one matrix product and exports; the k-th neighbour is far enough for it to keep its digits.
        squares = (
            z.square().sum(1, keepdim=True) + self.sample.square().sum(1) - 2 * z @ self.sample.T
        )
        return squares.topk(self.k, largest=False).values[:, -1].clamp_min(0).sqrt()
