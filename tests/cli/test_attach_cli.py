"""``tie-ext attach`` as a user types it: weights in a file, images on disk, score and report."""

import csv
import html
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Small, make_net, set_head_defaults
from torch import nn
from torchvision.datasets import ImageFolder

from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.cli import attach as attach_command
from tie_ext.cli import data, evaluation, registry
from tie_ext.cli.folder import load_network, read_record, written
from tie_ext.cli.main import COMMANDS, main
from tie_ext.cli.snapshots import load_snapshots
from tie_ext.models.backbones import BACKBONES, Conv3
from tie_ext.utils.files import load_state, locked, save_state, sha256, write_json
from tie_ext.utils.weight_files import read_checkpoint

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
T = pytest.importorskip("torchvision.transforms")
MEAN, STD = ["--mean", "0.4", "0.5", "0.6"], ["--std", "0.2", "0.25", "0.3"]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    set_head_defaults(monkeypatch, steps=30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of colour images, dark and bright, in train and test."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, low in (("bright", 100), ("dark", 0)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 156, (28, 28, 3), dtype=np.uint8)).save(
                    root / split / label / f"{i}.png"
                )
    return root


@pytest.fixture(scope="module")
def wide(folder, tmp_path_factory):
    """The same images with 8 columns more on each side, which a crop removes."""
    root = Path(shutil.copytree(folder, tmp_path_factory.mktemp("wide") / "images"))
    for file in root.rglob("*.png"):
        ImageOps.pad(Image.open(file), (44, 28), color="red").save(file)
    return root


def make(name: str, channels: int = 3, n: int = 2) -> nn.Module:
    """A network that somebody trained, as far as anyone here can tell."""
    torch.manual_seed(1)
    model = registry.build(name, channels, n)
    with torch.no_grad():
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "conv3.pt"
    torch.save(make("conv3").state_dict(), path)
    return path


def attach(folder, file, out, *more, backbone="conv3", size=28):
    flags = [
        "--backbone",
        backbone,
        "--weights",
        str(file),
        "--data",
        f"folder:{folder}",
        "--size",
        str(size),
        "--out",
        str(out),
    ]
    return ["attach", *flags, "--device", "cpu", *map(str, more)]


@pytest.fixture(scope="module")
def run(folder, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patched:
        set_head_defaults(patched, steps=30)
        assert main(attach(folder, weights, out, "--ood", f"folder:{folder}")) == 0
    return out


def images_of(folder):
    return [
        str(folder / "test" / label / f"{i}.png") for label in ("bright", "dark") for i in range(6)
    ]


def test_a_run_says_what_it_did_and_its_accuracy_is_the_networks_own(run, folder, weights):
    record, test = (
        json.loads((run / "run.json").read_text()),
        data.load(f"folder:{folder}", "test", shape=(3, 28, 28)),
    )
    assert record["settings"]["backbone"] == "conv3"
    assert record["settings"]["weights"] == str(weights)
    assert {"weights_sha256", "command", "commit", "versions", "processor"} <= set(record)
    assert {f"folder:{folder}", "noise"} == set(record["numbers"]["garbage_rate"])
    logits = make("conv3")(test.x.float() / 255)
    assert record["numbers"]["accuracy"] == (logits.argmax(1) == test.y).double().mean().item()
    net = TIENet.load(run / "network.safetensors")
    assert torch.equal(net(test.x.float() / 255), logits)
    assert torch.equal(
        TIEDetector.load(run).decide(test.x.float() / 255).score,
        net.decide(test.x.float() / 255).score,
    )
    assert net.class_names == ("bright", "dark")
    assert torch.equal(
        load_state(run / "scores.safetensors", "scores")["attached"]["id"],
        net.decide(test.x.float() / 255).score,
    )


def test_validation_sets_are_scored_and_the_worst_is_named(folder, weights, tmp_path, capsys):
    for name in ("dark", "bright"):
        shutil.copytree(folder / "test" / name, tmp_path / name / "val" / "a")
    assert (
        main(
            attach(
                folder,
                weights,
                tmp_path / "run",
                "--val-ood",
                f"folder:{tmp_path / 'dark'}",
                f"folder:{tmp_path / 'bright'}",
            )
        )
        == 0
    )
    label, of = next(
        iter(json.loads((tmp_path / "run" / "run.json").read_text())["numbers"]["scores"].items())
    )
    assert list(of) == [
        f"val:folder:{tmp_path / 'dark'}",
        f"val:folder:{tmp_path / 'bright'}",
        "noise",
    ]
    worst = min(list(of)[:2], key=lambda name: of[name]["auroc"])
    assert of[worst]["auroc"] < max(of[name]["auroc"] for name in list(of)[:2])
    assert (
        f"worst validation set: {worst[4:]}, AUROC {100 * of[worst]['auroc']:.1f} by {label}\n"
        in capsys.readouterr().out
    )


def test_accuracy_counts_a_right_label_that_the_garbage_class_takes(
    folder, weights, tmp_path, monkeypatch, capsys
):
    def all_garbage(*args, **how):
        net = sys.modules["tie_ext.training.attach"].attach(*args, **how)
        net.garbage.network[-1].bias.data.fill_(1e6)
        return net

    monkeypatch.setattr(attach_command, "attach", all_garbage)
    assert main(attach(folder, weights, tmp_path / "run")) == 0
    numbers, test = (
        json.loads((tmp_path / "run" / "run.json").read_text())["numbers"],
        data.load(f"folder:{folder}", "test", shape=(3, 28, 28)),
    )
    right = (make("conv3")(test.x.float() / 255).argmax(1) == test.y).double().mean().item()
    assert right > 0
    assert (numbers["accuracy"], numbers["id_garbage_rate"]) == (right, 1.0)
    row = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| attached")
    )
    assert row.split(" | ")[1:3] == [f"{100 * right:.2f}".ljust(11), "100.00".ljust(13)]


