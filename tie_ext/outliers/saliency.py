r"""ASCOOD's outliers: ID images whose most significant pixels are pushed along the gradient, or shuffled.

Symbols: ``G (B, C, H, W)`` the gradient of the true class's logit by the image, ``p_inv`` the share of pixels that carry the class.

.. math:: x_{out} = x + \alpha\, G_{inv}, \quad G_{inv} = G \text{ where } |G| \text{ is among the largest } p_{inv}, \text{ else } 0
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tie_ext.checks import check_number
from tie_ext.networks import TIENet, register_range
from tie_ext.synthesis import Candidates, Synthesizer, frozen


def saliency(classifier: TIENet, x: Tensor, y: Tensor) -> Tensor:
    """Gradient ``(B, C, H, W)`` of each image's true-class logit, in evaluation mode.

    References:
        ASCOOD, equation 2.
    """
    with torch.enable_grad(), frozen(classifier):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(classifier(x).gather(1, y[:, None]).sum(), x)[0]


def push(x: Tensor, G: Tensor, alpha: float, p_inv: float) -> Tensor:
    """Images moved by ``alpha`` times their gradient where it is largest in size; not clipped.

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
    """Images whose most significant pixels have changed places among themselves.

    Arguments:
        x: Images ``(B, C, H, W)``.
        G: Gradients of the same shape; pixels are ranked by the sum of ``exp(G)`` over the channels, as the authors' code does.
        p_inv: Share of the H*W pixels that move, in [0, 1].

    References:
        ASCOOD, section 3.1.
    """
    _, C, H, W = x.shape
    top = G.exp().sum(1).flatten(1).topk(int(H * W * p_inv), dim=1).indices
    order = torch.rand_like(top, dtype=torch.float).argsort(1)
    flat = x.flatten(2)
    pixels = flat.gather(2, top[:, None].expand(-1, C, -1)).gather(2, order[:, None].expand(-1, C, -1))
    return flat.scatter(2, top[:, None].expand(-1, C, -1), pixels).view_as(x)


class Saliency(Synthesizer):
    """ASCOOD's outliers as candidates, clipped to the value range.

    Arguments:
        low: Smallest value of the data, a number or one a channel.
        high: Largest value of the data.
        kind: ``gradient`` or ``shuffle``.
        alpha: Step of the gradient (the authors: 10, for normalised images).
        p_inv: Share of values or pixels that carry the class (the authors: 0.1).

    Raises:
        ValueError: If a setting is out of range.

    References:
        S. Regmi. *Image-based Outlier Synthesis With Training Data* (ASCOOD), arXiv:2411.10794, section 3.1.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
        kind: str = "gradient",
        alpha: float = 10.0,
        p_inv: float = 0.1,
    ):
        super().__init__()
        if kind not in ("gradient", "shuffle"):
            raise ValueError(f"Expected kind to be 'gradient' or 'shuffle', but got {kind!r}")
        check_number("alpha", alpha, 0, 1e6, above=True)
        check_number("p_inv", p_inv, 0, 1, above=True)
        self.kind, self.alpha, self.p_inv = kind, alpha, p_inv
        register_range(self, low, high)

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """One outlier an image, aimed at the garbage class."""
        G = saliency(classifier, x, y)
        images = push(x, G, self.alpha, self.p_inv) if self.kind == "gradient" else shuffle(x, G, self.p_inv)
        images = torch.minimum(torch.maximum(images, self.low), self.high)
        return Candidates(images, torch.full((len(x),), classifier.num_classes, device=x.device))
