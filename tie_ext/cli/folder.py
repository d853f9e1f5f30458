"""A run folder, which is the folder of a detector too.

RUN/run.json               settings, versions, log, results
RUN/network.safetensors    the network with its tau
RUN/detector.safetensors   with detector.json: the combination that ``tie-ext score`` decides by,
RUN/detector.json          where there are enough test images to fit one
RUN/training.safetensors   all that resuming needs; written last, so that it never runs ahead
RUN/epochs/0001.safetensors ...  inversions and features after each epoch, for the figures
RUN/scores.safetensors     test scores of the ID set and each OOD set
RUN/examples.safetensors   some test images of each set, for the figures

A run of ``tie-ext attach`` has no training.safetensors, and one file of figures, of epoch 0.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tie_ext.cli import registry
from tie_ext.cli.evaluation import COMBINED
from tie_ext.cli.settings import TrainSettings
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import Combined, TIEDetector, load_detector
from tie_ext.scores.decision import Decision
from tie_ext.training.recipe import Recipe
from tie_ext.utils.files import load_state, read_json, reading

FILES = [
    "run.json",
    "report.html",
    "explain.html",
    "rejected.html",
    "detector.json",
    "combined/detector.json",
    "training.safetensors",
    "network.safetensors",
    "detector.safetensors",
    "scores.safetensors",
    "examples.safetensors",
    "combined/network.safetensors",
    "combined/members.safetensors",
    "process-*-[0-9][0-9][0-9][0-9].safetensors",
    "epochs/[0-9][0-9][0-9][0-9].safetensors",
    "figures/inversions.png",
    "figures/inversion_grid.png",
    "figures/outliers_*.png",
    "figures/metrics.png",
    "figures/features.png",
    "figures/curves_*.png",
    "figures/scores_*.png",
    "figures/examples.png",
    "figures/explain_*.png",
]
"""What a run and its report write; ``combined/`` is of runs of 0.2.0."""
OWN = {True: "attached", False: "TIE"}
"""What tables and scores call the network of a run, by whether a head was attached to it."""
RENAMED = {
    "precision": "autocast_dtype",
    "search": "adversarial_steps",
    "objective": "criterion",
    "garbage": "head",
}
"""Keys of ``run.json`` as 0.2.0 wrote them."""
Loaded = TypeVar("Loaded")


STATE = "training.safetensors"
"""What resuming needs."""


def written(folder: str | os.PathLike) -> list[Path]:
    """What a run and its report have written to a folder; ``run.json``, which says whose the other
    files are, last.
    """
    return [file for pattern in FILES[::-1] for file in sorted(Path(folder).glob(pattern))]


def clear(folder: str | os.PathLike) -> None:
    """Delete what a run and its report have written, and nothing else; the lock stays.

    Arguments:
        folder: The run folder, which this process has locked.

    Raises:
        OSError: If a file cannot be deleted.
    """
    for file in written(folder):
        file.unlink()
    for name in ("epochs", "figures", "combined"):
        with suppress(OSError):  # it does not exist, or holds other files
            (Path(folder) / name).rmdir()


def read_record(folder: Path) -> dict:
    """The content of ``run.json``, by the names of today.

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
    return {**record, "settings": renamed(record["settings"])}


