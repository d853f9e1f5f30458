"""Garbage class, KNN and GEN combined, as an OpenOOD postprocessor: larger conf = more ID, the negative of the combined score."""

import torch
from openood.postprocessors import BasePostprocessor
from openood.utils.config import Config
from pytorch_ood.detector import GEN
from torch import Tensor, nn, no_grad

from tie_ext.models.network import TIENet
from tie_ext.openood.postprocessors import arguments, shipped
from tie_ext.openood.trainer import Pairs
from tie_ext.pytorch_ood.combine import FeatureSample, fit_knn
from tie_ext.pytorch_ood.knn import SampledKNN
from tie_ext.scores.combination import RULES, Reference, check_rule, reference
from tie_ext.scores.decision import ood_score


class CombinedPostprocessor(BasePostprocessor):
    """Postprocessor ``tie_combined``: the score of a ``tie_net``'s garbage class, KNN and GEN as one, by one forward pass.

    Of any other network, which has no garbage class, it combines the latter two. Its parameter is the ``rule``, a name in
    :data:`tie_ext.scores.combination.RULES`. Set up on ID images alone: KNN keeps features of training images, and the validation images set the scale of
    each score. The members are those of :func:`tie_ext.combine`.
    """

    def __init__(self, config: Config | None = None):
        super().__init__(config or shipped("tie_combined"))
        self.APS_mode, self.hyperparam_search_done = False, False
        self.rule = check_rule(arguments("tie_combined", self.config)["rule"])
        self.knn: SampledKNN | None = None
        self.reference: Reference | None = None

    @no_grad()
    def setup(self, net: nn.Module, id_loader_dict: dict, ood_loader_dict: dict) -> None:
        """Learn ``id_loader_dict["train"]``, and the scale of each score on ``id_loader_dict["val"]``; no OOD loader is read.

        Raises:
            ValueError: If there are fewer than two training images, or a score is the same for all validation images.
        """
        if self.reference is not None:
            return
        device = next(net.parameters()).device
        net.eval()
        features = FeatureSample()
        for x, _ in Pairs(id_loader_dict["train"]):
            features.add(_seen(net, x.to(device))[1].float())
        self.knn = fit_knn(features.rows)
        self.reference = reference(
            torch.cat(
                [self._scores(*_seen(net, x.to(device))) for x, _ in Pairs(id_loader_dict["val"])]
            )
        )

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)``, minus the combined score, of images ``(B, 3, S, S)``.

        Raises:
            RuntimeError: If it has not been set up.
        """
        if self.reference is None:
            raise RuntimeError(
                "Expected postprocessor tie_combined to be set up on ID training and validation images, but got none; call setup first"
            )
        logits, h, garbage = _seen(net, data)
        return logits.argmax(dim=1), -RULES[self.rule](
            self.reference, self._scores(logits, h, garbage)
        )

    def _scores(self, logits: Tensor, h: Tensor, garbage: Tensor | None) -> Tensor:
        """Scores ``(B, k)``, larger = more OOD."""
        scores = [self.knn.predict_features(h), GEN.score(logits)]  # type: ignore[union-attr]  # both who call have fitted it
        return torch.stack(scores if garbage is None else [garbage, *scores], dim=1)


def _seen(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """ID logits ``(B, n)``, features ``(B, F)`` and, of a network that has a garbage class, its score ``(B,)``; by one forward pass."""
    if not isinstance(getattr(net, "module", net), TIENet):
        logits, h = net(x, return_feature=True)
        return logits, h.flatten(1), None
    logits, h = net.outputs(x)
    return logits[:, :-1], h, ood_score(logits)
