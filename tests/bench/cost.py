"""What TIE costs, as ratios to plain training on the same machine; docs/research/cost.md is made of the records (tests/bench/cost_page.py).

    python tests/bench/cost.py epoch --root DATA --data mnist --images 20000
    python tests/bench/cost.py epoch --root DATA --data cifar10 --images 1280 --backbone conv5
    python tests/bench/cost.py loop --root DATA --data mnist --ood fashionmnist
    python tests/bench/cost.py attach --images DATA --cases cifar10-resnet20 efficientnet-lite0 flat
    python tests/bench/cost.py scoring --images DATA --cases cifar10-resnet20 conv3

Epochs of both are trained in turn, each after the other's; the ratio is that of the medians. Seconds are those that the process computed for, on
one thread, as the clock on the wall counts what else a machine does; loading counts where it is this process that loads.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from tie_ext import TIEConfig, TIENet, attach
from tie_ext.cli import data
from tie_ext.cli.batches import training_batches
from tie_ext.cli.classifier import train_plain
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import HEADS
from tie_ext.training import strategies
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


def loop(a: argparse.Namespace) -> dict:
    """Quality of the loop with steps that follow the images, beside all steps in every epoch:
    accuracy, ID and OOD images in garbage, and the smallest AUROC, in percent, by seed."""
    train = data.load(a.data, "train", a.root)
    train = train.first(a.images)
    shape = train.shape
    others = [data.load(name, "ood", a.root, shape).first(1000).x for name in a.ood]
    found: dict = {"data": a.data, "images": len(train), "epochs": a.epochs, "ood": a.ood}
    test = data.load(a.data, "test", a.root).first(2000)
    for kind, full in (("all steps", 1), ("steps that follow the images", strategies.FULL)):
        with patch.object(strategies, "FULL", full):
            found[kind] = [quality(a, seed, train, test, others) for seed in range(a.seeds)]
        print(kind, found[kind], flush=True)
    return found


def quality(a: argparse.Namespace, seed: int, train, test, others: list) -> dict[str, float]:
    """What :func:`loop` says of one seed."""
    from rivals import auroc

    with seeded(seed):
        net = TIENet(
            BACKBONES[a.backbone](train.shape[0], len(train.classes)),
            len(train.classes),
            train.shape,
            head="multilayer",
        )
    config = TIEConfig(epochs=a.epochs, seed=seed)
    trainer = Recipe(config, prior=("procedural",), head="multilayer").trainer(net)
    batches = training_batches(train)
    took = seconds(lambda: [trainer.epoch(batches) for _ in range(a.epochs)])
    net.eval()

    def decided(x: torch.Tensor):
        parts = [net.decide(part.float() / 255) for part in x.split(200)]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    label, _, score, level = decided(test.x)
    rows = {"accuracy": label == test.y, "id in garbage": level == 1}
    found = {name: 100 * of.double().mean().item() for name, of in rows.items()}
    taken, aurocs = [], []
    for x in others:
        _, _, far, garbage = decided(x)
        taken.append(100 * (garbage == 1).double().mean().item())
        aurocs.append(100 * auroc(score, far))
    found |= {"ood in garbage": sum(taken) / len(taken), "smallest AUROC": min(aurocs)}
    return {name: round(of, 2) for name, of in found.items()} | {"seconds": round(took)}


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
    from tie_ext.pytorch_ood.recommended import chosen_members
    from tie_ext.pytorch_ood.sample import Sample
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
        sample = Sample(rows, torch.arange(len(rows)) % n, torch.rand(len(rows)))
        members = chosen_members(sample, net, (net.fc.weight, net.fc.bias))
        combined = Combined(members, 0.2).fit([x[:40]])
        kinds = {"backbone": model, "head": net.decide, "combination": combined.decide}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        with torch.no_grad():
            for _ in range(a.repeats + 1):
                for kind, work in kinds.items():
                    times[kind].append(seconds(partial(work, x)))
        # Of neighbours in time, as a machine is not equally fast all the while.
        plain = times["backbone"][1:]
        found[name] = {
            "batch": len(x),
            "ratio": {
                kind: median(a / b for a, b in zip(times[kind][1:], plain, strict=True))
                for kind in ("head", "combination")
            },
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
    one.add_argument("--head", nargs="+", choices=HEADS, default=["multilayer"])
    one.add_argument("--repeats", type=int, default=5)
    one.add_argument("--adversarial-steps", type=int, default=0, help="of the loop's config")
    two = commands.add_parser("loop", help=loop.__doc__)
    two.add_argument("--root", default="data")
    two.add_argument("--data", default="mnist")
    two.add_argument("--images", type=int, default=10_000)
    two.add_argument("--backbone", choices=BACKBONES, default="conv3")
    two.add_argument("--epochs", type=int, default=4)
    two.add_argument("--seeds", type=int, default=3)
    two.add_argument("--ood", nargs="+", required=True)
    for what in (attached_cases, scoring):
        public = commands.add_parser(what.__name__.partition("ed_")[0], help=what.__doc__)
        public.add_argument("--images", type=Path, required=True, help="packed image sets")
        public.add_argument("--cases", nargs="+", required=True)
        public.add_argument("--count", type=int, help="other than the bars'")
        public.add_argument("--repeats", type=int, default=15)
        public.add_argument("--when", choices=("before", "after"), default="after")
    a = parser.parse_args()
    torch.set_num_threads(1)
    known = (epoch, loop, scoring)
    found = {"attach": attached_cases, **{of.__name__: of for of in known}}[a.what](a)
    if found:
        stem = a.what
        if a.what == "loop":
            stem += f"-{Path(a.data).name}"
        if a.what == "epoch":
            stem += f"-{a.data}-{found['images']}-{a.backbone}" + (
                f"-search{a.adversarial_steps}" if a.adversarial_steps else ""
            )
        places = {"DATA": getattr(a, "root", None)}
        if "when" in found:  # cases that were measured apart are one record
            stem += f"-{a.when}"
            places["DATA"] = a.images
            path = OUT / f"{stem}.json"
            earlier = read_json(path, "a record")["cases"] if path.exists() else {}
            found["cases"] = earlier | found["cases"]
        places = {name: place for name, place in places.items() if place is not None}
        write_json(
            OUT / f"{stem}.json",
            {**found, **provenance(getattr(a, "device", "cpu"), places=places)},
        )


if __name__ == "__main__":
    main()
