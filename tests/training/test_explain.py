"""Pictures of a classifier: inversions are of the class asked for, and layers tell what is odd."""

import math

import pytest
import torch
from conftest import Small, close, make_small, refused, same, states

import tie_ext
from tie_ext.training.explain import MAX_SHIFT, _blur, _nearest, _shift, explain

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
    return explain(trained, [bars(120, 0)], N, per_class=2, steps=60)


def test_agreement_of_inversions_with_their_class(trained, found):
    assert found.inversions.shape == found.nearest.shape == (N, 2, 1, 28, 28)
    assert 0 <= found.inversions.min() < found.inversions.max() <= 1
    right = trained(found.inversions.flatten(0, 1)).argmax(1) == torch.arange(2 * N) // 2
    assert found.agreement == right.double().mean() > 0.8


@pytest.mark.slow
def test_distance_of_inversions_without_statistics(trained):
    unlike = []
    for weight in (1.0, 0.0):
        of = explain(trained, [bars(120, 0)], N, steps=100, statistics_weight=weight)
        means, deviations = (part.repeat_interleave(4, 0) for part in of.layers.of_class)
        z = (of.layers.read(of.inversions.flatten(0, 1)) - means) / deviations
        unlike.append(z.square().log1p().mean())
    assert unlike[0] < unlike[1] - 0.5


def test_blur_and_shift_of_generated_images(trained, monkeypatch):
    x = torch.zeros(2, 3, 28, 28)
    x[:, 1, 14, 14] = 16
    blurred = _blur(x)
    assert blurred[0, 1, 13:16, 13:16].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]
    close(blurred.sum((2, 3)), x.sum((2, 3)))
    close(_blur(torch.ones(1, 1, 28, 28)), torch.ones(1, 1, 28, 28))
    places = [(_shift(x)[:, 1] == 16).nonzero()[:, 1:].tolist() for _ in range(300)]
    assert all(first == second for first, second in places)  # all images of a batch alike
    reach = 28 // MAX_SHIFT
    for seen in zip(*(first for first, _ in places), strict=True):
        assert set(seen) == set(range(14 - reach, 15 + reach))
    calls = []
    for name, of in (("_blur", _blur), ("_shift", _shift)):
        monkeypatch.setattr(
            f"tie_ext.training.explain.{name}",
            lambda x, name=name, of=of: calls.append(name) or of(x),
        )
    explain(trained, [bars(30, 0)], N, per_class=1, steps=2)
    # What is given back is blurred, and stands where it stood.
    assert calls == ["_blur", "_shift"] * 2 + ["_blur"]


def test_nearest_training_image_of_the_class(found):
    (x, y), images, net = bars(120, 0), torch.rand(2 * N, 1, 28, 28), found.layers.net
    nearest = _nearest(net, images.unflatten(0, (N, 2)), [(x[:60], y[:60]), (x[60:], y[60:])])
    with torch.no_grad():
        distance = torch.cdist(net.features(images), net.features(x))
    of = torch.arange(2 * N) // 2
    own = distance.masked_fill(y != of[:, None], math.inf).argmin(1)
    assert torch.equal(nearest.flatten(0, 1), x[own])
    assert (y[distance.argmin(1)] != of).any()  # of another class some are nearer
    assert torch.equal(found.nearest, _nearest(net, found.inversions, [(x, y)]))


def test_distances_of_each_layer_in_deviations(found):
    layers, x = found.layers, bars(30, 1)[0]
    every = layers.read(bars(120, 0)[0])
    mean, unit = every.mean(0), 1 + every.mean(0).abs()
    deviation = torch.where(every.std(0) > 1e-4 * unit, every.std(0), unit)
    squares = ((layers.read(x) - mean) / deviation).square()
    parts = squares.split([layers.head.feature_size, *layers.sizes], dim=1)
    expected = torch.stack([part.mean(1).sqrt() for part in (*parts[1:], parts[0])], dim=1)
    close(layers.distance(x), expected, rtol=1e-3, atol=1e-3)
    assert layers.names[-1] == "features"


def test_distances_of_id_and_ood_images(found):
    layers = found.layers
    with refused("calibration images"):
        layers.compare(torch.rand(1, 1, 28, 28))
    layers.calibrate([bars(100, 2)])
    usual = layers.compare(bars(60, 3)[0])
    odd = layers.compare((torch.rand(20, 1, 28, 28) > 0.5).float())
    assert (usual.relative_distance > 1).float().mean() < 0.15
    assert abs(float(usual.p_value.mean()) - 0.5) < 0.15
    assert (odd.relative_distance > 1).all()
    assert (odd.p_value == 0).all()
    assert odd.distance.min() > usual.distance.median()


@pytest.mark.parametrize("head", ["linear", "multilayer", None])
def test_network_and_random_state_after_explain(head, trained):
    model = make_small(head).eval() if head else trained
    before, random = states(model), torch.random.get_rng_state()
    first, again, other = (
        explain(model, [bars(30, 0)], N, per_class=1, steps=2, seed=seed) for seed in (0, 0, 1)
    )
    assert first.layers.net is not model
    assert torch.equal(first.inversions, again.inversions)
    assert not torch.equal(first.inversions, other.inversions)
    assert same(model, before)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_data_that_explain_refuses(trained):
    x, y = bars(30, 0)
    for arguments, said in (
        (([], N), "empty loader"),
        (([(x, y)],), "num_classes"),
        (([(x, 0 * y)], N), "of class 1"),
        (([(x + 1, y)], N), "range"),
    ):
        with refused(said):
            tie_ext.explain(trained, *arguments, steps=1)
