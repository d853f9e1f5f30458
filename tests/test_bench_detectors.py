"""pytorch-ood's detectors beside ours: made for a network, scored, and put into a table."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tie_ext import TIENet
from tie_ext.cli.images import ImageSet
from tie_ext.models.backbones import Conv3

pytest.importorskip("pytorch_ood")
sys.path.append(str(Path(__file__).parent / "bench"))
import detectors
import detectors_page

UNFIT = {"MCD", "MCM", "WeightedEBO"}
"""One needs dropout, one texts, one trained weights."""


@pytest.fixture(scope="module")
def record() -> dict:
    """A record of an untrained network on squares of grey, whose classes are the network's own."""
    torch.manual_seed(0)
    net = TIENet(Conv3(1, 2), 2, (1, 28, 28), head="multilayer").eval()

    def squares(count: int) -> torch.Tensor:
        return (
            torch.rand(count, 1, 4, 4).repeat_interleave(7, 2).repeat_interleave(7, 3) * 255
        ).to(torch.uint8)

    x = {
        name: squares(count)
        for name, count in {"train": 200, "held": 200, "id": 60, "mnist": 30}.items()
    }
    x["mnist"] = x["mnist"] // 8
    with torch.no_grad():
        centre = net(x["train"].float() / 255).mean(0)
        net.fc.bias -= centre  # so that each class has images
        net.garbage.standardise(net.statistics(x["train"].float() / 255)[1])
        sets = {name: ImageSet(of, net(of.float() / 255).argmax(1)) for name, of in x.items()}
    assert all(len(of.y.unique()) == 2 for name, of in sets.items() if name != "mnist")
    seen = {name: detectors.see(net, of) for name, of in sets.items()}
    made = detectors.makers(net, seen)
    found = {name: detectors.judged(name, make, sets, seen) for name, make in made.items()}
    return {
        "data": "squares",
        "images": 200,
        "epochs": 0,
        "backbone": "conv3",
        "seed": 0,
        "command": "detectors.py",
        "detectors": found,
    }


def test_all_but_three_fit_the_network_and_these_say_why(record):
    reasons = {name: run["reason"] for name, run in record["detectors"].items() if "reason" in run}
    assert set(reasons) == UNFIT, reasons
    assert "text_embeddings" in reasons["MCM"]
    assert reasons["MCD"] == "gives all ID images one score"
    assert len(record["detectors"]) - len(UNFIT) - len(detectors.OURS) >= 30


def test_scores_of_one_pass_for_all_are_those_of_predict(record):
    torch.manual_seed(1)
    net = TIENet(Conv3(1, 2), 2, (1, 28, 28)).eval()
    images = ImageSet(
        torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 2
    )
    seen = dict.fromkeys(("train", "held"), detectors.see(net, images))
    for name in ("TIEDetector", "EnergyBased", "Mahalanobis", "ReAct", "ASH", "Combined"):
        detector = detectors.makers(net, seen)[name]()
        if name in ("Mahalanobis", "ReAct"):
            detectors.fit(detector, seen["train"])
        with torch.no_grad():
            torch.testing.assert_close(
                detectors.read(detector, seen["held"]),
                detectors.predicted(detector, images),
                rtol=1e-4,
                atol=1e-4,
            )


def test_the_table_has_those_that_fit_best_first(record, tmp_path, monkeypatch):
    monkeypatch.setattr(detectors_page, "RESULTS", tmp_path)
    (tmp_path / "squares-seed0.json").write_text(json.dumps(record))
    rows = detectors_page.rows([record])
    assert len(rows) == len(record["detectors"]) - len(UNFIT)
    means = [float(row["mean AUROC"]) for row in rows]
    assert means == sorted(means, reverse=True)
    assert all(len(row) <= 5 for row in rows)
    page = detectors_page.page()
    assert "- MCM: TypeError" in page
    assert "**TIEDetector**" in page


def test_a_slow_detector_that_was_not_run_on_every_network_has_its_cost_and_one_that_was_has_a_mark(
    record, tmp_path, monkeypatch
):
    monkeypatch.setattr(detectors_page, "RESULTS", tmp_path)
    other = {
        **record,
        "seed": 1,
        "detectors": {name: run for name, run in record["detectors"].items() if name != "ODIN"},
    }
    for of in (record, other):
        (tmp_path / f"squares-seed{of['seed']}.json").write_text(json.dumps(of))
    page = detectors_page.page()
    assert (
        f"- ODIN: reads the images themselves, and has been run on 1 of 2 networks ({record['detectors']['ODIN']['seconds']:.1f} s for"
        in page
    )
    assert "| GradNorm\\* " in page
    assert "| EnergyBased " in page
    assert "tested on 1000 images of each set" in page
    assert "| **IODIN**\\* " in page
