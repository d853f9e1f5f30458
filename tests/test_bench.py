"""What measures is code too, and pages take measured numbers only."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pytorch_ood")
sys.path.append(str(Path(__file__).parent / "bench"))
import choice
import page
import public_networks
import public_page
import rivals


def test_numbers_of_cells_in_a_page():
    accuracy = page.fill("{{mnist tie | accuracy}}")
    assert re.fullmatch(r"9\d\.\d\d ± \d\.\d\d", accuracy)
    assert page.fill("as {{mnist tie | accuracy}} %, in {1}") == f"as {accuracy} %, in {{1}}"
    assert "±" not in page.fill("{{bfloat16/cifar10@allx20 tie | accuracy}}")
    assert 0 < float(page.fill("{{cifar10@20000x5 tie | tau}}")) < 1.1
    low, high = page.fill("{{fashionmnist tie | natural: garbage}}").split(" to ")
    assert 90 < float(low) < float(high) <= 100
    assert page.fill("{{fashionmnist tie | mnist: at 5 %}}") != accuracy


def test_tables_and_cells_of_history_in_a_page():
    found = page.fill("{{history attached in_garbage}}")
    assert found.startswith("| OOD set")
    cell = page.fill("{{history attached in_garbage | CIFAR-100 | MNIST}}")
    assert cell in found
    assert page.fill("{{mine}}", {"mine": lambda: "text"}) == "text"


@pytest.mark.parametrize(
    "place",
    [
        "mnist nobody | accuracy",
        "mnist tie | beauty",
        "mnist tie | svhn: garbage",
        "history attached nothing",
        "history nobody rows",
        "history attached in_garbage | Mars | MNIST",
        "mnist tie",
    ],
)
def test_places_without_a_measured_number_are_errors(place):
    with pytest.raises(ValueError, match="to name a number that was measured"):
        page.fill(f"{{{{{place}}}}}")


def test_public_tables_rank_rivals_by_worst_regret(monkeypatch):
    regret = {"combine": [-0.1, 0, 4], "A": [-0.3, 0, 4], "B": [-0.2, 0, 3], "C": [-0.1, 0, 1]}
    of = {"combine": [0.9, 0.2, 0.7]} | {key: [0.8, 0.3, 0.6] for key in ("attach", *"ABC")}
    columns = {f"{name} {kind}": of for name in ("cifar10-resnet20", "mnist") for kind in ("far",)}
    columns |= {"cifar10-resnet20 near": of | {"combine": [0.5, 0.9, 0.1]}}
    monkeypatch.setattr(
        public_page,
        "summary",
        lambda: {
            "regret": regret | dict.fromkeys(public_page.OURS[1:], (-1, -1, 4)),
            "columns": columns,
        },
    )
    assert public_page.rivals() == ["B", "A", "C"]  # C lacks more columns than one
    assert list(public_page.columns()) == [
        "cifar10-resnet20 near",
        "cifar10-resnet20 far",
        "mnist far",
    ]
    assert "| 50.0 (50.0)        | 90.0 (90.0)       | 70.0 " in public_page.front()
    assert "-20.0 (of 3)" in public_page.every()


def tiny_classifier():
    """Features and a last layer of a network for four classes, images that it takes, and their
    labels.
    """
    features = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 12), torch.nn.ReLU())
    fc, x = torch.nn.Linear(12, 4), torch.rand(400, 3, 3, 3)
    return features.requires_grad_(False), fc.requires_grad_(False), x, fc(features(x)).argmax(1)


def test_rivals_score_features_as_their_host_scores_images():
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

    features, fc, x, _ = tiny_classifier()
    y = torch.tensor([0, 3]).repeat(200)  # no image of classes 1 and 2
    found, failed = rivals.scores_of(rivals.makers(fc, features(x), y), {"new": [features(x)]})
    assert {"Mahalanobis", "RMD", "SHE"} <= set(failed)
    assert {"MSP", "fDBD", "KNN"} <= set(found)
    assert not set(found) & set(failed)


def test_cadref_by_hand():

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

    wins = [(o > i) + (o == i) / 2 for o in outside for i in inside]
    assert rivals.auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(
        sum(wins) / len(wins)
    )


def test_regret_is_against_the_best_rival_of_each_column():

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

    labels = {name: torch.arange(60) % 6 for name in ("own", *public_networks.VALIDATION)}
    parts = public_networks.chosen_parts("own", known, (), 0, labels)
    mine = [parts[name] for name in ("fit", "calibration", "test", "left out")]
    assert torch.cat([part.rows for part in mine]).sort().values.equal(torch.arange(60))
    assert set(parts["fit"].labels.tolist()) == set(range(known))
    assert (parts["left out"].labels == -1).all()
    left = set(labels["own"][parts["left out"].rows].tolist())
    assert left.isdisjoint(labels["own"][parts["test"].rows].tolist())
    assert len(left) == 6 - known


@pytest.mark.parametrize("seed", range(4))
def test_no_image_is_fitted_on_and_judged(seed):
    of = "photos_trash"
    labels = {of: torch.arange(600) % 6}
    labels |= dict.fromkeys(public_networks.VALIDATION, torch.zeros(5).long())
    tested = public_networks.chosen_parts(of, 4, (), seed, labels)
    found = public_networks.held_out_parts(of, 4, seed, labels)
    parts = [found[name] for name in ("fit", "calibration", "test", "held out")]
    rows = torch.cat([part.rows for part in parts])
    assert (
        len(rows)
        == len(rows.unique())
        == len(tested["fit"].rows) + len(tested["calibration"].rows)
    )
    assert not set(rows.tolist()) & set(tested["test"].rows.tolist())
    known = [set(labels[of][part.rows].tolist()) for part in parts]
    assert known[0] == known[1] == known[2]
    assert (len(known[0]), len(known[3]), known[0] & known[3]) == (3, 1, set())
    for part in parts[:3]:  # new labels go from 0 to 2 in the order of the classes
        order = sorted(known[0])
        assert part.labels.tolist() == [order.index(y) for y in labels[of][part.rows].tolist()]


def test_choice_by_worst_regret_then_members_then_mean(monkeypatch):
    few = choice.Candidate(("energy",), 1, 0, 0, "votes", ("KNN",), True, 1.0)
    many = few._replace(body=("energy", "fDBD"))
    monkeypatch.setattr(choice, "CANDIDATES", [many, few, few._replace(tail=0.5), many])
    assert (few.members, many.members) == (2, 3)

    def table(*columns):
        return {(str(i), "validation near"): (torch.tensor(c), "") for i, c in enumerate(columns)}

    better = table([-0.5, -0.55, -0.58, -0.9], [0.0, 0.0, 0.2, 9.0])
    assert choice.best(better, "01", "validation") == 2  # within 0.1, and few, and the better mean
    assert choice.best(better, "1", "validation") == 3
    assert choice.best(table([-0.3, -0.5, -0.5, -0.9]), "0", "validation") == 0


def test_regret_of_means_over_runs():
    def run(ours, a, b):
        return choice.Columns({"test far": torch.tensor(ours)}, {"test far": {"a": a, "b": b}})

    runs = [run([0.5, 0.75], 0.75, 0.5), run([0.75, 0.75], 0.25, 0.75)]
    ((found, rival),) = choice.regrets({"net": runs}).values()
    assert (found.tolist(), rival) == ([0.0, 12.5], "b")
    ours = choice.aurocs(torch.tensor([[0.0, 1, 2, 3]]), torch.tensor([[1.0, 9, -1, 2.5]]))
    assert ours.tolist() == [(1.5 + 4 + 0 + 3) / 16]