def test_a_network_that_guesses_is_said_to(many, weights, tmp_path, capsys):
    assert main(attach(many, weights, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert (
        "ID accuracy is 50.0%, which guessing among 2 classes could give: are these its "
        "weights, were its images read so (--transform squash, 28 x 28, --mean 0, --std 1), and "
        "do the classes have the order" in said
    )
    assert (
        "tie-ext score decides by the combined score, with a threshold that rejects at most 5% "
        "of new ID images" in said
    )
    assert "too few" not in said


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
def test_an_accuracy_is_doubted_near_chance_and_far_below_the_checkpoints(
    accuracy, classes, images, said, doubt
):
    found = attach_command.doubts(accuracy, classes, images, said)
    assert doubt in found
    assert bool(found) == bool(doubt)


def test_too_few_test_images_for_a_threshold_are_said_before_the_work(
    folder, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        attach_command, "attach", lambda *_, **__: pytest.fail(capsys.readouterr().out)
    )
    with pytest.raises(
        pytest.fail.Exception,
        match="12 held-out images are too few for a threshold, which takes 37: tie-ext score "
        "decides by",
    ):
        main(attach(folder, weights, tmp_path / "run"))


def test_how_test_images_were_come_by_is_said_before_the_work(
    folder, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        attach_command, "attach", lambda *_, **__: pytest.fail(capsys.readouterr().out)
    )
    with pytest.raises(
        pytest.fail.Exception,
        match=r"train has no train/ and test/: 32 images to train on, 8 held out.*\. If the "
        r"network was trained",
    ):
        main(attach(folder / "train", weights, tmp_path / "run"))


def test_test_images_that_are_training_images_are_refused_unless_the_user_says_yes(
    folder, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(attach_command, "attach", lambda *_, **__: pytest.fail("the work began"))
    for split in ("train", "test"):
        shutil.copytree(folder / "train", tmp_path / "images" / split)
    command = attach(tmp_path / "images", weights, tmp_path / "run")
    trained = ["train", "--data", f"folder:{tmp_path / 'images'}", "--out", str(tmp_path / "run")]
    for refused in (command, trained):
        assert main(refused) == 1
        said = capsys.readouterr().err
        assert "not trained on, but got training images in 100% of them, byte for byte" in said
    with pytest.raises(pytest.fail.Exception, match="the work began"):
        main([*command, "--yes"])


@pytest.mark.slow
def test_a_run_may_compute_in_bfloat16(folder, weights, tmp_path, monkeypatch, capsys):
    set_head_defaults(monkeypatch, steps=30)
    assert main(attach(folder, weights, tmp_path / "run", "--autocast-dtype", "bfloat16")) == 0
    assert TIENet.load(tmp_path / "run" / "network.safetensors").autocast_dtype == "bfloat16"
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["autocast_dtype"]
        == "bfloat16"
    )
    assert main(["score", str(tmp_path / "run"), *images_of(folder)]) == 0


def test_score_and_a_threshold_work_as_on_a_trained_run(run, folder, capsys):
    for place in (run, run / "network.safetensors"):
        assert main(["score", str(place), "--false-alarm", "0.25", *images_of(folder)]) == 0
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        assert {row["label"] for row in rows} <= {"bright", "dark", ""}
        assert sum(row["level"] != "accepted" for row in rows) in (
            2,
            3,
        )  # one is the threshold, give or take its last bit


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """As many test images as a line needs."""
    root, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 20)):
        for label, low in (("bright", 100), ("dark", 0)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 156, (28, 28, 3), dtype=np.uint8)).save(
                    root / split / label / f"{i}.png"
                )
    return root


