"""What is saved comes back; what is damaged, foreign or hostile is refused; a failed write leaves
what was there.
"""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import SHAPE, make_batches, make_net, make_trainer
from torch import nn

from tie_ext import TIENet
from tie_ext.training.log import EpochLog
from tie_ext.utils.files import (
    add_json_line,
    load_state,
    locked,
    read_json_lines,
    reading,
    save_state,
)
from tie_ext.utils.provenance import peak_memory

NAN = torch.tensor(torch.nan)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "state"


def comes_back(path: Path, state: dict) -> dict:
    save_state(path, "training", state)
    return load_state(path, "training")


def test_nested_states_and_numbers_of_numpy(path):
    many = {"a": {0: torch.arange(3), 1: [torch.tensor(1.5), None, True]}, "d": {}}
    numbers = {"b": -math.inf, "c": "text", "e": np.int64(3), "f": np.float32(0.25)}
    again = comes_back(path, {**many, **numbers, "none": np.float32("nan")})
    assert torch.equal(again["a"][0], torch.arange(3))
    assert (again["a"][1][0].item(), again["a"][1][1:], again["d"]) == (1.5, [None, True], {})
    assert {name: again[name] for name in numbers} == numbers
    assert [type(again[name]) for name in "ef"] == [int, float]
    assert math.isnan(again["none"])
    assert load_state(path, "training", ("c", "x")) == {"c": "text"}


def test_states_of_keys_whose_names_collide(path):
    one, two, three, four = torch.arange(4).float()
    again = comes_back(path, {"a/b": one, "a": {"b": two}, 1: three, "1": four})
    assert [again["a/b"], again["a"]["b"], again[1], again["1"]] == [0, 1, 2, 3]


DTYPES = "float64 float32 bfloat16 float16 int64 int32 uint8 bool complex64"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_files_are_safetensors_of_every_type(dtype, path):
    x = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype))
    held = {"x": x, "turned": x.T, "part": x[:, 1], "none": x[:0], "scalar": x[1, 2]}
    ours = comes_back(path, {"odd": torch.ones(3, dtype=torch.uint8), **held})
    theirs = safetensors.torch.load_file(path)
    for name, value in held.items():
        assert torch.equal(theirs[f"/{name}"], value)
        assert torch.equal(ours[name], value)
        assert ours[name].dtype == value.dtype


@pytest.mark.parametrize("value", [object(), torch.zeros(1, dtype=torch.complex128)])
def test_error_of_values_that_no_file_holds(value, path):
    save_state(path, "training", {"x": 0})
    with pytest.raises(TypeError, match=r"but got (object|torch.complex128) at /x"):
        save_state(path, "training", {"x": value})
    assert load_state(path, "training") == {"x": 0}


def test_a_tensor_of_many_names_is_read_once(path):
    many = {"$items": [["x", [{"$tensor": "x"}] * 1000]]}
    header = {"tie_ext": json.dumps({"kind": "training", "version": 1, "state": many})}
    path.write_bytes(safetensors.torch.save({"x": torch.zeros(1000)}, header))
    assert len({x.data_ptr() for x in load_state(path, "training")["x"]}) == 1


# Damage.


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/tie_ext_was_here", "w"))


def file(state=None, text: str | None = None, **header) -> bytes:
    about = json.dumps({"kind": "network", "version": 1, "state": state, **header})
    return safetensors.torch.save({"x": torch.zeros(1)}, {"tie_ext": text or about})


EMPTY = {"$items": []}
DAMAGE = {
    "empty": b"",
    "text": b"not a network",
    "pickle": pickle.dumps(Hostile()),
    "header too long": struct.pack("<Q", 2**60) + b"{}",
    "another program": safetensors.torch.save({"x": torch.zeros(1)}),
    "another kind": file(EMPTY, kind="training"),
    "no state": file(text="{}"),
    "not JSON": file(text="{"),
    "deep JSON": file(text="[" * 50_000),
    "a list": file([]),
    "missing tensors": file({"$items": [["weights", {"$tensor": "/gone"}]]}),
    "not a network": file({"$items": [["weights", {"$tensor": "x"}]]}),
}


@pytest.mark.parametrize("kind", ["network", "training"])
@pytest.mark.parametrize("how", [10, 1000, -10, "newer", *DAMAGE])
def test_errors_of_damaged_and_missing_files(kind, how, path):
    holder = make_net() if kind == "network" else make_trainer()
    load = TIENet.load if kind == "network" else holder.load
    with pytest.raises(FileNotFoundError, match=f"Expected a tie_ext {kind} file at"):
        load(path)
    holder.save(path)
    damage = {**DAMAGE, "newer": file(EMPTY, kind=kind, version=999)}
    path.write_bytes(path.read_bytes()[:how] if isinstance(how, int) else damage[how])
    said = {"newer": "a newer tie_ext reads it", "another program": "of another program"}
    with pytest.raises(ValueError, match=said.get(how, r"^Expected .*but got")):
        load(path)


