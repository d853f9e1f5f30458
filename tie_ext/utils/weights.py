"""The weights of a model in whatever checkpoint people have."""

import collections
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tie_ext.utils.checks import describe
from tie_ext.utils.files import check_state
from tie_ext.utils.weight_files import Checkpoint, read_checkpoint

_COMPILED = "_orig_mod."


class Fitting(NamedTuple):
    """The entries of a checkpoint for one model."""

    state: dict[str, Tensor]
    """Weights by the model's own names."""
    left: tuple[str, ...]
    """Entries that fit nothing in it, by the names of the checkpoint."""


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load trained weights into a model, in place.

    Arguments:
        model: The architecture, with as many classes as the weights have.
        path: A ``.pt``, ``.pth``, ``.ckpt`` or ``.safetensors`` file, of Lightning, timm or
            whatever program, compiled or parallel; or Hugging Face's folder or index of shards.

    Returns:
        The model, in evaluation mode. Entries that fit nothing are named in a warning.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a weight is missing, of another shape or not finite, or the file is
            truncated, foreign, or would run code.
    """
    checkpoint = read_checkpoint(path)
    fitting = find_weights(checkpoint, model)
    check_fitting(model, fitting, type(model).__name__, checkpoint.path)
    if note := left_out(fitting.left, checkpoint.path):
        warnings.warn(note, stacklevel=2)
    load_fitting(model, fitting)
    return model.eval()


def find_weights(checkpoint: Checkpoint, model: nn.Module) -> Fitting:
    """The weights of a model: those of the mapping, and under the prefix, where most of its
    names are.

    Arguments:
        checkpoint: The checkpoint.
        model: The model; its weights are not looked at, and may be on ``meta``.

    Raises:
        ValueError: If there is none of its weights.
    """
    wanted = model.state_dict().keys()
    states = list(checkpoint.mappings())
    best = max((_under_prefix(state, wanted) for state in states), default=None, key=_entries)
    if best is None or not best.state:
        raise ValueError(_without(checkpoint, states))
    for key, value in best.state.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise ValueError(
                f"Expected weights as a state_dict at {checkpoint.path}, tensors by name, but got "
                f"{describe(value)} at {key!r}"
            )
    return best


def load_fitting(model: nn.Module, fitting: Fitting) -> None:
    """Load checked weights, over the model's own state: it knows the version of its layout, and
    old files lack BatchNorm's counts.
    """
    state = model.state_dict()
    state.update(fitting.state)
    model.load_state_dict(state)


def check_fitting(model: nn.Module, fitting: Fitting, what: str, path: Path) -> None:
    """Refuse weights that are not all weights of a model.

    Arguments:
        model: The model.
        fitting: The weights.
        what: Name of the architecture.
        path: The file.

    Raises:
        ValueError: If one is missing or of another shape, not finite, or the model lacks a layer.
    """
    state, found = model.state_dict(), fitting.state
    wrong = [
        _difference(key, found.get(key), mine)
        for key, mine in state.items()
        if not _fits(key, mine, found.get(key))
    ]
    children = {name for name, _ in model.named_children()}
    wrong += [f"{key}, which it does not have" for key in fitting.left if _layer(key, children)]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"Expected weights of {what} in {path}, but got others: {', '.join(wrong[:3])}{more}"
        )
    check_state(model, found)
    for key, w in found.items():
        if w.is_floating_point() and not bool(w.isfinite().all()):
            raise ValueError(f"Expected finite weights in {path}, but got infinite ones in {key}")


def left_out(left: Collection[str], path: Path) -> str:
    """That entries of a checkpoint fit nothing in the network; nothing where all do."""
    if not left:
        return ""
    listed = ", ".join(list(left)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    return f"left out of {path}, as the network has no such weights: {listed}"


def _under_prefix(state: Mapping, wanted: Collection[str]) -> Fitting:
    """The entries of a mapping under the prefix of most wanted names, without it."""
    names = {k.replace(_COMPILED, ""): k for k in state if isinstance(k, str)}
    prefixes = collections.Counter(
        name[: len(name) - len(end)] for name in names for end in _ends(name) if end in wanted
    )
    prefix = max(prefixes, key=lambda p: (prefixes[p], -len(p)), default="")
    found = {n.removeprefix(prefix): k for n, k in names.items() if n.startswith(prefix)}
    kept = {name: state[key] for name, key in found.items() if name in wanted}
    left = [n for n, k in found.items() if n not in kept and isinstance(state[k], Tensor)]
    left += [
        k for n, k in names.items() if not n.startswith(prefix) and isinstance(state[k], Tensor)
    ]
    return Fitting(kept, tuple(left))


def _ends(name: str) -> Iterator[str]:
    """``a.b.c``, ``b.c`` and ``c`` of ``a.b.c``."""
    while name:
        yield name
        name = name.partition(".")[2]


def _entries(fitting: Fitting) -> int:
    return len(fitting.state)


def _without(checkpoint: Checkpoint, states: list[Mapping]) -> str:
    tensors = [k for state in states for k, v in state.items() if isinstance(v, Tensor)]
    said = f"Expected weights as a state_dict at {checkpoint.path}, but got "
    if not isinstance(checkpoint.content, Mapping):
        return said + describe(checkpoint.content)
    if not tensors:
        return said + ("no tensors by name" if checkpoint.content else "an empty one")
    listed = ", ".join(map(repr, tensors[:3]))
    return f"{said}those of another architecture: {shorten(listed, 200, placeholder=' ...')}"


def _layer(key: str, children: Collection[str]) -> bool:
    """Whether an entry is of a layer that one of the model's parts would have."""
    return key.partition(".")[0] in children and key.endswith((".weight", ".bias"))


def _fits(key: str, mine: Tensor, found: Tensor | None) -> bool:
    if found is None:
        return key.endswith(("num_batches_tracked", "_extra_state"))
    return mine.shape == found.shape


def _difference(key: str, found: Tensor | None, mine: Tensor) -> str:
    """What is wrong with one weight."""
    if found is None:
        return f"none at {key}"
    return f"{key} of {tuple(found.shape)} instead of {tuple(mine.shape)}"
