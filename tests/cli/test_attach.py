"""``tie-ext attach``: weights in a file and images on disk become a run folder."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import Small
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from cli.conftest import (
    LOW,
    MEAN,
    attach,
    files_of,
    make,
    record_of,
    rows_of,
    run,
    stop,
    write_images,
)
from tie_ext import Combined, TIENet
from tie_ext.cli import attach as command
from tie_ext.cli import data, evaluation
from tie_ext.cli.folder import written
from tie_ext.cli.snapshots import load_snapshots
from tie_ext.utils.files import load_state, locked


def test_record_network_and_detector_of_a_run(attached, folder, weights):
    record, test = record_of(attached), data.load(f"folder:{folder}", "test", shape=(3, 28, 28))
    assert record["settings"]["weights"] == str(weights)
    assert {"weights_sha256", "command", "commit", "versions", "transform"} <= set(record)
    assert {f"folder:{folder}", "noise"} == set(record["numbers"]["garbage_rate"])
    net, detector = TIENet.load(attached / "network.safetensors"), Combined.load(attached)
    assert (detector.false_alarm, net.class_names) == (0.05, ("bright", "dark"))
    # The range is what normalising makes of black and white.
    assert net.low.flatten().tolist() == pytest.approx([-2, -2, -2])
    assert net.high.flatten().tolist() == pytest.approx([3, 2, 4 / 3])
    x = net.from_unit(test.x.float() / 255)
    logits = make("conv3")(x)
    assert torch.equal(net(x), logits)
    right = (logits.argmax(1) == test.y).double().mean().item()
    assert record["numbers"]["accuracy"] == right
    scores = load_state(attached / "scores.safetensors", "scores")
    torch.testing.assert_close(scores["attached"]["id"], net.decide(x).score)
    half = torch.randperm(40, generator=torch.Generator().manual_seed(0)).chunk(2)[1]
    torch.testing.assert_close(scores["combined"]["id"], detector.predict(x)[half])
    assert float(detector.threshold) == float(scores["combined"]["id"].max())


def test_the_head_learns_from_normalised_images(folder, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["tie_ext.training.fit_head"], "corrupt", lambda x, *_: x)
    assert run(*attach(folder, weights, tmp_path, *MEAN)) == 0
    net = TIENet.load(tmp_path / "network.safetensors")
    train = data.load(f"folder:{folder}", "train", shape=(3, 28, 28))
    seen = net.statistics(net.from_unit(train.x.float() / 255))[1]
    torch.testing.assert_close(net.garbage.mean, seen.mean(0), atol=1e-4, rtol=1e-4)


def test_images_that_the_figures_show(attached, folder):
    net = TIENet.load(attached / "network.safetensors")
    kept = load_snapshots(attached)[0]
    test = data.load(f"folder:{folder}", "test", shape=(3, 28, 28))
    features = net.features(net.from_unit(test.x.float() / 255))
    torch.testing.assert_close(kept["features"][:40], features, atol=1e-5, rtol=1e-5)
    assert kept["labels"].tolist() == [*test.y.tolist(), *[2] * 100]
    assert kept["outliers_0"].shape == (16, 3, 28, 28)


@pytest.mark.parametrize(
    ("accuracy", "classes", "images", "said", "doubt"),
    [
        (0.6, 2, 40, None, "guessing among 2 classes"),
        (0.14, 10, 9999, None, "guessing among 10 classes"),
        (0.16, 10, 9999, None, ""),
        (0.1, 2, 4, None, ""),
        (0.84, 10, 9999, 0.95, "ID accuracy is 84.0%, where the checkpoint says 95.0%"),
        (0.86, 10, 9999, 0.95, ""),
    ],
)
def test_accuracies_that_are_doubted(accuracy, classes, images, said, doubt):
    found = command.doubts(accuracy, classes, images, said)
    assert doubt in found
    assert bool(found) == bool(doubt)


def test_notes_before_and_after_the_work(folder, weights, tmp_path, capsys):
    assert run(*attach(folder / "train", weights, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    notes = [
        "images are squashed to 28 x 28 pixels (--transform squash), --mean 0, --std 1",
        "train has no test/: 32 images to train on, 8 held out (one in five of each class",
        "8 held-out images are too few for a threshold, which takes 37",
        "if the network was trained on these",
        "| attached | noise ",
        f"run: {tmp_path / 'run'}",
    ]
    places = [said.index(note) for note in notes]
    assert places == sorted(places)


def test_a_network_that_guesses(folder, weights, tmp_path, capsys):
    assert run(*attach(folder, weights, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "guessing among 2 classes could give: are these its weights, were its images" in said
    assert "tie-ext score decides by the combined score, with a threshold that rejects" in said
    assert "too few" not in said


def test_test_images_that_are_training_images(folder, weights, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(folder / "train", tmp_path / "images" / split)
    with pytest.warns(UserWarning, match="100% or more of the held-out images are training"):
        assert run(*attach(tmp_path / "images", weights, tmp_path / "run")) == 0


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda: Hostile(), "a file that runs code when it is read (posix.system), which was not"),
        (lambda: make("residual").state_dict(), "but got none at conv.0.weight"),
        (lambda: make("conv3", 4).state_dict(), "for images of 1 or 3 channels"),
        (lambda: make("conv5").state_dict(), "conv.0.weight of (64, 3, 3, 3) instead of (32, 3"),
        (lambda: make("conv3", n=7).state_dict(), "fc.weight of (7, 128) instead of (2, 128)"),
        (lambda: {"a": torch.ones(3)}, "those of another architecture: 'a'"),
    ],
)
def test_weights_refused_before_any_work(weights, message, folder, tmp_path, monkeypatch, refuses):
    monkeypatch.chdir(tmp_path)
    torch.save(weights(), "w")
    refuses(message, *attach(folder, "w", "new"))
    assert os.listdir() == ["w"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--backbone", "resnet18"], "but got 'resnet18'; did you mean torchvision:resnet18?"),
        (["--backbone", "torchvision:resnet19"], "by its name there, such as resnet1"),
        (["--mean", 0.5], "Expected as many --mean as --std, but got 1 and 0"),
        (["--mean", 123.7, "--std", 0.2], "Expected mean to be a number in [0, 1], but got 123.7"),
        (["--mean", 0.5, 0.5, "--std", 0.5, 0.5], "--mean and --std of 1 or 3 numbers"),
        (["--images", 0], "Expected images to be an integer in [1, "),
        (["--transform", "zoom"], "one of torchvision, timm, crop, squash, but got 'zoom'"),
        (["--device", "abacus"], "Expected --device to be one that torch has here"),
    ],
)
def test_wrong_flags(more, message, folder, weights, tmp_path, refuses):
    refuses(message, *attach(folder, weights, tmp_path / "new", *more), status=2)
    assert not (tmp_path / "new").exists()


def test_timm_that_is_not_installed(folder, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run(*attach(folder, weights, tmp_path / "new", backbone="timm:resnet18")) == 1
    assert capsys.readouterr().err.endswith("; pip install 'tie_ext[timm]'\n")


def test_a_network_of_timms_registry(folder, tmp_path, monkeypatch, capsys):
    class Timm:
        list_models = staticmethod(lambda: ["small"])
        create_model = staticmethod(
            lambda name, pretrained, num_classes, in_chans: Small(num_classes, in_chans)
        )

    monkeypatch.setitem(sys.modules, "timm", Timm)
    torch.save(Small(2, 3).state_dict(), tmp_path / "w")
    command = attach(folder, tmp_path / "w", tmp_path / "run", backbone="timm:small")
    assert run(*command, "--transform", "squash") == 0
    assert run("score", tmp_path / "run", folder / "test") == 0


@pytest.mark.parametrize("name", ["training.safetensors", "network.safetensors"])
def test_a_folder_with_other_files_refused(name, folder, weights, tmp_path, refuses):
    (tmp_path / name).write_text("mine")
    refuses(
        f"Expected a new folder, but got {tmp_path}, which holds",
        *attach(folder, weights, tmp_path),
    )
    assert files_of(tmp_path) == {name: b"mine"}


def test_a_finished_run_stays_as_it_is(attached, folder, weights, capsys, refuses):
    before = files_of(attached)
    assert run(*attach(folder, weights, attached)) == 1
    assert run("train", "--data", f"folder:{folder}", "--out", attached) == 1
    assert capsys.readouterr().err.count("holds run.json of a run; give another --out") == 2
    refuses("but got one of tie-ext attach, or of version 0.1", "train", "--resume", attached)
    assert files_of(attached) == before


def test_a_folder_that_is_locked(folder, weights, tmp_path, refuses):
    with locked(tmp_path / "run"):
        refuses(
            "a folder that another process is writing a run to",
            *attach(folder, weights, tmp_path / "run"),
        )
    assert not written(tmp_path / "run")


def test_a_stopped_run_is_made_anew(attached, folder, weights, tmp_path, monkeypatch):
    command = attach(folder, weights, tmp_path / "run", *MEAN, "--ood", f"folder:{folder}")
    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "save_state", stop)
        assert run(*command) == 130
    (tmp_path / "run" / "report.html").write_text("of the stopped one")
    assert run(*command) == 0
    assert not (tmp_path / "run" / "report.html").exists()
    for name in ("network.safetensors", "scores.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (attached / name).read_bytes()


def test_arithmetic_in_bfloat16(folder, weights, tmp_path):
    assert run(*attach(folder, weights, tmp_path, "--autocast-dtype", "bfloat16")) == 0
    assert TIENet.load(tmp_path / "network.safetensors").autocast_dtype == "bfloat16"
    assert record_of(tmp_path)["settings"]["autocast_dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 1])
def test_images_as_torchvision_reads_them(channels, tmp_path, capsys, refuses):
    name = "torchvision:resnet18"
    for split in ("train", "test"):
        write_images(tmp_path / "wide" / split, {"bright": 20, "dark": 20}, (28, 44))
    model, out = make(name, channels), tmp_path / "run"
    torch.save(model.state_dict(), tmp_path / "w")
    mean = MEAN if channels == 3 else ["--mean", 0.5, "--std", 0.5]
    assert run(*attach(tmp_path / "wide", tmp_path / "w", out, *mean, backbone=name, size=40)) == 0
    record, grey = record_of(out), [T.Grayscale()][: channels == 1]
    normalise = T.Normalize(record["settings"]["mean"], record["settings"]["std"])
    own = T.Compose([*grey, T.Resize(45), T.CenterCrop(40), T.ToTensor(), normalise])
    x, y = zip(*ImageFolder(tmp_path / "wide" / "test", own), strict=True)
    logits = model(torch.stack(x))
    assert record["numbers"]["accuracy"] == (logits.argmax(1) == torch.tensor(y)).double().mean()
    said = "images are resized to 45 pixels on the shorter side, 40 x 40 cropped (--transform crop"
    assert said in capsys.readouterr().out
    # Without the record nobody knows the architecture.
    assert run("score", out, tmp_path / "wide" / "test") == 0
    labels = [row["label"] for row in rows_of(capsys.readouterr().out)]
    names = [("bright", "dark")[i] for i in logits.argmax(1)]
    assert any(labels)
    assert [label or name for label, name in zip(labels, names, strict=True)] == names
    (out / "run.json").unlink()
    refuses(
        "or the run.json of a run beside it, which says what its",
        "score",
        out,
        tmp_path / "wide" / "test",
    )


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = re.findall(r"```sh\n(tie-ext attach.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    write_images(Path("IMAGES/train"), dict.fromkeys(LOW, 8))
    write_images(Path("IMAGES/test"), dict.fromkeys(LOW, 20))
    shutil.copytree("IMAGES/test", "NEW_IMAGES")
    torch.save(make("torchvision:resnet18").state_dict(), "weights.pt")
    for line in block.splitlines():
        quick = ["--size", "48"] if "attach" in line else []
        assert run(*shlex.split(line)[1:], *quick) == 0, capsys.readouterr().err
    levels = [row["level"] for row in rows_of(Path("rows.csv").read_text())]
    assert len(levels) == 40
    assert set(levels) <= {"accepted", "uncertain", "garbage"}
