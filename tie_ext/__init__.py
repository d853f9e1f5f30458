"""TIE (Training-Inversion-Exclusion): out-of-distribution detection with a garbage class, for OpenOOD and pytorch-ood."""

from importlib import import_module
from typing import TYPE_CHECKING

from tie_ext.decision import Decision, decide, ood_score, uncertainty
from tie_ext.exclusion import GarbagePool
from tie_ext.inversion import Inversion
from tie_ext.networks import Conv3, Conv5, Generator, ResidualCNN, TIENet
from tie_ext.synthesis import Candidates, Noise, Synthesizer
from tie_ext.training import EpochLog, TIEConfig, TIETrainer

if TYPE_CHECKING:
    from tie_ext.pytorch_ood import TIEDetector as TIEDetector
    from tie_ext.pytorch_ood import UncertaintyEstimate as UncertaintyEstimate


def __getattr__(name: str):  # so that `import tie_ext` needs torch and numpy only
    if name not in ("TIEDetector", "UncertaintyEstimate"):
        raise AttributeError(f"module 'tie_ext' has no attribute {name!r}")
    try:
        return getattr(import_module("tie_ext.pytorch_ood"), name)
    except ImportError as error:
        raise ImportError(f"Expected pytorch-ood 0.4 or newer for {name}, but got: {error}; pip install 'pytorch-ood>=0.4'") from error


__version__ = "0.1.0"
__all__ = [
    "Candidates",
    "Conv3",
    "Conv5",
    "Decision",
    "EpochLog",
    "GarbagePool",
    "Generator",
    "Inversion",
    "Noise",
    "ResidualCNN",
    "Synthesizer",
    "TIEConfig",
    "TIENet",
    "TIETrainer",
    "decide",
    "ood_score",
    "uncertainty",
]