def changed(path: Path, kind: str, keys: tuple, to) -> None:
    """A file as it was, but for one entry."""
    state = holder = load_state(path, kind)
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to(holder[keys[-1]]) if callable(to) else to
    save_state(path, kind, state)


WEIGHT, CONV = ("weights", "fc.weight"), ("weights", "backbone.conv.0.weight")
SHAPES = ([1, 10**9, 10**9], [1, 30_000, 30_000], [1, 28, 28.5], "abc", [2, 28, 28])
OF_NETWORKS = [(("image_shape",), shape) for shape in SHAPES]
OF_NETWORKS += [
    (("num_classes",), 10**12),
    (("classes",), [1, 2, 3]),
    (("backbone",), ["conv3"]),
    (("precision",), "float8"),
    (("weights", "tau"), NAN),
    (("weights", "low"), torch.full((1, 1, 1), -torch.inf)),
    (("weights", "low"), torch.zeros(5, 1, 1)),
    (("weights", "fc.bias"), NAN.expand(3)),
    (WEIGHT, lambda w: w.to(torch.complex64)),
    (WEIGHT, lambda w: w.to(torch.float8_e5m2)),
    (WEIGHT, lambda w: w.new_empty((10**9, 0))),
    (WEIGHT, lambda w: w.new_zeros((10**6, 1))),
    (CONV, lambda w: w.new_empty((32, 10**9, 0, 0))),
    (CONV, lambda w: w.int()),
    (("weights",), []),
]


@pytest.mark.parametrize(("keys", "to"), OF_NETWORKS, ids=str)
def test_errors_of_networks_before_they_take_memory(keys, to, path):
    make_net().save(path)
    changed(path, "network", keys, to)
    before = peak_memory()
    with pytest.raises(ValueError, match=r"^Expected ") as error:
        TIENet.load(path)
    assert "\n" not in str(error.value)
    assert before is None or peak_memory() - before < 64  # MB


def test_networks_for_large_images_are_not_tried(path):
    net = make_net()
    net.image_shape = (1, 1000, 1000)
    net.save(path)
    assert TIENet.load(path).image_shape == (1, 1000, 1000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> bytes:
    trainer = make_trainer()
    trainer.epoch(make_batches())
    path = tmp_path_factory.mktemp("trained") / "run"
    trainer.save(path)
    return path.read_bytes()


OF_TRAINING = [
    (("log",), ["x"]),
    (("log", 0), {"epoch": 1}),
    (("methods",), [[1, 2, 3]]),
    (("synthesizers",), []),
    (("config",), 3),
    (("pool", "offered"), -1),
    (("pool", "offered"), 10**30),
    (("net", "tau"), NAN),
    (("net", "fc.weight"), lambda w: w.int()),
    (("net", "low"), torch.full((1, 1, 1), -1.0)),
    (("optimizer", "param_groups"), []),
    (("synthesizers", 0, "generator.layers._extra_state"), 1),
]


@pytest.mark.parametrize(("keys", "to"), OF_TRAINING, ids=str)
def test_errors_of_training_states(trained, path, keys, to):
    path.write_bytes(trained)
    trainer = make_trainer()
    changed(path, "training", keys, to)
    with pytest.raises(ValueError, match=r"^Expected "):
        trainer.load(path)
    path.write_bytes(trained)
    trainer.load(path)
    assert [entry.epoch for entry in trainer.log] == [1]
    assert isinstance(trainer.epoch(make_batches()), EpochLog)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("a\n\tb"), "a thing, but got a truncated or foreign one: RuntimeError: a b"),
        (KeyError("x"), "a thing, but got a truncated or foreign one: without 'x'"),
        (ValueError("Expected 3"), "3"),
    ],
)
def test_errors_of_reading_in_one_line(error, said):
    with pytest.raises(ValueError, match=f"^Expected {said}$"), reading("a thing"):
        raise error


# Records, and several processes.


