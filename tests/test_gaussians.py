"""One Gaussian a class: against its definition, where a direction never varies, and what is
refused.
"""

import pytest
import torch
import torch.nn.functional as F

from tie_ext.scores.mahalanobis import fit_gaussians


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


@pytest.mark.parametrize(
    ("z", "y", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"shape \(N, F\)"),
        (torch.zeros(0, 4), torch.zeros(0).long(), r"shape \(N, F\)"),
        (torch.full((2, 3), float("inf")), torch.zeros(2).long(), "finite features"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), r"labels in \[0, 1\)"),
        (
            torch.zeros(2, 3),
            torch.tensor([0, 2]),
            r"every class in \[0, 3\), but got none of class 1",
        ),
        (torch.zeros(2, 3), torch.zeros(3).long(), "labels of shape"),
        (torch.zeros(2, 3), torch.zeros(2), "integer labels"),
    ],
)
def test_features_and_labels_of_the_wrong_kind_are_refused(z, y, message):
    with pytest.raises(ValueError, match=message):
        fit_gaussians(z, y)
