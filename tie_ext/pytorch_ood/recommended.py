"""The combination that we recommend, in one call. Larger score = more OOD."""

import logging
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from pytorch_ood.api import Detector
from pytorch_ood.detector import EnergyBased
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.models.readout import OwnLogits
from tie_ext.pytorch_ood.base import id_reader, warn_if_seen
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.pytorch_ood.fdbd import BoundaryDistance
from tie_ext.pytorch_ood.knn import MAX_SAMPLES, SampledKNN
from tie_ext.pytorch_ood.mahalanobis import MahalanobisPlusPlus
from tie_ext.pytorch_ood.members import Outputs, forward
from tie_ext.pytorch_ood.sample import (
    NEIGHBOURS,
    Sample,
    kept_sample,
    neighbours,
    sample_features,
)
from tie_ext.scores.combination import check_rule
from tie_ext.scores.threshold import Guarantee
from tie_ext.utils.checks import check_number
from tie_ext.utils.distributed import gathered, world
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.subset import SampledLoader
from tie_ext.utils.views import eval_view

log = logging.getLogger(__name__)


@torch.no_grad()
@without_autocast
def combine(
    net: TIENet,
    *,
    calibration_loader: Iterable,
    train_loader: Iterable | None = None,
    false_alarm: float | None = 0.05,
    rule: str = "tail",
    guarantee: str = "average",
    confidence: float = 0.95,
    per_class: bool = False,
) -> Combined:
    """The garbage class of a network and four other scores as one detector with one threshold.

    Energy and fDBD tell between which classes an image lies; the garbage class, KNN and
    Mahalanobis++ how far it is from training images. These distances count in the mean as far as
    training images say that they rank near images too (:mod:`tie_ext.scores.trust`); the garbage
    class and Mahalanobis++ also where their sum exceeds nearly all ID images
    (:func:`tie_ext.scores.combination.body_and_tail`). Members and weights were chosen on
    validation OOD sets and held-out classes of networks that others trained
    (docs/research/public_networks.md).

    Arguments:
        net: A network with a garbage class, as :func:`tie_ext.attach` gives it.
        calibration_loader: ID images on which the classifier was not trained, with or without
            labels: half of them set the scale of the scores, half the threshold. In both loaders
            images with labels < 0 are left out.
        train_loader: ID images on which it was trained; the features of a sample of them fit the
            other scores. None for those that :func:`tie_ext.attach` kept in the network.
        false_alarm: Share of new ID images that may be rejected, in (0, 1]; None for scores
            without a threshold.
        rule: How the scores are combined, one of :data:`tie_ext.scores.combination.RULES`. ``max``
            resists adversarially optimised inputs better, as all members have to be fooled at once
            (docs/research/fooling.md).
        guarantee: What ``false_alarm`` bounds, ``average`` or ``pac``; as for the next two,
            :class:`Combined` says more.
        confidence: Of ``pac``, in (0, 1).
        per_class: Give each predicted class that has enough held-out images a threshold of its
            own.

    Returns:
        The fitted detector. A warning says so where calibration images are training images.

    Raises:
        TypeError: If the network is no TIENet.
        ValueError: If there are fewer than two training images or too few for calibration, the
            same loader is given twice, none for a network that has kept no features, images or
            labels are not those of the network, or the rule is unknown or ``false_alarm`` out of
            range.
    """
    check_rule(rule)  # all arguments before any image is read
    Guarantee(guarantee, confidence, per_class)
    if false_alarm is not None:
        check_number("false_alarm", false_alarm, 0, 1, above=True)
    TIEDetector(net)  # a TypeError where it has no garbage class
    if calibration_loader is train_loader:
        raise ValueError(
            "Expected calibration images that the network was not trained on, "
            "but got the training images again"
        )
    calibration = _read(net, calibration_loader, "calibration_loader", "all_logits")
    if train_loader is None:
        sample = kept_sample(net)
    else:
        sample = sample_features(_read(net, train_loader, "train_loader", "features", MAX_SAMPLES))
    linear = not isinstance(net.fc, OwnLogits)
    if not linear:
        log.warning("left out fDBD, as the network does not end in a linear layer of its features")
    layer = (net.fc.weight, net.fc.bias) if linear else None
    members, promise = chosen_members(sample, net, layer), (guarantee, confidence, per_class)
    combined = Combined(members, false_alarm, rule, *promise)
    return fit_chosen(combined, sample, calibration)


def _read(
    net: TIENet, loader: Iterable, name: str, field: str, count: int | None = None
) -> Iterator[tuple[Outputs, Tensor | None]]:
    """What the network gives for a loader's ID images, or a sample of so many, and their labels;
    in several processes for this one's share.
    """
    view, device = eval_view(net), net.low.device
    if count is not None or world() > 1:
        loader = SampledLoader(loader, count, 0, name, rereadable=False)
    for x, labels in id_reader(net, loader, name):
        yield forward(view, x.to(device), {field}), labels


def chosen_members(
    sample: Sample,
    net: TIENet | None = None,
    layer: tuple[Tensor, Tensor | None] | None = None,
    garbage: bool = True,
) -> list[Detector]:
    """The members of the combination: garbage class, KNN, energy, Mahalanobis++ and fDBD.

    Arguments:
        sample: Training images, N >= 2.
        net: Their network; None to score its outputs alone (:meth:`Combined.score_outputs`).
        layer: Weights ``(n, F)`` and biases ``(n,)`` of its last layer; None to leave fDBD out.
        garbage: Whether the network has a garbage class, which is left out where not.

    Raises:
        ValueError: If there are fewer than two training images.
    """
    encoder, (features, labels, _) = None if net is None else net.features, sample
    knn, gaussians = fit_knn(features), MahalanobisPlusPlus(encoder)  # type: ignore[arg-type]
    knn.encoder = encoder
    members = [knn, EnergyBased(net), gaussians.fit_features(features, labels)]
    if layer is not None:
        members.append(BoundaryDistance(encoder, *layer).fit_features(features))
    return [*([TIEDetector(net)] if garbage else []), *members]


def fit_chosen(
    combined: Combined, sample: Sample, batches: Iterable[tuple[Outputs, Tensor | None]]
) -> Combined:
    """Fit a combination of chosen members.

    Arguments:
        combined: The combination; it is fitted.
        sample: The training images that its members were fitted on.
        batches: What the network gives for held-out ID images, and their labels or None.

    Returns:
        The combination.

    Raises:
        ValueError: If there are too few images, or a score is not finite or the same for all.
    """
    found, predicted, features = [], [], []
    for outputs, _ in batches:
        found.append(combined.score_outputs(outputs))
        predicted.append(outputs.logits.argmax(dim=1))
        features.append(cast(Tensor, outputs.features))
    warn_if_seen(sample.features, torch.cat(features))
    scores, labels = (gathered(torch.cat(of), found[0].device) for of in (found, predicted))
    return combined.fit_scores(scores, labels, sample.trust())


def fit_knn(features: Tensor) -> SampledKNN:
    """KNN of training features, a random sample where they are many
    (:func:`tie_ext.pytorch_ood.sample.neighbours`).

    Arguments:
        features: ``(N, F)``, N >= 2.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"Expected at least two training images for KNN, but got {len(features)}")
    return SampledKNN(None, neighbours(len(features)), NEIGHBOURS).fit_features(features)
