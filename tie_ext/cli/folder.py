"""A run folder, which is the folder of a detector too.

RUN/run.json               settings, versions, log, results
RUN/network.safetensors    the network with its tau
RUN/detector.safetensors   with detector.json: the combination that ``tie-ext score`` decides by,
RUN/detector.json          where there are enough test images to fit one
RUN/training.safetensors   all that resuming needs; written last, so that it never runs ahead
RUN/process-1-0001.safetensors ...  the same of each further process (:mod:`.processes`)
RUN/epochs/0001.safetensors ...  inversions and features after each epoch, for the figures
RUN/scores.safetensors     test scores of the ID set and each OOD set
RUN/examples.safetensors   some test images of each set, for the figures

A run of ``tie-ext attach`` has no training.safetensors, and one file of figures, of epoch 0.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from tie_ext.cli import registry
from tie_ext.cli.evaluation import COMBINED
from tie_ext.cli.settings import TrainSettings
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import Combined, TIEDetector, load_detector
from tie_ext.scores.decision import Decision
from tie_ext.training.recipe import Recipe
from tie_ext.utils.checks import check_number, check_shape, describe
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
        if is_attached(record):
            raise ValueError(
                f"Expected a run of tie-ext train in {folder}, but got one of tie-ext attach, "
                "which has nothing to continue"
            )
        if "config" in raw and "recipe" not in raw:  # as 0.1.0 wrote them
            raise ValueError(
                f"Expected a run of this version of tie_ext in {folder}, but got one that an "
                "earlier version made; finish it with that version, or start again in another "
                "folder"
            )
        given = {f.name: raw[f.name] for f in fields(TrainSettings) if f.name in raw}
        for f in fields(TrainSettings):
            # JSON has lists for tuples; a text is none.
            if f.default is not MISSING and isinstance(f.default, tuple) and f.name in given:
                given[f.name] = tuple(_list(given[f.name]))
        given["recipe"] = Recipe.of_record(raw["recipe"])
        return TrainSettings(**given)


def _list(value: object) -> list:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} instead of a list")
    return value


def is_attached(record: Mapping) -> bool:
    """Whether a record is one of ``tie-ext attach``."""
    return "weights" in record["settings"] and "recipe" not in record["settings"]


def holds_attached(folder: Path) -> bool:
    """Whether a folder holds a run of ``tie-ext attach``."""
    try:
        return is_attached(read_record(folder))
    except (OSError, ValueError):
        return False


def load_network(folder: str | os.PathLike) -> TIENet:
    """The network of a run, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If the file is damaged or foreign, or its architecture is not known.
    """
    file = Path(folder) / "network.safetensors"
    return _with_architecture(TIENet.load, file, file, file.parent)


def load_decision(
    place: Path, false_alarm: float | None = None, device: str = "cpu"
) -> tuple[TIENet, Callable[[Tensor], Decision]]:
    """The network of a run or of a saved detector, and what decides on images by it; arguments and
    errors are those of :func:`load_run`.
    """
    detector, decide = load_run(place, false_alarm, device)
    return cast(TIENet, detector.network), decide


def load_run(
    place: Path, false_alarm: float | None = None, device: str = "cpu"
) -> tuple[TIEDetector | Combined, Callable[[Tensor], Decision]]:
    """The detector of a run or of a folder that holds one, and what decides on images by it.

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
        known = detector.calibration_scores
        named = (COMBINED,) if isinstance(detector, Combined) else tuple(OWN.values())
        scores = _id_scores(folder, named) if known is None else None
        detector.recalibrate(false_alarm, scores)
    elif not (home / "detector.json").is_file():
        decide = net.decide
    elif detector.threshold is None and not _decides_by_tau(detector, net):
        raise ValueError(
            f"Expected a detector with a threshold in {place}, but got one without; fit it and "
            "save it again"
        )
    net.to(device)
    return detector.to(device), decide


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


def _decides_by_tau(detector: TIEDetector | Combined, net: TIENet) -> bool:
    if isinstance(detector, Combined) or detector.false_alarm is not None:
        return False
    return detector.tau is not None or bool(net.tau.isfinite())


def _id_scores(folder: Path, labels: Sequence[str]) -> Tensor:
    """Scores of held-out ID images that a run has left under one of the labels."""
    path = folder / "scores.safetensors"
    found = load_scores(path)
    for label in labels:
        if label in found:
            return found[label]["id"]
    raise ValueError(
        f"Expected scores of {' or '.join(labels)} in {path}, but got those of {', '.join(found)}"
    )


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
        channels, n = check_shape(about["image_shape"])[0], about["num_classes"]
        check_number("num_classes", n, 2, 10**9, integer=True)
        return load(path, registry.build_for(name, channels, n, file.stat().st_size))


def load_scores(path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """Test scores ``(N,)`` by method and image set, larger = more OOD; the ID set is ``id``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or foreign.
    """
    scores = load_state(path, "scores")
    with reading(f"the test scores of a run in {path}"):
        for label, sets in scores.items():
            # Figures are named after the label.
            if not isinstance(label, str) or {*"/\\\0"} & {*label} or "id" not in sets:
                raise ValueError(
                    f"Expected the scores of a method in {path}, with those of ID images, but got "
                    f"{label!r}"
                )
            for name, x in sets.items():
                good = isinstance(name, str) and isinstance(x, Tensor) and x.is_floating_point()
                if not good or x.ndim != 1 or not len(x) or not bool(x.isfinite().all()):
                    raise ValueError(
                        f"Expected finite scores of {name!r} in {path}, but got {describe(x)}"
                    )
    return scores
