"""DMR's rejection network as an OpenOOD postprocessor: larger conf = more ID."""

import torch
from openood.utils.config import Config
from torch import Tensor, nn, no_grad

from tie_ext.openood.loaders import PlainImages, value_range_of
from tie_ext.openood.postprocessors import Postprocessor
from tie_ext.outliers.base import Domain
from tie_ext.outliers.marginal import (
    MarginalRepresentations,
    MarginalSettings,
    fit_rejection,
    marginal_features,
)
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.random import seeded
from tie_ext.utils.views import eval_view


class DMRPostprocessor(Postprocessor):
    """Postprocessor ``dmr``: DMR's rejection network on the features of any network.

    The network stays as it is. On the ID training images a VAE is trained (``vae_epochs`` passes),
    one outlier an image is decoded from the marginal representations of ``k`` images, and the
    rejection network is trained on the features of both (``epochs`` passes). Images and random
    numbers are the same in every script and for every seed.
    """

    name = "dmr"

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self.network: nn.Module | None = None

    def setup(self, net: nn.Module, id_loader_dict: dict, ood_loader_dict: dict) -> None:
        """Train VAE and rejection network on ``id_loader_dict["train"]``; no OOD image is read."""
        if self.network is not None:
            return
        net, train, args = eval_view(net), id_loader_dict["train"], self.parameters
        images = PlainImages(train, id_loader_dict.get("val"))
        reader = BatchReader(images, labelled=True, id_only=True, name="OpenOOD's training loader")
        x, device = reader.first().images, next(net.parameters()).device
        with no_grad():
            num_classes = net(x.to(device)).shape[1]
        bounds = value_range_of(train, self.config.dataset)
        low, high = (torch.tensor(bound).view(-1, 1, 1) for bound in bounds)
        with seeded(0):
            synthesizer = MarginalRepresentations(
                Domain(num_classes, tuple(x.shape[1:]), low, high),
                MarginalSettings(k=args["k"], vae_epochs=args["vae_epochs"]),
            )
            features, outlier = marginal_features(
                lambda x: net(x, return_feature=True)[1].flatten(1),
                synthesizer,
                reader,  # type: ignore[arg-type]  # all of its batches have labels
                device,
            )
            self.network = fit_rejection(features, outlier, epochs=args["epochs"])

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)`` of images ``(B, 3, S, S)``.

        conf is the negative of the log-odds of being an outlier.

        Raises:
            RuntimeError: If it has not been set up.
        """
        if self.network is None:
            raise self.needs_setup()
        logits, features = net(data, return_feature=True)
        return logits.argmax(dim=1), -self.network(features.flatten(1)).squeeze(1)
