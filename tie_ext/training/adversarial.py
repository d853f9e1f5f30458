"""Adversarial images: moved along the gradient of a network to where it is confident of a class.

A network that never saw such images is confident of nearly all of them. The loop can train it on
them (:attr:`tie_ext.training.config.TIEConfig.adversarial_steps`).
"""

import torch
from torch import Tensor

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import upcast
from tie_ext.utils.views import frozen_view

_RADIUS = 0.3
"""How far a pixel moves in all, as a share of the value range."""


def pgd(net: TIENet, x: Tensor, steps: int) -> Tensor:
    """Move images to where the network is most confident of any ID class, by steps along the sign
    of the gradient of its largest log-probability.

    The probabilities include a linear garbage logit; a head on every layer is left out, because
    the classifier is trained apart from it.

    Paper: 40 steps of adaptive size from permuted images and noise. Here: few steps of one size
    from the garbage pool, because they are taken in every batch.

    Arguments:
        net: The network; left as it was.
        x: Images ``(B, C, S, S)`` in ``[low, high]``.
        steps: Number of steps >= 0; together they move a pixel by at most 0.3 of the value range.

    Returns:
        Images ``(B, C, S, S)`` in ``[low, high]``, detached.

    References:
        M. Hein, M. Andriushchenko, J. Bitterwolf. *Why ReLU networks yield high-confidence
        predictions far away from the training data and how to mitigate the problem*. CVPR 2019.
    """
    net, linear = frozen_view(net), not isinstance(net.garbage, GarbageHead)
    with torch.enable_grad():
        for _ in range(steps):
            x = x.detach().requires_grad_()
            log_prob = upcast(net(x, garbage=linear)).log_softmax(1)[:, : net.num_classes]
            (gradient,) = torch.autograd.grad(log_prob.amax(1).sum(), x)
            x = net.clip(x + _RADIUS / steps * (net.high - net.low) * gradient.sign())
    return x.detach()


def max_log_prob(logits: Tensor, y: Tensor) -> Tensor:
    """The loss of adversarial images: their mean largest log-probability.

    Arguments:
        logits: ``(B, n)``.
        y: Labels ``(B,)``; n for an adversarial image.

    Returns:
        A scalar <= 0, smaller = less confident; 0 where no image is adversarial.

    References:
        Hein et al., as in :func:`pgd`.
    """
    adversarial = (y == logits.shape[1]).to(logits.dtype)
    return (logits.log_softmax(1).amax(1) * adversarial).sum() / adversarial.sum().clamp_min(1)
