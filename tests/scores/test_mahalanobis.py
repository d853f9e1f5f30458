"""One Gaussian a class: against its definition, where a direction never varies, and what is
refused.
"""

import pytest
import torch
from conftest import refused

from tie_ext.scores.mahalanobis import fit_gaussians, ledoit_wolf


def features(count: int = 300, size: int = 5):
    y = torch.arange(count) % 3
    z = torch.randn(count, size) @ torch.randn(size, size) + 3 * torch.randn(3, size)[y]
    return z, y


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_gaussians_by_their_definition():
    z, y = features()
    mu = torch.stack([z[y == c].mean(0) for c in range(3)])
    covariance = (z - mu[y]).T @ (z - mu[y]) / len(z)
    found, new = fit_gaussians(z, y), torch.randn(7, 5)
    torch.testing.assert_close(found.mu, mu)
    close(found.precision, covariance.inverse())
    squares = [((new - m) @ covariance.inverse() * (new - m)).sum(1) / 2 for m in mu]
    close(found.distance(new), torch.stack(squares).amin(0))
    gap = fit_gaussians(z, torch.where(y == 1, 7, y))  # classes without an image have none
    assert gap.mu.shape == (3, 5)
    close(gap.distance(new), found.distance(new))


def test_directions_in_which_features_never_vary():
    z, y = features()
    new = torch.randn(7, 5)
    dead = torch.cat([z, torch.full((300, 1), 0.25), z[:, :1] * 2], dim=1)
    moved = torch.cat([new, torch.ones(7, 1), new[:, :1] * 2], dim=1)
    close(fit_gaussians(dead, y).distance(moved), fit_gaussians(z, y).distance(new))


@pytest.mark.parametrize(("count", "size"), [(2, 3), (5, 40), (60, 20), (3000, 20), (30, 1)])
def test_shrinkage_as_in_scikit_learn(count, size):
    covariance = pytest.importorskip("sklearn.covariance")
    z = torch.randn(count, size).double() @ torch.randn(size, size).double()
    expected, _ = covariance.ledoit_wolf(z.numpy(), assume_centered=True)
    torch.testing.assert_close(ledoit_wolf(z), torch.from_numpy(expected))


def test_shrinkage_of_few_and_of_equal_features():
    assert torch.equal(ledoit_wolf(torch.zeros(5, 3).double()), torch.zeros(3, 3).double())
    found = fit_gaussians(torch.ones(5, 3), None, shrinkage=True)
    assert torch.equal(found.distance(torch.randn(4, 3)), torch.zeros(4))
    z, y = features(60, 50)
    far = fit_gaussians(z[5:], y[5:], shrinkage=True).distance(
        torch.cat([z[:5], 20 * torch.randn(5, 50)])
    )
    assert far[:5].max() < far[5:].min()


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("classes", [1, 3, 200])
def test_digits_that_the_expanded_square_keeps(classes, spread):
    mu, y = torch.randn(classes, 20) + 5, torch.arange(400) % classes
    z = mu[y] + spread * torch.randn(400, 20)
    new = torch.cat([z[:50] + spread * torch.randn(50, 20), torch.randn(50, 20)])
    found = fit_gaussians(z, y)
    wide, differences = found.precision.double(), new.double()[:, None] - found.mu.double()
    expected = ((differences @ wide) * differences).sum(2).amin(1) / 2
    torch.testing.assert_close(found.distance(new).double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [None, torch.arange(40), torch.arange(40) // 2 * 3])
def test_one_gaussian_for_classes_of_few_images(labels):
    z = torch.randn(40, 5)
    found = fit_gaussians(z, labels)
    pairs = labels is not None and labels[1] == 0
    assert len(found.mu) == (20 if pairs else 1)
    if not pairs:
        torch.testing.assert_close(found.mu[0], z.mean(0))


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"shape \(N, F\)"),
        (torch.zeros(0, 4), torch.zeros(0).long(), r"shape \(N, F\)"),
        (torch.full((2, 3), torch.inf), torch.zeros(2).long(), "finite features"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), r"labels in \[0, 1\)"),
        (torch.zeros(2, 3), torch.zeros(3).long(), "labels of shape"),
        (torch.zeros(2, 3), torch.zeros(2), "integer labels"),
    ],
)
def test_features_and_labels_that_are_refused(z, y, message):
    with refused(message):
        fit_gaussians(z, y)
