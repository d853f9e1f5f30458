"""Folders of detectors: what is saved comes back; what is damaged or foreign is refused."""

import json
import math
import os
import shutil
import sys

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE, make_net
from pytorch_ood.api import RequiresFittingException
from torch import nn

from hosts.pytorch_ood.conftest import (
    N,
    Plain,
    edit,
    every_member,
    images,
    loader,
    rewrite,
    three,
    trained,
)
from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.models.backbones import Conv5
from tie_ext.utils.files import load_state

X = images()[0]
KINDS = {"TIEDetector": TIEDetector, "Combined": Combined}
FILES = ["detector.json", "detector.safetensors", "network.safetensors"]
kinds = pytest.mark.parametrize("kind", list(KINDS))


MAKERS = {
    "TIEDetector": lambda rate: TIEDetector(trained(), rate, lam=1.0, t=0.5),
    "Combined": lambda rate: Combined(every_member(trained()), rate, "max"),
}


@kinds
@pytest.mark.parametrize("rate", [None, 0.1])
def test_saved_detectors_come_back(kind, rate, tmp_path):
    detector = MAKERS[kind](rate).fit(loader(80))
    detector.save(tmp_path)
    again = KINDS[kind].load(tmp_path)
    assert torch.equal(again(X), detector(X))
    for name in ("false_alarm", "lam", "t", "rule"):
        assert getattr(again, name, None) == getattr(detector, name, None)
    if rate is not None:
        assert torch.equal(again.calibration_scores, detector.calibration_scores)
    if rate is not None or kind == "TIEDetector":
        assert all(map(torch.equal, detector.decide(X), again.decide(X)))
    assert sorted(os.listdir(tmp_path)) == FILES
    assert KINDS[kind].load(tmp_path, device="meta").device.type == "meta"
    other = loader(80, seed=9)
    torch.testing.assert_close(again.fit(other)(X), detector.fit(other)(X))


@pytest.mark.parametrize("make", [TIEDetector, three])
def test_a_network_of_another_architecture(make, tmp_path):
    body = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, N))
    detector = make(TIENet(body, N, SHAPE)).fit(loader(60))
    detector.save(tmp_path)
    with pytest.raises(ValueError, match="backbone"):
        type(detector).load(tmp_path)
    assert torch.equal(type(detector).load(tmp_path, body)(X), detector(X))


class Odd(theirs.EnergyBased):
    """A detector whose state nobody knows."""


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (theirs.ODIN, "members out of TIEDetector, .* but got ODIN"),
        (lambda net: theirs.EnergyBased(make_net()), "but got EnergyBased on something else"),
        (lambda net: theirs.KNN(net.features, metric="manhattan"), "default .*, but got KNN"),
        (Odd, "but got Odd"),
        (None, "detectors on a TIENet to save, but got Plain"),
    ],
)
def test_error_before_anything_is_written(member, message, tmp_path):
    net = trained() if member else Plain()
    members = [theirs.EnergyBased(net), *([member(net)] if member else [])]
    detector = Combined(members, 0.1).fit_scores(torch.randn(60, len(members)))
    with pytest.raises(TypeError, match=message):
        detector.save(tmp_path)
    with pytest.raises(RequiresFittingException):
        three().save(tmp_path)
    assert not os.listdir(tmp_path)


# Damage.


def at(*keys, **values):
    """A change of the mapping at some keys of the saved state."""

    def change(state):
        for key in keys:
            state = state[key]
        state.update(values)

    return change


