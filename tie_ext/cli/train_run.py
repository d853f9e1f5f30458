"""One run of training in a folder, from where it stands to its last epoch and the test images."""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tie_ext.cli import data, processes, registry
from tie_ext.cli.calibrate_run import COMBINED, combined_scores, too_few
from tie_ext.cli.data import Images, training_batches
from tie_ext.cli.evaluation import evaluate
from tie_ext.cli.folder import OWN, attached, read_record, read_settings, save_settings
from tie_ext.cli.settings import RunSettings, load_images
from tie_ext.cli.snapshots import save_examples, save_snapshot
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.training.checkpoint import check_settings
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.distributed import share, world
from tie_ext.utils.files import locked, save_state, sha256, write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.random import seeded


def train_run(
    folder: str | os.PathLike,
    settings: RunSettings | None = None,
    device: str = "cpu",
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> dict:
    """Start a run, or go on with one, to its last epoch, and score the test images.

    Arguments:
        folder: The run folder.
        settings: What to do; None to go on with the run in the folder.
        device: Where to train.
        progress: Show progress bars.
        say: Told what a person has to know: before training: how the test images were come by, which ``run.json`` says too, and that they are too few
            for a threshold.

    Returns:
        The content of ``run.json``; of the first process alone, where several train (:mod:`tie_ext.cli.processes`).

    Raises:
        ValueError: If a setting, the data or a file is not as expected, the folder holds a run already, or another process is at it.
        FileNotFoundError: If there is no run to go on with, or are no weights.
        OSError: If a file cannot be written; earlier results are intact.
    """
    folder, new = Path(folder), settings is not None
    if settings is None:
        settings = read_settings(folder)
    elif os.path.lexists(folder / "training.safetensors") or attached(folder):
        with locked(folder):  # as one that another process is at is not there to go on with
            _refuse_a_run(folder)
    registry.check_name(settings.backbone)
    weights = (
        registry.read_weights(settings.weights) if new and settings.weights is not None else {}
    )
    channels = (
        registry.channels_of(settings.backbone, weights, str(settings.weights))
        if weights
        else None
    )
    if settings.mean:
        settings.range(channels or data.own_shape(settings.data)[0])
    images, test, ood = load_images(settings, settings.recipe.config.seed, channels)
    if new and processes.first():
        for held in (test, *ood.values()):
            held.check()
    if say is not None:
        for said in (
            test.note,
            too_few(len(test)) if settings.recipe.head == "multilayer" else "",
        ):
            if said:
                say(said)
    with locked(folder) if processes.first() else nullcontext():
        if new:
            _refuse_a_run(
                folder
            )  # again, as another process may have begun one while the images were read
        return train_on(folder, settings, images, test, ood, device, progress)


def _refuse_a_run(folder: Path) -> None:
    if os.path.lexists(folder / "training.safetensors"):
        raise ValueError(
            f"Expected a new folder, but got {folder}, which holds a run; go on with `tie-ext train --resume {folder}`"
        )
    if attached(folder):
        raise ValueError(
            f"Expected a new folder, but got {folder}, which holds a run of tie-ext attach; give another --out"
        )


def train_on(
    folder: Path,
    settings: RunSettings,
    images: Images,
    test: Images,
    ood: Mapping[str, Images],
    device: str = "cpu",
    progress: bool = False,
) -> dict:
    """Train in a folder that this process has locked, from where it stands to the last epoch, and score the test images.

    Returns:
        The content of ``run.json``.
    """
    seed, begun = (
        settings.recipe.config.seed,
        os.path.lexists(folder / "training.safetensors"),
    )  # a link to nowhere is no reason to begin anew
    if begun:
        check_settings(
            folder / "training.safetensors", settings.recipe.config, settings.recipe.methods()
        )
    scale = settings.range(images.shape[0])
    with seeded(seed):
        backbone = _backbone(settings, images, folder / "training.safetensors" if begun else None)
        low, high = (bound.flatten().tolist() for bound in (scale.low, scale.high))
        net = TIENet(
            backbone,
            len(images.classes),
            images.shape,
            low,
            high,
            images.classes,
            settings.recipe.head,
        ).to(device)
    trainer = settings.recipe.trainer(net, progress)
    if begun:
        processes.load(folder, trainer)
    elif processes.first():
        processes.clear(folder)  # of a run that was stopped in its first epoch
    # Before anything is written: it looks at the settings.
    batches = training_batches(
        processes.share_of(images, seed),
        share(settings.batch_size),
        settings.shift,
        scale if settings.mean else None,
    )
    about: dict[str, Any] = {"test_images": test.note} if test.note else {}
    if world() > 1:
        about["processes"] = world()
    if settings.weights is not None and not begun:
        about["weights_sha256"] = sha256(settings.weights)
    elif settings.weights is not None:
        about["weights_sha256"] = read_record(folder).get("weights_sha256")
    if processes.first():
        save_settings(folder, settings, trainer.device, about)

    def garbage(count: int) -> Tensor:
        return trainer.pool.draw(count if len(trainer.pool) else 0)

    while len(trainer.log) < settings.recipe.config.epochs:
        trainer.epoch(batches)
        if processes.first():
            save_snapshot(folder, len(trainer.log), net, trainer.synthesizers, garbage, test)
            net.save(folder / "network.safetensors")
        processes.save(folder, trainer)
    processes.clear(folder)
    if not processes.first():
        return {}
    numbers, scores = evaluate(net.eval(), test, ood, images)
    combined: dict = {}
    if isinstance(net.garbage, GarbageHead):
        metrics, combined = combined_scores(net, images, test, ood, folder / COMBINED)
        numbers["scores"] |= metrics
    save_examples(folder, test, ood)
    save_state(folder / "scores.safetensors", "scores", {OWN[0]: scores["score"], **combined})
    return finish(folder, settings, trainer, numbers, about)


def _backbone(settings: RunSettings, images: Images, begun: Path | None) -> nn.Module:
    """The network that a run trains; of one that was begun, without its weights, which the file has."""
    name, channels, n = settings.backbone, images.shape[0], len(images.classes)
    if begun is not None:
        return registry.build_for(name, channels, n, begun.stat().st_size)
    if settings.weights is None:
        return registry.build(name, channels, n)
    weights = registry.read_weights(settings.weights)
    # A head of other classes is none of this run's: TIENet puts a new one in its place.
    return registry.load(
        name, channels, registry.outputs_of(name, channels, weights, n), weights, settings.weights
    )


def finish(
    folder: Path, settings: RunSettings, trainer: TIETrainer, numbers: Mapping, about: Mapping
) -> dict:
    """Write ``run.json`` with log, results, and what else is to be said about the run."""
    log = [asdict(entry) for entry in trainer.log]
    for entry in log:  # a generator's loss may overflow, which JSON has no word for
        entry["losses"] = {
            name: loss if math.isfinite(loss) else None for name, loss in entry["losses"].items()
        }
    record = {"settings": settings.record(), **about, "numbers": numbers, "log": log}
    record |= provenance(trainer.device)
    write_json(folder / "run.json", record)
    return record
