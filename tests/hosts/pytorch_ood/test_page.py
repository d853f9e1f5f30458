"""pytorch-ood as its users use it: images that a transform normalises."""

import pytest
import torch
from conftest import set_head_defaults
from pytorch_ood.model import WideResNet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tie_ext import TIEDetector, attach

MEAN, STD = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
LOW, HIGH = (-MEAN / STD).tolist(), ((1 - MEAN) / STD).tolist()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """A head that learns for a moment only."""
    set_head_defaults(monkeypatch, steps=100)


def images(count: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Squares of a colour for each class, in [0, 1]."""
    colours = torch.rand(classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(count)
    y = torch.arange(count) % classes
    return (colours[y] + 0.1 * torch.randn(count, 3, 32, 32, generator=rng)).clamp(0, 1), y


class Normalised(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - MEAN[:, None, None]) / STD[:, None, None]


normalised = Normalised()


@pytest.mark.slow
def test_normalised_images_and_a_model_that_normalises():
    model = WideResNet(4, depth=10, widen_factor=1).eval()
    x, y = images(64)
    net = attach(model, DataLoader(TensorDataset(normalised(x), y), 32), 4, LOW, HIGH)
    inside = nn.Sequential(normalised, model).eval()
    within = attach(inside, DataLoader(TensorDataset(x, y), 32), 4)
    new = torch.cat([images(20)[0], torch.rand(20, 3, 32, 32)])
    torch.testing.assert_close(net(normalised(new)), inside(new), rtol=0, atol=0)
    ours, same = TIEDetector(net)(normalised(new)), TIEDetector(within)(new)
    torch.testing.assert_close(ours, same, rtol=0.01, atol=0.02)
    assert ours[20:].min() > ours[:20].max()  # noise beside squares of colour
