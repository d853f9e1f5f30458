"""Networks on disk: what comes back, and what is refused."""

import pytest
import torch
from conftest import SHAPE, Small, make_net, refused

from tie_ext import TIENet
from tie_ext.models.backbones import Conv3, Conv5, ResidualCNN, ResNet20
from tie_ext.models.head import GarbageHead
from tie_ext.utils.files import load_state, save_state


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (lambda: make_net(), True),
        (lambda: TIENet(Small(3), 3, SHAPE), False),
        (lambda: TIENet(Small(3).double(), 3, SHAPE), False),
        *(
            (lambda kind=kind: TIENet(kind(1, 4), 4), True)
            for kind in (Conv5, ResidualCNN, ResNet20)
        ),
    ],
)
def test_scores_of_a_network_that_was_saved(make, own, tmp_path):
    net = make().eval()
    net.tau.fill_(0.25)
    net.save(tmp_path / "net")
    again, x = TIENet.load(tmp_path / "net", None if own else Small(3)), torch.rand(4, *SHAPE)
    assert torch.equal(again(x, garbage=True), net(x, garbage=True))
    assert (again.image_shape, again.tau.item(), again.training) == (net.image_shape, 0.25, False)
    if not own:
        with refused("Expected a `backbone`"):
            TIENet.load(tmp_path / "net")
        with refused("Expected a network of this architecture"):
            TIENet.load(tmp_path / "net", Conv3(1, 3))


def test_contents_of_a_file_of_a_network(tmp_path):
    names, low, high = ("a", "b", "c", "d"), (-1.0, -2.0, -3.0), (1.0, 2.0, 3.0)
    net = TIENet(Conv5(3, 4), 4, (3, 32, 32), low, high, names)
    net.autocast_dtype = "bfloat16"
    net.save(tmp_path / "net")
    state = load_state(tmp_path / "net", "network")
    readout = {"layers": [["fc"]], "path": [], "maps": "", "behind": False, "selected": False}
    assert {k: v for k, v in state.items() if k != "weights"} == {
        "num_classes": 4,
        "image_shape": [3, 32, 32],
        "classes": list(names),
        "precision": "bfloat16",
        "backbone": "conv5",
        "head": None,
        "readout": readout,
    }
    again = TIENet.load(tmp_path / "net")
    assert (again.class_names, again.image_shape, again.num_classes) == (names, (3, 32, 32), 4)
    assert torch.equal(torch.cat([again.low, again.high]).flatten(), torch.tensor(low + high))
    assert (again.autocast_dtype, type(again.backbone)) == ("bfloat16", Conv5)
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
        (_changed(classes=[1, 2, 3, 4]), r"named \[1, 2, 3, 4\]"),
        (_changed(precision="float8"), "be one of float32, bfloat16, but got 'float8'"),
        (_changed(backbone="nowhere"), "whose architecture is not one of conv3, conv5, residual"),
        (_changed(image_shape=[3, 224, 224]), r"images \(3, 224, 224\), but Conv3 fails on one"),
        (
            _weight("fc.weight", torch.zeros(4, 128).int()),
            r"torch.int32 \(4, 128\) instead of flo",
        ),
        (_weight("fc.weight", torch.zeros(4, 5)), r"fc.weight of \(4, 5\) instead of \(4, 128\)"),
        (_weight("low", torch.full((1, 1, 1), -torch.inf)), "a value range that is not finite"),
        (_weight("high", torch.ones(1001, 1, 1)), "not finite, or of 1001 channels"),
        (_changed(head={"layers": ["conv.0"]}), r"layers \['conv.0'\] of a garbage head"),
        (_changed(head={"layers": {"conv.0": 0}}), r"layers \{'conv.0': 0\} of a garbage head"),
        (_changed(head={"layers": {"conv.0": 31}}), "320 statistics instead of 190"),
        (_readout(layers=[["conv.1"]]), "logits of 'conv.1', which is no linear layer"),
        (_readout(layers=[]), r"logits \{'layers': \[\]"),
        (_readout(maps="sum"), r"logits .*'sum'"),
        (_readout(path=[[1]]), "logits "),
    ],
)
def test_files_of_networks_that_do_not_fit(tmp_path, damage, message):
    head = GarbageHead({"conv.0": 32, "conv.4": 64}, 128, 5)
    TIENet(Conv3(1, 4), 4, SHAPE, head=head).save(tmp_path / "net")
    assert TIENet.load(tmp_path / "net").garbage.hidden == 5
    state = load_state(tmp_path / "net", "network")
    damage(state)
    save_state(tmp_path / "net", "network", state)
    with refused(message):
        TIENet.load(tmp_path / "net")


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.rand(6, 5), None),
        (torch.full((6, 48), torch.inf), None),
        (torch.rand(6, 48), torch.zeros(5).long()),
        (torch.rand(6, 48), torch.full((6,), 3)),
        (None, torch.zeros(6).long()),
    ],
)
def test_training_features_that_do_not_fit_the_network(features, labels, tmp_path):
    net, good = TIENet(Small(3), 3, SHAPE), (torch.rand(6, 48), torch.arange(6) % 3)
    net.keep_training(*good)
    net.save(tmp_path / "net")
    again = TIENet.load(tmp_path / "net", Small(3))
    assert torch.equal(again.train_features, good[0])
    assert torch.equal(again.train_labels, good[1])
    net.keep_training(features, labels)
    net.save(tmp_path / "net")
    with refused("features or labels of training images that do not fit"):
        TIENet.load(tmp_path / "net", Small(3))


def test_file_that_claims_very_large_images(tmp_path):
    TIENet(Conv3(1, 4), 4, SHAPE).save(tmp_path / "net")
    state = load_state(tmp_path / "net", "network")
    save_state(tmp_path / "net", "network", {**state, "image_shape": [3, 1000, 1000]})
    assert TIENet.load(tmp_path / "net").image_shape == (3, 1000, 1000)  # without a trial run