@pytest.mark.slow
def test_a_run_has_a_combined_detector_by_which_images_are_decided(
    many, weights, tmp_path, capsys
):
    out, test = tmp_path / "run", data.load(f"folder:{many}", "test", shape=(3, 28, 28))
    assert main(attach(many, weights, out, *MEAN, *STD)) == 0
    assert "| attached, combined | noise | " in capsys.readouterr().out
    detector = Combined.load(out)
    assert detector.false_alarm == 0.05
    assert [type(member).__name__ for member in detector.detectors] == [
        "TIEDetector",
        "SampledKNN",
        "EnergyBased",
        "MahalanobisPlusPlus",
        "BoundaryDistance",
    ]
    kept = load_state(out / "scores.safetensors", "scores")["combined"]
    judging = torch.randperm(40, generator=torch.Generator().manual_seed(0)).chunk(2)[1]
    scores = detector.predict(detector.network.from_unit(test.x.float() / 255))
    torch.testing.assert_close(kept["id"], scores[judging])
    line = kept["id"].sort().values
    assert float(detector.threshold) == float(line[-1])
    torch.testing.assert_close(
        detector.decide(detector.network.from_unit(test.x.float() / 255)).score, scores
    )
    paths = [
        str(many / "test" / label / f"{i}.png") for label in ("bright", "dark") for i in range(20)
    ]
    for rate, above in (
        (None, -1),
        (0.25, -5),
    ):  # of 21 images, the new one among them, at most 1.05 and 5.25
        assert (
            main(["score", str(out), *(["--false-alarm", str(rate)] if rate else []), *paths]) == 0
        )
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        threshold = line[above].item()
        for row in rows:
            above_it = float(row["score"]) - threshold
            assert abs(above_it) < 1e-3 or (row["level"] != "accepted") == (
                above_it > 0
            )  # which side a rounded score is of is not to be seen
        assert all(
            abs(float(row["score"]) - score) < 1e-3 * (1 + abs(score))
            for row, score in zip(rows, _by_path(test, scores), strict=True)
        )
    assert main(["report", str(out)]) == 0
    assert (out / "figures" / "scores_combined.png").is_file()
    assert {path for path in out.rglob("*") if path.is_file()} - {out / ".lock"} == set(
        written(out)
    )
    net = TIENet.load(out / "network.safetensors")
    assert load_network(out).class_names == net.class_names
    capsys.readouterr()
    detector.save(tmp_path / "saved")
    for more in ([], ["--false-alarm", "0.25"]):  # a saved detector has its calibration scores
        rows = []
        for place in (out, tmp_path / "saved"):
            assert main(["score", str(place), *paths, *more]) == 0
            rows.append(capsys.readouterr().out)
        assert rows[0] == rows[1]
    x = net.from_unit(test.x.float() / 255)
    single = TIEDetector(net.eval(), false_alarm=0.25).fit([(x, test.y)])
    single.save(tmp_path / "single")
    assert main(["score", str(tmp_path / "single"), *paths]) == 0
    rows = csv.DictReader(capsys.readouterr().out.splitlines())
    assert [row["level"] != "accepted" for row in rows] == [
        level > 0 for level in _by_path(test, single.decide(x).level)
    ]
    for unfitted in (Combined.load(out), TIEDetector(net)):  # one over the other
        if isinstance(unfitted, Combined):
            unfitted.threshold = None
        net.tau.fill_(math.inf)
        unfitted.save(tmp_path / "single")
        assert main(["score", str(tmp_path / "single"), paths[0]]) == 1
        assert "Expected a detector with a threshold in" in capsys.readouterr().err
    (out / "detector.safetensors").write_bytes(b"{}")
    assert main(["score", str(out), paths[0]]) == 1
    assert "detector.safetensors" in capsys.readouterr().err


def test_a_run_folder_of_0_2_0_scores_as_it_did(many, weights, tmp_path, capsys):
    out, images = tmp_path / "run", str(many / "test")
    assert main(attach(many, weights, out)) == 0
    capsys.readouterr()
    commands = [["score", str(out), images, *more] for more in ([], ["--false-alarm", "0.25"])]
    rows = [(main(command), capsys.readouterr().out) for command in commands]
    detector = Combined.load(out)
    state = {"reference": detector.reference._asdict()}
    saved = load_state(out / "detector.safetensors", "detector")
    del saved["calibration_scores"], saved["calibration_labels"]
    save_state(out / "combined" / "members.safetensors", "members", {**saved, **state})
    shutil.copy(out / "network.safetensors", out / "combined")
    about = json.loads((out / "detector.json").read_text())
    about |= {"version": 1, "fitted_here": []}
    about["members_sha256"] = sha256(out / "combined" / "members.safetensors")
    write_json(out / "combined" / "detector.json", about)
    for name in ("detector.safetensors", "detector.json"):
        (out / name).unlink()
    record = json.loads((out / "run.json").read_text())
    record["settings"]["precision"] = record["settings"].pop("autocast_dtype")
    write_json(out / "run.json", record)
    assert [(main(command), capsys.readouterr().out) for command in commands] == rows
    assert rows[0][0] == 0
    assert main(["report", str(out)]) == 0
    assert '"autocast_dtype"' in html.unescape((out / "report.html").read_text())


