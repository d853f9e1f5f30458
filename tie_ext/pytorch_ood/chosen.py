"""The combination that validation chose, in one call. Larger score = more OOD."""

import torch
from pytorch_ood.detector import GEN, ViM

from tie_ext.network import TIENet
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.support.modules import evaluating
from tie_ext.synthesis import Batches
from tie_ext.teaching import MEMORY, Sample


@torch.no_grad()
def combine(net: TIENet, training: Batches, held_out: Batches, false_alarm: float | None = 0.05) -> Combined:
    """The garbage class of a network, ViM and GEN as one detector, with one line: the members and the rule that validation sets chose by their
    worst column (docs/attached.md). Each finds what the others miss: what looks like nothing known, odd features, odd logits.

    Arguments:
        net: A network that has learned a garbage class, as :func:`tie_ext.attach` gives it.
        training: Batches ``(x, y)`` of the ID images that the classifier was trained on; ViM learns of a sample of them that fits the memory.
        held_out: Batches ``(x, y)`` of ID images that it was not trained on: half of them set the scale of the scores, half draw the line.
        false_alarm: Reject ID images with at most this probability; None for scores without a line.

    Raises:
        ValueError: If there are fewer training images than twice the features, or too few held-out ones.
    """
    F, kept = net.feature_size, Sample(max(1, MEMORY // (4 * net.feature_size)))
    with evaluating(net):
        for x, _ in training:
            kept.add(net.features(x.to(net.low.device)).float())
    if len(kept.rows) < 2 * F:
        raise ValueError(f"Expected at least {2 * F} training images for ViM on {F} features, but got {len(kept.rows)}")
    weight = net.fc.weight.float()
    vim = ViM(net.features, F // 2, weight, weight.new_zeros(net.num_classes) if net.fc.bias is None else net.fc.bias)
    vim.fit_features(kept.rows, torch.zeros(len(kept.rows)))
    return Combined([TIEDetector(net), vim, GEN(net)], false_alarm).fit(held_out)
