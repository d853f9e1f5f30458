"""``tie-ext demo``: what ships, what is said, and whose folder it may write to."""

import json
import re

import pytest
import torch
from conftest import set_head_defaults

from cli.conftest import files_of, record_of, run, stop
from tie_ext import TIENet
from tie_ext.cli import demo, demo_images, registry, report
from tie_ext.pytorch_ood import load_detector
from tie_ext.utils.files import write_atomically
from tie_ext.utils.weight_files import read_checkpoint

STRANGERS = ("digits", "letters", "photographs", "noise")


def test_shipped_images():
    train, calibration, new = demo_images.clothes()
    assert [len(images) for images in (train, calibration, new)] == [2000, 1600, 800]
    assert all(of.shape == (1, 28, 28) and len(of.classes) == 10 for of in (train, new))
    ood = demo_images.strangers()
    assert tuple(ood) == STRANGERS
    assert all(len(of) >= 260 and of.x.float().std() > 10 for of in ood.values())
    sizes = {path.suffix: path.stat().st_size for path in demo_images.FOLDER.iterdir()}
    assert sizes[".safetensors"] < 2**20
    assert sizes[".png"] < 3 * 2**20


def test_shipped_network_knows_new_clothes():
    model = registry.load("conv3", 1, 10, read_checkpoint(str(demo_images.NETWORK)))[0]
    *_, new = demo_images.clothes()
    with torch.no_grad():
        right = model(new.x.float() / 255).argmax(1) == new.y
    assert right.double().mean() > 0.9


@pytest.fixture
def small_demo(monkeypatch):
    """A demo on few images, and the command that runs it into a folder."""
    train, calibration, new = demo_images.clothes()
    some = train.first(150), calibration.first(90), new.first(60)
    monkeypatch.setattr(demo_images, "clothes", lambda: some)
    sets = {name: of.first(20) for name, of in demo_images.strangers().items()}
    monkeypatch.setattr(demo_images, "strangers", lambda: sets)
    few, whole = {"epochs": 1, "candidates": 22, "pool_size": 40}, demo.recipe
    monkeypatch.setattr(demo, "recipe", lambda seed=0: whole(seed, **few))
    set_head_defaults(monkeypatch, steps=150, epoch_steps=5)
    return lambda out, *more: run("demo", "--out", out, *more)


@pytest.fixture
def without_page(monkeypatch):
    """A report of one line, as a page takes longer than all else."""

    def page(folder):
        write_atomically(folder / "report.html", b"drawn")

    monkeypatch.setattr(report, "write_report", page)


@pytest.mark.slow
def test_what_a_demo_decides_and_shows(small_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    assert small_demo(out) == 0
    number = r"(\d+\.\d)%"
    others = ", ".join(f"{number} of {name}" for name in STRANGERS)
    said = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(f"{number} of new clothes accepted; rejected: {others}", said)
    shares, decision = list(map(float, found.groups())), record_of(out)["numbers"]["decision"]
    assert shares[0] == pytest.approx(100 * (1 - decision["measured"]), abs=0.06)
    rejected = [100 * decision["rejected"][name] for name in STRANGERS]
    assert shares[1:4] == pytest.approx(rejected[:3], abs=0.06)
    assert "false alarms measured on new images" in (out / "report.html").read_text()
    x = demo_images.clothes()[2].x[:5].float() / 255
    assert torch.equal(load_detector(out).network(x), TIENet.load(out / "network.safetensors")(x))


@pytest.mark.slow
def test_a_demo_takes_the_place_of_another(small_demo, without_page, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    with monkeypatch.context() as patched:
        patched.setattr(demo, "rejection", stop)
        assert small_demo(out, "--train") == 130
    assert len(record_of(out)["log"]) == 1
    (out / "epochs" / "mine.txt").write_text("mine")
    assert small_demo(out, "--seed", 1) == 0
    assert "log" not in record_of(out)
    files = files_of(out)
    assert files["epochs/mine.txt"] == b"mine"
    assert "training.safetensors" not in files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("network.safetensors", "mine"),
        ("run.json", json.dumps({"settings": {"data": "marathon"}})),
        ("report.html", "of nobody"),
    ],
)
def test_folders_of_others(name, content, small_demo, tmp_path, capsys):
    (tmp_path / name).write_text(content)
    assert small_demo(tmp_path) == 1
    said = f"Expected a folder for the demo, but got {tmp_path}, which holds {name}"
    assert said in capsys.readouterr().err
    assert files_of(tmp_path) == {name: content.encode()}
