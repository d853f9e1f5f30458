"""TIE in pytorch-ood: the law book of its detectors, its benchmark, tuner and metrics, its own
detectors on a TIENet, and files and export.
"""

import copy
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, Small, make_batches, make_net
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tie_ext import TIENet
from tie_ext.models.backbones import Conv5
from tie_ext.scores.decision import ood_score, uncertainty

pytest.importorskip("pytorch_ood")
import pytorch_ood.detector as theirs
from pytorch_ood.api import (
    Detector,
    DetectorInfo,
    LogitsDetector,
    ModelNotSetException,
    RequiresFittingException,
    Task,
)
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import GridSearch

from tie_ext import Combined, TIEDetector
from tie_ext.pytorch_ood import (
    BoundaryDistance,
    MahalanobisPlusPlus,
    SampledKNN,
    UncertaintyEstimate,
)

N = 3
OURS = {"TIEDetector": TIEDetector, "UncertaintyEstimate": UncertaintyEstimate}


def trained(classes: int = N) -> TIENet:
    """A network as training leaves it: with a tau, in training mode."""
    net = make_net(classes)
    net.tau.fill_(0.9)
    return net.train()


def deployable(garbage: str) -> TIENet:
    """Such a network to export, its garbage logit as the paper's or as attach gives it."""
    if garbage == "linear":
        return trained().eval()
    torch.manual_seed(0)
    net = TIENet(Small(N), N, SHAPE, head="multilayer").eval()
    net.garbage.standardise(net.statistics(images(24)[0])[1].detach())
    return net


def images(count: int = 24, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, *SHAPE, generator=rng), torch.arange(count) % N


def loader(count: int = 24, seed: int = 3) -> DataLoader:
    return DataLoader(TensorDataset(*images(count, seed)), batch_size=7)


# The law book: what pytorch-ood asks of every detector.


@pytest.fixture(params=list(OURS))
def detector(request) -> Detector:
    return OURS[request.param](trained().eval())


def test_scores_have_one_finite_value_an_image(detector):
    scores = detector.predict(images()[0])
    assert scores.shape == (24,)
    assert scores.isfinite().all()


def test_calling_predicting_and_scoring_the_logits_of_the_model_agree(detector):
    x = images()[0]
    assert torch.equal(detector(x), detector.predict(x))
    assert torch.equal(detector(x), detector.predict_logits(detector.model(x)))


def test_a_score_does_not_depend_on_the_batch_it_is_in(detector):
    x = images()[0]
    alone = torch.cat([detector(one[None]) for one in x])
    torch.testing.assert_close(alone, detector(x), rtol=1e-4, atol=1e-5)


def test_scoring_leaves_the_network_as_it_was(detector):
    before = copy.deepcopy(detector.model.state_dict())
    modes = [m.training for m in detector.model.modules()]
    detector(images()[0])
    assert all(
        torch.equal(value, before[name]) for name, value in detector.model.state_dict().items()
    )
    assert [m.training for m in detector.model.modules()] == modes


def test_logits_can_be_scored_without_a_model(detector):
    x = images()[0]
    assert torch.equal(type(detector)(None).predict_logits(detector.model(x)), detector(x))
    with pytest.raises(ModelNotSetException):
        type(detector)(None).predict(x)


def test_hyperparameters_can_be_read_and_set_by_name(detector):
    assert set(detector.get_hyperparameters()) == set(type(detector).hyperparameter_space)
    for name, values in type(detector).hyperparameter_space.items():
        for value in values:
            assert (
                detector.set_hyperparameters(**{name: value}).get_hyperparameters()[name] == value
            )
    with pytest.raises(ValueError, match="nonsense"):
        detector.set_hyperparameters(nonsense=1)


def test_to_moves_all_it_owns(detector):
    assert detector.fit(loader()).to("meta").device.type == "meta"
    assert all(p.is_meta for p in detector.model.parameters())


def test_it_says_what_it_is(detector):
    assert isinstance(vars(type(detector))["info"], DetectorInfo)
    assert detector.info.tasks == {Task.CLASSIFICATION}
    assert isinstance(detector, LogitsDetector)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 3), torch.zeros(2, 4).long(), torch.zeros(2, 1), None]
)
def test_logits_of_the_wrong_kind_are_refused(detector, bad):
    with pytest.raises(ValueError, match="Expected floating-point logits"):
        type(detector)(None).predict_logits(bad)


