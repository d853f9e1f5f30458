"""TIEDetector and UncertaintyEstimate: formulas, thresholds, and pytorch-ood's own detectors,
benchmark, search and metrics on a TIENet.
"""

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE, make_net
from pytorch_ood.api import Detector, RequiresFittingException
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.metrics import OODMetrics
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hosts.pytorch_ood.conftest import N, images, loader, trained
from tie_ext import TIEDetector, TIENet
from tie_ext.pytorch_ood import UncertaintyEstimate
from tie_ext.scores.decision import uncertainty

SIZE = {"batch_size": 16}


def test_score_is_garbage_logit_plus_their_energy():
    logits = torch.randn(50, 6) * 10
    for t in (0.1, 1.0, 3.0):
        want = logits[:, -1] + theirs.EnergyBased.score(logits[:, :-1], t)
        torch.testing.assert_close(TIEDetector(None, t=t).predict_logits(logits), want)


def test_threshold_of_the_network_and_the_papers_rule():
    net, x = trained(), images()[0]
    assert all(map(torch.equal, TIEDetector(net).decide(x), net.decide(x)))
    detector = TIEDetector(net, lam=1.5).fit(loader())
    logits = detector.model(x).detach()
    u = uncertainty(logits.softmax(dim=1))
    torch.testing.assert_close(detector.tau.item(), (u.mean() + 1.5 * u.std(correction=0)).item())
    y = torch.where(torch.arange(48) < 24, 0, -1)  # OOD images are left out
    again = TIEDetector(None, lam=1.5).fit_logits(torch.cat([logits, 2 * logits]), y)
    assert torch.equal(again.tau, detector.tau)
    assert torch.equal(UncertaintyEstimate(None).predict_logits(logits), u)
    decision = detector.decide(x)
    assert torch.equal(decision.level == 2, (logits.argmax(dim=1) < N) & (u > detector.tau))
    assert torch.equal(decision.score, detector(x))


def test_false_alarms_on_calibration_images():
    x, _ = images(100)
    detector = TIEDetector(trained(), false_alarm=0.1).fit(loader(100))
    level = detector.decide(x).level
    assert int((level > 0).sum()) == 9  # of 101 exchangeable images, 10 may be rejected
    assert torch.equal(level > 0, detector(x) > detector.threshold)


NONE = torch.full((2, *SHAPE), torch.nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda of: TIEDetector(of, 0.01).fit(loader()), "at least 99 ID images .* got 24"),
        (lambda of: TIEDetector(of, 0.0), "false_alarm"),
        (lambda of: TIEDetector(of, lam=float("nan")), "lam"),
        (lambda of: TIEDetector(of, t=0), "Expected t "),
        (lambda of: TIEDetector(of).set_hyperparameters(t=-1.0), "Expected t "),
        (lambda of: TIEDetector(None).fit_logits(torch.zeros(2, 4), -torch.ones(2)), "none"),
        (lambda of: TIEDetector(of).predict(NONE), "NaN"),
        (lambda of: TIEDetector(of).decide(torch.rand(2, *SHAPE) * 255), "value range"),
        (lambda of: TIEDetector(of).predict_logits(torch.zeros(2, N)), "n\\+1 = 4 .*got 3"),
        (lambda of: TIEDetector(None).predict_logits(torch.zeros(2, 4) / 0), "infinite"),
    ],
)
def test_errors_of_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(trained())


def test_errors_of_other_models_and_missing_thresholds():
    with pytest.raises(TypeError, match=r"Expected a TIENet .* got Linear"):
        TIEDetector(nn.Linear(2, 2))
    # The last one's threshold was one on scores of another temperature.
    tuned = TIEDetector(trained(), false_alarm=0.1).fit(loader()).set_hyperparameters(t=0.5)
    for detector in (TIEDetector(make_net()), TIEDetector(trained(), false_alarm=0.1), tuned):
        with pytest.raises(RequiresFittingException, match="fit"):
            detector.decide(images()[0])


