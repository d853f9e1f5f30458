"""OpenOOD's network ``tie_net``: calls, value range, checkpoints."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from hosts.openood.conftest import build, lenet, states_equal
from tie_ext.models.head import GarbageHead

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = Path(__file__).parents[2] / "data"


@pytest.mark.parametrize(
    ("backbone", "size", "head", "layers"),
    [
        ("lenet", 28, "linear", 2),
        ("lenet", 28, "multilayer", 2),
        ("resnet18_32x32", 32, "multilayer", 8),
        ("resnet18_64x64", 64, "linear", 8),
        ("wrn", 32, "linear", None),
        ("conv3", 28, "multilayer", None),
    ],
)
def test_calls_that_postprocessors_make(openood, backbone, size, head, layers):
    net = build(backbone=backbone, image_size=size, head=head).eval()
    x = torch.rand(2, 3, size, size)
    logits, h = net(x, return_feature=True)
    every = net(x, garbage=True)
    assert every.shape == (2, 11)
    assert torch.equal(every[:, :-1], net(x))
    assert torch.equal(net(x), logits)
    assert h.shape == (2, net.feature_size)
    weight, bias = map(torch.tensor, net.get_fc())
    torch.testing.assert_close(h @ weight.T + bias, logits, rtol=1e-4, atol=1e-5)
    assert net.get_fc_layer() is net.fc
    clipped = net.fc(h.clamp(max=0.01))  # as ReAct asks for
    torch.testing.assert_close(net.forward_threshold(x, 0.01), clipped)
    assert not torch.equal(clipped, logits)
    if layers:  # the others' own forward has no return_feature_list
        again, maps = net(x, return_feature_list=True, garbage=True)
        torch.testing.assert_close(again, every)
        torch.testing.assert_close(net(x, return_feature_list=True)[0], logits)
        torch.testing.assert_close(maps[-1].flatten(1), h)
    assert isinstance(net.garbage, GarbageHead if head == "multilayer" else nn.Linear)
    if layers and head == "multilayer":
        assert len(net.garbage.layers) == layers
    if backbone == "resnet18_32x32":
        assert net.intermediate_forward(x, 4).shape[:2] == (2, 512)
        assert isinstance(net.avgpool, nn.AdaptiveAvgPool2d)
    with pytest.raises(AttributeError):
        net.no_such_layer  # noqa: B018


def test_value_range_of_normalised_images(openood):
    net = build(backbone="resnet18_32x32", image_size=32, normalization_type="cifar10")
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])
    torch.testing.assert_close(net.low.flatten(), -mean / std)
    torch.testing.assert_close(net.high.flatten(), (1 - mean) / std)
    assert build().low.flatten().tolist() == [-1, -1, -1]


def test_precision_of_every_way_through(openood):
    net, x = build(backbone="resnet18_32x32").eval(), torch.rand(2, 3, 28, 28)
    full = net(x)
    net.autocast_dtype = "bfloat16"
    assert torch.equal(net(x, return_feature_list=True)[0], net(x))
    assert not torch.equal(net(x), full)
    assert net.double()(x, return_feature_list=True)[0].dtype == torch.float64


def test_bias_of_a_classifier_without_one(openood):
    backbone = lenet()
    backbone.fc = nn.Linear(84, 3, bias=False)
    weight, bias = openood.OpenOODTIENet(backbone, 3, (3, 28, 28)).get_fc()
    assert (weight.tolist(), bias.tolist()) == (backbone.fc.weight.tolist(), [0, 0, 0])


def test_checkpoints_are_read_without_running_code(openood, tmp_path):
    net = build()
    net.tau.fill_(0.25)
    torch.save(net.state_dict(), tmp_path / "best.ckpt")
    assert states_equal(build(pretrained=True, checkpoint=str(tmp_path / "best.ckpt")), net)
    (tmp_path / "hostile.ckpt").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(pickle.UnpicklingError):
        build(pretrained=True, checkpoint=str(tmp_path / "hostile.ckpt"))


@pytest.mark.parametrize(("version", "head"), [("0.1.0", "linear"), ("0.2.0", "multilayer")])
def test_checkpoints_of_earlier_versions(openood, version, head):
    saved = DATA / f"saved_by_{version}" / "openood_tie_net.ckpt"
    net = build(num_classes=3, head=head, pretrained=True, checkpoint=str(saved))
    logits = torch.tensor(json.loads(saved.with_suffix(".json").read_text())["logits"])
    x = torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28).sin()
    torch.testing.assert_close(net.eval()(x, garbage=True), logits, rtol=1e-5, atol=2e-6)
    assert (net.tau, net.autocast_dtype) == (0.25, "float32")


# Checkpoints in the networks that OpenOOD's scripts build.


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("resnet18_32x32", "linear"),
        ("resnet18_32x32", "multilayer"),
        ("conv3", "linear"),
        ("resnet20", "multilayer"),
        ("wrn", "linear"),
    ],
)
def test_checkpoints_in_networks_of_scripts(openood, backbone, head):
    from openood.networks import ResNet18_32x32

    saved = build(backbone=backbone, image_size=32, head=head).eval()
    saved.autocast_dtype = "bfloat16"
    saved.tau.fill_(0.25)
    net = ResNet18_32x32(num_classes=10)
    net.load_state_dict(saved.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert isinstance(net, openood.OpenOODTIENet)
    assert (net.tau, net.autocast_dtype, net.image_shape) == (0.25, "bfloat16", (3, 32, 32))
    assert torch.equal(net.eval()(x, garbage=True), saved(x, garbage=True))


def test_other_checkpoints_in_networks_of_scripts(openood):
    from openood.networks import ResNet18_32x32

    first, second = ResNet18_32x32(num_classes=10), ResNet18_32x32(num_classes=10)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.fc.weight, first.fc.weight)
    assert not isinstance(second, openood.OpenOODTIENet)
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({})
    with pytest.raises(ValueError, match=r"around one of ResNet18_32x32, conv3.* main.py"):
        second.load_state_dict(build(backbone="lenet").state_dict())
    state = build(backbone="conv3", image_size=32, head="multilayer").state_dict()
    state["garbage.mean"] = state["garbage.mean"][:-4]
    with pytest.raises(ValueError, match="for 32 pixels, but got another"):
        second.load_state_dict(state)
