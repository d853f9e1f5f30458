"""A method by the names of its parts, and its record."""

import json
import math
from dataclasses import replace

import pytest
from conftest import TINY, make_net, refused

from tie_ext.training.recipe import Recipe, names


@pytest.mark.parametrize("word", ["", "inversions", "inversion,", "boundary, shuffle"])
def test_names_of_parts_that_there_are_not(word):
    with refused("Expected a synthesizer, one of inversion, boundary"):
        Recipe(TINY, {name: {} for name in names(word)})
    with refused("Expected a prior, one of white, multiscale"):
        Recipe(TINY, prior=names(word))


def test_record_of_a_recipe_and_of_others():
    recipe = Recipe(
        replace(TINY, lam=-math.inf),
        {"boundary": {"beta": (0.2, 0.5)}, "white": {}},
        ("white", "multiscale"),
        "uniform",
    )
    again = Recipe.of_record(json.loads(json.dumps(recipe.record())))
    assert again.record() == recipe.record()
    assert again.config == recipe.config
    assert again.trainer(make_net()).synthesizers[0].settings.beta == (0.2, 0.5)
    with refused(r"Expected settings among .*, but got code_margin"):
        Recipe.of_record({**recipe.record(), "config": {"code_margin": 0.5}})
    with refused("Expected settings of white among kind, but got steps"):
        Recipe(TINY, {"white": {"steps": 3}}).trainer(make_net())
