"""pytorch-ood as its users use it: its own benchmark on stand-ins for its images, and attach on a
network of normalised images.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Small, set_head_defaults
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tie_ext import TIEDetector, attach

pytest.importorskip("pytorch_ood")
pytest.importorskip("torchvision")
from PIL import Image
from pytorch_ood.benchmark import CIFAR10_OpenOOD
from pytorch_ood.model import WideResNet
from torchvision.models import resnet18

REPOSITORY = Path(__file__).parents[2]
MEAN, STD = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])
LOW, HIGH = (-MEAN / STD).tolist(), ((1 - MEAN) / STD).tolist()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """A head that learns for a moment only."""
    set_head_defaults(monkeypatch, steps=100)


def images(count: int, classes: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Squares of a colour for each class, in [0, 1]."""
    colours = torch.rand(classes, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(count)
    y = torch.arange(count) % classes
    return (colours[y] + 0.1 * torch.randn(count, 3, size, size, generator=rng)).clamp(0, 1), y


def normalised(x: Tensor) -> Tensor:
    return (x - MEAN[:, None, None]) / STD[:, None, None]


class Inside(nn.Module):
    """A model that normalises its images itself."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(normalised(x))


def theirs(name: str) -> nn.Module:
    torch.manual_seed(0)
    return (
        WideResNet(4, depth=10, widen_factor=1)
        if name == "WideResNet"
        else resnet18(num_classes=4)
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WideResNet", "resnet18"])
def test_attach_to_normalised_images_is_attach_to_a_model_that_normalises(name):
    model = theirs(name)
    x, y = images(64, 4)
    net = attach(model, DataLoader(TensorDataset(normalised(x), y), 32), 4, LOW, HIGH)
    within = attach(Inside(model).eval(), DataLoader(TensorDataset(x, y), 32), 4)
    new = torch.cat([images(20, 4)[0], torch.rand(20, 3, 32, 32)])
    torch.testing.assert_close(net(normalised(new)), model(normalised(new)), rtol=0, atol=0)
    ours, same = TIEDetector(net)(normalised(new)), TIEDetector(within)(new)
    torch.testing.assert_close(ours, same, rtol=0.01, atol=0.02)
    assert ours[20:].min() > ours[:20].max()  # noise beside squares of colour


def test_bounds_of_one_channel_do_not_do_for_another():
    x, y = images(64, 4)
    loader = DataLoader(TensorDataset(normalised(x), y), 32)
    for bounds in ({}, {"low": LOW[0], "high": HIGH[0]}):
        with pytest.raises(ValueError, match="Expected images"):
            attach(theirs("WideResNet"), loader, 4, **bounds)


@pytest.mark.slow
def test_the_page_runs():
    (code,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs/how-to/normalised-inputs.md").read_text(), re.S
    )
    found: dict = {}
    exec(code, found)
    assert found["scores"].shape == (8,)
    assert found["net"].low.flatten().tolist() == pytest.approx([-1.988, -1.984, -1.706], abs=1e-3)


@pytest.fixture
def stand_ins(tmp_path) -> tuple[Path, Path]:
    """Images and lists as the benchmark wants them, few and made up, OOD images larger: a root,
    and a hub folder that has the lists.
    """
    root, hub = tmp_path / "images_classic", tmp_path / "hub"
    lists = hub / "openood_benchmark_imglist" / "benchmark_imglist" / "cifar10"
    lists.mkdir(parents=True)
    of = CIFAR10_OpenOOD
    ood = [(name, file, -1) for name, file in of._ood_imglists] + [
        ("val", of._val_ood_imglist, -1)
    ]
    del ood[2]  # no list of MNIST
    known = [
        ("train", of._train_imglist, 0),
        ("held", of._val_id_imglist, 0),
        ("test", of._test_id_imglist, 0),
    ]
    for name, file, label in known + ood:
        x, y = images(60, 10) if label == 0 else (torch.rand(20, 3, 48, 40), torch.full((20,), -1))
        (root / name).mkdir(parents=True)
        rows = []
        for i, (one, of_one) in enumerate(zip(x, y.tolist(), strict=True)):
            Image.fromarray((one * 255).byte().permute(1, 2, 0).numpy()).save(
                root / name / f"{i}.png"
            )
            rows.append(f"{name}/{i}.png {of_one}\n")
        (lists / file).write_text("".join(rows))
    return root, hub


@pytest.mark.slow
def test_its_openood_benchmark_evaluates_ours(stand_ins, tmp_path):
    root, hub = stand_ins
    torch.manual_seed(0)
    x, y = images(60, 10)
    model = Small(10, 3).eval()
    attach(model, DataLoader(TensorDataset(x, y), 30), 10).save(tmp_path / "net.safetensors")
    script = REPOSITORY / "tests" / "bench" / "benchmark.py"
    code = (
        f"import sys, torch; sys.path[:0] = [{str(script.parent)!r}, {str(REPOSITORY / 'tests')!r}]; torch.hub.set_dir({str(hub)!r})\n"
        "import benchmark; from conftest import Small; from tie_ext import TIENet\n"
        "load = TIENet.load; benchmark.TIENet.load = lambda path: load(path, Small(10, 3))\n"
        f"sys.argv = ['benchmark.py', '--root', {str(root)!r}, '--images', '40', '--batch-size', '30', {str(tmp_path / 'net.safetensors')!r}]\n"
        "benchmark.main()"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in run.stdout.splitlines()
        if line.startswith("|")
    ]
    sets = [name for name, _ in CIFAR10_OpenOOD._ood_imglists if name != "MNIST"]
    assert head == ["detector", *sets, "mean AUROC"]
    own = ["MSP", "energy", "GEN", "KNN", "ViM", "Mahalanobis"]
    together = ["GEN + KNN", "GEN + ViM", "GEN + KNN + ViM"]
    assert [row[0] for row in rows] == [*own, *together, "TIEDetector", "combine"]
    assert "MNIST is left out: no list test_mnist.txt" in run.stdout
    assert float(rows[-2][-1]) > 99  # TIEDetector, of noise beside squares of colour


@pytest.mark.slow
def test_lists_of_our_own_are_those_that_it_reads(tmp_path):
    root, hub = tmp_path / "images_classic", tmp_path / "hub"
    for place in (
        "cifar10/train/0",
        "cifar10/train/1",
        "cifar10/test/0",
        "cifar10/test/1",
        "cifar100/test/7",
        "tin/val",
        "tin/test",
    ):
        (root / place).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (32, 32)).save(root / place / f"{i}.png")
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests' / 'bench')!r}); from pathlib import Path; import benchmark\n"
        f"benchmark.VALIDATION = 5; root = Path({str(root)!r})\n"
        f"benchmark.write_lists(root, Path({str(hub)!r})); read = benchmark.AtHand(str(root), None)\n"
        "print(len(read.train_in), len(read.val_in), len(read.test_in), *map(len, read.test_oods), read.ood_names, {y for _, y in read.test_oods[0]})"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert run.stdout == "16 5 11 8 8 ['CIFAR100', 'TinyImageNet'] {-1}\n", run.stderr[-3000:]
    val, test = (
        (
            hub / "openood_benchmark_imglist/benchmark_imglist/cifar10" / f"{of}_cifar10.txt"
        ).read_text()
        for of in ("val", "test")
    )
    assert not set(val.splitlines()) & set(test.splitlines())
