"""What 0.1.0 saved still loads, as CHANGELOG.md promises."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tie_ext import TIENet

SAVED = Path(__file__).parent / "data" / "saved_by_0.1.0"


class Small(nn.Module):
    """The backbone of the saved network."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_a_network_loads():
    net = TIENet.load(SAVED / "network.safetensors", Small())
    assert (net.num_classes, net.image_shape, net.classes, net.precision) == (3, (1, 28, 28), ("a", "b", "c"), "bfloat16")
    assert torch.isfinite(net.decide(torch.rand(4, 1, 28, 28)).score).all()


def test_a_detector_loads():
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import TIEDetector

    detector = TIEDetector.load(SAVED, Small())
    assert detector.threshold == pytest.approx(-1.656660556793213)
    assert torch.isfinite(detector(torch.rand(4, 1, 28, 28))).all()