# What TIEDetector adds.


def test_the_score_is_the_garbage_logit_plus_their_energy_of_the_others():
    logits = torch.randn(50, 6) * 10
    for t in (0.1, 1.0, 3.0):
        want = logits[:, -1] + theirs.EnergyBased.score(logits[:, :-1], t)
        torch.testing.assert_close(TIEDetector(None, t=t).predict_logits(logits), want)


def test_ue_ranks_two_classes_as_their_msp_does_and_is_0_and_1_at_the_ends():
    logits = torch.randn(200, 2)
    ours, msp = UncertaintyEstimate(None).predict_logits(logits), theirs.MaxSoftmax.score(logits)
    assert torch.equal(ours.argsort(stable=True), msp.argsort(stable=True))
    torch.testing.assert_close(
        UncertaintyEstimate(None).predict_logits(torch.tensor([[100.0, 0, 0], [1, 1, 1]])),
        torch.tensor([0.0, 1.0]),
    )


def test_a_network_in_training_mode_is_scored_in_evaluation_mode():
    net = trained()
    x = images()[0]
    scores = TIEDetector(net)(x)
    assert net.training
    assert torch.equal(scores, TIEDetector(net.eval())(x))


def test_decide_without_fit_is_the_networks_own_decision():
    net, x = trained(), images()[0]
    assert all(
        torch.equal(a, b) for a, b in zip(TIEDetector(net).decide(x), net.decide(x), strict=True)
    )


def test_fit_by_the_papers_rule():
    detector, x = TIEDetector(trained(), lam=1.5).fit(loader()), images()[0]
    u = uncertainty(detector.model(x).softmax(dim=1))
    torch.testing.assert_close(detector.tau.item(), (u.mean() + 1.5 * u.std(correction=0)).item())
    decision = detector.decide(x)
    garbage = detector.model(x).argmax(dim=1) == N
    assert torch.equal(decision.level == 2, ~garbage & (u > detector.tau))
    assert torch.equal(decision.score, detector(x))


def test_fit_to_a_false_alarm_rate_rejects_that_share_of_what_it_was_fitted_on():
    x, _ = images(100)
    detector = TIEDetector(trained(), false_alarm=0.1).fit(loader(100))
    level = detector.decide(x).level
    assert int((level > 0).sum()) == 9  # of 101 exchangeable images, 10 may be rejected
    assert torch.equal(level > 0, detector(x) > detector.threshold)


def test_images_without_id_labels_are_left_out_of_the_fit():
    x, y = images(40)
    y[20:] = -1
    mixed = DataLoader(TensorDataset(x, y), batch_size=6)
    assert (
        TIEDetector(trained()).fit(mixed).tau
        == TIEDetector(trained()).fit(DataLoader(TensorDataset(x[:20], y[:20]), batch_size=6)).tau
    )


