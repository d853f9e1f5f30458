"""The generator at every size."""

import pytest
import torch
from conftest import close, refused
from torch import nn

from tie_ext.models.generator import Generator


def given():
    return torch.randn(2, 64), torch.rand(2, 11).softmax(1)


@pytest.mark.parametrize("size", [28, 29, 32, 57, 64, 96, 113, 128, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_size_range_and_stages_of_generated_images(size, channels):
    generator = Generator((channels, size, size), 11, width=2, low=-2.0, high=3.0)
    x = generator(*given())
    assert x.shape == (2, channels, size, size)
    assert -2 <= x.min() < x.max() <= 3
    assert 4 <= sum(isinstance(m, nn.ConvTranspose2d) for m in generator.modules()) <= 6


@pytest.mark.parametrize("shape", [(3, 28, 45), (1, 64, 20), (1, 3, 33)])
def test_middle_of_squares_as_images_of_other_shapes(shape):
    side, (_, H, W), inputs = max(shape), shape, given()
    square = Generator((shape[0], side, side), 11, width=2).eval()
    generator = Generator(shape, 11, width=2).eval()
    generator.load_state_dict(square.state_dict())
    top, left = (side - H) // 2, (side - W) // 2
    middle = square(*inputs)[..., top : top + H, left : left + W]
    close(generator(*inputs), middle)


@pytest.mark.parametrize("shape", [(1, 27, 27), (1, 225, 225), (2, 32, 32), (1, 20, 27), (28, 28)])
def test_shapes_that_no_generator_makes(shape):
    with refused("Expected an image shape"):
        Generator(shape, 11)
