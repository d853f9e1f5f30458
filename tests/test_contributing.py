"""The outlier method that CONTRIBUTING.md writes keeps the law book, once it is registered as it
says.
"""

import inspect
import re
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, TINY, domain, make_batches, make_net

from tie_ext import TIETrainer
from tie_ext.outliers import SYNTHESIZERS, make
from tie_ext.outliers.base import Synthesizer
from tie_ext.training.recipe import Recipe

sys.path.append(str(Path(__file__).parent / "outliers"))
import test_synthesis as book

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
LAWS = [
    law
    for name, law in vars(book).items()
    if name.startswith("test_") and "make" in inspect.signature(law).parameters
]


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The page's file as a module, registered by the page's own words."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    ((name, entry),) = re.findall(r'`"(\w+)": (\(.*?\(\)\))`', PAGE)
    path = tmp_path / f"{name}.py"
    path.write_text(code)
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(SYNTHESIZERS, name, eval(entry, vars(module)))
    return module


def test_there_is_a_law_book():
    assert len(LAWS) >= 4


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_example_keeps_the_law(law, room):
    given = {"make": partial(make, room.__name__, domain()), "net": make_net()}
    law(**{name: given[name] for name in inspect.signature(law).parameters})


def test_the_example_does_what_it_says(room):
    x, y = torch.rand(6, *SHAPE), torch.arange(6) % 3
    chimeras = make(room.__name__, domain(), cut=0.25).sample(make_net(), x, y)
    assert torch.equal(chimeras.x[:, :, :7], x[:, :, :7])
    bottoms = chimeras.x[:, :, 7:].unsqueeze(1) == x[:, :, 7:].unsqueeze(0)
    assert torch.equal(
        bottoms.flatten(2).all(2).sum(0), torch.ones(6, dtype=torch.long)
    )  # of each image once
    assert (chimeras.y == 3).all()
    with pytest.raises(ValueError, match="cut"):
        make(room.__name__, domain(), cut=2)


def test_the_example_trains(room):
    (found,) = [
        thing
        for thing in vars(room).values()
        if inspect.isclass(thing) and issubclass(thing, Synthesizer) and thing is not Synthesizer
    ]
    net = make_net()
    for trainer in (
        TIETrainer(net, TINY, synthesizers=[found(net)]),
        Recipe(TINY, {room.__name__: {}}).trainer(net),
    ):
        assert sum(trainer.epoch(make_batches()).proposed) > 0
