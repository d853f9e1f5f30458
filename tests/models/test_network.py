"""The wrapper over any backbone: its logits, features, decisions, types and modes."""

import copy

import pytest
import torch
from conftest import SHAPE, Small, close, make_net, make_small, refused, same, states
from torch import nn

from tie_ext import TIENet
from tie_ext.models.backbones import Conv3, Conv5, ResidualCNN, ResNet20
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import multilayer_head
from tie_ext.scores.decision import uncertainty

X = torch.rand(4, *SHAPE)


def resnet18():
    return pytest.importorskip("torchvision").models.resnet18(num_classes=5)


class WithFc(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(3 * 32 * 32, 12), nn.Linear(12, 7)

    def forward(self, x):
        return self.fc(self.body(x.flatten(1)))


@pytest.mark.parametrize("kind", [Conv3, Conv5, ResidualCNN, ResNet20, WithFc, resnet18])
@pytest.mark.parametrize("n", [5, 9])
def test_logits_and_features_of_any_backbone(kind, n):
    net = TIENet(kind(3, 5) if kind in (Conv3, Conv5, ResidualCNN, ResNet20) else kind(), n).eval()
    x = torch.rand(2, 3, 32, 32)
    h, logits, every = net.features(x), net(x), net(x, garbage=True)
    assert (logits.shape, h.shape, every.shape) == ((2, n), (2, net.feature_size), (2, n + 1))
    assert torch.equal(every[:, :n], logits)
    assert torch.equal(net.fc(h), logits)
    assert torch.equal(net.outputs(x).features, h)


def test_backbone_after_a_network_was_made_of_it():
    backbone = Conv3(1, 10).eval()
    before, logits = states(backbone), backbone(X)
    net = TIENet(backbone, 10, SHAPE)
    assert torch.equal(net(X), logits)
    assert not net.training  # or parts in evaluation mode would count as frozen
    drawn, net = torch.get_rng_state(), TIENet(backbone.train(), 10, SHAPE)
    assert net.training
    assert net.backbone.training
    assert same(backbone, before)
    assert torch.equal(net.backbone.conv[1].running_mean, before["conv.1.running_mean"])
    assert not net.fc._forward_hooks
    torch.set_rng_state(drawn)
    assert torch.equal(net.garbage.weight, nn.Linear(net.feature_size, 1).weight)


def test_network_of_a_compiled_backbone(tmp_path):
    plain = Conv3(1, 3).eval()
    net = TIENet(torch.compile(plain, backend="eager"), 3, SHAPE, head="multilayer").eval()
    assert torch.equal(net(X), plain(X))
    net.save(tmp_path / "net")
    assert torch.equal(TIENet.load(tmp_path / "net")(X, garbage=True), net(X, garbage=True))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.14", reason="older compilers have not been tried")
def test_compiled_and_exported_program_without_a_break():
    net = make_small("multilayer").eval()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    exported = torch.export.export(net, (X,), {"garbage": True}, strict=True).module()
    for program in (compiled, exported):
        close(program(X, garbage=True), net(X, garbage=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TIENet(nn.Sequential(nn.Conv2d(1, 2, 3)), 2), "in a linear layer, but got Sequ"),
        (lambda: TIENet(Conv3(1, 3), 3, (3, 28, 28)), r"\(3, 28, 28\), but Conv3 fails on one: "),
        (lambda: TIENet(Small(1), 1), "Expected num_classes to be an integer in"),
        (lambda: TIENet(Small(3), 3, class_names=("a", "b")), "3 class names, but got 2"),
        (lambda: TIENet(Small(3), 3, low=1.0, high=1.0), "Expected low < high, numbers or one"),
        (lambda: TIENet(Small(3), 3, low=(0.0, 0.0), high=1.0), "Expected low < high, numbers"),
        (lambda: TIENet(Small(3), 3, SHAPE, (0, 0), (1, 1)), "to be numbers or 1, one per chann"),
    ],
)
def test_arguments_that_do_not_fit_together(make, message):
    with refused(message):
        make()


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(2, 3, 28, 28),
        torch.rand(2, 1, 32, 32),
        torch.rand(1, 28, 28),
        torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
        X * float("nan"),
        X / 0,
        X[:0],
        X * 255,
    ],
    ids=["channels", "size", "dimensions", "dtype", "nan", "inf", "empty", "range"],
)
def test_images_that_decide_refuses(net, x):
    with refused(r"Expected .* but got"):
        net.decide(x)


