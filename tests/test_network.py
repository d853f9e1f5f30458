"""The wrapper over any backbone, and the generator at every size."""

import copy

import pytest
import torch
from conftest import SHAPE, Small, make_net
from torch import nn

from tie_ext import TIENet
from tie_ext.models.backbones import Conv3, Conv5, ResidualCNN, ResNet20
from tie_ext.models.generator import Generator
from tie_ext.models.head import GarbageHead
from tie_ext.outliers.saliency import Standardized
from tie_ext.scores.decision import uncertainty
from tie_ext.utils.files import load_state, save_state


def resnet18():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=5)


class WithFc(nn.Module):
    feature_size = 12

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3 * 32 * 32, 12)
        self.fc = nn.Linear(12, 7)

    def forward(self, x):
        return self.fc(self.body(x.flatten(1)))


def test_a_compiled_backbone_is_taken_as_it_was(tmp_path):
    plain, x = Conv3(1, 3).eval(), torch.rand(4, *SHAPE)
    net = TIENet(torch.compile(plain, backend="eager"), 3, SHAPE, head="multilayer").eval()
    assert torch.equal(net(x), plain(x))
    net.save(tmp_path / "net")
    assert torch.equal(TIENet.load(tmp_path / "net")(x, garbage=True), net(x, garbage=True))


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.14", reason="older compilers have not been tried")
def test_all_logits_compile_and_export_without_a_break():
    net, x = TIENet(Small(3), 3, SHAPE, head="multilayer").eval(), torch.rand(4, *SHAPE)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    exported = torch.export.export(net, (x,), {"garbage": True}, strict=True).module()
    for program in (compiled, exported):
        torch.testing.assert_close(program(x, garbage=True), net(x, garbage=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv3(3, 5),
        lambda: Conv5(3, 5),
        lambda: ResidualCNN(3, 5),
        lambda: ResNet20(3, 5),
        WithFc,
        resnet18,
    ],
)
@pytest.mark.parametrize("n", [5, 9])
def test_any_backbone_gives_n_or_n_plus_1_logits_and_features(make, n):
    net = TIENet(make(), n).eval()
    x = torch.rand(2, 3, 32, 32)
    h = net.features(x)
    logits = net(x)
    assert logits.shape == (2, n)
    assert h.shape == (2, net.feature_size)
    every = net(x, garbage=True)
    assert every.shape == (2, n + 1)
    assert torch.equal(every[:, :n], logits)
    assert torch.equal(net.fc(h), logits)
    assert torch.equal(net.outputs(x).features, h)


def test_pre_trained_weights_are_kept_and_the_backbone_is_left_alone():
    backbone = Conv3(1, 10).eval()
    x = torch.rand(2, *SHAPE)
    before = backbone(x)
    net = TIENet(backbone, 10).eval()
    assert torch.equal(net(x), before)
    assert torch.equal(backbone(x), before)


def test_a_backbone_without_a_linear_layer_is_refused():
    with pytest.raises(
        ValueError, match="Expected a backbone that ends in a linear layer, but got Sequential"
    ):
        TIENet(nn.Sequential(nn.Conv2d(1, 2, 3)), 2)


def test_a_range_that_differs_by_channel_is_told_by_channel():
    net = TIENet(Conv3(3, 10), 10, (3, 28, 28), [-1.0, -2.0, -1.0], [1.0, 2.0, 1.0])
    with pytest.raises(
        ValueError,
        match=r"value range \[-1, 1\], \[-2, 2\], \[-1, 1\] \(by channel\) of the network, but got values in \[0, 3\]",
    ):
        net.check(torch.cat([torch.zeros(1, 2, 28, 28), torch.full((1, 1, 28, 28), 3.0)], 1))


def test_a_backbone_for_other_images_is_refused():
    with pytest.raises(
        ValueError,
        match=r"Expected a backbone for images \(3, 28, 28\), but Conv3 fails on one: .*channels",
    ):
        TIENet(Conv3(1, 10), 10, (3, 28, 28))


