"""The command line as a user types it, on small images written for the test."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tie_ext import EpochLog
from tie_ext.app.cli import main

Image = pytest.importorskip("PIL.Image")
FAST = ["--epochs", "3", "--candidates-per-class", "5", "--pool-size", "40", "--inversion-steps", "2", "--inversion-width", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and bright, in train and test."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for label, low in (("dark", 0), ("bright", 128)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 128, (40, 36, 3), dtype=np.uint8)).save(root / split / label / f"{i}.png")
    return root


def train(folder, out, *more):
    return ["train", "--data", f"folder:{folder}", "--size", "28", "--out", str(out), "--backbone", "conv3", *FAST, *more]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(train(folder, out)) == 0
    return out


def test_train_leaves_a_run_that_says_what_it_did(run):
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["recipe"]["config"]["epochs"] == 3
    assert len(record["log"]) == 3
    assert {"accuracy", "scores", "garbage_rate"} <= set(record["numbers"])
    assert {"command", "commit", "versions", "processor", "threads"} <= set(record)


def test_the_shift_is_a_setting_of_the_run(run, folder, tmp_path):
    assert main(train(folder, tmp_path / "still", "--shift", "0")) == 0
    records = [json.loads((path / "run.json").read_text()) for path in (run, tmp_path / "still")]
    assert [record["settings"]["shift"] for record in records] == [None, 0]
    assert records[0]["log"][0]["losses"] != records[1]["log"][0]["losses"]


@pytest.mark.parametrize("how", ["csv", "jsonl"])
def test_score_gives_one_row_an_image(run, folder, capsys, how):
    images = [str(folder / "test" / "dark" / f"{i}.png") for i in range(3)]
    assert main(["score", str(run), *images, "--format", how]) == 0
    out = capsys.readouterr().out
    rows = list(csv.DictReader(out.splitlines())) if how == "csv" else [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert {row["label"] for row in rows} <= {"bright", "dark"}
    assert all(int(row["level"]) in (0, 1, 2) and 0 <= float(row["uncertainty"]) <= 1 and float(row["score"]) for row in rows)


def test_score_by_a_threshold_rejects_no_more_test_images_than_asked(run, folder, capsys):
    images = [str(folder / "test" / label / f"{i}.png") for label in ("dark", "bright") for i in range(6)]
    for rate, most in ((0.25, 3), (0.5, 6)):
        assert main(["score", str(run), "--false-alarm", str(rate), *images]) == 0
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        kept = [float(row["score"]) for row in rows if row["level"] == "0"]
        rejected = [float(row["score"]) for row in rows if row["level"] != "0"]
        assert len(rejected) in (most - 1, most)  # the run scored these very images: one is the threshold, give or take its last bit
        assert max(kept) < min(rejected)


def test_report_is_one_page_that_needs_nothing_else(run, capsys):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 6
    assert "http" not in page.replace("http-equiv", "")
    assert "AUROC" in page
    assert "ID rejected" in page
    assert {"inversions.png", "metrics.png", "features.png", "curves_TIE.png"} <= {p.name for p in (run / "figures").iterdir()}


@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_help_says_what_each_setting_means(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # argparse breaks lines at hyphens
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--garbage-weight GARBAGE_WEIGHT Weight of the garbage class in the loss" in said
    assert "-inf excludes every candidate (--lam=-inf). Default: 2.0." in said
    assert "`" not in said


def test_every_inversion_can_be_expelled(folder, tmp_path):
    assert main(train(folder, tmp_path / "run", "--lam=-inf", "--epochs", "1")) == 0
    log = json.loads((tmp_path / "run" / "run.json").read_text())["log"][0]
    assert log["tau"] is None
    assert log["excluded"] == log["proposed"]


def test_other_synthesizers_are_a_flag_and_show_what_they_propose(folder, tmp_path):
    less = FAST[: FAST.index("--inversion-steps")]
    command = ["train", "--data", f"folder:{folder}", "--size", "28", "--out", str(tmp_path / "run"), *less, "--epochs", "1"]
    assert main([*command, "--synthesizer", "gradient,boundary"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert {"outliers_gradient.png", "outliers_boundary.png"} <= {p.name for p in (tmp_path / "run" / "figures").iterdir()}


def test_a_killed_run_resumes_and_ends_bit_identical(run, folder, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "tie_ext.app.cli", *train(folder, out)])
    while not (out / "training.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(["train", "--resume", str(out)]) == 0
    assert (out / "network.safetensors").read_bytes() == (run / "network.safetensors").read_bytes()
    assert (out / "scores.safetensors").read_bytes() == (run / "scores.safetensors").read_bytes()


def test_ctrl_c_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "tie_ext.app.cli", *train(folder, out, "--epochs", "500")]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a shell turns off in what it starts in the background
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=heard)
    while not (out / "training.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"tie-ext train --resume {out}" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "RUN", "missing.png"], "Expected an image file at missing.png"),
        (["score", "nowhere", "x.png"], "Expected a tie_ext network file at"),
        (["score", "RUN", "x.png", "--false-alarm", "0.01"], "Expected at least 99 ID images"),
        (["score", "RUN", "x.png", "--false-alarm", "2"], "Expected false_alarm to be a number in (0, 1]"),
        (["score", "ALONE", "x.png", "--false-alarm", "0.1"], "Expected a tie_ext scores file at"),
        (["report", "nowhere"], "Expected a run with a run.json"),
        (["train", "--resume", "nowhere"], "Expected a run with a run.json"),
        (["train", "--data", "nothing", "--out", "new"], "Expected a data set, one of mnist"),
        (["train", "--data", "folder:nowhere", "--out", "new"], "Expected a folder with one folder of images a class"),
        (["train", "--data", "mnist", "--root", "nowhere", "--out", "new"], "Expected mnist in nowhere"),
        (["train", "--data", "mnist", "--out", "RUN"], "holds a run; go on with"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "network.safetensors", tmp_path / "ALONE")
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "mnist"], "Expected --data and --out"),
        (["train", "--data", "mnist", "--out", "new", "--lr", "0"], "Expected lr to be a number in (0, 1]"),
        (["train", "--data", "mnist", "--out", "new", "--inversion-steps", "0"], "Expected steps to be an integer in [1, 1000000]"),
        (["train", "--data", "mnist", "--out", "new", "--synthesizer", "white", "--inversion-steps", "3"], "Expected --synthesizer inversion beside"),
        (["train", "--data", "mnist", "--out", "new", "--synthesizer", "magic"], "Expected a synthesizer, one of inversion"),
        (["train", "--resume", "RUN", "--epochs", "3"], "Expected --resume RUN alone or with --device, but got --epochs too"),
        (["train", "--resume", "RUN", "--data", "mnist", "--lr", "0.1"], "but got --data, --lr too"),
    ],
)
def test_wrong_flags_exit_as_argparse_does(run, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--epochs", "many"])
    assert stopped.value.code == 2


def test_a_threshold_is_found_beside_the_networks_file_too(run, folder, capsys):
    image = str(folder / "test" / "dark" / "0.png")
    rows = []
    for place in (run, run / "network.safetensors"):
        assert main(["score", str(place), "--false-alarm", "0.25", image]) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1]


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"data": 1},
        {"backbone": []},
        {"images": 0},
        {"size": 10**9},
        {"batch_size": None},
        {"shift": -1},
        {"ood": "mnist"},
        {"ood": [1]},
        {"download": "x"},
        {"data": "x" * 5000},
        {"recipe": 1},
    ],
    ids=str,
)
def test_a_run_of_wrong_settings_is_not_gone_on_with(copied, capsys, change):
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**record, "settings": {**record["settings"], **change}}))
    assert main(["train", "--resume", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("config", {"pool_size": 10**9}),
        ("synthesizers", {"inversion": {"width": 4096}}),
        ("synthesizers", {"white": 1}),
        ("synthesizers", {"inversion": {"height": 1}}),
        ("synthesizers", ["inversion"]),
        ("objective", []),
    ],
    ids=str,
)
def test_a_run_of_a_wrong_method_is_not_gone_on_with_and_nothing_is_made_by_it(copied, capsys, part, change):
    record = json.loads((copied / "run.json").read_text())
    recipe = record["settings"]["recipe"]
    recipe[part] = {**recipe[part], **change} if part == "config" else change
    (copied / "run.json").write_text(json.dumps(record))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["train", "--resume", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024 * (1024 if sys.platform == "darwin" else 1)


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("scores", "scores", {"../../x": {"id": torch.ones(3)}}),
        ("scores", "scores", {"TIE": {"noise": torch.ones(3)}}),
        ("scores", "scores", {"TIE": {"id": torch.tensor([1.0, float("nan")])}}),
        ("scores", "scores", {"TIE": 3}),
        ("epochs/0002", "snapshot", {"features": torch.ones(3, 2)}),
        ("epochs/0002", "snapshot", {"features": torch.full((3, 2), float("nan")), "labels": torch.zeros(3).long()}),
        ("epochs/0002", "snapshot", {"features": torch.ones(3, 2), "labels": torch.full((3,), 7)}),
        ("epochs/0002", "snapshot", {"features": torch.ones(3, 2), "labels": torch.zeros(3).long(), "inversions": torch.ones(3)}),
        ("epochs/0002", "snapshot", {"features": torch.ones(3, 2), "labels": torch.zeros(3).long(), "inversions": 1}),
        ("epochs/last", "snapshot", {"features": torch.ones(3, 2), "labels": torch.zeros(3).long()}),
        ("training", "training", {"log": []}),
        ("training", "training", {"log": [{"epoch": 1}]}),
    ],
)
def test_a_report_of_wrong_files_is_refused_and_writes_nothing_elsewhere(copied, capsys, name, kind, state):
    from tie_ext.support.files import save_state

    save_state(copied / f"{name}.safetensors", kind, state)
    before = {path for path in copied.parent.rglob("*") if path.is_file()}
    assert main(["report", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")
    assert {path for path in copied.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["", "[", "null", "[]", "{}", '{"settings": 1}', "[" * 100_000, "1" * 10_000])
def test_a_record_that_is_none_is_refused(copied, capsys, content):
    (copied / "run.json").write_text(content)
    for command in (["report", str(copied)], ["train", "--resume", str(copied)]):
        assert main(command) == 1
        assert capsys.readouterr().err.startswith("tie-ext: Expected ")


def test_a_link_to_nowhere_is_no_reason_to_begin_anew(copied, capsys):
    (copied / "training.safetensors").unlink()
    (copied / "training.safetensors").symlink_to("nowhere")
    assert main(["train", "--resume", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected a tie_ext training file")


def test_a_loss_that_overflowed_is_left_out_of_the_record(copied):
    from dataclasses import replace

    from tie_ext.app.run import finish, read_settings
    from tie_ext.support.files import load_state

    log = [EpochLog.of_record(entry) for entry in load_state(copied / "training.safetensors", "training")["log"]]
    trainer = SimpleNamespace(log=[replace(log[0], losses={"classifier": 1.0, "kl": float("inf")})], device=torch.device("cpu"))
    assert finish(copied, read_settings(copied), trainer, {})["log"][0]["losses"] == {"classifier": 1.0, "kl": None}


def test_results_that_are_no_numbers_are_refused(copied, capsys):
    record = json.loads((copied / "run.json").read_text())
    record["numbers"]["scores"]["score"]["noise"]["auroc"] = "x"
    (copied / "run.json").write_text(json.dumps(record))
    assert main(["report", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")


def test_a_network_that_takes_any_images_is_not_scored_by_the_command_line(copied, folder, capsys):
    from tie_ext import TIENet

    net = TIENet.load(copied / "network.safetensors")
    net.image_shape = None
    net.save(copied / "network.safetensors")
    assert main(["score", str(copied), str(folder / "test" / "dark" / "0.png")]) == 1
    assert "Expected a network for square images" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_scores_that_find_the_disk_full_say_so(run, folder):
    command = [sys.executable, "-m", "tie_ext.app.cli", "score", str(run), str(folder / "test" / "dark" / "0.png")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("tie-ext: Expected to write to the standard output, but got: No space left on device")
    assert done.stderr.count("\n") == 1


def test_the_demo_set_is_real_and_split(recwarn):
    from tie_ext.app import data

    train, test, ood = data.demo()
    assert train.shape == test.shape == (1, 28, 28)
    assert len(train) + len(test) == 1797
    assert set(ood) == {"photographs", "letters", "noise"}
    assert all(s.x.float().std() > 10 and s.x.dtype == torch.uint8 for s in (train, test, *ood.values()))


def test_mnist_loads_from_where_it_lies(data_root):
    from tie_ext.app import data

    train = data.load("mnist", "train", data_root)
    assert (len(train), train.shape, len(train.classes)) == (60_000, (1, 28, 28), 10)
    colour = data.load("mnist", "test", data_root, (3, 32, 32))
    assert colour.shape == (3, 32, 32)
    assert torch.equal(colour.x[:, 0], colour.x[:, 1])
