"""The patches for pytorch-ood: short, on the release they name, with the numbers of tie_ext."""

import ast
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from patches.upstream import PATCHES, git, python

RELEASE = "0.4.0"
SERIES = PATCHES / "pytorch-ood"
TIE, COMBINED = SERIES / "0001-TIE-detector.patch", SERIES / "0002-Combined-detector.patch"
BUDGET = {TIE: (400, 9), COMBINED: (300, 9)}
"""Most lines added or taken away, and most files."""
ORDERS = {"both": [TIE, COMBINED], "0001 alone": [TIE], "0002 alone": [COMBINED]}
EXTRAS = ("sklearn", "gdown", "pandas", "optuna", "matplotlib")
"""What pytorch-ood does not need."""
PACKAGES = (
    "detector",
    "loss",
    "model",
    "utils",
    "dataset.img",
    "dataset.txt",
    "dataset.audio",
    "benchmark",
)


def files(patch: Path) -> dict[str, bool]:
    """The files a patch touches; True where it makes them."""
    blocks = re.findall(r"^diff --git a/(\S+) b/\S+\n(new file)?", patch.read_text(), re.M)
    return {name: bool(new) for name, new in blocks}


@pytest.fixture(scope="module")
def source() -> Path:
    found = Path(os.environ.get("PYTORCH_OOD_ROOT", Path.home() / "pytorch-ood"))
    if not (found / "src" / "pytorch_ood").is_dir():
        pytest.skip(
            f"no source tree of pytorch-ood {RELEASE} at {found}: unpack its source distribution "
            "there, or set PYTORCH_OOD_ROOT"
        )
    (version,) = re.findall(
        r'^__version__ = "(.+)"', (found / "src" / "pytorch_ood" / "__init__.py").read_text(), re.M
    )
    if version != RELEASE:
        pytest.fail(
            f"Expected pytorch-ood {RELEASE}, which the patches are for, at {found}, "
            f"but got {version}"
        )
    return found


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ORDERS]
)
def tree(request, source, tmp_path_factory) -> Path:
    """A copy of the source with patches applied by ``git am``.

    The source distribution has neither the tests of single detectors nor docs: what a patch
    changes there is left out then.
    """
    place = tmp_path_factory.mktemp("tree") / "pytorch-ood"
    shutil.copytree(source, place, ignore=shutil.ignore_patterns(".git", "data", "__pycache__"))
    for arguments in (["init", "-q"], ["add", "-A", "-f"], ["commit", "-qm", RELEASE]):
        git(place, *arguments)
    for patch in ORDERS[request.param]:
        missing = [
            name for name, new in files(patch).items() if not new and not (place / name).exists()
        ]
        git(place, "am", "-q", *(f"--exclude={name}" for name in missing), str(patch))
    return place


def ran(tree: Path, *arguments: str) -> str:
    return python(tree, *arguments, path=(tree / "src", tree, SERIES.parents[1]))


@pytest.mark.parametrize("patch", BUDGET, ids=lambda patch: patch.stem)
def test_budget_of_lines_and_files(patch):
    most_lines, most_files = BUDGET[patch]
    body = patch.read_text().partition("\n---\n")[2]
    changed = [line for line in body.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert 50 < len(changed) <= most_lines
    assert len(files(patch)) <= most_files


@pytest.mark.parametrize("patch", BUDGET, ids=lambda patch: patch.stem)
def test_sections_of_the_pull_request(patch):
    text = patch.with_suffix(".md").read_text()
    assert re.findall(r"^## (.+)$", text, re.M) == [
        "What",
        "Why",
        "Evidence",
        "What reviewers will ask",
    ]


def test_patched_trees_never_name_tie_ext(tree):
    for path in tree.rglob("*.py"):
        assert "tie_ext" not in path.read_text()


def test_new_files_parse_in_the_oldest_python(tree):
    added = [
        tree / name
        for patch in BUDGET
        for name, new in files(patch).items()
        if new and name.endswith(".py") and (tree / name).exists()
    ]
    assert added
    for path in added:
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_formatter_of_the_host_is_silent(tree):
    if find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    if not (tree / "tests" / "helpers").exists():
        pytest.skip(
            "this source has no tests/helpers, whose imports are sorted as its own: "
            "take a checkout of the repository"
        )
    ran(tree, "-m", "ruff", "check", "-q", ".")
    ran(tree, "-m", "ruff", "format", "--check", ".")


def test_imports_of_the_host_without_extras(tree):
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in EXTRAS)
    imported = f"[importlib.import_module('pytorch_ood.' + name) for name in {PACKAGES}]"
    ran(tree, "-c", f"import sys, importlib\n{blocked}{imported}")


def test_tests_of_the_patched_host_pass(tree):
    """All of the tree's tests where the source has them, else the patch's own."""
    if (tree / "tests/detectors/test_all_detectors_smoke.py").exists():
        where = ["tests"]
    else:
        if not (tree / "tests" / "helpers").exists():
            pytest.skip(
                "this source has no tests/helpers, which the tests of detectors import: "
                "take a checkout of the repository"
            )
        where = ["tests/detectors"]
    ran(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "log_cli=false", *where)