def test_trying_a_backbone_leaves_it_as_it_was():
    backbone, drawn = Conv3(1, 10), torch.get_rng_state()
    net = TIENet(backbone, 10, SHAPE)
    assert torch.equal(net.backbone.conv[1].running_mean, torch.zeros(32))
    assert net.training
    assert net.backbone.training
    assert not net.fc._forward_hooks
    torch.set_rng_state(drawn)
    assert torch.equal(net.garbage.weight, nn.Linear(net.feature_size, 1).weight)


@pytest.mark.parametrize("size", [28, 29, 32, 57, 64, 96, 113, 128, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_generator_makes_every_size_in_4_to_6_stages(size, channels):
    generator = Generator((channels, size, size), 11, width=2, low=-2.0, high=3.0)
    x = generator(torch.randn(2, 64), torch.rand(2, 11).softmax(1))
    assert x.shape == (2, channels, size, size)
    assert -2 <= x.min() < x.max() <= 3
    assert 4 <= sum(isinstance(m, nn.ConvTranspose2d) for m in generator.modules()) <= 6


@pytest.mark.parametrize("shape", [(3, 28, 45), (1, 64, 20), (1, 3, 33)])
def test_a_generator_of_images_that_are_not_square_makes_the_middle_of_squares(shape):
    square = Generator((shape[0], *[max(shape[1:])] * 2), 11, width=2).eval()
    generator = Generator(shape, 11, width=2).eval()
    generator.load_state_dict(square.state_dict())
    given = torch.randn(2, 64), torch.rand(2, 11).softmax(1)
    top, left = ((max(shape[1:]) - side) // 2 for side in shape[1:])
    middle = square(*given)[..., top : top + shape[1], left : left + shape[2]]
    torch.testing.assert_close(generator(*given), middle)


@pytest.mark.parametrize("shape", [(1, 27, 27), (1, 225, 225), (2, 32, 32), (1, 20, 27), (28, 28)])
def test_generator_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="Expected an image shape"):
        Generator(shape, 11)


def test_decide_takes_one_image_and_keeps_the_mode(net):
    net.train()
    decision = net.decide(torch.rand(1, *SHAPE))
    assert all(field.shape == (1,) for field in decision)
    assert net.training


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(2, 3, 28, 28),
        torch.rand(2, 1, 32, 32),
        torch.rand(1, 28, 28),
        torch.zeros(2, 1, 28, 28, dtype=torch.uint8),
        torch.full((1, 1, 28, 28), float("nan")),
        torch.full((1, 1, 28, 28), float("inf")),
        torch.rand(0, 1, 28, 28),
        torch.rand(2, 1, 28, 28) * 255,
    ],
    ids=["channels", "size", "dimensions", "dtype", "nan", "inf", "empty", "range"],
)
def test_bad_images_are_refused(net, x):
    with pytest.raises(ValueError, match=r"Expected .* but got"):
        net.decide(x)


def test_save_and_load_give_the_same_decisions(tmp_path):
    net = make_net().eval()
    net.tau.fill_(0.25)
    net.save(tmp_path / "net.safetensors")
    again = TIENet.load(tmp_path / "net.safetensors")
    x = torch.rand(4, *SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(net.decide(x), again.decide(x), strict=True))
    assert (again.image_shape, again.tau.item()) == (SHAPE, 0.25)


def test_a_foreign_architecture_needs_its_backbone(tmp_path):
    net = TIENet(WithFc(), 4, (3, 32, 32))
    net.save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="Expected a `backbone`"):
        TIENet.load(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="Expected a network of this architecture"):
        TIENet.load(tmp_path / "net.safetensors", Conv3(3, 4))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(TIENet.load(tmp_path / "net.safetensors", WithFc())(x), net.eval()(x))


