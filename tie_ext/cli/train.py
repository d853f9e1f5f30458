"""``tie-ext train``: one run of training in a folder, to its last epoch and the test images."""

import math
import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tie_ext.cli import processes, registry, tables
from tie_ext.cli.batches import training_batches
from tie_ext.cli.classifier import make_network
from tie_ext.cli.evaluation import evaluate_run, too_few
from tie_ext.cli.flags import UsageError, check_flags, recipe_of, settings_of, usage
from tie_ext.cli.folder import (
    OWN,
    holds_attached,
    read_record,
    read_settings,
    run_transform,
)
from tie_ext.cli.images import Images, RunImages
from tie_ext.cli.settings import TrainSettings, load_images
from tie_ext.cli.snapshots import save_snapshot
from tie_ext.cli.transform import Transform
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.distributed import share, world
from tie_ext.utils.files import load_state, locked, sha256, write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.weight_files import read_checkpoint

STATE = "training.safetensors"


def run(flags: Namespace) -> None:
    """Start a run, or resume one, train it to its last epoch, and print its results."""
    check_flags(vars(flags))
    given = {name: v for name, v in vars(flags).items() if name not in ("name", "device")}
    folder = Path(given.get("resume") or given.get("out") or "")
    settings = _new_settings(given) if "resume" not in given else None
    if settings is None and len(given) > 1:
        others = ", ".join(f"--{name.replace('_', '-')}" for name in sorted({*given} - {"resume"}))
        raise UsageError(
            f"Expected --resume RUN alone or with --device, but got {others} too; a run keeps its "
            "settings"
        )
    with processes.together(flags.device) as device:
        first = processes.first()
        record = _run(folder, settings, device, first, "yes" in flags)
    if not first:
        return
    print(tables.tables({OWN[False]: record["numbers"]}))
    print(tables.worst_validation(record["numbers"]) + tables.decides(record["numbers"]), end="")
    print(tables.idle(record["log"]), end="")
    print(f"run: {folder}; figures: tie-ext report {folder}")


def _new_settings(given: Mapping[str, Any]) -> TrainSettings:
    if "data" not in given or "out" not in given:
        raise UsageError("Expected --data and --out (or --resume RUN), but not both were given")
    with usage():
        registry.check_name(given.get("backbone", "conv3"))
    return settings_of(TrainSettings, given, recipe=recipe_of({"head": "multilayer", **given}))


def _run(
    folder: Path, settings: TrainSettings | None, device: str, first: bool, anyway: bool
) -> dict:
    """Read the data of a new run, or of one to resume for None, lock its folder, and train."""
    new = settings is not None
    if settings is None:
        settings = read_settings(folder)
    elif os.path.lexists(folder / STATE) or holds_attached(folder):
        with locked(folder):  # a run that another process is at is not to be resumed
            _refuse_a_run(folder)
    registry.check_name(settings.backbone)
    channels = None
    if new and settings.weights is not None:
        channels = registry.channels_of(settings.backbone, read_checkpoint(settings.weights))
    transform = settings.image_transform(channels) if new else run_transform(folder, settings)
    images = load_images(settings, settings.recipe.config.seed, transform)
    if new:
        images.check_held_out(anyway)
    if first:
        if new:
            images.check()
        few = too_few(len(images.test)) if settings.recipe.head == "multilayer" else ""
        for note in filter(None, (images.test.note, few, *images.notes)):
            print(note)
    with locked(folder) if first else nullcontext():
        if new:
            _refuse_a_run(folder)  # again: another process may have started one meanwhile
        return train_in(folder, settings, images, device, progress=first)


def _refuse_a_run(folder: Path) -> None:
    wanted = f"Expected a new folder, but got {folder}, which holds a run"
    if os.path.lexists(folder / STATE):
        raise ValueError(f"{wanted}; continue it with `tie-ext train --resume {folder}`")
    if holds_attached(folder):
        raise ValueError(f"{wanted} of tie-ext attach; give another --out")


