"""Images that were searched for: moved along a network's gradient to where it is pgd of a class.

A network that never saw such images is sure of nearly all of them. The loop can teach it (:attr:`tie_ext.training.config.TIEConfig.search`).
"""

import torch
from torch import Tensor

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import upcast
from tie_ext.utils.modules import frozen

RADIUS = 0.3
"""How far in all a pixel goes from where it started, a share of the value range."""


def pgd(net: TIENet, x: Tensor, steps: int) -> Tensor:
    """Images moved to where the network is pgd of any ID class, by steps along the sign of the gradient of its largest log-probability.

    With a linear garbage logit its probability counts among the n+1; a head on every layer is left out, because the classifier learns apart from it.

    Paper: 40 steps by an adaptive rate from permuted images and noise. Here: few steps of one size from the garbage pool, because a loop has no time.

    Arguments:
        net: The network; left as it was.
        x: Images ``(B, C, S, S)`` in ``[low, high]``.
        steps: Of gradient ascent, >= 0; all of them together go no further than :data:`RADIUS`.

    Returns:
        Images ``(B, C, S, S)`` in ``[low, high]``, detached.

    References:
        M. Hein, M. Andriushchenko, J. Bitterwolf. *Why ReLU networks yield high-confidence predictions far away from the training data and how to
        mitigate the problem*. CVPR 2019.
    """
    alone = isinstance(net.garbage, GarbageHead)
    with frozen(net), torch.enable_grad():
        for _ in range(steps):
            x = x.detach().requires_grad_()
            logits = upcast(net(x, garbage=not alone))
            (gradient,) = torch.autograd.grad(
                logits.log_softmax(1)[:, : net.num_classes].amax(1).sum(), x
            )
            x = net.clip(x + RADIUS / steps * (net.high - net.low) * gradient.sign())
    return x.detach()


def max_log_prob(logits: Tensor, y: Tensor) -> Tensor:
    """What a network learns of images that were searched for, which belong to no class: mean largest log-probability, smaller = less sure.

    Arguments:
        logits: ``(B, n)``.
        y: Labels ``(B,)``; n where the image was searched for.

    Returns:
        A scalar, at most 0; 0 where none was searched for.

    References:
        Hein et al., as in :func:`pgd`.
    """
    searched = (y == logits.shape[1]).to(logits.dtype)
    return (logits.log_softmax(1).amax(1) * searched).sum() / searched.sum().clamp_min(1)
