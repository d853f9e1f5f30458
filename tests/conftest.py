"""What several test files need: a small network, small batches, and the place of real images where there is one."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tie_ext import Conv3, TIEConfig, TIENet, TIETrainer

settings.register_profile("slow machines are fine", deadline=None)
settings.load_profile("slow machines are fine")

SHAPE = (1, 28, 28)
TINY = TIEConfig(epochs=2, lam=0.5, garbage_weight=1.0, candidates_per_class=4, pool_size=40, generator_steps=2, generator_width=4, lr=1e-3)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_net(classes: int = 3) -> TIENet:
    torch.manual_seed(0)
    return TIENet(Conv3(1, classes), classes, SHAPE)


def make_batches(classes: int = 3, sizes: tuple[int, ...] = (8, 8)) -> list:
    rng = torch.Generator().manual_seed(1)
    return [(torch.rand(b, *SHAPE, generator=rng), torch.arange(b) % classes) for b in sizes]


def make_trainer(**changes) -> TIETrainer:
    from dataclasses import replace

    return TIETrainer(make_net(), replace(TINY, **changes))


@pytest.fixture
def net() -> TIENet:
    return make_net()


@pytest.fixture
def data_root() -> Path:
    """Real images: tests that want them are skipped where $TIE_DATA is unset."""
    if not os.environ.get("TIE_DATA"):
        pytest.skip("TIE_DATA is unset: set it to a folder with MNIST as torchvision keeps it")
    return Path(os.environ["TIE_DATA"])
