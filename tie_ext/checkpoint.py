"""A run of the loop on disk: all that going on needs, as one file that can run no code."""

import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from tie_ext.config import TIEConfig
from tie_ext.exclusion import GarbagePool
from tie_ext.log import EpochLog
from tie_ext.network import TIENet
from tie_ext.support.files import load_state, save_state
from tie_ext.synthesis import Synthesizer


class Resumable(Protocol):
    """What of a :class:`~tie_ext.training.TIETrainer` is kept."""

    net: TIENet
    config: TIEConfig
    optimizer: torch.optim.Optimizer
    pool: GarbagePool
    synthesizers: list[Synthesizer]
    counts: Tensor | None
    log: list[EpochLog]


def save_training(path: str | os.PathLike, trainer: Resumable) -> None:
    """Write network, optimiser, pool, synthesizers and log; atomically, as safetensors + JSON.

    Raises:
        OSError: If it cannot be written; an earlier file is intact.
    """
    state = {
        "config": asdict(trainer.config),
        "methods": _methods(trainer.synthesizers),
        "net": trainer.net.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "pool": trainer.pool.state_dict(),
        "synthesizers": [s.state_dict() for s in trainer.synthesizers],
        "counts": trainer.counts,
        "log": [asdict(entry) for entry in trainer.log],
    }
    save_state(path, "training", state)


def load_training(path: str | os.PathLike, trainer: Resumable) -> None:
    """Put a trainer where :func:`save_training` found the other, which was made with the same arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, or of a run with other settings, saying which.
    """
    state = load_state(path, "training")
    try:
        # A setting that came after the file had its default.
        theirs = {**asdict(TIEConfig()), **state["config"], **_flat(state["methods"])}
        mine = {**asdict(trainer.config), **_flat(_methods(trainer.synthesizers))}
        other = [f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}" for key in {**mine, **theirs} if theirs.get(key) != mine.get(key)]
        if other:
            raise ValueError(f"Expected the training state of a run with the settings of this one in {path}, but got {', '.join(other)}")
        trainer.net.load_state_dict(state["net"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.pool.load_state_dict(state["pool"])
        for synthesizer, saved in zip(trainer.synthesizers, state["synthesizers"], strict=True):
            synthesizer.load_state_dict(saved)
        trainer.counts = state["counts"]
        trainer.log = [EpochLog(**{f.name: entry[f.name] for f in fields(EpochLog)}) for entry in state["log"]]
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"Expected the training state of this network in {path}, but got: {error}") from error


def _methods(synthesizers: Sequence[Synthesizer]) -> list[tuple[str, dict]]:
    """Who proposes outliers, and how each is set."""
    return [(type(s).__name__, asdict(s.settings)) for s in synthesizers]


def _flat(methods: Sequence) -> dict[str, Any]:
    """The same by names that an error can say."""
    values: dict[str, Any] = {"synthesizers": [name for name, _ in methods]}
    for name, settings in methods:
        values |= {f"{name}.{key}": list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    return values
