"""TIE and the other papers' post-hoc detectors inside pytorch-ood: larger score = more OOD, labels < 0 are OOD."""

from tie_ext.pytorch_ood.chosen import combine
from tie_ext.pytorch_ood.combined import Combined
from tie_ext.pytorch_ood.detector import Deployed, TIEDetector
from tie_ext.pytorch_ood.iodin import IODIN
from tie_ext.pytorch_ood.mahalanobis import MahalanobisPlusPlus
from tie_ext.pytorch_ood.neighbours import SampledKNN
from tie_ext.pytorch_ood.rejection import RejectionNetwork
from tie_ext.pytorch_ood.uncertainty import UncertaintyEstimate

__all__ = ["IODIN", "Combined", "Deployed", "MahalanobisPlusPlus", "RejectionNetwork", "SampledKNN", "TIEDetector", "UncertaintyEstimate", "combine"]