def renamed(settings: Mapping) -> dict:
    """Settings by the names of today; 0.2.0 called a head on every layer ``layers``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if key in ("recipe", "config") and isinstance(value, Mapping):
            value = renamed(value)
        if (key, value) == ("garbage", "layers"):
            value = "multilayer"
        found[RENAMED.get(key, key)] = value
    return found


def read_settings(folder: Path) -> TrainSettings:
    """Settings of the run in a folder.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If its ``run.json`` is not one, or was written by 0.1.0.
    """
    record = read_record(folder)
    with reading(f"the settings of a run in {folder / 'run.json'}"):
        raw = record["settings"]
        if "recipe" not in raw:
            raise ValueError(
                f"Expected a run of tie-ext train in {folder}, but got one of tie-ext attach, or "
                "of version 0.1, which this version does not continue"
            )
        given = {f.name: raw[f.name] for f in fields(TrainSettings) if f.name in raw}
        return TrainSettings(**given | {"recipe": Recipe.of_record(raw["recipe"])})


def is_attached(record: Mapping) -> bool:
    """Whether a record is one of ``tie-ext attach``."""
    return "weights" in record["settings"] and "recipe" not in record["settings"]


def check_new(folder: Path) -> None:
    """Refuse a folder that holds files of a run, but for one that was stopped before there was
    anything to resume.

    Raises:
        ValueError: With the command that resumes the run, if one does.
    """
    files = written(folder)
    if not files or (files[-1].name == "run.json" and not _begun(folder)):
        return
    hint = f"continue it with `tie-ext train --resume {folder}`, or "
    hint = (hint if (folder / STATE).exists() else "") + "give another --out"
    raise ValueError(
        f"Expected a new folder, but got {folder}, which holds {files[-1].name} of a run; {hint}"
    )


def _begun(folder: Path) -> bool:
    return (folder / STATE).exists() or "numbers" in read_record(folder)


def load_network(folder: str | os.PathLike) -> TIENet:
    """The network of a run, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged or foreign, or its architecture is not known.
    """
    file = Path(folder) / "network.safetensors"
    return _with_architecture(TIENet.load, file, file, file.parent)


def load_run(
    place: Path, false_alarm: float | None = None, device: str = "cpu"
) -> tuple[TIENet, TIEDetector | Combined, Callable[[Tensor], Decision]]:
    """The network and detector of a run or of a saved detector, and what decides on images by it.

    Arguments:
        place: The folder, or the network's file in it.
        false_alarm: Set the threshold for this rate, in (0, 1], by the calibration scores; for
            runs without a combination, by the scores of the ID test images. None for the
            detector's own threshold, or the network's own rule where there is no detector.
        device: Where to compute.

    Raises:
        FileNotFoundError: If there is no such file, or no scores to set a threshold by.
        ValueError: If a file is damaged or foreign, the architecture is not known, a detector has
            no threshold, or there are too few scores for the rate.
    """
    detector, net, home = read_detector(place)
    folder = place if place.is_dir() else place.parent
    decide = detector.decide
    if false_alarm is not None:
        scores = None
        if detector.calibration_scores is None:  # of 0.2.0
            found = load_state(folder / "scores.safetensors", "scores")
            names = (COMBINED,) if isinstance(detector, Combined) else OWN.values()
            scores = next(found[name]["id"] for name in names if name in found)
        detector.recalibrate(false_alarm, scores)
    elif not (home / "detector.json").is_file():
        decide = net.decide
    elif detector.threshold is None and not _has_tau(detector, net):
        raise ValueError(
            f"Expected a detector with a threshold in {place}, but got one without; fit it and "
            "save it again"
        )
    return net.to(device), detector.to(device), decide


def read_detector(place: Path) -> tuple[TIEDetector | Combined, TIENet, Path]:
    """The detector of a run or of a saved one, on the CPU, its network, and the folder of its
    files; the errors are those of :func:`load_run`.
    """
    if not place.exists():
        raise FileNotFoundError(
            f"Expected a run folder, or a network's file, at {place}, but there is nothing"
        )
    folder = place if place.is_dir() else place.parent
    old = folder / "combined"  # where 0.2.0 kept the detector of a run
    inside = not (folder / "detector.json").is_file() and (old / "detector.json").is_file()
    home = old if inside else folder
    detector: TIEDetector | Combined
    if place.is_dir() or place.name == "network.safetensors":
        detector = _with_architecture(load_detector, home, home / "network.safetensors", folder)
    else:
        detector = TIEDetector(_with_architecture(TIENet.load, place, place, folder))
    net = detector.network
    if not isinstance(net, TIENet):
        raise TypeError(f"Expected a detector on a TIENet, but got {type(net).__name__}")
    return detector, net, home


def _has_tau(detector: TIEDetector | Combined, net: TIENet) -> bool:
    if isinstance(detector, Combined) or detector.false_alarm is not None:
        return False
    return detector.tau is not None or bool(net.tau.isfinite())


def _with_architecture(
    load: Callable[..., Loaded], path: Path, file: Path, folder: Path
) -> Loaded:
    """What ``load`` makes of a path whose network is in a file; an architecture that is not ours
    is built as ``run.json`` in the folder says.
    """
    about = load_state(file, "network", ("backbone", "image_shape", "num_classes"))
    if about.get("backbone") is not None:
        return load(path)
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"Expected a network of one of {', '.join(BACKBONES)} in {file}, or the run.json of a "
            "run beside it, which says what its architecture is, but got neither"
        )
    with reading(f"a network of the architecture that {folder / 'run.json'} says in {file}"):
        name = read_record(folder)["settings"]["backbone"]
        return load(path, registry.build(name, about["image_shape"][0], about["num_classes"]))
