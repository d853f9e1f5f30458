"""Garbage class, KNN and GEN combined, as an OpenOOD postprocessor: larger conf = more ID."""

from collections.abc import Iterator

import torch
from openood.utils.config import Config
from torch import Tensor, nn, no_grad
from tqdm import tqdm

from tie_ext.models.network import TIENet
from tie_ext.openood.loaders import PlainImages
from tie_ext.openood.postprocessors import Postprocessor
from tie_ext.pytorch_ood.combine import chosen_members, sample_features
from tie_ext.pytorch_ood.combined import Combined, saved_rule
from tie_ext.pytorch_ood.members import Outputs, forward
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.random import seeded
from tie_ext.utils.views import eval_view


class CombinedPostprocessor(Postprocessor):
    """Postprocessor ``tie_combined``: the members of :func:`tie_ext.combine` by one forward pass.

    These are the garbage class of a ``tie_net``, KNN and GEN; of any other network the latter two.
    Its parameter is the ``rule``, a name in :data:`tie_ext.scores.combination.RULES`. It is set up
    on ID images alone: KNN keeps features of training images, and validation images set the scale
    of each score. They are read in the same way in every script, and no seed changes the result.
    """

    name = "tie_combined"

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self.rule = saved_rule(self.parameters["rule"])  # configs of 0.2.0 name others too
        self.combined: Combined | None = None

    @no_grad()
    def setup(self, net: nn.Module, id_loader_dict: dict, ood_loader_dict: dict) -> None:
        """Fit KNN on ``id_loader_dict["train"]`` and the scales on ``id_loader_dict["val"]``.

        No OOD image is read.

        Raises:
            ValueError: If there are fewer than two training images, or a score is the same for all
                validation images.
        """
        if self.combined is not None:
            return
        inner = getattr(net, "module", net)
        garbage, view = isinstance(inner, TIENet), eval_view(inner)
        if not garbage:
            tqdm.write(
                f"{type(inner).__name__} has no garbage class, so that {self.name} combines KNN "
                "and GEN alone; trainer attach would give it one"
            )
        with seeded(0):
            train = _outputs(view, id_loader_dict, "train")
            features = sample_features(outputs.features for outputs in train)  # type: ignore[misc]
        combined = Combined(chosen_members(features, garbage=garbage), None)
        combined.rule = self.rule
        val = map(combined.score_outputs, _outputs(view, id_loader_dict, "val"))
        self.combined = combined.fit_scores(torch.cat(list(val)))

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)`` of images ``(B, 3, S, S)``.

        Raises:
            RuntimeError: If it has not been set up.
        """
        if self.combined is None:
            raise self.needs_setup()
        outputs = _read(getattr(net, "module", net), data)
        score = self.combined.predict_scores(self.combined.score_outputs(outputs))
        return outputs.logits.argmax(dim=1), -score


def _read(net: nn.Module, x: Tensor) -> Outputs:
    """What members read of images ``(B, 3, S, S)``, by one forward pass."""
    if isinstance(net, TIENet):
        return forward(net, x, {"all_logits"})
    logits, h = net(x, return_feature=True)
    return Outputs(logits, h.flatten(1))


def _outputs(net: nn.Module, loaders: dict, split: str) -> Iterator[Outputs]:
    """What members read of the ID images of a loader."""
    images, device = PlainImages(loaders[split], loaders["val"]), next(net.parameters()).device
    for batch in BatchReader(images, id_only=True, name=f"OpenOOD's {split} loader"):
        yield _read(net, batch.images.to(device))
