"""Two epochs of the patched OpenOOD's trainer and of tie_ext's, all else being equal.

``python beside_tie_ext.py BACKBONE`` prints what is equal; ``openood`` is the patched one.

tie_ext has separate random streams, so that a run can be resumed, and keeps its generator in
another memory layout, which is faster; here it does neither, as OpenOOD does not. In its first
epoch it weighs classes by the images that it has seen; here it counts all of them before, as it
does among several processes, since OpenOOD has a list. Both keep few ID images, a few at a time,
so that their sampling shows. All else is as both ship it.
"""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from openood.networks.lenet import LeNet
from openood.networks.resnet18_32x32 import ResNet18_32x32
from openood.networks.tie_net import TIEGenerator
from openood.networks.tie_net import TIENet as Patched
from openood.postprocessors import TIEPostprocessor
from openood.preprocessors.transform import normalization_dict
from openood.trainers import tie_trainer
from openood.utils.config import Config
from torch import nn

import tie_ext.training.trainer
from tie_ext import TIEConfig, TIENet, TIETrainer
from tie_ext.models.generator import Generator
from tie_ext.openood.cpu import without_cuda
from tie_ext.outliers import Inversion, InversionSettings
from tie_ext.outliers.inversion import soft_code
from tie_ext.scores.decision import ood_score
from tie_ext.training.config import SampleConfig
from tie_ext.training.survey import survey
from tie_ext.utils.reservoir import Reservoir

tie_ext.training.trainer.seeded = lambda *key: nullcontext()
tie_ext.training.trainer.Reservoir = lambda most, numbers: Reservoir(most)
FEW = SampleConfig(size=16, last_size=24, batch_size=8)
for name, field in {"KEPT": "size", "FINAL": "last_size", "BATCH": "batch_size"}.items():
    assert getattr(SampleConfig(), field) == getattr(tie_trainer, name), name
    setattr(tie_trainer, name, getattr(FEW, field))
EPOCHS = 2


class Run(NamedTuple):
    """A network of OpenOOD's, and settings by which some candidates are excluded, others not."""

    network: type
    size: int
    name: str
    lr: float
    steps: int
    images: int
    gamma: tuple[float, float]


RUNS = {
    "lenet": Run(LeNet, 28, "mnist", 5e-3, 40, 48, (1.0, 1.0)),
    "resnet18_32x32": Run(ResNet18_32x32, 32, "cifar10", 1e-3, 2, 24, (10.0, 100.0)),
}
LOOP = {"lam": 0.5, "candidates": 52, "pool_size": 60}
INVERSION = {"batch_size": 8, "lr": 1e-3, "alpha": 0.1, "beta": 1.0}


class Loader(list):
    """Batches as OpenOOD's loaders give them, each the same whenever it is read."""

    def __init__(self, batches):
        super().__init__({"data": x, "label": y} for x, y in batches)
        self.dataset = SimpleNamespace(
            imglist=[f"a.png {label}\n" for _, y in batches for label in y.tolist()]
        )


def patched(net: nn.Module, batches: list, run: Run) -> tie_trainer.TIETrainer:
    """OpenOOD's trainer, by its config."""
    arguments = {
        **LOOP,
        "generator_steps": run.steps,
        "gamma_start": run.gamma[0],
        "gamma_end": run.gamma[1],
    }
    arguments |= {
        f"generator_{name}" if name in ("batch_size", "lr") else name: value
        for name, value in INVERSION.items()
    }
    dataset = {"num_classes": 10, "image_size": run.size, "normalization_type": run.name}
    optimizer = {"num_epochs": EPOCHS, "lr": run.lr}
    return tie_trainer.TIETrainer(
        net,
        Loader(batches),
        Config(
            {"dataset": dataset, "optimizer": optimizer, "trainer": {"trainer_args": arguments}}
        ),
    )


def original(net: TIENet, run: Run) -> TIETrainer:
    """The same of tie_ext."""
    inversion = Inversion(
        net,
        InversionSettings(
            **INVERSION, steps=run.steps, gamma_start=run.gamma[0], gamma_end=run.gamma[1]
        ),
    )
    inversion.generator.to(memory_format=torch.contiguous_format)
    config = TIEConfig(epochs=EPOCHS, lr=run.lr, **LOOP)
    return TIETrainer(net, config, [inversion], sample_config=FEW)


