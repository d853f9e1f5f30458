"""Training methods that OpenOOD ships, on any network and data: baselines of the same run,
trained by its own code.
"""

from openood.trainers.ascood_trainer import ASCOODTrainer
from openood.trainers.logitnorm_trainer import LogitNormTrainer
from openood.utils.config import Config

from tie_ext.models.network import TIENet
from tie_ext.openood import without_cuda
from tie_ext.outliers.base import Loader as Batches
from tie_ext.utils.random import seeded

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
BASELINES: dict[str, tuple[type, dict]] = {
    "logitnorm": (LogitNormTrainer, {"optimizer": SGD, "trainer_args": {"tau": 0.04}}),
    "ascood": (
        ASCOODTrainer,
        {
            "optimizer": {**SGD, "fc_lr_factor": 1.0, "nesterov": True},
            "trainer_args": {
                "w": 1.0,
                "sigma": 0.5,
                "p_inv": 0.1,
                "ood_type": "gradient",
                "alpha_max": 10.0,
                "alpha_min": 10.0,
                "kl_div": True,
            },
        },
    ),
}
"""OpenOOD's trainers by name, with the settings of its ``configs/pipelines/train``."""


class Loader:
    """Batches as OpenOOD's loaders give them; its trainers ask the loader and its iterator for
    their length.
    """

    def __init__(self, batches: Batches, steps: int):
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> "Loader":
        self.pairs = iter(self.batches)
        return self

    def __next__(self) -> dict:
        x, y = next(self.pairs)
        return {"data": x, "label": y}


def train_baseline(name: str, net: TIENet, batches: Batches, epochs: int, seed: int = 0) -> None:
    """Train the n ID logits of a network with one of OpenOOD's trainers.

    Arguments:
        name: One of :data:`BASELINES`; for ``ascood`` the network stands on
            :class:`tie_ext.outliers.saliency.Standardized`.
        net: The network, on its device.
        batches: The ID data.
        epochs: Passes over it.
        seed: Of all that is random.

    Raises:
        ValueError: If there is no such trainer.
    """
    if name not in BASELINES:
        raise ValueError(
            f"Expected a trainer of OpenOOD's, one of {', '.join(BASELINES)}, but got {name!r}"
        )
    trainer_class, settings = BASELINES[name]
    net.set_params = lambda sigma: None  # type: ignore[assignment]  # ASCOOD's asks for it; Standardized has its sigma
    config = Config(
        {
            "dataset": {"num_classes": net.num_classes},
            "optimizer": {"num_epochs": epochs, **settings["optimizer"]},
            "trainer": {"trainer_args": settings["trainer_args"]},
        }
    )
    loader = Loader(batches, sum(1 for _ in batches))
    with without_cuda(wanted=net.fc.weight.is_cuda), seeded(seed):
        trainer = trainer_class(net, loader, config)
        for epoch in range(1, epochs + 1):
            trainer.train_epoch(epoch)
    del net.set_params
