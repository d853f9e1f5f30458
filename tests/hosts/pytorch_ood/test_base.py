"""The law book of our detectors: pytorch-ood's contract, and views that leave the network alone."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE
from pytorch_ood.api import (
    DetectorInfo,
    FeaturesDetector,
    LogitsDetector,
    ModelNotSetException,
    RequiresFittingException,
    Task,
)
from torch import nn

from hosts.pytorch_ood.conftest import DETECTORS, N, Plain, images, loader, trained, with_head
from tie_ext import Combined, TIEDetector, TIENet, combine
from tie_ext.pytorch_ood import IODIN, RejectionNetwork, UncertaintyEstimate

every = pytest.mark.parametrize("name", list(DETECTORS))


def built(name: str, net: TIENet):
    return DETECTORS[name](net).fit(loader(60))


def network_of(detector) -> nn.Module:
    if isinstance(detector, FeaturesDetector):
        return detector.encoder.__self__
    return getattr(detector, "network", None) or detector.model


def state(net: nn.Module) -> tuple:
    modes = [part.training for part in net.modules()]
    own = [sorted(vars(part)) for part in net.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules()]
    grads = [p.grad is None for p in net.parameters()]
    return modes, own, hooks, grads, [v.tolist() for v in net.state_dict().values()]


@every
def test_one_finite_score_per_image_in_any_batch(name):
    detector, x = built(name, trained().eval()), images()[0]
    scores = detector(x)
    assert scores.shape == (24,)
    assert scores.isfinite().all()
    assert torch.equal(scores, detector.predict(x))
    # An untrained network's logits differ little: a deviation is few of their digits.
    last = 1e-3 if name == "Combined" else 1e-5
    alone = torch.cat([detector(one[None]) for one in x])
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=last)


@every
def test_info_hyperparameters_and_devices(name):
    detector = built(name, trained().eval())
    info = vars(type(detector))["info"]
    assert isinstance(info, DetectorInfo)
    assert info.tasks == {Task.CLASSIFICATION}
    assert set(detector.get_hyperparameters()) == set(type(detector).hyperparameter_space)
    with pytest.raises(ValueError, match="nonsense"):
        detector.set_hyperparameters(nonsense=1)
    for key, values in type(detector).hyperparameter_space.items():
        for value in values:
            detector.set_hyperparameters(**{key: value})
            assert detector.get_hyperparameters()[key] == value
    assert detector.to("meta").device.type == "meta"


@every
def test_missing_networks_and_fits(name):
    detector, x = DETECTORS[name](trained().eval()), images()[0]
    if detector.requires_fit:
        with pytest.raises(RequiresFittingException):
            detector.predict(x)
    alone = type(detector)([TIEDetector(None)] if name == "Combined" else None, *no_layer(name))
    with pytest.raises(ModelNotSetException):
        alone.predict(x)
    if isinstance(detector, FeaturesDetector):
        with pytest.raises(RequiresFittingException):
            alone.predict_features(torch.zeros(1, 2))
        with pytest.raises(ValueError, match="value range"):
            detector.predict(255 * x)


def no_layer(name: str) -> tuple:
    return (torch.randn(3, 2),) if name == "BoundaryDistance" else ()


@pytest.mark.parametrize("name", ["TIEDetector", "UncertaintyEstimate"])
def test_scores_of_logits_without_a_model(name):
    detector, x = built(name, trained().eval()), images()[0]
    assert isinstance(detector, LogitsDetector)
    assert torch.equal(type(detector)(None).predict_logits(detector.model(x)), detector(x))
    for bad in (torch.zeros(2, 3, 3), torch.zeros(2, 4).long(), torch.zeros(2, 1), None):
        with pytest.raises(ValueError, match="Expected floating-point logits"):
            type(detector)(None).predict_logits(bad)


# Views.


def dropping() -> TIENet:
    """With BatchNorm, dropout and a head on every layer, in training mode."""
    return with_head(Plain()).train()


def mixed(net: nn.Module) -> Combined:
    """Members that share the pass, and those that run by themselves."""
    mode = net.training  # which pytorch-ood's own detectors are fitted in
    gaussians = theirs.Mahalanobis(net.eval().features).fit(loader(60))
    net.train(mode)
    others = [theirs.EnergyBased(net), theirs.ODIN(net), IODIN(net), UncertaintyEstimate(net)]
    return Combined([gaussians, *others], 0.2).fit(loader(60))


SCORERS = {name: lambda net, name=name: built(name, net) for name in DETECTORS}
SCORERS["mixed"] = mixed
SCORERS["combine"] = lambda net: combine(
    net, train_loader=loader(60), calibration_loader=loader(60, 8), false_alarm=0.2
)


@pytest.mark.parametrize("name", list(SCORERS))
@pytest.mark.filterwarnings("ignore")
def test_training_mode_gives_scores_of_evaluation_mode(name):
    net, x, found = dropping(), images()[0], []
    for training in (True, False):
        torch.manual_seed(1)
        detector = SCORERS[name](net.train(training))
        before = state(net)
        found.append(detector(x))
        if name != "mixed" and hasattr(detector, "export_module"):
            detector.export_module()(x)
        assert state(net) == before
    assert torch.equal(*found)


@pytest.mark.parametrize("name", [*SCORERS, "no TIENet", "no features"])
@pytest.mark.filterwarnings("ignore")
def test_threads_score_as_one_does(name):
    torch.manual_seed(0)
    net = Plain().train() if name.startswith("no") else dropping()
    if name == "no features":
        net.forward = lambda x: x.flatten(1)[:, :N] * 3 - 1
        detector = Combined([theirs.EnergyBased(net)], 0.2).fit(loader(60))
    else:
        detector = (mixed if name == "no TIENet" else SCORERS[name])(net)
    batches = torch.rand(159, *SHAPE).split([1, 7, 3, 16, 2, 11, 5, 8] * 3)
    score = getattr(detector, "decide", detector.predict)

    def run(x):
        return torch.stack([torch.as_tensor(part).float() for part in score(x)])

    before, interval = state(net), sys.getswitchinterval()
    alone = [run(x) for x in batches]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(run, batches))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, alone, together))
    assert state(net) == before


def test_gradients_of_a_member_stay_out_of_the_network():
    net, x = Plain().train(), images()[0]

    def gradnorm():
        return theirs.GradNorm(net, param_filter=lambda name: name.startswith("fc."))

    detector = Combined([gradnorm(), theirs.EnergyBased(net)], None).fit(loader(60))
    scores = detector.scores(x)[:, 0]
    assert all(p.grad is None for p in net.parameters())
    net.eval()
    torch.testing.assert_close(scores, gradnorm()(x).detach())


def test_rejection_network_separates_the_features():
    x = torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 3])
    y = torch.where(torch.arange(600) < 300, 0, -1)
    scores = RejectionNetwork(None).fit_features(x, y).predict_features(x)
    assert ((scores > 0) == (y < 0)).float().mean() > 0.95
    with pytest.raises(ValueError, match="outliers"):
        RejectionNetwork(None).fit_features(x, y.abs())
