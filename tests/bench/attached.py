"""A garbage head beside the hosts' detectors, all on the same trained network, which stays as it is.

    python tests/bench/attached.py --root DATA --data fashionmnist --images 20000 --epochs 10 --seed 0

Trains the plain n-class network (it goes on after the last finished epoch), attaches heads taught by different outliers, and scores: held-out
ID images, which nothing was trained on (``held``); the ID test set (``id``), and some of it processed another way (``id:...``); validation OOD sets
(``val:...``), by which settings may be chosen; OOD test sets, for tables alone. CIFAR needs a DATA where all sets have CIFAR-10's size and
compression, or compression is what is told.

Network and scores stay in --work; numbers, command and versions go into docs/results/attached/networks.jsonl. tests/bench/combined.py goes on
from the scores.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import airbench
import torch
import torch.nn.functional as F
from processed import PROCESSED, processed_sets
from pytorch_ood.detector import (
    ASH,
    GEN,
    KNN,
    ODIN,
    SHE,
    EnergyBased,
    Mahalanobis,
    MaxSoftmax,
    ViM,
)
from torch import Tensor, nn

from tie_ext import TIENet, attach
from tie_ext.cli import data
from tie_ext.cli.batches import ImageBatches, shifted
from tie_ext.cli.classifier import classifier
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.images import ImageSet
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import AUTOCAST_DTYPES
from tie_ext.outliers import make
from tie_ext.pytorch_ood.recommended import fit_knn
from tie_ext.utils.files import add_json_line, save_state
from tie_ext.utils.provenance import provenance
from tie_ext.utils.random import seeded


def openood_resnet18(in_channels: int, num_classes: int) -> nn.Module:
    """OpenOOD's ``ResNet18_32x32``, by its own code in ``$OPENOOD_ROOT`` or ~/OpenOOD, of which no more needs to be installed.

    Raises:
        ValueError: If the images have not three channels.
    """
    if in_channels != 3:
        raise ValueError(
            f"Expected images of 3 channels for OpenOOD's ResNet18_32x32, but got {in_channels}"
        )
    root = Path(os.environ.get("OPENOOD_ROOT", Path.home() / "OpenOOD"))
    sys.path.append(
        str(root / "openood" / "networks")
    )  # the file alone: its package wants all that OpenOOD does
    from resnet18_32x32 import ResNet18_32x32

    return ResNet18_32x32(num_classes=num_classes)


OUT = Path(__file__).parents[2] / "docs" / "results" / "attached"
RECORDS = OUT / "networks.jsonl"
RESNET18 = "resnet18_32x32"
"""Its rate falls along half a cosine, as in OpenOOD's recipe, which has 100 epochs. Unlike there images lie in [0, 1] and are not normalised."""
BATCH = 128
HELD = 5000
"""ID images held out of training."""
VALIDATION = ("tinyimagenet", "glyphs", "photos")
OTHERS = ("mnist", "fashionmnist", "svhn", "cifar10", "cifar100", "tinyimagenet", "notmnist")
AS_THEY_ARE = "head, images as they are"
HEADS = {
    "head": ("procedural",),
    AS_THEY_ARE: ("procedural",),
    "head, multi-scale noise": ("multiscale",),
    "head, white noise": ("white",),
}
"""Heads by the outliers that teach them; one does not see the ID images processed another way."""
NETWORKS = {**BACKBONES, "airbench": airbench.AirBench, RESNET18: openood_resnet18}
SAMPLED = "KNN of 5000"
"""What :func:`tie_ext.combine` keeps of it."""
HALF = "04"
"""Ends the name of a set of whose ten classes 0 to 4 are ID."""
MOST = 2000
"""Images of an OOD test set."""


class Trained(NamedTuple):
    """A network that was trained here, as the name of its file says."""

    data: str
    images: int
    epochs: int
    backbone: str
    seed: int

    def __str__(self) -> str:
        return f"{self.data}-{self.images}x{self.epochs}-{self.backbone}-seed{self.seed}"

    @classmethod
    def read(cls, stem: str) -> "Trained":
        """Of ``fashionmnist-20000x10-conv3-seed0`` and the like, whatever follows."""
        data, size, backbone, seed, *_ = stem.split("-")
        images, _, epochs = size.partition("x")
        return cls(data, int(images), int(epochs), backbone, int(seed.removeprefix("seed")))