@pytest.mark.slow
@pytest.mark.parametrize("false_alarm", [0.05, 0.2])
def test_the_detector_keeps_the_promise_over_many_draws(false_alarm):
    net, draws = trained(), 400
    held_out = 39
    x, _ = images(2000, seed=5)
    logits = TIEDetector(net).model(x)
    accepted = 0
    for draw in range(draws):
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(draw))[
            : held_out + 1
        ]
        detector = TIEDetector(net, false_alarm).fit_logits(
            logits[rows[:-1]], torch.zeros(held_out, dtype=torch.long)
        )
        accepted += int(detector.decide(x[rows[-1:]]).level == 0)
    deviation = (draws * false_alarm * (1 - false_alarm)) ** 0.5
    assert abs(accepted - draws * (1 - false_alarm)) < 4 * deviation


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TIEDetector(trained(), 0.01).fit(loader()), "at least 99 ID images .* got 24"),
        (lambda: TIEDetector(trained(), 0.0), "false_alarm"),
        (lambda: TIEDetector(trained(), lam=float("nan")), "lam"),
        (lambda: TIEDetector(trained(), t=0), "Expected t "),
        (lambda: TIEDetector(trained()).set_hyperparameters(t=-1.0), "Expected t "),
        (lambda: TIEDetector(trained()).fit([]), "Expected ID images in data_loader, but got"),
        (
            lambda: TIEDetector(trained()).fit([(images()[0], torch.full((24,), -1))]),
            "Expected ID images in data_loader, but got",
        ),
        (lambda: TIEDetector(None).fit_logits(torch.zeros(2, 4), torch.tensor([-1, -1])), "none"),
        (
            lambda: TIEDetector(trained()).fit([(images()[0], torch.full((24,), N))]),
            r"labels in \[0, 3\)",
        ),
        (
            lambda: TIEDetector(trained()).fit(
                [(torch.rand(4, 3, 28, 28), torch.zeros(4).long())]
            ),
            r"shape \(B, 1, 28, 28\)",
        ),
        (lambda: TIEDetector(trained()).predict(torch.full((2, *SHAPE), float("nan"))), "NaN"),
        (lambda: TIEDetector(trained()).predict(torch.rand(2, *SHAPE) * 255), "value range"),
        (
            lambda: TIEDetector(trained()).decide(torch.rand(2, 3, 28, 28)),
            r"shape \(B, 1, 28, 28\)",
        ),
        (
            lambda: TIEDetector(trained()).predict_logits(torch.zeros(2, N)),
            "n\\+1 = 4 logits.*got 3",
        ),
        (lambda: TIEDetector(None).predict_logits(torch.full((2, 4), float("inf"))), "infinite"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_that_is_no_tienet_is_refused():
    with pytest.raises(TypeError, match=r"Expected a TIENet .* got Linear"):
        TIEDetector(nn.Linear(2, 2))


def test_deciding_before_there_is_a_line_is_refused():
    for detector in (TIEDetector(make_net()), TIEDetector(trained(), false_alarm=0.1)):
        with pytest.raises(RequiresFittingException, match="fit"):
            detector.decide(images()[0])
    tuned = TIEDetector(trained(), false_alarm=0.1).fit(loader()).set_hyperparameters(t=0.5)
    with pytest.raises(RequiresFittingException):
        tuned.decide(images()[0])  # the threshold was one on other scores


# Inside pytorch-ood.


class Marked(Dataset):
    """ID images with labels, then noise labelled -1."""

    def __init__(self, noise: float):
        rng = torch.Generator().manual_seed(9)
        self.x = torch.cat(
            [images()[0], (0.5 + noise * torch.randn(24, *SHAPE, generator=rng)).clamp(0, 1)]
        )
        self.y = torch.cat([images()[1], torch.full((24,), -1)])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


class TwoSets(Benchmark):
    ood_names = ("faint", "strong")

    def train_set(self):
        return TensorDataset(*images())

    def test_sets(self, known=True, unknown=True):
        return [Marked(0.05), Marked(1.0)]


def test_their_benchmark_scores_it_beside_other_detectors_of_the_same_network():
    net = trained().eval()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    detectors = [
        TIEDetector(net),
        theirs.EnergyBased(net),
        theirs.MaxSoftmax(net),
        UncertaintyEstimate(net),
    ]
    benchmark = TwoSets()
    cached = benchmark.evaluate(detectors, loader_kwargs={"batch_size": 16}, cache=True)
    once = len(calls)
    assert (
        once == 2 * 2 * 3
    )  # two sets, n+1 and n logits, three batches: shared by the three n-class detectors
    again = benchmark.evaluate(detectors, loader_kwargs={"batch_size": 16}, cache=True)
    assert (len(calls), again) == (once, cached)
    for i, name in enumerate(benchmark.ood_names):
        data = benchmark.test_sets()[i]
        for detector in detectors:
            metrics = OODMetrics()
            metrics.update(detector(data.x), data.y)
            [found] = [
                r
                for r in cached
                if r["Dataset"] == name and r["Detector"] == type(detector).__name__
            ]
            want = metrics.compute()
            assert {k: found[k] for k in want if k != "ACC"} == pytest.approx(
                {k: v for k, v in want.items() if k != "ACC"}
            )


def test_their_metrics_agree_with_scikit_learns_on_its_scores():
    from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve

    data, metrics = Marked(0.3), OODMetrics()
    scores, ood = TIEDetector(trained())(data.x).detach(), data.y < 0
    metrics.update(scores, data.y)
    found = metrics.compute()
    precision, recall, _ = precision_recall_curve(ood, scores)
    fpr, tpr, _ = roc_curve(ood, scores)
    assert found["AUROC"] == pytest.approx(roc_auc_score(ood, scores), abs=1e-6)
    assert found["AUPR-OUT"] == pytest.approx(auc(recall, precision), abs=1e-6)
    assert found["FPR95TPR"] == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-6)


