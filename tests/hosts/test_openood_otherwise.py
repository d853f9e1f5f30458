"""Networks of OpenOOD's LogitNorm, RotPred and PixMix, beside which tests/bench/trained_otherwise.py has a garbage head."""

from importlib import import_module
from pathlib import Path

import pytest
import torch

from tie_ext import TIENet
from tie_ext.app.data import ImageSet
from tie_ext.backbones import Conv3
from tie_ext.support.random import seeded


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
    return ImageSet(torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(40) % 10, tuple("0123456789"))


@pytest.mark.parametrize("name", ["plain", "logitnorm", "rotpred", "pixmix"])
def test_each_trainer_of_openood_teaches_the_id_logits_alike_with_the_same_seed(otherwise, name, images, tmp_path):
    first, again, other = (otherwise.train(name, fresh, images, 1, seed, tmp_path) for seed in (0, 0, 1))
    assert not first.training
    x = images.x[:8].float() / 255
    with torch.no_grad():
        assert torch.equal(first(x), again(x))
        assert not torch.allclose(first(x), other(x))
    with seeded(0):
        begun = fresh()
    assert not torch.equal(begun.fc.weight, first.fc.weight)


def test_what_pixmix_gives_is_mixed_and_in_range(otherwise, images, tmp_path):
    batches = otherwise.Mixed(images, fresh(), tmp_path)
    ((x, y),) = list(batches)
    assert x.shape == images.x.shape
    assert x.min() >= 0
    assert x.max() <= 1
    assert sorted(y.tolist()) == sorted(images.y.tolist())
    assert len(list(tmp_path.glob("*.png"))) == 5
    black = ImageSet(torch.zeros_like(images.x), images.y, images.classes)
    ((x, _),) = list(otherwise.Mixed(black, fresh(), tmp_path))
    assert x.amax((1, 2, 3)).gt(0.1).sum() > len(x) / 4  # something else than black was mixed in


def test_a_network_that_tells_turns_gives_the_same_id_logits(otherwise):
    net = otherwise.Rotating(fresh()).eval()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, turned = net(x, return_rot_logits=True)
        assert torch.equal(logits, net(x))
    assert turned.shape == (2, 4)
