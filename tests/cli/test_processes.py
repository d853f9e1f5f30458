"""``torchrun ... tie-ext train``: two processes, one run folder, killed and resumed."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tie_ext import TIENet
from tie_ext.cli import processes
from tie_ext.cli.folder import load_network
from tie_ext.cli.images import ImageSet
from tie_ext.cli.main import main

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)

pytestmark = pytest.mark.slow
SMALL = [
    "--backbone",
    "conv3",
    "--images",
    "400",
    "--shift",
    "0",
    "--batch-size",
    "32",
    "--device",
    "cpu",
]
METHOD = [
    "--head",
    "linear",
    "--synthesizer",
    "white",
    "--epochs",
    "6",
    "--candidates",
    "110",
    "--pool-size",
    "200",
    "--lam",
    "5",
]
TRAIN = ["train", "--data", "demo", *SMALL, *METHOD]


def together(*arguments):
    """Two processes that torchrun starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*torchrun, "-m", "tie_ext.cli.main", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )


def finished(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes, and what they said."""
    out = tmp_path_factory.mktemp("runs") / "two"
    return out, finished(together(*TRAIN, "--out", str(out)))


def test_processes_leave_one_run_and_one_of_them_speaks(two):
    out, said = two
    assert said.count("| TIE ") == 5  # one row of ID images, four of OOD ones
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "run.json",
        "network.safetensors",
        "training.safetensors",
        "scores.safetensors",
        "examples.safetensors",
        "epochs",
    }
    record = json.loads((out / "run.json").read_text())
    assert record["processes"] == 2
    assert len(record["log"]) == 6
    assert main(["report", str(out)]) == 0


def test_figures_are_as_one_processs(two, tmp_path):
    assert main([*TRAIN, "--out", str(tmp_path / "one")]) == 0
    one, both = (
        json.loads((out / "run.json").read_text())["numbers"] for out in (tmp_path / "one", two[0])
    )
    assert both["accuracy"] == pytest.approx(one["accuracy"], abs=0.05)
    assert both["accuracy"] > 0.8
    for name in one["garbage_rate"]:
        assert both["scores"]["score"][name]["auroc"] == pytest.approx(
            one["scores"]["score"][name]["auroc"], abs=0.1
        )


def test_killed_processes_go_on_and_end_bit_identical_and_as_many_have_to(two, tmp_path, capsys):
    out = tmp_path / "killed"
    process = together(*TRAIN, "--out", str(out))
    while not (out / "training.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()  # which torchrun hands on: its processes have sessions of their own
    process.communicate()
    assert main(["train", "--resume", str(out)]) == 1
    assert (
        f"continue as torchrun --nproc-per-node 2 -m tie_ext.cli.main train --resume {out}"
        in capsys.readouterr().err
    )
    finished(together("train", "--resume", str(out)))
    assert not list(out.glob("process-*"))
    for name in ("network.safetensors", "scores.safetensors"):
        assert (out / name).read_bytes() == (two[0] / name).read_bytes()
    assert load_network(out).image_shape == TIENet.load(two[0] / "network.safetensors").image_shape


def test_shares_are_equal_and_have_every_image(monkeypatch):
    images = ImageSet(torch.arange(7, dtype=torch.uint8)[:, None, None, None], torch.arange(7))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "world", lambda: 3)
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.share_of(images, seed=1))
    assert [len(share) for share in shares] == [3, 3, 3]
    assert set(torch.cat([share.y for share in shares]).tolist()) == set(range(7))
    assert all(torch.equal(share.x.flatten().long(), share.y) for share in shares)
