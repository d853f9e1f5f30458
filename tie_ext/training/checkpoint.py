"""A run of the loop on disk: everything that resuming needs, in one file that can run no code."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tie_ext.training.log import EpochLog
from tie_ext.utils.files import check_state, load_state, reading, save_state
from tie_ext.utils.settings import differences

if TYPE_CHECKING:
    from tie_ext.training.trainer import TIETrainer

PARTS = ("config", "head_config", "sample_config")
"""The trainer's settings objects."""


def save_training(path: str | os.PathLike, trainer: "TIETrainer") -> None:
    """Write network, optimiser, pool, synthesizers and log; atomically, as safetensors + JSON.

    Raises:
        OSError: If it cannot be written; an earlier file is intact.
    """
    state = {
        **{name: asdict(getattr(trainer, name)) for name in PARTS},
        "methods": [(type(s).__name__, asdict(s.settings)) for s in trainer.synthesizers],
        "criterion": _name(trainer.criterion),
        "net": trainer.net.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "pool": trainer.pool.state_dict(),
        "synthesizers": [s.state_dict() for s in trainer.synthesizers],
        "counts": trainer.counts,
        "log": [asdict(entry) for entry in trainer.log],
    }
    save_state(path, "training", state)


def load_training(path: str | os.PathLike, trainer: "TIETrainer") -> None:
    """Resume the run that :func:`save_training` wrote.

    Arguments:
        path: The file.
        trainer: A trainer made with the same arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, or of a run with other settings, saying which.
            The trainer may be half loaded then.
    """
    state = load_state(path, "training")
    with reading(f"the settings of a run in {path}"):
        _check_settings(path, state, trainer)
    with reading(f"the training state of this network in {path}"):
        modules = [trainer.net, *trainer.synthesizers]
        states = [state["net"], *state["synthesizers"]]
        for module, saved in zip(modules, states, strict=True):
            _check_range(module, saved)
            check_state(module, saved)
            module.load_state_dict(saved)
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.pool.load_state_dict(state["pool"])
        trainer.counts, trainer.log = state["counts"], [EpochLog(**e) for e in state["log"]]


def _check_settings(path: str | os.PathLike, state: Mapping, trainer: "TIETrainer") -> None:
    """Refuse the state of a run with other settings; one that is newer than it had its default."""
    if "config" in state and "methods" not in state:  # as 0.1.0 wrote them
        raise ValueError(
            f"Expected a training state of this version of tie_ext in {path}, but got one of an "
            "earlier version; finish it with that"
        )
    mine: dict[str, Any] = {"criterion": _name(trainer.criterion)}
    theirs = {"criterion": state.get("criterion", mine["criterion"])}
    for name in PARTS:
        prefix, part = "" if name == "config" else f"{name}.", getattr(trainer, name)
        mine |= _settings(prefix, part)
        theirs |= _settings(prefix, type(part)()) | _named(prefix, state.get(name, {}))
    mine["synthesizers"] = [type(s).__name__ for s in trainer.synthesizers]
    theirs["synthesizers"] = [name for name, _ in state["methods"]]
    for i, (s, (_, saved)) in enumerate(zip(trainer.synthesizers, state["methods"], strict=False)):
        prefix = f"{type(s).__name__} {i + 1}."
        mine |= _settings(prefix, s.settings)
        theirs |= _settings(prefix, type(s.settings)()) | _named(prefix, saved)
    if other := differences(theirs, mine):
        raise ValueError(
            f"Expected the training state of a run with the settings of this one in {path}, "
            f"but got {other}"
        )


def _settings(prefix: str, settings: Any) -> dict[str, Any]:
    return _named(prefix, asdict(settings))


def _named(prefix: str, values: Mapping) -> dict[str, Any]:
    """Values by names with a prefix; JSON has lists for tuples."""
    return {f"{prefix}{k}": list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _check_range(module: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Refuse the state of a module for images of another value range."""
    for name in ("low", "high"):
        mine = getattr(module, name)
        if saved[name].shape != mine.shape or not torch.equal(saved[name], mine.to(saved[name])):
            raise ValueError(
                f"Expected images whose {name} is {mine.flatten().tolist()}, but got "
                f"{saved[name].flatten().tolist()}"
            )


def _name(criterion: Callable) -> str:
    """The name of a criterion."""
    name = getattr(criterion, "__qualname__", type(criterion).__qualname__)
    return f"{getattr(criterion, '__module__', '')}.{name}"
