"""``tie-ext score``: a row per image, by the detector of a run or a saved one."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_net

from cli.conftest import rows_of, run
from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.cli.transform import load_transform
from tie_ext.utils.files import load_state


def images_of(folder) -> list[Path]:
    return sorted((folder / "test").rglob("*.png"))


def decided(net, files, transform):
    return torch.stack([net.from_unit(transform.read(file).float() / 255) for file in files])


def test_a_row_of_each_image(attached, folder, capsys):
    files = images_of(folder)[::-1]
    assert run("score", attached, *files) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row["image"] for row in rows] == list(map(str, files))
    detector = Combined.load(attached)
    found = detector.decide(decided(detector.network, files, load_transform(attached)))
    levels = ("accepted", "garbage", "uncertain")
    assert [row["level"] for row in rows] == [levels[level] for level in found.level]
    names = [("bright", "dark")[label] for label in found.label]
    kept = [name if level == 0 else "" for name, level in zip(names, found.level, strict=True)]
    assert [row["label"] for row in rows] == kept
    for column, values in (("score", found.score), ("uncertainty", found.uncertainty)):
        shown = [float(row[column]) for row in rows]
        assert shown == pytest.approx(values.tolist(), abs=1e-3, rel=1e-3)


@pytest.mark.parametrize("run_of", ["attached", "trained"])
def test_a_threshold_for_another_rate(run_of, folder, request, capsys):
    out = request.getfixturevalue(run_of)
    name = {"attached": "combined", "trained": "TIE"}[run_of]
    known = load_state(out / "scores.safetensors", "scores")[name]["id"].sort().values
    threshold = known[math.ceil((len(known) + 1) * 0.75) - 1].item()
    for place in (out, out / "network.safetensors"):
        assert run("score", place, "--false-alarm", 0.25, folder) == 0
        rows = rows_of(capsys.readouterr().out)
        above = [float(row["score"]) - threshold for row in rows]
        # Which side a rounded score is of is not to be seen.
        clear = [i for i, distance in enumerate(above) if abs(distance) > 1e-3]
        assert len(clear) > 70
        assert all((rows[i]["level"] != "accepted") == (above[i] > 0) for i in clear)


def test_a_folder_read_by_workers(attached, folder, tmp_path, capsys):
    deep = tmp_path / "images"
    for i, file in enumerate(images_of(folder) * 4):  # more than one process decodes
        place = deep / f"{i % 3}" / "below" / f"{i:03d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    (deep / "notes.txt").write_text("no image")
    found = []
    for more in (["--workers", 0], ["--workers", 2, "--batch-size", 50]):
        assert run("score", attached, deep, "--out", tmp_path / "rows.csv", *more) == 0
        assert capsys.readouterr().out == ""
        found.append(rows_of((tmp_path / "rows.csv").read_text()))
    assert [row["image"] for row in found[0]] == sorted(map(str, deep.rglob("*.png")))
    for one, other in zip(*found, strict=True):
        assert (one["image"], one["level"]) == (other["image"], other["level"])
        assert float(one["score"]) == pytest.approx(float(other["score"]), abs=1e-3)


def test_files_that_are_no_images(attached, folder, tmp_path, capsys):
    shutil.copytree(folder / "test", tmp_path / "images")
    for name in ("0.png", "3.png"):
        (tmp_path / "images" / "dark" / name).write_bytes(b"no image")
    (tmp_path / "images" / "4.png").symlink_to("nowhere")
    strange = os.fsencode(tmp_path / "images" / "5") + b"\xff.png"
    (tmp_path / "images" / "dark" / "5.png").rename(os.fsdecode(strange))
    assert run("score", attached, tmp_path / "images", "--out", tmp_path / "rows.csv") == 1
    rows = rows_of((tmp_path / "rows.csv").read_text())
    broken = [row for row in rows if row["level"] == "unreadable"]
    assert len(rows) == 41
    assert [Path(row["image"]).name for row in broken] == ["4.png", "0.png", "3.png"]
    assert not any(row[name] for row in broken for name in ("label", "uncertainty", "score"))
    assert r"5\udcff.png" in {Path(row["image"]).name for row in rows}
    error = capsys.readouterr().err
    assert "4.png, but got: No such file or directory; 2 more are unreadable too" in error
    assert error.count("Expected") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "typo"], "Expected an image file at typo, or a folder of them, but there is"),
        (["nowhere", "x.png"], "Expected a run folder, or a network's file, at nowhere"),
        (["RUN", "empty"], "Expected images in empty or below it, but got none"),
        (["RUN", "network", "--false-alarm", 0.01], "Expected at least 99 ID images"),
        (["network", "network", "--false-alarm", 0.1], "Expected a tie_ext scores file at"),
        (["RUN", "network", "--out", "nowhere/rows"], "No such file or directory: 'nowhere/rows'"),
        (["RUN", "network"], "Expected an image file at network, but got: cannot identify image"),
    ],
)
def test_errors_in_one_line(arguments, message, attached, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(attached / "network.safetensors", "network")
    Path("empty").mkdir()
    words = [attached if word == "RUN" else word for word in arguments]
    assert run("score", *words) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "images are" not in line]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize("file", ["detector.safetensors", "network.safetensors"])
def test_damaged_files_of_a_run(file, attached, folder, tmp_path, refuses):
    out = Path(shutil.copytree(attached, tmp_path / "run"))
    (out / file).write_bytes(b"{}")
    refuses(f"{out / file}, but got", "score", out, folder)


def test_a_saved_detector_decides_as_its_run(attached, folder, tmp_path, capsys):
    Combined.load(attached).save(tmp_path / "saved")
    transform = load_transform(attached)
    transform.save(tmp_path / "saved")
    for more in ([], ["--false-alarm", 0.25]):
        rows = []
        for place in (attached, tmp_path / "saved"):
            assert run("score", place, folder / "test", *more) == 0
            rows.append(capsys.readouterr().out)
        assert rows[0] == rows[1]


def test_a_detector_with_a_threshold_of_its_own(attached, folder, tmp_path, capsys):
    net, files = TIENet.load(attached / "network.safetensors"), images_of(folder)
    x = decided(net, files, load_transform(attached))
    single = TIEDetector(net, false_alarm=0.25).fit([(x, torch.zeros(len(x)).long())])
    single.save(tmp_path)
    assert run("score", tmp_path, folder / "test") == 0
    said = capsys.readouterr()
    levels = [row["level"] != "accepted" for row in rows_of(said.out)]
    assert sum(levels) == int((single.decide(x).level > 0).sum()) > 0
    assert "images are squashed to 28 x 28 pixels" in said.err
    assert "as the detector does not say how its images were read" in said.err


@pytest.mark.parametrize("combined", [True, False])
def test_a_detector_without_a_threshold(combined, attached, folder, tmp_path, refuses):
    detector = Combined.load(attached)
    detector.threshold = None
    net = detector.network
    net.tau.fill_(math.inf)
    (detector if combined else TIEDetector(net)).save(tmp_path)
    refuses("Expected a detector with a threshold in", "score", tmp_path, folder)


def test_a_network_for_images_of_any_shape(folder, tmp_path, refuses):
    net = make_net()
    net.image_shape = None
    net.save(tmp_path / "network.safetensors")
    refuses(
        "Expected a network for images of one shape",
        "score",
        tmp_path / "network.safetensors",
        folder,
    )


@pytest.mark.parametrize("rate", ["2", "0", "nan", "much"])
def test_rates_out_of_range(rate, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("score", "run", "x.png", "--false-alarm", rate)
    assert stopped.value.code == 2
    assert "argument --false-alarm: " in capsys.readouterr().err