@pytest.mark.parametrize("scale", [0.9, 1.0])
def test_decision_by_tau_in_evaluation_mode(scale):
    net, x = make_small().train(), torch.rand(6, *SHAPE)
    with torch.no_grad():
        u = uncertainty(copy.deepcopy(net).eval()(x, garbage=True).softmax(1))
    net.tau.fill_(u.median().item() * scale)
    decision = net.decide(x)
    close(decision.uncertainty, u)
    accepted = decision.level != 1
    assert accepted.any()
    assert torch.equal(decision.level[accepted] == 2, u[accepted] > net.tau)
    assert not decision.score.requires_grad
    assert net.training
    assert all(field.shape == (1,) for field in net.decide(x[:1]))
    assert make_net().tau == torch.inf


def test_type_and_device_of_the_head():
    for dtype in (torch.float64, torch.bfloat16):
        net = TIENet(Small(3).to(dtype), 3, SHAPE, low=-1.123, high=2.345)
        assert {p.dtype for p in net.parameters()} == {dtype}
        assert TIENet(Small(7).to(dtype), 3).fc.weight.dtype == dtype  # a layer of its own, too
        assert net(torch.rand(2, *SHAPE), garbage=True).dtype == dtype
    assert {p.device.type for p in TIENet(Small(7).to("meta"), 3).parameters()} == {"meta"}
    net = TIENet(Small(3).to("meta"), 3)
    assert net.tau.device.type == net.low.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_exact_tau_and_value_range_in_any_type(dtype):
    net = TIENet(Small(3), 3, SHAPE, low=-2.1179, high=2.64)
    net.tau.fill_(0.123456)
    low = net.low.clone()
    assert net.to(dtype).low.dtype == net.tau.dtype == torch.float32
    assert torch.equal(net.low, low)
    assert net.tau == torch.tensor(0.123456)
    net.check(torch.full((1, *SHAPE), -2.1179))
    assert net.to("meta").low.is_meta
    assert net.to_empty(device="cpu").low.device.type == "cpu"


def test_autocast_type_in_the_state_dict(tmp_path):
    net, again = make_small().eval(), make_small().eval()
    net.autocast_dtype = "bfloat16"
    torch.save(net.state_dict(), tmp_path / "best.ckpt")  # as OpenOOD keeps networks
    again.load_state_dict(torch.load(tmp_path / "best.ckpt", weights_only=True))
    assert again.autocast_dtype == "bfloat16"
    assert torch.equal(again(X, garbage=True), net(X, garbage=True))
    assert all(isinstance(value, torch.Tensor) for value in net.state_dict().values())
    earlier = {name: value for name, value in net.state_dict().items() if name != "_extra_state"}
    again.load_state_dict(earlier)
    assert again.autocast_dtype == "float32"
    with refused("one of float32, bfloat16, but got 'float8'"):
        net.autocast_dtype = "float8"


def test_last_layer_by_name_and_by_place():
    named = Small(3)
    named.unused = nn.Linear(2, 2)
    net = TIENet(named, 3, SHAPE)
    assert net.feature_size == 48
    assert isinstance(net.backbone.fc, nn.Identity)
    two = nn.Sequential(nn.Linear(784, 5), nn.Linear(5, 3))
    nested = TIENet(nn.Sequential(nn.Flatten(), two), 3, SHAPE)
    assert nested.features(X).shape == (4, nested.feature_size) == (4, 5)


def test_copy_of_a_head_that_is_given():
    head = GarbageHead({"conv.0": 8}, 48)
    net = TIENet(Small(3), 3, SHAPE, head=head)
    before = net.garbage.network[0].weight.clone()
    nn.init.zeros_(head.network[0].weight)
    assert torch.equal(net.garbage.network[0].weight, before)


def test_layers_and_weights_of_resnet20():
    parts, weights = list(ResNet20().modules()), sum(p.numel() for p in ResNet20().parameters())
    assert 0.27e6 < weights < 0.28e6
    convolutions = [part for part in parts if isinstance(part, nn.Conv2d)]
    assert sum(part.kernel_size == (3, 3) for part in convolutions) == 19


def test_a_state_dict_with_a_head_of_before():
    def make():
        return TIENet(ResNet20(1, 3), 3, (1, 32, 32), head="multilayer").eval()

    x, net = torch.rand(2, 1, 32, 32), make()
    net.garbage = multilayer_head(net, (1, 32, 32), 16, 4)
    assert len(net.garbage.layers) == 16
    loaded, new = make(), make()
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded(x, garbage=True), net(x, garbage=True))
    loaded.load_state_dict(new.state_dict())  # and back
    assert torch.equal(loaded(x, garbage=True), new(x, garbage=True))
    foreign = new.state_dict() | {"garbage.mean": torch.zeros(7)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded.load_state_dict(foreign)
    assert loaded.garbage.per_channel == 2
