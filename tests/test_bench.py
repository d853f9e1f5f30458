"""What measures is code too, and pages take measured numbers only."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHAPE
from hypothesis import given
from hypothesis import strategies as st

from tie_ext import TIENet
from tie_ext.cli.images import ImageSet
from tie_ext.cli.main import main
from tie_ext.models.backbones import Conv3
from tie_ext.scores.decision import Decision

sys.path.append(str(Path(__file__).parent / "bench"))
import agreement
import airbench
import attached
import combined
import page
import threshold


def test_shares_of_a_decision():
    decision = Decision(
        label=torch.tensor([0, 1, -1, 2]),
        uncertainty=torch.zeros(4),
        score=torch.zeros(4),
        level=torch.tensor([0, 0, 1, 2]),
    )
    assert threshold.shares(decision, torch.tensor([0, 0, 0, 2])) == {
        "garbage": 0.25,
        "rejected": 0.5,
        "right": 0.25,
    }


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 1),
)
def test_a_threshold_of_an_accuracy_is_the_smallest_that_has_it(images, share):
    scores, right = (
        torch.tensor([s for s, _ in images], dtype=torch.float64),
        torch.tensor([r for _, r in images]),
    )

    def accuracy(threshold):
        return (right & (scores <= threshold)).sum().item() / len(scores)

    found = threshold.threshold_of_accuracy(scores, right, share)
    if found is None:
        assert accuracy(scores.max()) < share
    else:
        assert accuracy(found) >= share
        assert all(accuracy(s) < share for s in scores if s < found)


def write_images(folder: Path) -> None:
    """Two classes of eight grey images each, to train and to test on."""
    Image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for label in ("dark", "bright"):
            (folder / split / label).mkdir(parents=True)
            for i in range(8):
                Image.new("L", (28, 28), 20 * i + 40 * (label == "bright")).save(
                    folder / split / label / f"{i}.png"
                )


def test_inversions_are_shared_out_by_how_they_were_asked_for(tmp_path):
    write_images(tmp_path / "images")
    fast = [
        "--epochs",
        "1",
        "--candidates",
        "55",
        "--pool-size",
        "40",
        "--inversion-steps",
        "2",
        "--inversion-width",
        "4",
    ]
    assert (
        main(
            [
                "train",
                "--data",
                f"folder:{tmp_path / 'images'}",
                "--size",
                "28",
                "--out",
                str(tmp_path / "run"),
                *fast,
            ]
        )
        == 0
    )
    judge = TIENet.load(tmp_path / "run" / "network.safetensors")
    found = agreement.shares_of(tmp_path / "run", [judge], per_class=50)
    assert sum(found[f"fifth {i}"]["inversions"] for i in range(1, 6)) == pytest.approx(1)
    assert found["at most tau"]["inversions"] + found["above tau"]["inversions"] == pytest.approx(
        1
    )
    leads = [
        found[name]["largest"] - found[name]["second"]
        for name in ("margin 0.0", "margin 0.25", "margin 0.5", "margin 1.0")
    ]
    assert leads == sorted(leads)
    gaps = [found[f"fifth {i}"]["largest"] - found[f"fifth {i}"]["second"] for i in range(1, 6)]
    assert gaps == sorted(gaps)
    assert all(
        found[name]["judged"] >= found[name]["landed"] for name in ("margin 0.0", "margin 1.0")
    )  # it judges without the garbage class


@pytest.mark.filterwarnings("ignore")
def test_post_hoc_detectors_are_scored_on_every_set_at_hand(tmp_path):
    pytest.importorskip("pytorch_ood")
    import posthoc

    write_images(tmp_path / "mnist")
    write_images(tmp_path / "fashionmnist")
    found = posthoc.scores_of(
        TIENet(Conv3(1, 2), 2, SHAPE).eval(), str(tmp_path), "mnist", 160, seed=0
    )  # a tenth as many OOD images
    assert list(found) == ["ODIN", "i-ODIN", "B, single", "B, 5 mixed"]
    assert all({"fashionmnist", "noise"} <= set(of) for of in found.values())
    assert found["ODIN"]["fashionmnist"]["auroc"] == 0.5  # the same images
    assert all(0 <= numbers["auroc"] <= 1 for of in found.values() for numbers in of.values())


@pytest.mark.skipif(
    sys.platform != "linux", reason="forks, and reads how much memory a process has had"
)
def test_a_run_survives_a_little_fire(tmp_path):
    pytest.importorskip("matplotlib")
    command = [
        sys.executable,
        str(Path(__file__).parent / "bench" / "fire.py"),
        "--trials",
        "2",
        "--files",
        "8",
        "--every",
        "7",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "fire.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "fire.json").read_text())
    for of in record["kill"]["by aim"].values():
        assert of["runs"] == of["went on to the end"] == of["bit-identical"]
        assert (
            of["saved epochs lost"]
            == of["other epochs lost"]
            == of["half-written files left"]
            == 0
        )
    assert record["damage"]["wrong"] == []
    assert sum(of["files"] for of in record["damage"]["by file"].values()) == 8
    for of in record["full disk"].values():
        assert (
            of["writes"]
            == of["said so"]
            == of.get("earlier files intact", of["writes"])
            == of.get("went on to the same end", of["writes"])
        )
        assert of.get("files left half-written", 0) == 0


def test_a_place_in_a_page_takes_a_measured_number():
    accuracy = page.fill("{{mnist tie | accuracy}}")
    assert re.fullmatch(r"9\d\.\d\d ± \d\.\d\d", accuracy)
    assert page.fill("as {{mnist tie | accuracy}} %, in {1}") == f"as {accuracy} %, in {{1}}"
    assert page.fill(
        "{{garbage-weight-10/fashionmnist@allx20 marginal | right at 0.01}}"
    ).startswith("92.")
    assert "±" in page.fill("{{no-kl/mnist@allx20 tie | accuracy}}")
    assert "±" not in page.fill("{{no-kl/mnist@allx20 tie#0 | accuracy}}")
    assert 0 < float(page.fill("{{lambda-0.5/cifar10@20000x5 tie | tau}}")) < 1.1
    few, many = page.fill("{{lambda-0.5/cifar10@20000x5 tie | expelled}}").split(" to ")
    assert 0 < float(few) < float(many) < 50
    low, high = page.fill("{{fashionmnist tie | natural: garbage}}").split(" to ")
    assert 90 < float(low) < float(high) <= 100


@pytest.mark.parametrize(
    "place",
    [
        "mnist nobody | accuracy",
        "mnist tie | beauty",
        "mnist tie | svhn: garbage",
        "mnist inversions | judged margin 9",
        "mnist tie",
        "mnist tie#9 | accuracy",
    ],
)
def test_a_place_that_names_no_measured_number_is_an_error(place):
    with pytest.raises(ValueError, match="to name a number that was measured"):
        page.fill(f"{{{{{place}}}}}")


def test_patches_are_whitened():
    torch.manual_seed(0)
    x = torch.nn.functional.avg_pool2d(torch.rand(50, 3, 34, 34), 3, 1)  # neighbours are alike
    net = airbench.AirBench()
    net.learn_patches(x)
    rows = net.whiten(x).movedim(1, 0).reshape(24, -1)[:12]
    assert torch.equal(net.whiten.weight[:12], -net.whiten.weight[12:])
    torch.testing.assert_close(rows.mean(1), torch.zeros(12), rtol=0, atol=0.02)
    off = rows.cov() - torch.diag(rows.cov().diag())
    assert off.abs().max() < 0.05
    assert 0.5 < rows.var(1).max() < 1.05


def test_a_quick_training_goes_on_where_it_was_stopped_and_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(airbench, "BATCH", 16)
    torch.manual_seed(0)
    y = torch.arange(96) % 2
    images = ImageSet(
        (torch.rand(96, 3, 32, 32) * 100 + 100 * y[:, None, None, None]).to(torch.uint8),
        y,
        ("dark", "bright"),
    )

    def fresh():
        torch.manual_seed(0)
        return TIENet(airbench.AirBench(3, 2), 2, images.shape)

    def until_the_third(*given, made=airbench.batches):
        if given[1] == 2:
            raise KeyboardInterrupt
        return made(*given)

    whole, stopped = fresh(), fresh()
    airbench.train(whole, images, 8, 0, tmp_path / "whole.training")
    monkeypatch.setattr(airbench, "batches", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        airbench.train(stopped, images, 8, 0, tmp_path / "stopped.training")
    monkeypatch.undo()
    monkeypatch.setattr(airbench, "BATCH", 16)
    again = fresh()
    airbench.train(again, images, 8, 0, tmp_path / "stopped.training")
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items()
    )
    with torch.no_grad():
        assert (again(images.x / 255.0).argmax(1) == y).float().mean() > 0.9


def test_the_bias_of_the_whitening_stays_after_its_epochs(tmp_path, monkeypatch):
    images = ImageSet(
        torch.randint(255, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 2, ("a", "b")
    )
    monkeypatch.setattr(airbench, "BATCH", 1)
    for epochs, moved in ((1, True), (0, False)):
        monkeypatch.setattr(airbench, "WHITENING_EPOCHS", epochs)
        net, first = (TIENet(airbench.AirBench(3, 2), 2, images.shape) for _ in range(2))
        first.backbone.learn_patches(images.x / 255.0)
        airbench.train(net, images, 1, 0, tmp_path / f"{epochs}.training")
        assert torch.equal(net.backbone.whiten.weight, first.backbone.whiten.weight)
        assert torch.equal(net.backbone.whiten.bias, first.backbone.whiten.bias) != moved


def test_images_are_mirrored_in_turn_and_moved_by_two_pixels_at_most():
    images = ImageSet(
        torch.arange(32 * 32)
        .reshape(1, 1, 32, 32)
        .remainder(251)
        .to(torch.uint8)
        .repeat(6, 3, 1, 1),
        torch.arange(6),
        (),
    )
    first, middle, places = torch.arange(6) < 3, images.x[0, :, 2:-2, 2:-2] / 255, set()
    for epoch in (0, 1):
        (x, y), *_ = airbench.batches(images, epoch, first)
        for one, label in zip(x, y, strict=True):
            still = one.flip(2) if first[label] ^ bool(epoch) else one
            (place,) = [
                (i, j)
                for i in range(5)
                for j in range(5)
                if torch.equal(still[:, i : i + 28, j : j + 28], middle)
            ]
            places.add(place)
    assert len(places) > 4


def test_a_falling_rate_is_the_half_cosine_of_openood_and_training_goes_on_where_it_was_stopped(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(attached, "BATCH", 8)
    torch.manual_seed(0)
    y = torch.arange(32) % 2
    images = ImageSet(
        (torch.rand(32, *SHAPE) * 100 + 100 * y[:, None, None, None]).to(torch.uint8),
        y,
        ("dark", "bright"),
    )
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a: rates.append(self.param_groups[0]["lr"]) or step(self, *a),
    )

    def fresh():
        torch.manual_seed(0)
        return TIENet(Conv3(SHAPE[0], 2), 2, SHAPE)

    def until_the_third(images, made=attached.batches):
        for batch in made(images):
            if len(rates) == 22:  # the second run, of 12 steps as the first, is in its third epoch
                raise KeyboardInterrupt
            yield batch

    whole, stopped, again = fresh(), fresh(), fresh()
    attached.train(whole, images, 3, 0, tmp_path / "whole.training", falling=True)
    assert rates == pytest.approx(
        [1e-6 + (0.1 - 1e-6) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(12)]
    )
    monkeypatch.setattr(attached, "batches", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        attached.train(stopped, images, 3, 0, tmp_path / "stopped.training", falling=True)
    monkeypatch.setattr(attached, "batches", until_the_third.__defaults__[0])
    attached.train(again, images, 3, 0, tmp_path / "stopped.training", falling=True)
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items()
    )


def test_the_best_combination_without_the_head_is_found_for_each_set():
    torch.manual_seed(0)
    kinds = {
        "held": (200, 0.0),
        "id": (200, 0.0),
        "val:photos": (50, 9.0),
        "digits": (100, 1.0),
        "noise": (100, 1.0),
    }
    tells = {"GEN": "digits", "KNN": "noise", "ViM": None, "head": "digits noise"}
    scores = {
        label: {
            name: torch.randn(count)
            + shift * (of is not None and (name in of.split() or "val" in name))
            for name, (count, shift) in kinds.items()
        }
        for label, of in tells.items()
    }
    scores["KNN of 5000"] = {
        name: x + 100 * (name == "noise") for name, x in scores["KNN"].items()
    }  # a part of combine, and no candidate
    best = combined.best_without_head(scores)
    assert set(best) == {"digits", "noise"}
    assert "GEN" in best["digits"]["members"]
    assert "KNN" in best["noise"]["members"]
    assert not any({"head", "KNN of 5000"} & set(of["members"]) for of in best.values())
    alone = combined.auroc(scores["GEN"]["id"], scores["GEN"]["digits"])
    assert alone <= best["digits"]["auroc"] < 0.95


def test_networks_say_what_they_cannot_take(monkeypatch, capsys):
    with pytest.raises(
        ValueError, match="Expected images of 3 channels for OpenOOD's ResNet18_32x32, but got 1"
    ):
        attached.openood_resnet18(1, 10)
    monkeypatch.setattr(
        sys,
        "argv",
        ["attached.py", "--data", "cifar10", "--backbone", "airbench", "--device", "cuda"],
    )
    with pytest.raises(SystemExit):
        attached.main()
    assert "Expected --device cpu for airbench" in capsys.readouterr().err


def tiny_classifier():
    """Features and a last layer of a network for four classes, images that it takes, and their
    labels.
    """
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 12), torch.nn.ReLU())
    fc, x = torch.nn.Linear(12, 4), torch.rand(400, 3, 3, 3)
    return features.requires_grad_(False), fc.requires_grad_(False), x, fc(features(x)).argmax(1)


def test_rivals_score_features_as_their_host_scores_images():
    pytest.importorskip("pytorch_ood")
    import rivals
    from pytorch_ood.detector import EnergyBased, MaxSoftmax, NNGuide, fDBD

    features, fc, x, y = tiny_classifier()
    new = torch.rand(50, 3, 3, 3)
    found, failed = rivals.scores_of(
        rivals.makers(fc, features(x), y), {"new": features(new).split(20)}
    )
    net = torch.nn.Sequential(features, fc)
    loader = [(x, y)]
    by_host = {
        "MSP": MaxSoftmax(net),
        "energy": EnergyBased(net),
        "fDBD": fDBD(features, fc).fit(loader),
        "NNGuide": NNGuide(features, fc).fit(loader),
    }
    for name, detector in by_host.items():
        torch.testing.assert_close(found[name]["new"], detector.predict(new))
    # Those that need an image of each class have a reason where this network predicts none of one.
    assert set(found) | set(failed) == set(rivals.makers(fc, features(x), y))
    assert all(of["new"].shape == (50,) and of["new"].isfinite().all() for of in found.values())


def test_a_rival_that_cannot_be_fitted_has_a_reason_and_no_number():
    pytest.importorskip("pytorch_ood")
    import rivals

    features, fc, x, _ = tiny_classifier()
    y = torch.tensor([0, 3]).repeat(200)  # no image of classes 1 and 2
    found, failed = rivals.scores_of(rivals.makers(fc, features(x), y), {"new": [features(x)]})
    assert {"Mahalanobis", "RMD", "SHE"} <= set(failed)
    assert {"MSP", "fDBD", "KNN"} <= set(found)
    assert not set(found) & set(failed)


def test_cadref_by_hand():
    pytest.importorskip("pytorch_ood")
    import rivals

    fc = torch.nn.Linear(2, 2).requires_grad_(False)
    fc.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    fc.bias.zero_()
    score = rivals.cadref(
        fc, torch.tensor([[3.0, 1.0], [1.0, 1.5], [5.0, 1.0]])
    )  # classes 0, 1, 0; the mean of 0 is (4, 1)
    energy = torch.tensor([[2.0, -2.0], [-0.5, 0.5], [4.0, -4.0]]).logsumexp(1).mean()
    new = torch.tensor([[6.0, 2.0]])  # two more for class 0, one more against it, of 8 in all
    expected = 2 / 8 / torch.tensor([4.0, -4.0]).logsumexp(0) + 1 / 8 / energy
    torch.testing.assert_close(score(new), expected[None])


def test_histograms_and_their_divergence():
    pytest.importorskip("pytorch_ood")
    import rivals

    shares = rivals.histogram(
        torch.tensor([[0.0, 0.005, 1.0, 2.0]]), torch.tensor(0.0), torch.tensor(1.0)
    )
    assert shares[0, 0] == 0.5
    assert shares[0, -1] == 0.25
    assert shares.sum() == 0.75  # one value is beyond the range
    torch.testing.assert_close(rivals.smoothed(shares, 4)[0, :2], torch.tensor([0.25, 0.125]))
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    found = rivals.divergence(p, p[0], 0.0)
    torch.testing.assert_close(
        found, torch.tensor([0.0, 0.4 * math.log(0.9 / 0.5) - 0.4 * math.log(0.1 / 0.5)])
    )


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
    st.lists(st.integers(0, 9), min_size=1, max_size=20),
)
def test_auroc_is_how_often_an_ood_image_scores_higher(inside, outside):
    pytest.importorskip("pytorch_ood")
    import rivals

    wins = [(o > i) + (o == i) / 2 for o in outside for i in inside]
    assert rivals.auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(
        sum(wins) / len(wins)
    )


@given(st.integers(19, 200))
def test_the_threshold_of_rivals_is_the_conformal_one(count):
    pytest.importorskip("pytorch_ood")
    import rivals

    from tie_ext.scores.threshold import conformal_threshold

    scores = torch.randperm(count).double()
    assert rivals.threshold(scores) == conformal_threshold(scores, 0.05).item()


def test_regret_is_against_the_best_rival_of_each_column():
    pytest.importorskip("pytorch_ood")
    import rivals

    table = {
        "a near": {"combine": 0.8, "head": 0.99, "KNN": 0.9, "GEN": 0.7, "RMD": None},
        "a far": {"combine": 0.95, "head": 0.5, "KNN": 0.6, "GEN": 0.9, "RMD": 0.1},
    }
    ours = ("combine", "head")
    found = rivals.regrets(table, "combine", ours)
    assert found["a near"] == (pytest.approx(-0.1), "KNN")  # the head is ours, and no rival
    assert found["a far"] == (pytest.approx(0.05), "GEN")
    assert rivals.worst_and_mean(table, "combine", ours) == (
        pytest.approx(-0.1),
        pytest.approx(-0.025),
        2,
    )
    assert rivals.worst_and_mean(table, "RMD", ours) == (
        pytest.approx(-0.8),
        pytest.approx(-0.8),
        1,
    )
    assert rivals.worst_and_mean(table, "KNN", ours)[0] == pytest.approx(-0.3)


def test_columns_are_means_over_sets_and_then_over_runs():
    pytest.importorskip("pytorch_ood")
    import public_networks

    one = {"network": "n", "near": ["a"], "far": ["b", "c"], "validation": []}
    first = one | {
        "scores": {"s": {"a": [0.5, 0, 0], "b": [0.6, 0, 0], "c": [0.8, 0, 0]}, "t": None}
    }
    second = one | {"scores": {"s": {"a": [0.7, 0, 0], "b": [1.0, 0, 0]}, "t": None}}
    found = public_networks.columns_of([first, second])
    assert set(found) == {"n near", "n far"}
    assert found["n near"]["s"][0] == pytest.approx(0.6)
    assert found["n far"]["s"][0] == pytest.approx(0.85)
    assert found["n near"]["t"] is None


@pytest.mark.parametrize("known", [3, 4])
def test_a_choice_of_classes_shares_no_image(known):
    pytest.importorskip("pytorch_ood")
    import public_networks

    labels = {name: torch.arange(60) % 6 for name in ("own", *public_networks.VALIDATION)}
    parts = public_networks.chosen_parts("own", known, (), 0, labels)
    mine = [parts[name] for name in ("fit", "calibration", "test", "left out")]
    assert torch.cat([part.rows for part in mine]).sort().values.equal(torch.arange(60))
    assert set(parts["fit"].labels.tolist()) == set(range(known))
    assert (parts["left out"].labels == -1).all()
    left = set(labels["own"][parts["left out"].rows].tolist())
    assert left.isdisjoint(labels["own"][parts["test"].rows].tolist())
    assert len(left) == 6 - known
