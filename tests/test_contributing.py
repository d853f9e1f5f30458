"""The outlier method that CONTRIBUTING.md writes keeps the law book, once it is registered as it
says.
"""

import inspect
import re
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, TINY, domain, make_batches, make_small, refused
from outliers import test_synthesizers as book

from tie_ext import TIETrainer
from tie_ext.outliers import SYNTHESIZERS, make
from tie_ext.outliers.base import Synthesizer
from tie_ext.training.recipe import Recipe

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
LAWS = {
    name: law
    for name, law in vars(book).items()
    if name.startswith("test_") and "make" in inspect.signature(law).parameters
}


@pytest.fixture
def example(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("law", LAWS)
def test_law_book_and_the_example_of_the_page(law, example):
    assert len(LAWS) >= 3
    given = {"make": partial(make, example.__name__, domain()), "net": make_small()}
    given["dtype"] = torch.float64
    LAWS[law](**{name: given[name] for name in inspect.signature(LAWS[law]).parameters})


def test_images_and_training_of_the_example(example):
    x, y = torch.rand(6, *SHAPE), torch.arange(6) % 3
    chimeras = make(example.__name__, domain(), cut=0.25).sample(make_small(), x, y)
    assert torch.equal(chimeras.x[:, :, :7], x[:, :, :7])
    bottoms = (chimeras.x[:, None, :, 7:] == x[None, :, :, 7:]).flatten(2).all(2)
    assert torch.equal(bottoms.sum(0), torch.ones(6).long())  # of each image once
    assert (chimeras.y == 3).all()
    with refused("cut"):
        make(example.__name__, domain(), cut=2)
    (kind,) = SYNTHESIZERS[example.__name__][:1]
    assert issubclass(kind, Synthesizer)
    net = make_small()
    for trainer in (
        TIETrainer(net, TINY, synthesizers=[kind(net)]),
        Recipe(TINY, {example.__name__: {}}).trainer(net),
    ):
        assert sum(trainer.epoch(make_batches()).proposed) > 0
