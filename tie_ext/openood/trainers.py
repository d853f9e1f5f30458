"""OpenOOD's trainer contract around TIE's epoch and around :func:`tie_ext.attach`."""

import os
from collections.abc import Mapping
from dataclasses import fields

import openood.utils.comm as comm
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.openood.loaders import PlainImages
from tie_ext.openood.network import backbone_of
from tie_ext.training.attach import attach
from tie_ext.training.config import TIEConfig
from tie_ext.training.recipe import Recipe, names

PARTS = ("synthesizers", "prior", "criterion")
"""Settings of the method beside those of the loop."""


class OpenOODTIETrainer:
    """Trainer ``tie``: one call of ``train_epoch`` is one epoch of :class:`tie_ext.TIETrainer`.

    ``optimizer`` and ``seed`` come from OpenOOD's config, all else from ``trainer.trainer_args``:
    every other setting of :class:`tie_ext.TIEConfig` by its name; ``synthesizers``, by name with
    the settings of each below it, or names with commas between; ``prior``, names with commas
    between, or ``none``; and ``criterion``, as in :class:`tie_ext.training.recipe.Recipe`. The
    optimiser is SGD as in OpenOOD's baseline trainer, or the paper's ``adam``; the learning rate
    follows half a cosine, as there, but changes once an epoch.

    Arguments:
        net: A ``tie_net``.
        train_loader: OpenOOD's loader, batches ``{"data": (B, 3, S, S), "label": (B,), ...}``.
        config: OpenOOD's config.

    Raises:
        ValueError: If a setting is unknown, missing or out of range, or the optimiser is neither.
    """

    def __init__(self, net: TIENet | DistributedDataParallel, train_loader: DataLoader, config):
        self.net, self.loader = net, train_loader
        # Unwrapped, as TIE's trainer synchronises the processes itself.
        inner = net.module if isinstance(net, DistributedDataParallel) else net
        head = "multilayer" if isinstance(inner.garbage, GarbageHead) else "linear"
        recipe = recipe_of_config(config, head)
        self.trainer = recipe.trainer(inner, progress=comm.is_main_process())
        if (settings := config.optimizer).name == "sgd":
            self.trainer.optimizer = torch.optim.SGD(
                inner.parameters(),
                settings.lr,
                settings.momentum,
                weight_decay=settings.weight_decay,
                nesterov=True,
            )

    def train_epoch(self, epoch_idx: int) -> tuple[nn.Module, dict]:
        """Train, invert, exclude.

        Returns:
            The network, and ``epoch_idx``, ``loss`` (the classifier's), ``tau``, ``accuracy`` and
            ``pool`` (garbage images kept).
        """
        log = self.trainer.epoch(self.loader)
        if comm.is_main_process():
            candidates = sum(log.proposed)
            share = 100 * sum(log.excluded) / max(1, candidates)
            tqdm.write(
                f"tau {log.tau}, excluded {share:.0f} % of {candidates} candidates, "
                f"pool {log.pool}"
            )
        metrics = {"tau": log.tau, "accuracy": log.accuracy, "pool": log.pool}
        return self.net, {"epoch_idx": epoch_idx, "loss": log.losses["classifier"], **metrics}


def recipe_of_config(config, head: str = "linear") -> Recipe:
    """The method that one of OpenOOD's configs describes, for a network with one of the heads.

    Raises:
        ValueError: If a setting is unknown, missing or out of range, or the optimiser is neither
            SGD nor Adam.
    """
    _check_optimizer(config.optimizer)
    arguments = dict(config.trainer.trainer_args or {})
    loop = {f.name for f in fields(TIEConfig)} - {"epochs", "lr", "seed"}
    if unknown := sorted(set(arguments) - loop - set(PARTS)):
        raise ValueError(
            f"Expected trainer.trainer_args among {', '.join([*sorted(loop), *PARTS])}, "
            f"but got {', '.join(unknown)}"
        )
    settings = TIEConfig(
        epochs=config.optimizer.num_epochs,
        lr=config.optimizer.lr,
        seed=config.seed or 0,
        **{name: value for name, value in arguments.items() if name in loop},
    )
    synthesizers = arguments.get("synthesizers", "inversion")
    if not isinstance(synthesizers, Mapping):  # names alone
        synthesizers = dict.fromkeys(names(synthesizers))
    return Recipe(
        settings,
        {name: dict(changes or {}) for name, changes in synthesizers.items()},
        names(arguments["prior"]) if "prior" in arguments else None,
        arguments.get("criterion", "garbage"),
        head,
    )


def _check_optimizer(settings) -> None:
    if settings.name not in ("sgd", "adam"):
        raise ValueError(
            f"Expected optimizer.name to be sgd or adam for trainer tie, but got {settings.name}"
        )
    if settings.name == "sgd" and None in (settings.momentum, settings.weight_decay):
        raise ValueError(
            "optimizer.name sgd needs optimizer.momentum and optimizer.weight_decay; give both"
        )


class OpenOODAttachTrainer:
    """Trainer ``attach``: a garbage head for a network that OpenOOD has trained, in one epoch.

    The network itself stays as it is.

    Arguments:
        net: A ``tie_net`` with ``network.head: multilayer``. Its weights are read from
            ``network.backbone.checkpoint``, OpenOOD's ``best.ckpt`` of ``network.backbone``.
        train_loader: OpenOOD's loader. Its images are read without crops and flips.
        config: OpenOOD's config.

    Raises:
        ValueError: If the head is not ``multilayer``, there is no checkpoint, it is of another
            network, or several processes train.
    """

    def __init__(self, net: TIENet, train_loader: DataLoader, config):
        if (count := comm.get_world_size()) > 1:
            raise ValueError(
                f"Expected one process for trainer attach, but got {count}; give --num_gpus 1 or 0"
            )
        if not isinstance(getattr(net, "garbage", None), GarbageHead):
            raise ValueError(
                "Trainer attach needs network tie_net with network.head multilayer; "
                "see pipelines/train/attach_tie.yml"
            )
        self.net, self.loader, self.seed = net, PlainImages(train_loader), config.seed or 0
        self.model = backbone_of(config.network.backbone)
        if (path := config.network.backbone.checkpoint) in (None, "none"):
            raise ValueError(
                "Trainer attach needs network.backbone.checkpoint, a best.ckpt of OpenOOD's; "
                "give one"
            )
        load_weights(self.model, config.network.backbone.name, path)

    def train_epoch(self, epoch_idx: int) -> tuple[nn.Module, dict]:
        """Attach the head.

        Returns:
            The network, and ``epoch_idx`` and ``loss``: NaN, as the classifier is not trained.
        """
        net = self.net
        attached = attach(
            self.model.to(net.low.device).eval(),
            self.loader,
            net.num_classes,
            net.low.flatten().tolist(),
            net.high.flatten().tolist(),
            seed=self.seed,
            progress=comm.is_main_process(),
        )
        net.load_state_dict(attached.state_dict())
        return net, {"epoch_idx": epoch_idx, "loss": float("nan")}


def load_weights(model: nn.Module, name: str, path: str | os.PathLike) -> None:
    """Read all weights of one of OpenOOD's checkpoints; OpenOOD itself skips those that do not
    fit, without a word.

    Arguments:
        model: The network, on the CPU.
        name: OpenOOD's name of it.
        path: The checkpoint.

    Raises:
        ValueError: If the checkpoint is of another network.
    """
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise ValueError(
            f"Expected a checkpoint of OpenOOD's network {name}, but got {path}: {error}"
        ) from None
