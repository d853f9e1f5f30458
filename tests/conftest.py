"""What several test files need: a small network, small batches, and the place of real images where
there is one.
"""

import os
import sys
from dataclasses import fields, replace

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # images are small, and threads that wait for one another cost more than they give
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

from tie_ext import TIEConfig, TIENet, TIETrainer
from tie_ext.models.backbones import Conv3
from tie_ext.outliers import Domain, Inversion, InversionSettings
from tie_ext.training.config import HeadConfig

settings.register_profile("slow machines are fine", deadline=None, max_examples=40)
settings.load_profile("slow machines are fine")

SHAPE = (1, 28, 28)
TINY = TIEConfig(epochs=2, lam=0.5, candidates=16, pool_size=40)
FEW = InversionSettings(steps=2, width=4)
QUICK = {"steps": 30, "epoch_steps": 20}
"""Of a garbage head on every layer."""


close = torch.testing.assert_close


def refused(message: str):
    """A context in which a ``ValueError`` says something that matches."""
    return pytest.raises(ValueError, match=message)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Small(nn.Module):
    """Two convolutions with BatchNorm: a network that trains in a moment."""

    def __init__(self, classes: int = 3, channels: int = 1):
        super().__init__()
        layers = [
            nn.Conv2d(channels, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, 2, 1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
        ]
        self.conv = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.fc = nn.Linear(48, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x))


def make_net(classes: int = 3) -> TIENet:
    torch.manual_seed(0)
    return TIENet(Conv3(1, classes), classes, SHAPE)


def make_small(head: str = "linear") -> TIENet:
    torch.manual_seed(0)
    return TIENet(Small(3), 3, SHAPE, head=head)


def domain(
    classes: int = 3, shape: tuple[int, ...] = SHAPE, low: float = 0.0, high: float = 1.0
) -> Domain:
    return Domain(classes, shape, torch.tensor(low), torch.tensor(high))


def make_batches(classes: int = 3, sizes: tuple[int, ...] = (8, 8)) -> list:
    rng = torch.Generator().manual_seed(1)
    return [(torch.rand(b, *SHAPE, generator=rng), torch.arange(b) % classes) for b in sizes]


def make_trainer(net: TIENet | None = None, **changes) -> TIETrainer:
    net = make_net() if net is None else net
    return TIETrainer(
        net, replace(TINY, **changes), [Inversion(net, FEW)], head_config=HeadConfig(**QUICK)
    )


def stripes(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Three easy classes."""
    x, y = 0.1 * torch.rand(count, *SHAPE), torch.arange(count) % 3
    for image, label in zip(x, y.tolist(), strict=True):
        image[:, 9 * label : 9 * label + 9] += 0.8
    return x, y


def states(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights and buffers of a module."""
    tensors = module.state_dict().items()
    return {name: value.clone() for name, value in tensors if isinstance(value, torch.Tensor)}


def same(a: nn.Module | dict, b: nn.Module | dict) -> bool:
    """Whether two modules, or their :func:`states`, are equal to the bit."""
    a, b = (states(of) if isinstance(of, nn.Module) else of for of in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def set_head_defaults(monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    """Other defaults of HeadConfig, for programs that offer no way to give one."""
    defaults = {f.name: getattr(HeadConfig(), f.name) for f in fields(HeadConfig)}
    values = tuple((defaults | changes).values())
    monkeypatch.setattr(HeadConfig.__init__, "__defaults__", values)


@pytest.fixture
def net() -> TIENet:
    return make_net()


@pytest.fixture
def data_root() -> Path:
    """Real images: tests that want them are skipped where $TIE_DATA is unset."""
    if not os.environ.get("TIE_DATA"):
        pytest.skip("TIE_DATA is unset: set it to a folder with MNIST as torchvision keeps it")
    return Path(os.environ["TIE_DATA"])


def find_openood() -> Path | None:
    """A checkout of OpenOOD: importable, or at $OPENOOD_ROOT (default ~/OpenOOD)."""
    root = Path(os.environ.get("OPENOOD_ROOT", Path.home() / "OpenOOD"))
    if find_spec("openood") is None and (root / "openood").is_dir():
        sys.path.append(str(root))
    spec = find_spec("openood")
    return (
        Path(spec.submodule_search_locations[0]).parent
        if spec and spec.submodule_search_locations
        else None
    )


@pytest.fixture(scope="session")
def openood_root() -> Path:
    """A checkout of OpenOOD whose packages are all there; what wants it is skipped, saying so,
    where there is none.
    """
    from tie_ext.openood.requirements import check_requirements

    found = find_openood()
    if found is None:
        pytest.skip("no OpenOOD: put a checkout at ~/OpenOOD or set OPENOOD_ROOT")
    if not (found / "main.py").is_file():
        pytest.skip(f"openood at {found} is no checkout (no main.py): set OPENOOD_ROOT to one")
    try:
        check_requirements()
    except ImportError as error:
        pytest.skip(f"OpenOOD at {found} lacks packages: {error}")
    return found
