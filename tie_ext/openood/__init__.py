"""TIE inside an unmodified OpenOOD: ``import tie_ext.openood; tie_ext.openood.register()``, or ``python -m tie_ext.openood main.py ...``.

Adds trainer ``tie``, network ``tie_net`` and postprocessors ``tie``, ``tie_ue``, ``tie_combined`` and ``dmr`` wherever OpenOOD looks names up, in
memory only.
"""

from importlib import import_module

from tie_ext.openood.requirements import check_requirements

_ROOMS = {
    "register": "registry",
    "registered": "registry",
    "unregister": "registry",
    "OpenOODTIENet": "network",
    "OpenOODTIETrainer": "trainer",
    "CombinedPostprocessor": "combined",
    "TIEPostprocessor": "postprocessors",
    "TIEUEPostprocessor": "postprocessors",
    "DMRPostprocessor": "rejection",
    "without_cuda": "cpu",
}
__all__ = ["check_requirements", *_ROOMS]


def __getattr__(name: str):  # so that what is missing is named before OpenOOD's own imports fail one by one
    if name not in _ROOMS:
        raise AttributeError(f"module 'tie_ext.openood' has no attribute {name!r}")
    check_requirements()
    return getattr(import_module(f"tie_ext.openood.{_ROOMS[name]}"), name)
