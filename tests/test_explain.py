"""Pictures of a classifier: inversions are of the class asked for, and layers tell what is odd."""

import copy
import sys

import pytest
import torch
from conftest import Small

import tie_ext
from tie_ext import TIENet
from tie_ext.training.explain import MAX_SHIFT, Layers, _blur, _nearest, _shift, explain

N = 3
"""Classes."""


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes, a bar about the top, the middle or the bottom, on weak noise."""
    random = torch.Generator().manual_seed(seed)
    x, y = 0.2 * torch.rand(count, 1, 28, 28, generator=random), torch.arange(count) % N
    tops = 10 * y + torch.randint(5, (count,), generator=random) - 2
    for image, top in zip(x, tops.tolist(), strict=True):
        image[:, max(0, top) : top + 6] += 0.6
    return x, y


@pytest.fixture(scope="module")
def trained() -> Small:
    """A plain classifier, without TIE, that knows its classes."""
    torch.manual_seed(0)
    model, (x, y) = Small(N), bars(120, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def found(trained):
    return explain(trained, [bars(120, 0)], N, per_class=2, steps=100)


def test_agreement_of_inversions_with_their_class(trained, found):
    assert found.inversions.shape == found.nearest.shape == (N, 2, 1, 28, 28)
    assert 0 <= found.inversions.min() < found.inversions.max() <= 1
    asked = torch.arange(N).repeat_interleave(2)
    assert (
        found.agreement
        == (trained(found.inversions.flatten(0, 1)).argmax(1) == asked).double().mean()
    )
    assert found.agreement > 0.8


@pytest.mark.slow
def test_statistics_weight_brings_inversions_closer(trained, found):
    without = explain(trained, [bars(120, 0)], N, per_class=2, steps=100, statistics_weight=0.0)
    means, deviations = (part.repeat_interleave(2, 0) for part in found.layers.of_class)
    unlike = [
        ((of.layers.read(of.inversions.flatten(0, 1)) - means) / deviations)
        .square()
        .log1p()
        .mean()
        for of in (found, without)
    ]
    assert unlike[0] < unlike[1] - 0.5, unlike


def test_blur_and_shift_of_generated_images(trained, monkeypatch):
    x = torch.zeros(2, 3, 28, 28)
    x[:, 1, 14, 14] = 16
    blurred = _blur(x)
    assert blurred[0, 1, 13:16, 13:16].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    assert torch.allclose(blurred.sum((2, 3)), x.sum((2, 3)))
    assert torch.allclose(_blur(torch.ones(1, 1, 28, 28)), torch.ones(1, 1, 28, 28))
    places = {
        tuple((_shift(x)[:, 1] == 16).nonzero()[:, 1:].flatten().tolist()) for _ in range(300)
    }
    assert all(place[:2] == place[2:] for place in places)  # all images of a batch alike
    assert (
        {row for row, *_ in places}
        == {column for _, column, *_ in places}
        == set(range(14 - 28 // MAX_SHIFT, 15 + 28 // MAX_SHIFT))
    )
    seen = []
    for name, of in (("_blur", _blur), ("_shift", _shift)):
        monkeypatch.setattr(
            sys.modules["tie_ext.training.explain"],
            name,
            lambda x, name=name, of=of: seen.append(name) or of(x),
        )
    explain(trained, [bars(30, 0)], N, per_class=1, steps=2)
    assert seen == ["_blur", "_shift"] * 2 + [
        "_blur"
    ]  # what is given back is blurred, and stands where it stood


def test_nearest_training_image_of_the_class(found):
    (x, y), images, net = bars(120, 0), torch.rand(2 * N, 1, 28, 28), found.layers.net
    nearest = _nearest(net, images.unflatten(0, (N, 2)), [(x[:60], y[:60]), (x[60:], y[60:])])
    with torch.no_grad():
        distance = torch.cdist(net.features(images), net.features(x))
    for row in range(2 * N):
        own = (y == row // 2).nonzero().flatten()
        assert torch.equal(nearest[row // 2, row % 2], x[own[distance[row, own].argmin()]])
    assert (
        distance.argmin(1) % N != torch.arange(2 * N) // 2
    ).any()  # of another class some are nearer
    assert torch.equal(found.nearest, _nearest(net, found.inversions, [(x, y)]))


def test_distance_is_in_deviations_of_id_images(found):
    x = bars(30, 1)[0]
    layers, head = found.layers, found.layers.head
    every = layers.read(bars(120, 0)[0])
    z = (layers.read(x) - every.mean(0)) / every.std(0)
    usual = (every.std(0) > 1e-3 * (1 + every.mean(0).abs())).all()
    far = layers.distance(x)
    assert far.shape == (30, len(layers.names))
    if usual:
        assert torch.allclose(
            far[:, -1], z[:, : head.feature_size].square().mean(1).sqrt(), rtol=1e-3
        )
        assert torch.allclose(
            far[:, 0],
            z[:, head.feature_size :][:, : layers.sizes[0]].square().mean(1).sqrt(),
            rtol=1e-3,
        )
    assert head.feature_size + sum(layers.sizes) == every.shape[1]


def test_distances_of_id_and_ood_images(found):
    layers = found.layers
    with pytest.raises(ValueError, match="calibration images"):
        layers.compare(torch.rand(1, 1, 28, 28))
    layers.calibrate([bars(100, 2)])
    usual, odd = (
        layers.compare(bars(60, 3)[0]),
        layers.compare((torch.rand(20, 1, 28, 28) > 0.5).float()),
    )
    assert (usual.relative_distance > 1).float().mean() < 0.15
    assert abs(float(usual.p_value.mean()) - 0.5) < 0.15
    assert (odd.relative_distance > 1).all()
    assert (odd.p_value == 0).all()
    assert odd.distance.min() > usual.distance.median()


def test_explain_is_seeded_and_leaves_the_network(trained):
    before, random = copy.deepcopy(trained.state_dict()), torch.random.get_rng_state()
    first, again, other = (
        explain(trained, [bars(30, 0)], N, per_class=1, steps=2, seed=seed).inversions
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(
        parameter.grad is None or not parameter.grad.isnan().any()
        for parameter in trained.parameters()
    )


@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
def test_a_network_with_a_garbage_class_is_copied(garbage):
    net = TIENet(Small(N), N, (1, 28, 28), head=garbage).eval()
    before = copy.deepcopy(net.state_dict())
    of = explain(net, [bars(30, 0)], per_class=1, steps=1).layers.net
    assert of is not net
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_what_cannot_be_explained_is_refused(trained):
    for arguments, said in (
        (([],), "empty loader"),
        (([bars(30, 0)],), "num_classes"),
        (([(bars(30, 0)[0], torch.zeros(30, dtype=torch.long))], N), "of class 1"),
        (([(bars(30, 0)[0] + 1, bars(30, 0)[1])], N), "range|between"),
    ):
        with pytest.raises(ValueError, match=said):
            explain(trained, *arguments, steps=1)


def test_it_is_at_the_front_door():
    assert tie_ext.explain is explain
    assert (
        Layers(TIENet(Small(N), N, (1, 28, 28), head="multilayer").eval(), [bars(6, 0)]).names[-1]
        == "features"
    )
