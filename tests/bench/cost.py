"""What TIE costs, as ratios to plain training on the same machine; docs/research/cost.md is made of the records (tests/bench/cost_page.py).

    python tests/bench/cost.py epoch --root DATA --data mnist --images 60000
    python tests/bench/cost.py epoch --root DATA --data mnist --images 20000
    python tests/bench/cost.py epoch --root DATA --data mnist --images 20000 --adversarial-steps 5 --head multilayer
    python tests/bench/cost.py epoch --root DATA --data cifar10 --images 50000 --backbone resnet20
    python tests/bench/cost.py memory
    python tests/bench/cost.py classes
    python tests/bench/cost.py large
    python tests/bench/cost.py head --root DATA NETWORK
    python tests/bench/cost.py detection before-0=RUN after-0=RUN ...

Epochs of both are trained in turn, each after the other's; the ratio is that of the medians. Seconds are those that the process computed for, on
one thread, as the clock on the wall counts what else a machine does; loading counts where it is this process that loads.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from tie_ext import TIEConfig, TIENet, TIETrainer
from tie_ext.cli import data
from tie_ext.cli.batches import ImageBatches, shifted, training_batches
from tie_ext.cli.classifier import classifier, train_plain
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.images import ImageSet
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import HEADS
from tie_ext.outliers import Inversion, InversionSettings, Noise, Procedural
from tie_ext.outliers.base import Domain
from tie_ext.outliers.primitives import Rng
from tie_ext.training.recipe import Recipe
from tie_ext.utils.files import read_json, write_json
from tie_ext.utils.provenance import peak_memory, provenance
from tie_ext.utils.random import seeded

OUT = Path(__file__).parents[2] / "docs" / "results" / "cost"
PRIOR = {"linear": "multiscale", "multilayer": "procedural"}


def seconds(work: Callable[[], object]) -> float:
    """What the process computed for."""
    start = time.process_time()
    work()
    return time.process_time() - start


def epoch(a: argparse.Namespace) -> dict:
    """Epochs of plain training and of TIE's loop, in turn."""
    images = data.load(a.data, "train", a.root).first(a.images)
    batches, config, shape = (
        training_batches(images),
        TIEConfig(epochs=max(2, a.repeats), adversarial_steps=a.adversarial_steps),
        images.shape,
    )
    record: dict = {
        "data": a.data,
        "images": len(images),
        "backbone": a.backbone,
        "repeats": a.repeats,
        "search": a.adversarial_steps,
        "garbage": {},
    }
    for garbage in a.head:
        plain, net = (
            TIENet(BACKBONES[a.backbone](shape[0], 10), 10, shape, head=kind)
            for kind in ("linear", garbage)
        )
        trainer = Recipe(config, prior=(PRIOR[garbage],), head=garbage).trainer(net)
        of: dict[str, list[float]] = {"plain": [], "tie": []}
        for _ in range(a.repeats):
            of["plain"].append(
                seconds(lambda plain=plain: train_plain(plain, batches, replace(config, epochs=1)))
            )
            of["tie"].append(seconds(lambda trainer=trainer: trainer.epoch(batches)))
            print(garbage, {name: round(values[-1], 1) for name, values in of.items()}, flush=True)
        stages = {
            stage: median(entry.seconds[stage] for entry in trainer.log)
            for stage in trainer.log[0].seconds
        }
        whole = sum(stages.values())
        record["garbage"][garbage] = {
            "seconds": of,
            "ratio": median(of["tie"]) / median(of["plain"]),
            "stages": {stage: value / whole for stage, value in stages.items()},
            "agreement": [
                sum(x for x in entry.agreement if x is not None) / len(entry.agreement)
                for entry in trainer.log
            ],
        }
        print(garbage, f"ratio {record['garbage'][garbage]['ratio']:.2f}", flush=True)
    return record


