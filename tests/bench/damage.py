"""Files as no program should meet them: truncated, flipped, foreign, hostile; drawn by a seed from sound ones.

A case is a name and what stands in the file's place: bytes, or a word for what is no file (``folder``, ``loop``, ``pipe``).
"""

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

HUGE = 10**12
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        1.5,
        "",
        "x",
        "nan",
        "../../x",
        [],
        {},
        [1],
        ["x"],
        [[]],
        {"x": 1},
        -(10**9),
        HUGE,
        10**400,
    ),
    *(
        [3, 10**9, 10**9],
        [1, 30_000, 30_000],
        [-1, 28, 28],
        [1, 28],
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        {"$float": "nan"},
        {"$float": "x"},
        {"$float": 10**400},
        {"$tensor": "/nowhere"},
        {"$tensor": []},
        {"$items": []},
        {"$items": [[[], 1]]},
    ),
)
"""What is put in the place of a value, whatever that was."""
TARGETS: dict[str, tuple[tuple[str, tuple], ...]] = {
    "network": (
        (
            "image_shape",
            (
                [3, 10**9, 10**9],
                [1, 30_000, 30_000],
                [1, -28, -28],
                [1, 0, 0],
                28,
                "28",
                [1, 28, 28.5],
                None,
                [2, 28, 28],
            ),
        ),
        ("num_classes", (HUGE, -1, 3, "2", None)),
        ("classes", ("ab", [1, 2], ["a"], None, [["a"], ["b"]], 2)),
        ("backbone", ("residual", "conv5", "os", None, ["conv3"], 3)),
        ("precision", ("float8", 1, None, ["float32"])),
        ("weights", (None, [], {"$items": []}, 3, "x")),
    ),
    "training": (
        ("counts", (None, "x", [1, 2], -1, {"$float": "nan"})),
        ("log", (None, [], [1], "x", [{"$items": []}], [[]] * 3)),
        ("methods", (None, [], [1], [[1, 2, 3]], "x", [["Inversion", None]])),
        ("config", (None, [], {"$items": []}, {"$items": [["pool_size", 10**9]]}, 3)),
        ("pool", (None, [], {"$items": [["images", 1], ["offered", -1]]})),
        ("synthesizers", (None, [], [None], [{"$items": []}], "x")),
        (
            "optimizer",
            (
                None,
                {"$items": []},
                {"$items": [["state", {"$items": []}], ["param_groups", []]]},
                1,
            ),
        ),
        ("offered", (-1, HUGE, 10**30, "x", 1.5, None, True)),
        ("betas", (None, "x", [1], [0.9, "x"], 0.9)),
        ("lr", (None, "x", -1, [1])),
        ("param_groups", (None, [], [1], "x")),
        (
            "state",
            (
                None,
                [],
                {"$items": [[0, 1]]},
                {"$items": [[999, {"$items": []}]]},
                {"$items": [[0, {"$items": [["step", "x"]]}]]},
            ),
        ),
        ("tau", ("x", [], -1)),
        ("proposed", ("x", [], [None], [1])),
        ("uncertainty", ("x", [], ["x", "y", "z"], 3)),
        ("losses", ("x", [], None)),
    ),
    "snapshot": (
        ("inversions", (None, [], "x")),
        ("features", (None, [], 3)),
        ("labels", (None, [], "x")),
    ),
    "scores": (
        ("TIE", (None, [], "x", {"$items": []}, {"$items": [["id", 1]]})),
        ("id", (None, [], 3, {"$items": []})),
        ("noise", (None, "x", [])),
    ),
    "detector": (
        ("version", (2, "1", None, True, [])),
        ("false_alarm", (-1, 2, "x", [], 10**300, True)),
        ("lam", ("x", None, [], 1e300, 10**300)),
        ("t", (0, -1, "x", None, [])),
        ("tau", ("x", [], 1e300, True)),
        ("threshold", ("x", [], 10**300, {})),
        ("network_sha256", (None, 1, "", [])),
        ("format", (None, "x", [])),
    ),
    "run": (
        ("data", (None, 1, [], "../..", "folder:", "folder:\0", "mnist:0-4", "x" * 5000)),
        ("root", (None, 1, [])),
        ("backbone", (None, 1, [], "os")),
        ("images", (-1, 0, "x", [], 1.5, HUGE)),
        ("size", (-1, 0, "x", 10**9, 30_000, 1.5, None, [])),
        ("batch_size", (0, -1, "x", HUGE, None, 1.5)),
        ("shift", (-1, HUGE, "x", 1.5)),
        ("ood", (None, 1, "x", [1], [[]], ["nowhere"])),
        ("download", (None, "x", 1)),
        ("recipe", (None, [], {}, 1)),
        ("config", (None, [], {}, {"x": 1}, 1)),
        ("pool_size", (10**9, -1, "x", HUGE)),
        ("width", (4096, -1, "x", HUGE)),
        ("steps", (10**6, 0, "x")),
        ("epochs", (0, "x", 10**6, None)),
        ("synthesizers", (None, [], {"x": {}}, {"../../x": {}}, {"white": 1}, [1])),
        ("prior", (None, 1, ["x"], [[]], "x")),
        ("criterion", (None, [], "x")),
        ("numbers", (None, 1, [], {}, {"scores": 1}, {"scores": {"score": {"noise": {}}}})),
        ("auroc", (None, "x", [])),
        ("settings", (None, 1, [], {}, "x")),
    ),
}
"""Fields that matter most, and what is put there."""