def other_seeds(network: Path) -> list[Path]:
    """The networks beside a file that differ from it in the seed alone."""
    before, _, _ = network.stem.rpartition("seed")
    return sorted(set(network.parent.glob(f"{before}seed?.safetensors")) - {network})


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Flags of scripts that go on from one of these networks: where the data are, and the network's file."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument("network", type=Path)
    return parser


def made_by(root: str, device: str = "cpu", work: Path = OUT / "work") -> dict:
    """Provenance of a record; its command says DATA for where the images lie, and WORK for where networks stay, other places for everyone."""
    return provenance(device, places={"DATA": root, "WORK": work})


def image_sets(name: str, root: str, count: int | None, seed: int) -> dict[str, ImageSet]:
    """``train``, ``held``, ``id``, validation OOD ``val:NAME``, and OOD test sets by name; of ``mnist04`` and the like the first half of the classes
    is ID, and the other half an OOD test set."""
    base = name.removesuffix(HALF)
    whole, test = data.load(base, "train", root), data.load(base, "test", root)
    sets: dict[str, ImageSet] = {}
    if base != name:
        known = len(test.classes) // 2
        sets["other classes"] = test.take(test.y >= known).first(MOST)
        whole, test = (images.classes_between(0, known - 1) for images in (whole, test))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    rows = {"held": order[-HELD:], "train": order[:-HELD][:count]}
    sets |= {
        part: ImageSet(whole.x[of], whole.y[of], test.classes) for part, of in rows.items()
    } | {"id": test}
    sets |= {f"val:{other}": data.load(other, "val", root, test.shape) for other in VALIDATION}
    for other in OTHERS:
        if other == base:
            continue
        try:
            sets[other] = data.load(other, "test", root, test.shape).first(MOST)
        except ValueError:
            continue  # not at hand
    return sets | {kind: data.noise(kind, MOST, test.shape) for kind in ("gaussian", "uniform")}


