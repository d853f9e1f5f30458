"""Files that cannot run code: a nested state as one safetensors file, with JSON in its header.

A file either holds all that was saved or does not exist: it is written under another name, flushed
to disk and then renamed.
"""

import hashlib
import json
import math
import numbers
import os
import re
import struct
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import Tensor, nn

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that weights can have."""
FORMAT = "tie_ext"
VERSION = 1
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""Name of each type in safetensors."""


def write_atomically(path: str | os.PathLike, *content: bytes | memoryview) -> None:
    """Write a file whole or not at all; what was there before stays until the new content is on
    disk.

    Arguments:
        path: The file.
        content: What is written, piece after piece; the pieces are not joined in memory.

    Raises:
        OSError: If it cannot be written (full disk, no permission); an earlier file is intact.
    """
    path = Path(path)
    # A name of its own, as another process may be writing the same file.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as f:
            for piece in content:
                f.write(piece)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):  # where the folder is a file, or was deleted
            part.unlink()
        kept = "the earlier file there is intact" if path.exists() else "nothing was left there"
        reason = (
            f"Expected to write {sum(map(len, content))} bytes to {path}, "
            f"but got: {error.strerror or error}; {kept}"
        )
        raise OSError(error.errno, reason) from error


_HALF_WRITTEN = re.compile(r"\.(run\.json|.+\.safetensors)\.[0-9a-f]{32}\.part")
"""Names of the files of a run while :func:`write_atomically` writes them."""


@contextmanager
def locked(folder: str | os.PathLike) -> Iterator[None]:
    """Lock a folder for one process; the lock ends with the process, however that ends.

    Files that an earlier process had half written when it was killed are deleted.

    Raises:
        ValueError: If another process holds the lock.
        OSError: If the folder cannot be made or written to.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"Expected {folder} to be free, but got a folder that another process is writing a "
            "run to; wait for it, or stop it"
        ) from None
    try:
        # Nowhere else: folders below may be other runs, or other people's files.
        for place in (folder, folder / "epochs"):
            for part in place.glob(".*.part"):
                if _HALF_WRITTEN.fullmatch(part.name):
                    part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn errors of damaged or foreign files into one line.

    Arguments:
        what: What is read, and from where: ``a network in PATH``.

    Raises:
        ValueError: ``Expected WHAT, but got a truncated or foreign one: ...``, unless the error
            already says what was expected.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("Expected"):
            raise
        said = (
            f"without {error}"
            if isinstance(error, KeyError)
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(
            f"Expected {what}, but got a truncated or foreign one: "
            + shorten(said, 400, placeholder=" ...")
        ) from error


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of the content of a file, in hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The value in a JSON file.

    Arguments:
        path: The file.
        what: What it is, for the error.

    Raises:
        FileNotFoundError: If there is no file, or it is a folder or a pipe.
        ValueError: If it is not JSON.
    """
    if not Path(path).is_file():  # reading a pipe could wait forever
        raise FileNotFoundError(f"Expected {what} at {path}, but got no file")
    with reading(f"{what} at {path}"):
        return json.loads(Path(path).read_bytes())


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write a value as readable JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json_lines(path: str | os.PathLike, what: str) -> list[dict]:
    """The records of a file with one JSON object a line; none if there is no file.

    Arguments:
        path: The file.
        what: What a line is, for the error.

    Raises:
        ValueError: If a line is no JSON object, with its number.
    """
    records = []
    lines = Path(path).read_bytes().splitlines() if Path(path).exists() else ()
    for number, line in enumerate(lines, 1):
        with reading(f"{what} in line {number} of {path}"):
            records.append(dict(json.loads(line)))
    return records


def add_json_line(path: str | os.PathLike, record: dict, key: str) -> None:
    """Add a record to a file with one a line, sorted by a key; it replaces the record of the same
    key. Several processes may add to one file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        others = [r for r in read_json_lines(path, "a record") if r[key] != record[key]]
        ordered = sorted([*others, record], key=lambda r: r[key])
        lines = (json.dumps(r, allow_nan=False, separators=(",", ":")) + "\n" for r in ordered)
        write_atomically(path, "".join(lines).encode())


def check_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state that ``load_state_dict`` would accept although it is wrong: tensors of other
    types, or with NaN.

    Raises:
        ValueError: If a weight is not floating-point, a count is of another type, or one is NaN.
    """
    for name, mine in module.state_dict().items():
        found = state.get(name)
        if not isinstance(mine, Tensor) or not isinstance(found, Tensor):
            continue
        if found.dtype not in (FLOATS if mine.is_floating_point() else (mine.dtype,)):
            raise ValueError(f"Expected {name} to be of type {mine.dtype}, but got {found.dtype}")
        if bool(found.isnan().any()):
            raise ValueError(f"Expected numbers in {name}, but got NaN")


