"""What earlier versions saved still loads and scores as it did, as CHANGELOG.md promises."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tie_ext import TIENet

DATA = Path(__file__).parent / "data"
SAVED, ATTACHED = DATA / "saved_by_0.1.0", DATA / "saved_by_0.2.0"
RAMP = torch.linspace(0, 1, 4 * 28 * 28).reshape(4, 1, 28, 28)


class Small(nn.Module):
    """The backbone of the saved networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_a_network_loads():
    net = TIENet.load(SAVED / "network.safetensors", Small())
    assert (net.num_classes, net.image_shape, net.class_names, net.autocast_dtype) == (
        3,
        (1, 28, 28),
        ("a", "b", "c"),
        "bfloat16",
    )
    assert torch.isfinite(net.decide(torch.rand(4, 1, 28, 28)).score).all()


def test_a_detector_loads():
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import TIEDetector

    detector = TIEDetector.load(SAVED, Small())
    assert detector.threshold == pytest.approx(-1.656660556793213)
    assert torch.isfinite(detector(torch.rand(4, 1, 28, 28))).all()


def test_a_network_with_a_head_on_every_layer_scores_as_it_did():
    net = TIENet.load(ATTACHED / "network.safetensors", Small())
    assert net.class_names == ("a", "b", "c")
    assert net.decide(RAMP).score.tolist() == pytest.approx(
        [10.01477, 5.465388, 10.37057, 14.10744], rel=1e-4
    )


def test_a_combination_scores_as_it_did():
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import Combined

    detector = Combined.load(ATTACHED, Small())
    assert detector.threshold == pytest.approx(1.748891)
    assert detector(RAMP).tolist() == pytest.approx(
        [32.87762, 13.96002, 13.94282, -38.60067], rel=1e-3
    )