def test_their_tuner_finds_the_best_temperature():
    data = Marked(0.3)
    detector = TIEDetector(trained().eval())
    search = GridSearch(detector, None, DataLoader(data, batch_size=16))
    best = search.run()

    def auroc(t):
        metrics = OODMetrics()
        metrics.update(ood_score(detector.model(data.x).detach(), t), data.y)
        return float(metrics.compute()["AUROC"])

    want = {t: auroc(t) for t in TIEDetector.hyperparameter_space["t"]}
    assert search.best_score_ == pytest.approx(max(want.values()))
    assert want[best["t"]] == pytest.approx(max(want.values()))
    assert detector.t == best["t"]


def theirs_on(net: TIENet) -> dict[str, Callable[[], Detector]]:
    """Their detectors, built as their documentation says, from the parts of a TIENet."""
    maps, rest = (
        net.backbone.conv[:-2],
        nn.Sequential(net.backbone.conv[-2:], net.backbone.hidden, net.fc),
    )
    w, b = net.fc.weight.detach(), net.fc.bias.detach()
    return {
        "ASH": lambda: theirs.ASH(maps, rest),
        "DICE": lambda: theirs.DICE(net.features, w, b, p=0.65),
        "EnergyBased": lambda: theirs.EnergyBased(net),
        "Entropy": lambda: theirs.Entropy(net),
        "fDBD": lambda: theirs.fDBD(net.features, net.fc),
        "GEN": lambda: theirs.GEN(net),
        "GMM": lambda: theirs.GMM(net.features),
        "GradNorm": lambda: theirs.GradNorm(net, param_filter=lambda name: name.startswith("fc.")),
        "KNN": lambda: theirs.KNN(net.features, k=3),
        "LTS": lambda: theirs.LTS(net.features, net.fc),
        "Mahalanobis": lambda: theirs.Mahalanobis(net.features),
        "MaxLogit": lambda: theirs.MaxLogit(net),
        "MaxSoftmax": lambda: theirs.MaxSoftmax(net),
        "NCI": lambda: theirs.NCI(net.features, net.fc),
        "NNGuide": lambda: theirs.NNGuide(net.features, net.fc, k=3),
        "ODIN": lambda: theirs.ODIN(net),
        "PNML": lambda: theirs.PNML(net.features, net.fc),
        "RankFeat": lambda: theirs.RankFeat(maps, rest),
        "ReAct": lambda: theirs.ReAct(maps, rest, threshold=1.0),
        "RMD": lambda: theirs.RMD(net.features),
        "SCALE": lambda: theirs.SCALE(maps, rest),
        "TemperatureScaling": lambda: theirs.TemperatureScaling(net),
        "ViM": lambda: theirs.ViM(net.features, d=4, w=w, b=b),
        "VRA": lambda: theirs.VRA(net.features, net.fc),
    }


@pytest.mark.parametrize("name", list(theirs_on(make_net())))
@pytest.mark.filterwarnings("ignore")
def test_their_detectors_score_a_tienet_unchanged(name):
    net = trained().eval()
    detector = theirs_on(net)[name]()
    detector.to("cpu")
    detector.fit(loader())
    scores = detector(images(8)[0])
    assert scores.shape == (8,)
    assert scores.isfinite().all()


def test_the_networks_in_their_table_of_detectors_are_the_n_class_one():
    net, x = trained().eval(), images()[0]
    torch.testing.assert_close(theirs.MaxSoftmax(net)(x), -net(x).softmax(dim=1).amax(dim=1))
    assert not torch.equal(theirs.EnergyBased(net)(x), -net(x, garbage=True).logsumexp(dim=1))