def save_state(path: str | os.PathLike, kind: str, state: dict) -> None:
    """Save nested dicts, lists, numbers, strings and tensors.

    Arguments:
        path: The file.
        kind: What it holds (``"network"``, ``"training"``), which :func:`load_state` checks.
        state: The state.

    Raises:
        OSError: If the file cannot be written; an earlier one is intact.
        TypeError: If the state holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    header = {FORMAT: json.dumps({"kind": kind, "version": VERSION, "state": skeleton})}
    write_atomically(path, *_serialised(tensors, header))


def _serialised(
    tensors: dict[str, Tensor], metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece, without a copy of its tensors.

    The library's ``save`` takes memory for two copies of them. Its ``save_file`` refuses tensors
    that share memory, and gives the file mode 0600 whatever the umask, so that only its owner
    could read a network.
    """
    layout: dict[str, Any] = {"__metadata__": metadata}
    # Large types first, so that all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _TYPES:
            raise TypeError(
                "Expected a tensor of a type that safetensors have to save, "
                f"but got {tensor.dtype} at {name}"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        layout[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(layout).encode()
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for _, tensor in ordered:
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        yield flat.reshape(-1).view(torch.uint8).numpy().data


def load_state(path: str | os.PathLike, kind: str, only: Collection[str] | None = None) -> dict:
    """Load what :func:`save_state` saved; tensors on the CPU.

    Arguments:
        path: The file.
        kind: What it should hold.
        only: The entries to read; None for all.

    Raises:
        ValueError: If the file is truncated, of another program, kind or version.
        FileNotFoundError: If there is none.
    """
    wanted = f"a {FORMAT} {kind} file at {path}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected {wanted}, but got no file")
    with reading(wanted), safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
        if FORMAT not in metadata:
            raise ValueError(f"Expected {wanted}, but got a safetensors file of another program")
        header = json.loads(metadata[FORMAT])
        if header["kind"] != kind:
            raise ValueError(f"Expected {wanted}, but got a {header['kind']!r} file")
        if header["version"] != VERSION:
            raise ValueError(
                f"Expected a {FORMAT} {kind} file of version {VERSION} at {path}, "
                f"but got version {header['version']!r}; a newer tie_ext reads it"
            )
        items = header["state"]["$items"]
        items = [[key, value] for key, value in items if only is None or key in only]
        # Each tensor once, as a header may name it many times.
        return _unflatten({"$items": items}, cache(f.get_tensor))


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON skeleton of a state; its tensors go into ``tensors``."""
    if isinstance(value, Tensor):
        while name in tensors:  # {"a/b": ...} beside {"a": {"b": ...}}, or the keys 1 and "1"
            name += "'"
        tensors[name] = value.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(value, dict):
        # As pairs, because JSON would turn an optimiser's integer keys into strings.
        items = value.items()
        return {"$items": [[key, _flatten(v, f"{name}/{key}", tensors)] for key, v in items]}
    if isinstance(value, list | tuple):
        return [_flatten(inner, f"{name}/{i}", tensors) for i, inner in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, numbers.Integral | numbers.Real):  # numpy's
        return _flatten(value.item(), name, tensors) if hasattr(value, "item") else float(value)
    raise TypeError(
        "Expected tensors, numbers, strings, lists and dicts to save, "
        f"but got {type(value).__name__} at {name}"
    )


def _unflatten(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The state of a skeleton, with its tensors by name."""
    if isinstance(value, list):
        return [_unflatten(inner, tensor) for inner in value]
    if not isinstance(value, dict):
        return value
    (tag, content), *_ = value.items()
    if tag == "$tensor":
        return tensor(content)
    if tag == "$float":
        return float(content)
    return {key: _unflatten(inner, tensor) for key, inner in content}
