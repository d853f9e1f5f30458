"""A run of the loop on disk: everything that resuming needs, in one file that can run no code."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.training.config import HeadConfig, SampleConfig, TIEConfig
from tie_ext.training.log import EpochLog
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.files import check_state, load_state, reading, save_state
from tie_ext.utils.settings import Settings


class Resumable(Protocol):
    """What is saved of a :class:`tie_ext.training.trainer.TIETrainer`."""

    net: TIENet
    config: TIEConfig
    head_config: HeadConfig
    sample_config: SampleConfig
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
        "head_config": asdict(trainer.head_config),
        "sample_config": asdict(trainer.sample_config),
        "methods": [(name, asdict(settings)) for name, settings in _methods(trainer)],
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
    """Resume the run that :func:`save_training` wrote.

    Arguments:
        path: The file.
        trainer: A trainer made with the same arguments.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, or of a run with other settings, saying which.
            The trainer may be half loaded then.
    """
    check_settings(
        path, trainer.config, _methods(trainer), trainer.head_config, trainer.sample_config
    )
    state = load_state(path, "training")
    if state.get("criterion", _name(trainer.criterion)) != _name(trainer.criterion):
        raise ValueError(
            f"Expected the training state of a run whose criterion is {_name(trainer.criterion)} "
            f"in {path}, but got {state['criterion']!r}"
        )
    with reading(f"the training state of this network in {path}"):
        log = [EpochLog.of_record(entry) for entry in state["log"]]
        epochs = [entry.epoch for entry in log]
        if epochs != list(range(1, len(log) + 1)):
            raise ValueError(f"Expected the epochs 1 to {len(log)} in {path}, but got {epochs}")
        if state["optimizer"]["state"] and not log:
            raise ValueError(f"Expected the epochs of the optimiser in {path}, but got none")
        modules = [trainer.net, *trainer.synthesizers]
        states = [state["net"], *state["synthesizers"]]
        for module, saved in zip(modules, states, strict=True):
            _check_range(module, saved)
            check_state(module, saved)
            module.load_state_dict(saved)
        trainer.optimizer.load_state_dict(state["optimizer"])
        for owner in (trainer, *trainer.synthesizers):
            if isinstance(optimizer := getattr(owner, "optimizer", None), torch.optim.Optimizer):
                _check_optimizer(optimizer)
        trainer.pool.load_state_dict(state["pool"])
        _check_counts(state["counts"], trainer.net.num_classes)
        trainer.counts, trainer.log = state["counts"], log


def check_settings(
    path: str | os.PathLike,
    config: TIEConfig,
    methods: Sequence[tuple[str, Settings]],
    head_config: HeadConfig | None = None,
    sample_config: SampleConfig | None = None,
) -> None:
    """Refuse the state of a run with other settings, before anything is made by them.

    Arguments:
        path: What :func:`save_training` wrote.
        config: The settings of the loop.
        methods: The name of each synthesizer's class, and its settings.
        head_config: How a head is fitted; None for the defaults.
        sample_config: The sample of ID images; None for the defaults.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, foreign, or of a run with other settings, saying which.
    """
    parts = {
        "config": config,
        "head_config": head_config or HeadConfig(),
        "sample_config": sample_config or SampleConfig(),
    }
    state = load_state(path, "training", (*parts, "methods"))
    with reading(f"the settings of a run in {path}"):
        if "config" in state and "methods" not in state:  # as 0.1.0 wrote them
            raise ValueError(
                f"Expected a training state of this version of tie_ext in {path}, but got one of "
                "an earlier version; finish it with that"
            )
        # A setting that is newer than the file had its default.
        theirs: dict[str, Any] = {}
        mine: dict[str, Any] = {}
        for name, part in parts.items():
            prefix = "" if name == "config" else f"{name}."
            saved = {**asdict(type(part)()), **state.get(name, {})}
            theirs |= {prefix + key: value for key, value in saved.items()}
            mine |= {prefix + key: value for key, value in asdict(part).items()}
        usual = {name: asdict(type(settings)()) for name, settings in methods}
        theirs |= _flat([(name, {**usual.get(name, {}), **had}) for name, had in state["methods"]])
        mine |= _flat([(name, asdict(settings)) for name, settings in methods])
        other = [
            f"{key} {theirs.get(key)!r} instead of {mine.get(key)!r}"
            for key in {**mine, **theirs}
            if theirs.get(key) != mine.get(key)
        ]
        if other:
            raise ValueError(
                f"Expected the training state of a run with the settings of this one in {path}, "
                f"but got {', '.join(other)}"
            )


def _check_range(module: torch.nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Refuse the state of a module for images of another value range."""
    for name in ("low", "high"):
        mine = getattr(module, name)
        if saved[name].shape != mine.shape or not torch.equal(saved[name], mine.to(saved[name])):
            raise ValueError(
                f"Expected images whose {name} is {mine.flatten().tolist()}, but got "
                f"{saved[name].flatten().tolist()}"
            )


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a state that ``load_state_dict`` takes and the next step would fail on, by a step of
    a copy with gradients of zero.
    """
    trial = copy.deepcopy(optimizer)
    parameters = [p for group in trial.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial.step()
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise ValueError("Expected an optimiser whose step is finite, but got another")


def _check_counts(counts: Any, n: int) -> None:
    wanted = isinstance(counts, Tensor) and counts.dtype == torch.long and counts.shape == (n,)
    if counts is not None and not (wanted and bool((counts > 0).all())):
        raise ValueError(f"Expected the number of images of {n} classes, but got {counts!r}")


def _name(criterion: Callable) -> str:
    """The name of a criterion."""
    name = getattr(criterion, "__qualname__", type(criterion).__qualname__)
    return f"{getattr(criterion, '__module__', '')}.{name}"


def _methods(trainer: Resumable) -> list[tuple[str, Settings]]:
    """The class and the settings of each synthesizer."""
    return [(type(s).__name__, s.settings) for s in trainer.synthesizers]


def _flat(methods: Sequence) -> dict[str, Any]:
    """Settings of synthesizers by names that are unique."""
    values: dict[str, Any] = {"synthesizers": [name for name, _ in methods]}
    for i, (name, settings) in enumerate(methods):
        if [other for other, _ in methods].count(name) > 1:
            name = f"{name} {i + 1}"
        values |= {
            f"{name}.{key}": list(value) if isinstance(value, tuple) else value
            for key, value in settings.items()
        }
    return values
