"""Files of weights as people save them, read without running code in them."""

import argparse
import datetime
import math
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tie_ext.utils.files import FORMAT, read_json

HUGGING_FACE = tuple(
    name + index
    for name in ("model.safetensors", "pytorch_model.bin")
    for index in ("", ".index.json")
)
"""Files of weights in a folder of Hugging Face's, the first that exists is read."""
DEPTH = 4
"""Mappings in mappings that are searched."""
SAFE_SINCE = (2, 6)
"""The first torch whose ``weights_only`` cannot be bypassed (CVE-2025-32434)."""
SAFETENSORS = "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
_ACCURACY = re.compile(r"\b(acc(uracy)?(@?1)?|top-?1)(?![\w@])")


class Checkpoint(NamedTuple):
    """What a file of weights holds."""

    path: Path
    content: Any
    """Tensors by name, in mappings of whatever kind; or something else."""

    def mappings(self) -> Iterator[Mapping]:
        """The mapping and those in it."""
        return _mappings(self.content)

    @property
    def accuracy(self) -> float | None:
        """The accuracy in [0, 1] that it says the network has, the smallest; None for none."""
        found = [v / 100 if v > 1 else v for v in _accuracies(self.mappings())]
        return min((v for v in found if 0 < v <= 1), default=None)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A file of weights, or Hugging Face's folder or index of shards; nothing in it is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, foreign, or would run code.
    """
    path = Path(path)
    path = next((path / name for name in HUGGING_FACE if (path / name).is_file()), path)
    wanted = f"Expected weights as a state_dict at {path}, "
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(f"{wanted}but got no file")
    try:
        if path.suffix == ".json":
            return Checkpoint(path, _read_shards(path))
        with open(path, "rb") as f:
            read = _read_safetensors if f.read(9)[8:] == b"{" else _read_torch
        return Checkpoint(path, read(path, wanted))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{wanted}but got a truncated or foreign one: {error}") from error


def _read_shards(path: Path) -> dict[str, Any]:
    """The weights in the files beside an index, ``{"weight_map": {name: file}}``."""
    index = read_json(path, "an index of shards")
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"Expected a weight_map in {path}, but got none")
    state: dict[str, Any] = {}
    for name in sorted(set(names.values())):
        if Path(name).name != name or name.endswith(".json"):
            raise ValueError(f"Expected shards beside {path}, but got {name!r}")
        state |= read_checkpoint(path.with_name(name)).content
    return state


def _read_safetensors(path: Path, wanted: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as f:
        if FORMAT in (f.metadata() or {}):
            raise ValueError(
                f"{wanted}but got a file of {FORMAT}'s own; a network that it wrote has its "
                f"garbage class: `tie-ext score {path} IMAGE`"
            )
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - it is no dict


def _read_torch(path: Path, wanted: str) -> object:
    """What ``torch.save`` wrote, by a reader that runs no code."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_SINCE:
        raise ValueError(
            f"{wanted}but got a file of torch.save, or a foreign one; it could run code in torch "
            f"{torch.__version__} (CVE-2025-32434). Update torch to 2.6, or save the weights "
            f"where they come from: {SAFETENSORS}"
        )
    try:
        with warnings.catch_warnings(), _plain_objects():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by the byte that it fails at
        # What stands before this word advises to run the code.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        if code := re.search(r"(?:GLOBAL|class) ([\w.]+)", reason):
            raise ValueError(
                f"{wanted}but got a file that runs code when it is read ({code[1]}), which was "
                f"not run; save the weights alone: {SAFETENSORS}"
            ) from error
        reason = shorten(reason.partition("\n")[0], 200, placeholder=" ...")
        raise ValueError(
            f"{wanted}but got a truncated or foreign one: {type(error).__name__}: {reason}"
        ) from error


def _plain_objects():
    """Allows what people keep beside weights and cannot run code: numpy's numbers and arrays,
    paths, flags, dates.
    """
    numpy = {
        f"numpy.{core}.multiarray.{name}": make
        for core in ("core", "_core")
        for name, make in (
            ("scalar", np.float64(0).__reduce__()[0]),
            ("_reconstruct", np.empty(0).__reduce__()[0]),
        )
    }
    kinds = [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdUS"}]
    kinds += [argparse.Namespace, datetime.datetime, datetime.timedelta, list]
    # As pure ones: a path of Windows cannot be made elsewhere.
    paths = {
        f"{module}.{pure}{name}Path": getattr(pathlib, f"Pure{name}Path")
        for module in ("pathlib", "pathlib._local")
        for name in ("Posix", "Windows")
        for pure in ("", "Pure")
    }
    others = numpy | paths | {"collections.defaultdict": _plain_dict}
    allowed = [*kinds, *((make, name) for name, make in others.items())]
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    return safe_globals(allowed) if safe_globals else nullcontext()


def _plain_dict(*_: object) -> dict:
    return {}


def _mappings(content: Any, depth: int = DEPTH) -> Iterator[Mapping]:
    """A mapping and those in it."""
    if isinstance(content, Mapping) and depth:
        yield content
        for inner in content.values():
            yield from _mappings(inner, depth - 1)


def _accuracies(mappings: Iterator[Mapping]) -> Iterator[float]:
    """Numbers that are accuracies by their names, but those on training images."""
    for mapping in mappings:
        for key, value in mapping.items():
            # Lightning's ModelCheckpoint has the name beside the number.
            name = str(mapping.get("monitor") if key == "best_model_score" else key).lower()
            named = _ACCURACY.search(name.replace("_", " ")) and "train" not in name
            if named and _is_number(value):
                yield float(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(torch.isfinite(value.float()).all())
    number = isinstance(value, float | int | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value)
