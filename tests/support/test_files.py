"""What is saved comes back; what is damaged, foreign or hostile is refused; a failed write leaves
what was there.
"""

import json
import math
import pickle
import resource
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
from tie_ext.utils.files import add_json_line, load_state, locked, read_json_lines, save_state

STATE = {
    "a": {0: torch.arange(3), 1: [torch.tensor(1.5), None, True]},
    "b": -math.inf,
    "c": "text",
    "d": {},
}


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
        return safetensors.torch.save(
            tensors,
            {"tie_ext": json.dumps({"kind": "network", "version": 1, "state": state, **header})},
        )

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
    with pytest.raises(
        ValueError, match=r"Expected a .* in .*|Expected a tie_ext network file .*but got"
    ):
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


def test_records_stand_in_order_and_a_new_one_takes_the_place_of_its_name(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    for name, value in (("b", 1), ("a", 2), ("b", 3)):
        add_json_line(path, {"name": name, "value": value}, "name")
    assert read_json_lines(path, "a record") == [
        {"name": "a", "value": 2},
        {"name": "b", "value": 3},
    ]
    assert path.read_bytes().count(b"\n") == 2
    assert read_json_lines(tmp_path / "none.jsonl", "a record") == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        add_json_line(path, {"name": "c", "value": math.nan}, "name")
    assert len(read_json_lines(path, "a record")) == 2


@pytest.mark.parametrize("line", [b'{"name"', b"3", b"\xff"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    (tmp_path / "records.jsonl").write_bytes(b'{"name": "a"}\n' + line)
    with pytest.raises(
        ValueError,
        match=r"Expected a record in line 2 of .*records.jsonl, but got a truncated or foreign one",
    ):
        add_json_line(tmp_path / "records.jsonl", {"name": "b"}, "name")


@pytest.mark.slow
def test_processes_that_write_to_one_file_lose_no_record(tmp_path):
    code = """
import sys
from tie_ext.utils.files import add_json_line
for i in range(20):
    add_json_line(sys.argv[1], {"name": f"{sys.argv[2]}{i}"}, "name")
"""
    path = tmp_path / "records.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "abc"]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(read_json_lines(path, "a record")) == 60


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match="but got object at /x"):
        save_state(tmp_path / "s", "training", {"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_leaves_the_earlier_file_intact(tmp_path):
    path = tmp_path / "net.safetensors"
    make_net().save(path)
    before = path.read_bytes()
    code = f"""
import resource, signal, torch
from tie_ext import TIENet
from tie_ext.models.backbones import Conv3
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


WRITER = """
import sys
from tie_ext.utils.files import write_atomically
for i in range(300):
    write_atomically(sys.argv[1], bytes([i % 256]) * 100_000)
"""


@pytest.mark.slow
def test_two_writers_of_one_file_never_meet(tmp_path):
    path = tmp_path / "f"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 100_000
            assert len(set(content)) == 1
    assert [(writer.wait(), writer.communicate()[1]) for writer in writers] == [(0, ""), (0, "")]
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_keys_whose_names_collide_keep_their_own_tensors(tmp_path):
    one, two, three, four = torch.arange(4).float()
    save_state(tmp_path / "s", "training", {"a/b": one, "a": {"b": two}, 1: three, "1": four})
    again = load_state(tmp_path / "s", "training")
    assert [again["a/b"].item(), again["a"]["b"].item(), again[1].item(), again["1"].item()] == [
        0,
        1,
        2,
        3,
    ]


def test_numbers_of_numpy_are_saved_as_numbers(tmp_path):
    save_state(
        tmp_path / "s",
        "training",
        {"count": np.int64(3), "share": np.float32(0.25), "none": np.float32("nan")},
    )
    again = load_state(tmp_path / "s", "training")
    assert (again["count"], again["share"]) == (3, 0.25)
    assert [type(again[key]) for key in ("count", "share")] == [int, float]
    assert math.isnan(again["none"])


HOLDER = """
import sys, time
from tie_ext.utils.files import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_folder_is_one_process_at_a_time_and_free_again_when_that_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "in\n"
        part = tmp_path / "epochs" / f".0001.safetensors.{32 * 'a'}.part"
        part.parent.mkdir()
        part.write_bytes(b"half")
        with (
            pytest.raises(
                ValueError, match=r"Expected .* to be free, but got a folder that another process"
            ),
            locked(tmp_path),
        ):
            pass
        assert part.exists()  # it may be that process's
    finally:
        holder.kill()
        holder.communicate()
    with locked(tmp_path):
        assert not part.exists()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_files_are_safetensors_whatever_they_hold(dtype, tmp_path):
    x = torch.arange(6).reshape(2, 3).to(dtype)
    held = {
        "odd": torch.ones(3, dtype=torch.uint8),
        "x": x,
        "turned": x.T,
        "part": x[:, 1],
        "none": x[:0],
        "scalar": x[1, 2],
    }
    save_state(tmp_path / "s", "training", held)
    theirs, ours = (
        safetensors.torch.load_file(tmp_path / "s"),
        load_state(tmp_path / "s", "training"),
    )
    for name, value in held.items():
        assert torch.equal(theirs[f"/{name}"], value)
        assert torch.equal(ours[name], value)
        assert ours[name].dtype == value.dtype


def test_what_no_file_holds_is_refused_and_an_earlier_file_stays(tmp_path):
    save_state(tmp_path / "s", "training", {"x": torch.zeros(1)})
    with pytest.raises(
        TypeError,
        match=r"Expected a tensor of a type that safetensors have to save, but got torch.complex128 at /x",
    ):
        save_state(tmp_path / "s", "training", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert load_state(tmp_path / "s", "training")["x"] == 0


SAVER = """
import sys
from tie_ext.utils.provenance import peak_memory
import torch
from tie_ext.outliers import Noise, NoiseSettings, Domain
from tie_ext.training.pool import GarbagePool
from tie_ext.utils.files import save_state
low, high = torch.tensor(0.0), torch.tensor(1.0)
if sys.argv[1] == "save":
    pool = GarbagePool(2000, (3, 224, 224))
    pool.images.zero_()
    pool.offered = 2000
    size, before = pool.images.numel() / 2**20, peak_memory()
    save_state(sys.argv[2], "training", {"pool": pool.state_dict()})
elif sys.argv[1] == "add":
    pool, x = GarbagePool(1000, (3, 224, 224)), torch.zeros(1000, 3, 224, 224)
    pool.images.zero_()
    size, before = pool.images.numel() / 2**20, peak_memory()
    pool.add(x)
else:
    noise = Noise(Domain(3, (3, 224, 224), low, high), NoiseSettings(kind=sys.argv[1]))
    noise.draw((2, 3, 224, 224))
    size, before = 400 * 3 * 224**2 * 4 / 2**20, peak_memory()
    noise.draw((400, 3, 224, 224))
print((peak_memory() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "most"), [("save", 0.2), ("add", 1.0), ("multiscale", 1.3), ("white", 1.3)]
)
def test_large_images_take_little_more_than_their_place(what, most, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SAVER, what, str(tmp_path / "s")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        float(done.stdout) < most
    )  # of what is saved, kept or drawn; once saving took three times as much, drawing four


class Small(nn.Module):
    """The backbone of the network that version 0.1.0 saved."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


LOGITS = [
    [-0.67441767, 0.32778361, 1.06455636, -0.71134329],
    [-0.63658577, 0.31220520, 1.02995872, -0.68879676],
    [-0.59875393, 0.29662681, 0.99536109, -0.66625017],
]
"""What the network gave when it was saved."""
EARLIER = Path(__file__).parents[1] / "data" / "saved_by_0.1.0"


def test_a_network_that_an_earlier_version_saved_gives_the_same_numbers():
    net = TIENet.load(EARLIER / "network.safetensors", Small())
    x = torch.linspace(-1, 1, 40 * 28 * 28).view(40, 1, 28, 28)
    assert (net.class_names, net.num_classes, net.image_shape, net.autocast_dtype) == (
        ("a", "b", "c"),
        3,
        SHAPE,
        "bfloat16",
    )
    assert net.tau.item() == 0.25
    with torch.no_grad():
        logits = net(x[:3], garbage=True)
    torch.testing.assert_close(
        logits, torch.tensor(LOGITS), rtol=0, atol=1e-2
    )  # bfloat16, whose sums differ from processor to processor


def test_a_detector_that_an_earlier_version_saved_draws_the_same_line():
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import TIEDetector

    detector = TIEDetector.load(EARLIER, Small())
    assert detector.threshold.item() == pytest.approx(-1.656660556793213, rel=1e-6)
    assert (detector.tau, detector.false_alarm, detector.lam, detector.t) == (None, 0.1, 2.0, 1.0)
