"""Each class of damage that a loader once took without a word, or failed on with another error
than its own.
"""

import json
import os
import resource
import sys

import pytest
import torch
from conftest import make_batches, make_net, make_trainer

from tie_ext import TIENet
from tie_ext.training.log import EpochLog
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.checks import MAX_VALUES, check_number, check_shape
from tie_ext.utils.files import load_state, reading, save_state


def changed(path, kind, *keys, to):
    """A file as it was, but for one entry."""
    state = load_state(path, kind)
    holder = state
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = to(holder[keys[-1]]) if callable(to) else to
    save_state(path, kind, state)


@pytest.fixture
def saved(tmp_path):
    make_net().save(tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        (("image_shape",), [1, 10**9, 10**9]),
        (("image_shape",), [1, 30_000, 30_000]),
        (("image_shape",), [1, -28, -28]),
        (("image_shape",), [1, 28]),
        (("image_shape",), [1, 28, 28.5]),
        (("image_shape",), "abc"),
        (("image_shape",), [2, 28, 28]),
        (("num_classes",), 10**12),
        (("classes",), "abc"),
        (("classes",), [1, 2, 3]),
        (("backbone",), "residual"),
        (("backbone",), ["conv3"]),
        (("precision",), "float8"),
        (("weights", "tau"), torch.tensor(float("nan"))),
        (("weights", "low"), torch.full((1, 1, 1), float("-inf"))),
        (("weights", "low"), torch.zeros(5, 1, 1)),
        (("weights", "fc.weight"), lambda w: w.to(torch.complex64)),
        (("weights", "fc.weight"), lambda w: w.to(torch.float8_e5m2)),
        (("weights", "fc.weight"), lambda w: w.new_empty((10**9, 0))),
        (("weights", "fc.weight"), lambda w: w.new_zeros((10**6, 1))),
        (("weights", "backbone.conv.0.weight"), lambda w: w.new_empty((32, 10**9, 0, 0))),
        (("weights", "backbone.conv.0.weight"), 3),
        (("weights", "backbone.conv.0.weight"), lambda w: w.int()),
        (("weights", "tau"), torch.tensor(1j)),
        (("weights", "fc.bias"), torch.full((3,), float("nan"))),
        (("weights",), []),
    ],
    ids=str,
)
def test_a_network_of_wrong_fields_is_refused_in_one_line_and_before_it_takes_memory(
    saved, keys, to
):
    changed(saved, "network", *keys, to=to)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^Expected ") as error:
        TIENet.load(saved)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024 * (
        1024 if sys.platform == "darwin" else 1
    )


def test_a_network_for_large_images_is_loaded_without_trying_it_on_one(tmp_path):
    net = make_net()
    net.image_shape = (1, 1000, 1000)
    net.save(tmp_path / "net")
    assert TIENet.load(tmp_path / "net").image_shape == (1, 1000, 1000)


@pytest.mark.parametrize(
    "shape", [(1, 28), (1, 28, 28, 28), (1, 0, 28), (1, 28, True), "abc", 3, (1, MAX_VALUES, 2)]
)
def test_what_is_no_shape_of_an_image_is_refused(shape):
    with pytest.raises(ValueError, match="Expected"):
        check_shape(shape)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    trainer = make_trainer()
    trainer.epoch(make_batches())
    path = tmp_path_factory.mktemp("trained") / "run"
    trainer.save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("keys", "to"),
    [
        (("log",), ["x"]),
        (("log", 0), {"epoch": 1}),
        (("methods",), [[1, 2, 3]]),
        (("methods",), "x"),
        (("synthesizers",), []),
        (("config",), 3),
        (("pool", "offered"), -1),
        (("pool", "offered"), 10**30),
        (("net", "tau"), torch.tensor(float("nan"))),
        (("net", "fc.weight"), lambda w: w.int()),
        (("net", "low"), torch.full((1, 1, 1), -1.0)),
        (("optimizer", "param_groups"), []),
        (("synthesizers", 0, "generator.layers._extra_state"), 1),
    ],
    ids=str,
)
def test_a_training_state_of_wrong_fields_is_refused(trained, tmp_path, keys, to):
    (tmp_path / "run").write_bytes(trained)
    changed(tmp_path / "run", "training", *keys, to=to)
    with pytest.raises(ValueError, match=r"^Expected "):
        make_trainer().load(tmp_path / "run")


