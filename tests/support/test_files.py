"""What is saved comes back; what is damaged, foreign or hostile is refused; a failed write leaves what was there."""

import json
import math
import pickle
import resource
import struct
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import make_batches, make_net, make_trainer

from tie_ext import TIENet
from tie_ext.support.files import load_state, save_state

STATE = {"a": {0: torch.arange(3), 1: [torch.tensor(1.5), None, True]}, "b": -math.inf, "c": "text", "d": {}}


def test_a_nested_state_comes_back(tmp_path):
    save_state(tmp_path / "s", "training", STATE)
    again = load_state(tmp_path / "s", "training")
    assert torch.equal(again["a"][0], STATE["a"][0])
    assert (again["a"][1][0].item(), again["a"][1][1:]) == (1.5, [None, True])
    assert (again["b"], again["c"], again["d"]) == (-math.inf, "text", {})


class Hostile:
    def __reduce__(self):
        return (open, ("/tmp/tie_ext_was_here", "w"))


def damage(path):
    whole = path.read_bytes()
    tensors = {"x": torch.zeros(1)}

    def file(state, **header):
        return safetensors.torch.save(tensors, {"tie_ext": json.dumps({"kind": "network", "version": 1, "state": state, **header})})

    return {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a network",
        "pickle": pickle.dumps(Hostile()),
        "header too long": struct.pack("<Q", 2**60) + b"{}",
        "another program": safetensors.torch.save(tensors),
        "another kind": file({"$items": []}, kind="training"),
        "newer": file({"$items": []}, version=999),
        "no state": safetensors.torch.save(tensors, {"tie_ext": "{}"}),
        "not JSON": safetensors.torch.save(tensors, {"tie_ext": "{"}),
        "deep JSON": safetensors.torch.save(tensors, {"tie_ext": "[" * 50_000}),
        "a list": file([]),
        "missing tensors": file({"$items": [["weights", {"$tensor": "/gone"}]]}),
        "not a network": file({"$items": [["weights", {"$tensor": "x"}]]}),
    }


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "empty",
        "text",
        "pickle",
        "header too long",
        "another program",
        "another kind",
        "newer",
        "no state",
        "not JSON",
        "deep JSON",
        "a list",
        "missing tensors",
        "not a network",
    ],
)
def test_a_bad_file_is_refused(tmp_path, how):
    path = tmp_path / "net.safetensors"
    make_net().save(path)
    path.write_bytes(damage(path)[how])
    with pytest.raises(ValueError, match=r"Expected a .* in .*|Expected a tie_ext network file .*but got"):
        TIENet.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a tie_ext network file at"):
        TIENet.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("cut", [10, 1000, -10])
def test_a_truncated_run_is_refused_and_leaves_the_trainer_usable(tmp_path, cut):
    trainer = make_trainer()
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "run")
    (tmp_path / "run").write_bytes((tmp_path / "run").read_bytes()[:cut])
    other = make_trainer()
    with pytest.raises(ValueError, match="Expected a tie_ext training file"):
        other.load(tmp_path / "run")
    other.epoch(make_batches())


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match="but got object at /x"):
        save_state(tmp_path / "s", "training", {"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_earlier_file_intact(tmp_path):
    path = tmp_path / "net.safetensors"
    make_net().save(path)
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from tie_ext import Conv3, TIENet
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
net = TIENet(Conv3(1, 3), 3, (1, 28, 28))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    net.save({str(path)!r})
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Expected to write" in done.stdout
    assert "the earlier file there is intact" in done.stdout
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
