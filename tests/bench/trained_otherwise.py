"""Does a garbage head add to networks that were trained to tell OOD images, by OpenOOD's own LogitNorm, RotPred and PixMix?

    python tests/bench/trained_otherwise.py --root DATA --images 20000 --epochs 10

CIFAR-10. Each is trained by OpenOOD's trainer (``$OPENOOD_ROOT`` or ~/OpenOOD) with its settings, and *plain* by its trainer of plain networks.
Unlike there: the project's backbones and few epochs, the last of which counts; images in [0, 1], not normalised; PixMix's mixing set are procedural
images, not fractals. Heads, scores and sets are those of attached.py, and on RotPred's network OpenOOD's own score of it. Writes
docs/results/attached/otherwise/ after each network, and goes on from there.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from attached import (
    OUT,
    SAMPLED,
    Trained,
    headed,
    host_scores,
    image_sets,
    judged,
    made_by,
    numbers_of,
    read,
)
from attached import batches as moved_batches
from combined import combined
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from tie_ext import TIENet
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.images import ImageSet
from tie_ext.models.backbones import BACKBONES
from tie_ext.outliers import Procedural
from tie_ext.utils.files import write_json
from tie_ext.utils.random import seeded

sys.path.insert(0, os.environ.get("OPENOOD_ROOT", str(Path.home() / "OpenOOD")))

from openood.postprocessors.rotpred_postprocessor import RotPredPostprocessor
from openood.preprocessors.pixmix_preprocessor import PixMixPreprocessor
from openood.trainers.base_trainer import BaseTrainer
from openood.trainers.logitnorm_trainer import LogitNormTrainer
from openood.trainers.rotpred_trainer import RotPredTrainer
from openood.utils.config import Config

from tie_ext.cli.reproduce.openood_baselines import SGD, Loader
from tie_ext.openood import without_cuda

DATA = "cifar10"
MIXED = 2000
"""Procedural images in PixMix's mixing set."""
TRAINERS = {
    "plain": BaseTrainer,
    "logitnorm": LogitNormTrainer,
    "rotpred": RotPredTrainer,
    "pixmix": BaseTrainer,
}
COMBINATIONS = {
    "combined": ("GEN", SAMPLED, "head"),
    "combined without the head": ("GEN", SAMPLED),
}
OWN = "RotPred"
"""OpenOOD's own score of RotPred's network; there it is in both combinations."""