def test_a_file_that_asks_for_another_precision_is_refused(tmp_path, net):
    with pytest.raises(
        ValueError,
        match="Expected autocast_dtype to be one of float32, bfloat16, but got 'float8'",
    ):
        net.autocast_dtype = "float8"
    net.save(tmp_path / "net.safetensors")
    state = load_state(tmp_path / "net.safetensors", "network")
    save_state(tmp_path / "net.safetensors", "network", {**state, "precision": "float8"})
    with pytest.raises(
        ValueError,
        match=r"Expected autocast_dtype in .* to be one of float32, bfloat16, but got 'float8'",
    ):
        TIENet.load(tmp_path / "net.safetensors")


def test_standardized_features_have_mean_0_and_the_norm_of_proposition_2():
    net = TIENet(Standardized(Conv3(1, 10), sigma=0.5), 10, SHAPE).eval()
    logits, h = net.outputs(torch.rand(4, *SHAPE))
    assert logits.shape == (4, 11)
    torch.testing.assert_close(h.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        h.norm(dim=1), torch.full((4,), 0.5 * (128 - 1) ** 0.5), rtol=1e-4, atol=0
    )


def test_standardized_features_are_openoods(openood_root):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openood.networks.ascood_net import ASCOODNet
        from openood.networks.lenet import LeNet
    theirs = ASCOODNet(LeNet(10)).eval()
    theirs.set_params(0.5)
    ours = TIENet(Standardized(theirs.backbone, sigma=0.5), 10).eval()
    x = torch.rand(3, 3, 28, 28)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_head_takes_type_and_place_of_the_backbones():
    for dtype in (torch.float64, torch.bfloat16):
        net = TIENet(Small(3).to(dtype), 3, SHAPE, low=-1.123, high=2.345)
        assert {p.dtype for p in net.parameters()} == {dtype}
        assert TIENet(Small(7).to(dtype), 3).fc.weight.dtype == dtype  # a head of its own, too
        assert net(torch.rand(2, *SHAPE), garbage=True).dtype == dtype
    assert {p.device.type for p in TIENet(Small(7).to("meta"), 3).parameters()} == {"meta"}
    assert (
        TIENet(Small(3).to("meta"), 3).tau.device.type
        == TIENet(Small(3).to("meta"), 3).low.device.type
        == "meta"
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_value_range_and_tau_stay_exact(dtype):
    net = TIENet(Small(3), 3, SHAPE, low=-2.1179, high=2.64)
    net.tau.fill_(0.123456)
    low = net.low.clone()
    assert net.to(dtype).low.dtype == net.tau.dtype == torch.float32
    assert torch.equal(net.low, low)
    assert net.tau == torch.tensor(0.123456)
    net.check(torch.full((1, *SHAPE), -2.1179))
    assert net.to("meta").low.is_meta
    assert net.to_empty(device="cpu").low.device.type == "cpu"


def test_a_double_network_comes_back_as_one(tmp_path):
    net = TIENet(Small(3).double(), 3, SHAPE).eval()
    net.save(tmp_path / "net")
    again = TIENet.load(tmp_path / "net", Small(3))
    x = torch.rand(2, *SHAPE)
    assert torch.equal(again(x), net(x))
    assert again(x).dtype == torch.float64


@pytest.mark.parametrize("kind", [Conv3, Conv5, ResidualCNN, ResNet20])
def test_a_network_without_an_image_shape_comes_back(kind, tmp_path):
    net = TIENet(kind(3, 4), 4).eval()
    net.save(tmp_path / "net")
    again = TIENet.load(tmp_path / "net")
    x = torch.rand(2, 3, 32, 32)
    assert again.image_shape is None
    assert torch.equal(again(x, garbage=True), net(x, garbage=True))


def test_the_precision_goes_with_the_state_dict(tmp_path):
    net, x = TIENet(Small(3), 3, SHAPE).eval(), torch.rand(2, *SHAPE)
    net.autocast_dtype = "bfloat16"
    torch.save(net.state_dict(), tmp_path / "best.ckpt")  # as OpenOOD keeps networks
    again = TIENet(Small(3), 3, SHAPE).eval()
    again.load_state_dict(torch.load(tmp_path / "best.ckpt", weights_only=True))
    assert again.autocast_dtype == "bfloat16"
    assert torch.equal(again(x, garbage=True), net(x, garbage=True))
    assert all(isinstance(value, torch.Tensor) for value in net.state_dict().values())
    earlier = {name: value for name, value in net.state_dict().items() if name != "_extra_state"}
    again.load_state_dict(earlier)
    assert again.autocast_dtype == "float32"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="Expected num_classes to be an integer in"):
        TIENet(Small(1), 1)
    with pytest.raises(ValueError, match="Expected 3 class names, but got 2"):
        TIENet(Small(3), 3, class_names=("a", "b"))
    for low, high in ((1.0, 1.0), ((0.0, 0.0), 1.0)):
        with pytest.raises(
            ValueError, match="Expected low < high, numbers or one for each channel"
        ):
            TIENet(Small(3), 3, low=low, high=high)


