"""One reader of every folder that holds a detector."""

import os
from pathlib import Path

import torch
from torch import nn

from tie_ext.pytorch_ood.combined import FORMAT, Combined
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.utils.files import read_json, reading


def load_detector(
    folder: str | os.PathLike,
    backbone: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> TIEDetector | Combined:
    """Read the detector in a folder that ``save`` wrote, or in the folder of a run.

    Arguments:
        folder: The folder. Where it holds a network alone, that is a :class:`TIEDetector`.
        backbone: The architecture, where it is not one of the paper's CNNs; its weights come from
            the file.
        device: Where the detector is to be.

    Raises:
        FileNotFoundError: If the folder holds no detector and no network.
        ValueError: If a file is truncated, foreign or of a newer major version.
    """
    folder = Path(folder)
    # Runs of 0.2.0 have the combination in a folder of its own.
    folder = next(
        (
            place
            for place in (folder, folder / "combined")
            if os.path.lexists(place / "detector.json")
        ),
        folder,
    )
    path = folder / "detector.json"
    if not os.path.lexists(path):
        return TIEDetector.load(folder, backbone, device)
    with reading(f"a detector.json at {path}"):
        combined = read_json(path, "a detector.json")["format"] == FORMAT
    return (Combined if combined else TIEDetector).load(folder, backbone, device)
