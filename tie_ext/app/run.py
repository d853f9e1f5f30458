"""A run folder: what was asked for, where training stands, the network to score with, and what the report shows.

RUN/run.json               settings, versions, log, results: for people and for the report
RUN/network.safetensors    the network with its tau: what ``tie-ext score`` and :meth:`TIENet.load` read
RUN/training.safetensors   all that resuming needs; written last, so that it never runs ahead of the others
RUN/epochs/0001.safetensors ...  inversions and features after each epoch, for the pictures
RUN/process-1-0001.safetensors ...  where several processes trained, what each of the others needs to go on (:mod:`tie_ext.app.processes`)
RUN/scores.safetensors     test scores of the ID set and each OOD set
RUN/examples.safetensors   some test images of the ID set and each OOD set, for the pictures
RUN/combined/              where garbage is told by a head: the detector that ``tie-ext score`` decides by (:mod:`tie_ext.app.combining`)

A run that attached a garbage class to a trained network (:mod:`tie_ext.app.attaching`) has the same but for training.safetensors, and one file
of pictures, of epoch 0.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tie_ext.app import data, models, processes
from tie_ext.app.combining import COMBINED, combined_scores
from tie_ext.app.data import Images, training_batches
from tie_ext.app.evaluation import evaluate
from tie_ext.backbones import BACKBONES
from tie_ext.checkpoint import check_settings
from tie_ext.head import GarbageHead
from tie_ext.network import TIENet
from tie_ext.outliers.inversion import Inversion
from tie_ext.pytorch_ood import Combined
from tie_ext.recipe import Recipe
from tie_ext.support.checks import check_number, check_shape, describe
from tie_ext.support.distributed import share, world
from tie_ext.support.files import load_state, locked, read_json, reading, save_state, sha256, write_json
from tie_ext.support.modules import Ranged, frozen
from tie_ext.support.provenance import provenance
from tie_ext.support.random import seeded
from tie_ext.synthesis import Synthesizer
from tie_ext.training import TIETrainer

_WRITTEN = (
    "training.safetensors",
    "network.safetensors",
    "process-*-[0-9][0-9][0-9][0-9].safetensors",
    "scores.safetensors",
    "examples.safetensors",
    "report.html",
    "explain.html",
    "epochs/[0-9][0-9][0-9][0-9].safetensors",
    *(
        f"figures/{name}.png"
        for name in ("inversions", "inversion_grid", "outliers_*", "metrics", "features", "curves_*", "scores_*", "examples", "explain_*")
    ),
    *(f"combined/{name}" for name in ("network.safetensors", "members.safetensors", "detector.json")),
    "run.json",
)
"""What a run and its report write."""
OWN = ("TIE", "attached")
"""What a run calls the scores of its own network, trained or :mod:`attached <tie_ext.app.attaching>`; a demo has others beside."""
Loaded = TypeVar("Loaded")
EXAMPLES = 24
"""Images of a set that are kept for the pictures."""
LARGEST = 2048
"""Pixels of a side."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The images of a run, and the network they are for.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    data: str
    """A named set or ``folder:PATH``; ``demo`` for the built-in digits."""
    root: str = "data"
    """Where the named sets lie."""
    backbone: str = "conv3"
    """The network by name, of :func:`tie_ext.app.models.build`."""
    images: int | None = None
    """Take a random subset of this many training images; None for all."""
    size: int | None = None
    """Image size; None for the set's own."""
    batch_size: int = 128
    """ID images a batch."""
    ood: tuple[str, ...] = ()
    """Sets to score at the end, beside noise."""
    val_ood: tuple[str, ...] = ()
    """Sets whose validation images are scored too, as ``val:NAME``: settings may be chosen by them, and by none of the others."""
    download: bool = False
    """Let torchvision download what is missing."""
    in_memory: str = "auto"
    """Where the images of folders are kept while they are used, of :data:`tie_ext.app.data.IN_MEMORY`."""
    mean: tuple[float, ...] = ()
    """What is taken off images in [0, 1], a number or one a channel, as the network was trained; none where it takes them as they are."""
    std: tuple[float, ...] = ()
    """What they are divided by then."""

    def __post_init__(self) -> None:
        for name, kind in (("data", str), ("root", str), ("backbone", str), ("download", bool)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"Expected {name} to be a {kind.__name__}, but got {getattr(self, name)!r}")
        for name in ("ood", "val_ood"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"Expected {name} to be names of image sets, but got {value!r}")
        if self.in_memory not in data.IN_MEMORY:
            raise ValueError(f"Expected in_memory to be one of {', '.join(data.IN_MEMORY)}, but got {self.in_memory!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"Expected as many --mean as --std, but got {len(self.mean)} and {len(self.std)}")
        for name, values, low in (("--mean", self.mean, 0), ("--std", self.std, 1e-3)):
            for value in values:
                check_number(name, value, low, 1)
        for name, low, high in (("images", 1, 10**9), ("size", 1, LARGEST), ("batch_size", 1, 10**6)):
            if getattr(self, name) is not None or name == "batch_size":
                check_number(name, getattr(self, name), low, high, integer=True)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def range(self, channels: int) -> Ranged:
        """What black and white are to the network.

        Raises:
            ValueError: If mean and std are of another number of channels.
        """
        if len(self.mean) not in (0, 1, channels):
            raise ValueError(
                f"Expected --mean and --std of 1 or {channels} numbers, as the network takes {channels} channels, but got {len(self.mean)}"
            )
        pairs = list(zip(self.mean, self.std, strict=True)) or [(0.0, 1.0)]
        return Ranged(tuple(0 - mean / std for mean, std in pairs), tuple((1 - mean) / std for mean, std in pairs))


@dataclass(frozen=True, kw_only=True)
class RunSettings(ImageSettings):
    """What a run is asked to do; together with the images it determines the result.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    weights: str | None = None
    """File of the weights that the network begins with; None for random ones."""
    shift: int | None = None
    """Most pixels a training image is moved by; None for an eighth of its size."""
    recipe: Recipe = field(default_factory=Recipe)
    """The method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(f"Expected weights to be a file, but got {self.weights!r}")
        if self.shift is not None:
            check_number("shift", self.shift, 0, LARGEST, integer=True)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {**super().record(), "recipe": self.recipe.record()}


def load_images(settings: ImageSettings, seed: int, channels: int | None = None) -> tuple[Images, Images, dict[str, Images]]:
    """ID training set, ID test set and OOD sets of a run.

    Arguments:
        settings: Which.
        seed: Of the subset, and of what is held out.
        channels: C; None for the set's own.

    Raises:
        ValueError: If a set is missing or unknown.
    """
    own = data.own_shape(settings.data)
    C, S = channels or own[0], settings.size or own[1]
    try:
        return _images(settings, seed, (C, S, S))
    except OSError as error:
        raise ValueError(f"Expected to read the images of {shorten(settings.data, 80)}, but got: {error.strerror or error}") from error


def _images(settings: ImageSettings, seed: int, shape: tuple[int, int, int]) -> tuple[Images, Images, dict[str, Images]]:

    def read(name: str, split: str, most: int | None = None) -> Images:
        images = data.load(name, split, settings.root, shape, settings.download, seed, in_memory="no")
        return data.kept(images.first(most, seed), settings.in_memory)

    train: Images
    test: Images
    others: dict[str, Images]
    if settings.data == "demo":
        whole, test, found = data.demo()
        train, test, *shaped = (replace(images, x=data.reshape(images.x, *shape[:2])) for images in (whole, test, *found.values()))
        train, others = train.first(settings.images, seed), dict(zip(found, shaped, strict=True))
    else:
        train, test = read(settings.data, "train", settings.images), read(settings.data, "test")
        others = {"noise": data.noise("gaussian", min(len(test), 10_000), shape)}
    if test.classes != train.classes:
        raise ValueError(f"Expected the same classes in training and test images, but got {train.classes} and {test.classes}")
    validation = {f"val:{name}": read(name, "val") for name in settings.val_ood}
    ood = {name: read(name, "ood") for name in settings.ood}
    return train, test, validation | ood | others


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
        say: Told before training how the test images were come by, where a person has to know; ``run.json`` says it too.

    Returns:
        The content of ``run.json``; of the first process alone, where several train (:mod:`tie_ext.app.processes`).

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
    models.check_name(settings.backbone)
    weights = models.read_weights(settings.weights) if new and settings.weights is not None else {}
    channels = models.channels_of(settings.backbone, weights, str(settings.weights)) if weights else None
    if settings.mean:
        settings.range(channels or data.own_shape(settings.data)[0])
    images, test, ood = load_images(settings, settings.recipe.config.seed, channels)
    if new and processes.first():
        for held in (test, *ood.values()):
            held.check()
    if say is not None and test.note:
        say(test.note)
    with locked(folder) if processes.first() else nullcontext():
        if new:
            _refuse_a_run(folder)  # again, as another process may have begun one while the images were read
        return train_on(folder, settings, images, test, ood, device, progress)


def _refuse_a_run(folder: Path) -> None:
    if os.path.lexists(folder / "training.safetensors"):
        raise ValueError(f"Expected a new folder, but got {folder}, which holds a run; go on with `tie-ext train --resume {folder}`")
    if attached(folder):
        raise ValueError(f"Expected a new folder, but got {folder}, which holds a run of tie-ext attach; give another --out")


def train_on(
    folder: Path, settings: RunSettings, images: Images, test: Images, ood: Mapping[str, Images], device: str = "cpu", progress: bool = False
) -> dict:
    """Train in a folder that this process has locked, from where it stands to the last epoch, and score the test images.

    Returns:
        The content of ``run.json``.
    """
    seed, begun = settings.recipe.config.seed, os.path.lexists(folder / "training.safetensors")  # a link to nowhere is no reason to begin anew
    if begun:
        check_settings(folder / "training.safetensors", settings.recipe.config, settings.recipe.methods())
    scale = settings.range(images.shape[0])
    with seeded(seed):
        backbone = _backbone(settings, images, folder / "training.safetensors" if begun else None)
        low, high = (bound.flatten().tolist() for bound in (scale.low, scale.high))
        net = TIENet(backbone, len(images.classes), images.shape, low, high, images.classes, settings.recipe.garbage).to(device)
    trainer = settings.recipe.trainer(net, progress)
    if begun:
        processes.load(folder, trainer)
    elif processes.first():
        processes.clear(folder)  # of a run that was stopped in its first epoch
    # Before anything is written: it looks at the settings.
    batches = training_batches(processes.share_of(images, seed), share(settings.batch_size), settings.shift, scale if settings.mean else None)
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
        return models.build_for(name, channels, n, begun.stat().st_size)
    if settings.weights is None:
        return models.build(name, channels, n)
    weights = models.read_weights(settings.weights)
    # A head of other classes is none of this run's: TIENet puts a new one in its place.
    return models.load(name, channels, models.outputs_of(name, channels, weights, n), weights, settings.weights)


def written(folder: str | os.PathLike) -> list[Path]:
    """What a run and its report have written into a folder; ``run.json``, which says what the others are, last."""
    return [file for pattern in _WRITTEN for file in sorted(Path(folder).glob(pattern))]


def clear(folder: str | os.PathLike) -> None:
    """Delete what a run and its report have written, and nothing else that lies there; the lock stays, as others may wait for it.

    Arguments:
        folder: The run folder, which this process has locked.

    Raises:
        OSError: If a file cannot be deleted.
    """
    for file in written(folder):
        file.unlink()
    for name in ("epochs", "figures", COMBINED):
        with suppress(OSError):  # not there, or somebody else's files are in it
            (Path(folder) / name).rmdir()


def finish(folder: Path, settings: RunSettings, trainer: TIETrainer, numbers: Mapping, about: Mapping) -> dict:
    """Write ``run.json`` with log, results, and what else is to be said about the run."""
    log = [asdict(entry) for entry in trainer.log]
    for entry in log:  # a generator's loss may overflow, which JSON has no word for
        entry["losses"] = {name: loss if math.isfinite(loss) else None for name, loss in entry["losses"].items()}
    record = {"settings": settings.record(), **about, "numbers": numbers, "log": log}
    record |= provenance(trainer.device)
    write_json(folder / "run.json", record)
    return record


def save_settings(folder: Path, settings: ImageSettings, device: torch.device, about: Mapping) -> None:
    """Write the settings, so that a run that is killed in its first epoch can be gone on with."""
    write_json(folder / "run.json", {"settings": settings.record(), **about, **provenance(device)})


def read_settings(folder: Path) -> RunSettings:
    """Settings of the run in a folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If its ``run.json`` is not one, or is of an earlier version.
    """
    record = read_record(folder)
    with reading(f"the settings of a run in {folder / 'run.json'}"):
        raw = record["settings"]
        if "weights" in raw and "recipe" not in raw:
            raise ValueError(f"Expected a run of tie-ext train in {folder}, but got one of tie-ext attach, which has nothing to go on with")
        sets = {name: raw.get(name, []) for name in ("ood", "val_ood", "mean", "std")}
        for name, value in sets.items():
            if not isinstance(value, list):
                raise TypeError(f"{name} {value!r}")
        known = {f.name: raw[f.name] for f in fields(RunSettings) if f.name in raw}
        earlier = "config" in raw and "recipe" not in raw  # as 0.1.0 wrote them
        if not earlier:
            return RunSettings(**{**known, **{name: tuple(value) for name, value in sets.items()}, "recipe": Recipe.of_record(raw["recipe"])})
    hint = "finish it with that version, or begin anew in another folder"
    raise ValueError(f"Expected a run of this version of tie_ext in {folder}, but got one that an earlier version made; {hint}")


def read_record(folder: Path) -> dict:
    """The content of ``run.json``.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If its ``run.json`` is not one.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"Expected a run with a run.json at {folder}, but got none")
    record = read_json(path, "the record of a run")
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"Expected the record of a run with its settings in {path}, but got none")
    return record


def attached(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a run of ``tie-ext attach``."""
    try:
        settings = read_record(Path(folder))["settings"]
    except (OSError, ValueError):
        return False
    return "weights" in settings and "recipe" not in settings


def load_network(path: str | os.PathLike) -> TIENet:
    """The network of a run, on the CPU, in evaluation mode; where its architecture is not ours, as ``run.json`` beside it says.

    Arguments:
        path: The run folder, or the network's file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, foreign, or of an architecture that nothing says.
    """
    file = Path(path) / "network.safetensors" if Path(path).is_dir() else Path(path)
    return _with_architecture(TIENet.load, file, file, file.parent)


def load_combined(folder: Path) -> Combined | None:
    """The detector that a run decides by, on the CPU; None where it has none.

    Raises:
        ValueError: If a file of it is damaged, foreign or missing.
    """
    place = folder / COMBINED
    return _with_architecture(Combined.load, place, place / "network.safetensors", folder) if place.is_dir() else None


def _with_architecture(load: Callable[..., Loaded], path: Path, file: Path, folder: Path) -> Loaded:
    """What ``load`` makes of a path whose network lies in a file; where its architecture is not ours, as ``run.json`` in the folder says."""
    about = load_state(file, "network", ("backbone", "image_shape", "num_classes"))
    if about.get("backbone") is not None:
        return load(path)
    if not (folder / "run.json").is_file():
        said = "run.json of a run beside it, which says what its architecture is"
        raise ValueError(f"Expected a network of one of {', '.join(BACKBONES)} in {file}, or the {said}, but got neither")
    with reading(f"a network of the architecture that {folder / 'run.json'} says in {file}"):
        name = read_record(folder)["settings"]["backbone"]
        channels, n = check_shape(about["image_shape"])[0], about["num_classes"]
        check_number("num_classes", n, 2, 10**9, integer=True)
        return load(path, models.build_for(name, channels, n, file.stat().st_size))


@torch.no_grad()
def save_snapshot(
    folder: Path,
    epoch: int,
    net: TIENet,
    synthesizers: Sequence[Synthesizer],
    garbage: Callable[[int], Tensor],
    test: Images,
    per_class: int = 8,
    points: int = 500,
) -> None:
    """Keep what the pictures show of an epoch: inversions of every output or proposed outliers, and features of test images and garbage.

    Arguments:
        folder: The run folder.
        epoch: Its number; 0 where nothing was trained in epochs.
        net: The network.
        synthesizers: Who proposes outliers.
        garbage: Gives so many images ``(M, C, H, W)`` of garbage, or fewer.
        test: ID test images.
        per_class: Inversions of each output.
        points: Test images whose features are kept.
    """
    n, device = net.num_classes, net.low.device
    state: dict[str, Tensor] = {}
    some = test.first(points).loaded()
    with seeded(epoch), frozen(net):
        for i, synthesizer in enumerate(synthesizers):
            if isinstance(synthesizer, Inversion):
                x = synthesizer.invert(torch.arange(n + 1).repeat_interleave(per_class)).x
                state["inversions"] = to_bytes(net, x).reshape(n + 1, per_class, *x.shape[1:])
            else:
                x = net.scaled((some.x[: 2 * per_class].float() / 255).to(device))
                state[f"outliers_{i}"] = to_bytes(net, synthesizer.sample(net, x, some.y[: 2 * per_class].to(device)).x)
        x, other = net.scaled((some.x.float() / 255).to(device)), garbage(points // 5).to(device)
        state["features"] = net.features(torch.cat([x, other]))
        state["labels"] = torch.cat([some.y, torch.full((len(other),), n)])
    save_state(folder / "epochs" / f"{epoch:04d}.safetensors", "snapshot", dict(state))


def to_bytes(net: TIENet, x: Tensor) -> Tensor:
    """Images in the network's value range as uint8."""
    return (net.unit(x) * 255).round().to(torch.uint8)


def load_snapshots(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Snapshots by epoch.

    Raises:
        ValueError: If one is damaged or foreign, or they are not of one run.
    """
    snapshots, first = {}, None
    for path in sorted((Path(folder) / "epochs").glob("*.safetensors")):
        with reading(f"the pictures of an epoch in {path}"):
            snapshot = load_state(path, "snapshot")
            first = snapshot if first is None else first
            for name, x in snapshot.items():
                picture = name not in ("features", "labels")
                if picture and (x.dtype != torch.uint8 or x.ndim != (5 if name == "inversions" else 4) or x.shape[-3] not in (1, 3)):
                    raise ValueError(f"Expected pictures of {name} in {path}, but got {describe(x)}")
                if picture and (name not in first or x.shape != first[name].shape or x.numel() == 0):
                    raise ValueError(f"Expected {name} in {path} to be as in the other epochs, but got {describe(x)}")
            features, labels = snapshot["features"], snapshot["labels"]
            if features.ndim != 2 or not features.is_floating_point() or not len(features) or not bool(features.isfinite().all()):
                raise ValueError(f"Expected finite features of images in {path}, but got {describe(features)}")
            if labels.dtype != torch.long or labels.shape != features.shape[:1] or bool((labels < 0).any()):
                raise ValueError(f"Expected a label for each of {len(features)} images in {path}, but got {describe(labels)}")
            snapshots[int(path.stem)] = snapshot
    return snapshots


def save_examples(folder: Path, test: Images, ood: Mapping[str, Images]) -> None:
    """Keep some test images of each set but those that settings are chosen by, from all over it, as sets may be sorted by class."""
    sets = {"id": test, **{name: images for name, images in ood.items() if not name.startswith("val:")}}
    some = {name: images.take(torch.linspace(0, len(images) - 1, min(EXAMPLES, len(images))).long()).loaded().x for name, images in sets.items()}
    save_state(folder / "examples.safetensors", "examples", some)


def load_examples(folder: Path) -> dict[str, Tensor]:
    """Test images uint8 ``(M, C, S, S)`` by set, the ID set first and called ``id``; none of a run that kept none.

    Raises:
        ValueError: If the file is damaged or foreign.
    """
    path = Path(folder) / "examples.safetensors"
    if not path.is_file():
        return {}
    examples = load_state(path, "examples")
    for name, x in examples.items():
        if not isinstance(name, str) or not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim != 4:
            raise ValueError(f"Expected images of {name!r} in {path}, but got {describe(x)}")
    return examples


def load_scores(path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """Test scores ``(N,)`` by method and image set; the ID set is called ``id``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or foreign.
    """
    scores = load_state(path, "scores")
    with reading(f"the test scores of a run in {path}"):
        for label, sets in scores.items():
            if not isinstance(label, str) or {"/", "\\", "\0"} & set(label) or "id" not in sets:  # figures are called by it
                raise ValueError(f"Expected the scores of a method in {path}, among them those of ID images, but got {label!r}")
            for name, values in sets.items():
                good = isinstance(name, str) and isinstance(values, Tensor) and values.ndim == 1 and values.is_floating_point()
                if not good or not len(values) or not bool(values.isfinite().all()):
                    raise ValueError(f"Expected finite scores of {name!r} in {path}, but got {describe(values)}")
    return scores
