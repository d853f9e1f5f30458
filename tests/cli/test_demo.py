"""``tie-ext demo``: what ships, what is said, and whose folder it may write to."""

import json
import re
import shutil

import pytest
import torch
from conftest import set_head_defaults

from tie_ext import TIEDetector, TIENet
from tie_ext.cli import demo, demo_images, registry, report
from tie_ext.cli.main import main
from tie_ext.pytorch_ood import load_detector
from tie_ext.utils.files import locked, write_atomically
from tie_ext.utils.weight_files import read_checkpoint

pytest.importorskip("PIL.Image")
STRANGERS = {"digits", "letters", "photographs", "noise"}


def test_shipped_images():
    train, calibration, new = demo_images.clothes()
    assert [len(images) for images in (train, calibration, new)] == [2000, 1600, 800]
    assert all(of.shape == (1, 28, 28) and len(of.classes) == 10 for of in (train, new))
    ood = demo_images.strangers()
    assert ood.keys() == STRANGERS
    assert all(len(of) >= 260 and of.x.float().std() > 10 for of in ood.values())


def test_shipped_network_knows_new_clothes():
    path = str(demo_images.NETWORK)
    model = registry.load("conv3", 1, 10, read_checkpoint(path))[0].eval()
    *_, new = demo_images.clothes()
    with torch.no_grad():
        right = model(new.x.float() / 255).argmax(1) == new.y
    assert right.double().mean() > 0.9


def test_shipped_files_are_small():
    sizes = {path.suffix: path.stat().st_size for path in demo_images.FOLDER.iterdir()}
    assert sizes[".safetensors"] < 2**20
    assert sizes[".png"] < 3 * 2**20


@pytest.fixture
def small_demo(monkeypatch):
    """A demo on few images, and the command that runs it into a folder."""
    train, calibration, new = demo_images.clothes()
    some = train.first(150), calibration.first(90), new.first(60)
    monkeypatch.setattr(demo_images, "clothes", lambda: some)
    sets = {name: of.first(20) for name, of in demo_images.strangers().items()}
    monkeypatch.setattr(demo_images, "strangers", lambda: sets)
    whole = demo.recipe
    few = {"epochs": 1, "candidates": 22, "pool_size": 40}
    monkeypatch.setattr(demo, "recipe", lambda seed=0: whole(seed, **few))
    set_head_defaults(monkeypatch, steps=150, epoch_steps=5)
    return lambda out, *more: main(["demo", "--out", str(out), *more])


@pytest.fixture
def without_page(monkeypatch):
    """A report of one line, as a page takes longer than all else."""

    def page(folder):
        write_atomically(folder / "figures" / "features.png", b"drawn")
        write_atomically(folder / "report.html", b"drawn")

    monkeypatch.setattr(report, "write_report", page)


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.slow
def test_demo_decides_and_shows(small_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    assert small_demo(out) == 0
    said = capsys.readouterr().out.splitlines()
    number = r"(\d+\.\d)%"
    pattern = f"{number} of new clothes accepted; rejected: " + ", ".join(
        f"{number} of {name}" for name in ("digits", "letters", "photographs", "noise")
    )
    shares = [float(of) for of in re.fullmatch(pattern, said[-1]).groups()]
    decision = json.loads((out / "run.json").read_text())["numbers"]["decision"]
    assert shares[0] == pytest.approx(100 * (1 - decision["measured"]), abs=0.06)
    found = [100 * decision["rejected"][name] for name in ("digits", "letters", "photographs")]
    assert shares[1:4] == pytest.approx(found, abs=0.06)
    page = (out / "report.html").read_text()
    assert "false alarms measured on new images" in page
    x = demo_images.clothes()[2].x[:5].float() / 255
    net = load_detector(out).network
    assert torch.equal(net(x), TIENet.load(out / "network.safetensors")(x))


@pytest.mark.slow
def test_demo_replaces_demos_alone(small_demo, without_page, tmp_path):
    out = tmp_path / "demo"
    assert small_demo(out) == 0
    first = files_of(out)
    mine = ["notes.txt", "epochs/mine.safetensors", "figures/holiday.png", "more/run.json"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    assert small_demo(out, "--seed", "1") == 0
    second = files_of(out)
    assert {name: second.pop(name) for name in mine} == dict.fromkeys(mine, b"mine")
    assert second.keys() == first.keys()
    assert second["network.safetensors"] != first["network.safetensors"]


@pytest.mark.slow
def test_demo_that_trains(small_demo, without_page, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    assert small_demo(out, "--train") == 0
    assert "of new clothes accepted" in capsys.readouterr().out.splitlines()[-1]
    assert len(json.loads((out / "run.json").read_text())["log"]) == 1
    assert isinstance(load_detector(out), TIEDetector) or (out / "detector.json").exists()
    assert small_demo(out) == 0  # in place of it


@pytest.mark.slow
@pytest.mark.parametrize("when", ["attach_in", "rejection"])
def test_stopped_demo_begins_again(when, small_demo, without_page, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo, when, stop)
        assert small_demo(tmp_path / "demo") == 130
    assert small_demo(tmp_path / "demo") == 0


CONTENTS = {
    "network.safetensors": "mine",
    "run.json": '{"settings": {"data": "marathon"}}',
    "report.html": "of nobody",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_demo_touches_no_other_folder(name, small_demo, tmp_path, capsys):
    (tmp_path / name).write_text(CONTENTS[name])
    before = files_of(tmp_path)
    assert small_demo(tmp_path) == 1
    said = f"Expected a folder for the demo, but got {tmp_path}, which holds {name}"
    assert said in capsys.readouterr().err
    assert files_of(tmp_path) == before


@pytest.mark.slow
def test_demo_touches_no_run_on_its_images(small_demo, without_page, tmp_path, capsys):
    weights = str(shutil.copy(demo_images.NETWORK, tmp_path / "mine.safetensors"))
    given = ["--backbone", "conv3", "--weights", weights, "--data", "demo"]
    assert main(["attach", *given, "--out", str(tmp_path / "run")]) == 0
    before = files_of(tmp_path / "run")
    assert small_demo(tmp_path / "run") == 1
    assert "Expected a folder for the demo" in capsys.readouterr().err
    assert files_of(tmp_path / "run") == before


def test_demo_waits_for_nobody(small_demo, tmp_path, capsys):
    with locked(tmp_path):
        assert small_demo(tmp_path) == 1
    assert f"Expected {tmp_path} to be free" in capsys.readouterr().err
    assert files_of(tmp_path) == {}