@pytest.mark.parametrize("lam", [0.9, 1.0])
def test_decide_rejects_above_the_networks_tau_and_in_evaluation_mode(lam):
    net, x = TIENet(Small(3), 3, SHAPE).train(), torch.rand(6, *SHAPE)
    with torch.no_grad():
        u = uncertainty(copy.deepcopy(net).eval()(x, garbage=True).softmax(1))
    net.tau.fill_(u.median().item() * lam)
    decision = net.decide(x)
    torch.testing.assert_close(decision.uncertainty, u)
    garbage = decision.level == 1
    assert torch.equal(decision.level[~garbage] == 2, u[~garbage] > net.tau)
    assert (~garbage).any()
    assert not decision.score.requires_grad


def test_a_named_head_is_taken_before_the_last_linear_layer():
    class Named(Small):
        def __init__(self):
            super().__init__(3)
            self.unused = nn.Linear(2, 2)

    net = TIENet(Named(), 3, SHAPE)
    assert net.feature_size == 48
    assert isinstance(net.backbone.fc, nn.Identity)
    nested = TIENet(
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(784, 5), nn.Linear(5, 3))), 3, SHAPE
    )
    assert nested.feature_size == 5
    assert nested.features(torch.rand(2, *SHAPE)).shape == (2, 5)


def test_what_is_saved_says_what_it_is(tmp_path):
    net = TIENet(
        Conv5(3, 4),
        4,
        (3, 32, 32),
        low=(-1.0, -2.0, -3.0),
        high=(1.0, 2.0, 3.0),
        class_names=("a", "b", "c", "d"),
    )
    net.autocast_dtype = "bfloat16"
    net.save(tmp_path / "net")
    state = load_state(tmp_path / "net", "network")
    assert {k: v for k, v in state.items() if k != "weights"} == {
        "num_classes": 4,
        "image_shape": [3, 32, 32],
        "classes": ["a", "b", "c", "d"],
        "precision": "bfloat16",
        "backbone": "conv5",
        "head": None,
        "readout": {
            "layers": [["fc"]],
            "path": [],
            "maps": "",
            "behind": False,
            "selected": False,
        },
    }
    again = TIENet.load(tmp_path / "net")
    assert (again.low.flatten().tolist(), again.high.flatten().tolist()) == (
        [-1, -2, -3],
        [1, 2, 3],
    )
    assert (again.class_names, again.image_shape, again.num_classes) == (
        ("a", "b", "c", "d"),
        (3, 32, 32),
        4,
    )
    assert (again.autocast_dtype, again.training, type(again.backbone)) == (
        "bfloat16",
        False,
        Conv5,
    )
    del state["precision"], state["head"], state["readout"]  # a file of before there were any
    save_state(tmp_path / "earlier", "network", state)
    assert TIENet.load(tmp_path / "earlier").autocast_dtype == "float32"


def _changed(**values):
    return lambda state: state.update(values)


def _readout(**values):
    return lambda state: state["readout"].update(values)


