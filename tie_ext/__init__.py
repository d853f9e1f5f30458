"""TIE (Training-Inversion-Exclusion): out-of-distribution detection with a garbage class.

What most people need is here; everything else is imported from its room, such as
``tie_ext.models.backbones`` or ``tie_ext.outliers``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.training.attach import attach
from tie_ext.training.config import TIEConfig
from tie_ext.training.explain import explain
from tie_ext.training.trainer import TIETrainer

if TYPE_CHECKING:
    from tie_ext.pytorch_ood import Combined, TIEDetector, combine

__version__ = "0.3.0"
__all__ = [
    "Combined",
    "Decision",
    "TIEConfig",
    "TIEDetector",
    "TIENet",
    "TIETrainer",
    "attach",
    "combine",
    "explain",
]


def __getattr__(name: str):
    """The names that need pytorch-ood, imported when they are asked for."""
    if name not in ("Combined", "TIEDetector", "combine"):
        raise AttributeError(f"module 'tie_ext' has no attribute {name!r}")
    try:
        return getattr(import_module("tie_ext.pytorch_ood"), name)
    except ImportError as error:
        raise ImportError(
            f"tie_ext.{name} needs pytorch-ood 0.4 or newer ({error}); "
            "pip install 'pytorch-ood>=0.4'"
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
