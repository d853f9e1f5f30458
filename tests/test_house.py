"""The rules of the house: who imports whom, no code that runs from files, every public name documented."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tie_ext

HOUSE = Path(tie_ext.__file__).parent
# What torch and numpy suffice for.
CORE = ["checks", "distributed", "decision", "files", "networks", "synthesis", "inversion", "exclusion", "metrics", "outliers", "training"]
ORDER = [*CORE, "pytorch_ood", "detectors", "__init__", "data", "comparison", "run", "report", "tables", "reproduce", "cli"]
ROOMS = sorted(path for path in HOUSE.rglob("*.py") if path.parent == HOUSE)
OUTLIERS = sorted((HOUSE / "outliers").glob("*.py"))
HOSTS = sorted((HOUSE / "openood").glob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ([f"tie_ext.{a.name}" for a in node.names] if node.module == "tie_ext" else [node.module])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_a_room_imports_only_rooms_above_it(path):
    assert path.stem in ORDER, "a new room needs a place in the order"
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("tie_ext.")}
    below = {room for room in inside if room in ORDER and ORDER.index(room) >= ORDER.index(path.stem)}
    assert not below


@pytest.mark.parametrize("path", OUTLIERS, ids=lambda p: p.stem)
def test_outliers_import_what_stands_above_them(path):
    assert not {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"tie_ext", "torch"}
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("tie_ext.")}
    assert inside <= {*CORE[: CORE.index("outliers")], "outliers"}


@pytest.mark.parametrize("path", HOSTS, ids=lambda p: p.stem)
def test_an_adapter_imports_the_core_only(path):
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("tie_ext.")}
    assert inside <= {*CORE, "openood"}


@pytest.mark.parametrize("path", [p for p in ROOMS if p.stem != "comparison"], ids=lambda p: p.stem)
def test_nothing_but_the_comparison_with_its_trainers_imports_the_adapter_to_openood(path):
    assert not any(name.startswith(("openood", "tie_ext.openood")) for name in imports(path))


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_the_core_needs_torch_and_numpy_only(path):
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"tie_ext"}
    if path.stem in [*CORE, "__init__"]:
        assert outside <= {"torch", "numpy", "safetensors", "tqdm"}


def test_import_tie_ext_loads_no_host_and_no_plotting():
    code = "import sys, tie_ext; print({'pytorch_ood', 'openood', 'matplotlib', 'sklearn', 'torchvision', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


@pytest.mark.parametrize("path", [*ROOMS, *OUTLIERS, *HOSTS], ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_no_room_pins_a_device_evaluates_text_or_prints(path):
    text = path.read_text().replace("``.cuda()``", "")
    assert not re.search(r"\.cuda\(|\bpickle\b|torch\.load\((?!.*weights_only=True)|(?<![\w.])eval\(|(?<![\w.])exec\(", text)
    assert path.stem == "cli" or not re.search(r"(?<![\w.])print\(", text)


@pytest.mark.parametrize("name", [*tie_ext.__all__, "TIEDetector", "UncertaintyEstimate"])
def test_public_names_are_documented_and_annotated(name):
    thing = getattr(tie_ext, name)
    assert inspect.getdoc(thing)
    members = [thing] if inspect.isfunction(thing) else [m for k, m in vars(thing).items() if inspect.isfunction(m) and not k.startswith("_")]
    for member in members:
        assert inspect.getdoc(member), member
        hints = inspect.get_annotations(member)
        missing = [p for p in inspect.signature(member).parameters if p not in hints and p != "self"]
        assert not missing or member.__qualname__ == "TIENet.forward", (member, missing)  # which its overloads annotate


BLOCKS = re.findall(r"```python\n(.*?)```", (HOUSE.parent / "README.md").read_text(), re.S)


@pytest.mark.parametrize(
    ("block", "written"), [*zip(BLOCKS, ["network.safetensors", "detector/detector.json"], strict=True)], ids=["alone", "pytorch-ood"]
)
def test_the_readme_runs(block, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / written).exists()


def test_the_tables_in_docs_are_those_of_the_records(monkeypatch):
    monkeypatch.syspath_prepend(HOUSE.parent / "tests" / "bench")
    import tables

    documents = tables.documents()
    assert "synthesizers.md" in documents
    stale = [name for name, text in documents.items() if (tables.DOCS / name).read_text() != text]
    assert not stale, "run `python tests/bench/tables.py`"
