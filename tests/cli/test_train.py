"""``tie-ext train``: what a run leaves, how it is resumed, and what its flags do."""

import json
import shutil

import pytest
import torch

from cli.conftest import files_of, make, record_of, run, stop, train
from tie_ext import TIEDetector, TIENet, TIETrainer
from tie_ext.cli import data
from tie_ext.cli.folder import load_network
from tie_ext.cli.transform import load_transform
from tie_ext.utils.files import load_state, locked


def test_record_network_and_scores_of_a_run(trained, folder):
    record = record_of(trained)
    assert record["settings"]["recipe"]["config"]["epochs"] == 3
    assert {"command", "commit", "versions", "processor", "threads", "transform"} <= set(record)
    assert [entry["epoch"] for entry in record["log"]] == [1, 2, 3]
    assert {"head", "classifier"} <= set(record["log"][0]["losses"])
    held = data.find(f"folder:{folder / 'train'}", "test", "", load_transform(trained), seed=3)
    assert record["test_images"] == held.note
    x = held.loaded().x.float() / 255
    net = TIENet.load(trained / "network.safetensors")
    scores = load_state(trained / "scores.safetensors", "scores")["TIE"]["id"]
    torch.testing.assert_close(scores, net.decide(x).score, atol=1e-5, rtol=1e-5)
    assert torch.equal(TIEDetector.load(trained).decide(x).level, net.decide(x).level)


def stopped_after(monkeypatch, epochs):
    epoch = TIETrainer.epoch

    def one(self, batches):
        return stop() if len(self.log) == epochs else epoch(self, batches)

    monkeypatch.setattr(TIETrainer, "epoch", one)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_resumed_run_ends_bit_identical(
    on_disk, trained, folder, tmp_path, monkeypatch, capsys, refuses
):
    if on_disk:  # where images are decoded each time
        monkeypatch.setattr(data, "BUDGET", 0)
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        command = train(folder / "train", out, "--epochs", 3, "--seed", 3)
        assert run(*command) == 130
    assert f"continue with: tie-ext train --resume {out}" in capsys.readouterr().err
    assert run(*command) == 1
    assert f"holds run.json of a run; continue it with `tie-ext train --resume {out}`" in (
        capsys.readouterr().err
    )
    with locked(out):
        refuses("another process is writing a run to", "train", "--resume", out)
    assert run("train", "--resume", out) == 0
    for name in ("network.safetensors", "scores.safetensors"):
        assert (out / name).read_bytes() == (trained / name).read_bytes()


def test_a_run_that_is_stopped_in_its_first_epoch(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stopped_after(patched, 0)
        assert run(*train(folder, tmp_path, "--epochs", 1)) == 130
    assert run("train", "--resume", tmp_path) == 0


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        (["--shift", 0], {"shift": 0}),
        (["--lam=-inf"], {"excluded": "proposed"}),
        (["--head", "linear"], {"head": "linear", "prior": ["multiscale"]}),
        (["--head", "linear", "--prior", "none", "--lam", 1000], {"prior": [], "pool": 0}),
    ],
)
def test_flags_that_change_the_method(more, changed, folder, tmp_path):
    assert run(*train(folder, tmp_path, "--epochs", 1, *more)) == 0
    record = record_of(tmp_path)
    found = {**record["settings"], **record["settings"]["recipe"], **record["log"][0]}
    for key, value in changed.items():
        assert found[key] == (found["proposed"] if value == "proposed" else value)


def test_a_subset_in_smaller_batches(folder, tmp_path):
    few = ["--images", 12, "--batch-size", 5, "--epochs", 1]
    assert run(*train(folder, tmp_path, *few)) == 0
    assert sum(load_state(tmp_path / "training.safetensors", "training")["counts"]) == 12


def test_a_loop_that_excludes_nothing(folder, tmp_path, capsys):
    assert run(*train(folder, tmp_path, "--epochs", 1, "--lam", 100)) == 0
    assert "no candidate was uncertain enough to become garbage" in capsys.readouterr().out


