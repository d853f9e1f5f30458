"""After the threshold: ``score --monitor``, ``calibrate`` and ``report --images``."""

import json

import numpy as np
import pytest
import torch
from conftest import SHAPE
from PIL import Image
from pytorch_ood.detector import EnergyBased

from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.cli.main import main
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
def folder(images, tmp_path):
    """A saved detector that was fitted to the usual images."""
    torch.manual_seed(0)
    net = TIENet(Conv3(1, 3), 3, SHAPE, class_names=("a", "b", "c"), head="multilayer").eval()
    held = [np.asarray(Image.open(path)) for path in sorted(images["held"].iterdir())]
    x = torch.from_numpy(np.stack(held))[:, None].float() / 255
    net.garbage.standardise(net.statistics(x)[1].detach())
    Combined([TIEDetector(net), EnergyBased(net)]).fit([x]).save(tmp_path / "detector")
    return tmp_path / "detector"


def test_a_monitor_is_carried_from_run_to_run(folder, images, tmp_path, capsys):
    state = tmp_path / "states" / "state.json"
    score = ["score", str(folder), "--monitor", str(state), "--out", str(tmp_path / "rows.csv")]
    assert main([*score, str(images["usual"])]) == 0
    assert "monitor: no drift in 120 images" in capsys.readouterr().err
    assert main([*score, str(images["changed"])]) == 3
    said = capsys.readouterr().err
    assert "monitor: DRIFT, found at image" in said
    assert "of 180" in said
    assert "95 % interval" in said
    assert main([*score, str(images["usual"])]) == 3  # an alarm stays
    assert json.loads(state.read_text())["images"] == 300
    # After calibration it is another scale, and the old state is refused.
    assert main(["calibrate", str(folder), str(images["changed"])]) == 0
    assert main([*score, str(images["usual"])]) == 1
    assert "from before it was calibrated" in capsys.readouterr().err


def test_an_unreadable_image_is_not_monitored(folder, images, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no image")
    state, usual = tmp_path / "state.json", str(images["usual"] / "0000.png")
    score = ["score", str(folder), str(tmp_path / "broken.png"), usual, "--monitor", str(state)]
    assert main(score) == 1
    assert json.loads(state.read_text())["images"] == 1


def test_a_detector_without_calibration_scores_is_to_be_calibrated(
    folder, images, tmp_path, capsys
):
    (folder / "detector.json").unlink()
    state = str(tmp_path / "state.json")
    score = ["score", str(folder), str(images["usual"]), "--monitor", state]
    assert main(score) == 1
    assert "run tie-ext calibrate" in capsys.readouterr().err
    assert main(["calibrate", str(folder), str(images["held"])]) == 0
    assert main(score) == 0


def test_calibrate_sets_the_threshold_anew(folder, images, capsys):
    before = load_detector(folder)
    given = ["--guarantee", "pac", "--confidence", "0.9", "--false-alarm", "0.1"]
    assert main(["calibrate", str(folder), str(images["changed"]), *given]) == 0
    said, after = capsys.readouterr().out, load_detector(folder)
    assert "before: 60 of 60 images rejected" in said
    assert "at most 0.1 of new ID images are rejected, with confidence 0.9" in said
    assert after.threshold > before.threshold
    assert (after.guarantee, after.confidence, after.false_alarm) == ("pac", 0.9, 0.1)
    assert len(after.calibration_scores) == len(after.calibration_labels) == 60
    assert torch.equal(after.reference.mean, before.reference.mean)
    # What was chosen stays, and too few images change nothing.
    assert main(["calibrate", str(folder), str(images["changed"] / "0000.png")]) == 1
    assert "at least 22 ID images" in capsys.readouterr().err
    assert load_detector(folder).threshold == after.threshold
    assert main(["calibrate", str(folder), str(images["changed"]), "--false-alarm", "0"]) == 2


def test_rejected_images_are_grouped_shown_and_exported(folder, images, tmp_path, capsys):
    out = tmp_path / "groups"
    report = ["report", str(folder), "--images", str(images["changed"]), "--export", str(out)]
    assert main(report) == 0
    page = (folder / "rejected.html").read_text()
    assert capsys.readouterr().out.strip() == str(folder / "rejected.html")
    assert "60 of 60 images are rejected" in page
    assert "http" not in page
    assert page.count("<img") >= 16
    copies = [path.name for path in out.rglob("*.png")]
    assert len(copies) == len(set(copies)) > 50
    assert main(report) == 1  # nothing is overwritten
    assert "Expected a new folder for --export" in capsys.readouterr().err
    assert main(["report", str(folder), "--export", str(out)]) == 2
