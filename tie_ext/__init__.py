"""TIE (Training-Inversion-Exclusion): out-of-distribution detection with a garbage class, for OpenOOD and pytorch-ood."""

from tie_ext.decision import Decision, decide, ood_score, uncertainty
from tie_ext.exclusion import GarbagePool
from tie_ext.inversion import Inversion
from tie_ext.networks import Conv3, Conv5, Generator, ResidualCNN, TIENet
from tie_ext.synthesis import Candidates, Noise, Synthesizer
from tie_ext.training import EpochLog, TIEConfig, TIETrainer

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
