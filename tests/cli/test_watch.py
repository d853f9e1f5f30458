"""After the threshold: ``score --monitor``, ``calibrate`` and ``report --images``."""

import json

import numpy as np
import pytest
import torch
from conftest import SHAPE
from PIL import Image
from pytorch_ood.detector import EnergyBased

from cli.conftest import run
from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.models.backbones import Conv3
from tie_ext.pytorch_ood import load_detector


def write(folder, count, low, high, seed):
    """Images of two kinds, sorted by kind as folders are by class."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        end = low + (high - low) * (i >= count // 2)
        pixels = rng.integers(0, end, SHAPE[1:]).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    return {
        "usual": write(place / "usual", 120, 60, 90, 1),
        "changed": write(place / "changed", 60, 200, 255, 2),
        "held": write(place / "held", 80, 60, 90, 3),
    }


@pytest.fixture
def detector(images, tmp_path):
    """The folder of a detector that was fitted to the usual images."""
    torch.manual_seed(0)
    net = TIENet(Conv3(1, 3), 3, SHAPE, class_names=("a", "b", "c"), head="multilayer").eval()
    held = [np.asarray(Image.open(path)) for path in sorted(images["held"].iterdir())]
    x = torch.from_numpy(np.stack(held))[:, None].float() / 255
    net.garbage.standardise(net.statistics(x)[1].detach())
    Combined([TIEDetector(net), EnergyBased(net)]).fit([x]).save(tmp_path / "detector")
    return tmp_path / "detector"


def test_a_monitor_carried_from_run_to_run(detector, images, tmp_path, capsys, refuses):
    state = tmp_path / "states" / "state.json"
    score = ["score", detector, "--monitor", state, "--out", tmp_path / "rows.csv"]
    assert run(*score, images["usual"]) == 0
    assert "monitor: no drift in 120 images" in capsys.readouterr().err
    assert run(*score, images["changed"]) == 3
    said = capsys.readouterr().err
    assert "monitor: DRIFT, found at image" in said
    assert "of 180: since about image" in said
    assert "95 % interval" in said
    assert run(*score, images["usual"]) == 3  # an alarm stays
    assert json.loads(state.read_text())["images"] == 300
    # After calibration it is another scale, and the old state is refused.
    assert run("calibrate", detector, images["changed"]) == 0
    refuses("from before it was calibrated", *score, images["usual"])


def test_an_unreadable_image_is_not_monitored(detector, images, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    state, usual = tmp_path / "state.json", images["usual"] / "0000.png"
    assert run("score", detector, tmp_path / "broken.png", usual, "--monitor", state) == 1
    assert json.loads(state.read_text())["images"] == 1


def test_a_monitor_without_calibration_scores(detector, images, tmp_path, refuses):
    (detector / "detector.json").unlink()
    score = ["score", detector, images["usual"], "--monitor", tmp_path / "state.json"]
    refuses("run tie-ext calibrate", *score)
    assert run("calibrate", detector, images["held"]) == 0
    assert run(*score) == 0


def test_a_threshold_set_anew(detector, images, capsys, refuses):
    before = load_detector(detector)
    given = ["--guarantee", "pac", "--confidence", 0.9, "--false-alarm", 0.1]
    assert run("calibrate", detector, images["changed"], *given) == 0
    said, after = capsys.readouterr().out, load_detector(detector)
    assert "before: 60 of 60 images rejected" in said
    assert "at most 0.1 of new ID images are rejected, with confidence 0.9" in said
    assert after.threshold > before.threshold
    assert (after.guarantee, after.confidence, after.false_alarm) == ("pac", 0.9, 0.1)
    assert len(after.calibration_scores) == len(after.calibration_labels) == 60
    assert torch.equal(after.reference.mean, before.reference.mean)
    # What was chosen stays, and too few images change nothing.
    refuses("at least 22 ID images", "calibrate", detector, images["changed"] / "0000.png")
    assert load_detector(detector).threshold == after.threshold
    assert run("calibrate", detector / "detector.json", images["changed"]) == 1
    assert run("calibrate", detector, images["changed"], "--confidence", 1) == 1


def test_a_threshold_for_each_class(detector, images, capsys):
    assert run("calibrate", detector, images["usual"], "--per-class") == 0
    assert load_detector(detector).threshold.ndim == 1
    assert "of each predicted class with enough images" in capsys.readouterr().out
    assert run("calibrate", detector, images["usual"]) == 0
    assert "of 120 images rejected" in capsys.readouterr().out


def test_rejected_images_in_groups(detector, images, tmp_path, capsys):
    out = tmp_path / "groups"
    report = ["report", detector, "--images", images["changed"], "--export", out]
    assert run(*report) == 0
    page = (detector / "rejected.html").read_text()
    assert capsys.readouterr().out.strip() == str(detector / "rejected.html")
    assert "60 of 60 images are rejected" in page
    assert "http" not in page
    assert page.count("<img") >= 16
    copies = [path.name for path in out.rglob("*.png")]
    assert len(copies) == len(set(copies)) > 50
    assert run(*report) == 1  # nothing is overwritten
    assert "Expected a new folder for --export" in capsys.readouterr().err
    assert run("report", detector, "--export", out) == 2
