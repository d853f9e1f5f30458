"""Checks of numbers and shapes."""

import pytest

from tie_ext.training.pool import GarbagePool
from tie_ext.utils.checks import MAX_VALUES, check_number, check_shape

SHAPES = [(1, 28), (1, 28, 28, 28), (1, 0, 28), (1, 28, True), "abc", 3, (1, MAX_VALUES, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_shapes_of_no_image(shape):
    with pytest.raises(ValueError, match="Expected"):
        check_shape(shape)


@pytest.mark.parametrize("number", [10**400, float("nan"), -1, True, "1"])
def test_error_of_numbers_out_of_range(number):
    with pytest.raises(ValueError, match="Expected t to be a number in"):
        check_number("t", number, 0, 1e300)


def test_error_of_a_pool_beyond_memory():
    with pytest.raises(ValueError, match="fits into memory, but got pool_size 1000000000"):
        GarbagePool(10**9, (3, 2000, 2000))
