"""The patches for pytorch-ood apply to the tree they name, which passes its new tests then."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[1] / "patches"
OURS = sorted(PATCHES.glob("pytorch-ood/*.patch"))


@pytest.fixture(scope="module")
def pytorch_ood_root() -> Path:
    found = Path(os.environ.get("PYTORCH_OOD_ROOT", Path.home() / "pytorch-ood"))
    if not (found / "src" / "pytorch_ood").is_dir():
        pytest.skip(f"no source tree of pytorch-ood at {found}: unpack its source distribution there or set PYTORCH_OOD_ROOT")
    return found


def apply(tree: Path, patches: list[Path]) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    for patch in patches:
        run = subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tree, capture_output=True, text=True)
        assert run.returncode == 0, f"{patch.name}: {run.stderr}"


def copy(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to, ignore=shutil.ignore_patterns(".git", "data", "results", "__pycache__")))


@pytest.mark.parametrize("patch", OURS, ids=lambda p: p.stem)
def test_a_patch_only_adds(patch):
    body = patch.read_text().partition("\n---\n")[2]
    for line in body.splitlines():
        assert line.startswith(("+", "@@ -", "diff --git ", "new file mode ", "--- a/", "--- /dev/null")), line
    assert len(re.findall(r"^@@ -\d+,0 ", body, re.M)) == body.count("\n@@ ")


def test_the_patched_pytorch_ood_passes_its_new_tests(pytorch_ood_root, tmp_path):
    tree = copy(pytorch_ood_root, tmp_path / "tree")
    apply(tree, OURS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests/detectors/test_tie.py"]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