# Upstream's own tests, where a checkout (or the unpacked source distribution) is at hand.


@pytest.fixture
def upstream_info(monkeypatch):
    """Upstream's tests/test_info.py, with our detectors among the classes it walks over."""
    root = Path(os.environ.get("PYTORCH_OOD_ROOT", Path.home() / "pytorch-ood"))
    if not (root / "tests" / "test_info.py").exists():
        pytest.skip(
            f"no checkout of pytorch-ood with tests/test_info.py at {root}; set PYTORCH_OOD_ROOT"
        )
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        monkeypatch.delitem(sys.modules, name)
    package = types.ModuleType(
        "tests"
    )  # by hand, because OpenOOD's checkout has a package of this name too
    package.__path__ = [str(root / "tests")]
    monkeypatch.syspath_prepend(root)  # its tests import the package as src.pytorch_ood
    monkeypatch.setitem(sys.modules, "tests", package)
    if not (
        root / "tests" / "detectors"
    ).exists():  # the source distribution carries the top-level tests only

        class Smoke:
            def __init__(self, name): ...

            def _classification_detector_registry(self):
                return []

            _image_detector_registry = _classification_detector_registry

        for name, content in {
            "tests.detectors": {},
            "tests.detectors.test_all_detectors_smoke": {"TestAllDetectorsSmoke": Smoke},
            "tests.helpers": {"SegmentationModel": nn.Identity},
        }.items():
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    import importlib

    module = importlib.import_module("tests.test_info")
    assert Path(module.__file__).is_relative_to(root)
    smoke = module.TestAllDetectorsSmoke
    makers = {cls: lambda cls=cls: cls(trained().eval()) for cls in OURS.values()}
    makers[MahalanobisPlusPlus] = lambda: MahalanobisPlusPlus(trained().eval().features)
    makers[BoundaryDistance] = lambda: BoundaryDistance(
        (net := trained().eval()).features, net.fc.weight, net.fc.bias
    )
    makers[SampledKNN] = lambda: SampledKNN(trained().eval().features, k=3)
    makers[Combined] = lambda: Combined([TIEDetector(trained().eval())], false_alarm=0.5)
    built = [(cls.__name__, make) for cls, make in makers.items()]
    before = smoke._classification_detector_registry
    monkeypatch.setattr(
        smoke, "_classification_detector_registry", lambda self: before(self) + built
    )
    monkeypatch.setattr(module, "DETECTORS", list(makers))
    return module


@pytest.mark.filterwarnings("ignore")
def test_upstreams_tests_of_what_detectors_claim_hold_for_ours(upstream_info):
    import unittest

    loads = unittest.defaultTestLoader.loadTestsFromName
    names = [
        "TestInfoRecords.test_detectors",
        "TestDetectorTasks",
        "TestSegmentationSemantics.test_logits_detectors_score_each_pixel_independently",
    ]
    suite = unittest.TestSuite(loads(name, upstream_info) for name in names)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == 4
    assert not result.failures + result.errors


# Files.


@pytest.fixture
def saved(tmp_path) -> Path:
    TIEDetector(trained(), false_alarm=0.1, t=0.5).fit(loader()).save(tmp_path / "d")
    return tmp_path / "d"


@pytest.mark.parametrize("false_alarm", [None, 0.1])
def test_a_saved_detector_comes_back(tmp_path, false_alarm):
    detector, x = TIEDetector(trained(), false_alarm, lam=1.0, t=0.5).fit(loader()), images()[0]
    detector.save(tmp_path)
    again = TIEDetector.load(tmp_path)
    assert torch.equal(detector(x), again(x))
    assert all(torch.equal(a, b) for a, b in zip(detector.decide(x), again.decide(x), strict=True))
    assert (again.false_alarm, again.lam, again.t) == (false_alarm, 1.0, 0.5)
    assert {p.name for p in tmp_path.iterdir()} == {
        "network.safetensors",
        "detector.safetensors",
        "detector.json",
    }
    assert TIEDetector.load(tmp_path, device="meta").device.type == "meta"


