"""How a garbage head learns to tell outliers from ID images, by the statistics of both alone.

Symbols: ``s (N, S)`` statistics of images (:mod:`tie_ext.models.head`), ``t (N,)`` 1 where an image is an outlier, else 0.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tie_ext.models.head import GarbageHead

MEMORY = 2**28
"""Bytes of statistics kept of ID images, of the same processed, and of outliers; of more images a random sample of this size is kept."""
OUTLIERS = 3
"""Outliers an ID image, of each who proposes them."""
WEIGHT = 3.0
"""Of all outliers together, where all ID images have 1: level 1 takes an outlier to be as dear as three ID images."""
STEPS, BATCH, RATE = 1600, 512, 1e-3
"""How the head learns: steps, images a step, Adam's learning rate, which falls along half a cosine. As many steps for few images as for many:
some seconds on a CPU."""


def fit_head(
    head: GarbageHead,
    inside: Tensor,
    outside: Tensor,
    steps: int = STEPS,
    weight: float = 1.0,
    progress: bool = False,
) -> float:
    """Binary cross-entropy of outliers against ID images, both of the same weight in sum.

    Arguments:
        head: What learns; it is standardised on the ID images first.
        inside: Statistics ``(N, S)`` of ID images, N >= 2.
        outside: Statistics ``(M, S)`` of outliers, M >= 1.
        steps: Of the optimiser.
        weight: Of all outliers together, where all ID images have 1.
        progress: Show a progress bar.

    Returns:
        The mean loss.
    """
    head.standardise(inside)
    statistics = torch.cat([inside, outside])
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).to(statistics)
    weights = torch.where(
        target == 1, weight * len(target) / (2 * len(outside)), len(target) / (2 * len(inside))
    )
    losses = []
    optimizer = torch.optim.Adam(head.parameters(), lr=RATE)
    for step in tqdm(range(steps), desc="garbage head", leave=False, disable=not progress):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(target), (min(BATCH, len(target)),))
        loss = F.binary_cross_entropy_with_logits(
            head(statistics[rows]).squeeze(1), target[rows], weights[rows]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())
