"""The packages that OpenOOD and its plug-in import: those that are missing are named, and the
documented lines install them.
"""

import re
import subprocess
import sys

import pytest
from conftest import find_openood
from openood_alone import imports, package

from hosts.openood.conftest import CONFIGS
from tie_ext.openood import requirements
from tie_ext.openood.requirements import LIBMR, PACKAGES, check_requirements

TREE = CONFIGS.parent
OPTIONAL = {"blackbox_attacks", "clip", "losses"}
"""What parts of OpenOOD import when they are used, and nobody can install with a line."""


def entries(name: str) -> dict[str, str]:
    """The requirements in a list of pyproject.toml, by the name of the distribution."""
    text = (TREE / "pyproject.toml").read_text()
    (listed,) = re.findall(rf"^{name} = \[(.*)\]$", text, re.M)
    found = re.findall(r'"([\w-]+)([^"]*)"', listed)
    assert len(dict(found)) == len(found)
    return dict(found)


def lacking(monkeypatch, *names: str, **versions: str) -> str:
    """What is said where some packages are missing, and others have the versions given."""
    fitting = {
        name: bound.removeprefix(">=") if bound.startswith(">=") else "0.1"
        for name, bound in PACKAGES.values()
    }
    found = {name: object() for name in (*PACKAGES, "libmr", "openood") if name not in names}
    monkeypatch.setattr(requirements, "find_spec", found.get)
    monkeypatch.setattr(requirements, "version", {**fitting, **versions}.get)
    try:
        check_requirements()
    except ImportError as error:
        return str(error)
    return ""


def test_imports_of_the_plug_in_and_the_extra():
    ours, others = imports(TREE)
    assert {"tie_ext.openood.combined", "tie_ext.pytorch_ood.knn", "tie_ext.training"} <= ours
    others = {package(name) for name in others}
    assert {"openood", "pytorch_ood", "torch"} <= others
    extra, declared = entries("openood"), entries("dependencies")
    for name in others - {"openood"} - set(declared):
        assert PACKAGES[name][0] in extra, name
    for name, bound in PACKAGES.values():
        assert bound in {**declared, **extra}[name], name
    # One opencv, the one that imgaug brings.
    assert [name for name in extra if "opencv" in name] == ["opencv-python"]


def test_packages_that_openood_imports():
    if (root := find_openood()) is None:
        pytest.skip("no OpenOOD: put a checkout at ~/OpenOOD or set OPENOOD_ROOT")
    ours, others = imports(TREE, root)
    assert "openood.postprocessors.openmax_postprocessor" in ours
    others = {package(name) for name in others}
    assert "faiss" in others
    assert others - {*PACKAGES, "libmr", *entries("dependencies")} <= OPTIONAL


@pytest.mark.parametrize("name", PACKAGES)
def test_each_missing_package_with_its_line(monkeypatch, name):
    said = lacking(monkeypatch, name)
    assert f"but got no {name}. " in said
    assert said.endswith("\n    pip install '{}{}'".format(*PACKAGES[name]))


def test_all_missing_and_unfit_packages_at_once(monkeypatch):
    unfit = {"numpy": "2.1.0", "pytorch-ood": "0.3.9"}
    said = lacking(monkeypatch, "imgaug", "faiss", "libmr", "openood", **unfit)
    assert "no imgaug, faiss, libmr, openood" in said
    assert "numpy 2.1.0 where numpy<2 is needed" in said
    assert "pytorch_ood 0.3.9 where pytorch_ood>=0.4 is needed" in said
    assert "pip install 'imgaug' 'faiss-cpu' 'numpy<2' 'pytorch-ood>=0.4'\n" in said
    assert LIBMR in said
    assert "git+https://github.com/Jingkang50/OpenOOD" in said


@pytest.mark.parametrize(
    ("name", "unfit", "fit"),
    [
        ("numpy", "2.0", "1.26.4"),
        ("opencv-python", "4.12.0.88", "4.11.0.86"),
        ("pytorch-ood", "0.3", "0.4.0"),
    ],
)
def test_versions_within_and_beyond_their_bounds(monkeypatch, name, unfit, fit):
    assert f" {unfit} where " in lacking(monkeypatch, **{name: unfit})
    assert lacking(monkeypatch, **{name: fit}) == ""


def commands(page: str) -> list[str]:
    """The first block of commands of a page's part on OpenOOD."""
    text = (TREE / page).read_text()
    block = re.search(r"^```\n(.*?)^```", text.partition("# OpenOOD\n")[2] or text, re.M | re.S)
    return re.sub(r" *\\\n *", " ", block[1]).splitlines()


def test_lines_of_every_page_and_of_ci():
    lines = commands("docs/how-to/hosts.md")
    install = "[openood]' && pip install --no-build-isolation libmr"
    assert lines[0].startswith(f"pip install -e '.{install} && git clone ")
    assert commands("openood_configs/README.md")[: len(lines)] == lines
    ci = (TREE / ".github/workflows/ci.yml").read_text()
    job = ci.partition("\n  openood:\n")[2].partition("\n\n")[0]
    wanted = [f"pip install '.{install}", "python tests/openood_alone.py"]
    assert re.findall(r"- run: (.*)", job) == wanted


@pytest.mark.slow
def test_the_extra_alone_is_enough(openood_root):
    command = [sys.executable, "-W", "ignore", TREE / "tests" / "openood_alone.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing is missing but OpenOOD" in done.stdout