def cases(
    kind: str, whole: bytes, others: dict[str, bytes], count: int, rng: np.random.Generator
) -> Iterator[tuple[str, bytes | str]]:
    """``count`` damaged files of a kind.

    Arguments:
        kind: A key of :data:`TARGETS`.
        whole: A sound file of it.
        others: Sound files of the other kinds, by kind.
        count: How many.
        rng: What draws them.
    """
    tensors = kind not in ("detector", "run")
    fields = _fields(kind, whole, rng, tensors)
    streams: list[Iterator[tuple[str, bytes | str]]] = [
        fields,
        _anywhere(whole, rng, tensors),
        _bytes(whole, rng, tensors),
        _foreign(whole, others),
    ]
    if tensors:
        streams += [_tensors(whole, rng), _headers(whole, rng)]
    turns = (
        next(stream, None) for stream in cycle([*streams, fields])
    )  # fields twice, as most can go wrong there
    yield from islice((case for case in turns if case is not None), count)


def put(path: Path, what: bytes | str) -> None:
    """Put a case in the place of a file."""
    path.unlink(missing_ok=True)
    if isinstance(what, bytes):
        path.write_bytes(what)
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path.name)
    else:
        os.mkfifo(path)


def _fields(
    kind: str, whole: bytes, rng: np.random.Generator, tensors: bool
) -> Iterator[tuple[str, bytes]]:
    """A wrong value in a field that matters."""
    pairs = [(field, value) for field, values in TARGETS[kind] for value in values]
    for i in rng.permutation(len(pairs)):
        field, value = pairs[i]
        value = copy.deepcopy(value)
        yield (
            f"field {field}: {_short(value)}",
            _edited(whole, tensors, lambda tree, f=field, v=value: _set_field(tree, f, v, rng)),
        )


def _anywhere(
    whole: bytes, rng: np.random.Generator, tensors: bool
) -> Iterator[tuple[str, bytes]]:
    """A wrong value anywhere in the JSON."""
    while True:
        value = copy.deepcopy(VALUES[rng.integers(len(VALUES))])
        yield (
            f"anywhere: {_short(value)}",
            _edited(whole, tensors, lambda tree, v=value: _set_anywhere(tree, v, rng)),
        )


def _bytes(whole: bytes, rng: np.random.Generator, tensors: bool) -> Iterator[tuple[str, bytes]]:
    """Truncations, and flipped bits in header and data."""
    header = 8 + struct.unpack("<Q", whole[:8])[0] if tensors else len(whole)
    while True:
        yield "truncated in the header", whole[: rng.integers(1, header)]
        yield "bit flipped in the header", _flipped(whole, 0, header, rng)
        if tensors:
            yield "truncated in the data", whole[: rng.integers(header, len(whole))]
            yield (
                "bits flipped in the data",
                _flipped(_flipped(whole, header, len(whole), rng), header, len(whole), rng),
            )


def _foreign(whole: bytes, others: dict[str, bytes]) -> Iterator[tuple[str, bytes | str]]:
    """What is another file, or none."""
    archive, pickled = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as f:
        f.writestr("network", whole[:1000])
    torch.save({"weights": torch.zeros(3)}, pickled)
    yield "pickle", pickle.dumps(_Hostile())
    yield "torch file", pickled.getvalue()
    yield "zip", archive.getvalue()
    yield "empty", b""
    yield "zeros", bytes(10_000)
    yield "not UTF-8", b"\xff\xfe" * 100
    for what in ("folder", "loop", "pipe"):
        yield what, what
    for other, content in others.items():
        yield f"a {other} file", content
    yield "deep JSON", b"[" * 100_000
    yield "deep JSON objects", b'{"a":' * 100_000
    yield "wide JSON", b"[" + b"[]," * 300_000 + b"[]]"
    yield "a long number", b"1" * 10_000
    yield "JSON list", b"[]"
    yield "JSON null", b"null"
    yield "twice itself", whole + whole
    yield "something after it", whole + b"x"


