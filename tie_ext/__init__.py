"""TIE (Training-Inversion-Exclusion): out-of-distribution detection with a garbage class, for OpenOOD and pytorch-ood."""

from importlib import import_module
from typing import TYPE_CHECKING

from tie_ext.models.backbones import Conv3, Conv5, ResidualCNN, ResNet20
from tie_ext.models.generator import Generator
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.outliers import (
    BoundarySettings,
    Inversion,
    InversionSettings,
    ManifoldBoundary,
    MarginalRepresentations,
    MarginalSettings,
    Noise,
    NoiseSettings,
    Procedural,
    ProceduralSettings,
    Saliency,
    SaliencySettings,
)
from tie_ext.outliers.base import Candidates, Domain, Prior, Synthesizer
from tie_ext.scores.decision import Decision, decide, ood_score, uncertainty
from tie_ext.training.attach import attach
from tie_ext.training.config import TIEConfig
from tie_ext.training.explain import explain
from tie_ext.training.log import EpochLog
from tie_ext.training.pool import GarbagePool
from tie_ext.training.trainer import TIETrainer

if TYPE_CHECKING:
    from tie_ext.pytorch_ood import Combined as Combined
    from tie_ext.pytorch_ood import MahalanobisPlusPlus as MahalanobisPlusPlus
    from tie_ext.pytorch_ood import TIEDetector as TIEDetector
    from tie_ext.pytorch_ood import UncertaintyEstimate as UncertaintyEstimate
    from tie_ext.pytorch_ood import combine as combine


def __getattr__(name: str):  # so that `import tie_ext` needs torch and numpy only
    if name not in (
        "Combined",
        "MahalanobisPlusPlus",
        "TIEDetector",
        "UncertaintyEstimate",
        "combine",
    ):
        raise AttributeError(f"module 'tie_ext' has no attribute {name!r}")
    try:
        return getattr(import_module("tie_ext.pytorch_ood"), name)
    except ImportError as error:
        raise ImportError(
            f"Expected pytorch-ood 0.4 or newer for {name}, but got: {error}; pip install 'pytorch-ood>=0.4'"
        ) from error


__version__ = "0.2.0"
__all__ = [
    "BoundarySettings",
    "Candidates",
    "Conv3",
    "Conv5",
    "Decision",
    "Domain",
    "EpochLog",
    "GarbageHead",
    "GarbagePool",
    "Generator",
    "Inversion",
    "InversionSettings",
    "ManifoldBoundary",
    "MarginalRepresentations",
    "MarginalSettings",
    "Noise",
    "NoiseSettings",
    "Prior",
    "Procedural",
    "ProceduralSettings",
    "ResNet20",
    "ResidualCNN",
    "Saliency",
    "SaliencySettings",
    "Synthesizer",
    "TIEConfig",
    "TIENet",
    "TIETrainer",
    "attach",
    "decide",
    "explain",
    "ood_score",
    "uncertainty",
]
