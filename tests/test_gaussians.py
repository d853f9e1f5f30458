"""One Gaussian a class: against its definition, where a direction never varies, and what is
refused.
"""

import pytest
import torch
import torch.nn.functional as F

from tie_ext.scores.mahalanobis import Gaussians, fit_gaussians, ledoit_wolf


def features(
    count: int = 300, size: int = 5, classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(count) % classes
    return torch.randn(count, size) @ torch.randn(size, size) + 3 * torch.randn(classes, size)[
        y
    ], y


def test_it_is_the_definition():
    z, y = features()
    mu = torch.stack([z[y == c].mean(0) for c in range(3)])
    covariance = sum((z[y == c] - mu[c]).T @ (z[y == c] - mu[c]) for c in range(3)) / len(z)
    found, new = fit_gaussians(z, y), torch.randn(7, 5)
    torch.testing.assert_close(found.mu, mu)
    torch.testing.assert_close(found.precision, covariance.inverse(), rtol=1e-3, atol=1e-4)
    by_hand = [min((x - m) @ covariance.inverse() @ (x - m) / 2 for m in mu) for x in new]
    torch.testing.assert_close(found.distance(new), torch.stack(by_hand), rtol=1e-3, atol=1e-3)


def test_a_direction_that_never_varies_does_not_count():
    z, y = features()
    dead = torch.cat([z, torch.full((300, 1), 0.25), z[:, :1] * 2], dim=1)
    new = torch.randn(7, 5)
    want = fit_gaussians(z, y).distance(new)
    torch.testing.assert_close(
        fit_gaussians(dead, y).distance(torch.cat([new, torch.ones(7, 1), new[:, :1] * 2], 1)),
        want,
        rtol=1e-3,
        atol=1e-3,
    )


def test_the_length_of_a_feature_is_nothing_once_it_is_one():
    z, y = features()
    found = fit_gaussians(F.normalize(z), y)
    new = torch.randn(7, 5)
    torch.testing.assert_close(
        found.distance(F.normalize(100 * new)),
        found.distance(F.normalize(new)),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize(("count", "size"), [(2, 3), (5, 40), (60, 20), (3000, 20), (30, 1)])
def test_shrinkage_is_scikit_learns(count, size):
    covariance = pytest.importorskip("sklearn.covariance")
    z = torch.randn(count, size).double() @ torch.randn(size, size).double()
    expected, _ = covariance.ledoit_wolf(z.numpy(), assume_centered=True)
    torch.testing.assert_close(ledoit_wolf(z), torch.from_numpy(expected))


def test_features_that_are_all_the_same_are_shrunk_to_nothing():
    assert torch.equal(ledoit_wolf(torch.zeros(5, 3).double()), torch.zeros(3, 3).double())
    found = fit_gaussians(torch.ones(5, 3), None, shrinkage=True)
    assert torch.equal(found.distance(torch.randn(4, 3)), torch.zeros(4))


def test_fewer_images_than_features_are_enough_with_shrinkage():
    z, y = features(60, 50)
    new = torch.cat([z[:5], 20 * torch.randn(5, 50)])
    far = fit_gaussians(z[5:], y[5:], shrinkage=True).distance(new)
    assert far[:5].max() < far[5:].min()


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("classes", [1, 3, 200])
def test_the_expanded_square_keeps_the_digits(classes, spread):
    mu = torch.randn(classes, 20) + 5
    z = mu[torch.arange(400) % classes] + spread * torch.randn(400, 20)
    new = torch.cat([z[:50] + spread * torch.randn(50, 20), torch.randn(50, 20)])
    found = fit_gaussians(z, torch.arange(400) % classes)
    wide = found.precision.double()
    differences = [new.double() - one.double() for one in found.mu]
    expected = torch.stack([(d @ wide * d).sum(1) / 2 for d in differences], 1).amin(1)
    torch.testing.assert_close(found.distance(new).double(), expected, rtol=1e-4, atol=1e-6)


def test_gaussians_are_what_they_are_made_of():
    z, y = features()
    found, new = fit_gaussians(z, y), torch.randn(7, 5)
    again = Gaussians(found.mu, found.precision)
    assert torch.equal(again.distance(new), found.distance(new))


def test_a_class_without_an_image_has_no_gaussian():
    z, y = features()
    gap = torch.where(y == 1, 7, y)
    assert fit_gaussians(z, gap).mu.shape == (3, 5)
    new = torch.randn(7, 5)
    torch.testing.assert_close(
        fit_gaussians(z, gap).distance(new), fit_gaussians(z, y).distance(new)
    )


@pytest.mark.parametrize("labels", [None, torch.arange(40), torch.arange(40) // 2 * 3])
def test_one_gaussian_where_a_class_has_fewer_than_two_images(labels):
    z = torch.randn(40, 5)
    found = fit_gaussians(z, labels)
    assert len(found.mu) == (20 if labels is not None and labels[1] == 0 else 1)
    if len(found.mu) == 1:
        torch.testing.assert_close(found.mu[0], z.mean(0))


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"shape \(N, F\)"),
        (torch.zeros(0, 4), torch.zeros(0).long(), r"shape \(N, F\)"),
        (torch.full((2, 3), float("inf")), torch.zeros(2).long(), "finite features"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), r"labels in \[0, 1\)"),
        (torch.zeros(2, 3), torch.zeros(3).long(), "labels of shape"),
        (torch.zeros(2, 3), torch.zeros(2), "integer labels"),
    ],
)
def test_features_and_labels_of_the_wrong_kind_are_refused(z, y, message):
    with pytest.raises(ValueError, match=message):
        fit_gaussians(z, y)