def test_records_of_0_2_0_are_read_by_the_names_of_today(tmp_path):
    config = {"epochs": 3, "search": 5, "precision": "bfloat16", "garbage_weight": 1.0}
    recipe = {"config": config, "objective": "garbage", "garbage": "layers", "prior": ["white"]}
    write_json(tmp_path / "run.json", {"settings": {"recipe": recipe, "precision": "float32"}})
    settings = read_record(tmp_path)["settings"]
    assert settings["autocast_dtype"] == "float32"
    assert settings["recipe"] == {
        "config": {
            "epochs": 3,
            "adversarial_steps": 5,
            "autocast_dtype": "bfloat16",
            "garbage_weight": 1.0,
        },
        "criterion": "garbage",
        "head": "multilayer",
        "prior": ["white"],
    }


def _by_path(test, scores):
    """Scores in the order of the files, in which image folders are not read."""
    order = [str(i) for i in range(20)]
    read = sorted(order)
    return [scores[20 * label + read.index(i)].item() for label in range(2) for i in order]


@pytest.mark.slow
def test_a_report_shows_what_there_is(run, capsys):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert {p.name for p in (run / "figures").iterdir()} == {
        f"{n}.png"
        for n in (
            "outliers_procedural",
            "features",
            "curves_attached",
            "scores_attached",
        )
    }
    assert page.count("<figure>") == 4
    assert '<th scope="row">attached</th>' in page
    assert "outliers that the garbage class was fitted to" in page
    assert "weights_sha256" in page
    assert {path for path in run.rglob("*") if path.is_file()} - {run / ".lock"} == set(
        written(run)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("torchvision:resnet18", 3),
        ("torchvision:resnet18", 1),
        ("torchvision:mobilenet_v3_small", 3),
    ],
)
def test_other_architectures_are_made_again_from_the_record(
    name, channels, wide, tmp_path, capsys
):
    model, out = make(name, channels), tmp_path / "run"
    torch.save(model.state_dict(), tmp_path / "w.pt")
    normal = [*MEAN, *STD] if channels == 3 else ["--mean", "0.5", "--std", "0.5"]
    assert main(attach(wide, tmp_path / "w.pt", out, *normal, backbone=name, size=40)) == 0
    record, grey = json.loads((out / "run.json").read_text()), [T.Grayscale()][: channels == 1]
    own = [*grey, T.Resize(45), T.CenterCrop(40), T.ToTensor()]
    normalise = T.Normalize(record["settings"]["mean"], record["settings"]["std"])
    images = ImageFolder(wide / "test", T.Compose([*own, normalise]))
    x, y = (
        torch.stack(part) for part in zip(*((x, torch.tensor(y)) for x, y in images), strict=True)
    )
    logits = model(x)
    assert record["numbers"]["accuracy"] == (logits.argmax(1) == y).double().mean().item()
    said = (
        "52 of 52 images are not square: they are resized to 45 pixels on the shorter side, and "
    )
    assert capsys.readouterr().out.count(said + "40 x 40 are cropped from the middle") == 1
    assert main(["score", str(out), "--every-label", *images_of(wide)]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["label"] for row in rows] == [("bright", "dark")[i] for i in logits.argmax(1)]
    kept = load_state(out / "scores.safetensors", "scores")["attached"]["id"]
    assert torch.allclose(torch.tensor([float(row["score"]) for row in rows]), kept, atol=1e-2)
    assert main(["report", str(out)]) == 0
    (out / "run.json").unlink()
    assert main(["score", str(out), *images_of(wide)]) == 1
    assert (
        "or the run.json of a run beside it, which says what its architecture is, but got neither"
        in capsys.readouterr().err
    )