def _tensors(whole: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Tensors of other types, shapes and values."""
    read = safetensors.torch.load(whole)
    metadata = _header(whole)["__metadata__"]
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "complex": lambda x: x.to(torch.complex64),
        "integer": lambda x: x.to(torch.int32),
        "bool": lambda x: x.bool(),
        "8 bits": lambda x: x.float().to(torch.float8_e5m2),
        "NaN": lambda x: torch.full_like(x.float(), float("nan")),
        "infinite": lambda x: torch.full_like(x.float(), float("inf")),
        "negative": lambda x: -1 - x.float(),
        "flat": lambda x: x.flatten(),
        "one more axis": lambda x: x[None],
        "no rows": lambda x: x.new_empty((0, *x.shape[1:])),
        "many rows of nothing": lambda x: x.new_empty((10**7, 0)),
        "many rows": lambda x: x.new_zeros((10**5, 1)),
        "fewer rows": lambda x: x[:1].clone() if x.ndim else x,
        "more rows": lambda x: torch.cat([x, x]) if x.ndim else x.repeat(2),
        "a number": lambda x: x.new_zeros(()),
        "int64": lambda x: x.long() + 2**40,
    }
    names = sorted(read)
    while True:
        for name, way in ways.items():
            for which in (
                names[rng.integers(len(names))],
                next((n for n in names if n.endswith(("fc.weight", "labels", "/id"))), names[0]),
            ):
                changed = {**read, which: way(read[which]).contiguous()}
                yield f"tensor {which}: {name}", safetensors.torch.save(changed, metadata)
        fewer = dict(read)
        del fewer[names[rng.integers(len(names))]]
        yield "tensor gone", safetensors.torch.save(fewer, metadata)
        yield (
            "all tensors of another type",
            safetensors.torch.save({n: x.double() for n, x in read.items()}, metadata),
        )
        yield (
            "all tensors empty",
            safetensors.torch.save({n: x.new_empty((0,)) for n, x in read.items()}, metadata),
        )


def _headers(whole: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """The format's own header, wrong."""
    size, header = struct.unpack("<Q", whole[:8])[0], _header(whole)
    data = whole[8 + size :]
    for length in (
        0,
        1,
        size - 1,
        size + 1,
        len(whole),
        2**31,
        2**63 - 1,
        2**64 - 1,
        100_000_000,
        100_000_001,
    ):
        yield f"header length {length}", struct.pack("<Q", length) + whole[8:]
    names = [name for name in header if name != "__metadata__"]
    for key, values in {
        "shape": ([10**9, 10**9], [-1], [2**63], [2**32, 2**32], "x", None, [0, 10**18], []),
        "dtype": ("F64", "X", None, "BOOL", "F8_E4M3"),
        "data_offsets": ([0, 10**15], [10, 0], [-8, 0], [0], None, [0, 2**64 - 1]),
    }.items():
        for value in values:
            broken = copy.deepcopy(header)
            broken[names[rng.integers(len(names))]][key] = value
            yield f"header {key} {_short(value)}", _joined(broken, data)
    for value in (
        None,
        {},
        {"tie_ext": 1},
        {"tie_ext": "null"},
        {"tie_ext": "[" * 100_000},
        {"tie_ext": "{}"},
        {"tie_ext": '{"kind":[]}'},
        [],
    ):
        yield f"metadata {_short(value)}", _joined({**header, "__metadata__": value}, data)
    inner = json.loads(header["__metadata__"]["tie_ext"])
    others = (
        {"version": 2},
        {"version": None},
        {"version": "1"},
        {"kind": "other"},
        {"kind": ["network"]},
    )
    for change in (
        *others,
        {"state": 1},
        {"state": []},
        {"state": {}},
        {"state": {"$items": []}},
        {"state": {"$tensor": names[0]}},
    ):
        yield (
            f"header {_short(change)}",
            _joined(
                {**header, "__metadata__": {"tie_ext": json.dumps({**inner, **change})}}, data
            ),
        )


class _Hostile:
    def __reduce__(self):
        return (os._exit, (77,))  # which a program that unpickles it dies of


def _header(whole: bytes) -> dict:
    return json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])


def _joined(header: dict, data: bytes) -> bytes:
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data


def _edited(whole: bytes, tensors: bool, edit: Callable[[Any], Any]) -> bytes:
    """A file whose JSON was edited in place."""
    if not tensors:
        return json.dumps(edit(json.loads(whole))).encode()
    header = _header(whole)
    inner = json.loads(header["__metadata__"]["tie_ext"])
    inner["state"] = edit(inner["state"])
    header["__metadata__"]["tie_ext"] = json.dumps(inner)
    return _joined(header, whole[8 + struct.unpack("<Q", whole[:8])[0] :])


def _places(tree: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every place of a tree: what holds it, its key there, and the name that people give it."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield tree, key, key
            yield from _places(value)
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            if (
                isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
            ):  # a pair of $items
                yield value, 1, value[0]
                yield from _places(value[1])
            else:
                yield tree, i, i
                yield from _places(value)


def _set_field(tree: Any, field: str, value: Any, rng: np.random.Generator) -> Any:
    found = [(holder, key) for holder, key, name in _places(tree) if name == field]
    holder, key = found[rng.integers(len(found))]
    holder[key] = value
    return tree


def _set_anywhere(tree: Any, value: Any, rng: np.random.Generator) -> Any:
    found = list(_places(tree))
    holder, key, _ = found[rng.integers(len(found))]
    holder[key] = value
    return tree


def _flipped(whole: bytes, start: int, end: int, rng: np.random.Generator) -> bytes:
    changed = bytearray(whole)
    changed[rng.integers(start, end)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
