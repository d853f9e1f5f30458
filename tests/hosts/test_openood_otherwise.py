"""Networks of OpenOOD's LogitNorm, RotPred and PixMix, as tests/bench/trained_otherwise.py has
them beside a garbage head.
"""

import math
from importlib import import_module
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tie_ext import TIENet
from tie_ext.cli.images import ImageSet
from tie_ext.models.backbones import Conv3
from tie_ext.utils.random import seeded


def fresh() -> TIENet:
    return TIENet(Conv3(3), 10, (3, 32, 32))


@pytest.fixture
def otherwise(openood_root, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    module = import_module("trained_otherwise")
    monkeypatch.setattr(module, "MIXED", 5)
    return module


@pytest.fixture
def images() -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    return ImageSet(
        torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.arange(40) % 10,
        tuple("0123456789"),
    )


def logits_of(trained, images: ImageSet) -> torch.Tensor:
    with torch.no_grad():
        return trained(images.x[:8].float() / 255)


@pytest.mark.parametrize("name", ["plain", "logitnorm", "rotpred", "pixmix"])
def test_each_trainer_of_openood_teaches_alike_with_the_same_seed(
    otherwise, name, images, tmp_path
):
    first, again, other = (
        otherwise.train(name, fresh, images, 1, seed, tmp_path) for seed in (0, 0, 1)
    )
    assert not first.training
    assert torch.equal(logits_of(first, images), logits_of(again, images))
    assert not torch.allclose(logits_of(first, images), logits_of(other, images))


def test_each_trainer_of_openood_teaches_something_else(otherwise, images, tmp_path):
    logits = [
        logits_of(otherwise.train(name, fresh, images, 1, 0, tmp_path), images)
        for name in otherwise.TRAINERS
    ]
    assert not any(torch.allclose(a, b) for a, b in combinations(logits, 2))


def test_rotpred_learns_to_tell_turns_and_is_scored_by_them(otherwise, images, tmp_path):
    with seeded(0):
        begun = otherwise.Rotating(fresh()).turned.weight
    trained = otherwise.train("rotpred", fresh, images, 1, 0, tmp_path)
    assert not torch.equal(begun, trained.turned.weight)
    trained.turned.weight.data.zero_()
    trained.turned.bias.data = torch.tensor(
        [5.0, 0, 0, 0]
    )  # takes every image for one that stands upright, of whose four turns one is
    log_odds = 5 - torch.tensor(5.0).exp().add(3).log()
    loss = -(log_odds + 3 * (log_odds - 5)) / 4 / math.log(2)
    logits = trained.net(images.x.float() / 255)
    unsure = -(logits.log_softmax(1).mean(1) + math.log(10)) / math.log(2)  # from uniform, in bits
    assert torch.allclose(otherwise.turned_scores(trained, images), loss - unsure, atol=1e-4)


def test_pixmix_mixes_with_its_own_set_in_range(otherwise, images, tmp_path):
    def mixed(value: float) -> torch.Tensor:
        batches = otherwise.Mixed(images, fresh(), tmp_path)
        for path in tmp_path.glob("*.png"):
            Image.new("RGB", (32, 32), (round(255 * value),) * 3).save(path)
        np.random.seed(0)
        with seeded(0):
            ((x, y),) = list(batches)
        assert sorted(y.tolist()) == sorted(images.y.tolist())
        return x

    black, white = mixed(0), mixed(1)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert black.shape == images.x.shape
    assert min(black.min(), white.min()) >= 0
    assert max(black.max(), white.max()) <= 1
    changed = (black != white).flatten(1).any(1)
    assert (
        0 < changed.sum() < len(changed)
    )  # the others were mixed with what was made of themselves alone


def test_a_network_that_tells_turns_gives_the_same_id_logits(otherwise):
    net = otherwise.Rotating(fresh()).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, turned = net(x, return_rot_logits=True)
        assert torch.equal(logits, net(x))
    assert turned.shape == (2, 4)
