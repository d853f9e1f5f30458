"""What TIE costs, as ratios to plain training on the same machine; docs/research/cost.md is made of the records (tests/bench/cost_page.py).

    python tests/bench/cost.py epoch --root DATA --data mnist --images 60000
    python tests/bench/cost.py epoch --root DATA --data mnist --images 20000
    python tests/bench/cost.py epoch --root DATA --data mnist --images 20000 --adversarial-steps 5 --head multilayer
    python tests/bench/cost.py epoch --root DATA --data cifar10 --images 50000 --backbone resnet20
    python tests/bench/cost.py memory
    python tests/bench/cost.py classes
    python tests/bench/cost.py large
    python tests/bench/cost.py attach --images DATA --cases resnet20 efficientnet-lite0 flat
    python tests/bench/cost.py scoring --images DATA

Epochs of both are trained in turn, each after the other's; the ratio is that of the medians. Seconds are those that the process computed for, on
one thread, as the clock on the wall counts what else a machine does; loading counts where it is this process that loads.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from tie_ext import TIEConfig, TIENet, TIETrainer, attach
from tie_ext.cli import data
from tie_ext.cli.batches import ImageBatches, shifted, training_batches
from tie_ext.cli.classifier import train_plain
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


class Repeated(torch.utils.data.Dataset):
    """So many images, each many times; as a user's data set it gives one at a time."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, count: int, make: Callable):
        self.x, self.y, self.make, self.count = x, y, make, count
        self.targets = y.repeat(-(-count // len(y)))[:count]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.make(self.x[i % len(self.x)]), int(self.y[i % len(self.x)])


def user(name: str, root: Path, count: int) -> tuple[torch.nn.Module, Repeated, int, tuple]:
    """A public network as a user has it, images for it, its classes and the range of images."""
    import public_data
    import public_networks

    backbone = public_networks.BACKBONES[name]
    source, n = ("photos_imagenet", 1000) if backbone.size > 100 else ("cifar10-train", 10)
    x, y = public_data.read(root, source, backbone.size, 3, min(count, 5000))
    middle, deviation = (
        torch.tensor(of).view(-1, 1, 1) for of in (backbone.mean, backbone.deviation)
    )
    y = y if n == 10 else torch.full_like(y, -1)
    data = Repeated(x, y, count, lambda one: (one.float() / 255 - middle) / deviation)
    if n != 10:
        del data.targets  # images alone, as of most classes there is none
    model = backbone.make(root, root).to(memory_format=torch.channels_last).eval()
    return model, data, n, backbone.range


def per_image(model: Callable, x: torch.Tensor) -> float:
    """Seconds of an image in a pass, the smallest of three."""
    with torch.no_grad():
        model(x)
        return min(seconds(lambda: model(x)) for _ in range(3)) / len(x)


def attached(name: str, root: Path, count: int, batch: int) -> dict:
    """attach and combine on so many images, in passes of the backbone over them."""
    from inspect import signature

    from tie_ext import combine

    if name == "flat":
        x = torch.rand(1000, 1, 28, 28)
        data = Repeated(x, torch.arange(1000) % 10, count, lambda one: one)
        model, n, bounds = BACKBONES["conv3"](1, 10).eval(), 10, (0.0, 1.0)
    else:
        model, data, n, bounds = user(name, root, count)
    kept = hasattr(data, "targets")
    collate = None if kept else lambda rows: torch.stack([row[0] for row in rows])
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True, collate_fn=collate)
    held = torch.utils.data.Subset(data, range(min(200, count)))
    held_out = torch.utils.data.DataLoader(held, batch, collate_fn=collate)
    some = next(iter(torch.utils.data.DataLoader(data, batch)))[0]
    plain, of, nets = per_image(model, some), {}, []
    of["attach"] = seconds(lambda: nets.append(attach(model, loader, n, *bounds)))
    asked = signature(combine).parameters["train_loader"].default is not None
    more = {"train_loader": loader} if asked else {}
    of["combine"] = seconds(lambda: combine(nets[0], calibration_loader=held_out, **more))
    of["combine"] -= len(held) * plain
    plain = (plain + per_image(model, some)) / 2
    found = {"images": count, "seconds": of, "pass of an image": plain}
    found["passes"] = sum(of.values()) / plain / count
    print(name, found, flush=True)
    return found | {"peak_memory_mb": peak_memory()}


def attached_cases(a: argparse.Namespace) -> dict:
    """attach and combine on a network of a user, and on ten times as many images."""
    known = {
        "cifar10-resnet20": (45_000, 128),
        "efficientnet-lite0": (300, 32),
        "flat": (20_000, 128),
        "flat, ten times as many": (200_000, 128),
    }
    cases = {
        case: attached(case.split(",")[0], a.images, a.count or known[case][0], known[case][1])
        for case in known
        if case.split(",")[0] in a.cases
    }
    return {"when": a.when, "cases": cases}


def scoring(a: argparse.Namespace) -> dict:
    """A pass of the head and of the combination, in passes of the backbone; public networks."""
    from tie_ext import Combined
    from tie_ext.pytorch_ood.recommended import Sample, chosen_members
    from tie_ext.training.config import HeadConfig

    found = {}
    for name in a.cases:
        if name in BACKBONES:
            model, n, bounds, x = (
                BACKBONES[name](3, 10).eval(),
                10,
                (0.0, 1.0),
                torch.rand(128, 3, 32, 32),
            )
        else:
            model, data, n, bounds = user(name, a.images, 128)
            x = torch.stack([data[i][0] for i in range(128 if n == 10 else 16)])
        net = attach(model, [x[:40]], n, *bounds, head_config=HeadConfig(steps=10))
        # As many training images as the network keeps, and KNN, trusted or not.
        rows = net.features(x[:1]).detach() + torch.randn(5000, net.feature_size)
        sample = Sample(rows, torch.arange(len(rows)) % n)
        members = chosen_members(sample, net, (net.fc.weight, net.fc.bias))
        combined = Combined(members, 0.2).fit([x[:40]])
        kinds = {"backbone": model, "head": net.decide, "combination": combined.decide}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        with torch.no_grad():
            for _ in range(a.repeats + 1):
                for kind, work in kinds.items():
                    times[kind].append(seconds(partial(work, x)))
        least = {kind: median(of[1:]) for kind, of in times.items()}
        found[name] = {
            "batch": len(x),
            "ratio": {kind: least[kind] / least["backbone"] for kind in ("head", "combination")},
        }
        print(name, found[name], flush=True)
    return {"when": a.when, "cases": found}


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
    for what in (attached_cases, scoring):
        public = commands.add_parser(what.__name__.partition("ed_")[0], help=what.__doc__)
        public.add_argument("--images", type=Path, required=True, help="packed image sets")
        public.add_argument("--cases", nargs="+", required=True)
        public.add_argument("--count", type=int, help="other than the bars'")
        public.add_argument("--repeats", type=int, default=5)
        public.add_argument("--when", choices=("before", "after"), default="after")
    a = parser.parse_args()
    torch.set_num_threads(1)
    known = (epoch, memory, classes, large, scoring)
    found = {"attach": attached_cases, **{of.__name__: of for of in known}}[a.what](a)
    if found:
        stem = a.what
        if a.what == "epoch":
            stem += f"-{a.data}-{found['images']}-{a.backbone}" + (
                f"-search{a.adversarial_steps}" if a.adversarial_steps else ""
            )
        places = {"DATA": getattr(a, "root", None), "WORK": getattr(a, "work", None)}
        if "when" in found:  # cases that were measured apart are one record
            stem += f"-{a.when}"
            places["DATA"] = a.images
            path = OUT / f"{stem}.json"
            earlier = read_json(path, "a record")["cases"] if path.exists() else {}
            found["cases"] = earlier | found["cases"]
        if hasattr(a, "network"):
            places[a.network.name] = a.network
        places = {name: place for name, place in places.items() if place is not None}
        write_json(
            OUT / f"{stem}.json",
            {**found, **provenance(getattr(a, "device", "cpu"), places=places)},
        )


if __name__ == "__main__":
    main()
