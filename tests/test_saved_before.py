"""What earlier versions saved still loads and scores as it did, as CHANGELOG.md promises."""

import json
from pathlib import Path

import pytest
import torch
from conftest import close, refused
from torch import Tensor, nn

from tie_ext import TIENet

DATA = Path(__file__).parent / "data"
SAVED, ATTACHED = DATA / "saved_by_0.1.0", DATA / "saved_by_0.2.0"
RAMP = torch.linspace(0, 1, 4 * 28 * 28).reshape(4, 1, 28, 28)


class Small(nn.Module):
    """The backbone of the saved networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_network_that_0_1_0_saved():
    net = TIENet.load(SAVED / "network.safetensors", Small())
    assert (net.num_classes, net.image_shape, net.class_names, net.autocast_dtype) == (
        3,
        (1, 28, 28),
        ("a", "b", "c"),
        "bfloat16",
    )
    assert torch.isfinite(net.decide(torch.rand(4, 1, 28, 28)).score).all()


def test_detector_that_0_1_0_saved():
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import TIEDetector

    detector = TIEDetector.load(SAVED, Small())
    assert detector.threshold == pytest.approx(-1.656660556793213)
    assert torch.isfinite(detector(torch.rand(4, 1, 28, 28))).all()


def test_scores_of_a_head_that_0_2_0_saved():
    net = TIENet.load(ATTACHED / "network.safetensors", Small())
    assert net.class_names == ("a", "b", "c")
    assert net.decide(RAMP).score.tolist() == pytest.approx(
        [10.01477, 5.465388, 10.37057, 14.10744], rel=1e-4
    )


def test_scores_of_a_combination_of_0_2_0():
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import Combined

    detector = Combined.load(ATTACHED, Small())
    assert detector.threshold == pytest.approx(1.748891)
    assert detector(RAMP).tolist() == pytest.approx(
        [32.87762, 13.96002, 13.94282, -38.60067], rel=1e-3
    )


def load(folder: Path):
    """The detector in a folder."""
    pytest.importorskip("pytorch_ood")
    from tie_ext.pytorch_ood import load_detector

    return load_detector(folder, Small())


def test_run_folder_as_a_detector_folder():
    detector = load(DATA / "run_by_0.2.0")
    assert [type(member).__name__ for member in detector.detectors] == [
        "TIEDetector",
        "SampledKNN",
        "GEN",
    ]
    assert detector.threshold == pytest.approx(3.894331)
    assert detector(RAMP).tolist() == pytest.approx(
        [164.9135, 315.9383, 636.0538, 709.3142], rel=1e-3
    )
    assert detector.decide(RAMP).level.tolist() == [1, 1, 1, 1]
    net = TIENet.load(DATA / "run_by_0.2.0" / "network.safetensors", Small())
    assert net.decide(RAMP).score.tolist() == pytest.approx(
        [8.921303, 13.11982, 26.38901, 31.38537], rel=1e-4
    )


def test_members_and_a_rule_that_is_retired():
    detector = load(DATA / "members_by_0.2.0")
    assert (detector.rule, len(detector.detectors)) == ("fisher", 12)
    assert detector.threshold == pytest.approx(32.48936)
    assert detector(RAMP).tolist() == pytest.approx(
        [21.18664, 21.75953, 49.13498, 48.91253], rel=1e-4
    )
    assert detector.decide(RAMP).level.tolist() == [0, 0, 2, 2]
    expected = [
        [-1.11649, 0.98849, -1.32291, -0.40422, -0.41711, 1.08742, 0.74288, 0.31013, 1.18778],
        [-1.20118, 0.99070, -1.36475, -0.39695, -0.44080, 1.08955, 0.74288, 0.08278, 3.08464],
    ]
    close(detector.scores(RAMP)[:2, :9], torch.tensor(expected), rtol=1e-3, atol=1e-4)
    assert detector.scores(RAMP)[:, 10:].tolist() == [
        pytest.approx([value] * 2, rel=1e-3) for value in (0.104988, 0.042791, 0.297884, 0.372188)
    ]


def test_separate_tails_of_0_3_0(tmp_path):
    detector = load(DATA / "saved_by_0.3.0")
    assert (detector.rule, detector.reference.tail) == ("tails", None)
    scores = [584.9165, 1.085373, -0.6235613, -2.607740]

    def as_before(of) -> None:
        assert of(RAMP).tolist() == pytest.approx(scores, rel=1e-4)
        assert of.threshold == pytest.approx(0.7151, abs=1e-4)
        assert of.decide(RAMP).level.tolist() == [1, 1, 0, 0]

    as_before(detector)
    detector.save(tmp_path)
    as_before(load(tmp_path))
    for refuse in (
        lambda: detector.fit([RAMP]),
        lambda: detector.set_hyperparameters(rule="sum"),
    ):
        with refused("Expected"):
            refuse()
        as_before(detector)
    held = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    detector.fit([nn.functional.interpolate(held, 28)])
    assert (detector.rule, detector.reference.tail is None) == ("tail", False)
    again = load(tmp_path).set_hyperparameters(rule="tail")
    with pytest.raises(Exception, match="fit"):
        again(RAMP)


@pytest.mark.parametrize(
    ("folder", "score", "threshold", "tau"),
    [
        ("threshold", [-1.11649, -1.20118, -1.30421, -1.39141], -1.105096, None),
        ("tau", [-1.65442, -1.74128, -1.84507, -1.93188], None, 0.9807332),
    ],
)
def test_threshold_and_tau_of_0_2_0(folder, score, threshold, tau):
    detector = load(DATA / f"{folder}_by_0.2.0")
    assert detector(RAMP).tolist() == pytest.approx(score, rel=1e-4)
    assert detector.threshold == (None if threshold is None else pytest.approx(threshold))
    assert detector.tau == (None if tau is None else pytest.approx(tau))
    assert detector.decide(RAMP).level.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "folder",
    ["saved_by_0.1.0", "saved_by_0.2.0", "run_by_0.2.0", "members_by_0.2.0", "threshold_by_0.2.0"],
)
def test_scores_of_a_detector_saved_again(folder, tmp_path):
    detector = load(DATA / folder)
    detector.save(tmp_path)
    again = load(tmp_path)
    assert json.loads((tmp_path / "detector.json").read_text())["version"] == 4
    assert torch.equal(again(RAMP), detector(RAMP))
    assert torch.equal(again.threshold, detector.threshold)
    assert again.calibration_scores is None
    assert torch.equal(again.decide(RAMP).level, detector.decide(RAMP).level)


def test_a_run_of_0_1_0_scores_as_it_did(monkeypatch):
    pytest.importorskip("pytorch_ood")
    from tie_ext.cli.folder import load_run, read_settings

    folder = DATA / "run_by_0.1.0"
    monkeypatch.setattr("tie_ext.cli.registry.build", lambda name, channels, n: Small())
    net, _, decide = load_run(folder)
    assert decide(RAMP).score.tolist() == pytest.approx(
        [-1.464127, -1.743791, -2.150465, -2.632676], rel=1e-4
    )
    assert (decide(RAMP).level.tolist(), net.tau) == (
        [0, 0, 0, 0],
        pytest.approx(1.066986),
    )
    *_, decide = load_run(folder, false_alarm=0.1)
    assert decide(RAMP).level.tolist() == [2, 0, 0, 0]
    recipe = read_settings(folder).recipe
    assert (recipe.config.pool_size, recipe.prior, recipe.head) == (8, ("multiscale",), "linear")
    with refused(r"Expected the training state of a run with the settings"):
        recipe.trainer(net.train()).load(folder / "training.safetensors")
