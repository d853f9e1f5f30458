"""The packages that OpenOOD and its plug-in import: those that are missing are named, and the
documented lines install them.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import find_openood
from openood_alone import imports, package

from tie_ext.openood import requirements
from tie_ext.openood.requirements import LIBMR, PACKAGES, check_requirements

REPOSITORY = Path(__file__).parents[2]
OPTIONAL = {"blackbox_attacks", "clip", "losses"}
"""What parts of OpenOOD import when they are used, and nobody can install with a line."""


def entries(name: str) -> dict[str, str]:
    """The requirements in a list of pyproject.toml, by the name of the distribution."""
    (listed,) = re.findall(
        rf"^{name} = \[(.*)\]$", (REPOSITORY / "pyproject.toml").read_text(), re.M
    )
    found = re.findall(r'"([\w-]+)([^"]*)"', listed)
    assert len(dict(found)) == len(found)
    return dict(found)


def packages(modules: set[str]) -> set[str]:
    return {package(module) for module in modules}


def lacking(monkeypatch, *names: str, **versions: str) -> str:
    """The error where some packages are missing, and others have the versions given."""
    fitting = {
        name: bound.removeprefix(">=") if bound.startswith(">=") else "0.1"
        for name, bound in PACKAGES.values()
    }
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name in names else object()
    )
    monkeypatch.setattr(requirements, "version", lambda name: {**fitting, **versions}[name])
    with pytest.raises(ImportError) as error:
        check_requirements()
    return str(error.value)


def test_whatever_the_plug_in_imports_is_looked_for_and_in_the_extra():
    ours, others = imports(REPOSITORY)
    assert {
        "tie_ext.openood.combined",
        "tie_ext.openood.cpu",
        "tie_ext.pytorch_ood.knn",
        "tie_ext.training",
    } <= ours
    assert {"openood", "pytorch_ood", "torch"} <= packages(others)
    declared = entries("dependencies")
    for name in packages(others) - {"openood"} - set(declared):
        assert name in PACKAGES, f"{name} is imported, and check_requirements does not look for it"
        assert PACKAGES[name][0] in entries("openood"), (
            f"{name} is imported, and the extra openood does not install it"
        )


def test_whatever_openood_imports_is_looked_for():
    if (root := find_openood()) is None:
        pytest.skip("no OpenOOD: put a checkout at ~/OpenOOD or set OPENOOD_ROOT")
    ours, others = imports(REPOSITORY, root)
    assert "openood.postprocessors.openmax_postprocessor" in ours
    assert "faiss" in others
    assert packages(others) - {*PACKAGES, "libmr", *entries("dependencies")} <= OPTIONAL


def test_the_extra_installs_what_is_looked_for_in_the_same_versions():
    extra, declared = entries("openood"), entries("dependencies")
    for name, bound in PACKAGES.values():
        assert bound in {**declared, **extra}[name], name


def test_the_extra_has_one_opencv_the_one_that_imgaug_brings():
    assert [name for name in entries("openood") if "opencv" in name] == ["opencv-python"]


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch, name):
    said = lacking(monkeypatch, name)
    assert f"but got no {name}. " in said
    assert said.endswith("\n    pip install '{}{}'".format(*PACKAGES[name]))


def test_all_that_is_missing_or_unfit_is_named_at_once(monkeypatch):
    said = lacking(
        monkeypatch,
        "imgaug",
        "faiss",
        "libmr",
        "openood",
        **{"numpy": "2.1.0", "pytorch-ood": "0.3.9"},
    )
    assert "no imgaug, faiss, libmr, openood" in said
    assert "numpy 2.1.0 where numpy<2 is needed" in said
    assert "pytorch_ood 0.3.9 where pytorch_ood>=0.4 is needed" in said
    assert "pip install 'imgaug' 'faiss-cpu' 'numpy<2' 'pytorch-ood>=0.4'\n" in said
    assert LIBMR in said
    assert "git+https://github.com/Jingkang50/OpenOOD" in said


@pytest.mark.parametrize(
    ("unfit", "name"), [("2.0", "numpy"), ("4.12.0.88", "opencv-python"), ("0.3", "pytorch-ood")]
)
def test_a_version_that_does_not_fit_is_named(monkeypatch, unfit, name):
    assert f" {unfit} where " in lacking(monkeypatch, **{name: unfit})


def test_nothing_is_said_where_nothing_is_missing(monkeypatch):
    monkeypatch.setattr(requirements, "find_spec", lambda name: object())
    monkeypatch.setattr(
        requirements,
        "version",
        {
            "numpy": "1.26.4",
            "pandas": "2.3.3",
            "opencv-python": "4.11.0.86",
            "pytorch-ood": "0.4.0",
        }.get,
    )
    check_requirements()


def commands(page: str) -> list[str]:
    """The first block of commands of a page's part on OpenOOD."""
    text = (REPOSITORY / page).read_text().partition("# OpenOOD\n")[2] or (
        REPOSITORY / page
    ).read_text()
    block = re.search(r"^```\n(.*?)^```", text, re.M | re.S)[1]
    return re.sub(r" *\\\n *", " ", block).splitlines()


def test_every_page_and_ci_have_the_same_lines_and_they_install_the_extra():
    lines = commands("docs/how-to/hosts.md")
    assert lines[0].startswith(
        "pip install -e '.[openood]' && pip install --no-build-isolation libmr && git clone "
    )
    assert commands("openood_configs/README.md")[: len(lines)] == lines
    job = (
        (REPOSITORY / ".github/workflows/ci.yml")
        .read_text()
        .partition("\n  openood:\n")[2]
        .partition("\n\n")[0]
    )
    assert re.findall(r"- run: (.*)", job) == [
        "pip install '.[openood]' && pip install --no-build-isolation libmr",
        "python tests/openood_alone.py",
    ]


def test_the_extra_alone_is_enough(openood_root):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", REPOSITORY / "tests" / "openood_alone.py"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing is missing but OpenOOD" in done.stdout