# Inside pytorch-ood.


class Marked(Dataset):
    """ID images with labels, then noise labelled -1."""

    def __init__(self, noise: float):
        rng = torch.Generator().manual_seed(9)
        other = (0.5 + noise * torch.randn(24, *SHAPE, generator=rng)).clamp(0, 1)
        self.x = torch.cat([images()[0], other])
        self.y = torch.cat([images()[1], torch.full((24,), -1)])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


class TwoSets(Benchmark):
    ood_names = ("faint", "strong")

    def train_set(self):
        return TensorDataset(*images())

    def test_sets(self, known=True, unknown=True):
        return [Marked(0.05), Marked(1.0)]


def test_their_benchmark_beside_other_detectors(fitted):
    net, calls = trained().eval(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    logits = [theirs.EnergyBased(net), theirs.MaxSoftmax(net), UncertaintyEstimate(net)]
    detectors, benchmark = [TIEDetector(net), *logits, fitted], TwoSets()
    rows = benchmark.evaluate(detectors, loader_kwargs=SIZE, cache=True)
    once = len(calls)
    assert once == 2 * 2 * 3  # two sets, n+1 and n logits, three batches: shared by the n-class
    assert benchmark.evaluate(detectors, loader_kwargs=SIZE, cache=True) == rows
    assert len(calls) == once
    found = {(row["Dataset"], row["Detector"]): row for row in rows}
    for name, data in zip(benchmark.ood_names, benchmark.test_sets(), strict=True):
        for detector in detectors:
            metrics = OODMetrics()
            metrics.update(detector(data.x).detach(), data.y)
            row = found[name, type(detector).__name__]
            assert row["AUROC"] == pytest.approx(metrics.compute()["AUROC"])


def of_theirs(name: str, net: TIENet) -> Detector:
    """One of their detectors, built as their documentation says, from the parts of a TIENet."""
    body = net.backbone
    maps, rest = body.conv[:-2], nn.Sequential(body.conv[-2:], body.hidden, net.fc)
    w, b = net.fc.weight.detach(), net.fc.bias.detach()
    more = {
        "DICE": (net.features, w, b, 0.65),
        "ReAct": (maps, rest, 1.0),
        "ViM": (net.features, 4, w, b),
        "KNN": (net.features, 3),
    }
    if name == "GradNorm":
        return theirs.GradNorm(net, param_filter=lambda name: name.startswith("fc."))
    if name == "NNGuide":
        return theirs.NNGuide(net.features, net.fc, k=3)
    if name in ("ASH", "RankFeat", "SCALE"):
        return getattr(theirs, name)(maps, rest)
    if name in ("fDBD", "LTS", "NCI", "PNML", "VRA"):
        return getattr(theirs, name)(net.features, net.fc)
    if name in ("GMM", "Mahalanobis", "RMD"):
        return getattr(theirs, name)(net.features)
    return getattr(theirs, name)(*more.get(name, (net,)))


THEIRS = "ASH DICE EnergyBased Entropy fDBD GEN GMM GradNorm KNN LTS Mahalanobis MaxLogit "
THEIRS += "MaxSoftmax NCI NNGuide ODIN PNML RankFeat ReAct RMD SCALE TemperatureScaling ViM VRA"


@pytest.mark.parametrize("name", THEIRS.split())
@pytest.mark.filterwarnings("ignore")
def test_their_detectors_score_a_tienet(name):
    detector = of_theirs(name, trained().eval()).to("cpu").fit(loader())
    scores = detector(images(8)[0])
    assert scores.shape == (8,)
    assert scores.isfinite().all()


def test_their_detectors_read_n_classes():
    net, x = trained().eval(), images()[0]
    torch.testing.assert_close(theirs.MaxSoftmax(net)(x), -net(x).softmax(dim=1).amax(dim=1))
    assert not torch.equal(theirs.EnergyBased(net)(x), -net(x, garbage=True).logsumexp(dim=1))