class Rotating(nn.Module):
    """A network that also tells how an image was turned, as RotPred's trainer asks of OpenOOD's ``RotNet``."""

    def __init__(self, net: TIENet):
        super().__init__()
        self.net, self.turned = net, nn.Linear(net.feature_size, 4)

    def forward(
        self, x: Tensor, return_rot_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits ``(B, n)``, and those of the four turns ``(B, 4)`` where asked."""
        h = self.net.features(x)
        logits = self.net.fc(h)
        return (logits, self.turned(h)) if return_rot_logits else logits


class Mixed:
    """Batches of images that OpenOOD's PixMix has mixed with procedural ones, by the settings of its ``pixmix_preprocessor.yml``."""

    def __init__(self, images: ImageSet, net: TIENet, folder: Path):
        names = []
        for i, x in enumerate(Procedural(net).draw((MIXED, *images.shape))):
            names.append(folder / f"{i}.png")
            to_pil_image(x).save(names[-1])
        (folder / "list.txt").write_text("\n".join(map(str, names)))
        size = images.shape[-1]
        config = {
            "dataset": {
                "name": DATA,
                "pre_size": size,
                "image_size": size,
                "interpolation": "bilinear",
                "normalization_type": DATA,
            },
            "preprocessor": {
                "preprocessor_args": {
                    "mixing_set_dir": str(folder / "list.txt"),
                    "aug_severity": 3,
                    "all_ops": True,
                    "k": 4,
                    "beta": 3,
                }
            },
        }
        self.images, self.mix = images, PixMixPreprocessor(Config(config))
        self.mix.normalize = nn.Identity()  # our networks take [0, 1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.images)).split(128):
            yield (
                torch.stack([self.mix(to_pil_image(self.images.x[i])) for i in rows]).float(),
                self.images.y[rows],
            )


class Moved:
    """Batches of images as attached.py trains on them."""

    def __init__(self, images: ImageSet):
        self.images = images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return moved_batches(self.images)


def train(
    name: str, fresh: Callable[[], TIENet], images: ImageSet, epochs: int, seed: int, folder: Path
) -> TIENet | Rotating:
    """A network by one of :data:`TRAINERS`."""
    with seeded(seed):
        net = fresh()
        batches = Mixed(images, net, folder) if name == "pixmix" else Moved(images)
        trained = Rotating(net) if name == "rotpred" else net
        np.random.seed(seed)  # PixMix draws from it
        config = {
            "dataset": {"num_classes": net.num_classes},
            "optimizer": {"num_epochs": epochs, **SGD},
            "trainer": {"trainer_args": {"tau": 0.04}},
        }
        with without_cuda(wanted=False):
            trainer = TRAINERS[name](
                trained, Loader(batches, -(-len(images) // 128)), Config(config)
            )
            for epoch in range(1, epochs + 1):
                trainer.train_epoch(epoch)
    return trained.eval()


@torch.no_grad()
def turned_scores(trained: Rotating, images: ImageSet) -> Tensor:
    """OpenOOD's score of a network that tells turns, larger = more OOD, ``(N,)``."""
    rejector = RotPredPostprocessor(Config({"postprocessor": {}}))
    with without_cuda(wanted=False):
        return torch.cat(
            [-rejector.postprocess(trained, x)[1] for x, _ in ImageBatches(images, 500)]
        )


def measured(trained: TIENet | Rotating, sets: dict[str, ImageSet], seed: int) -> dict:
    """Accuracy, and the numbers of attached.py with those of :data:`COMBINATIONS`."""
    net = trained.net if isinstance(trained, Rotating) else trained
    scores = host_scores(net, sets)
    if isinstance(trained, Rotating):
        scores[OWN] = {
            name: turned_scores(trained, images)
            for name, images in sets.items()
            if name != "train"
        }
    scores["head"], in_garbage = judged(headed(net, sets["train"], "head", seed), sets)
    for label, members in COMBINATIONS.items():
        of = combined(scores, (*members, *{OWN}.intersection(scores)), "zsum")
        scores[label] = {
            ("held" if name == "calibration" else name): x for name, x in of.items()
        }  # the half that gave no scale
    logits, _ = read(net, sets["id"])
    return {
        "accuracy": (logits.argmax(1) == sets["id"].y).double().mean().item(),
        **numbers_of(scores, {"head": in_garbage}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument(
        "--images", type=int, help="training images; default all but the held-out ones"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backbone", choices=BACKBONES, default="conv3")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    sets = image_sets(DATA, a.root, a.images, a.seed)
    images = sets["train"]
    path = OUT / "otherwise" / f"{Trained(DATA, len(images), a.epochs, a.backbone, a.seed)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    networks = json.loads(path.read_text())["networks"] if path.exists() else {}

    def fresh() -> TIENet:
        return TIENet(
            BACKBONES[a.backbone](images.shape[0], len(images.classes)),
            len(images.classes),
            images.shape,
            classes=images.classes,
        )

    for name in TRAINERS:
        if name in networks:
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            net = train(name, fresh, images, a.epochs, a.seed, Path(folder))
        seconds = time.perf_counter() - start
        networks[name] = {**measured(net, sets, a.seed), "training_seconds": seconds}
        about = {
            "data": DATA,
            "backbone": a.backbone,
            "epochs": a.epochs,
            "seed": a.seed,
            "images": {part: len(of) for part, of in sets.items()},
        }
        write_json(
            path, {**about, "combinations": COMBINATIONS, "networks": networks, **made_by(a.root)}
        )
        print(f"{name}: accuracy {networks[name]['accuracy']:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
