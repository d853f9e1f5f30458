"""The rules of the house: who imports whom, no code that runs from files, every public name
documented.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tie_ext

HOUSE = Path(tie_ext.__file__).parent
FLOORS = [
    "utils",
    "scores",
    "models",
    "outliers",
    "training",
    "pytorch_ood",
    "tie_ext",
    "openood",
    "cli",
    "cli.reproduce",
    "cli.main",
]
"""From the ground up; a room imports from itself and from those below its own."""
CORE = {"torch", "numpy", "safetensors", "tqdm", "filelock"}
OUTSIDE = {
    **dict.fromkeys(("utils", "scores", "models", "outliers", "training", "tie_ext"), CORE),
    "pytorch_ood": {"torch", "pytorch_ood", "numpy", "scipy", "sklearn"},
    "openood": {"torch", "torchvision", "openood", "pytorch_ood", "tqdm"},
    "cli": CORE
    | {"PIL", "matplotlib", "pillow_heif", "pytorch_ood", "sklearn", "timm", "torchvision"},
    "cli.reproduce": {"torch", "tqdm", "openood", "pytorch_ood"},
    "cli.main": {"torch"},
}
"""What each room may import that is not ours and not Python's own."""
HERE = {**os.environ, "PYTHONPATH": str(HOUSE.parent)}
"""For a process that runs in another folder."""
ROOMS = sorted(HOUSE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``support.files`` of ``tie_ext/utils/files.py``; the front door is ``tie_ext``."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "tie_ext"


def floor(room: str) -> str:
    """The floor of a room: the longest that its name begins with."""
    return max((f for f in FLOORS if room == f or room.startswith(f + ".")), key=len)


def imports(path):
    """Every module that a file imports; of ``from package import name`` the module
    ``package.name`` where it is one.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: rooms are imported by their whole names"
            assert node.module is not None
            for name in (alias.name for alias in node.names):
                yield f"{node.module}.{name}" if is_room(f"{node.module}.{name}") else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def is_room(module: str) -> bool:
    inside = HOUSE.parent / module.replace(".", "/")
    return inside.is_dir() or inside.with_suffix(".py").is_file()


def ours(path):
    """The rooms that a file imports."""
    return [
        name.removeprefix("tie_ext.") for name in imports(path) if name.split(".")[0] == "tie_ext"
    ]


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_a_room_imports_only_from_its_own_floor_and_those_below(path):
    mine = FLOORS.index(floor(name_of(path)))
    assert not {room for room in ours(path) if FLOORS.index(floor(room)) > mine}


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_a_room_needs_the_packages_of_its_floor_only(path):
    outside = (
        {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"tie_ext"}
    )
    assert outside <= OUTSIDE[floor(name_of(path))]


def test_the_law_would_notice(tmp_path):
    (tmp_path / "room.py").write_text(
        "from tie_ext.cli import data\nfrom tie_ext import TIENet\nimport tie_ext.utils.files\n"
    )
    assert [floor(room) for room in ours(tmp_path / "room.py")] == ["cli", "tie_ext", "utils"]
    assert FLOORS.index(floor("utils.settings")) < FLOORS.index(floor("models.network"))
    assert floor("cli.reproduce.tables") == "cli.reproduce"


@pytest.mark.parametrize("path", sorted((HOUSE / "outliers").glob("*.py")), ids=lambda p: p.stem)
def test_a_papers_file_needs_no_other_papers(path):
    papers = {f"outliers.{p.stem}" for p in (HOUSE / "outliers").glob("*.py")} - {
        "outliers.__init__",
        "outliers.vae",
        "outliers.base",
        "outliers.primitives",
    }
    assert path.stem == "__init__" or not set(ours(path)) & papers - {f"outliers.{path.stem}"}


@pytest.mark.slow
def test_import_tie_ext_loads_no_host_and_no_plotting():
    code = "import sys, tie_ext; print({'pytorch_ood', 'openood', 'matplotlib', 'sklearn', 'torchvision', 'PIL'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


RETIRED = [
    r"Dice",
    r"Ranged",
    r"widened",
    r"processed",
    r"surest",
    r"sureness",
    r"evaluating",
    r"deployed",
    r"DeployedCombination",
    r"Held",
    r"Kept",
    r"Told",
    r"read_line",
    r"teach",
    r"decider",
    r"cutoff",
    r"held_out_loader",
    r"MOST_LAYERS",
    r"MOST_CHANNELS",
    r"support.modules",
    r"stouffer",
    r"objective",
]
"""Identifiers that were replaced by the field's own; two of them stay in saved files."""
FILES_NAME_THEM = {"stouffer": ("saved_rule",), "objective": ("RENAMED", "configs of 0.2.0")}
"""What stands in the files that read them."""
PHRASES = [
    "draw the line",
    "drawn image",
    "painted",
    "brushes",
    "who proposes",
    "somebody search",
    "searched image",
    "is told by",
    "taught by",
    "who has to learn",
]
"""Words of our own in prose; the field says threshold, procedural, adversarial, trained."""


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_retired_words_stay_away(path):
    text = path.read_text()
    for word in RETIRED:
        if not any(reader in text for reader in FILES_NAME_THEM.get(word, ())):
            assert not re.search(rf"(?<!\w){re.escape(word)}\b", text), word
    assert not [phrase for phrase in PHRASES if phrase in text.lower()]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "tie_ext/cli/clothes/README.md"])
