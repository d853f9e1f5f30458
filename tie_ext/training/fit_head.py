"""Fits a garbage head: logistic regression of outliers against ID images, by their statistics.

Symbols: ``s (N, S)`` statistics of images (:mod:`tie_ext.models.head`); ``t (N,)`` 1 for an
outlier, 0 for an ID image.
"""

import copy
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers.primitives import Rng
from tie_ext.training.augmentation import CorruptionConfig, corrupt
from tie_ext.training.config import HeadConfig
from tie_ext.utils.progress import Progress
from tie_ext.utils.reservoir import Reservoir
from tie_ext.utils.views import frozen_view

ENOUGH, HELD = 1000, 10
"""Of so many images, or more, one in so many is held out; of fewer their loss says little."""
EVERY, PATIENCE = 25, 100
"""Steps between two looks at the held-out loss, and without a smaller one until the fit ends."""


class StatisticsCollector:
    """Statistics of ID images, each as it is and corrupted, and of outliers, in bounded memory.

    Arguments:
        net: The network, whose garbage head reads every layer; left as it was.
        memory: Bytes of the statistics of outliers, and half of those of ID images.
        corruption: How strongly ID images are corrupted.
    """

    id: Reservoir
    """Statistics ``(N, S)`` and features ``(N, F)`` of ID images."""
    ood: Reservoir
    """Statistics ``(M, S)`` of outliers."""

    def __init__(self, net: TIENet, memory: int, corruption: CorruptionConfig):
        self.net = frozen_view(net)
        head = cast(GarbageHead, net.garbage)
        self.corruption = corruption
        rows = max(2, memory // (4 * (head.mean.numel() + net.feature_size)))
        self.id, self.ood = Reservoir(2 * rows), Reservoir(rows)

    @torch.no_grad()
    def add_id(self, x: Tensor) -> Tensor:
        """Add ID images ``(B, C, S, S)``; returns their penultimate features ``(B, F)``."""
        net = self.net
        corrupted = net.from_unit(corrupt(net.to_unit(x), Rng(x.device), self.corruption))
        for images in (corrupted, x):
            h, s = net.statistics(images)
            self.id.add(s, h)
        return h

    @torch.no_grad()
    def add_ood(self, x: Tensor, batch_size: int) -> None:
        """Add outliers ``(M, C, S, S)``, ``batch_size`` per forward pass."""
        for images in x.split(batch_size):
            self.ood.add(self.net.statistics(images.to(self.net.low.device))[1])


def fit_head(
    head: GarbageHead,
    id_statistics: Tensor,
    ood_statistics: Tensor,
    config: HeadConfig,
    progress: bool = False,
) -> float:
    """Minimise the weighted binary cross-entropy of outliers against ID images.

    Of :data:`ENOUGH` images or more one in ten is held out. Where the loss of these falls no more
    the fit ends, with the weights of the smallest.

    Arguments:
        head: The head; it is standardised on the ID images first.
        id_statistics: ``(N, S)``, N >= 2.
        ood_statistics: ``(M, S)``, M >= 1.
        config: Most steps, batch size, learning rate and weight of the outliers.
        progress: Show a progress bar.

    Returns:
        The mean loss.

    Raises:
        ValueError: If the loss is not finite.
    """
    head.standardise(id_statistics)
    statistics = torch.cat([id_statistics, ood_statistics])
    n, m, count = len(id_statistics), len(ood_statistics), len(statistics)
    target = torch.cat([torch.zeros(n), torch.ones(m)]).to(statistics)
    weights = torch.where(target == 1, config.weight * count / (2 * m), count / (2 * n))

    def loss_of(rows: Tensor) -> Tensor:
        logits = head(statistics[rows]).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits, target[rows], weights[rows])

    held, taught = torch.randperm(count).tensor_split([count // HELD if count >= ENOUGH else 0])
    optimizer = torch.optim.Adam(head.parameters(), lr=config.lr)
    schedule, losses = CosineAnnealingLR(optimizer, config.steps), []
    best, best_step, kept = math.inf, 0, copy.deepcopy(head.state_dict())
    for step in Progress(range(1, config.steps + 1), "garbage head", disable=not progress):
        loss = loss_of(taught[torch.randint(len(taught), (min(config.batch_size, len(taught)),))])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if step % EVERY and step < config.steps:
            continue
        with torch.no_grad():
            now = float(loss_of(held if len(held) else taught))
        if now < best:
            best, best_step, kept = now, step, copy.deepcopy(head.state_dict())
        elif step >= best_step + PATIENCE:
            break
    head.load_state_dict(kept)
    mean = float(torch.stack(losses).mean())
    if not math.isfinite(mean):
        raise ValueError(
            f"Expected a finite loss of the garbage head, but got {mean}, as the statistics of a "
            "float16 network give it; give the network in float32 or bfloat16"
        )
    return mean
