"""OpenOOD's trainer contract around TIE's epoch."""

from collections.abc import Iterator, Mapping
from dataclasses import fields

import openood.utils.comm as comm
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from tie_ext.models.network import TIENet
from tie_ext.training.config import TIEConfig
from tie_ext.training.recipe import Recipe, names


class OpenOODTIETrainer:
    """Trainer ``tie``: one call of ``train_epoch`` is one epoch of :class:`tie_ext.TIETrainer`.

    ``optimizer`` and ``seed`` come from OpenOOD's config, all else from ``trainer.trainer_args``: every other setting of
    :class:`tie_ext.TIEConfig` by its name; ``synthesizers``, by name with the settings of each below it, or names with commas between; ``prior``,
    names with commas between, or ``none``; and ``criterion``, as :class:`tie_ext.training.recipe.Recipe` has it. The optimiser is SGD as OpenOOD's baseline
    trainer has it, or the paper's ``adam``; the learning rate falls along half a cosine, as there, but once an epoch.

    Arguments:
        net: A ``tie_net``.
        train_loader: OpenOOD's loader, batches ``{"data": (B, 3, S, S), "label": (B,), ...}``.
        config: OpenOOD's config.

    Raises:
        ValueError: If a setting is unknown, missing or out of range, or the optimiser is neither.
    """

    def __init__(self, net: TIENet | DistributedDataParallel, train_loader: DataLoader, config):
        self.net, self.batches = net, Pairs(train_loader)
        # DistributedDataParallel, where someone put it around: TIE's trainer keeps the processes in step itself.
        inner = net.module if isinstance(net, DistributedDataParallel) else net
        self.trainer = recipe_of_config(config).trainer(inner, progress=comm.is_main_process())
        if config.optimizer.name != "adam":
            momentum, decay = config.optimizer.momentum, config.optimizer.weight_decay
            self.trainer.optimizer = torch.optim.SGD(
                inner.parameters(),
                config.optimizer.lr,
                momentum,
                weight_decay=decay,
                nesterov=True,
            )

    def train_epoch(self, epoch_idx: int) -> tuple[nn.Module, dict]:
        """Train, invert, exclude.

        Returns:
            The network, and ``epoch_idx``, ``loss`` (the classifier's) and what TIE's log says of the epoch.
        """
        log = self.trainer.epoch(self.batches)
        share = sum(log.excluded) / max(1, sum(log.proposed))
        if comm.is_main_process():
            tqdm.write(
                f"tau {log.tau}, expelled {100 * share:.0f} % of {sum(log.proposed)} candidates, pool {log.pool}"
            )
        return self.net, {
            "epoch_idx": epoch_idx,
            "loss": log.losses["classifier"],
            "tau": log.tau,
            "accuracy": log.accuracy,
            "pool": log.pool,
        }


def recipe_of_config(config) -> Recipe:
    """The method that one of OpenOOD's configs asks for.

    Raises:
        ValueError: If a setting is unknown, missing or out of range, or the optimiser is neither SGD nor Adam.
    """
    if config.optimizer.name not in ("sgd", "adam"):
        raise ValueError(
            f"Expected optimizer.name to be sgd or adam for trainer tie, but got {config.optimizer.name}"
        )
    if config.optimizer.name == "sgd" and None in (
        config.optimizer.momentum,
        config.optimizer.weight_decay,
    ):
        raise ValueError(
            "Expected optimizer.momentum and optimizer.weight_decay beside optimizer.name: sgd, but got none"
        )
    arguments = dict(config.trainer.trainer_args or {})
    loop = {f.name for f in fields(TIEConfig)} - {"epochs", "lr", "seed"}
    if unknown := sorted(set(arguments) - loop - {"synthesizers", "prior", "criterion"}):
        known = ", ".join([*sorted(loop), "synthesizers", "prior", "criterion"])
        raise ValueError(
            f"Expected trainer.trainer_args among {known}, but got {', '.join(unknown)}"
        )
    settings = {name: value for name, value in arguments.items() if name in loop}
    tie = TIEConfig(
        epochs=config.optimizer.num_epochs,
        lr=config.optimizer.lr,
        seed=config.seed or 0,
        **settings,
    )
    proposed = arguments.get("synthesizers", "inversion")
    if not isinstance(proposed, Mapping):  # names alone
        proposed = dict.fromkeys(names(proposed))
    proposed = {name: dict(changed or {}) for name, changed in proposed.items()}
    return Recipe(
        tie,
        proposed,
        names(arguments.get("prior", "multiscale")),
        arguments.get("criterion", "garbage"),
    )


class Pairs:
    """Batches ``{"data": x, "label": y, ...}`` of one of OpenOOD's loaders as ``(x, y)``."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch["data"], batch["label"]) for batch in self.loader)
