"""``tie-ext train``: one run of training in a folder, to its last epoch and the test images."""

import math
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tie_ext.cli import processes, registry, tables
from tie_ext.cli.batches import training_batches
from tie_ext.cli.classifier import make_network
from tie_ext.cli.evaluation import evaluate_run, notes
from tie_ext.cli.flags import UsageError, check_device, recipe_of, settings_of, usage
from tie_ext.cli.folder import (
    OWN,
    STATE,
    check_new,
    read_record,
    read_settings,
)
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.cli.settings import TrainSettings, load_images
from tie_ext.cli.snapshots import save_snapshot
from tie_ext.cli.transform import load_transform
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.distributed import rank, share, world
from tie_ext.utils.files import locked, sha256, write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.weight_files import read_checkpoint


def run(flags: Namespace) -> None:
    """Start a run, or resume one, train it to its last epoch, and print its results."""
    check_device(flags.device)
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
        record = _run(folder, settings, device)
        if rank() == 0:
            print(tables.idle(record["log"]), end="")
            print(tables.summary(OWN[False], record["numbers"], folder))


def _new_settings(given: Mapping[str, Any]) -> TrainSettings:
    if "data" not in given or "out" not in given:
        raise UsageError("Expected --data and --out (or --resume RUN), but not both were given")
    with usage():
        registry.check_name(given.get("backbone", "conv3"))
    return settings_of(TrainSettings, given, recipe=recipe_of({"head": "multilayer", **given}))


def _run(folder: Path, settings: TrainSettings | None, device: str) -> dict:
    """Read the data of a new run, or of one to resume for None, lock its folder, and train."""
    if settings is None:
        settings = read_settings(folder)
        # 0.2.0, which did not say how images are read, squashed them.
        squashed = replace(settings, transform="squash")
        transform = load_transform(folder) or squashed.image_transform()
    else:
        check_new(folder)
        channels = None
        if settings.weights is not None:
            channels, _ = registry.sizes_of(settings.backbone, read_checkpoint(settings.weights))
        with usage():
            transform = settings.image_transform(channels)
    images = load_images(settings, settings.recipe.config.seed, transform)
    first = rank() == 0
    for note in notes(images) if first else ():
        print(note)
    with locked(folder) if first else nullcontext():
        return train_in(folder, settings, images, device, progress=first)


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
    config, state = settings.recipe.config, folder / STATE
    transform, resumed = images.transform, state.exists()
    backbone = partial(_backbone, settings, images.train, resumed)
    head, bounds = settings.recipe.head, transform.bounds
    net = make_network(backbone, images.train, config, device, head, bounds)
    trainer = settings.recipe.trainer(net, progress)
    if resumed:
        trainer.load(state)
    train = processes.share_of(images.train, config.seed)
    of_process = share(settings.batch_size)
    batches = training_batches(train, of_process, settings.shift, Bounded(*bounds))
    if resumed:
        record = read_record(folder)
    else:
        record = {"settings": settings.record(), "transform": asdict(transform)}
        record |= {"test_images": images.test.note, "processes": world()}
        if settings.weights is not None:
            record["weights_sha256"] = sha256(settings.weights)
    record |= provenance(trainer.device)
    first = rank() == 0
    if first:
        # So that a run that is killed in its first epoch can be resumed.
        write_json(folder / "run.json", record)

    def garbage(count: int) -> Tensor:
        return trainer.pool.draw(count if len(trainer.pool) else 0)

    while len(trainer.log) < config.epochs:
        trainer.epoch(batches)
        if first:
            epoch, test = len(trainer.log), images.test
            save_snapshot(folder, epoch, net, trainer.synthesizers, garbage, test)
            net.save(folder / "network.safetensors")
            trainer.save(state)  # last, so that it never runs ahead
    if not first:
        return {}
    log = [asdict(entry) for entry in trainer.log]
    for losses in (entry["losses"] for entry in log):
        # A generator's loss may overflow, and JSON has no infinity.
        losses |= {name: None for name, loss in losses.items() if not math.isfinite(loss)}
    numbers = evaluate_run(folder, OWN[False], net.eval(), images)
    record |= {"numbers": numbers, "log": log}
    write_json(folder / "run.json", record)
    return record


def _backbone(settings: TrainSettings, images: ImageSet, resumed: bool) -> nn.Module:
    """The backbone of a run; of one that is resumed, without its weights, which the state has."""
    name, channels, n = settings.backbone, images.shape[0], len(images.classes)
    if resumed or settings.weights is None:
        return registry.build(name, channels, n)
    checkpoint = read_checkpoint(settings.weights)
    # TIENet replaces a last layer for other classes.
    outputs = registry.sizes_of(name, checkpoint)[1]
    model, note = registry.load(name, channels, outputs or n, checkpoint)
    if note:
        print(note)
    return model
