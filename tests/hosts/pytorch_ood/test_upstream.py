"""Our detectors inside pytorch-ood's own tests: of ``info``, smoke, its benchmark and its search.

Its source is looked for at $PYTORCH_OOD_ROOT; without it, or without one of its test files, as in
its release, the tests are skipped and say so.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
OURS = """
import math, sys, unittest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pytorch_ood.detector import EnergyBased
from tie_ext import TIENet
from tie_ext.pytorch_ood import (
    IODIN, BoundaryDistance, Combined, MahalanobisPlusPlus, SampledKNN, TIEDetector,
    UncertaintyEstimate,
)

def net_of(values, n):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(values, 8), nn.Tanh(), nn.Linear(8, n))
    return TIENet(body, n, None, -99.0, 99.0).eval()

# RejectionNetwork is left out, whose outliers have 28 pixels or more.
BUILD = {
    TIEDetector: TIEDetector,
    UncertaintyEstimate: UncertaintyEstimate,
    MahalanobisPlusPlus: lambda net: MahalanobisPlusPlus(net.features),
    SampledKNN: lambda net: SampledKNN(net.features),
    BoundaryDistance: lambda net: BoundaryDistance(net.features, net.fc.weight, net.fc.bias),
    Combined: lambda net: Combined([TIEDetector(net), EnergyBased(net)], None),
    IODIN: IODIN,
}

def pixels(data):
    return TensorDataset(data.tensors[0][:, :, None, None], data.tensors[1])
"""
INFO = """
from tests import test_info
from tests.detectors.test_all_detectors_smoke import TestAllDetectorsSmoke as Smoke

Smoke._classification_detector_registry = lambda self: []
Smoke._image_detector_registry = lambda self: [
    (cls.__name__, lambda make=make: make(net_of(192, 3))) for cls, make in BUILD.items()]
test_info.DETECTORS = list(BUILD)
names = ["TestInfoRecords.test_detectors", "TestDetectorTasks", "TestSegmentationSemantics"]
suite = unittest.TestSuite([unittest.defaultTestLoader.loadTestsFromNames(names, test_info),
                            unittest.defaultTestLoader.loadTestsFromTestCase(Smoke)])
result = unittest.TextTestRunner(stream=sys.stdout).run(suite)
assert result.wasSuccessful() and result.testsRun > 5
"""
BENCHMARK = """
from tests.test_benchmark import ToyBenchmark

class Toy(ToyBenchmark):
    def __init__(self):
        super().__init__()
        self._train = TensorDataset(torch.randn(40, 2), torch.arange(40) % 2)
        for name in ("_train", "_test_id", "_test_ood"):
            setattr(self, name, pixels(getattr(self, name)))

torch.manual_seed(0)
benchmark, found = Toy(), []
for cache in (False, True):
    detectors = [make(net_of(2, 2)) for make in BUILD.values()]
    for built in detectors:
        if built.requires_fit:
            built.fit(DataLoader(benchmark.train_set(), batch_size=16))
    found.append(benchmark.evaluate(detectors, loader_kwargs={"batch_size": 2}, cache=cache))
assert len(found[0]) == len(BUILD)
for one, other in zip(*found):
    assert one == other and 0 <= one["AUROC"] <= 1, (one, other)
"""
SEARCH = """
from pytorch_ood.utils import GridSearch
from tests import test_hpo

values = DataLoader(pixels(test_hpo._make_val_dataset()), batch_size=64)
fit = DataLoader(pixels(test_hpo._make_fit_dataset()), batch_size=64)  # 100 samples, and k to 1000
for cls, make in BUILD.items():
    space = cls.hyperparameter_space
    if not space:
        continue
    detector = make(net_of(2, 2))
    search = GridSearch(detector, fit if detector.requires_fit else None, values)
    best = search.run()
    assert len(search.results_) == math.prod(map(len, space.values()))
    assert detector.get_hyperparameters() == best, (cls, best)
    assert 0 <= search.best_score_ <= 1, cls
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "needs"),
    [
        (INFO, ["test_info.py", "detectors/test_all_detectors_smoke.py", "helpers"]),
        (BENCHMARK, ["test_benchmark.py"]),
        (SEARCH, ["test_hpo.py", "helpers"]),
    ],
    ids=["info and smoke", "benchmark", "search"],
)
def test_our_detectors_pass_its_own_tests(tmp_path, code, needs):
    root = Path(os.environ.get("PYTORCH_OOD_ROOT", Path.home() / "pytorch-ood"))
    lacking = [name for name in needs if not (root / "tests" / name).exists()]
    if lacking:
        pytest.skip(f"{root} has no tests/{', tests/'.join(lacking)}: set PYTORCH_OOD_ROOT")
    path = os.pathsep.join(map(str, (root, REPOSITORY)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OURS + code],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
