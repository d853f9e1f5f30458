"""Stage 3 of the loop: the candidates that the network is uncertain of join the garbage pool.

Symbols: ``p (M, n+1)`` probabilities; ``u (N,)`` uncertainties (UE); ``tau`` their threshold.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.config import TIEConfig
from tie_ext.training.log import CandidateTally
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.distributed import gathered, share
from tie_ext.utils.views import frozen_view

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Batches ``(x, y)`` of ID images that are kept in memory."""


@torch.no_grad()
def exclude(
    net: TIENet,
    sample: Pairs,
    synthesizers: Iterable[Synthesizer],
    pool: GarbagePool,
    config: TIEConfig,
    count: int,
    bar: Callable[[Iterable, str], Iterable],
) -> dict[str, Any]:
    """Set tau, and add the candidates above it to the pool.

    Arguments:
        net: The network; tau is set.
        sample: ID images.
        synthesizers: Propose the candidates.
        pool: The garbage pool.
        config: lambda.
        count: Candidates that each synthesizer proposes, >= 1, of all processes.
        bar: Wraps batches in a progress bar with a title.

    Returns:
        Fields of :class:`~tie_ext.training.log.EpochLog`: ``tau``, ``accuracy``, and what a
        :class:`~tie_ext.training.log.CandidateTally` counts.

    References:
        TIE, section 4.4.
    """
    frozen, device, u, correct = frozen_view(net), net.low.device, [], []
    for x, y in bar(sample, "tau"):
        logits = upcast(frozen(x.to(device), garbage=True))
        u.append(uncertainty(logits.softmax(1)))
        correct.append(logits.argmax(1) == y.to(device))
    accuracy = float(gathered(torch.cat(correct).double(), device).mean())
    tau = exclusion_threshold(gathered(torch.cat(u).cpu(), device), config.lam)
    net.tau.fill_(tau if math.isfinite(tau) else 1.0)
    tally = CandidateTally(net.num_classes + 1)
    for synthesizer in synthesizers:
        for x, y in bar(_repeat(sample, share(count)), "exclude"):
            x, y = synthesizer.sample(frozen, x.to(device), y.to(device))
            p = upcast(frozen(x, garbage=True)).softmax(1)
            excluded = uncertainty(p) > tau
            pool.add(x, excluded)
            tally.add(p, y, excluded)
    known = tau if math.isfinite(tau) else None
    return {"tau": known, "accuracy": accuracy, **tally.result(device)}


def _repeat(batches: Pairs, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches over and over, ``count`` images in all."""
    for x, y in cycle(batches):
        yield x[:count], y[:count]
        count -= len(x)
        if count <= 0:
            return