def batches(images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a new order, images moved (colour ones also mirrored)."""
    for rows in torch.randperm(len(images)).split(BATCH):
        x = shifted(images.x[rows], images.shape[-1] // 8).float() / 255
        if images.shape[0] == 3:
            x = torch.where((torch.rand(len(x), 1, 1, 1) < 0.5).to(x.device), x.flip(3), x)
        yield x, images.y[rows]


def train(
    net: TIENet,
    images: ImageSet,
    epochs: int,
    seed: int,
    state: Path,
    autocast_dtype: str = "float32",
    falling: bool = False,
) -> float:
    """Plain cross-entropy, SGD with one cycle of learning rate, or one that falls along half a cosine, images moved (colour ones also mirrored).
    Seconds it took in all.

    The trained network computes in float32, whatever the precision of training was.
    """
    device = net.low.device
    images = replace(images, x=images.x.to(device), y=images.y.to(device))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(images) // BATCH)
    schedule = (
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, 1e-6)
        if falling
        else torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    )
    # An accelerator waits for orders where each is given by itself.
    fast = net if device.type == "cpu" else torch.compile(net, mode="reduce-overhead")
    done, seconds = 0, 0.0
    net.autocast_dtype = autocast_dtype
    if state.exists():
        kept = torch.load(state, map_location=device, weights_only=True)
        net.load_state_dict(kept["net"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        done, seconds = kept["epochs"], kept["seconds"]
    for epoch in range(done, epochs):
        start = time.perf_counter()
        net.train()
        right = torch.zeros((), dtype=torch.long, device=device)
        with seeded(seed, epoch):
            for x, y in batches(images):
                logits = (fast if len(x) == BATCH else net)(x)
                loss = F.cross_entropy(logits, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                right += (logits.argmax(1) == y).sum()
        said = f"epoch {epoch + 1} of {epochs}: {int(right) / len(images):.4f} of training images right"
        seconds += time.perf_counter() - start
        kept = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        torch.save({**kept, "epochs": epoch + 1, "seconds": seconds}, state.with_suffix(".new"))
        state.with_suffix(".new").replace(state)
        print(f"{said}, {seconds:.0f} s", flush=True)
    net.autocast_dtype = "float32"
    net.eval()
    return seconds


@torch.no_grad()
def read(net: TIENet, images: ImageSet) -> tuple[Tensor, Tensor]:
    """ID logits and features of all images, on the CPU."""
    pairs = [net.outputs(x) for x, _ in ImageBatches(images, 500, scale=net)]
    return torch.cat([logits[:, :-1] for logits, _ in pairs]).cpu(), torch.cat(
        [h for _, h in pairs]
    ).cpu()


def host_scores(net: TIENet, sets: Mapping[str, ImageSet]) -> dict[str, dict[str, Tensor]]:
    """Scores by detector and set of what the hosts have, fitted on the training images."""
    seen = {name: read(net, images) for name, images in sets.items()}
    _, h = seen["train"]
    y, features = sets["train"].y, net.feature_size
    one = F.normalize  # what Mahalanobis++ changes
    fc = copy.deepcopy(net.fc).cpu()
    energy, weight, bias = EnergyBased.score, fc.weight.detach(), fc.bias.detach()
    mahalanobis, plus = (
        Mahalanobis(None).fit_features(h, y),
        Mahalanobis(None).fit_features(one(h), y),
    )
    knn = KNN(None).fit_features(h, y)
    vim = ViM(None, d=features // 2, w=weight, b=bias).fit_features(h, y)
    kept = fit_knn(h)
    she = SHE(None, fc).fit_features(h, y)
    ash = ASH(None, lambda maps: fc(maps.flatten(1)), percentile=0.9)
    of = {
        "MSP": lambda logits, h: MaxSoftmax.score(logits),
        "energy": lambda logits, h: energy(logits),
        "GEN": lambda logits, h: GEN.score(logits),
        "SHE": lambda logits, h: she.predict_features(h),
        "ASH": lambda logits, h: ash.predict_feature_maps(h[:, :, None, None]),
        "ViM": lambda logits, h: vim.predict_features(h),
        "KNN": lambda logits, h: knn.predict_features(h),
        SAMPLED: lambda logits, h: kept.predict_features(h),
        "Mahalanobis": lambda logits, h: mahalanobis.predict_features(h),
        "Mahalanobis++": lambda logits, h: plus.predict_features(one(h)),
    }
    with torch.no_grad():
        scores = {
            label: {name: score(*pair) for name, pair in seen.items() if name != "train"}
            for label, score in of.items()
        }
    odin = ODIN(net)
    scores["ODIN"] = {
        name: torch.cat(
            [odin.predict(x).detach() for x, _ in ImageBatches(images, 500, scale=net)]
        ).cpu()
        for name, images in sets.items()
        if name != "train"
    }
    return scores


def headed(net: TIENet, images: ImageSet, label: str, seed: int) -> TIENet:
    """The n-class network of ``net`` with one of :data:`HEADS`."""
    classes, outliers = images.classes, [make(name, net) for name in HEADS[label]]
    # There is no setting for it: nobody should want it but for this comparison.
    unseen = (
        patch("tie_ext.training.fit_head.corrupt", lambda x, rng: x)
        if label == AS_THEY_ARE
        else nullcontext()
    )
    with unseen:
        batches = ImageBatches(images, 128 if net.low.is_cpu else 1024, scale=net)
        return attach(
            classifier(net),
            batches,
            len(classes),
            class_names=classes,
            synthesizers=outliers,
            seed=seed,
            autocast_dtype=net.autocast_dtype,
        )


@torch.no_grad()
def judged(
    net: TIENet, sets: Mapping[str, ImageSet]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Scores of a garbage class, and the share that is in it, by set."""
    decisions = {
        name: [net.decide(x) for x, _ in ImageBatches(of, 500, scale=net)]
        for name, of in sets.items()
        if name != "train"
    }
    return (
        {name: torch.cat([one.score for one in of]).cpu() for name, of in decisions.items()},
        {
            name: torch.cat([one.level == 1 for one in of]).double().mean().item()
            for name, of in decisions.items()
        },
    )


def numbers_of(
    scores: Mapping[str, Mapping[str, Tensor]], garbage: Mapping[str, Mapping[str, float]]
) -> dict:
    """Metrics against the ID test set by score and OOD set; the share in garbage by head and set; of ID images, processed or not, the share above
    the line that 5 % of the held-out ones pass."""
    ood = [
        name
        for name in next(iter(scores.values()))
        if name not in ("held", "id") and not name.startswith(PROCESSED)
    ]
    metrics = {
        label: {
            name: {key: ood_metrics(of["id"], of[name])[key] for key in ("auroc", "fpr95_id")}
            for name in ood
        }
        for label, of in scores.items()
    }
    lines = {label: of["held"].quantile(0.95) for label, of in scores.items()}
    rejected = {
        label: {
            name: (of[name] > lines[label]).double().mean().item()
            for name in of
            if name not in ood
        }
        for label, of in scores.items()
    }
    return {"scores": metrics, "garbage_rate": garbage, "rejected_at_5": rejected}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument(
        "--data",
        required=True,
        help=f"a set's name; with {HALF} behind it, classes 0 to 4 are ID and 5 to 9 OOD",
    )
    parser.add_argument(
        "--images", type=int, help="training images; default all but the held-out ones"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backbone", choices=NETWORKS, default="conv3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--autocast-dtype",
        choices=AUTOCAST_DTYPES,
        default="float32",
        help="of training; bfloat16 takes half the time where a CPU has it",
    )
    parser.add_argument(
        "--scores-in",
        choices=AUTOCAST_DTYPES,
        default="float32",
        help="precision of all that comes after training",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where networks compute; an accelerator trains a compiled one",
    )
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument(
        "--work",
        type=Path,
        default=OUT / "work",
        help="networks and scores, which are not committed",
    )
    a = parser.parse_args()
    if a.backbone == "airbench" and a.device != "cpu":
        parser.error(
            f"Expected --device cpu for airbench, whose batches are made there, but got {a.device}"
        )
    sets = image_sets(a.data, a.root, a.images, a.seed)
    sets |= processed_sets(sets["id"])
    stem = str(Trained(a.data, len(sets["train"]), a.epochs, a.backbone, a.seed))
    a.work.mkdir(parents=True, exist_ok=True)
    images = sets["train"]
    with seeded(a.seed):
        net = TIENet(
            NETWORKS[a.backbone](images.shape[0], len(images.classes)),
            len(images.classes),
            images.shape,
            class_names=images.classes,
        )
    net.to(a.device)
    trained = (
        airbench.train
        if a.backbone == "airbench"
        else partial(train, falling=a.backbone == RESNET18)
    )
    seconds = {
        "training": trained(
            net, images, a.epochs, a.seed, a.work / f"{stem}.training", a.autocast_dtype
        )
    }
    net.autocast_dtype = a.scores_in
    net.save(a.work / f"{stem}.safetensors")
    start = time.perf_counter()
    scores = host_scores(net, sets)
    seconds["host_scores"] = time.perf_counter() - start
    garbage: dict[str, dict[str, float]] = {}
    for label in a.heads:
        start = time.perf_counter()
        with_head = headed(net, images, label, a.seed)
        seconds[label] = time.perf_counter() - start
        scores[label], garbage[label] = judged(with_head, sets)
        if label == "head":
            with_head.save(a.work / f"{stem}-head.safetensors")
    logits, _ = read(net, sets["id"])
    record = {
        "network": stem,
        "data": a.data,
        "backbone": a.backbone,
        "epochs": a.epochs,
        "seed": a.seed,
        "training_dtype": a.autocast_dtype,
        "scoring_dtype": a.scores_in,
        "images": {name: len(of) for name, of in sets.items()},
        "accuracy": (logits.argmax(1) == sets["id"].y).double().mean().item(),
        "seconds": seconds,
        "numbers": numbers_of(scores, garbage),
        **made_by(a.root, a.device, a.work),
    }
    add_json_line(RECORDS, record, "network")
    save_state(a.work / f"{stem}.scores.safetensors", "scores", scores)
    print(
        f"{stem}: accuracy {record['accuracy']:.4f}, ID in garbage {garbage['head']['id']:.4%}, seconds {seconds}"
    )
    metrics = record["numbers"]["scores"]
    for name, of in metrics["head"].items():
        auroc, best = max(
            (other[name]["auroc"], label)
            for label, other in metrics.items()
            if not label.startswith("head")
        )
        print(
            f"  {name:18} garbage {garbage['head'][name]:7.2%}  FPR@95 {of['fpr95_id']:7.2%}  AUROC {of['auroc']:.4f}; {best} {auroc:.4f}"
        )


if __name__ == "__main__":
    main()