def test_the_range_is_what_normalising_makes_of_black_and_white(
    folder, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys.modules["tie_ext.training.fit_head"], "corrupt", lambda x, *_: x)
    assert main(attach(folder, weights, tmp_path / "run", *MEAN, *STD)) == 0
    net = TIENet.load(tmp_path / "run" / "network.safetensors")
    assert net.low.flatten().tolist() == pytest.approx([-2, -2, -2])
    assert net.high.flatten().tolist() == pytest.approx([3, 2, 4 / 3])
    train = data.load(f"folder:{folder}", "train", shape=(3, 28, 28))
    seen = net.statistics(net.from_unit(train.x.float() / 255))[1]
    assert torch.allclose(
        net.garbage.mean, seen.mean(0), atol=1e-4
    )  # what the head learned from was scaled too
    pictures, test = (
        load_snapshots(tmp_path / "run")[0],
        data.load(f"folder:{folder}", "test", shape=(3, 28, 28)),
    )
    assert torch.allclose(
        pictures["features"][:12], net.features(net.from_unit(test.x.float() / 255)), atol=1e-5
    )
    assert pictures["labels"].tolist() == [*test.y.tolist(), *[2] * 100]
    assert pictures["outliers_0"].shape == (12, 3, 28, 28)


def wrapped(state, how):
    return {
        "alone": state,
        "DataParallel": {f"module.{key}": value for key, value in state.items()},
        "compiled and DataParallel": {
            f"module._orig_mod.{key}": value for key, value in state.items()
        },
        "a checkpoint": {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
        "a model": {"model": {f"module.{key}": value for key, value in state.items()}},
        "without counts": {
            key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
        },
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "alone",
        "DataParallel",
        "compiled and DataParallel",
        "a checkpoint",
        "a model",
        "without counts",
    ],
)
@pytest.mark.parametrize("kind", ["torch", "torch before 1.6", "safetensors"])
def test_weights_are_read_as_people_save_them(how, kind, tmp_path):
    state = wrapped(make("conv3").state_dict(), how)
    if kind == "safetensors":
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            pytest.skip("holds tensors alone")
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in state.items()}, tmp_path / "w"
        )
    else:
        torch.save(state, tmp_path / "w", _use_new_zipfile_serialization=kind == "torch")
    checkpoint, x = read_checkpoint(tmp_path / "w"), torch.rand(2, 3, 28, 28)
    assert registry.channels_of("conv3", checkpoint) == 3
    model, left = registry.load("conv3", 3, 2, checkpoint)
    assert (torch.equal(model(x), make("conv3")(x)), left) == (True, "")


def test_weights_of_mnasnet_are_taken_though_they_have_lost_their_version(tmp_path):
    pytest.importorskip("torchvision")
    safetensors.torch.save_file(make("torchvision:mnasnet0_5").state_dict(), tmp_path / "w")
    model, _ = registry.load("torchvision:mnasnet0_5", 3, 2, read_checkpoint(tmp_path / "w"))
    assert torch.equal(
        model.classifier[1].weight, make("torchvision:mnasnet0_5").classifier[1].weight
    )


class Hostile:
    def __reduce__(self):
        return os.system, ("echo was run > /tmp/tie_ext_was_run",)


def changed(key, to):
    def change(path):
        state = make("conv3").state_dict()
        torch.save({**state, key: to(state[key])}, path)

    return change


