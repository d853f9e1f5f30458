"""fDBD of many classes, beside pytorch-ood's."""

import pytest
import pytorch_ood.detector as theirs
import torch
from torch import nn

from tie_ext.pytorch_ood import BoundaryDistance


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [2, 7, 300])
def test_boundary_distance_is_their_fdbd(classes, bias):
    layer, z, new = nn.Linear(12, classes), torch.randn(60, 12), 3 * torch.randn(40, 12)
    ours = BoundaryDistance(None, layer.weight, layer.bias if bias else None).fit_features(z)
    if not bias:
        layer.bias.data.zero_()
    expected = theirs.fDBD(None, layer).fit_features(z).predict_features(new)
    torch.testing.assert_close(ours.predict_features(new), expected, rtol=1e-4, atol=1e-5)


def test_equal_weights_and_the_mean_itself():
    w, z = torch.randn(3, 4)[[0, 1, 2, 0]], torch.randn(20, 4)
    ours = BoundaryDistance(None, w, torch.randn(4)).fit_features(z)
    assert ours.predict_features(torch.cat([z, z.mean(0, keepdim=True)])).isfinite().all()
