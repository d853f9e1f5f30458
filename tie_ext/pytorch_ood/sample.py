"""A sample of training images that a combination is fitted on: what the network makes of them."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.knn import MAX_SAMPLES, K
from tie_ext.pytorch_ood.members import Outputs, confidence_of
from tie_ext.scores.decision import upcast
from tie_ext.scores.knn import Prepared, knn_score
from tie_ext.scores.trust import trust
from tie_ext.utils.distributed import gathered
from tie_ext.utils.reservoir import Reservoir

NEIGHBOURS = 2000
"""Training images of KNN: more cost every score time and rank no better."""


class Sample(NamedTuple):
    """A random sample of the training images."""

    features: Tensor
    """``(N, F)``."""
    labels: Tensor | None
    """``(N,)``; None where the loader has none."""
    confidence: Tensor
    """``(N,)`` largest probabilities of the network."""

    def trust(self) -> float:
        """How far distances to training images are trusted, in [0, 1]: by the distance of some of
        these images to the others (:mod:`tie_ext.scores.trust`). No held-out image is asked."""
        some = self.features[:NEIGHBOURS]
        k = min(neighbours(len(self.features)) + 1, len(some))  # the nearest is the image itself
        return trust(knn_score(some, Prepared(some), k), self.confidence[:NEIGHBOURS])


def kept_sample(net: TIENet) -> Sample:
    """What a network has kept of its training images.

    Raises:
        ValueError: If it has kept nothing, as networks that were saved before 0.3 have not.
    """
    if net.train_features is None:
        raise ValueError(
            "Expected a network that has kept features of its training images, but got one that "
            "an earlier version saved, or that was not attached; give train_loader=..., its "
            "training images"
        )
    features, labels = net.train_features.float(), net.train_labels
    with torch.no_grad():
        logits = upcast(net.fc(features.to(net.fc.weight)))
    outputs = Outputs(logits, features)
    return Sample(features, None if labels is None else labels.cpu(), confidence_of(outputs))


def sample_features(
    batches: Iterable[tuple[Outputs, Tensor | None]], max_samples: int = MAX_SAMPLES
) -> Sample:
    """A uniform random sample of at most ``max_samples`` of the images whose features and labels,
    where they have any, are in batches.
    """
    # A stream of its own: the same images give the same detector, and the caller's stream stays.
    sample, labelled = Reservoir(max_samples, torch.Generator().manual_seed(0)), True
    for outputs, labels in batches:
        labelled = labelled and labels is not None
        none = torch.zeros(len(outputs.logits), dtype=torch.long)
        y = none if labels is None else labels
        sample.add(outputs.features.float(), y, confidence_of(outputs))  # type: ignore[union-attr]
    columns = (gathered(column, sample.columns[0].device) for column in sample.columns)
    features, kept, confidence = columns
    return Sample(features, kept if labelled else None, confidence)


def neighbours(count: int) -> int:
    """Which neighbour KNN takes of so many training images: the 20th of 2000, and one in a hundred
    of fewer, as k has to grow with their number."""
    return max(1, min(NEIGHBOURS, count) * K // MAX_SAMPLES)