def test_user_pages_speak_the_fields_language(page):
    assert not [phrase for phrase in PHRASES if phrase in project_file(page).lower()]


@pytest.mark.parametrize(
    "page",
    [p for p in sorted((HOUSE.parent / "docs").rglob("*")) if p.suffix in (".md", ".ipynb")],
    ids=lambda path: path.stem,
)
def test_pages_of_docs_speak_the_fields_language(page):
    assert not [phrase for phrase in PHRASES if phrase in page.read_text().lower()]


@pytest.mark.parametrize("path", ROOMS, ids=name_of)
def test_no_room_pins_a_device_evaluates_text_or_prints(path):
    text = path.read_text().replace("``.cuda()``", "")
    assert not re.search(
        r"\.cuda\(|\bpickle\b|torch\.load\((?!.*weights_only=True)|(?<![\w.])eval\(|(?<![\w.])exec\(",
        text,
    )
    assert name_of(path).startswith("cli.") or not re.search(r"(?<![\w.])print\(", text)


def test_the_front_door():
    assert set(tie_ext.__all__) <= set(dir(tie_ext))
    assert set(tie_ext.__all__) == {
        *("attach", "explain", "TIENet", "TIETrainer", "TIEConfig", "Decision"),
        *("combine", "TIEDetector", "Combined"),
    }
    with pytest.raises(AttributeError, match="no attribute 'Conv3'"):
        tie_ext.Conv3  # noqa: B018


PUBLIC = [
    (module, name)
    for module in ("tie_ext", "tie_ext.outliers", "tie_ext.pytorch_ood")
    for name in import_module(module).__all__
]


@pytest.mark.parametrize(
    ("module", "name"), PUBLIC, ids=lambda value: value.removeprefix("tie_ext.")
)
def test_public_names_are_documented_and_annotated(module, name):
    thing = getattr(import_module(module), name)
    if isinstance(thing, dict):
        return  # a registry
    assert inspect.getdoc(thing)
    members = (
        [thing]
        if inspect.isfunction(thing)
        else [m for k, m in vars(thing).items() if inspect.isfunction(m) and not k.startswith("_")]
    )
    for member in members:
        assert inspect.getdoc(member), member
        hints = inspect.get_annotations(member)
        missing = [
            name
            for name, p in inspect.signature(member).parameters.items()
            if name not in hints
            and name != "self"
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        assert not missing, (member, missing)


EXTRAS = [
    "pytorch_ood",
    "openood",
    "torchvision",
    "matplotlib",
    "sklearn",
    "PIL",
    "scipy",
    "pandas",
]


@pytest.mark.slow
def test_a_name_that_needs_pytorch_ood_says_how_to_install_it():
    code = "import sys; sys.modules['pytorch_ood'] = None; from tie_ext import attach, combine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=HERE)
    assert "ImportError: tie_ext.combine needs pytorch-ood" in done.stderr
    assert done.stderr.endswith("; pip install 'pytorch-ood>=0.4'\n")


@pytest.mark.slow
def test_the_core_works_without_extras():
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({EXTRAS})); runpy.run_path('tests/minimal.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE.parent
    )
    assert done.returncode == 0, done.stderr
    assert "no extras" in done.stdout


def project_file(name: str) -> str:
    return (HOUSE.parent / name).read_text()


def test_the_wheel_holds_every_room():
    (listed,) = re.findall(
        r"^\[tool\.setuptools\]\npackages = (\[.*?\])", project_file("pyproject.toml"), re.M | re.S
    )
    folders = {
        path.parent.relative_to(HOUSE.parent).as_posix().replace("/", ".") for path in ROOMS
    }
    assert set(ast.literal_eval(listed)) == folders | {"tie_ext.openood_configs"}
    assert all(
        (HOUSE.parent / folder.replace(".", "/") / "__init__.py").is_file() for folder in folders
    )


def test_citation_and_changelog_are_of_this_version():
    (cited,) = re.findall(r"^version: (\S+)$", project_file("CITATION.cff"), re.M)
    changes = re.findall(r"^## \[(\S+)\]", project_file("CHANGELOG.md"), re.M)
    assert cited == tie_ext.__version__
    assert changes[:2] == ["Unreleased", tie_ext.__version__]


def test_the_changelog_sends_to_what_exists():
    changes = project_file("CHANGELOG.md").partition(f"\n## [{tie_ext.__version__}]")[2]
    for name in re.findall(
        r"`(tie_ext(?:\.\w+)+)`",
        "".join(re.findall(r"^\|[^|]*\|(.*)\|$", changes.partition("\n## [")[0], re.M)),
    ):
        module = name if is_room(name) else name.rpartition(".")[0]
        assert is_room(module), name
        assert module == name or re.search(
            rf"^(class|def) {(short := name.rpartition('.')[2])}\b|^    \"{short}\",$",
            room_file(module),
            re.M,
        ), name


def room_file(module: str) -> str:
    path = HOUSE.parent / module.replace(".", "/")
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()


def test_the_rooms_in_contributing_are_those_there_are():
    table = (
        project_file("CONTRIBUTING.md").partition("## The subpackages")[2].partition("\n## ")[0]
    )
    named = {word.strip("/") for word in re.findall(r"`([\w/]+?)`", table)}
    front = {path.stem for path in HOUSE.glob("*.py")} - {"__init__"}
    assert {
        path.name for path in HOUSE.iterdir() if (path / "__init__.py").is_file()
    } | front <= named
