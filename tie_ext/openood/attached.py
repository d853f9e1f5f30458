"""A garbage class for a network that is being scored, as an OpenOOD postprocessor."""

import openood.utils.comm as comm
import torch
from openood.utils.config import Config
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.openood.combined import CombinedPostprocessor
from tie_ext.openood.loaders import PlainImages, value_range_of
from tie_ext.openood.network import OpenOODTIENet, tie_net_of
from tie_ext.training.attach import attach
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.views import eval_view


class AttachPostprocessor(CombinedPostprocessor):
    """Postprocessor ``attach``: :func:`tie_ext.attach` and then ``tie_combined``, on any network.

    The network stays as it is. The head is fitted to ID training images when it is set up; a
    ``tie_net`` has a garbage class already, which is used.
    """

    name = "attach"

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self.net: nn.Module | None = None

    def setup(self, net: nn.Module, id_loader_dict: dict, ood_loader_dict: dict) -> None:
        """Attach, on ``id_loader_dict["train"]``, and set the combination up; no OOD image is
        read.

        Raises:
            ValueError: If the network or the images do not suit :func:`tie_ext.attach`.
        """
        if self.net is None:
            inner = getattr(net, "module", net)
            plain = not isinstance(inner, TIENet)
            self.net = attached(inner, id_loader_dict, self.config.dataset) if plain else inner
        super().setup(self.net, id_loader_dict, ood_loader_dict)  # type: ignore[arg-type]

    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)`` of images ``(B, 3, S, S)``.

        Raises:
            RuntimeError: If it has not been set up.
        """
        return super().postprocess(self.net or net, data)


def attached(net: nn.Module, loaders: dict, dataset: Config | None = None) -> OpenOODTIENet:
    """One of OpenOOD's trained networks with a garbage class; the network itself stays as it is.

    Arguments:
        net: The network, on the device to work on.
        loaders: OpenOOD's ID loaders, ``train`` and ``val``. Training images are read, as they are
            tested, in an order that no seed changes.
        dataset: Config of the data set, for images whose loader does not say how they were
            normalised.

    Raises:
        ValueError: If the network or the images do not suit :func:`tie_ext.attach`.
    """
    images, view = PlainImages(loaders["train"], loaders.get("val")), eval_view(net)
    x = BatchReader(images).first().images[:1].to(next(net.parameters()).device)
    with torch.no_grad():
        num_classes = view(x).shape[1]
    bounds = value_range_of(loaders["train"], dataset)
    found = attach(view, images, num_classes, *bounds, progress=comm.is_main_process())
    return tie_net_of(found.state_dict(), view, x.shape[-1]).eval()
