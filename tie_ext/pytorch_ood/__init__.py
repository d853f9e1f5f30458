"""Post-hoc detectors of TIE and other papers for pytorch-ood: larger score = more OOD, labels < 0
are OOD.
"""

from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import ExportModule, TIEDetector
from tie_ext.pytorch_ood.fdbd import BoundaryDistance
from tie_ext.pytorch_ood.iodin import IODIN
from tie_ext.pytorch_ood.knn import SampledKNN
from tie_ext.pytorch_ood.load import load_detector
from tie_ext.pytorch_ood.mahalanobis import MahalanobisPlusPlus
from tie_ext.pytorch_ood.monitor import Drift, Monitor
from tie_ext.pytorch_ood.recommended import combine
from tie_ext.pytorch_ood.rejection import RejectionNetwork
from tie_ext.pytorch_ood.rejects import Group, Rejects, rejects
from tie_ext.pytorch_ood.uncertainty import UncertaintyEstimate

__all__ = [
    "IODIN",
    "BoundaryDistance",
    "Combined",
    "Drift",
    "ExportModule",
    "Group",
    "MahalanobisPlusPlus",
    "Monitor",
    "RejectionNetwork",
    "Rejects",
    "SampledKNN",
    "TIEDetector",
    "UncertaintyEstimate",
    "combine",
    "load_detector",
    "rejects",
]
