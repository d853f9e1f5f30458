"""Statistics of layers: which layers, which numbers, their gradient, and their standard form."""

from functools import partial

import pytest
import torch
from conftest import SHAPE, Small, close, stripes
from networks import SHAPE as SMALL
from networks import TAKEN
from torch import nn

from tie_ext import TIENet, attach
from tie_ext.models.backbones import Conv3
from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import MAX_LAYERS, find_layers
from tie_ext.models.statistics import EVERY, FLAT, MAX_CHANNELS, PIECE, pool_statistics
from tie_ext.training.config import HeadConfig


def written_out(a: torch.Tensor) -> torch.Tensor:
    """The four statistics of maps ``(B, C, H, W)``; a head reads the first and the third."""
    a = a.flatten(2)
    through = a.relu()
    deviation = through.var(2, correction=0).clamp_min(FLAT**2).sqrt()
    return torch.cat([through.mean(2), deviation, a.amax(2), a.amin(2)], dim=1)


@pytest.mark.parametrize("channels", [16, 48, 200])
@pytest.mark.parametrize("size", [64, 50, 37])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_statistics_of_maps_pooled_in_pieces(channels, size, layout):
    a = torch.randn(9, channels, size, size).to(memory_format=layout)
    chosen = torch.linspace(0, channels - 1, min(channels, MAX_CHANNELS)).round().long()
    assert a.numel() > PIECE
    close(pool_statistics(a, count=EVERY), written_out(a[:, chosen]))
    mean, _, largest, _ = written_out(a[:, :MAX_CHANNELS]).chunk(4, dim=1)
    close(pool_statistics(a), torch.cat([mean, largest], dim=1))


@pytest.mark.parametrize("shape", [(3, 4, 6, 6), (2, 40, 5, 7), (2, 3, 1, 1)])
def test_gradient_of_statistics_as_autograds(shape):
    a, weights, gradients = torch.randn(shape), torch.randn(shape[0], 4 * shape[1]), []
    a[0, 0, :3] = 1.5  # places that share the largest value
    a[1, 1] = -2.0  # nothing gets through
    for of in (partial(pool_statistics, count=EVERY), written_out):
        a = a.detach().requires_grad_()
        (of(a) * weights).sum().backward()
        gradients.append(a.grad)
    close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradients_through_relus_in_place():
    net, x, slopes = TIENet(Conv3(1, 3), 3, SHAPE, head="multilayer").eval(), stripes(4)[0], []
    for inplace in (True, False):
        for part in net.backbone.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = inplace
        some = x.clone().requires_grad_()
        net.statistics(some)[1].square().sum().backward()
        slopes.append(some.grad)
    assert slopes[0].abs().sum() > 0
    close(*slopes)


def test_standard_statistics_of_an_attached_head(monkeypatch):
    monkeypatch.setattr("tie_ext.training.fit_head.corrupt", lambda x, *_: x)
    model, (x, y) = Small().eval(), stripes()
    net = attach(model, [(x[:30], y[:30]), (x[30:], y[30:])], 3, head_config=HeadConfig(steps=3))
    assert net.garbage.layers == {"conv.1": 8, "conv.4": 12}  # the convolutions' normalisations
    first = model.conv[:2](x).clone()
    second = model.conv[2:5](first.clone()).clone()
    read = [written_out(maps).chunk(4, dim=1)[::2] for maps in (first, second)]
    expected = torch.cat([model.conv(x), *read[0], *read[1]], dim=1)
    _, statistics = net.statistics(x)
    close(statistics, expected, rtol=1e-4, atol=1e-5)
    standard, live = (
        (statistics - net.garbage.mean) / net.garbage.deviation,
        expected.std(0) > 1e-3,
    )
    close(standard.mean(0), torch.zeros(expected.shape[1]), atol=1e-3, rtol=0)
    deviation = standard.std(0)[live]
    close(deviation, torch.ones_like(deviation), atol=1e-2, rtol=0)


def test_units_of_statistics_that_never_vary():
    head = GarbageHead({}, 3)
    head.standardise(torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 0.0]]))
    assert head.deviation.tolist()[1:] == [6.0, 1.0]


def test_bounded_number_of_layers_and_statistics():
    convolutions = [nn.LazyConv2d(150, 3, padding=1) for _ in range(20)]
    parts = [m for convolution in convolutions for m in (convolution, nn.ReLU())]
    wide = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = list(found := find_layers(wide, torch.rand(1, 3, 8, 8)))
    assert (len(layers), layers[0], layers[-1]) == (MAX_LAYERS, "0", "38")
    assert GarbageHead(found, 7).mean.numel() == 7 + 2 * MAX_LAYERS * MAX_CHANNELS
    assert pool_statistics(torch.rand(2, 150, 4, 4)).shape == (2, 2 * MAX_CHANNELS)
    assert pool_statistics(torch.rand(2, 9, 24)).shape == (2, 48)


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ([nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)], "0"),  # no normalisation
        ([nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()], "1"),
        ([nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 4, 3)], "2"),  # one of what came before
        ([nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)], "0"),  # of what the ReLU let through
    ],
)
def test_layers_read_before_relu_and_after_norm(layers, found):
    whole = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    net, x = TIENet(whole, 3, SHAPE, head="multilayer").eval(), torch.rand(5, *SHAPE)
    assert net.garbage.layers == {found: 4}
    before = nn.Sequential(*layers[: int(found) + 1]).eval()(x)
    assert before.min() < 0
    assert torch.equal(net.statistics(x)[1][:, 4:], pool_statistics(before))


@pytest.mark.parametrize("name", ["blocks on tokens `(B, T, C)`", "blocks on maps `(B, H, W, C)`"])
def test_statistics_of_blocks_over_tokens_and_maps(name):
    model, x, found = TAKEN[name].make().eval(), torch.rand(4, *SMALL), []
    net = TIENet(model, 3, SMALL, head="multilayer").eval()
    assert net.garbage.layers == {f"blocks.{i}": 12 for i in (0, 1, 2, 3, 5, 6, 7, 8)}
    model.blocks[5].register_forward_hook(lambda *args: found.append(args[2].flatten(1, -2)))
    model(x)
    s = net.statistics(x)[1][:, 12 + 4 * 24 : 12 + 5 * 24]
    mean, _, largest, _ = written_out(found[0].mT[..., None]).chunk(4, dim=1)
    close(s, torch.cat([mean, largest], dim=1), rtol=1e-4, atol=1e-5)
