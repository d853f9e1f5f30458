"""A run of the loop on disk: all that going on needs, as one file that can run no code."""

import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.training.config import TIEConfig
from tie_ext.training.log import EpochLog
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.files import load_state, reading, save_state
from tie_ext.utils.modules import check_state
from tie_ext.utils.settings import Settings


class Resumable(Protocol):
    """What of a :class:`tie_ext.training.trainer.TIETrainer` is kept."""

    net: TIENet
    config: TIEConfig
    criterion: Callable[..., Tensor]
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
        "methods": [(name, asdict(settings)) for name, settings in _methods(trainer.synthesizers)],
        "criterion": _name(trainer.criterion),
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
        ValueError: If the file is damaged, foreign, or of a run with other settings, saying which. The trainer may be half loaded then.
    """
    check_settings(path, trainer.config, _methods(trainer.synthesizers))
    state = load_state(path, "training")
    if state.get("criterion", _name(trainer.criterion)) != _name(trainer.criterion):
        found = state["criterion"]
        raise ValueError(
            f"Expected the training state of a run whose criterion is {_name(trainer.criterion)} in {path}, but got {found!r}"
        )
    with reading(f"the training state of this network in {path}"):
        log = [EpochLog.of_record(entry) for entry in state["log"]]
        if [entry.epoch for entry in log] != list(range(1, len(log) + 1)):
            raise ValueError(
                f"Expected the epochs 1 to {len(log)} in {path}, but got {[entry.epoch for entry in log]}"
            )
        if state["optimizer"]["state"] and not log:
            raise ValueError(
                f"Expected the epochs that the optimiser in {path} has seen, but got none"
            )
        for module, saved in zip(
            [trainer.net, *trainer.synthesizers],
            [state["net"], *state["synthesizers"]],
            strict=True,
        ):
            _check_range(module, saved)
            check_state(module, saved)
            module.load_state_dict(saved)
        trainer.optimizer.load_state_dict(state["optimizer"])
        for optimizer in (
            trainer.optimizer,
            *(getattr(synthesizer, "optimizer", None) for synthesizer in trainer.synthesizers),
        ):
            if isinstance(optimizer, torch.optim.Optimizer):
                _check_optimizer(optimizer)
        trainer.pool.load_state_dict(state["pool"])
        trainer.counts, trainer.log = _counts(state["counts"], trainer.net.num_classes), log


def check_settings(
    path: str | os.PathLike, config: TIEConfig, methods: Sequence[tuple[str, Settings]]
) -> None:
    """Refuse the state of a run with other settings, before anything is made by them.

    Arguments:
        path: What :func:`save_training` wrote.
        config: The settings of the loop.
        methods: The name of each synthesizer's class, and its settings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, or of a run with other settings, saying which.
    """
    state = load_state(path, "training", ("config", "methods"))
    with reading(f"the settings of a run in {path}"):
        if "config" in state and "methods" not in state:  # as 0.1.0 wrote them
            raise ValueError(
                f"Expected a training state of this version of tie_ext in {path}, but got one of an earlier version; finish it with that"
            )
        usual = {name: asdict(type(settings)()) for name, settings in methods}
        # A setting that came after the file had its default.
        theirs = {
            **asdict(TIEConfig()),
            **state["config"],
            **_flat([(name, {**usual.get(name, {}), **had}) for name, had in state["methods"]]),
        }
        mine = {
            **asdict(config),
            **_flat([(name, asdict(settings)) for name, settings in methods]),
        }
        other = [
            f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}"
            for key in {**mine, **theirs}
            if theirs.get(key) != mine.get(key)
        ]
        if other:
            raise ValueError(
                f"Expected the training state of a run with the settings of this one in {path}, but got {', '.join(other)}"
            )


def _check_range(module: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Refuse a state of other images, whose value range would be taken for this one's."""
    for name in ("low", "high"):
        mine = getattr(module, name)
        if saved[name].shape != mine.shape or not torch.equal(saved[name], mine.to(saved[name])):
            raise ValueError(
                f"Expected images whose {name} is {mine.flatten().tolist()}, but got {saved[name].flatten().tolist()}"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse what an optimiser takes without a word, and fails on at its next step."""
    for group in optimizer.param_groups:
        for key, usual in optimizer.defaults.items():
            if key in group and not _alike(usual, group[key]):
                raise ValueError(
                    f"Expected an optimiser whose {key} is like {usual!r}, but got {group[key]!r}"
                )
    names = {tuple(sorted(values)) for values in optimizer.state.values()}
    wanted = (
        {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else set()
    )
    if len(names) > 1 or any(not wanted <= set(those) for those in names):
        raise ValueError(
            f"Expected the same values for every parameter of an optimiser, but got {sorted(names)}"
        )
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            shapes = (parameter.shape, torch.Size()) if name == "step" else (parameter.shape,)
            whole = (
                isinstance(value, Tensor) and value.is_floating_point() and value.shape in shapes
            )
            if not whole and not _alike(1, value):
                raise ValueError(
                    f"Expected {name} of a parameter {tuple(parameter.shape)} of an optimiser to be of its shape, but got {value!r}"
                )


def _alike(usual: Any, value: Any) -> bool:
    """Whether a value can stand in the place of another."""
    if isinstance(usual, bool) or usual is None or isinstance(usual, str):
        return (
            value is None
            or type(value) is type(usual)
            or (usual is None and isinstance(value, bool))
        )
    if isinstance(usual, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(usual)
            and all(map(_alike, usual, value))
        )
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _counts(counts: Any, n: int) -> Tensor | None:
    good = (
        isinstance(counts, Tensor)
        and counts.dtype == torch.long
        and counts.shape == (n,)
        and bool((counts > 0).all())
    )
    if counts is not None and not good:
        raise ValueError(f"Expected how many images each of {n} classes has, but got {counts!r}")
    return counts


def _name(criterion: Callable) -> str:
    """What an criterion is called."""
    return f"{getattr(criterion, '__module__', '')}.{getattr(criterion, '__qualname__', type(criterion).__qualname__)}"


def _methods(synthesizers: Sequence[Synthesizer]) -> list[tuple[str, Settings]]:
    """Who proposes outliers, and how each is set."""
    return [(type(s).__name__, s.settings) for s in synthesizers]


def _flat(methods: Sequence) -> dict[str, Any]:
    """The same by names that an error can say."""
    values: dict[str, Any] = {"synthesizers": [name for name, _ in methods]}
    for i, (name, settings) in enumerate(methods):
        if [other for other, _ in methods].count(name) > 1:
            name = f"{name} {i + 1}"
        values |= {
            f"{name}.{key}": list(value) if isinstance(value, tuple) else value
            for key, value in settings.items()
        }
    return values
