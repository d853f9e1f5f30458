"""Whether held-out images are training images again, by digests of their values.

A threshold from images that a network was trained on promises what it does not keep: the network
is more certain of them than of new ones.
"""

import hashlib
import warnings

import numpy as np
import torch
from torch import Tensor

VALUES = 256
"""Values of an image that its digest is made of, spread over the whole of it."""
MAX_DIGESTS = 100_000
"""Digests that are kept, the smallest: of two sets the same images are kept, in whatever order
they come."""
SHARE = 0.1
"""Share of held-out images that may be training images; with more, 5 % become 5.6 % and
more."""


class Digests:
    """Digests of the images of a loader."""

    def __init__(self) -> None:
        self.found = np.empty(0, np.uint64)

    def add(self, x: Tensor) -> None:
        """Add images ``(B, C, H, W)``."""
        values = x.detach().flatten(1).float().cpu()
        places = torch.linspace(0, values.shape[1] - 1, VALUES).long()
        new = [_digest(row.tobytes()) for row in values[:, places].numpy()]
        self.found = np.append(self.found, np.array(new, np.uint64))
        if len(self.found) > 2 * MAX_DIGESTS:
            self.found = self._smallest()

    def _smallest(self) -> np.ndarray:
        return np.unique(self.found)[:MAX_DIGESTS]

    def repeated(self, held_out: "Digests") -> float:
        """Share of other images that are among these, in [0, 1]; estimated where there are
        many.
        """
        mine, theirs = self._smallest(), np.unique(held_out.found)
        if len(mine) == MAX_DIGESTS:
            theirs = theirs[theirs <= mine[-1]]
        return float(np.isin(theirs, mine).mean()) if len(theirs) else 0.0


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def warn_of_repeated(training: Digests, held_out: Digests) -> None:
    """Warn where more than :data:`SHARE` of held-out images are training images."""
    share = training.repeated(held_out)
    if share > SHARE:
        warnings.warn(
            f"{share:.0%} of the held-out images are training images: a threshold from them "
            "rejects more new images than it says; hold out images that the network has not seen",
            stacklevel=3,
        )