def put(folder, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


JSON, STATE, NETWORK = FILES
FOREIGN = "truncated or foreign"
OF_BOTH = {
    "text": (lambda f: put(f, JSON, b"\xff\xfe"), FOREIGN),
    "deep": (lambda f: put(f, JSON, b"[" * 100_000), FOREIGN),
    "format": (lambda f: edit(f, format=None), FOREIGN),
    "version": (lambda f: edit(f, version=5), "newer tie_ext"),
    "rate": (lambda f: edit(f, false_alarm=7), "Expected false_alarm"),
    "no rate": (lambda f: edit(f, false_alarm=...), "without 'false_alarm'"),
    "threshold": (lambda f: edit(f, threshold="hostile"), "Expected threshold"),
    "threshold of no number": (lambda f: edit(f, threshold=True), "Expected threshold"),
    "no fingerprint": (lambda f: edit(f, detector_sha256=...), "without 'detector_sha256'"),
    "network": (lambda f: TIENet(Conv5(1, N), N, SHAPE).save(f / NETWORK), "got another"),
    "short network": (lambda f: put(f, NETWORK, b"truncated"), FOREIGN),
    "short state": (lambda f: put(f, STATE, (f / STATE).read_bytes()[:-4]), FOREIGN),
    "kind": (lambda f: shutil.copy(f / NETWORK, f / STATE), "got a 'network' file"),
    "matrix": (lambda f: rewrite(f, at(calibration_scores=torch.zeros(2, 2))), "calibration sc"),
    "NaN": (lambda f: rewrite(f, at(calibration_scores=torch.zeros(3) / 0)), "calibration sc"),
    "labels": (lambda f: rewrite(f, at(calibration_labels=-torch.ones(24).long())), "a class of"),
}
OF_ONE = {
    "t": (lambda f: edit(f, t=10**400), "Expected t "),
    "lam": (lambda f: edit(f, lam=None), "Expected lam "),
    "tau": (lambda f: edit(f, tau="x"), "Expected tau "),
}
# Of every_member: 0 TIEDetector, 8 MahalanobisPlusPlus, 10 ViM, 12 KNN.
OF_MEMBERS = {
    "rule": (lambda f: edit(f, rule="mean"), "one of tail, "),
    "no scale": (lambda f: rewrite(f, lambda s: s.pop("reference")), "without 'reference'"),
    "fewer": (lambda f: rewrite(f, lambda s: s["members"].pop()), "for 12 members"),
}
for keys, values, message in (
    (("members", 0), {"name": "eval"}, "'eval'"),
    (("members", 0), {"name": ["x"]}, FOREIGN),
    (("members", 0), {"t": "x"}, "Expected t of TIEDetector to be a number"),
    (("members", 2), {"t": 0}, "finite scores"),
    (("members", 8), {"mu": torch.zeros(3, 2)}, FOREIGN),
    (("members", 8), {"mu": None}, FOREIGN),
    (("members", 8), {"mu": "x"}, "Expected mu of MahalanobisPlusPlus to be finite numbers"),
    (("members", 8), {"mu": torch.zeros(2) / 0}, "Expected mu of MahalanobisPlusPlus to be fin"),
    (("members", 10), {"w": torch.zeros(3, 2)}, FOREIGN),
    (("members", 12), {"k": 10**9}, "Expected n_neighbors"),
    (("members", 12), {"images": torch.zeros(9, 2)}, FOREIGN),
    (("reference",), {"deviation": torch.zeros(13)}, "deviations <= 0"),
    (("reference",), {"mean": torch.ones(13) / 0}, "finite mean"),
    (("reference",), {"ordered": -torch.arange(2.0)[:, None].expand(2, 13)}, "do not ascend"),
    (("reference",), {"mean": torch.zeros(2)}, "for 13 members"),
    (("reference",), {"weights": torch.ones(2)}, "for 13 members"),
    (("reference",), {"weights": torch.zeros(13)}, "or all 0"),
    (("reference",), {"weights": -torch.ones(13)}, "weights below 0"),
    (("reference",), {"tail": -torch.ones(13)}, "tail of weights below 0"),
    (("reference",), {"tail": torch.ones(2)}, "for 13 members"),
    (("reference",), {"edge": None}, "without its edge"),
):
    name = f"{keys} {list(values)}, {message}"
    OF_MEMBERS[name] = (lambda f, k=keys, v=values: rewrite(f, at(*k, **v)), message)
DAMAGE = [("TIEDetector", name, *how) for name, how in (OF_BOTH | OF_ONE).items()]
DAMAGE += [("Combined", name, *how) for name, how in (OF_BOTH | OF_MEMBERS).items()]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [pytest.param(kind, *how, id=f"{kind}: {name}") for kind, name, *how in DAMAGE],
)
def test_errors_of_damaged_or_foreign_folders(kind, change, message, saved):
    change(saved / kind)
    with pytest.raises(ValueError, match=message) as error:
        KINDS[kind].load(saved / kind)
    assert str(error.value).startswith("Expected ")


