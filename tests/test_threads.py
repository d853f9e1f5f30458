"""Eight threads give to the bit what one gives, whatever mode the network was left in."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SHAPE, Small, make_batches

from tie_ext import TIENet
from tie_ext.models.backbones import Conv3

SIZES = (1, 5, 2, 1, 7, 3, 1, 4) * 6
"""Mixed, so that an answer to another thread's batch would often have another shape."""


class Dropping(Small):
    """A network whose answer depends on its mode twice, by BatchNorm and by dropout."""

    def __init__(self, classes: int = 3):
        super().__init__(classes)
        self.conv.append(torch.nn.Dropout(0.5))


def network(head: str = "multilayer", backbone: type = Dropping) -> TIENet:
    """Left in training mode, a part of it in evaluation mode, with hooks of its owner's."""
    torch.manual_seed(0)
    net = TIENet(backbone(3) if backbone is Dropping else backbone(1, 3), 3, SHAPE, head=head)
    net.tau.fill_(0.8)
    net.train()
    next(part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d)).eval()
    net.fc.register_forward_hook(lambda part, args, output: output + 1)
    return net


def members(net: TIENet):
    """A head, one of ours and hosts' members that read logits, features and statistics."""
    from pytorch_ood.detector import GEN, EnergyBased

    from tie_ext.pytorch_ood import SampledKNN, TIEDetector, UncertaintyEstimate

    return [
        TIEDetector(net),
        UncertaintyEstimate(net),
        SampledKNN(net.features, k=3).fit(make_batches()),
        EnergyBased(net),
        GEN(net),
    ]


def single(net: TIENet):
    from tie_ext import TIEDetector

    return TIEDetector(net, false_alarm=0.3).fit(make_batches())


def several(net: TIENet):
    from tie_ext import Combined

    return Combined(members(net), false_alarm=0.3).fit(make_batches(sizes=(40, 40)))


CALLS = {
    "net": lambda net: net.decide,
    "TIEDetector.predict": lambda net: single(net).predict,
    "TIEDetector.decide": lambda net: single(net).decide,
    "Combined.predict": lambda net: several(net).predict,
    "Combined.decide": lambda net: several(net).decide,
}


def state(net: TIENet):
    """All that a call could leave behind: modes, flags, hooks, weights and buffers."""
    parts = [
        (part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
        for part in net.modules()
    ]
    tensors = {name: (value.clone(), value.dtype) for name, value in net.state_dict().items()}
    return parts, [(p.requires_grad, p.grad) for p in net.parameters()], tensors


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("backbone", [Dropping, Conv3])
@pytest.mark.parametrize("head", ["linear", "multilayer"])
@pytest.mark.parametrize("name", CALLS)
def test_eight_threads_give_what_one_gives(name, head, backbone):
    if name != "net":
        pytest.importorskip("pytorch_ood")
    net = network(head, backbone)
    call = CALLS[name](net)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(size, *SHAPE, generator=generator) for size in SIZES]
    before = state(net)
    want = [call(x) for x in batches]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, batches))
    assert all(map(equal, found, want))
    assert equal(state(net), before)


def test_the_mode_of_the_network_changes_no_decision():
    net, x = network(), torch.rand(6, *SHAPE)
    assert equal(net.decide(x), net.eval().decide(x))
