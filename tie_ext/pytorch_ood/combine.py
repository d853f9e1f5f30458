"""The combination that validation chose, in one call. Larger score = more OOD."""

from collections.abc import Iterable

import torch
from pytorch_ood.api import Detector
from pytorch_ood.detector import GEN
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.base import id_reader
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.pytorch_ood.knn import MAX_SAMPLES, K, SampledKNN
from tie_ext.scores.combination import check_rule
from tie_ext.utils.reservoir import Reservoir
from tie_ext.utils.views import eval_view


@torch.no_grad()
def combine(
    net: TIENet,
    *,
    train_loader: Iterable,
    calibration_loader: Iterable,
    false_alarm: float | None = 0.05,
    rule: str = "zsum",
) -> Combined:
    """The garbage class of a network, KNN and GEN as one detector with one threshold.

    Members and rule were chosen on validation sets by their worst column
    (docs/research/attached.md). Each finds what the others miss: unfamiliar images, unfamiliar
    features, unfamiliar logits.

    Arguments:
        net: A network with a garbage class, as :func:`tie_ext.attach` gives it.
        train_loader: ID images on which the classifier was trained, with or without labels; KNN
            keeps the features of a sample of them.
        calibration_loader: ID images on which it was not trained, with or without labels: half of
            them set the scale of the scores, half the threshold. In both loaders images with
            labels < 0 are left out.
        false_alarm: Share of new ID images that may be rejected, in (0, 1]; None for scores
            without a threshold.
        rule: How the scores are combined, one of :data:`tie_ext.scores.combination.RULES`. ``max``
            resists adversarially optimised inputs better, as all members have to be fooled at once
            (docs/research/fooling.md).

    Returns:
        The fitted detector.

    Raises:
        TypeError: If the network is no TIENet.
        ValueError: If there are fewer than two training images, too few for calibration, or the
            same loader twice, if images or labels are not those of the network, or the rule is
            unknown.
    """
    check_rule(rule)  # before any image is read
    device = TIEDetector(net).device  # a TypeError where it has no garbage class
    if calibration_loader is train_loader:
        raise ValueError(
            "Expected calibration images that the network was not trained on, "
            "but got the training images again"
        )
    view, batches = eval_view(net), id_reader(net, train_loader, "train_loader")
    features = sample_features(view.features(x.to(device)) for x, _ in batches)
    return Combined(chosen_members(features, net), false_alarm, rule).fit(calibration_loader)


def chosen_members(
    features: Tensor, net: TIENet | None = None, garbage: bool = True
) -> list[Detector]:
    """The members of the combination: garbage class, KNN and GEN.

    Arguments:
        features: Features ``(N, F)`` of training images, N >= 2.
        net: Their network; None to score its outputs alone (:meth:`Combined.score_outputs`).
        garbage: Whether the network has a garbage class; the other two are left where not.
    """
    knn = fit_knn(features)
    knn.encoder = None if net is None else net.features
    return [*([TIEDetector(net)] if garbage else []), knn, GEN(net)]


def sample_features(batches: Iterable[Tensor], max_samples: int = MAX_SAMPLES) -> Tensor:
    """A uniform random sample ``(N, F)`` of at most ``max_samples`` of the features ``(B, F)`` in
    batches.
    """
    sample = Reservoir(max_samples)
    for features in batches:
        sample.add(features.float())
    return sample.rows


def fit_knn(features: Tensor) -> SampledKNN:
    """KNN of training features: the 50th neighbour of 5000 images, and one in a hundred of fewer,
    as k has to grow with their number.

    Arguments:
        features: ``(N, F)``, N >= 2.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"Expected at least two training images for KNN, but got {len(features)}")
    k = max(1, min(MAX_SAMPLES, len(features)) * K // MAX_SAMPLES)
    return SampledKNN(None, k).fit_features(features)
