"""Random streams: each part of a run draws from its own, so that what one part draws changes
nothing in another.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from numpy.random import SeedSequence


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Fix torch's random state inside, and leave it outside as it was.

    Arguments:
        key: Integers >= 0 that name the stream, such as seed, epoch and rank; different keys give
            independent streams.
    """
    # SeedSequence, as sums and products of the parts give the same seed for different parts; with
    # the length, as it takes (1,) and (1, 0) for one.
    (state,) = SeedSequence((len(key), *key)).generate_state(1, "uint64")
    with torch.random.fork_rng():
        torch.manual_seed(int(state))
        yield
