"""What :func:`tie_ext.combine` combines, as an OpenOOD postprocessor: larger conf = more ID."""

from collections.abc import Iterator
from typing import Any

import torch
from openood.utils.config import Config
from torch import Tensor, nn, no_grad
from tqdm import tqdm

from tie_ext.models.network import TIENet
from tie_ext.openood.loaders import PlainImages
from tie_ext.openood.postprocessors import Postprocessor
from tie_ext.pytorch_ood.combined import Combined, saved_rule
from tie_ext.pytorch_ood.members import Outputs, forward
from tie_ext.pytorch_ood.recommended import chosen_members, fit_chosen
from tie_ext.pytorch_ood.sample import kept_sample, sample_features
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.views import eval_view


class CombinedPostprocessor(Postprocessor):
    """Postprocessor ``tie_combined``: the members of :func:`tie_ext.combine` by one forward pass.

    Of a network that is no ``tie_net`` the garbage class is left out, and of one whose last layer
    is not found fDBD. Its parameter is the ``rule``, a name in
    :data:`tie_ext.scores.combination.RULES`. It is set up on ID images alone: training images fit
    the members and say how far distances to them are trusted, and validation images set the scale
    of each score. They are read in the same way in every script, and no seed changes the result.
    """

    name = "tie_combined"

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self.rule = saved_rule(self.parameters["rule"])  # configs of before name others too
        self.combined: Combined | None = None

    @no_grad()
    def setup(self, net: nn.Module, id_loader_dict: dict, ood_loader_dict: dict) -> None:
        """Fit the members on what a ``tie_net`` has kept of its training images, or on
        ``id_loader_dict["train"]``, the scales on ``id_loader_dict["val"]``.

        No OOD image is read.

        Raises:
            ValueError: If there are fewer than two training images, or a score is the same for all
                validation images.
        """
        if self.combined is not None:
            return
        inner = getattr(net, "module", net)
        garbage, view = isinstance(inner, TIENet), eval_view(inner)
        if isinstance(inner, TIENet) and inner.train_features is not None:
            sample = kept_sample(inner)
        else:
            sample = sample_features(_outputs(view, id_loader_dict, "train"))
        layer = _last_layer(inner, sample.features)
        self._say_what_is_missing(type(inner).__name__, garbage, layer is not None)
        combined = Combined(chosen_members(sample, None, layer, garbage), None)
        combined.rule = self.rule
        self.combined = fit_chosen(combined, sample, _outputs(view, id_loader_dict, "val"))

    def _say_what_is_missing(self, network: str, garbage: bool, layer: bool) -> None:
        if not garbage:
            tqdm.write(
                f"{network} has no garbage class, so that {self.name} combines without one; "
                "postprocessor attach gives it one, and `python -m tie_ext.openood attach` saves "
                "it"
            )
        if not layer:
            tqdm.write(
                f"{network} has no linear last layer in get_fc() or fc, so that {self.name} goes "
                "without fDBD"
            )

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


def _outputs(net: nn.Module, loaders: dict, split: str) -> Iterator[tuple[Outputs, Tensor | None]]:
    """What members read of the ID images of a loader, and their labels."""
    images, device = PlainImages(loaders[split], loaders["val"]), next(net.parameters()).device
    for batch in BatchReader(images, id_only=True, name=f"OpenOOD's {split} loader"):
        yield _read(net, batch.images.to(device)), batch.labels


def _last_layer(net: nn.Module, features: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weights ``(n, F)`` and biases ``(n,)`` of the last layer, which takes features ``(N, F)``;
    None where it is not found.
    """
    fc: Any = getattr(net, "fc", None)
    found = (fc.weight, fc.bias) if isinstance(fc, nn.Linear) else None
    if hasattr(net, "get_fc"):
        found = net.get_fc()  # type: ignore[operator]
    if found is None:
        return None
    w, b = (None if part is None else torch.as_tensor(part).to(features) for part in found)
    return (w, b) if w is not None and w.shape[1:] == features.shape[1:] else None
