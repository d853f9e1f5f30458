"""OpenOOD with TIE registered, small networks and loaders, and folders as its scripts want them.

A checkout is looked for as an importable ``openood``, else at $OPENOOD_ROOT (default ~/OpenOOD);
without one, or without the packages it imports, tests that need it are skipped and say so.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

CONFIGS = Path(__file__).parents[3] / "openood_configs"


def unaided(make, *args, **kwargs):
    return make(*args, **{**kwargs, "num_workers": 0})


@pytest.fixture
def openood(openood_root, monkeypatch):
    """``tie_ext.openood``, registered, without CUDA and without workers; undone afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import openood.evaluation_api.datasets as datasets
        import openood.pipelines  # noqa: F401

        import tie_ext.openood as ours
    # Eight workers a loader take longer to start than a handful of images to read.
    monkeypatch.setattr(datasets, "DataLoader", partial(unaided, DataLoader))
    with ours.without_cuda(wanted=False):
        ours.register()
        yield ours
        ours.unregister()


def config(content: dict) -> Any:
    from openood.utils.config import Config

    return Config(content)


def network_config(backbone: str = "lenet", **changes):
    about = {"num_classes": changes.get("num_classes", 10), "num_gpus": 1, "pretrained": False}
    whole = {"name": "tie_net", "image_size": 28, "normalization_type": "mnist", **about}
    return config({**whole, **changes, "backbone": {"name": backbone, **about}})


def build(seed: int = 0, **changes):
    """A ``tie_net``."""
    from openood.networks import get_network

    torch.manual_seed(seed)
    return get_network(network_config(**changes))


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)


def lenet(classes: int = 3):
    from openood.networks.lenet import LeNet

    torch.manual_seed(0)
    return LeNet(classes).eval()


def postprocessor(name: str, aps: bool = False, **arguments):
    from openood.postprocessors import get_postprocessor

    about = {"name": name, "APS_mode": aps}
    if arguments:
        about["postprocessor_args"] = arguments
    return get_postprocessor(config({"postprocessor": about}))


class Unread(dict):
    """OOD loaders that nobody may look at."""

    def __getitem__(self, key):
        raise AssertionError(f"OOD loader {key} was read")

    __iter__ = items = values = keys = get = __getitem__


class Images(Dataset):
    """Few images ``(3, 28, 28)`` in [0, 1]; ``data`` is changed where ``changed`` says how."""

    def __init__(self, count=40, classes=10, changed=None, transform=None, seed: int = 0):
        self.count, self.classes, self.changed, self.seed = count, classes, changed, seed
        self.preprocessor = transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        label, rng = i % self.classes, torch.Generator().manual_seed(self.seed + i)
        x = torch.rand(3, 28, 28, generator=rng) * (1 + label) / self.classes
        return {"data": self.changed(x) if self.changed else x, "data_aux": x, "label": label}


def id_loaders(classes: int = 3) -> dict:
    """ID loaders, the transform of both the same, as the evaluation API has them."""
    val = Images(40, classes, seed=1000)
    return {"train": DataLoader(Images(150, classes), 16), "val": DataLoader(val, 16)}


def draw(data: Path, name: str, count: int, inside: bool, size: Sequence[int] = (32, 32, 3)):
    """Images below a folder and the lines of their list: squares whose place is their label, or
    noise.
    """
    rng, rows = np.random.default_rng(len(name)), []
    (data / name).parent.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = rng.integers(0, 255, size).astype(np.uint8)
        if inside:
            image //= 4
            image[3 * (i % 10) : 3 * (i % 10) + 5] = 255
        if name.endswith("imagenet_c"):  # which OpenOOD does not resize
            image = image.repeat(7, 0).repeat(7, 1)
        Image.fromarray(image).save(data / f"{name}_{i}.png")
        rows.append(f"{name}_{i}.png {i % 10 if inside else -1}\n")
    return "".join(rows)


def run_openood(root: Path, place: Path, *command: str) -> str:
    """What a Python command says in a folder, as a user runs it."""
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