def test_records_in_order_of_their_names(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    assert read_json_lines(path, "a record") == []
    for name, value in (("b", 1), ("a", 2), ("b", 3)):
        add_json_line(path, {"name": name, "value": value}, "name")
    wanted = [{"name": "a", "value": 2}, {"name": "b", "value": 3}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        add_json_line(path, {"name": "c", "value": math.nan}, "name")
    assert read_json_lines(path, "a record") == wanted
    assert path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("line", [b'{"name"', b"3", b"\xff"])
def test_error_of_a_line_that_is_no_record(path, line):
    path.write_bytes(b'{"name": "a"}\n' + line)
    with pytest.raises(ValueError, match=r"Expected a record in line 2 of .*truncated or foreign"):
        add_json_line(path, {"name": "b"}, "name")


def python(code: str, *arguments, **more) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **more)


RECORDER = """
import sys
from tie_ext.utils.files import add_json_line
for i in range(20):
    add_json_line(sys.argv[1], {"name": f"{sys.argv[2]}{i}"}, "name")
"""
WRITER = """
import sys
from tie_ext.utils.files import write_atomically
for i in range(300):
    write_atomically(sys.argv[1], bytes([i % 256]) * 100_000)
"""


@pytest.mark.slow
def test_processes_that_write_to_one_file(tmp_path):
    records, path = tmp_path / "a" / "records", tmp_path / "b" / "f"
    writers = [python(RECORDER, records, who) for who in "abc"]
    writers += [python(WRITER, path) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 100_000
            assert len(set(content)) == 1
    assert [(writer.communicate(), writer.returncode) for writer in writers] == [
        (("", None), 0)
    ] * 5
    assert len(read_json_lines(records, "a record")) == 60
    assert os.listdir(path.parent) == ["f"]


FULL = """
import resource, signal, sys
from tie_ext.utils.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_atomically(sys.argv[1], bytes(200_000))
except OSError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_earlier_file(path):
    path.write_bytes(b"before")
    said = python(FULL, path).communicate()[0]
    assert "Expected to write 200000 bytes" in said
    assert "the earlier file there is intact" in said
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == [path.name]


HOLDER = """
import sys, time
from tie_ext.utils.files import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_folder_is_locked_for_one_process(tmp_path):
    holder = python(HOLDER, tmp_path)
    part = tmp_path / "epochs" / f".0001.safetensors.{32 * 'a'}.part"
    try:
        assert holder.stdout.readline() == "in\n"
        part.parent.mkdir()
        part.write_bytes(b"half")
        with pytest.raises(ValueError, match=r"Expected .* to be free, but"), locked(tmp_path):
            pass
        assert part.exists()  # it may be that process's
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path):
        assert not part.exists()


MEMORY = """
import sys
import torch
from tie_ext.outliers import Noise, NoiseSettings, Domain
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.files import save_state
from tie_ext.utils.provenance import peak_memory
what, path = sys.argv[1:]
low, high, shape = torch.tensor(0.0), torch.tensor(1.0), (3, 224, 224)
pool = GarbagePool(1000, shape)
pool.images.zero_()
pool.offered, size = 1000, pool.images.numel() / 2**20
noise = Noise(Domain(3, shape, low, high), NoiseSettings(kind="white" if what == "white" else "multiscale"))
noise.draw((2, *shape))
x, before = torch.zeros(1000, *shape) if what == "add" else None, peak_memory()
if what == "save":
    save_state(path, "training", {"pool": pool.state_dict()})
elif what == "add":
    pool.add(x)
else:
    noise.draw((400, *shape))
    size *= 0.4 * 4
print((peak_memory() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "most"), [("save", 0.2), ("add", 1.0), ("multiscale", 1.3), ("white", 1.3)]
)
def test_memory_that_large_images_take(what, most, path):
    # Of what is saved, kept or drawn; once saving took three times as much, drawing four.
    assert float(python(MEMORY, what, path).communicate()[0]) < most


# Files of 0.1.0.


class Earlier(nn.Module):
    """The backbone of the network that version 0.1.0 saved."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, stride=3), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_a_network_of_an_earlier_version():
    saved = Path(__file__).parents[1] / "data" / "saved_by_0.1.0" / "network.safetensors"
    net = TIENet.load(saved, Earlier())
    assert (net.class_names, net.image_shape) == (("a", "b", "c"), SHAPE)
    assert (net.autocast_dtype, net.tau.item()) == ("bfloat16", 0.25)
    x = torch.linspace(-1, 1, 40 * 28 * 28).view(40, 1, 28, 28)
    logits = [
        [-0.67441767, 0.32778361, 1.06455636, -0.71134329],
        [-0.63658577, 0.31220520, 1.02995872, -0.68879676],
        [-0.59875393, 0.29662681, 0.99536109, -0.66625017],
    ]
    # bfloat16, whose sums differ from processor to processor.
    found = net(x[:3], garbage=True).detach()
    torch.testing.assert_close(found, torch.tensor(logits), rtol=0, atol=1e-2)
