"""Threads that share a detector score as one does, from a network in training mode that stays
so.
"""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SHAPE, Small, make_small
from test_pytorch_ood import N, images, loader
from torch import nn

from tie_ext import TIENet

pytest.importorskip("pytorch_ood")
import pytorch_ood.detector as theirs

from tie_ext import Combined, TIEDetector, combine
from tie_ext.outliers.marginal import MarginalRepresentations, MarginalSettings
from tie_ext.pytorch_ood import (
    IODIN,
    MahalanobisPlusPlus,
    RejectionNetwork,
    SampledKNN,
    UncertaintyEstimate,
)

SIZES = [1, 7, 3, 16, 2, 11, 5, 8] * 6
THREADS = 8


class Dropping(nn.Module):
    """A network as pytorch-ood's are, with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.body = Small(N).conv
        self.drop, self.fc = nn.Dropout(), nn.Linear(48, N)

    def features(self, x):
        return self.drop(self.body(x))

    def forward(self, x):
        return self.fc(self.features(x))


def network() -> TIENet:
    """With BatchNorm, dropout and a head on every layer, in training mode."""
    torch.manual_seed(0)
    net = TIENet(Dropping(), N, SHAPE, head="multilayer").eval()
    net.garbage.standardise(net.statistics(images(60)[0])[1].detach())
    net.tau.fill_(0.9)
    return net.train()


def mixed(net: nn.Module) -> Combined:
    """Members that share the pass, and those that run by themselves."""
    mode = net.training  # which pytorch-ood's own detectors are fitted in
    gaussians = theirs.Mahalanobis(net.eval().features).fit(loader(60))
    net.train(mode)
    members = [
        gaussians,
        theirs.EnergyBased(net),
        theirs.ODIN(net),
        IODIN(net),
        UncertaintyEstimate(net),
    ]
    return Combined(members, 0.2).fit(loader(60))


MAKERS = {
    "TIEDetector": lambda net: TIEDetector(net, 0.2).fit(loader(60)),
    "tau": TIEDetector,
    "combine": lambda net: combine(
        net, train_loader=loader(60), calibration_loader=loader(60, 8), false_alarm=0.2
    ),
    "mixed": mixed,
    "IODIN": IODIN,
    "UncertaintyEstimate": UncertaintyEstimate,
    "SampledKNN": lambda net: SampledKNN(net.features, k=3).fit(loader(60)),
    "MahalanobisPlusPlus": lambda net: MahalanobisPlusPlus(net.features).fit(loader(60)),
    "RejectionNetwork": lambda net: RejectionNetwork(
        net.features, MarginalRepresentations(net, MarginalSettings(k=2, vae_epochs=1)), epochs=1
    ).fit(loader(60)),
}


def state(net: nn.Module) -> tuple:
    modes = [part.training for part in net.modules()]
    own = [sorted(vars(part)) for part in net.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules()]
    grads = [p.grad is None for p in net.parameters()]
    return modes, own, hooks, grads, [v.clone() for v in net.state_dict().values()]


def check(net: nn.Module, detector) -> None:
    """Threads give what one thread gives, to the bit; and all of it leaves the network alone."""
    batches = torch.rand(sum(SIZES), *SHAPE).split(SIZES)
    score = getattr(detector, "decide", detector.predict)

    def run(x):
        found = score(x)
        return torch.stack([torch.as_tensor(part).float() for part in found])

    before, interval = state(net), sys.getswitchinterval()
    alone = [run(x) for x in batches]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            together = list(pool.map(run, batches))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    *rest, weights = state(net)
    assert tuple(rest) == before[:-1]
    assert all(torch.equal(a, b) for a, b in zip(weights, before[-1], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.filterwarnings("ignore")
def test_threads_score_as_one_does(name):
    net = network()
    check(net, MAKERS[name](net))


@pytest.mark.slow
@pytest.mark.parametrize("asks", [True, False])
def test_threads_on_a_network_that_is_no_tienet(asks):
    torch.manual_seed(0)
    net = Dropping().train()
    if not asks:
        net.forward = lambda x: x.flatten(1)[:, :N] * 3 - 1
    check(net, mixed(net) if asks else Combined([theirs.EnergyBased(net)], 0.2).fit(loader(60)))


def test_training_mode_gives_the_scores_of_evaluation_mode():
    net, x = network(), images()[0]
    for name, make in MAKERS.items():
        torch.manual_seed(1)
        trained = make(net.train())
        torch.manual_seed(1)
        assert torch.equal(trained(x), make(net.eval())(x)), name


def test_an_exported_module_leaves_the_network_in_its_mode():
    net = network()
    for name in ("TIEDetector", "combine"):
        MAKERS[name](net).export_module()(images()[0])
    assert all(part.training for part in net.modules())


def test_gradients_of_a_member_stay_out_of_the_network():
    net, x = make_small(N).train(), images()[0]
    gradnorm = theirs.GradNorm(net, param_filter=lambda name: name.startswith("fc."))
    detector = Combined([gradnorm, theirs.EnergyBased(net)], None).fit(loader(60))
    assert detector(x).isfinite().all()
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(
        detector.scores(x)[:, 0],
        theirs.GradNorm(net.eval(), param_filter=lambda name: name.startswith("fc."))(x).detach(),
    )