def memory(a: argparse.Namespace) -> dict:
    """Peak memory of runs of 5 and of 20 epochs, each in a process of its own."""
    if a.epochs:
        few = InversionSettings(steps=10)
        net = TIENet(BACKBONES["conv3"](1, 10), 10, (1, 28, 28), head="multilayer")
        trainer = TIETrainer(
            net, TIEConfig(epochs=a.epochs), [Inversion(net, few)], [Procedural(net)]
        )
        images = Procedural(net).draw((1000, 1, 28, 28))
        batches = [(x, torch.arange(len(x)) % 10) for x in images.split(125)]
        for _ in range(a.epochs):
            trainer.epoch(batches)
            trainer.save(a.file)
        print(peak_memory())
        return {}
    a.work.mkdir(parents=True, exist_ok=True)
    peaks = {}
    for epochs in (5, 20):
        command = [
            sys.executable,
            __file__,
            "memory",
            "--epochs",
            str(epochs),
            "--file",
            str(a.work / "run.safetensors"),
        ]
        peaks[epochs] = float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )
    print(peaks, f"{peaks[20] / peaks[5] - 1:+.1%}")
    return {"peak_memory_mb": peaks, "more": peaks[20] / peaks[5] - 1}


def many(count: int, size: int, each: int) -> ImageSet:
    """Classes of procedural images at ``size`` pixels: each is one image, moved and darkened."""
    domain = Domain(count, (3, size, size), torch.tensor(0.0), torch.tensor(1.0))
    with seeded(0):
        one = (Procedural(domain).draw((count, 3, size, size)) * 255).round().to(torch.uint8)
        x = torch.cat(
            [shifted(part, size // 8) for part in one.repeat_interleave(each, 0).split(1000)]
        )
        x = torch.cat(
            [
                (part * Rng().uniform(len(part), 1, 1, 1, low=0.6)).to(torch.uint8)
                for part in x.split(1000)
            ]
        )
    return ImageSet(x, torch.arange(count).repeat_interleave(each), tuple(map(str, range(count))))


@torch.no_grad()
def level_1(net: TIENet, x: torch.Tensor) -> float:
    """Share of images that the garbage class takes."""
    return torch.cat([net.decide(part).level == 1 for part in x.split(128)]).double().mean().item()


def classes(a: argparse.Namespace) -> dict:
    """1000 classes at 64 pixels: level 1 on garbage that nothing was trained on, and peak memory."""
    images = many(a.count, 64, a.each)
    net = TIENet(
        BACKBONES["conv3"](3, a.count),
        a.count,
        (3, 64, 64),
        class_names=images.classes,
        head=a.kind,
    )
    trainer = Recipe(TIEConfig(epochs=a.epochs), prior=("multiscale",), head=a.kind).trainer(net)
    batches = ImageBatches(images, 128, shuffle=True)
    for _ in range(a.epochs):
        log = trainer.epoch(batches)
        print(log.epoch, log.losses, f"accuracy {log.accuracy:.3f}", flush=True)
    with seeded(1):
        held_out = Noise(net).draw((1000, 3, 64, 64))
    found = {
        "classes": a.count,
        "images": len(images),
        "epochs": a.epochs,
        "garbage": a.kind,
        "accuracy": log.accuracy,
        "held-out garbage in garbage": level_1(net, held_out),
        "ID in garbage": level_1(net, images.x[:: max(1, len(images) // 1000)].float() / 255),
        "peak_memory_mb": peak_memory(),
    }
    print(found)
    return found


def large(a: argparse.Namespace) -> dict:
    """A torchvision ResNet-18 at 224 pixels: ten steps of everything."""
    import torchvision

    shape = (3, 224, 224)
    net = TIENet(torchvision.models.resnet18(num_classes=160), 160, shape, head="multilayer")
    config = TIEConfig(epochs=2, candidates=160, pool_size=200)
    trainer = TIETrainer(
        net,
        config,
        [Inversion(net, InversionSettings(steps=10, batch_size=16))],
        [Procedural(net)],
    )
    batches = [(torch.rand(16, *shape), torch.arange(16 * i, 16 * i + 16)) for i in range(10)]
    of = {
        name: seconds(lambda: trainer.epoch(batches)) for name in ("first epoch", "second epoch")
    }
    found = {
        "seconds": of,
        "stages": [entry.seconds for entry in trainer.log],
        "peak_memory_mb": peak_memory(),
    }
    print(found)
    return found


def head(a: argparse.Namespace) -> dict:
    """Some epochs of the loop around a network of attached.py that learns no more, scored as attached.py scores its head."""
    import attached

    of = attached.Trained.read(a.network.stem)
    sets = attached.image_sets(of.data, a.root, of.images, of.seed)
    images = sets["train"]
    net = TIENet(
        classifier(TIENet.load(a.network)), len(images.classes), images.shape, head="multilayer"
    )
    for part in net.modules():
        part.training = not isinstance(part, torch.nn.modules.batchnorm._BatchNorm)
    config = TIEConfig(epochs=a.epochs, lr=1e-12, seed=of.seed)
    trainer = Recipe(config, prior=("procedural",), head="multilayer").trainer(net)
    for _ in range(a.epochs):
        log = trainer.epoch(training_batches(images))
        print(log.epoch, log.losses, log.excluded, flush=True)
    decisions = {
        name: [net.decide(x) for x, _ in ImageBatches(sets[name], 500)]
        for name in sets
        if name != "train"
    }
    score = {
        name: torch.cat([decision.score for decision in each]) for name, each in decisions.items()
    }
    garbage = {
        name: torch.cat([decision.level == 1 for decision in each]).double().mean().item()
        for name, each in decisions.items()
    }
    metrics = {
        name: ood_metrics(score["id"], score[name]) for name in score if name not in ("id", "held")
    }
    found = {
        name: {"garbage": garbage[name], "auroc": m["auroc"], "fpr95": m["fpr95_id"]}
        for name, m in metrics.items()
    }
    record = {
        "network": a.network.stem,
        "epochs": a.epochs,
        "tau": log.tau,
        "ID in garbage": garbage["id"],
        "sets": found,
    }
    record["ID rejected"] = (
        torch.cat([decision.level > 0 for decision in decisions["id"]]).double().mean().item()
    )
    print(record)
    return record


def detection(a: argparse.Namespace) -> dict:
    """Accuracy, garbage rate, AUROC and FPR@95 by OOD set of runs of ``tie-ext train``, by the name each is given."""
    runs = {}
    for pair in a.runs:
        name, _, folder = pair.partition("=")
        run = read_json(Path(folder) / "run.json", "a run")
        runs[name] = {
            "settings": run["settings"] | {"root": "DATA"},
            "numbers": run["numbers"],
            "commit": run["commit"],
        }
    return {"runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="what")
    one = commands.add_parser("epoch", help=epoch.__doc__)
    one.add_argument("--root", default="data")
    one.add_argument("--data", default="mnist")
    one.add_argument("--images", type=int)
    one.add_argument("--backbone", choices=BACKBONES, default="conv3")
    one.add_argument("--head", nargs="+", choices=HEADS, default=["multilayer", "linear"])
    one.add_argument("--repeats", type=int, default=5)
    one.add_argument("--adversarial-steps", type=int, default=0, help="of the loop's config")
    two = commands.add_parser("memory", help=memory.__doc__)
    two.add_argument("--epochs", type=int, help=argparse.SUPPRESS)
    two.add_argument("--file", help=argparse.SUPPRESS)
    two.add_argument("--work", type=Path, default=Path("cost"))
    three = commands.add_parser("classes", help=classes.__doc__)
    three.add_argument("--count", type=int, default=1000)
    three.add_argument("--each", type=int, default=20)
    three.add_argument("--epochs", type=int, default=3)
    three.add_argument("--kind", choices=HEADS, default="multilayer")
    commands.add_parser("large", help=large.__doc__)
    four = commands.add_parser("head", help=head.__doc__)
    four.add_argument("network", type=Path, help="NETWORK.safetensors of attached.py")
    four.add_argument("--root", default="data")
    four.add_argument("--epochs", type=int, default=2)
    five = commands.add_parser("detection", help=detection.__doc__)
    five.add_argument("runs", nargs="+", metavar="NAME=RUN")
    a = parser.parse_args()
    torch.set_num_threads(1)
    known = (epoch, memory, classes, large, head, detection)
    found = {of.__name__: of for of in known}[a.what](a)
    if found:
        stem = a.what
        if a.what == "epoch":
            stem += f"-{a.data}-{found['images']}-{a.backbone}" + (
                f"-search{a.adversarial_steps}" if a.adversarial_steps else ""
            )
        if a.what == "head":
            stem += f"-{a.network.stem}"
        places = {"DATA": getattr(a, "root", None), "WORK": getattr(a, "work", None)}
        if hasattr(a, "network"):
            places[a.network.name] = a.network
        places = {name: place for name, place in places.items() if place is not None}
        write_json(
            OUT / f"{stem}.json",
            {**found, **provenance(getattr(a, "device", "cpu"), places=places)},
        )


if __name__ == "__main__":
    main()