def named_as_patched(net: TIENet) -> dict:
    """The weights of tie_ext's network by the names of the patched one."""
    state = {
        name: value
        for name, value in net.state_dict().items()
        if name not in ("low", "high", "_extra_state")
    }
    return {
        f"backbone.{name}" if name.startswith("fc.") else name: value
        for name, value in state.items()
    }


def main(run: Run) -> None:
    """Print, as JSON, what is equal."""
    torch.manual_seed(1)
    theirs = Patched(run.network(num_classes=10))
    ours = TIENet(theirs.backbone, 10, (3, run.size, run.size), *value_range(run.name))
    ours.garbage.load_state_dict(theirs.garbage.state_dict())
    images = ours.from_unit(torch.rand(run.images, 3, run.size, run.size))
    labels = torch.cat(
        [torch.arange(20) % 10, torch.arange(run.images - 20) % 3]
    )  # unequal, so that the class weights matter
    batches = list(zip(images.split(8), labels.split(8), strict=True))

    torch.manual_seed(2)
    trainer = original(ours, run)
    trainer._count(survey(batches, 10, torch.device("cpu")))
    logs = [trainer.epoch(batches) for _ in range(EPOCHS)]
    torch.manual_seed(2)
    again = patched(theirs, batches, run)
    losses, taus = [], []
    for epoch in range(EPOCHS):
        losses.append(again.train_epoch(epoch + 1)[1]["loss"])
        taus.append(float(theirs.tau))

    ours.eval(), theirs.eval()
    with torch.no_grad():
        logits = ours(images, garbage=True)
    pred, conf = TIEPostprocessor(Config({})).postprocess(theirs, images)
    held = len(trainer.pool)
    equal = {
        "loss": [log.losses["classifier"] for log in logs] == losses,
        "tau": torch.tensor([log.tau for log in logs]).tolist() == taus,
        "pool": trainer.pool.offered == again.pool.offered
        and torch.equal(trainer.pool.images[:held], again.pool.images[:held]),
        "generator": same(
            trainer.synthesizers[0].generator.state_dict(), again.generator.state_dict()
        ),
        "weights": same(named_as_patched(ours), theirs.state_dict()),
        "of 100 classes": of_many_classes(),
        "scores": torch.equal(conf, -ood_score(logits))
        and torch.equal(pred, logits[:, :10].argmax(1)),
    }
    print(
        json.dumps(
            {
                "equal": equal,
                "excluded": [sum(log.excluded) for log in logs],
                "loss": losses,
                "tau": taus,
            }
        )
    )


def of_many_classes() -> bool:
    """Whether codes of 100 classes, and their images, are the same; the networks have ten."""
    target, bounds = torch.arange(8) * 14, ([0.0] * 3, [1.0] * 3)
    ours = (
        Generator((3, 28, 28), 101, width=16, low=bounds[0], high=bounds[1])
        .to(memory_format=torch.contiguous_format)
        .eval()
    )
    theirs = TIEGenerator(28, 101, *bounds).eval()
    theirs.load_state_dict(
        {name: value for name, value in ours.state_dict().items() if name in theirs.state_dict()}
    )
    torch.manual_seed(3)
    code = soft_code(target, 101)
    images = ours(torch.randn(8, ours.latent_size), code)
    torch.manual_seed(3)
    return torch.equal(code, tie_trainer.soft_code(target, 101)) and torch.equal(
        images, theirs(code)
    )


def same(first: dict, second: dict) -> bool:
    return set(second) <= set(first) and all(
        torch.equal(value, first[name]) for name, value in second.items()
    )


def value_range(name: str):
    """What black and white are after OpenOOD's normalisation."""
    mean, std = normalization_dict.get(name, ([0.5] * 3, [0.5] * 3))
    return [-m / s for m, s in zip(mean, std, strict=True)], [
        (1 - m) / s for m, s in zip(mean, std, strict=True)
    ]


if __name__ == "__main__":
    with without_cuda(wanted=False):
        main(RUNS[sys.argv[1]])
