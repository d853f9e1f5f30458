"""KNN on a sample of the training images, as a pytorch-ood detector. Larger score = more OOD."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pytorch_ood.api import DetectorInfo, RequiresFittingException
from pytorch_ood.detector import KNN
from torch import Tensor

from tie_ext.pytorch_ood.base import FeatureScore
from tie_ext.scores.knn import Prepared, knn_score
from tie_ext.utils.checks import check_number, describe

K, MAX_SAMPLES = 50, 5000
"""Which neighbour counts, and features kept."""


class SampledKNN(FeatureScore, KNN):
    """Distance of an image's features to the k-th nearest of those of training images, all of
    length 1.

    Unlike pytorch-ood's it keeps a random sample of the features, and finds neighbours in torch: a
    saved detector stays small, a score costs little beside the forward pass, and it is computed
    where the network is.

    Arguments:
        encoder: Penultimate features ``(B, ...) -> (B, F)`` of the classifier; None to use
            features alone.
        k: Which neighbour counts, >= 1; the farthest where fewer features are kept.
        max_samples: Features kept, >= k.

    Raises:
        ValueError: If a number is out of range.

    References:
        Y. Sun et al. *Out-of-Distribution Detection with Deep Nearest Neighbors*. ICML 2022, which
        also samples.
    """

    _ready: tuple[Tensor | None, Prepared | None] = (None, None)
    info: ClassVar = DetectorInfo(paper=KNN.info.paper, tasks=KNN.info.tasks, ai_coded=True)

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        k: int = K,
        max_samples: int = MAX_SAMPLES,
    ):
        # KNN's own would ask for scikit-learn, which is not needed here.
        check_number("k", k, 1, 10**9, integer=True)
        check_number("max_samples", max_samples, k, 10**9, integer=True)
        self.encoder, self.k, self.max_samples, self.normalize = encoder, k, max_samples, True
        self._is_fitted = False
        self.sample: Tensor | None = None  #: ``(M, F)``, of length 1

    def fit_features(self, z: Tensor, labels: Tensor | None = None) -> "SampledKNN":
        """Keep a random sample of features ``(N, F)``, with a fixed seed; those with labels
        ``(N,)`` < 0 are left out.

        Raises:
            ValueError: If they are no matrix or not finite, or none is left.
        """
        if z.ndim != 2 or not z.is_floating_point() or not z.isfinite().all():
            raise ValueError(
                f"Expected finite floating-point features of shape (N, F), but got {describe(z)}"
            )
        z = z.detach()
        if labels is not None:
            z = z[(labels >= 0).to(z.device)]
        if not len(z):
            raise ValueError("Expected ID samples, but got none")
        rows = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
        kept = z[rows[: max(self.max_samples, self.k)].to(z.device)]
        self.sample = F.normalize(kept.to(self.device or z.device).float())
        self._is_fitted = True
        return self

    @torch.no_grad()
    def predict_features(self, z: Tensor) -> Tensor:
        """Distance ``(B,)`` of features ``(B, F)`` to the k-th nearest of the sample; larger =
        more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        if self.sample is None:
            raise RequiresFittingException
        return knn_score(z, self.prepared(), min(self.k, len(self.sample)))

    def prepared(self) -> Prepared:
        """The sample, ready for a search; made once for each fit, load or move.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        if self.sample is None:
            raise RequiresFittingException
        sample, found = self._ready
        if found is None or sample is not self.sample:
            found = Prepared(self.sample)
            self._ready = self.sample, found
        return found

    def __getstate__(self) -> dict:
        return {name: of for name, of in vars(self).items() if name != "_ready"}
