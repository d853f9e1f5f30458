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
    own, combined = (place / "detector.json" for place in (folder, folder / "combined"))
    # Runs of 0.2.0 have the combination in a folder of its own.
    path = combined if combined.exists() and not os.path.lexists(own) else own
    kind: type[TIEDetector | Combined] = TIEDetector
    if os.path.lexists(path):
        with reading(f"a detector.json at {path}"):
            if read_json(path, "a detector.json")["format"] == FORMAT:
                kind = Combined
    return kind.load(path.parent, backbone, device)
