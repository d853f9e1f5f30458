"""Provenance of a record: the command, without places of one machine, and memory."""

import sys

import pytest

from tie_ext.cli import main as cli
from tie_ext.utils.provenance import peak_memory, provenance


@pytest.mark.parametrize(
    ("program", "name"),
    [(cli.__file__, "tie-ext"), ("/usr/bin/tie-ext", "tie-ext"), ("elsewhere/cli.py", "cli.py")],
)
def test_a_command_that_can_be_typed(monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program, "reproduce", "--seeds", "0"])
    assert provenance()["command"] == f"{name} reproduce --seeds 0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--root", "/home/me/data/"], "--root DATA/"),
        (["--root=/home/me/data/mnist"], "--root=DATA/mnist"),
        (["/home/me/data2", "/home/me"], "/home/me/data2 /home/me"),
        (["--heads", "head, two words"], "--heads 'head, two words'"),
    ],
)
@pytest.mark.parametrize("place", ["/home/me/data", "/home/me/data/"])
def test_places_of_one_machine(monkeypatch, place, words, said):
    monkeypatch.setattr(sys, "argv", ["attached.py", *words])
    assert provenance(places={"DATA": place})["command"] == f"attached.py {said}"


def test_peak_memory_where_the_system_knows_it(monkeypatch):
    assert peak_memory() > 10
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() is None