def train_in(
    folder: Path,
    settings: TrainSettings,
    images: RunImages,
    device: str = "cpu",
    progress: bool = False,
) -> dict:
    """Train in a folder that this process has locked, from where it stands to the last epoch, and
    score the test images.

    Returns:
        The content of ``run.json``; of the first process alone, where several train.
    """
    config = settings.recipe.config
    resumed = os.path.lexists(folder / STATE)  # a link to nowhere is no reason to start again
    transform = cast(Transform, images.transform)
    backbone = partial(_backbone, settings, images.train, folder / STATE if resumed else None)
    net = make_network(
        backbone, images.train, config, device, settings.recipe.head, transform.bounds
    )
    trainer = settings.recipe.trainer(net, progress)
    if resumed:
        processes.load(folder, trainer)
    elif processes.first():
        processes.clear(folder)  # of a run that was stopped in its first epoch
    batches = training_batches(  # checks the settings, before anything is written
        processes.share_of(images.train, config.seed),
        share(settings.batch_size),
        settings.shift,
        Bounded(*transform.bounds) if transform.mean else None,
    )
    about = _about(folder, settings, images, resumed)
    if processes.first():
        # So that a run that is killed in its first epoch can be resumed.
        record = {"settings": settings.record(), **about, **provenance(trainer.device)}
        write_json(folder / "run.json", record)

    def garbage(count: int) -> Tensor:
        return trainer.pool.draw(count if len(trainer.pool) else 0)

    while len(trainer.log) < config.epochs:
        trainer.epoch(batches)
        if processes.first():
            epoch, test = len(trainer.log), images.test
            save_snapshot(folder, epoch, net, trainer.synthesizers, garbage, test)
            net.save(folder / "network.safetensors")
        processes.save(folder, trainer)
    processes.clear(folder)
    if not processes.first():
        return {}
    numbers = evaluate_run(folder, OWN[False], net.eval(), images)
    return finish(folder, settings, trainer, numbers, about)


def _backbone(settings: TrainSettings, images: Images, resumed: Path | None) -> nn.Module:
    """The backbone of a run; of one that is resumed, without its weights, which the file has."""
    name, channels, n = settings.backbone, images.shape[0], len(images.classes)
    if resumed is not None:
        load_state(resumed, "training", ())  # says what is wrong with the file
        return registry.build_for(name, channels, n, resumed.stat().st_size)
    if settings.weights is None:
        return registry.build(name, channels, n)
    checkpoint = read_checkpoint(settings.weights)
    # TIENet replaces a last layer for other classes.
    outputs = registry.outputs_of(name, channels, checkpoint, n)
    model, note = registry.load(name, channels, outputs, checkpoint)
    if note:
        print(note)
    return model


def _about(
    folder: Path, settings: TrainSettings, images: RunImages, resumed: bool
) -> dict[str, Any]:
    """Facts of a run that ``run.json`` has besides its settings."""
    about: dict[str, Any] = {"transform": asdict(cast(Transform, images.transform))}
    about |= {"test_images": images.test.note} if images.test.note else {}
    if world() > 1:
        about["processes"] = world()
    if settings.weights is not None:
        known = read_record(folder).get("weights_sha256") if resumed else None
        about["weights_sha256"] = known if resumed else sha256(settings.weights)
    return about


def finish(
    folder: Path, settings: TrainSettings, trainer: TIETrainer, numbers: Mapping, about: Mapping
) -> dict:
    """Write ``run.json`` with log and results."""
    log = [asdict(entry) for entry in trainer.log]
    for entry in log:  # a generator's loss may overflow, and JSON has no infinity
        entry["losses"] = {
            name: loss if math.isfinite(loss) else None for name, loss in entry["losses"].items()
        }
    record = {"settings": settings.record(), **about, "numbers": numbers, "log": log}
    record |= provenance(trainer.device)
    write_json(folder / "run.json", record)
    return record
