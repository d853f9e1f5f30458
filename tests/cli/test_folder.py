"""Run folders: those of earlier versions, and architectures that a record names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_net

from cli.conftest import attach, make, record_of, run
from tie_ext import Combined
from tie_ext.cli.evaluation import decisions
from tie_ext.cli.folder import load_run, read_record
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.cli.transform import Transform
from tie_ext.pytorch_ood import TIEDetector
from tie_ext.utils.files import load_state, save_state, sha256, write_json


def as_0_2_0(out):
    """Rewrite a run as 0.2.0 kept it."""
    detector = Combined.load(out)
    saved = load_state(out / "detector.safetensors", "detector")
    del saved["calibration_scores"], saved["calibration_labels"]
    state = {**saved, "reference": detector.reference._asdict()}
    save_state(out / "combined" / "members.safetensors", "members", state)
    shutil.copy(out / "network.safetensors", out / "combined")
    about = json.loads((out / "detector.json").read_text())
    about |= {"version": 1, "fitted_here": []}
    about["members_sha256"] = sha256(out / "combined" / "members.safetensors")
    write_json(out / "combined" / "detector.json", about)
    for name in ("detector.safetensors", "detector.json"):
        (out / name).unlink()
    record = record_of(out)
    record["settings"]["precision"] = record["settings"].pop("autocast_dtype")
    write_json(out / "run.json", record)


def test_a_run_of_0_2_0_scores_as_it_did(attached, folder, tmp_path, capsys):
    out = Path(shutil.copytree(attached, tmp_path / "run"))
    commands = [["score", out, folder / "test", *more] for more in ([], ["--false-alarm", "0.25"])]
    before = [(run(*command), capsys.readouterr().out) for command in commands]
    as_0_2_0(out)
    assert [(run(*command), capsys.readouterr().out) for command in commands] == before
    assert before[0][0] == 0


def test_names_of_0_2_0_in_a_record(tmp_path):
    config = {"epochs": 3, "search": 5, "precision": "bfloat16"}
    recipe = {"config": config, "objective": "garbage", "garbage": "layers", "prior": ["white"]}
    write_json(tmp_path / "run.json", {"settings": {"recipe": recipe, "precision": "float32"}})
    settings = read_record(tmp_path)["settings"]
    assert settings["autocast_dtype"] == "float32"
    assert settings["recipe"] == {
        "config": {"epochs": 3, "adversarial_steps": 5, "autocast_dtype": "bfloat16"},
        "criterion": "garbage",
        "head": "multilayer",
        "prior": ["white"],
    }


def test_a_detector_before_an_older_one_below(tmp_path):
    for folder, threshold in ((tmp_path, 1.0), (tmp_path / "combined", 2.0)):
        detector = TIEDetector(make_net().eval())
        detector.threshold = torch.tensor(threshold)
        detector.save(folder)
    for place, expected in ((tmp_path, 1.0), (tmp_path / "combined", 2.0)):
        assert load_run(place)[1].threshold == expected
    (tmp_path / "detector.json").unlink()
    assert load_run(tmp_path)[1].threshold == 2.0


@pytest.mark.slow
def test_another_architecture_in_the_record(folder, tmp_path, capsys):
    torch.save(make("torchvision:resnet18").state_dict(), tmp_path / "w.pt")
    out, name = tmp_path / "run", "torchvision:resnet18"
    assert run(*attach(folder, tmp_path / "w.pt", out, backbone=name, size=32)) == 0
    record = record_of(out)
    for other in ("torchvision:resnet34", "os", "torchvision:../x", None, 3, ["conv3"]):
        record["settings"]["backbone"] = other
        write_json(out / "run.json", record)
        capsys.readouterr()
        assert run("score", out, folder) == 1
        error = capsys.readouterr().err
        assert error.startswith("tie-ext: Expected ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(("head", "right"), [("multilayer", 1.0), ("linear", 0.0)])
def test_accuracy_where_garbage_takes_every_image(head, right):
    """Over n outputs where the head leaves the classifier as it is, else over n+1."""
    from tie_ext import TIENet
    from tie_ext.models.backbones import Conv3

    net = TIENet(Conv3(1, 3), 3, (1, 28, 28), head=head).eval()
    x = torch.randint(0, 256, (6, 1, 28, 28), dtype=torch.uint8)
    if head == "linear":
        net.garbage.bias.data.fill_(1e6)
    else:
        net.garbage.standardise(net.statistics(x.float() / 255)[1].detach())
        net.garbage.network[-1].bias.data.fill_(1e6)
    how = Transform.squash((1, 28, 28))
    images = ImageSet(x, net(x.float() / 255).argmax(1), tuple("abc"))
    numbers, scores = decisions(net, RunImages(images, images, {"same": images}, how))
    assert (numbers["accuracy"], numbers["id_garbage_rate"]) == (right, 1.0)
    assert (numbers["garbage_rate"], numbers["rejected"]) == ({"same": 1.0}, {"same": 1.0})
    assert len(scores["score"]["same"]) == 6
    plain, _ = decisions(net, RunImages(images, images, {}, how), garbage=False)
    assert plain == {"accuracy": 1.0}
