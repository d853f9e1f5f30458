"""The combination that validation chose, in one call. Larger score = more OOD."""

import torch
from pytorch_ood.detector import GEN, ViM
from torch import Tensor

from tie_ext.combination import check_rule
from tie_ext.network import TIENet
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.support.modules import evaluating
from tie_ext.support.sample import Sample
from tie_ext.synthesis import Batches
from tie_ext.teaching import MEMORY


@torch.no_grad()
def combine(net: TIENet, training: Batches, held_out: Batches, false_alarm: float | None = 0.05, rule: str = "stouffer") -> Combined:
    """The garbage class of a network, ViM and GEN as one detector, with one line: the members and the rule that validation sets chose by their
    worst column (docs/research/attached.md). Each finds what the others miss: what looks like nothing known, odd features, odd logits.

    Arguments:
        net: A network that has learned a garbage class, as :func:`tie_ext.attach` gives it.
        training: Batches ``(x, y)`` of the ID images that the classifier was trained on; ViM learns of a sample of them that fits the memory.
        held_out: Batches ``(x, y)`` of ID images that it was not trained on: half of them set the scale of the scores, half draw the line.
        false_alarm: Reject ID images with at most this probability; None for scores without a line.
        rule: Of :data:`tie_ext.combination.RULES`. ``max`` is harder to get through for somebody who searches, as all members have to be fooled at
            once (docs/research/fooling.md).

    Raises:
        ValueError: If there are fewer than two training images, too few held-out ones, or the same loader twice, or the rule is unknown.
    """
    check_rule(rule)  # before any image is read
    if held_out is training:
        raise ValueError("Expected held-out images that the network was not trained on, but got the training images again")
    features = FeatureSample(net.feature_size)
    with evaluating(net):
        for x, _ in training:
            features.add(net.features(x.to(net.low.device)).float())
    vim = fit_vim(features.rows, net.fc.weight, net.fc.bias)
    vim.encoder = net.features
    return Combined([TIEDetector(net), vim, GEN(net)], false_alarm, rule).fit(held_out)


class FeatureSample(Sample):
    """A uniform random sample of features ``(N, F)`` that takes at most :data:`tie_ext.teaching.MEMORY`."""

    def __init__(self, feature_size: int):
        super().__init__(max(2, MEMORY // (4 * feature_size)))


def fit_vim(features: Tensor, weight: Tensor, bias: Tensor | None) -> ViM:
    """ViM of training features alone.

    Its principal space has half as many dimensions as there are features, or images where these are fewer: something is left of it to measure.

    Arguments:
        features: ``(N, F)``, N >= 2.
        weight: Of the classifier's last layer, ``(n, F)``.
        bias: ``(n,)``; None for zeros.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(features) < 2:
        raise ValueError(f"Expected at least two training images for ViM, but got {len(features)}")
    vim = ViM(None, min(features.shape) // 2, weight.float(), weight.new_zeros(len(weight)) if bias is None else bias)
    return vim.fit_features(features, torch.zeros(len(features), dtype=torch.long))
