"""DMR's rejection network as an OpenOOD postprocessor: larger conf = more ID."""

from collections.abc import Iterable

import torch
from openood.postprocessors import BasePostprocessor
from openood.preprocessors.transform import normalization_dict
from openood.utils.config import Config
from torch import Tensor, nn, no_grad

from tie_ext.openood.postprocessors import arguments, shipped
from tie_ext.openood.trainer import Pairs
from tie_ext.outliers.base import Domain
from tie_ext.outliers.marginal import (
    MarginalRepresentations,
    MarginalSettings,
    fit_rejection,
    marginal_features,
)


class DMRPostprocessor(BasePostprocessor):
    """Postprocessor ``dmr``: DMR's rejection network on the features of any network, which stays as it is.

    Set up on the ID training images: a VAE is trained on them (``vae_epochs`` passes), one outlier an image is decoded from the marginal
    representations of ``k`` images, and the rejection network learns the features of both (``epochs`` passes).
    """

    def __init__(self, config: Config | None = None):
        super().__init__(config or shipped("dmr"))
        self.APS_mode, self.hyperparam_search_done = False, False
        self.settings = arguments("dmr", self.config)
        self.network: nn.Module | None = None

    def setup(self, net: nn.Module, id_loader_dict: dict, ood_loader_dict: dict) -> None:
        """Train the VAE and the rejection network on ``id_loader_dict["train"]``; no OOD loader is read."""
        if self.network is not None:
            return
        device = next(net.parameters()).device
        batches = Pairs(id_loader_dict["train"])
        net.eval()
        with no_grad():
            x = next(iter(batches))[0]
            num_classes = net(x.to(device)).shape[1]
        domain = Domain(
            num_classes, tuple(x.shape[1:]), *_bounds(id_loader_dict["train"], self.config.dataset)
        )
        synthesizer = MarginalRepresentations(
            domain, MarginalSettings(k=self.settings["k"], vae_epochs=self.settings["vae_epochs"])
        )
        features, outlier = marginal_features(
            lambda x: net(x, return_feature=True)[1].flatten(1), synthesizer, batches, device
        )
        self.network = fit_rejection(features, outlier, epochs=self.settings["epochs"])

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)``, minus the log-odds of being an outlier, of images ``(B, 3, S, S)``.

        Raises:
            RuntimeError: If it has not been set up.
        """
        if self.network is None:
            raise RuntimeError(
                "Expected postprocessor dmr to be set up on the ID training images, but got none; call setup first"
            )
        logits, features = net(data, return_feature=True)
        return logits.argmax(dim=1), -self.network(features.flatten(1)).squeeze(1)


def _bounds(loader: Iterable, dataset: Config | None) -> list[Tensor]:
    """What 0 and 1 become in the images of a loader, each ``(3, 1, 1)``: by the ``Normalize`` that it ends in, else by the config of its data set."""
    # The evaluation API gives a postprocessor that was passed to it no config at all.
    preprocessor = getattr(getattr(loader, "dataset", None), "preprocessor", None)
    transform = getattr(preprocessor, "transform", preprocessor)
    last = (getattr(transform, "transforms", None) or [transform])[-1]
    known = normalization_dict.get(
        (dataset.normalization_type or dataset.name) if dataset else None, ([0.5] * 3, [0.5] * 3)
    )
    mean, std = (
        torch.tensor(getattr(last, name, value)).view(-1, 1, 1)
        for name, value in zip(("mean", "std"), known, strict=True)
    )
    return [-mean / std, (1 - mean) / std]
