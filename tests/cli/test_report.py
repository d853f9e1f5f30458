"""``tie-ext report`` and ``tie-ext explain``: pages that need no other file, and their figures."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_net

from cli.conftest import files_of, record_of, run
from tie_ext.cli import explain, figures, report, tables
from tie_ext.cli.folder import written
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.cli.snapshots import load_examples, save_examples
from tie_ext.cli.transform import Transform
from tie_ext.scores.decision import Decision
from tie_ext.utils.files import save_state


@pytest.fixture
def copied(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("attached", 5), ("trained", 6)])
def test_a_page_that_needs_nothing_else(name, count, request, tmp_path, capsys):
    out = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "run"))
    assert run("report", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "report.html")
    page, numbers = (out / "report.html").read_text(), record_of(out)["numbers"]
    assert page.count("<figure>") == count
    assert page.count('<ul class="gallery">') == len(numbers["garbage_rate"]) + 1
    assert "http" not in page
    assert f"{numbers['accuracy']:.1%} accurate" in page
    assert "ID rejected" in page
    assert "false alarms" in page
    assert "&quot;versions&quot;" in page
    assert files_of(out).keys() == {path.relative_to(out).as_posix() for path in written(out)}


LOOK = """<script>addEventListener("load", () => {
const page = document.documentElement, images = [...document.images];
for (const part of document.querySelectorAll("details")) part.open = true;
page.dataset.found = [innerWidth, page.scrollWidth > innerWidth, images.length,
  images.filter(one => !one.naturalWidth || !one.alt).length].join(" ");
})</script></body>"""
"""Opens all parts and notes width, whether the page is wider, images, and those without picture or text."""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 800, 1200])
def test_a_page_in_a_browser(attached, width, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on the path")
    out = Path(shutil.copytree(attached, tmp_path / "run"))
    assert run("report", out) == 0
    page = tmp_path / "page.html"
    page.write_text((out / "report.html").read_text().replace("</body>", LOOK))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    command = [browser, *flags, f"--window-size={width},900", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r'data-found="(\d+) (\w+) (\d+) (\d+)"', dom)
    assert found
    assert found[1] == str(width)
    assert found[2] == "false"
    assert int(found[3]) > 5
    assert found[4] == "0"


@pytest.mark.slow
def test_what_a_network_has_learned(trained, folder, copied, tmp_path, capsys, refuses):
    assert run("explain", copied, "--steps", 2, "--root", tmp_path) == 0
    assert capsys.readouterr().out.strip() == str(copied / "explain.html")
    page = (copied / "explain.html").read_text()
    assert page.count('src="data:image/png;base64,') in (1, 2)  # 2 if anything was rejected
    assert re.search(r"takes [\d.]+ % of the inversions for the class", page)
    (copied / "examples.safetensors").unlink()
    refuses("Expected a run with examples.safetensors", "explain", copied)


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("scores", "scores", {"TIE": {"noise": torch.ones(3)}}),
        ("scores", "scores", {"TIE": 3}),
        ("epochs/0002", "snapshot", {"features": torch.ones(3, 2)}),
        ("training", "training", {"log": [{"epoch": 1}]}),
    ],
)
def test_damaged_files_of_a_run(name, kind, state, copied, refuses):
    save_state(copied / f"{name}.safetensors", kind, state)
    before = files_of(copied)
    refuses("tie-ext: Expected ", "report", copied)
    assert files_of(copied) == before


@pytest.mark.parametrize(
    "content", ["", "[", "null", "{}", '{"settings": 1}', "[" * 100_000, "1" * 10_000]
)
@pytest.mark.parametrize("command", [["report"], ["train", "--resume"]])
def test_damaged_records(content, command, tmp_path, refuses):
    (tmp_path / "run.json").write_text(content)
    refuses("tie-ext: Expected ", *command, tmp_path)


@pytest.mark.parametrize("command", ["report", "explain"])
def test_folders_without_a_run_or_an_epoch(command, attached, tmp_path, refuses):
    refuses("Expected a run with a run.json", command, tmp_path)
    shutil.copy(attached / "run.json", tmp_path)
    refuses("tie-ext: Expected ", command, tmp_path)


def test_captions_and_mistakes_of_shown_images():
    level, label = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 1])
    decision = Decision(label, torch.zeros(4), torch.tensor([-3.0, 7.5, 1.0, -2.0]), level)
    x = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    captions = ["accepted, cat, -3.0", "accepted, dog, -2.0", "garbage, dog, 7.5"]
    captions.append("uncertain, cat, 1.0")
    for name, mistakes in (("id", [0, 0, 1, 1]), ("letters", [1, 1, 0, 0])):
        shown = [image[1:] for image in report._shown(x, decision, name, ["cat", "dog"])]
        assert shown == list(zip(captions, map(bool, mistakes), strict=True))


@pytest.mark.parametrize(("accepted", "shown"), [(24, 10), (3, 3), (0, 0), (12, 5)])
def test_ten_images_of_a_set_are_shown(accepted, shown):
    level = (torch.arange(24) >= accepted).long()
    decision = Decision(level, torch.zeros(24), torch.zeros(24), level)
    x = torch.zeros(24, 1, 4, 4, dtype=torch.uint8)
    found = list(report._shown(x, decision, "id", ["cat", "dog"]))
    assert [of.mistake for of in found] == [False] * shown + [True] * (10 - shown)


def test_examples_from_all_over_a_sorted_set(tmp_path):
    x = torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)
    how = Transform.squash((1, 4, 4))
    images = ImageSet(x, torch.arange(250) // 25, tuple("abcdefghij"))
    save_examples(tmp_path, RunImages(images, images, {"b": images.first(3)}, how))
    kept = load_examples(tmp_path)
    assert list(kept) == ["id", "b"]
    assert set((kept["id"][:, 0, 0, 0] // 25).tolist()) == set(range(10))
    assert len(kept["b"]) == 3


def test_sets_of_a_run_of_0_2_0_with_a_decision():
    auroc = {"auroc": 0.5, "fpr95": 0.25}
    scores = {"score": {"noise": auroc}, "combined": {"noise": {**auroc, "auroc": 1.0}}}
    numbers = {"scores": scores, "garbage_rate": {"noise": 0.1}, "rejected": {"noise": 0.2}}
    (row,) = report._sets({**numbers, "decision": {"rejected": {"noise": 0.3}}})
    assert list(row.values()) == ["noise", "100.00", "25.00", "30.0", "10.0"]


def test_a_histogram_with_its_threshold():
    scores = {"id": torch.linspace(0, 1, 100), "noise": torch.linspace(2, 3, 50)}
    texts = [of.get_text() for of in figures.histograms(scores).axes[0].get_legend().get_texts()]
    assert "threshold 0.96: 5% of ID images are above it" in texts
    few = {**scores, "id": torch.linspace(0, 1, 5)}  # too few for one
    assert len(figures.histograms(few).axes[0].get_legend().get_texts()) == 2


def test_curves_from_one_id_image_on():
    scores = {"id": torch.linspace(0, 1, 200), "noise": torch.linspace(0.9, 2, 50)}
    figure = figures.roc_and_pr(scores)
    roc, pr = figure.axes
    assert (roc.get_xscale(), pr.get_xscale()) == ("log", "linear")
    assert roc.get_xlim() == (1 / 200, 1)
    for drawn in (figure, figures.histograms(scores)):
        drawn.canvas.draw()
        (legend,) = drawn.legends or [drawn.axes[0].get_legend()]
        boxes = [ax.get_window_extent() for ax in drawn.axes]
        assert not any(legend.get_window_extent().overlaps(box) for box in boxes)


def test_bars_of_two_images_on_one_scale():
    times = torch.tensor([[0.5, 3.0], [0.2, 0.9]])
    figure = figures.layer_bars(torch.zeros(2, 1, 8, 8), ["a", "b"], times, ["conv.1", "features"])
    bars = figure.axes[1::2]
    assert [ax.get_xlim() for ax in bars] == [(0, pytest.approx(3.15))] * 2
    red = [[patch.get_facecolor()[0] > 0.8 for patch in ax.patches] for ax in bars]
    assert red == [[False, True], [False, False]]


@pytest.mark.parametrize(("epochs", "shown"), [(10, "2 4 6 8 10"), (3, "1 2 3")])
def test_inversions_at_equal_distances(epochs, shown):
    black = torch.zeros(3, 2, 1, 28, 28, dtype=torch.uint8)
    snapshots = {epoch: {"inversions": black} for epoch in range(1, epochs + 1)}
    (ax,) = figures.inversions_over_epochs(snapshots, ["a", "b", "garbage"]).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == shown.split()
    picture = ax.images[0].get_array()
    assert picture.shape == (3 * 30, len(shown.split()) * 30)
    assert (picture[:, 28:30] == 255).all()
    assert (picture[:28, :28] == 0).all()


def test_rejected_images_from_all_over_a_set():
    letters = torch.zeros(20, 1, 12, 12, dtype=torch.uint8)

    def decide(x):
        level = torch.tensor([0, *[1] * 18, 2])
        return Decision(torch.zeros(20).long(), torch.zeros(20), torch.arange(20.0), level)

    names, examples = ("boot", "bag", "coat"), {"id": letters, "letters": letters}
    x, captions = explain.rejected(make_net(), decide, examples, names)
    assert len(x) == explain.SHOWN
    assert captions[0] == "letters: garbage, score 1.0, nearest class boot"
    assert captions[-1] == "letters: uncertain, score 19.0, nearest class boot"
    many = dict.fromkeys(("id", *"abcdef"), letters)
    _, captions = explain.rejected(make_net(), decide, many, names)
    assert [caption[0] for caption in captions] == list("aabbcdef")


@pytest.mark.parametrize(
    ("epochs", "said"),
    [
        ([(0.5, 0, 0)], ""),  # nothing was proposed
        ([(1.5, 2, 0), (0.5, 2, 1)], ""),
        ([(1.5, 2, 0), (0.75, 2, 0)], "tau was at least 0.75"),
        ([(None, 2, 0)], ""),
    ],
)
def test_loops_that_exclude_nothing(epochs, said):
    log = [{"tau": tau, "proposed": [n, 0], "excluded": [0, of]} for tau, n, of in epochs]
    assert said in tables.idle(log)
    assert bool(said) == bool(tables.idle(log))