def test_another_architecture_comes_back_when_it_is_named(tmp_path):
    net = TIENet(
        nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, N)), N, SHAPE
    )
    TIEDetector(net).save(tmp_path)
    with pytest.raises(ValueError, match="backbone"):
        TIEDetector.load(tmp_path)
    again = TIEDetector.load(
        tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, N))
    )
    assert torch.equal(again(images()[0]), TIEDetector(net)(images()[0]))


def test_a_file_of_a_later_minor_version_is_read(saved):
    content = json.loads((saved / "detector.json").read_text())
    (saved / "detector.json").write_text(json.dumps({**content, "something_new": [1, 2]}))
    assert TIEDetector.load(saved).threshold is not None


def test_the_folder_of_a_run_is_a_detector(tmp_path):
    trained().save(tmp_path / "network.safetensors")
    assert TIEDetector.load(tmp_path).decide(images()[0]).level.shape == (24,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "detector.json").write_text("{"), "truncated or foreign"),
        (lambda f: (f / "detector.json").write_text("[1]"), "truncated or foreign"),
        (
            lambda f: (f / "detector.json").write_text('{"format": "something else"}'),
            "truncated or foreign",
        ),
        (lambda f: (f / "detector.json").write_text("[" * 100_000), "truncated or foreign"),
        (lambda f: edit(f, version=4), "newer tie_ext"),
        (lambda f: edit(f, version="3"), "newer tie_ext"),
        (lambda f: edit(f, t=-1), "Expected t "),
        (lambda f: edit(f, threshold="hostile"), "Expected threshold "),
        (lambda f: edit(f, tau=None, lam=None), "Expected lam "),
        (lambda f: drop(f, "false_alarm"), "without 'false_alarm'"),
        (lambda f: TIENet(Conv5(1, N), N, SHAPE).save(f / "network.safetensors"), "got another"),
        (lambda f: (f / "network.safetensors").write_bytes(b"truncated"), "truncated or foreign"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(saved, change, message):
    change(saved)
    with pytest.raises(ValueError, match=message):
        TIEDetector.load(saved)


def edit(folder: Path, **changes) -> None:
    (folder / "detector.json").write_text(
        json.dumps({**json.loads((folder / "detector.json").read_text()), **changes})
    )


def drop(folder: Path, key: str) -> None:
    content = json.loads((folder / "detector.json").read_text())
    (folder / "detector.json").write_text(
        json.dumps({k: v for k, v in content.items() if k != key})
    )


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a tie_ext network file"):
        TIEDetector.load(tmp_path)


# Export.


@pytest.mark.slow
@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
@pytest.mark.parametrize("false_alarm", [None, 0.1])
@pytest.mark.skipif(
    torch.__version__.startswith("2.2."),
    reason="torch 2.2 exports convolutions for a fixed batch size only",
)
@pytest.mark.filterwarnings("ignore")
def test_the_exported_program_decides_as_the_detector(false_alarm, garbage):
    detector = TIEDetector(deployable(garbage), false_alarm, t=0.5).fit(loader())
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        detector.export_module(), (images(4)[0],), dynamic_shapes={"x": {0: batch}}
    )
    x = images(24, seed=8)[0]
    want, got = detector.decide(x), program.module()(x)
    assert torch.equal(want.label, got[0])
    assert torch.equal(want.level, got[3])
    torch.testing.assert_close(want.score, got[2])


@pytest.mark.slow
@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_decides_as_the_detector(garbage, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    detector = TIEDetector(deployable(garbage), 0.1).fit(loader())
    torch.onnx.export(
        detector.export_module(),
        (images(4)[0],),
        tmp_path / "d.onnx",
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )
    x = images(24, seed=8)[0]
    label, _, score, level = onnxruntime.InferenceSession(tmp_path / "d.onnx").run(
        None, {"x": x.numpy()}
    )
    want = detector.decide(x)
    assert (label == want.label.numpy()).all()
    assert (level == want.level.numpy()).all()
    torch.testing.assert_close(torch.from_numpy(score), want.score, rtol=1e-4, atol=1e-4)


def test_fitting_reads_batches_of_any_re_iterable():
    assert TIEDetector(trained()).fit(make_batches()).tau is not None
