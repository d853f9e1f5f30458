"""Random streams: each part of a run has its own, so that a change in one changes no other."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from numpy.random import SeedSequence

FIRST_WEIGHTS, FIRST_POOL, SURVEY, HEAD = 1, 2, 3, 4
"""Streams of a training, after its seed, epoch (0 before the first) and rank: the first weights of
generators and VAEs, the images that the pool begins with, the survey of the data, the steps of a
head on every layer. Everything else in an epoch has the stream of seed, epoch and rank."""
FIRST_BATCH = 1
"""Stream, after the seed, of the batch that attach and explain read for the shape of images: a
loader that shuffles draws from it."""
OUTLIERS = 2
"""Stream, after the seed and before rank and batch, of what attach draws beside a batch."""


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Set torch's random state inside, and restore it after.

    Arguments:
        key: Integers >= 0 that name the stream, such as seed, epoch and rank; different keys give
            independent streams.
    """
    # A sum or product of the parts would give one seed to different keys. With the length, as
    # SeedSequence takes (1,) and (1, 0) for the same.
    (state,) = SeedSequence((len(key), *key)).generate_state(1, "uint64")
    # Of GPUs only where they are in use already: forking their states would start them all.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(gpus):
        torch.manual_seed(int(state))
        yield
