"""The folder of a saved detector; docs/file-format.md says what is in it.

``network.safetensors``   the network
``detector.safetensors``  tensors: members, the scale of their scores, calibration scores
``detector.json``         settings, threshold, and the fingerprints of the other two
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.utils.checks import check_finite, check_number, describe
from tie_ext.utils.files import load_state, read_json, reading, save_state, sha256, write_json

VERSION = 4
"""Of both kinds of detector. 0.3.0 wrote version 3: each score had a tail of its own. 0.1.0 and
0.2.0 wrote version 1: tensors in ``members.safetensors``, of a combination alone, and no
calibration scores.
"""
EARLIER = "members.safetensors"


def write_folder(
    folder: str | os.PathLike, kind: str, net: TIENet, settings: dict, state: dict
) -> None:
    """Write a detector; each file atomically, ``detector.json`` last.

    Arguments:
        folder: The folder.
        kind: ``format`` of ``detector.json``.
        net: The network.
        settings: Numbers and names, for ``detector.json``.
        state: Nested dicts and lists with tensors, for ``detector.safetensors``.

    Raises:
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    net.save(folder / "network.safetensors")
    save_state(folder / "detector.safetensors", "detector", state | {"training_features": None})
    prints = {
        f"{name}_sha256": sha256(folder / f"{name}.safetensors")
        for name in ("network", "detector")
    }
    about = {"format": kind, "version": VERSION, **prints}
    write_json(folder / "detector.json", {**about, **settings, "transform": None})
    (folder / EARLIER).unlink(missing_ok=True)  # of a detector that was saved here before


def read_folder(folder: str | os.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and state that :func:`write_folder` wrote, or 0.1.0 or 0.2.0; without the network.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is truncated, foreign, of a newer version, or not one of those that
            were saved together.
    """
    path = Path(folder) / "detector.json"
    settings = read_json(path, f"a detector.json of {kind}")
    with reading(f"a detector.json of {kind} at {path}"):
        if settings["format"] != kind:
            raise ValueError(f"format {settings['format']!r}")
        version = settings["version"]
        if version not in range(1, VERSION + 1):
            raise ValueError(
                f"Expected a detector of version 1 to {VERSION} at {path}, "
                f"but got version {version!r}; a newer tie_ext reads it"
            )
        _check_print(path, "network.safetensors", settings["network_sha256"])
        if version >= 3:
            name, wanted = "detector.safetensors", settings["detector_sha256"]
        elif "members" in settings:
            name, wanted = EARLIER, settings["members_sha256"]
        else:
            return settings, {}
        state = load_state(path.with_name(name), name.split(".")[0])
        _check_print(path, name, wanted)
    return settings, state


def _check_print(path: Path, name: str, wanted: str) -> None:
    if wanted != sha256(path.with_name(name)):
        raise ValueError(
            f"Expected beside {path} the {name} it was saved with, but got another; "
            "fit the detector again and save it"
        )


def saved_number(settings: dict[str, Any], name: str) -> Tensor | None:
    """A number of ``detector.json``, as a scalar tensor; None where it is null.

    Raises:
        ValueError: If it is no finite number.
    """
    if settings[name] is None:
        return None
    check_number(name, settings[name], -3e38, 3e38)
    return torch.tensor(float(settings[name]))


def saved_threshold(settings: dict[str, Any]) -> Tensor | None:
    """The threshold, a scalar, or those of the classes ``(m+1,)``; None where there is none.

    Raises:
        ValueError: If one is no finite number.
    """
    if not isinstance(settings["threshold"], list):
        return saved_number(settings, "threshold")
    for value in settings["threshold"]:
        check_number("threshold", value, -3e38, 3e38)
    if not settings["threshold"]:
        raise ValueError("Expected a threshold for each class, but got none")
    return torch.tensor([float(value) for value in settings["threshold"]])


def saved_scores(state: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Calibration scores ``(M,)`` and their predicted classes ``(M,)``; None where there are none.

    Raises:
        ValueError: If they are no finite vector, or no class of each.
    """
    scores, labels = state.get("calibration_scores"), state.get("calibration_labels")
    if scores is not None:
        if not isinstance(scores, Tensor) or scores.ndim != 1 or not scores.is_floating_point():
            raise ValueError(f"Expected calibration scores (M,), but got {describe(scores)}")
        check_finite(scores, "calibration scores")
    if labels is not None:
        good = isinstance(labels, Tensor) and labels.dtype == torch.int64
        if not good or scores is None or labels.shape != scores.shape or bool((labels < 0).any()):
            raise ValueError(f"Expected a class of each score, but got {describe(labels)}")
    return scores, labels
