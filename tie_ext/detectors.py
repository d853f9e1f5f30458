"""Post-hoc detectors of the other papers, as pytorch-ood has none of them: i-ODIN (ASCOOD) and DMR's rejection network.

Both attach to any pre-trained classifier and leave it as it is. Larger score = more OOD.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pytorch_ood.api import DetectorInfo, FeaturesDetector, GradientDetector, ModelNotSetException, Paper, RequiresFittingException, Task
from torch import Tensor, nn

from tie_ext.checks import check_number
from tie_ext.outliers.latent import fit_rejection, marginal_features
from tie_ext.synthesis import Batches, Synthesizer


class IODIN(GradientDetector):
    """ODIN that perturbs only the most significant values of an image.

    Arguments:
        model: A classifier ``(B, C, H, W) -> (B, n)``.
        eps: Step (OpenOOD's default).
        temperature: T of the softmax.
        norm_std: Standard deviation of each channel that the images were normalised by; the step is divided by it.
        values: How many of the C*H*W values move, those of the largest gradients (OpenOOD's implementation: 1).

    Raises:
        ValueError: If a number is out of range.

    References:
        S. Regmi. *Image-based Outlier Synthesis With Training Data* (ASCOOD), section B; score as in ODIN (S. Liang et al., ICLR 2018).
    """

    info: ClassVar = DetectorInfo(
        paper=Paper(
            title="Image-based Outlier Synthesis With Training Data",
            venue="CVPR",
            year=2026,
            url="https://arxiv.org/abs/2411.10794",
            code="https://github.com/sudarshanregmi/ASCOOD",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    hyperparameter_space: ClassVar = {"temperature": [1, 10, 100, 1000], "eps": [0.0014, 0.0028]}

    def __init__(
        self,
        model: nn.Module | None,
        eps: float = 0.0014,
        temperature: float = 1000.0,
        norm_std: list[float] | None = None,
        values: int = 1,
    ):
        super().__init__()
        check_number("eps", eps, 0, 1e6)
        check_number("temperature", temperature, 0, 1e6, above=True)
        check_number("values", values, 1, 10**9, integer=True)
        self.model, self.eps, self.temperature, self.norm_std, self.values = model, eps, temperature, norm_std, values

    def predict(self, x: Tensor) -> Tensor:
        """Negative largest softmax probability ``(B,)`` in [-1, -1/n] of the perturbed images; larger = more OOD.

        Raises:
            ModelNotSetException: If there is no model.
        """
        if self.model is None:
            raise ModelNotSetException
        if self.device is not None:
            x = x.to(self.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.model(x) / self.temperature
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), x)
        size = gradient.abs().flatten(1)
        mask = torch.zeros_like(size).scatter_(1, size.topk(self.values, dim=1).indices, 1).view_as(x)
        std = x.new_tensor(self.norm_std or [1.0]).view(1, -1, 1, 1)
        with torch.no_grad():
            logits = self.model(x.detach() - self.eps * mask * gradient.sign() / std)
        return -(logits / self.temperature).softmax(1).amax(1)


class RejectionNetwork(FeaturesDetector):
    """DMR's rejection network B: a small network on the frozen features of a classifier tells ID images from synthesized outliers.

    Arguments:
        encoder: Penultimate features ``(B, C, H, W) -> (B, F)`` of the classifier, in evaluation mode; None to use features alone.
        synthesizer: Who proposes the outliers, such as :class:`tie_ext.outliers.latent.MarginalRepresentations`; None to use features alone.
        num_classes: n.
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
        num_classes: int = 2,
        hidden: int = 128,
        epochs: int = 10,
        lr: float = 0.01,
    ):
        super().__init__()
        check_number("epochs", epochs, 1, 10**6, integer=True)
        check_number("hidden", hidden, 1, 10**6, integer=True)
        check_number("lr", lr, 0, 10, above=True)
        self.encoder, self.synthesizer, self.num_classes = encoder, synthesizer, num_classes
        self.hidden, self.epochs, self.lr = hidden, epochs, lr
        self.network: nn.Module | None = None  #: B, once fitted

    def fit(self, data_loader: Batches) -> "RejectionNetwork":
        """Fit the synthesizer, draw one outlier for each ID image, and train B on the features of both.

        Arguments:
            data_loader: Batches ``(x, y)`` of ID images; those with y < 0 are left out.

        Raises:
            ModelNotSetException: If there is no encoder or no synthesizer.
            ValueError: If the loader has no ID images.
        """
        if self.encoder is None or self.synthesizer is None:
            raise ModelNotSetException
        device = self.device or torch.device("cpu")
        batches = [(x[y >= 0], y[y >= 0]) for x, y in data_loader]
        if not sum(len(x) for x, _ in batches):
            raise ValueError("Expected ID images (labels >= 0) to fit on, but got none from the loader")
        features, outlier = marginal_features(self.encoder, self.synthesizer, batches, self.num_classes, device)
        return self.fit_features(features, -outlier.long())

    def fit_features(self, x: Tensor, y: Tensor) -> "RejectionNetwork":
        """Train B on features ``(N, F)`` with labels ``(N,)``: outliers where y < 0.

        Raises:
            ValueError: If either kind is missing.
        """
        self.network = fit_rejection(x, y < 0, self.hidden, self.epochs, self.lr)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Scores ``(B,)`` of images; see :meth:`predict_features`."""
        if self.encoder is None:
            raise ModelNotSetException
        with torch.no_grad():
            return self.predict_features(self.encoder(x if self.device is None else x.to(self.device)))

    def predict_features(self, x: Tensor) -> Tensor:
        """Log-odds ``(B,)`` of being an outlier, of features ``(B, F)``; larger = more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
        """
        if self.network is None:
            raise RequiresFittingException
        return self.network(x).squeeze(1)