@kinds
@pytest.mark.parametrize("name", FILES)
def test_errors_of_missing_files_and_other_detectors(kind, name, saved):
    other = next(of for of in KINDS if of != kind)
    with pytest.raises(ValueError, match=r"Expected a detector.json of tie_ext"):
        KINDS[kind].load(saved / other)
    (saved / kind / name).unlink()
    if (kind, name) == ("TIEDetector", JSON):  # the folder of a run
        assert KINDS[kind].load(saved / kind).decide(X).level.shape == (24,)
        return
    with pytest.raises(FileNotFoundError, match=name):
        KINDS[kind].load(saved / kind)


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and links")
@pytest.mark.parametrize("what", ["folder", "loop", "pipe"])
def test_errors_of_folders_and_pipes(what, saved):
    path = saved / "TIEDetector" / JSON
    path.unlink()
    {
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
        "pipe": lambda: os.mkfifo(path),
    }[what]()
    with pytest.raises(FileNotFoundError, match=r"^Expected a detector.json"):
        TIEDetector.load(path.parent)


# Other versions.


def test_entries_of_the_format_and_of_later_versions(saved):
    about = json.loads((saved / "Combined" / JSON).read_text())
    assert (about["version"], about["guarantee"], about["transform"]) == (4, "average", None)
    assert about["members"][-1] == "KNN"
    state = load_state(saved / "Combined" / STATE, "detector")
    assert state["training_features"] is None
    assert state["calibration_scores"].shape == (40,)
    for name, kind in KINDS.items():
        edit(saved / name, something_new=[1, 2])
        assert kind.load(saved / name).threshold is not None


def test_weights_of_members_and_files_without_them(saved):
    folder, distances = saved / "Combined", torch.tensor([1, *[0] * 6, 1, 1, 0, 0, 1, 1])
    learned = Combined.load(folder).reference
    full = torch.tensor([0.5, *[1.0] * 12])
    share = learned.weights[-1]
    assert 0 < share < 1
    torch.testing.assert_close(learned.weights, torch.where(distances > 0, share, 1) * full)
    assert (learned.tail > 0).tolist() == [*(distances[:-2] > 0).tolist(), False, False]
    # Files of 0.3.0: each score without a weight had a tail of its own.
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 2, 2])
    rewrite(folder, lambda s: s["reference"].update(weights=weights, tail=None, edge=None))
    edit(folder, rule="tails")
    before = Combined.load(folder)
    z = before.reference.standardise(before.scores(X))
    ordered = before.reference.standardise(before.reference.ordered)
    excess = (z - ordered[math.ceil(0.9 * len(ordered)) - 1]).clamp_min(0) * (weights == 0)
    expected = z @ weights / weights.sum() + 0.75 * excess.sum(1)
    torch.testing.assert_close(before(X), expected, rtol=1e-4, atol=1e-4)
    assert before.fit([X]).rule == "tail"
    # Files of before: no weights.
    rewrite(folder, lambda s: s["reference"].pop("weights"))
    edit(folder, rule="tail")
    before = Combined.load(folder)
    assert before.reference.weights is before.reference.tail is None
    mean = before.reference.standardise(before.scores(X)).mean(1)
    torch.testing.assert_close(before(X), mean, rtol=1e-4, atol=1e-4)
    edit(folder, rule="stouffer")
    torch.testing.assert_close(Combined.load(folder)(X), mean * 13**0.5, rtol=1e-4, atol=1e-4)


def test_files_of_an_earlier_detector_are_deleted(saved):
    put(saved / "Combined", "members.safetensors", b"features of other images")
    Combined.load(saved / "Combined").save(saved / "Combined")
    assert sorted(os.listdir(saved / "Combined")) == FILES