@pytest.mark.slow
def test_outliers_of_other_papers(folder, tmp_path):
    given = ["--size", 28, "--epochs", 1, "--candidates", 55, "--pool-size", 40]
    command = ["train", "--data", f"folder:{folder}", "--out", tmp_path, *given]
    assert run(*command, "--synthesizer", "gradient,boundary") == 0
    assert run("report", tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Outliers: gradient" in page
    assert "Outliers: boundary" in page


@pytest.mark.slow
def test_weights_of_other_classes_and_normalised_images(folder, tmp_path):
    before = make("torchvision:resnet18", n=7)
    torch.save(before.state_dict(), tmp_path / "w.pt")
    given = ["--backbone", "torchvision:resnet18", "--weights", tmp_path / "w.pt", "--size", 32]
    more = ["--mean", 0.5, "--std", 0.25, "--lr", 1e-9, "--epochs", 1]
    out = tmp_path / "run"
    assert run(*train(folder, out, *given, *more)) == 0
    assert len(record_of(out)["weights_sha256"]) == 64
    net = load_network(out)
    assert (net.low.tolist(), net.high.tolist()) == ([[[-2.0]]], [[[2.0]]])
    torch.testing.assert_close(net.backbone.conv1.weight, before.conv1.weight)
    (tmp_path / "w.pt").unlink()
    assert run("train", "--resume", out) == 0  # which has the weights
    assert len(record_of(out)["weights_sha256"]) == 64
    assert run("score", out, folder / "test") == 0


def test_an_image_that_cannot_be_read(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "test" / "dark" / "3.png").write_bytes(b"no image")
    assert run(*train(tmp_path / "images", tmp_path / "run")) == 1
    place = tmp_path / "images" / "test" / "dark" / "3.png"
    assert f"Expected an image file at {place}, but got: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_loss_that_overflowed(folder, tmp_path, monkeypatch):
    epoch = TIETrainer.epoch

    def overflowed(self, batches):
        epoch(self, batches).losses["kl"] = float("inf")

    monkeypatch.setattr(TIETrainer, "epoch", overflowed)
    assert run(*train(folder, tmp_path, "--epochs", 1)) == 0
    losses = record_of(tmp_path)["log"][0]["losses"]
    assert losses["kl"] is None
    assert losses["classifier"] > 0


@pytest.mark.parametrize(
    "change",
    [{"data": 1}, {"backbone": []}, {"size": 10**9}, {"ood": [1]}, {"recipe": {"config": 1}}],
    ids=str,
)
def test_a_damaged_record_is_not_resumed(change, trained, tmp_path, refuses):
    record = record_of(trained)
    record["settings"] |= change
    (tmp_path / "run.json").write_text(json.dumps(record))
    refuses("tie-ext: Expected ", "train", "--resume", tmp_path)


def test_a_record_of_0_1_0_is_not_resumed(trained, tmp_path, refuses):
    record = record_of(trained)
    record["settings"]["config"] = record["settings"].pop("recipe")["config"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    before = files_of(tmp_path)
    refuses("of version 0.1, which this version does not continue", "train", "--resume", tmp_path)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "Expected --data and --out"),
        (["--size", 0], "Expected size to be an integer in [1, "),
        (["--lr", 0], "Expected lr to be a number in (0, 1]"),
        (["--inversion-steps", 0], "Expected steps to be an integer in [1, 1000000]"),
        (["--synthesizer", "white"], "Expected --synthesizer inversion beside its flags"),
        (["--synthesizer", "magic"], "Expected --synthesizer inversion beside its flags"),
        (["--backbone", "torchvision:resnet19"], "Expected a classifier of torchvision by its"),
        (["--resume", "x", "--epochs", 3], "Expected --resume RUN alone or with --device, but"),
    ],
)
def test_wrong_flags(arguments, message, folder, tmp_path, refuses):
    command = train(folder, tmp_path / "new", *arguments)
    if arguments[0] in ("--data", "--resume"):
        command = ["train", *arguments]
    refuses(message, *command, status=2)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "Expected a data set, one of mnist"),
        ("folder:nowhere", "Expected a folder with one folder of images per class"),
        ("mnist", "Expected mnist in data"),
    ],
)
def test_images_that_are_not_there(name, message, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    refuses(message, "train", "--data", name, "--out", "new")
