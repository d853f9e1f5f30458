"""Noise: its spectrum, its contrast, and images that are not square."""

import pytest
from conftest import domain

from tie_ext.outliers import Noise, NoiseSettings


@pytest.mark.parametrize(("kind", "low", "high"), [("white", -0.05, 0.05), ("multiscale", 0.4, 1)])
def test_correlation_of_neighbouring_pixels(kind, low, high):
    x = Noise(domain(), NoiseSettings(kind)).draw((200, 1, 28, 28))
    x = x - x.mean((2, 3), keepdim=True)
    assert low < (x[..., 1:] * x[..., :-1]).mean() / x.square().mean() < high


def test_contrast_from_flat_to_black_and_white():
    x = Noise(domain(low=-1.0, high=2.0)).draw((500, 1, 28, 28))
    black, white = x == -1, x == 2
    at_an_end = (black | white).double().mean((1, 2, 3))
    both = black.flatten(1).any(1) & white.flatten(1).any(1)
    assert ((at_an_end > 0.8) & both).double().mean() > 0.1  # shapes
    assert (x.std((1, 2, 3)) < 0.3).double().mean() > 0.1  # nearly flat


def test_no_doubled_lines_in_noise_that_is_not_square():
    x = Noise(domain()).draw((60, 1, 30, 47))
    x = x[((x > 0.02) & (x < 0.98)).double().mean((1, 2, 3)) > 0.9]  # not clipped to shapes
    for dim, others in ((3, (0, 1, 2)), (2, (0, 1, 3))):
        steps = x.diff(dim=dim).abs()
        assert steps.mean(others).min() > 0.2 * steps.mean()
