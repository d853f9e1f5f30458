"""``torchrun ... tie-ext train``: two processes, one run folder."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from cli.conftest import record_of
from tie_ext.cli import processes
from tie_ext.cli.images import ImageSet

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"
)
SMALL = ["--images", 400, "--shift", 0, "--batch-size", 32, "--head", "linear", "--epochs", 4]
LOOP = ["--synthesizer", "white", "--candidates", 110, "--pool-size", 200, "--lam", 5]
TRAIN = ["train", "--data", "demo", *SMALL, *LOOP, "--device", "cpu"]


def together(*arguments):
    """Two processes that torchrun starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, "--master-port", port, "-m", "tie_ext.cli.main", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_and_one_that_goes_on(tmp_path):
    out = tmp_path / "two"
    process = together(*TRAIN, "--out", out)
    while not (out / "training.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()  # which torchrun hands on: its processes have sessions of their own
    process.communicate()
    process = together("train", "--resume", out)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert said.count("| TIE ") == 5  # one row of ID images, four of OOD ones
    record = record_of(out)
    assert (record["processes"], len(record["log"])) == (2, 4)
    assert record["numbers"]["accuracy"] > 0.5


def test_shares_are_equal_and_have_every_image(monkeypatch):
    images = ImageSet(torch.arange(7, dtype=torch.uint8)[:, None, None, None], torch.arange(7))
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "world", lambda: 3)
        monkeypatch.setattr(dist, "get_world_size", lambda: 3)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(processes.share_of(images, seed=1))
    assert [len(share) for share in shares] == [3, 3, 3]
    assert set(torch.cat([share.y for share in shares]).tolist()) == set(range(7))
    assert all(torch.equal(share.x.flatten().long(), share.y) for share in shares)
