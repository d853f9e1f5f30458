"""DMR's rejection network as a pytorch-ood detector. Larger score = more OOD."""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from pytorch_ood.api import (
    DetectorInfo,
    ModelNotSetException,
    RequiresFittingException,
    Task,
)
from torch import Tensor, nn

from tie_ext.outliers.base import Synthesizer
from tie_ext.outliers.marginal import fit_rejection, marginal_features
from tie_ext.pytorch_ood.base import FeatureScore, id_reader
from tie_ext.utils.checks import check_number


class RejectionNetwork(FeatureScore):
    """DMR's rejection network B: a small network on the frozen features of a classifier, trained
    to tell ID images from synthesized outliers.

    Arguments:
        encoder: Penultimate features ``(B, C, H, W) -> (B, F)`` of the classifier; None to use
            features alone.
        synthesizer: Synthesizes the outliers, such as
            :class:`tie_ext.outliers.marginal.MarginalRepresentations`; None to use features alone.
        hidden: Width of the hidden layer.
        epochs: Passes over the ID data (the paper: 10).
        lr: Learning rate of SGD with momentum 0.9 (the paper: 0.01).

    References:
        DMR, section 3.4, equation 8.
    """

    info: ClassVar = DetectorInfo(tasks={Task.CLASSIFICATION}, ai_coded=True)
    requires_fit: ClassVar = True

    def __init__(
        self,
        encoder: Callable[[Tensor], Tensor] | None,
        synthesizer: Synthesizer | None = None,
        hidden: int = 128,
        epochs: int = 10,
        lr: float = 0.01,
    ):
        super().__init__()
        check_number("epochs", epochs, 1, 10**6, integer=True)
        check_number("hidden", hidden, 1, 10**6, integer=True)
        check_number("lr", lr, 0, 10, above=True)
        self.encoder, self.synthesizer = encoder, synthesizer
        self.hidden, self.epochs, self.lr = hidden, epochs, lr
        self.network: nn.Module | None = None  #: B, once fitted

    def fit(self, data_loader: Iterable) -> "RejectionNetwork":
        """Fit the synthesizer, sample one outlier for each ID image, and train B on the features
        of both.

        Arguments:
            data_loader: Batches ``(x, y)`` of ID images; those with y < 0 are left out.

        Raises:
            ModelNotSetException: If there is no encoder or no synthesizer.
            ValueError: If the loader has no ID images or no labels, or one that the network does
                not take.
        """
        encoder, net = self._encoder_view(), getattr(self.encoder, "__self__", None)
        if self.synthesizer is None:
            raise ModelNotSetException
        batches = list(id_reader(net, data_loader, "data_loader", labelled=True))
        device = self.device or torch.device("cpu")
        features, outlier = marginal_features(encoder, self.synthesizer, batches, device)  # type: ignore[arg-type]
        return self.fit_features(features, -outlier.long())

    def fit_features(self, x: Tensor, y: Tensor) -> "RejectionNetwork":
        """Train B on features ``(N, F)`` with labels ``(N,)``: outliers where y < 0.

        Raises:
            ValueError: If either kind is missing.
        """
        self.network = fit_rejection(x, y < 0, self.hidden, self.epochs, self.lr)
        return self

    def predict_features(self, x: Tensor) -> Tensor:
        """Log-odds ``(B,)`` of being an outlier, of features ``(B, F)``; larger = more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        if self.network is None:
            raise RequiresFittingException
        return self.network(x).squeeze(1)
