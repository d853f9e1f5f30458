"""Networks, images and detectors that the tests of pytorch-ood's detectors share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE, Small, make_net
from pytorch_ood.api import Detector, LogitsDetector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.outliers.marginal import MarginalRepresentations, MarginalSettings
from tie_ext.pytorch_ood import (
    IODIN,
    BoundaryDistance,
    MahalanobisPlusPlus,
    RejectionNetwork,
    SampledKNN,
    UncertaintyEstimate,
)
from tie_ext.pytorch_ood.members import MEMBERS
from tie_ext.utils.files import load_state, save_state, sha256

N = 3


def trained() -> TIENet:
    """A network as training leaves it: with a tau, in training mode."""
    net = make_net(N)
    net.tau.fill_(0.9)
    return net.train()


def with_head(backbone: nn.Module | None = None) -> TIENet:
    """A network with a head on every layer, as attach leaves it."""
    torch.manual_seed(0)
    net = TIENet(Small(N) if backbone is None else backbone, N, SHAPE, head="multilayer").eval()
    net.garbage.standardise(net.statistics(images(60)[0])[1].detach())
    net.tau.fill_(0.9)
    return net


def images(count: int = 24, seed: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=rng), torch.arange(count) % N


def loader(count: int = 24, seed: int = 3) -> DataLoader:
    return DataLoader(TensorDataset(*images(count, seed)), batch_size=7)


class Plain(nn.Module):
    """A network as pytorch-ood's are: ``forward`` is a layer on ``features``, or where it is not,
    says nothing of them.
    """

    def __init__(self, asks: bool = True):
        super().__init__()
        self.body, self.fc, self.asks = Small(N).conv, nn.Linear(48, N), asks
        self.dropout = nn.Dropout()
        self.passes: list[int] = []  # images of each

    def features(self, x: Tensor) -> Tensor:
        self.passes.append(len(x))
        return self.dropout(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.asks:
            return self.fc(self.features(x))
        self.passes.append(len(x))
        return self.fc(self.dropout(self.body(x)))


def rejection(net: TIENet) -> RejectionNetwork:
    synthesizer = MarginalRepresentations(net, MarginalSettings(k=2, vae_epochs=1))
    return RejectionNetwork(net.features, synthesizer, epochs=2)


def three(net: TIENet | None = None, **settings) -> Combined:
    """A combination of the garbage class and two others, not fitted."""
    net = trained().eval() if net is None else net
    gaussians = MahalanobisPlusPlus(net.features).fit(loader(60, seed=1))
    members = [TIEDetector(net), gaussians, theirs.EnergyBased(net)]
    return Combined(members, **{"false_alarm": 0.1, **settings})


DETECTORS: dict[str, Callable[[TIENet], Detector]] = {
    "TIEDetector": lambda net: TIEDetector(net, 0.2),
    "tau": TIEDetector,
    "UncertaintyEstimate": UncertaintyEstimate,
    "IODIN": IODIN,
    "RejectionNetwork": rejection,
    "MahalanobisPlusPlus": lambda net: MahalanobisPlusPlus(net.features),
    "SampledKNN": lambda net: SampledKNN(net.features, k=3),
    "BoundaryDistance": lambda net: BoundaryDistance(net.features, net.fc.weight, net.fc.bias),
    "Combined": lambda net: three(net, false_alarm=0.2),
}
"""Every detector of ours, not fitted."""


def every_member(net: TIENet, *without: type) -> list[Detector]:
    """One of each kind that can be saved, fitted."""
    layer = net.fc.weight, net.fc.bias
    made = {
        theirs.GEN: lambda: theirs.GEN(net, gamma=0.2, M=2),
        theirs.EnergyBased: lambda: theirs.EnergyBased(net, t=2.0),
        theirs.MaxSoftmax: lambda: theirs.MaxSoftmax(net, t=3.0),
        theirs.ViM: lambda: theirs.ViM(net.features, 4, *layer),
        theirs.KNN: lambda: theirs.KNN(net.features, k=3),
        BoundaryDistance: lambda: BoundaryDistance(net.features, *layer),
        SampledKNN: lambda: SampledKNN(net.features, k=3, max_samples=10),
        TIEDetector: lambda: TIEDetector(net, t=0.5),
    }
    found = []
    for cls in MEMBERS:
        own = net if issubclass(cls, LogitsDetector) else net.features
        if cls not in without:
            member = made[cls]() if cls in made else cls(own)
            found.append(member.fit(loader(80, seed=7)) if member.requires_fit else member)
    return found


@pytest.fixture(scope="session")
def fitted() -> Combined:
    """A fitted combination that nobody changes."""
    return three().fit(loader(61))


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """A saved detector and a saved combination, in folders of these names."""
    place = tmp_path_factory.mktemp("saved")
    net = trained().eval()
    TIEDetector(net, 0.1, t=0.5).fit(loader()).save(place / "TIEDetector")
    Combined(every_member(net), 0.1).fit(loader(80)).save(place / "Combined")
    return place


@pytest.fixture
def saved(folders, tmp_path) -> Path:
    """Copies of them."""
    return Path(shutil.copytree(folders, tmp_path / "saved"))


def edit(folder: Path, **changes: Any) -> None:
    """Change entries of ``detector.json``; ``...`` takes one away."""
    content = {**json.loads((folder / "detector.json").read_text()), **changes}
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / "detector.json").write_text(json.dumps(content))


def rewrite(folder: Path, change: Callable[[dict], Any]) -> None:
    """Tensors changed by somebody who also changes the fingerprint."""
    state = load_state(folder / "detector.safetensors", "detector")
    change(state)
    save_state(folder / "detector.safetensors", "detector", state)
    edit(folder, detector_sha256=sha256(folder / "detector.safetensors"))