def test_a_sound_training_state_is_loaded_and_trains(trained, tmp_path):
    (tmp_path / "run").write_bytes(trained)
    trainer = make_trainer()
    trainer.load(tmp_path / "run")
    assert [entry.epoch for entry in trainer.log] == [1]
    assert isinstance(trainer.epoch(make_batches()), EpochLog)


@pytest.fixture
def detector(tmp_path):
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import TIEDetector

    TIEDetector(make_net()).save(tmp_path)
    return tmp_path / "detector.json"


@pytest.mark.parametrize(
    "change",
    [
        {"t": 10**400},
        {"false_alarm": []},
        {"lam": 10**300},
        {"tau": "x"},
        {"threshold": True},
        {"format": None},
    ],
)
def test_a_detector_of_wrong_fields_is_refused(detector, change):
    from tie_ext.pytorch_ood import TIEDetector

    detector.write_text(json.dumps({**json.loads(detector.read_text()), **change}))
    with pytest.raises(ValueError, match=r"^Expected "):
        TIEDetector.load(detector.parent)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
@pytest.mark.parametrize("what", ["folder", "loop", "pipe", "text", "deep", "list"])
def test_what_is_no_detector_is_refused(detector, what):
    from tie_ext.pytorch_ood import TIEDetector

    detector.unlink()
    {
        "folder": detector.mkdir,
        "loop": lambda: detector.symlink_to(detector.name),
        "pipe": lambda: os.mkfifo(detector),
        "text": lambda: detector.write_bytes(b"\xff\xfe"),
        "deep": lambda: detector.write_text("[" * 100_000),
        "list": lambda: detector.write_text("[]"),
    }[what]()
    with pytest.raises((ValueError, FileNotFoundError), match=r"^Expected a detector.json"):
        TIEDetector.load(detector.parent)


def test_a_tensor_that_is_named_many_times_is_read_once(tmp_path):
    import safetensors.torch

    many = {"$items": [["x", [{"$tensor": "x"}] * 1000]]}
    header = {"tie_ext": json.dumps({"kind": "training", "version": 1, "state": many})}
    (tmp_path / "s").write_bytes(safetensors.torch.save({"x": torch.zeros(1000)}, header))
    assert len({x.data_ptr() for x in load_state(tmp_path / "s", "training")["x"]}) == 1


def test_entries_that_are_not_wanted_are_not_read(tmp_path):
    save_state(tmp_path / "s", "training", {"a": torch.zeros(3), "b": [1, 2], "c": 3})
    assert load_state(tmp_path / "s", "training", ("b", "d")) == {"b": [1, 2]}


def test_a_number_too_large_for_a_float_is_refused_as_others_are(tmp_path):
    with pytest.raises(ValueError, match="Expected t to be a number in"):
        check_number("t", 10**400, 0, 1)
    with pytest.raises(ValueError, match="Expected t to be a number in"):
        check_number("t", float("nan"), -float("inf"), float("inf"))
    save_state(tmp_path / "s", "training", {"x": float("nan")})
    whole = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(whole.replace(b'\\"nan\\"', b"1" + b"0" * 6))
    assert load_state(tmp_path / "s", "training") == {"x": 1e6}


def test_a_pool_that_memory_cannot_hold_is_refused():
    with pytest.raises(
        ValueError, match="Expected a pool that fits into memory, but got pool_size 1000000000"
    ):
        GarbagePool(10**9, (3, 2000, 2000))


def test_an_error_of_reading_is_one_line_that_says_what_was_expected():
    with (
        pytest.raises(
            ValueError,
            match=r"^Expected a thing, but got a truncated or foreign one: RuntimeError: a b$",
        ),
        reading("a thing"),
    ):
        raise RuntimeError("a\n\tb")
    with (
        pytest.raises(
            ValueError,
            match=r"^Expected a thing, but got a truncated or foreign one: without 'x'$",
        ),
        reading("a thing"),
    ):
        {}["x"]
    with pytest.raises(ValueError, match=r"^Expected 3$"), reading("a thing"):
        raise ValueError("Expected 3")
