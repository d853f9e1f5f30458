"""BatchNorm's running statistics, computed anew."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tie_ext.utils.views import hook_view


@torch.no_grad()
def settle_statistics(module: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Replace BatchNorm's running statistics by their mean over some inputs.

    ``torch.optim.swa_utils.update_bn`` would do it for layers in evaluation mode too, and put
    every part into training mode; here both stay as they are.

    Arguments:
        module: In training mode, except for parts that are to stay as they are.
        inputs: Batches to pass through it; not read if no layer needs them.
    """
    view = hook_view(module)
    layers = [
        part
        for part in view.modules()
        if isinstance(part, _BatchNorm) and part.training and part.track_running_stats
    ]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # of the view: a cumulative mean
    for x in inputs if layers else ():
        view(x)
