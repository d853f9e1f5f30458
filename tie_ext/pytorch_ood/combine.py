"""The combination that validation chose, in one call. Larger score = more OOD."""

import torch
from pytorch_ood.detector import GEN
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Batches
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.pytorch_ood.knn import SampledKNN
from tie_ext.scores.combination import check_rule
from tie_ext.utils.modules import evaluating
from tie_ext.utils.reservoir import Reservoir


@torch.no_grad()
def combine(
    net: TIENet,
    *,
    train_loader: Batches,
    calibration_loader: Batches,
    false_alarm: float | None = 0.05,
    rule: str = "zsum",
) -> Combined:
    """The garbage class of a network, KNN and GEN as one detector, with one line: the members and the rule that validation sets chose by their
    worst column (docs/research/attached.md). Each finds what the others miss: what looks like nothing known, odd features, odd logits.

    Arguments:
        net: A network that has learned a garbage class, as :func:`tie_ext.attach` gives it.
        train_loader: Batches ``(x, y)`` of the ID images that the classifier was trained on; KNN keeps the features of a sample of them.
        calibration_loader: Batches ``(x, y)`` of ID images that it was not trained on: half of them set the scale of the scores, half draw the line.
        false_alarm: Reject ID images with at most this probability; None for scores without a line.
        rule: Of :data:`tie_ext.scores.combination.RULES`. ``max`` is harder to get through for somebody who searches, as all members have to be fooled at
            once (docs/research/fooling.md).

    Raises:
        ValueError: If there are fewer than two training images, too few held-out ones, or the same loader twice, or the rule is unknown.
    """
    check_rule(rule)  # before any image is read
    if calibration_loader is train_loader:
        raise ValueError(
            "Expected held-out images that the network was not trained on, but got the training images again"
        )
    features = FeatureSample()
    with evaluating(net):
        for x, _ in train_loader:
            features.add(net.features(x.to(net.low.device)).float())
    knn = fit_knn(features.rows)
    knn.encoder = net.features
    return Combined([TIEDetector(net), knn, GEN(net)], false_alarm, rule).fit(calibration_loader)


class FeatureSample(Reservoir):
    """A uniform random sample of features ``(N, F)``, as many as :class:`SampledKNN` keeps."""

    def __init__(self) -> None:
        super().__init__(SampledKNN(None).most)


def fit_knn(features: Tensor) -> SampledKNN:
    """KNN of training features alone: the 50th neighbour of 5000 images, and one in a hundred of fewer, as k has to grow with their number.

    Arguments:
        features: ``(N, F)``, N >= 2.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"Expected at least two training images for KNN, but got {len(features)}")
    knn = SampledKNN(None)
    knn.k = max(1, min(knn.most, len(features)) * knn.k // knn.most)
    return knn.fit_features(features, torch.zeros(len(features), dtype=torch.long))
