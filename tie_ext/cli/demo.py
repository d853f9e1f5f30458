"""``tie-ext demo``: a garbage class for a trained network that ships, and what it then decides."""

import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tie_ext.cli import demo_images, registry, report
from tie_ext.cli.attach import attach_in
from tie_ext.cli.batches import SCORING, scaled
from tie_ext.cli.folder import clear, load_run, read_record, written
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.cli.settings import AttachSettings, TrainSettings
from tie_ext.cli.train import train_in
from tie_ext.cli.transform import Transform
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.training.config import TIEConfig
from tie_ext.training.recipe import Recipe
from tie_ext.utils.files import locked, write_json
from tie_ext.utils.weight_files import read_checkpoint


def recipe(seed: int = 0, **changes: Any) -> Recipe:
    """Two minutes of training on 2000 small images (``--train``)."""
    few = {"epochs": 6, "candidates": 1100, "pool_size": 2000} | changes
    synthesizers = {"inversion": {"steps": 40, "width": 16}}
    return Recipe(TIEConfig(seed=seed, **few), synthesizers, head="multilayer")


def run(flags: Namespace) -> None:
    """Attach, or train, decide on images of every kind, and write the report."""
    # Images are small: threads that wait for one another cost more than they give.
    torch.set_num_threads(1)
    start, folder = time.perf_counter(), flags.out
    train, calibration, new = demo_images.clothes()
    transform = Transform.squash(train.shape)
    images = RunImages(train, calibration, demo_images.strangers(), transform)
    files = written(folder)
    found = read_record(folder)["settings"] if (folder / "run.json").is_file() else {}
    if files and found.get("data") != "demo":
        raise ValueError(
            f"Expected a folder for the demo, but got {folder}, which holds {files[-1].name} of "
            "something else; give another --out"
        )
    with locked(folder):
        clear(folder)
        print(f"clothes: {len(train)} to fit, {len(calibration)} held out", flush=True)
        (_train if flags.train else _attach)(folder, images, flags.seed)
        _say(start, "deciding")
        net, _, decide = load_run(folder)
        sets = {"clothes": new, **images.ood}
        rejected = {name: rejection(net, decide, of) for name, of in sets.items()}
        record = read_record(folder)
        record["numbers"]["decision"]["measured"] = rejected["clothes"]
        write_json(folder / "run.json", record)
    _say(start, f"report: {report.write_report(folder)}; detector: {folder}")
    print(sentence(rejected))


def sentence(rejected: Mapping[str, float]) -> str:
    """What was decided, given the share rejected of clothes and of every other set."""
    others = {name: share for name, share in rejected.items() if name != "clothes"}
    named = ", ".join(f"{share:.1%} of {name}" for name, share in others.items())
    return f"{1 - rejected['clothes']:.1%} of new clothes accepted; rejected: {named}"


def rejection(net: TIENet, decide: Callable[[Tensor], Decision], images: ImageSet) -> float:
    """Share of the images that is rejected."""
    x = scaled(images.loaded().x, net)
    return sum(int((decide(part).level > 0).sum()) for part in x.split(SCORING)) / len(x)


def _attach(folder: Path, images: RunImages, seed: int) -> None:
    """A garbage class attached to the network that ships."""
    path = str(demo_images.NETWORK)
    settings = AttachSettings(data="demo", backbone="conv3", weights=path, seed=seed)
    checkpoint = read_checkpoint(path)
    model, _ = registry.load("conv3", 1, len(images.train.classes), checkpoint)
    print("attaching a garbage class to a network trained on clothes", flush=True)
    attach_in(folder, settings, model, images, checkpoint.path)


def _train(folder: Path, images: RunImages, seed: int) -> None:
    """A network trained with its garbage class from the start."""
    settings = TrainSettings(data="demo", recipe=recipe(seed))
    print(f"training a network by TIE: {settings.recipe.config.epochs} epochs", flush=True)
    train_in(folder, settings, images, progress=True)


def _say(start: float, what: str) -> None:
    print(f"{time.perf_counter() - start:3.0f} s  {what}", flush=True)
