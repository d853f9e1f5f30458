"""KNN on a sample of the training images, beside pytorch-ood's KNN."""

import pickle

import pytest
import pytorch_ood.detector as theirs
import torch
from torch.nn.functional import normalize

from hosts.pytorch_ood.conftest import N
from tie_ext.pytorch_ood import SampledKNN
from tie_ext.pytorch_ood.members import MEMBERS
from tie_ext.scores.knn import knn_score, pairwise_distances


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4])
def test_distances_of_features_close_together(spread):
    z = normalize(torch.randn(3, 64)[torch.arange(200) % 3] + spread * torch.randn(200, 64))
    a, b = z[:40], z[40:]
    expected = (a.double()[:, None] - b.double()).norm(dim=2)
    torch.testing.assert_close(pairwise_distances(a, b).double(), expected, rtol=1e-5, atol=0)
    expected = expected.sort(dim=1).values[:, 4]
    torch.testing.assert_close(knn_score(3 * a, b, 5).double(), expected, rtol=1e-3, atol=1e-7)


def test_scores_are_their_knn_on_kept_features():
    z, y = torch.randn(300, 6) * torch.rand(300, 1) * 5, torch.arange(300) % N
    new = torch.cat([torch.randn(50, 6), torch.zeros(1, 6)])

    def ours(max_samples: int, z=z, y=y) -> SampledKNN:
        return SampledKNN(None, 7, max_samples).fit_features(z, y)

    every, some = ours(400), ours(100)
    assert some.sample.shape == (100, 6)
    assert {*map(tuple, some.sample.tolist())} < {*map(tuple, every.sample.tolist())}
    for fitted, of in ((every, z), (some, some.sample)):
        expected = theirs.KNN(None, k=7).fit_features(of, torch.zeros(len(of)))
        torch.testing.assert_close(
            fitted.predict_features(new).double(),
            expected.predict_features(new),
            rtol=1e-4,
            atol=1e-4,
        )
    assert torch.equal(ours(100).sample, some.sample)
    known = ours(400, z, torch.where(torch.arange(300) < 200, 1, -1))
    assert torch.equal(known.sample, ours(400, z[:200], y[:200]).sample)


def test_errors_of_bad_features():
    z, y = torch.randn(20, 4), torch.zeros(20)
    with pytest.raises(ValueError, match="Expected ID samples, but got none"):
        SampledKNN(None).fit_features(z, y - 1)
    with pytest.raises(ValueError, match=r"Expected finite .* features of shape \(N, F\)"):
        SampledKNN(None, 2).fit_features(z * torch.nan, y)
    with pytest.raises(ValueError, match="Expected max_samples"):
        SampledKNN(None, 50, 20)


def test_farthest_neighbour_of_fewer_than_k():
    z = torch.randn(20, 4)
    fitted = SampledKNN(None, 20, 20).fit_features(z)
    farthest = fitted.predict_features(z)
    for k in SampledKNN.hyperparameter_space["k"]:
        assert torch.equal(fitted.set_hyperparameters(k=k).predict_features(z), farthest)


def test_a_sample_that_is_prepared_once():
    z = torch.randn(40, 8)
    fitted = SampledKNN(None, 5).fit_features(z)
    ready = fitted.prepared()
    assert fitted.prepared() is ready
    score = MEMBERS[SampledKNN].exported(fitted)
    fitted.sample = fitted.sample.clone()  # as a move to another device does
    assert fitted.prepared() is not ready
    torch.testing.assert_close(score(z), fitted.predict_features(z))
    assert "_ready" not in pickle.loads(pickle.dumps(fitted)).__dict__


def test_neighbours_of_features_in_half_precision():
    sample = normalize(torch.randn(30, 8))
    z = torch.randn(50, 8).bfloat16()
    found = knn_score(z, sample, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, knn_score(z.float(), sample, 3))