EQUAL_TIE = """
import torch, pytorch_ood
from pytorch_ood.detector import TIE
from tie_ext import TIEDetector
from tie_ext.scores.decision import decide, uncertainty
assert {tree!r} in pytorch_ood.__file__
for seed, (n, scale) in enumerate(((3, 1.0), (10, 5.0), (100, 20.0))):
    torch.manual_seed(seed)
    rows, logits = torch.arange(4000), scale * torch.randn(4000, n + 1)
    y = rows % n - (rows % 7 == 0) * n
    theirs = TIE(None, lam=0.5).fit_logits(logits, y)
    ours = TIEDetector(None, lam=0.5).fit_logits(logits, y)
    assert torch.equal(theirs.predict_logits(logits), ours.predict_logits(logits))
    expected = uncertainty(logits.softmax(1))
    torch.testing.assert_close(theirs.uncertainty(logits), expected, rtol=0, atol=1e-6)
    assert abs(theirs.tau - ours.tau) < 1e-6
    of = theirs.decide_logits(logits)
    assert torch.equal(of, decide(logits, theirs.tau).level) and len(of.unique()) == 3, of.unique()
    assert torch.equal(TIE(None).decide_logits(logits), decide(logits).level)
assert TIE(None).lam == TIEDetector(None).lam
print("equal")
"""

EQUAL_COMBINED = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from pytorch_ood.detector import Combined, EnergyBased, GEN, Mahalanobis, ODIN
from tie_ext import Combined as Ours
from tie_ext.scores.combination import FORMULAS
torch.manual_seed(0)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.fc = nn.Linear(10, 8), nn.Linear(8, 3)
    def features(self, x):
        return self.first(x.flatten(1)).relu()
    def forward(self, x):
        return self.fc(self.features(x))
net = Net().eval()
x, y = torch.rand(300, 1, 2, 5), torch.arange(300) % 3
training = DataLoader(TensorDataset(x[:150], y[:150]), 32)
held = DataLoader(TensorDataset(x[150:250], y[150:250]), 32)
members = [GEN(net), EnergyBased(net), Mahalanobis(net.features).fit(training)]
members.append(ODIN(net, temperature=1.0))
close = {"rtol": 1e-4, "atol": 1e-3}  # in deviations: rows are summed in another order
new = torch.cat([x[250:], 10 * torch.randn(50, 1, 2, 5)])
def ours_by(name):
    detector = Ours(members, None)
    detector.rule = "zsum" if name == "stouffer" else name  # of which it chooses among two
    return detector
(rules,) = Combined.hyperparameter_space.values()
assert {name if name != "stouffer" else "zsum" for name in rules} == {*FORMULAS} - {"tail", "tails"}
for name in rules:
    ours = ours_by(name).fit(held)
    theirs = Combined(members, rule=name).fit(held)
    scores = ours.predict(new)
    assert scores.unique().numel() > 10
    torch.testing.assert_close(theirs.predict(new), scores, **close)
    of_held, of_new = ours.scores(x[150:250]), ours.scores(new)
    same = Combined(members, rule=name).fit_scores(of_held).predict_scores(of_new)
    fitted = ours_by(name).fit_scores(of_held)
    torch.testing.assert_close(same, fitted.predict_scores(of_new), **close)
print("equal")
"""


def test_scores_and_levels_of_tie_equal_ours(tree):
    if not (tree / "src/pytorch_ood/detector/tie.py").exists():
        pytest.skip("this tree has 0002 alone")
    assert ran(tree, "-c", EQUAL_TIE.replace("{tree!r}", repr(str(tree)))) == "equal\n"


def test_scores_of_combined_equal_ours(tree):
    if not (tree / "src/pytorch_ood/detector/combined.py").exists():
        pytest.skip("this tree has 0001 alone")
    assert ran(tree, "-c", EQUAL_COMBINED) == "equal\n"


STAND_INS = """
import torch, torchvision.datasets as sets
from torch.utils.data import TensorDataset
class Few(torch.utils.data.Dataset):
    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        self.x, self.y = torch.rand(60, 1, 28, 28), torch.arange(60) % 10
        self.target = target_transform
    def __len__(self):
        return 60
    def __getitem__(self, i):
        return self.x[i], int(self.y[i]) if self.target is None else self.target(int(self.y[i]))
sets.MNIST = sets.FashionMNIST = Few
"""


def test_example_of_the_patch_runs(tree):
    """On a few images that are made up, for one epoch."""
    path = tree / "examples/detectors/tie.py"
    if not path.exists():
        pytest.skip("this tree has 0002 alone")
    code, changes = re.subn(
        r"range\((3|100)\)", "range(1)", path.read_text().replace("range(10000)", "range(60)")
    )
    assert changes == 2
    printed = ran(tree, "-c", STAND_INS + code)
    assert "AUROC" in printed
    assert "OOD accepted, garbage, uncertain:" in printed
