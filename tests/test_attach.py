"""attach: any backbone keeps its logits to the last bit; what cannot be attached is refused."""

import copy
import sys
from functools import partial

import pytest
import torch
from conftest import SHAPE, Small, make_batches
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tie_ext
from tie_ext import TIENet
from tie_ext.models.backbones import Conv3, Conv5, ResidualCNN, ResNet20
from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import MAX_LAYERS, find_layers
from tie_ext.models.statistics import EVERY, FLAT, MAX_CHANNELS, PIECE, pool_statistics
from tie_ext.outliers import MarginalRepresentations, MarginalSettings, Noise, make
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.config import HeadConfig
from tie_ext.training.fit_head import fit_head
from tie_ext.utils.reservoir import Reservoir

attach = partial(tie_ext.attach, head_config=HeadConfig(steps=30))
"""With few steps, where what the head learns does not count."""


def stripes(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Three easy classes."""
    x = 0.1 * torch.rand(count, *SHAPE)
    y = torch.arange(count) % 3
    for i, label in enumerate(y.tolist()):
        x[i, :, 9 * label : 9 * label + 9] += 0.8
    return x, y


def torchvision_model(name: str):
    models = pytest.importorskip("torchvision").models
    if name == "vit":
        return models.VisionTransformer(32, 8, 3, 2, 24, 48, num_classes=4)
    return getattr(models, name)(num_classes=4)


BACKBONES = {
    "Conv3": (lambda: Conv3(3, 4), 3),
    "Conv5": (lambda: Conv5(3, 4), 5),
    "ResidualCNN": (lambda: ResidualCNN(3, 4), 8),
    "ResNet20": (lambda: ResNet20(3, 4), 8),
    "resnet18": (
        lambda: torchvision_model("resnet18"),
        8,
    ),  # at 32 pixels its last maps are single points
    "mobilenet_v3_small": (lambda: torchvision_model("mobilenet_v3_small"), 8),
    "resnet50": (lambda: torchvision_model("resnet50"), 8),
    "convnext_tiny": (lambda: torchvision_model("convnext_tiny"), 8),
    "vit": (lambda: torchvision_model("vit"), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_takes_a_head_and_keeps_its_logits(name, tmp_path):
    make_one, layers = BACKBONES[name]
    torch.manual_seed(0)
    model, x = make_one().eval(), torch.rand(6, 3, 32, 32)
    if name in ("mobilenet_v3_small", "resnet50", "convnext_tiny"):
        x = torch.rand(6, 3, 64, 64)
    before = model(x)
    net = attach(model, [x], 4)
    assert torch.equal(net(x), before)
    assert torch.equal(model(x), before)
    every = net(x, garbage=True)
    assert torch.equal(every[:, :4], before)
    assert len(net.garbage.layers) == layers
    torch.testing.assert_close(
        torch.cat([net(one[None], garbage=True) for one in x]), every, rtol=1e-3, atol=1e-3
    )
    net.save(tmp_path / "net")
    again = TIENet.load(
        tmp_path / "net",
        None if name in ("Conv3", "Conv5", "ResidualCNN", "ResNet20") else make_one(),
    )
    assert torch.equal(again(x, garbage=True), every)
    assert again.tau == net.tau
    exported = torch.export.export(net, (x,), kwargs={"garbage": True}).module()
    torch.testing.assert_close(exported(x, garbage=True), every)


def test_the_softmax_over_all_outputs_gives_the_heads_odds():
    x, y = stripes()
    net = attach(Small().eval(), [(x, y)], 3)
    h, statistics = net.statistics(x)
    odds = net.garbage(statistics).squeeze(1)
    torch.testing.assert_close(net(x, garbage=True).softmax(1)[:, -1], odds.sigmoid())
    torch.testing.assert_close(net.decide(x).score, odds, rtol=1e-4, atol=1e-4)
    assert torch.equal(h, net.features(x))


def test_statistics_of_every_layer_before_its_relu(monkeypatch):
    monkeypatch.setattr(sys.modules["tie_ext.training.fit_head"], "corrupt", lambda x, *_: x)
    x, y = stripes()
    model = Small().eval()
    net = attach(model, [(x[:30], y[:30]), (x[30:], y[30:])], 3)
    assert net.garbage.layers == {"conv.1": 8, "conv.4": 12}  # the convolutions' normalisations
    first = model.conv[:2](x).clone()
    second = model.conv[2:5](first.clone()).clone()
    parts = [model.conv(x)]
    for maps in (first, second):
        parts += [maps.clamp(min=0).mean((2, 3)), maps.amax((2, 3))]
    want = torch.cat(parts, dim=1)
    _, statistics = net.statistics(x)
    torch.testing.assert_close(statistics, want, rtol=1e-4, atol=1e-5)
    standard = (statistics - net.garbage.mean) / net.garbage.deviation
    torch.testing.assert_close(standard.mean(0), torch.zeros(len(want[0])), atol=1e-3, rtol=0)
    live = statistics.std(0) > 1e-3
    torch.testing.assert_close(
        standard.std(0)[live], torch.ones(int(live.sum())), atol=1e-2, rtol=0
    )


def test_a_statistic_that_never_changes_is_no_noise():
    head = GarbageHead({}, 3)
    head.standardise(torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 0.0]]))
    assert head.deviation.tolist()[1:] == [6.0, 1.0]


def test_the_number_of_statistics_is_bounded():
    wide = nn.Sequential(
        *[m for _ in range(20) for m in (nn.LazyConv2d(150, 3, padding=1), nn.ReLU())],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    layers = find_layers(wide, torch.rand(1, 3, 8, 8))
    assert len(layers) == MAX_LAYERS
    assert next(iter(layers)) == "0"
    assert list(layers)[-1] == "38"
    assert GarbageHead(layers, 7).mean.numel() == 7 + 2 * MAX_LAYERS * MAX_CHANNELS
    assert pool_statistics(torch.rand(2, 150, 4, 4)).shape == (2, 2 * MAX_CHANNELS)
    assert pool_statistics(torch.rand(2, 9, 24)).shape == (2, 48)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)], {"0": 4}),  # no normalisation
        ([nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()], {"1": 4}),
        (
            [nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 4, 3)],
            {"2": 4},
        ),  # the normalisation is of what came before
        (
            [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)],
            {"0": 4},
        ),  # of what the ReLU let through
    ],
)
def test_layers_are_read_before_relu_after_norm(layers, found):
    net = TIENet(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        3,
        SHAPE,
        head="multilayer",
    ).eval()
    assert net.garbage.layers == found
    x = torch.rand(5, *SHAPE)
    before = nn.Sequential(*layers[: int(next(iter(found))) + 1]).eval()(x)
    assert torch.equal(net.statistics(x)[1][:, 4:], pool_statistics(before))
    assert before.min() < 0


@pytest.mark.slow
def test_unseen_outliers_and_seeds_of_attach():
    x, y = stripes(300)
    torch.manual_seed(0)
    model = Small().eval()
    batches = list(zip(x.split(50), y.split(50), strict=True))
    net = tie_ext.attach(model, batches, 3)
    white = torch.randn(100, *SHAPE).div(2).add(0.5).clamp(0, 1)
    assert (net.decide(stripes(100)[0]).level == 1).float().mean() < 0.1
    assert (net.decide(white).level == 1).float().mean() > 0.9
    net = attach(model, batches, 3)
    torch.rand(5)
    again = attach(model, batches, 3)
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    other = attach(model, batches, 3, seed=1)
    assert not torch.equal(other.garbage.network[0].weight, net.garbage.network[0].weight)


def test_attach_under_no_grad():
    x, y = stripes()
    model = Small().eval()
    with torch.no_grad():
        net = attach(model, [(x, y)], 3)
    assert torch.equal(
        net.garbage.network[0].weight, attach(model, [(x, y)], 3).garbage.network[0].weight
    )


@pytest.mark.parametrize("channels", [16, 48, 200])
@pytest.mark.parametrize("size", [64, 50, 37])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_maps_pooled_in_pieces(channels, size, layout):
    a = torch.randn(9, channels, size, size).to(memory_format=layout)
    assert a.numel() > PIECE
    some = torch.linspace(0, channels - 1, min(channels, MAX_CHANNELS)).round().long()
    read = a[:, some].flatten(2)
    through = read.relu()
    expected = [through.mean(2), through.std(2, correction=0), read.amax(2), read.amin(2)]
    torch.testing.assert_close(pool_statistics(a, count=EVERY), torch.cat(expected, dim=1))
    first = a[:, :MAX_CHANNELS].flatten(2)
    expected = [first.relu().mean(2), first.amax(2)]
    torch.testing.assert_close(pool_statistics(a), torch.cat(expected, dim=1))


def test_id_images_as_they_are_and_corrupted_and_outliers(
    monkeypatch,
):
    taught = []
    monkeypatch.setattr(
        sys.modules["tie_ext.training.attach"],
        "fit_head",
        lambda head, id_statistics, ood_statistics, config, progress: taught.append(
            (id_statistics, ood_statistics, config.steps, config.weight)
        ),
    )
    brought: list[torch.Tensor] = []
    monkeypatch.setattr(
        sys.modules["tie_ext.training.fit_head"],
        "corrupt",
        lambda x, *_: brought.append(1 - x) or brought[-1],
    )
    x, y = stripes()
    net = attach(Small().eval(), [(x[:50], y[:50]), (x[50:], y[50:])], 3)
    ((inside, outside, steps, weight),) = taught
    assert (len(inside), len(outside), steps, weight) == (120, 120, 30, 3.0)
    seen = torch.cat([part for pair in zip(brought, x.split(50), strict=True) for part in pair])
    torch.testing.assert_close(inside, net.statistics(seen)[1])
    uncertainties = uncertainty(upcast(net(seen, garbage=True)).softmax(1)).detach()
    assert float(net.tau) == pytest.approx(exclusion_threshold(uncertainties, 2.0), rel=1e-4)
    assert len(outside.unique(dim=0)) == 120  # no outlier is there twice


@pytest.mark.slow
def test_passes_and_memory_of_attach(monkeypatch):
    module, passed, kept = sys.modules["tie_ext.training.attach"], [], []

    class Counted(Small):
        def forward(self, x):
            passed.append(len(x))
            return super().forward(x)

    monkeypatch.setattr(
        module, "fit_head", lambda head, id_rows, ood_rows, *_: kept.append((id_rows, ood_rows))
    )
    x, y = stripes(90)
    for times in (1, 3):
        passed.clear()
        batches = list(zip(x.split(10) * times, y.split(10) * times, strict=True))
        attach(Counted().eval(), batches, 3, head_config=HeadConfig(memory=4 * 100 * 10))
        images, outliers = 2 * 90 * times, 2 * 90 * times
        assert (
            images + outliers <= sum(passed) <= images + outliers + 9
        )  # a few to try the network on
    sizes = [sum(part.numel() for part in parts) for parts in kept]
    assert sizes[0] == sizes[1] <= 3 * 1000


def test_a_budget_bounds_the_passes_of_attach(monkeypatch):
    passed: list[int] = []
    model, (x, y) = Small().eval(), stripes(90)
    model.conv[0].register_forward_hook(lambda part, args, output: passed.append(len(output)))
    monkeypatch.setattr(sys.modules["tie_ext.training.attach"], "KEPT", 50)
    config = HeadConfig(steps=2, max_images=30)
    for times in (1, 3):
        passed.clear()
        data = TensorDataset(x.repeat(times, 1, 1, 1), y.repeat(times))
        net = attach(model, DataLoader(data, 8, shuffle=True), 3, head_config=config)
        assert 2 * 30 + 2 * 30 + 20 <= sum(passed) <= 2 * 30 + 2 * 30 + 20 + 9
        assert net.train_features.shape == (50, 48)


class Drawing(TensorDataset):
    """Images that are the same whatever is drawn beside them."""

    def __getitem__(self, i):
        torch.rand(3)
        return super().__getitem__(i)


def test_workers_and_order_of_a_loader_change_nothing():
    model, data = Small().eval(), Drawing(*stripes(40))
    ways = ({}, {"num_workers": 1}, {"shuffle": True})
    first, *others = (attach(model, DataLoader(data, 16, **way), 3).state_dict() for way in ways)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_fit_ends_where_held_out_images_gain_no_more(monkeypatch):
    monkeypatch.setattr(sys.modules["tie_ext.training.fit_head"], "ENOUGH", 100)
    head, rng = GarbageHead({}, 4), torch.Generator().manual_seed(0)
    noise = torch.randn(400, 4, generator=rng)
    seen: list[int] = []
    head.network[0].register_forward_hook(lambda part, args, output: seen.append(len(output)))
    fit_head(head, noise[:200], noise[200:], HeadConfig(steps=100_000, batch_size=50))
    assert 100 <= seen.count(50) < 5000  # where there is nothing to learn
    held = seen.count(40)
    assert held == seen.count(50) // 25
    low, high = noise[:200] - 3, noise[200:] + 3
    fit_head(head, low, high, HeadConfig(steps=200))  # the weights of the smallest loss stay
    assert (head(high) > 0).all()
    assert (head(low) < 0).all()


def test_reservoir_leaves_its_input_unchanged():
    sample, rows = Reservoir(10), torch.zeros(10, 2)
    sample.add(rows)
    sample.add(torch.ones(1000, 2))
    assert rows.sum() == 0
    assert sample.rows.shape == (10, 2)
    assert sample.rows.sum() > 10


def test_images_without_labels_and_other_outliers_will_do():
    x, _ = stripes()
    model = Small().eval()
    net = TIENet(model, 3, SHAPE)
    white = attach(model, [x], 3, synthesizers=[make("white", net), make("shuffle", net)])
    assert white.tau.isfinite()
    assert not torch.equal(
        white.garbage.network[0].weight, attach(model, [x], 3).garbage.network[0].weight
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_synthesizers_are_fitted_once(labelled):
    x, y = stripes()
    model, seen = Small().eval(), []

    class Learns(Noise):
        def fit(self, classifier, batches, progress):
            seen.append([(x.shape, y.tolist()) for x, y in batches])
            return {}

    attach(model, [(x, y) if labelled else x], 3, synthesizers=[Learns(TIENet(model, 3, SHAPE))])
    assert seen == [[(x.shape, (y if labelled else model(x).argmax(1)).tolist())]]


def test_a_vae_can_propose_outliers():
    x, y = stripes()
    model = Small().eval()
    net = TIENet(model, 3, SHAPE)
    with_vae = attach(
        model,
        [(x, y)],
        3,
        synthesizers=[MarginalRepresentations(net, MarginalSettings(k=2, vae_epochs=1))],
    )
    assert with_vae.tau.isfinite()


def test_normalised_images_have_their_range():
    x, y = stripes()
    net = attach(
        Small().eval(), [(x * 4 - 2, y)], 3, low=-2.0, high=2.0, class_names=("a", "b", "c")
    )
    assert (net.low.item(), net.high.item(), net.class_names) == (-2.0, 2.0, ("a", "b", "c"))


def test_a_network_in_double_precision_takes_a_head():
    x, y = stripes()
    model = Small().double().eval()
    net = attach(model, [(x, y)], 3)
    assert torch.equal(net(x), model(x.double()))
    assert net(x, garbage=True).isfinite().all()
    assert {p.dtype for p in net.parameters()} == {torch.float64}


@pytest.mark.slow
def test_attach_in_bfloat16(tmp_path, monkeypatch):
    x, y = stripes()
    read = []
    looked = TIENet.statistics
    monkeypatch.setattr(
        TIENet, "statistics", lambda net, x: (read.append(net.autocast_dtype), looked(net, x))[1]
    )
    model = Conv3(1, 3).eval()
    net = attach(model, [(x, y)], 3, autocast_dtype="bfloat16")
    assert set(read) == {"bfloat16"}
    assert (
        net.autocast_dtype
        == TIENet.load(net.save(tmp_path / "net") or tmp_path / "net").autocast_dtype
        == "bfloat16"
    )
    assert not torch.equal(net(x), model(x))
    torch.testing.assert_close(net(x), model(x), rtol=0, atol=1e-3)
    with pytest.raises(
        ValueError, match="Expected autocast_dtype to be one of float32, bfloat16, but got 'half'"
    ):
        attach(model, [(x, y)], 3, autocast_dtype="half")


def test_gradients_through_relus_in_place():
    torch.manual_seed(0)
    net, x, slopes = TIENet(Conv3(1, 3), 3, SHAPE, head="multilayer").eval(), stripes(4)[0], []
    for inplace in (True, False):
        for part in net.backbone.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = inplace
        some = x.clone().requires_grad_()
        net.statistics(some)[1].square().sum().backward()
        slopes.append(some.grad)
    assert slopes[0].abs().sum() > 0
    torch.testing.assert_close(*slopes)


def test_channels_last_changes_nothing():
    x, y = stripes()
    torch.manual_seed(0)
    model = Small().eval()
    net = attach(model, [(x, y)], 3)
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last(x.to(memory_format=torch.channels_last), garbage=True),
        net(x, garbage=True),
        rtol=1e-3,
        atol=1e-4,
    )


class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 3))


class Stream(IterableDataset):
    """Gives whole batches, as some do."""

    def __iter__(self):
        return iter([stripes(30)])


def test_a_stream_of_batches_is_taken():
    assert attach(Small().eval(), Stream(), 3).tau.isfinite()


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (
            Small(),
            make_batches(),
            "Expected a trained model in evaluation mode, but got Small in training mode",
        ),
        (
            TIENet(Small(), 3, SHAPE).eval(),
            make_batches(),
            "Expected a classifier without a garbage class, but got a TIENet, which has one",
        ),
        (
            Small(5).eval(),
            make_batches(),
            "Expected a model with 3 outputs, as num_classes says, but got one with 5",
        ),
        (
            Flat().eval(),
            make_batches(),
            "Expected a backbone with convolutions or transformer blocks",
        ),
        (
            nn.Conv2d(1, 3, 28).eval(),
            make_batches(),
            "Expected a backbone that ends in a linear layer",
        ),
        (
            Small(3, channels=3).eval(),
            make_batches(),
            r"Expected a backbone for images \(1, 28, 28\), but Small fails on one",
        ),
        (Small().eval(), [], "Expected ID images in loader, but got an empty loader"),
        (
            Small().eval(),
            iter(make_batches()),
            "Expected loader to be something that can be read more .*, but got a list_iterator",
        ),
        (
            Small().eval(),
            TensorDataset(torch.rand(8, *SHAPE)),
            "Expected batches from loader, but got TensorDataset, which gives one image at a time",
        ),
        (
            Small().eval(),
            [{"data": 1}],
            "Expected batches of tensors from loader, but got int",
        ),
        (Small().eval(), [torch.rand(8, *SHAPE) * 255], "Expected images in the value range"),
        (
            Small().eval(),
            [torch.rand(8, *SHAPE), torch.rand(8, 1, 32, 32)],
            "Expected images of shape",
        ),
        (Small().eval(), [torch.full((8, *SHAPE), float("nan"))], "Expected finite images"),
        (Small().eval(), [torch.rand(1, *SHAPE)], "Expected at least two ID images, but got 1"),
        (
            Small().eval(),
            [(torch.rand(4, *SHAPE), torch.tensor([0, 0, 1, 1]))],
            r"Expected samples of all 3 classes, but got none of class \[2\]",
        ),
        (
            Small().eval(),
            [(torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 3]))],
            r"Expected labels in \[0, 3\)",
        ),
        (Small().eval(), [(torch.rand(4, *SHAPE), torch.rand(4))], "Expected integer labels"),
    ],
)
def test_what_cannot_be_attached_to_is_refused(model, batches, message):
    with pytest.raises(ValueError, match=message):
        attach(model, batches, 3)


def test_empty_synthesizers_are_refused():
    with pytest.raises(
        ValueError,
        match="`synthesizers` is empty",
    ):
        attach(Small().eval(), make_batches(), 3, synthesizers=[])


def test_a_sample_is_a_uniform_one_of_all_rows():
    torch.manual_seed(0)
    held = torch.zeros(40)
    for _ in range(400):
        sample = Reservoir(10)
        for part in torch.arange(40.0)[:, None].split((3, 9, 1, 20, 7)):
            sample.add(part)
        assert len(sample.rows) == 10
        held += torch.bincount(sample.rows.flatten().long(), minlength=40)
    assert held.sum() == 4000
    assert held.min() > 65  # 100 expected, deviation 8.7
    assert held.max() < 135


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 40, 5, 7), (2, 3, 1, 1)])
def test_the_gradient_of_the_statistics_is_autograds(shape):
    def written_out(a):
        a = a.flatten(2)
        through = a.relu()
        mean = through.mean(2)
        variance = through.square().mean(2) - mean.square()
        return torch.cat([mean, variance.clamp_min(FLAT**2).sqrt(), a.amax(2), a.amin(2)], dim=1)

    a = torch.randn(shape, dtype=torch.float32)
    a[0, 0, :3] = 1.5  # places that share the largest value
    a[1, 1] = -2.0  # nothing gets through
    weights = torch.randn(shape[0], 4 * shape[1])
    gradients = []
    for of in (partial(pool_statistics, count=EVERY), written_out):
        a = a.detach().requires_grad_()
        (of(a) * weights).sum().backward()
        gradients.append(a.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_batches_of_any_form_give_the_same_head():
    x, y = stripes()
    model = Small().eval()
    one_hot = torch.nn.functional.one_hot(y, 3)
    forms = [(x, y), (x.numpy(), y.numpy(), "ignored"), {"image": x, "label": y}, (x, one_hot)]
    heads = [attach(model, [batch], 3).garbage.state_dict() for batch in forms]
    for head in heads[1:]:
        assert all(torch.equal(value, heads[0][name]) for name, value in head.items())


def test_images_with_a_label_below_zero_are_left_out():
    (x, y), model = stripes(), Small().eval()
    mixed = torch.cat([x, torch.rand(20, *SHAPE)]), torch.cat([y, torch.full((20,), -1)])
    head, expected = (attach(model, [batch], 3).garbage for batch in (mixed, (x, y)))
    assert torch.equal(head.mean, expected.mean)
    with pytest.raises(ValueError, match="Expected ID images in loader, but got 20 with labels"):
        attach(model, [(mixed[0][-20:], mixed[1][-20:])], 3)


def test_attach_leaves_parts_in_training_mode_as_they_were():
    model, (x, y) = Small(3).eval(), stripes(24)
    model.conv[1].train()  # a BatchNorm layer under a root in evaluation mode
    before = model.conv[1].running_mean.clone()
    attach(model, [(x, y)], 3, head_config=HeadConfig(steps=2))
    assert torch.equal(model.conv[1].running_mean, before)