def _weight(key, value):
    return lambda state: state["weights"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed(num_classes=3), "weights of 4 classes instead of 3, named"),
        (_changed(classes="abcd"), "weights of 4 classes instead of 4, named 'abcd'"),
        (_changed(classes=[1, 2, 3, 4]), r"named \[1, 2, 3, 4\]"),
        (
            _changed(backbone="nowhere"),
            r"Expected a `backbone` for .*net, whose architecture is not one of conv3, conv5, residual, resnet20, but",
        ),
        (
            _changed(image_shape=[3, 28, 28]),
            r"Expected a backbone for images \(3, 28, 28\), but Conv3 fails on one",
        ),
        (
            _weight("fc.weight", torch.zeros(4, 128, dtype=torch.int32)),
            r"fc of torch.int32 \(4, 128\) instead of floating-point \(4, 128\)",
        ),
        (_weight("fc.weight", torch.zeros(4, 5)), r"fc.weight of \(4, 5\) instead of \(4, 128\)"),
        (
            _weight("low", torch.full((1, 1, 1), -torch.inf)),
            "a value range that is not finite, or of 1 channels",
        ),
        (
            _weight("high", torch.full((1, 1, 1), torch.inf)),
            "a value range that is not finite, or of 1 channels",
        ),
        (
            _weight("high", torch.ones(1001, 1, 1)),
            "a value range that is not finite, or of 1001 channels",
        ),
        (_changed(head={"layers": ["conv.0"]}), r"layers \['conv.0'\] of a garbage head"),
        (_changed(head={"layers": {1: 8}}), r"layers \{1: 8\} of a garbage head"),
        (_changed(head={"layers": {"conv.0": 0}}), r"layers \{'conv.0': 0\} of a garbage head"),
        (
            _changed(head={"layers": {"conv.0": "8"}}),
            r"layers \{'conv.0': '8'\} of a garbage head",
        ),
        (_changed(head={"layers": {"conv.0": 31}}), "320 statistics instead of 190"),
        (_readout(layers=[["conv.1"]]), "logits of 'conv.1', which is no linear layer"),
        (_readout(layers=[]), r"logits \{'layers': \[\]"),
        (_readout(maps="sum"), r"logits .*'sum'"),
        (_readout(path=[[1]]), "logits "),
    ],
)
def test_a_file_of_a_network_that_does_not_fit_is_refused_by_its_reason(tmp_path, damage, message):
    head = GarbageHead({"conv.0": 32, "conv.4": 64}, 128, 5)
    net = TIENet(Conv3(1, 4), 4, SHAPE, head=head)
    net.save(tmp_path / "net")
    assert TIENet.load(tmp_path / "net").garbage.hidden == 5
    state = load_state(tmp_path / "net", "network")
    damage(state)
    save_state(tmp_path / "net", "network", state)
    with pytest.raises(ValueError, match=message):
        TIENet.load(tmp_path / "net")


def test_resnet20_is_of_the_papers_size():
    weights = sum(p.numel() for p in ResNet20().parameters())
    assert 0.27e6 < weights < 0.28e6
    assert (
        sum(
            isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)
            for part in ResNet20().modules()
        )
        == 19
    )


def test_a_head_is_copied():
    head = GarbageHead({"conv.0": 8}, 48)
    net = TIENet(Small(3), 3, SHAPE, head=head)
    before = net.garbage.network[0].weight.clone()
    torch.nn.init.zeros_(head.network[0].weight)
    assert torch.equal(net.garbage.network[0].weight, before)


def test_a_file_that_claims_large_images_is_not_tried_on_one(tmp_path):
    TIENet(Conv3(1, 4), 4, SHAPE).save(tmp_path / "net")
    state = load_state(tmp_path / "net", "network")
    save_state(tmp_path / "net", "network", {**state, "image_shape": [3, 1000, 1000]})
    assert TIENet.load(tmp_path / "net").image_shape == (3, 1000, 1000)
    save_state(tmp_path / "net", "network", {**state, "image_shape": [3, 224, 224]})
    with pytest.raises(ValueError, match=r"Expected a backbone for images \(3, 224, 224\)"):
        TIENet.load(tmp_path / "net")
