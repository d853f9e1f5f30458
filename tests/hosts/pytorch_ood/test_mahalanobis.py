"""Mahalanobis++, beside pytorch-ood's Mahalanobis."""

import pytest
import pytorch_ood.detector as theirs
import torch
from torch.nn.functional import normalize

from hosts.pytorch_ood.conftest import N
from tie_ext.pytorch_ood import MahalanobisPlusPlus
from tie_ext.scores.mahalanobis import fit_gaussians


def test_gaussians_of_unit_features_with_shrinkage():
    z, new = torch.randn(600, 6) * torch.rand(600, 1) * 5, torch.randn(50, 6)
    y = torch.arange(600) % N
    z[:, 0] += 2 * y
    ours = MahalanobisPlusPlus(None).fit_features(z, y)
    want = fit_gaussians(normalize(z), y, shrinkage=True).distance(normalize(new))
    torch.testing.assert_close(ours.predict_features(new), want)
    torch.testing.assert_close(ours.predict_features(100 * new), want, rtol=1e-3, atol=1e-3)
    # Of many images little is shrunk; their covariance is a sum over the images.
    z, y = z.repeat(50, 1) + 0.1 * torch.randn(30000, 6), y.repeat(50)
    again = ours.fit_features(z, y).predict_features(new)
    by_hand = theirs.Mahalanobis(None).fit_features(normalize(z), y)
    torch.testing.assert_close(
        again, 30000 * by_hand.predict_features(normalize(new)), rtol=1e-2, atol=1e-2
    )
    assert ours.to("meta").predict_features(new.to("meta")).is_meta
    with pytest.raises(ValueError, match="labels in"):
        MahalanobisPlusPlus(None).fit_features(z[:2], torch.tensor([0, -1]))
