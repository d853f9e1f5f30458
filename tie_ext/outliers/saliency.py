r"""ASCOOD: outliers, criterion and features of its training, and i-ODIN's perturbation.

Its outliers are ID images whose most significant pixels are moved along the gradient, or shuffled.

Symbols: ``G (B, C, H, W)`` gradient of the logit of the true class with respect to the image,
``p_inv`` share of pixels that carry the class.

.. math:: x_{out} = x + \alpha\, G_{inv}, \quad
          G_{inv} = G \text{ where } |G| \text{ is among the largest } p_{inv}, \text{ else } 0
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.models.readout import Readout, classifier_name, cut
from tie_ext.outliers.base import Candidates, Synthesizer
from tie_ext.utils.checks import check_number
from tie_ext.utils.settings import Settings, setting
from tie_ext.utils.views import frozen_view


def saliency(classifier: TIENet, x: Tensor, y: Tensor) -> Tensor:
    """Gradient ``(B, C, H, W)`` of the logit of each image's true class, in evaluation mode.

    References:
        ASCOOD, equation 2.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = frozen_view(classifier)(x)
        return torch.autograd.grad(logits.gather(1, y[:, None].long()).sum(), x)[0]


def push(x: Tensor, G: Tensor, alpha: float, p_inv: float) -> Tensor:
    """Images moved by ``alpha`` times their gradient where its magnitude is largest; not clipped.

    Arguments:
        x: Images ``(B, C, H, W)``.
        G: Gradients of the same shape.
        alpha: Step, in units of value / gradient.
        p_inv: Share of the C*H*W values that move, in [0, 1].

    References:
        ASCOOD, section 3.1.
    """
    size = G.abs().flatten(1)
    top = size.topk(int(size.shape[1] * p_inv), dim=1).indices
    mask = torch.zeros_like(size).scatter_(1, top, 1).view_as(G)
    return x + alpha * G * mask


def shuffle(x: Tensor, G: Tensor, p_inv: float) -> Tensor:
    """Images whose most significant pixels are permuted among themselves.

    Arguments:
        x: Images ``(B, C, H, W)``.
        G: Gradients of the same shape; pixels are ranked by the sum of ``exp(G)`` over the
            channels, as in the authors' code.
        p_inv: Share of the H*W pixels that move, in [0, 1].

    References:
        ASCOOD, section 3.1.
    """
    _, C, H, W = x.shape
    top = G.exp().sum(1).flatten(1).topk(int(H * W * p_inv), dim=1).indices
    order = torch.rand_like(top, dtype=torch.float).argsort(1)
    to, of = (rows[:, None].expand(-1, C, -1) for rows in (top, top.gather(1, order)))
    flat = x.flatten(2)
    return flat.scatter(2, to, flat.gather(2, of)).view_as(x)


@dataclass(frozen=True)
class SaliencySettings(Settings):
    """Which outliers, and how far they are from their image."""

    kind: str = setting(
        "gradient",
        "Move the most significant values along the gradient, or shuffle the most significant "
        "pixels.",
        choices=("gradient", "shuffle"),
    )
    alpha: float = setting(
        10.0,
        "Step along the gradient (the authors: 10, for normalised images).",
        low=0,
        high=1e6,
        above=True,
    )
    p_inv: float = setting(
        0.1,
        "Share of values or pixels that carry the class (the authors: 0.1).",
        low=0,
        high=1,
        above=True,
    )


class Saliency(Synthesizer):
    """ASCOOD's outliers as candidates, clipped to the value range.

    Arguments:
        domain: The network that the outliers are for, or the
            :class:`~tie_ext.outliers.base.Domain` of its data.
        settings: Which outliers.

    References:
        S. Regmi. *Image-based Outlier Synthesis With Training Data* (ASCOOD), arXiv:2411.10794,
        section 3.1.
    """

    settings_class: ClassVar = SaliencySettings

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """One outlier an image, for the garbage class."""
        G, settings = saliency(classifier, x, y), self.settings
        if settings.kind == "gradient":
            return self._garbage(self.clip(push(x, G, settings.alpha, settings.p_inv)))
        return self._garbage(self.clip(shuffle(x, G, settings.p_inv)))


def uniform_criterion(logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """ASCOOD's loss: cross-entropy on ID images, and on outliers the divergence of all outputs
    from the uniform distribution, up to a constant.

    A network trained with it does not put an outlier into the garbage class, but is uncertain of
    it: level 2 rejects.

    Arguments:
        logits: ``(B, n+1)``.
        y: ``(B,)`` in ``[0, n]``; n marks an outlier.
        weights: Class weights ``(n+1,)``; that of the garbage class is the paper's w.

    Returns:
        A scalar.

    References:
        ASCOOD, equation 5. Paper: a sum over n outputs. Here: over n+1, because the network has
        that many.
    """
    outlier = y == logits.shape[1] - 1
    exposed = -logits[outlier].log_softmax(1).mean() if outlier.any() else 0.0
    return F.cross_entropy(logits[~outlier], y[~outlier], weights) + weights[-1] * exposed


class Standardized(nn.Module):
    r"""A classifier whose penultimate features are z-scored, image by image, and scaled; a
    backbone for :class:`tie_ext.models.network.TIENet`.

    .. math:: \tilde h = \sigma \, (h - \mathrm{mean}(h)) / \mathrm{std}(h), \quad \|\tilde h\| =
    \sigma \sqrt{F - 1}

    A bounded norm prevents overconfidence, so that the network can learn ID labels and uncertainty
    about outliers together.

    Arguments:
        backbone: A classifier as TIENet takes it. It is copied.
        sigma: Scale > 0 (the authors: 0.5).

    References:
        ASCOOD, section 3.2 and proposition 2.
    """

    def __init__(self, backbone: nn.Module, sigma: float = 0.5):
        super().__init__()
        check_number("sigma", sigma, 0, 1e6, above=True)
        self.backbone, self.sigma = copy.deepcopy(backbone), sigma
        (self.fc,) = cut(self.backbone, Readout(((classifier_name(self.backbone),),)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, m)`` of images ``(B, C, H, W)``."""
        h = self.backbone(x).flatten(1)
        z = self.sigma * (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-6)
        return self.fc(z)


def perturb(x: Tensor, gradient: Tensor, eps: float | Tensor, values: int) -> Tensor:
    """i-ODIN's perturbation: images moved by ``-eps`` times the sign of the gradient, in those
    values where its magnitude is largest.

    Arguments:
        x: Images ``(B, C, H, W)``.
        gradient: Of the loss with respect to the images, of the same shape.
        eps: Step, a number or ``(C, 1, 1)``, in units of value.
        values: How many of the C*H*W values move.

    References:
        ASCOOD, section B.
    """
    size = gradient.abs().flatten(1)
    mask = torch.zeros_like(size).scatter_(1, size.topk(values, dim=1).indices, 1).view_as(x)
    return x - eps * mask * gradient.sign()
