"""TIE inside an unmodified OpenOOD: ``import tie_ext.openood; tie_ext.openood.register()``, or
``python -m tie_ext.openood main.py ...``.

Adds trainers ``tie`` and ``attach``, network ``tie_net`` and postprocessors ``tie``, ``tie_ue``,
``tie_combined``, ``attach`` and ``dmr`` wherever OpenOOD looks names up, in memory only.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
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
    "AttachPostprocessor": "attached",
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


class _RegisterOnImport(MetaPathFinder):
    """Registers once OpenOOD's evaluation API is imported, which looks on the network for the
    config of a name that it does not know.
    """

    api = "openood.evaluation_api"

    def find_spec(self, name, path=None, target=None):
        """The spec of the API, with registration after it; None for any other module."""
        if name != self.api:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec and spec.loader and "tie_ext.openood.registry" not in sys.modules:
            execute = spec.loader.exec_module

            def exec_module(module) -> None:
                execute(module)
                __getattr__("register")()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _RegisterOnImport.api in sys.modules:
    __getattr__("register")()
else:
    sys.meta_path.insert(0, _RegisterOnImport())
