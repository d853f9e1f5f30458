"""OpenOOD's trainer contract around :func:`tie_ext.attach`."""

from collections.abc import Iterator

import openood.utils.comm as comm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.openood.network import backbone_of
from tie_ext.training.attach import attach


class OpenOODAttachTrainer:
    """Trainer ``attach``: a garbage head for a network that OpenOOD has trained, which stays as it is; one epoch does it.

    Arguments:
        net: A ``tie_net`` with ``network.head: layers``. Its weights are those of ``network.backbone.checkpoint``, OpenOOD's ``best.ckpt`` of
            the network ``network.backbone``.
        train_loader: OpenOOD's loader, batches ``{"data": ..., "data_aux": (B, 3, S, S), "label": (B,)}``. The images of ``data_aux`` are
            read: they are the training images as test images are prepared, without crops and flips.
        config: OpenOOD's config.

    Raises:
        ValueError: If the garbage class is no head on every layer, there is no checkpoint, it is of another network, or several processes train.
    """

    def __init__(self, net: TIENet, train_loader: DataLoader, config):
        if comm.get_world_size() > 1:
            raise ValueError(
                f"Expected one process for trainer attach, but got {comm.get_world_size()}; give --num_gpus 1 or 0"
            )
        if not isinstance(getattr(net, "garbage", None), GarbageHead):
            raise ValueError(
                "Expected network tie_net with network.head layers for trainer attach, but got another; see pipelines/train/attach_tie.yml"
            )
        self.net, self.batches, self.seed = net, _Prepared(train_loader), config.seed or 0
        self.model = backbone_of(config.network.backbone)
        _fill(self.model, config.network.backbone)

    def train_epoch(self, epoch_idx: int) -> tuple[nn.Module, dict]:
        """Attach the head.

        Returns:
            The network, ``epoch_idx`` and ``loss``, which is not a number, as the classifier learns nothing.
        """
        net, low, high = (
            self.net,
            self.net.low.flatten().tolist(),
            self.net.high.flatten().tolist(),
        )
        model = self.model.to(net.low.device).eval()
        attached = attach(
            model,
            self.batches,
            net.num_classes,
            low,
            high,
            seed=self.seed,
            progress=comm.is_main_process(),
        )
        net.load_state_dict(attached.state_dict())
        return net, {"epoch_idx": epoch_idx, "loss": float("nan")}


def _fill(model: nn.Module, backbone_config) -> None:
    """Read the trained weights, all of them: OpenOOD itself leaves out, without a word, those that do not fit."""
    path = backbone_config.checkpoint
    if path in (None, "none"):
        raise ValueError(
            "Expected network.backbone.checkpoint, a best.ckpt of OpenOOD's, for trainer attach, but got none"
        )
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise ValueError(
            f"Expected a checkpoint of network.backbone.name {backbone_config.name} for trainer attach, but got {path}: {error}"
        ) from None


class _Prepared:
    """Batches of one of OpenOOD's loaders as ``(x, y)``, the images as they are in tests."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch["data_aux"], batch["label"]) for batch in self.loader)
