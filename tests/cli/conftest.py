"""What tests of the command line share: images, weights, and runs that are only read."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import set_head_defaults
from PIL import Image

from tie_ext.cli import registry
from tie_ext.cli.main import main

MEAN = ["--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.25, 0.3]
FEW = ["--candidates", 55, "--pool-size", 40, "--inversion-steps", 2, "--inversion-width", 4]
LOW = {"bright": 100, "dark": 0}


def run(*words) -> int:
    """The exit code of a command."""
    return main(list(map(str, words)))


def spawn(*words, **how) -> subprocess.Popen:
    """A command in a process of its own."""
    program = [sys.executable, "-m", "tie_ext.cli.main"]
    return subprocess.Popen([*program, *map(str, words)], text=True, **how)


def stop(*_, **__):
    raise KeyboardInterrupt


def write_images(folder, counts, size=(28, 28), suffix="png"):
    """Noise in ``folder/CLASS/i.png``, dark or bright by class."""
    rng = np.random.default_rng(list(folder.name.encode()))  # others in test/ than in train/
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            low = LOW.get(Path(name).name, 50)
            image = rng.integers(low, low + 156, (*size, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / name / f"{i}.{suffix}")
    return folder


def make(name: str, channels: int = 3, n: int = 2) -> torch.nn.Module:
    """A network that somebody trained, as far as anyone here can tell."""
    torch.manual_seed(1)
    return registry.build(name, channels, n).eval()


def attach(folder, file, out, *more, backbone="conv3", size=28):
    given = ["--backbone", backbone, "--weights", file, "--data", f"folder:{folder}"]
    return ["attach", *given, "--size", size, "--out", out, *more]


def train(folder, out, *more):
    return ["train", "--data", f"folder:{folder}", "--size", 28, "--out", out, *FEW, *more]


def record_of(out) -> dict:
    return json.loads((out / "run.json").read_text())


def rows_of(text) -> list[dict]:
    return list(csv.DictReader(text.splitlines()))


def files_of(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def refuses(capsys):
    """Runs a command that ends with a line of error, and gives that line."""

    def check(message, *words, status=1) -> str:
        capsys.readouterr()
        assert run(*words) == status
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("tie-ext: ")
        assert message in error
        return error

    return check


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    set_head_defaults(monkeypatch, steps=30, epoch_steps=5)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two classes of images, as many test images as a threshold needs."""
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", {"bright": 20, "dark": 20})
    write_images(root / "test", {"bright": 20, "dark": 20})
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "conv3.pt"
    torch.save(make("conv3").state_dict(), path)
    return path


@pytest.fixture(scope="session")
def attached(folder, weights, tmp_path_factory):
    """A run of ``tie-ext attach`` that tests only read."""
    out = tmp_path_factory.mktemp("runs") / "attached"
    with pytest.MonkeyPatch.context() as patched:
        set_head_defaults(patched, steps=30)
        assert run(*attach(folder, weights, out, *MEAN, "--ood", f"folder:{folder}")) == 0
    return out


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A run of ``tie-ext train`` on a folder without splits, that tests only read."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    with pytest.MonkeyPatch.context() as patched:
        set_head_defaults(patched, steps=30, epoch_steps=5)
        assert run(*train(folder / "train", out, "--epochs", 3, "--seed", 3)) == 0
    return out