BAD = {
    "nothing": (lambda path: None, "Expected weights as a state_dict at FILE, but got no file"),
    "a folder": (Path.mkdir, "Expected weights as a state_dict at FILE, but got no file"),
    "a pipe": (os.mkfifo, "Expected weights as a state_dict at FILE, but got no file"),
    "empty": (
        Path.touch,
        "Expected weights as a state_dict at FILE, but got a truncated or foreign one: EOFError",
    ),
    "text": (
        lambda path: path.write_text("no weights at all"),
        "Expected weights as a state_dict at FILE, but got a truncated or foreign one: ",
    ),
    "code": (
        lambda path: torch.save(Hostile(), path),
        "but got a file that runs code when it is read (posix.system), which was not run; save "
        "the weights alone: safetensors.torch.save_file(model.state_dict(), ",
    ),
    "a whole model": (
        lambda path: torch.save(make("conv3"), path),
        "but got a file that runs code when it is read (tie_ext.models.backbones.Conv3)",
    ),
    "a network of ours": (
        lambda path: make_net().save(path),
        "but got a file of tie_ext's own; a network that it wrote has its garbage class",
    ),
    "a tensor": (
        lambda path: torch.save(torch.ones(3), path),
        "Expected weights as a state_dict at FILE, but got a torch.float32 tensor of shape (3,)",
    ),
    "no weights": (
        lambda path: torch.save({}, path),
        "Expected weights as a state_dict at FILE, but got an empty one",
    ),
    "an epoch": (
        lambda path: torch.save({"epoch": 3}, path),
        "Expected weights as a state_dict at FILE, but got no tensors by name",
    ),
    "sparse": (
        changed("fc.bias", torch.Tensor.to_sparse),
        "tensors by name, but got a torch.float32 tensor of shape (2,) at 'fc.bias'",
    ),
    "of another architecture": (
        lambda path: torch.save(make("residual").state_dict(), path),
        "Expected weights of conv3 in FILE, but got those of another architecture: none at "
        "conv.0.weight",
    ),
    "of a deeper one": (
        lambda path: torch.save(make("conv5").state_dict(), path),
        "Expected weights of conv3 for the 2 classes of the data in FILE, but got others: "
        "conv.0.weight of (64, 3, 3, 3) instead of (32, 3, 3, 3)",
    ),
    "of other classes": (
        lambda path: torch.save(make("conv3", n=7).state_dict(), path),
        "for the 2 classes of the data in FILE, but got others: fc.weight of (7, 128) instead "
        "of (2, 128), fc.bias of (7,) instead of (2,)",
    ),
    "of the same layers and more": (
        lambda path: torch.save(
            {**make("conv3").state_dict(), "conv.99.weight": torch.ones(3)}, path
        ),
        "but got others: conv.99.weight, which it does not have",
    ),
    "of nothing alike": (
        lambda path: torch.save({"a": torch.ones(3)}, path),
        "Expected weights as a state_dict at FILE, but got those of another architecture: 'a'",
    ),
    "of four channels": (
        lambda path: torch.save(make("conv3", channels=4).state_dict(), path),
        "Expected weights for images of 1 or 3 channels in FILE, but got conv.0.weight of (32, "
        "4, 3, 3)",
    ),
    "NaN": (
        changed("fc.bias", lambda w: w * float("nan")),
        "Expected numbers in fc.bias, but got NaN",
    ),
    "infinite": (
        changed("fc.bias", lambda w: w + float("inf")),
        "Expected finite weights in FILE, but got infinite ones in fc.bias",
    ),
    "integers": (
        changed("fc.bias", lambda w: w.long()),
        "Expected fc.bias to be of type torch.float32, but got torch.int64",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_weights_that_are_none_are_refused_in_one_line_before_any_work(
    what, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(attach_command, "attach", lambda *_, **__: pytest.fail("the work began"))
    file, (put, message) = tmp_path / "weights", BAD[what]
    put(file)
    assert main(attach(folder, file, tmp_path / "new")) == 1
    error = capsys.readouterr().err
    assert message.replace("FILE", str(file)) in error
    assert error.count("\n") == 1
    assert "weights_only" not in error  # torch's advice, to run what is in the file
    assert not (tmp_path / "new").exists()
    assert not os.path.exists("/tmp/tie_ext_was_run")


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated_weights_are_refused(kind, share, tmp_path):
    state = make("conv3").state_dict()
    torch.save(state, tmp_path / "w") if kind == "torch" else safetensors.torch.save_file(
        state, tmp_path / "w"
    )
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(
        ValueError,
        match=r"^Expected weights as a state_dict at .*, but got a truncated or foreign one: ",
    ) as refused:
        read_checkpoint(tmp_path / "w")
    assert "\n" not in str(refused.value)


class Softmaxed(Small):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(3 * 28 * 28, 9), nn.ReLU(), nn.Linear(9, 2))


class Headless(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Flat,
            "Expected a backbone with convolutions or transformer blocks for the head to read, "
            "but got Flat",
        ),
        (
            Headless,
            "Expected a backbone that ends in a linear layer, but Headless called none",
        ),
    ],
)
def test_networks_that_take_no_garbage_class_are_refused(
    model, message, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(BACKBONES, "conv3", lambda channels, n: model())
    torch.save(model().state_dict(), tmp_path / "w")
    assert main(attach(folder, tmp_path / "w", tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not written(tmp_path / "run")


def test_a_class_without_samples_is_refused(folder, weights, tmp_path, capsys):
    assert main(attach(folder, weights, tmp_path / "run", "--images", "1")) == 1
    assert "Expected samples of all 2 classes, but got none of class [" in capsys.readouterr().err
    assert not written(tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--backbone", "resnet18"],
            "one of conv3, conv5, residual, resnet20, torchvision:NAME or timm:NAME, but got "
            "'resnet18'; did you mean torchvision:resnet18?",
        ),
        (["--backbone", "os:system"], "or timm:NAME, but got 'os:system'\n"),
        (
            ["--backbone", "torchvision:resnet19"],
            "Expected a classifier of torchvision by its name there, such as resnet1",
        ),
        (
            ["--backbone", "torchvision:fcn_resnet50"],
            "Expected a classifier of torchvision by its name there",
        ),
        (["--mean", "0.5"], "Expected as many --mean as --std, but got 1 and 0"),
        (
            ["--mean", "123.7", "--std", "0.2"],
            "Expected mean to be a number in [0, 1], but got 123.7",
        ),
        (
            ["--mean", "0.5", "--std", "0"],
            "Expected std to be a number in [0.001, 1], but got 0.0",
        ),
        (["--mean", "nan", "--std", "1"], "Expected mean to be a number in [0, 1], but got nan"),
        (["--images", "0"], "Expected images to be an integer in [1, "),
        (["--seed", "-1"], "Expected --seed to be an integer in [0, "),
        (["--device", "abacus"], "Expected --device to be one that torch has here"),
    ],
)
def test_wrong_flags_exit_as_argparse_does(more, message, folder, weights, tmp_path, capsys):
    assert main(attach(folder, weights, tmp_path / "new", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_as_many_means_as_channels(folder, weights, tmp_path, capsys):
    assert (
        main(
            attach(
                folder, weights, tmp_path / "new", "--mean", "0.5", "0.5", "--std", "0.5", "0.5"
            )
        )
        == 1
    )
    assert (
        "Expected --mean and --std of 1 or 3 numbers, as the network takes 3 channels, but got 2"
        in capsys.readouterr().err
    )


def test_timm_is_asked_for_by_name_and_need_not_be_there(
    folder, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(attach(folder, weights, tmp_path / "new", backbone="timm:resnet18")) == 1
    error = capsys.readouterr().err
    assert error.startswith("tie-ext: Expected timm to be installed for timm:resnet18, but got: ")
    assert error.endswith("; pip install 'tie_ext[timm]'\n")
    assert not (tmp_path / "new").exists()


def test_timms_registry_makes_the_network(folder, tmp_path, monkeypatch):
    class Timm:
        list_models = staticmethod(lambda: ["small"])
        create_model = staticmethod(
            lambda name, pretrained, num_classes, in_chans: Small(num_classes, in_chans)
        )

    monkeypatch.setitem(sys.modules, "timm", Timm)
    torch.save(Small(2, 3).state_dict(), tmp_path / "w")
    how = ["--transform", "squash"]
    assert main(attach(folder, tmp_path / "w", tmp_path / "run", *how, backbone="timm:small")) == 0
    assert main(["score", str(tmp_path / "run"), *images_of(folder)]) == 0


@pytest.mark.parametrize("name", ["run.json", "training.safetensors", "network.safetensors"])
def test_a_folder_that_holds_a_run_is_refused_before_any_work(
    name, folder, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(attach_command, "read_checkpoint", lambda _: pytest.fail("it began"))
    (tmp_path / name).write_text("mine")
    assert main(attach(folder, weights, tmp_path)) == 1
    assert (
        f"Expected a new folder, but got {tmp_path}, which holds {name} of a run; give another "
        f"--out" in capsys.readouterr().err
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_run_that_came_while_images_were_read_is_refused(
    folder, weights, tmp_path, capsys, monkeypatch
):
    load, out = attach_command.load_images, tmp_path / "run"

    def meanwhile(*args):
        out.mkdir()
        (out / "training.safetensors").write_text("another's")
        return load(*args)

    monkeypatch.setattr(attach_command, "load_images", meanwhile)
    monkeypatch.setattr(attach_command, "attach", lambda *_, **__: pytest.fail("the work began"))
    assert main(attach(folder, weights, out)) == 1
    assert (
        f"Expected a new folder, but got {out}, which holds training.safetensors of a run"
        in capsys.readouterr().err
    )


def test_neither_command_writes_over_a_finished_attached_run(run, folder, weights, capsys):
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert main(attach(folder, weights, run)) == 1
    assert main(["train", "--data", f"folder:{folder}", "--out", str(run)]) == 1
    assert "which holds a run of tie-ext attach; give another --out" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 1
    assert (
        "but got one of tie-ext attach, which has nothing to continue" in capsys.readouterr().err
    )
    assert before == {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_the_folder_is_locked_while_the_work_goes_on(
    folder, weights, tmp_path, capsys, monkeypatch
):
    out, work, seen = tmp_path / "run", attach_command.attach, []

    def busy(*args, **how):
        seen.append(main(attach(folder, weights, out)) if not seen else 0)
        return work(*args, **how)

    monkeypatch.setattr(attach_command, "attach", busy)
    assert main(attach(folder, weights, out)) == 0
    assert seen == [1]
    assert (
        f"Expected {out} to be free, but got a folder that another process is writing a run to"
        in capsys.readouterr().err
    )
    with locked(out):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("when", ["network", "pictures", "scores"])
def test_a_run_that_was_stopped_while_it_wrote_is_made_anew(
    when, run, folder, weights, tmp_path, monkeypatch, capsys
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        {
            "network": lambda: patched.setattr(TIENet, "save", stop),
            "pictures": lambda: patched.setattr("tie_ext.cli.attach.save_snapshot", stop),
            "scores": lambda: patched.setattr(evaluation, "save_state", stop),
        }[when]()
        assert main(attach(folder, weights, out)) == 130
    assert written(out)
    assert main(["report", str(out)]) == (0 if when == "scores" else 1)
    assert main(attach(folder, weights, out, "--ood", f"folder:{folder}")) == 0
    assert not (out / "report.html").exists()
    for name in ("network.safetensors", "scores.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


@pytest.fixture
def resnet(folder, tmp_path):
    pytest.importorskip("torchvision")
    torch.save(make("torchvision:resnet18").state_dict(), tmp_path / "w.pt")
    assert (
        main(
            attach(
                folder,
                tmp_path / "w.pt",
                tmp_path / "run",
                backbone="torchvision:resnet18",
                size=32,
            )
        )
        == 0
    )
    return tmp_path / "run"


@pytest.mark.slow
def test_a_record_that_names_another_architecture_is_refused_and_nothing_large_is_built(
    resnet, folder, capsys, monkeypatch
):
    record = json.loads((resnet / "run.json").read_text())
    for name in (
        "torchvision:vit_h_14",
        "torchvision:resnet34",
        "os",
        "torchvision:../x",
        "timm:x",
        None,
        3,
        ["conv3"],
    ):
        (resnet / "run.json").write_text(
            json.dumps({**record, "settings": {**record["settings"], "backbone": name}})
        )
        for command in (["score", str(resnet), images_of(folder)[0]], ["report", str(resnet)]):
            capsys.readouterr()
            assert main(command) == 1
            error = capsys.readouterr().err
            assert error.startswith("tie-ext: Expected ")
            assert error.count("\n") == 1
    monkeypatch.setattr(registry, "build_plan", lambda *_: nn.Linear(10**5, 10**4, device="meta"))
    monkeypatch.setattr(registry, "build", lambda *_: pytest.fail("it was built"))
    with pytest.raises(
        ValueError,
        match=r"Expected a network of vit_h_14, 2000020000 bytes or more, but got a file of "
        r"50000000$",
    ):
        registry.build_for("vit_h_14", 3, 2, 50_000_000)


@pytest.mark.slow
def test_the_demos_images_can_be_attached_to_and_trained_on_with_every_flag(
    folder, tmp_path, capsys
):
    torch.save(Conv3(3, 10).state_dict(), tmp_path / "w")
    more = ["--images", "60", "--size", "20", "--ood", f"folder:{folder}"]
    assert (
        main(
            [
                "attach",
                "--backbone",
                "conv3",
                "--weights",
                str(tmp_path / "w"),
                "--data",
                "demo",
                "--out",
                str(tmp_path / "a"),
                *more,
            ]
        )
        == 0
    )
    net = TIENet.load(tmp_path / "a" / "network.safetensors")
    assert net.image_shape == (3, 20, 20)
    fast = ["--epochs", "1", "--candidates", "22", "--pool-size", "20", "--synthesizer", "white"]
    assert main(["train", "--data", "demo", "--out", str(tmp_path / "t"), *fast, *more]) == 0
    net, record = (
        TIENet.load(tmp_path / "t" / "network.safetensors"),
        json.loads((tmp_path / "t" / "run.json").read_text()),
    )
    assert net.image_shape == (1, 20, 20)
    assert type(net.backbone) is Conv3
    assert sum(load_state(tmp_path / "t" / "training.safetensors", "training")["counts"]) == 60
    assert {f"folder:{folder}", "digits", "photographs", "letters", "noise"} == set(
        record["numbers"]["garbage_rate"]
    )


def test_every_command_has_its_work():
    assert set(COMMANDS) == {
        "demo",
        "train",
        "attach",
        "score",
        "calibrate",
        "report",
        "explain",
        "reproduce",
    }


def test_a_run_without_its_pictures_has_no_report(run, tmp_path, capsys):
    out = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(out / "epochs")
    assert main(["report", str(out)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(
        r"```sh\n(tie-ext attach.*?)```",
        (Path(__file__).parents[2] / "README.md").read_text(),
        re.S,
    )
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 20)):
        for label in ("cat", "dog"):
            Path("IMAGES", split, label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(
                    f"IMAGES/{split}/{label}/{i}.png"
                )
    shutil.copytree("IMAGES/test", "NEW_IMAGES")
    torch.save(make("torchvision:resnet18").state_dict(), "weights.pt")
    for command in (
        block.replace("--size 224", "--size 48").replace("\\\n", "").splitlines()
    ):  # as the page has it, but quick
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    with open("rows.csv") as rows:
        levels = [row["level"] for row in csv.DictReader(rows)]
    assert len(levels) == 40
    assert set(levels) <= {"accepted", "uncertain", "garbage"}
