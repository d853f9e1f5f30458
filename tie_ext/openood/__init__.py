"""TIE inside an unmodified OpenOOD: ``import tie_ext.openood; tie_ext.openood.register()``, or
``python -m tie_ext.openood main.py ...``.

Adds trainers ``tie`` and ``attach``, network ``tie_net`` and postprocessors ``tie``, ``tie_ue``,
``tie_combined`` and ``dmr`` wherever OpenOOD looks names up, in memory only.
"""

from importlib import import_module
from pathlib import Path

from tie_ext.openood.requirements import check_requirements

_MODULES = {
    "register": "registry",
    "registered": "registry",
    "unregister": "registry",
    "OpenOODTIENet": "network",
    "tie_net_of": "network",
    "LastRecorder": "recorder",
    "OpenOODAttachTrainer": "trainers",
    "OpenOODTIETrainer": "trainers",
    "CombinedPostprocessor": "combined",
    "TIEPostprocessor": "postprocessors",
    "TIEUEPostprocessor": "postprocessors",
    "DMRPostprocessor": "rejection",
    "without_cuda": "cpu",
}
__all__ = ["check_requirements", "configs", *_MODULES]


def configs() -> Path:
    """The folder of our configs: ``openood_configs`` of a checkout, or its copy in the package."""
    package = Path(__file__).parents[1]
    installed = package / "openood_configs"
    return installed if installed.is_dir() else package.parent / "openood_configs"


def __getattr__(name: str):
    # Lazily, so that missing packages are named before OpenOOD's imports fail one by one.
    if name not in _MODULES:
        raise AttributeError(f"module 'tie_ext.openood' has no attribute {name!r}")
    check_requirements()
    return getattr(import_module(f"tie_ext.openood.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
