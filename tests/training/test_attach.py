"""attach: any backbone keeps its logits to the last bit; what cannot be attached is refused."""

import sys
from functools import partial

import pytest
import torch
from conftest import SHAPE, Small, close, make_batches, refused, same, states, stripes
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tie_ext
from tie_ext import TIENet
from tie_ext.models.backbones import BACKBONES, Conv3, Conv5, ResidualCNN, ResNet20
from tie_ext.outliers import MarginalRepresentations, MarginalSettings, Noise, make
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.config import HeadConfig

attach = partial(tie_ext.attach, head_config=HeadConfig(steps=30))
"""With few steps, where what the head learns does not count."""
module = sys.modules["tie_ext.training.attach"]


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return stripes()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def attached(model, data):
    return attach(model, [data], 3)


def torchvision_model(name: str, *args, **kwargs):
    return getattr(pytest.importorskip("torchvision").models, name)(*args, **kwargs)


NETWORKS = {
    "Conv3": (lambda: Conv3(3, 4), 3),
    "Conv5": (lambda: Conv5(3, 4), 5),
    "ResidualCNN": (lambda: ResidualCNN(3, 4), 8),
    "ResNet20": (lambda: ResNet20(3, 4), 8),
    "resnet18": (  # whose last maps are single points
        lambda: torchvision_model("resnet18", num_classes=4),
        8,
    ),
    "vit": (
        lambda: torchvision_model("VisionTransformer", 32, 8, 3, 2, 24, 48, num_classes=4),
        3,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_head_on_any_backbone_and_equal_logits(name, tmp_path):
    make_one, layers = NETWORKS[name]
    model, x = make_one().eval(), torch.rand(6, 3, 32, 32)
    before = model(x)
    net = attach(model, [x], 4)
    every = net(x, garbage=True)
    assert all(torch.equal(z, before) for z in (net(x), model(x), every[:, :4]))
    assert len(net.garbage.layers) == layers
    each = torch.cat([net(one[None], garbage=True) for one in x])
    close(each, every, rtol=1e-3, atol=1e-3)
    net.save(tmp_path / "net")
    own = type(model) in BACKBONES.values()
    again = TIENet.load(tmp_path / "net", None if own else make_one())
    assert torch.equal(again(x, garbage=True), every)
    assert again.tau == net.tau
    exported = torch.export.export(net, (x,), kwargs={"garbage": True}).module()
    close(exported(x, garbage=True), every)


def test_odds_of_the_head_in_the_softmax(attached, data):
    x, _ = data
    h, statistics = attached.statistics(x)
    odds = attached.garbage(statistics).squeeze(1)
    close(attached(x, garbage=True).softmax(1)[:, -1], odds.sigmoid())
    close(attached.decide(x).score, odds, rtol=1e-4, atol=1e-4)
    assert torch.equal(h, attached.features(x))
    channels_last = attached.to(memory_format=torch.channels_last)
    again = channels_last(x.to(memory_format=torch.channels_last), garbage=True)
    close(again, attached(x, garbage=True), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_unseen_outliers_and_seeds_of_attach():
    x, y = stripes(300)
    model, batches = Small().eval(), list(zip(x.split(50), y.split(50), strict=True))
    net = tie_ext.attach(model, batches, 3)
    white = torch.randn(100, *SHAPE).div(2).add(0.5).clamp(0, 1)
    assert (net.decide(stripes(100)[0]).level == 1).float().mean() < 0.1
    assert (net.decide(white).level == 1).float().mean() > 0.9


def test_same_head_in_any_state_of_the_caller(model, data, attached):
    torch.rand(5)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert same(attach(model, [data], 3), attached)
    assert torch.equal(torch.get_rng_state(), before)
    other = attach(model, [data], 3, seed=1)
    assert not torch.equal(other.garbage.network[0].weight, attached.garbage.network[0].weight)


def test_same_head_of_batches_of_any_form(model, data, attached):
    x, y = data
    one_hot = nn.functional.one_hot(y, 3)
    ood = {"image": torch.cat([x, x]), "label": torch.cat([y, torch.full_like(y, -1)])}
    forms = [(x.numpy(), y.numpy(), "ignored"), {"image": x, "label": y}, (x, one_hot), ood]
    for batch in forms:
        assert same(attach(model, [batch], 3).garbage, attached.garbage)
    with refused("Expected ID images in loader, but got 60 with labels"):
        attach(model, [(x, -1 - y)], 3)


class Drawing(TensorDataset):
    """Images that are the same whatever is drawn beside them."""

    def __getitem__(self, i):
        torch.rand(3)
        return super().__getitem__(i)


class Stream(IterableDataset):
    """Gives whole batches, as some do."""

    def __iter__(self):
        return iter([stripes(30)])


def test_same_head_with_workers_and_in_any_order(model):
    data = Drawing(*stripes(40))
    ways = ({}, {"num_workers": 1}, {"shuffle": True})
    first, *others = (attach(model, DataLoader(data, 16, **way), 3) for way in ways)
    assert all(same(first, other) for other in others)
    assert attach(model, Stream(), 3).tau.isfinite()


def test_images_and_outliers_that_a_head_is_fitted_to(monkeypatch, model, data):
    given, corrupted, (x, y) = [], [], data
    monkeypatch.setattr(module, "fit_head", lambda head, *args: given.append(args))
    monkeypatch.setattr(
        "tie_ext.training.fit_head.corrupt", lambda x, *_: corrupted.append(1 - x) or 1 - x
    )
    net = attach(model, [(x[:50], y[:50]), (x[50:], y[50:])], 3)
    ((inside, outside, config, _),) = given
    assert (len(inside), len(outside), config.steps, config.weight) == (120, 120, 30, 3.0)
    seen = torch.cat([*(torch.cat(pair) for pair in zip(corrupted, x.split(50), strict=True))])
    close(inside, net.statistics(seen)[1])
    u = uncertainty(upcast(net(seen, garbage=True)).softmax(1)).detach()
    assert float(net.tau) == pytest.approx(exclusion_threshold(u, 2.0), rel=1e-4)
    assert len(outside.unique(dim=0)) == 120  # no outlier is there twice


@pytest.mark.parametrize("times", [1, 3])
def test_passes_and_memory_of_attach(times, monkeypatch):
    model, passed, kept = Small().eval(), [], []
    model.conv[0].register_forward_hook(lambda part, args, output: passed.append(len(output)))
    monkeypatch.setattr(module, "fit_head", lambda head, *args: kept.extend(args[:2]))
    batches = [(x, torch.arange(10) % 3) for x in torch.rand(9 * times, 10, *SHAPE)]
    attach(model, batches, 3, head_config=HeadConfig(memory=4 * 100 * 10))
    whole = 2 * 90 * times + 2 * 90 * times  # as they are and corrupted, and outliers
    assert whole <= sum(passed) <= whole + 9  # a few to try the network on
    assert sum(part.numel() for part in kept) <= 3 * 1000
    passed.clear()
    monkeypatch.setattr(module, "KEPT", 50)
    data = TensorDataset(torch.rand(90 * times, *SHAPE), torch.arange(90 * times) % 3)
    loader, config = DataLoader(data, 8, shuffle=True), HeadConfig(max_images=30)
    assert attach(model, loader, 3, head_config=config).train_features.shape == (50, 48)
    assert 2 * 30 + 2 * 30 + 20 <= sum(passed) <= 2 * 30 + 2 * 30 + 20 + 9


@pytest.mark.parametrize("labelled", [True, False])
def test_synthesizers_that_are_fitted_once(labelled, model, data, attached):
    (x, y), seen = data, []

    class Learns(Noise):
        def fit(self, classifier, batches, progress):
            seen.append([(x.shape, y.tolist()) for x, y in batches])
            return {}

    net = TIENet(model, 3, SHAPE)
    vae = MarginalRepresentations(net, MarginalSettings(k=2, vae_epochs=1))
    synthesizers = [Learns(net), make("shuffle", net), *[vae] * labelled]
    found = attach(model, [data if labelled else x], 3, synthesizers=synthesizers)
    assert seen == [[(x.shape, (y if labelled else model(x).argmax(1)).tolist())]]
    assert found.tau.isfinite()
    assert (found.train_labels is not None) == labelled
    assert not torch.equal(found.garbage.network[0].weight, attached.garbage.network[0].weight)


def test_range_names_and_type_of_the_network(data):
    x, y = data
    model = Small().double().eval()
    named = {"low": -2.0, "high": 2.0, "class_names": ("a", "b", "c")}
    net = attach(model, [(x * 4 - 2, y)], 3, **named)
    assert {name: getattr(net, name) for name in named} == named
    assert torch.equal(net(x), model(x.double()))
    assert net(x, garbage=True).isfinite().all()
    assert {p.dtype for p in net.parameters()} == {torch.float64}


def test_attached_network_in_bfloat16(tmp_path, monkeypatch, data):
    read, statistics = [], TIENet.statistics
    monkeypatch.setattr(
        TIENet, "statistics", lambda net, x: read.append(net.autocast_dtype) or statistics(net, x)
    )
    (x, _), model = data, Conv3(1, 3).eval()
    net = attach(model, [data], 3, autocast_dtype="bfloat16")
    assert set(read) == {"bfloat16"}
    net.save(tmp_path / "net")
    assert net.autocast_dtype == TIENet.load(tmp_path / "net").autocast_dtype == "bfloat16"
    assert not torch.equal(net(x), model(x))
    close(net(x), model(x), rtol=0, atol=1e-3)
    with refused("one of float32, bfloat16, but got 'half'"):
        attach(model, [data], 3, autocast_dtype="half")


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 3))


X = torch.rand(8, *SHAPE)


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (Small(), make_batches(), "in evaluation mode, but got Small in training mode"),
        (TIENet(Small(), 3).eval(), make_batches(), "without a garbage class, but got a TIENet"),
        (Small(5).eval(), make_batches(), "a model with 3 outputs, .*, but got one with 5"),
        (flat().eval(), make_batches(), "a backbone with convolutions or transformer blocks"),
        (nn.Conv2d(1, 3, 28).eval(), make_batches(), "a backbone that ends in a linear layer"),
        (Small(3, 3).eval(), make_batches(), r"images \(1, 28, 28\), but Small fails on one"),
        (None, [], "Expected ID images in loader, but got an empty loader"),
        (None, iter(make_batches()), "can be read more .*, but got a list_iterator"),
        (None, TensorDataset(X), "got TensorDataset, which gives one image at a time"),
        (None, [{"data": 1}], "Expected batches of tensors from loader, but got int"),
        (None, [X * 255], "Expected images in the value range"),
        (None, [X, torch.rand(8, 1, 32, 32)], "Expected images of shape"),
        (None, [X * float("nan")], "Expected finite images"),
        (None, [X[:1]], "Expected at least two ID images, but got 1"),
        (None, [(X, torch.arange(8) % 2)], r"of all 3 classes, but got none of class \[2\]"),
        (None, [(X, torch.arange(8))], r"Expected labels in \[0, 3\)"),
        (None, [(X, torch.rand(8))], "Expected integer labels"),
    ],
)
def test_networks_and_data_that_attach_refuses(model, batches, message):
    with refused(message):
        attach(Small().eval() if model is None else model, batches, 3)


def test_attach_without_any_synthesizer(model):
    with refused("`synthesizers` is empty"):
        attach(model, make_batches(), 3, synthesizers=[])


def test_parts_in_training_mode_after_attach(data):
    model = Small(3).eval()
    model.conv[1].train()  # a BatchNorm layer under a root in evaluation mode
    before = states(model)
    attach(model, [data], 3)
    assert same(model, before)
    assert model.conv[1].training
