"""A run folder: what was asked for, where training stands, the network to score with, and what the report shows.

RUN/run.json               settings, versions, log, results: for people and for the report
RUN/network.safetensors    the network with its tau: what ``tie-ext score`` and :meth:`TIENet.load` read
RUN/training.safetensors   all that resuming needs; written last, so that it never runs ahead of the others
RUN/epochs/0001.safetensors ...  inversions and features after each epoch, for the pictures
RUN/process-1-0001.safetensors ...  where several processes trained, what each of the others needs to go on (:mod:`tie_ext.cli.processes`)
RUN/scores.safetensors     test scores of the ID set and each OOD set
RUN/examples.safetensors   some test images of the ID set and each OOD set, for the pictures
RUN/combined/              where garbage is told by a head: the detector that ``tie-ext score`` decides by (:mod:`tie_ext.cli.calibrate_run`)

A run that attached a garbage class to a trained network (:mod:`tie_ext.cli.attach_run`) has the same but for training.safetensors, and one file
of pictures, of epoch 0.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from tie_ext.cli import registry
from tie_ext.cli.calibrate_run import COMBINED
from tie_ext.cli.settings import ImageSettings, RunSettings
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import Combined, TIEDetector
from tie_ext.pytorch_ood.combined import FORMAT
from tie_ext.training.recipe import Recipe
from tie_ext.utils.checks import check_number, check_shape, describe
from tie_ext.utils.files import load_state, read_json, reading, write_json
from tie_ext.utils.provenance import provenance

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
        for name in (
            "inversions",
            "inversion_grid",
            "outliers_*",
            "metrics",
            "features",
            "curves_*",
            "scores_*",
            "examples",
            "explain_*",
        )
    ),
    *(
        f"combined/{name}"
        for name in ("*.safetensors", "detector.json")
    ),
    "run.json",
)
"""What a run and its report write."""
OWN = ("TIE", "attached")
"""What a run calls the scores of its own network, trained or :mod:`attached <tie_ext.cli.attach_run>`; a demo has others beside."""
Loaded = TypeVar("Loaded")


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


def save_settings(
    folder: Path, settings: ImageSettings, device: torch.device, about: Mapping
) -> None:
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
            raise ValueError(
                f"Expected a run of tie-ext train in {folder}, but got one of tie-ext attach, which has nothing to go on with"
            )
        sets = {name: raw.get(name, []) for name in ("ood", "val_ood", "mean", "std")}
        for name, value in sets.items():
            if not isinstance(value, list):
                raise TypeError(f"{name} {value!r}")
        known = {f.name: raw[f.name] for f in fields(RunSettings) if f.name in raw}
        earlier = "config" in raw and "recipe" not in raw  # as 0.1.0 wrote them
        if not earlier:
            return RunSettings(
                **{
                    **known,
                    **{name: tuple(value) for name, value in sets.items()},
                    "recipe": Recipe.of_record(raw["recipe"]),
                }
            )
    hint = "finish it with that version, or begin anew in another folder"
    raise ValueError(
        f"Expected a run of this version of tie_ext in {folder}, but got one that an earlier version made; {hint}"
    )


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
        path: The folder of a run or of a saved detector, or the network's file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, foreign, or of an architecture that nothing says.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"Expected a run folder, or a network's file, at {path}, but there is nothing"
        )
    file = Path(path) / "network.safetensors" if Path(path).is_dir() else Path(path)
    return _with_architecture(TIENet.load, file, file, file.parent)


def load_combined(folder: Path) -> Combined | None:
    """The detector that a run decides by, on the CPU; None where it has none.

    Raises:
        ValueError: If a file of it is damaged, foreign or missing.
    """
    place = folder / COMBINED
    return (
        _with_architecture(Combined.load, place, place / "network.safetensors", folder)
        if place.is_dir()
        else None
    )


def load_saved(folder: Path) -> TIEDetector | Combined | None:
    """The detector that its ``save`` wrote into a folder, on the CPU; None where there is none.

    Raises:
        ValueError: If a file of it is damaged, foreign or missing.
    """
    line = folder / "detector.json"
    if not line.is_file():
        return None
    with reading(f"a detector.json at {line}"):
        of = read_json(line, "a detector.json")["format"]
    load: Callable[..., TIEDetector | Combined] = (
        Combined.load if of == FORMAT else TIEDetector.load
    )
    return _with_architecture(load, folder, folder / "network.safetensors", folder)


def _with_architecture(
    load: Callable[..., Loaded], path: Path, file: Path, folder: Path
) -> Loaded:
    """What ``load`` makes of a path whose network lies in a file; where its architecture is not ours, as ``run.json`` in the folder says."""
    about = load_state(file, "network", ("backbone", "image_shape", "num_classes"))
    if about.get("backbone") is not None:
        return load(path)
    if not (folder / "run.json").is_file():
        said = "run.json of a run beside it, which says what its architecture is"
        raise ValueError(
            f"Expected a network of one of {', '.join(BACKBONES)} in {file}, or the {said}, but got neither"
        )
    with reading(f"a network of the architecture that {folder / 'run.json'} says in {file}"):
        name = read_record(folder)["settings"]["backbone"]
        channels, n = check_shape(about["image_shape"])[0], about["num_classes"]
        check_number("num_classes", n, 2, 10**9, integer=True)
        return load(path, registry.build_for(name, channels, n, file.stat().st_size))


def load_scores(path: str | os.PathLike) -> dict[str, dict[str, Tensor]]:
    """Test scores ``(N,)`` by method and image set; the ID set is called ``id``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or foreign.
    """
    scores = load_state(path, "scores")
    with reading(f"the test scores of a run in {path}"):
        for label, sets in scores.items():
            if (
                not isinstance(label, str) or {"/", "\\", "\0"} & set(label) or "id" not in sets
            ):  # figures are called by it
                raise ValueError(
                    f"Expected the scores of a method in {path}, among them those of ID images, but got {label!r}"
                )
            for name, values in sets.items():
                good = (
                    isinstance(name, str)
                    and isinstance(values, Tensor)
                    and values.ndim == 1
                    and values.is_floating_point()
                )
                if not good or not len(values) or not bool(values.isfinite().all()):
                    raise ValueError(
                        f"Expected finite scores of {name!r} in {path}, but got {describe(values)}"
                    )
    return scores
