"""Settings of the loop: their ranges and types."""

import math

import numpy as np
import pytest
from conftest import refused

from tie_ext import TIEConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("epochs", "3"),
        ("epochs", np.int64(0)),
        ("lr", 0.0),
        ("lr", math.nan),
        ("pool_size", 0),
        ("candidates", -1),
        ("garbage_weight", 0),
        ("adversarial_steps", -1),
        ("autocast_dtype", "float16"),
        ("seed", -1),
        ("lam", math.nan),
    ],
)
def test_settings_that_are_out_of_range(name, value):
    with refused(f"Expected {name} to be .*, but got"):
        TIEConfig(**{name: value})


def test_numbers_of_numpy_as_settings():
    config = TIEConfig(epochs=np.int64(3), lr=np.float32(0.5), seed=np.uint8(4))
    assert (config.epochs, config.lr, config.seed) == (3, 0.5, 4)
    assert {type(value) for value in (config.epochs, config.seed)} == {int}
