"""The command line around its commands: errors, exit codes, and what is logged."""

import errno
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batches

from cli.conftest import run, stop
from tie_ext.cli import main as cli
from tie_ext.utils.loader import BatchReader


@pytest.fixture
def command(monkeypatch):
    """Makes a function the work of a command."""

    def replace(work, name="report"):
        monkeypatch.setitem(cli.COMMANDS, name, "tests_report")
        monkeypatch.setitem(sys.modules, "tests_report", SimpleNamespace(run=work))

    return replace


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space", "a.png"), "[Errno 28] No space: 'a.png'"),
        (OSError(errno.ENOSPC, "Expected to write 3 bytes"), "Expected to write 3 bytes"),
        (ModuleNotFoundError("No module named 'PIL'"), "No module named 'PIL'; pip install 'tie"),
        (ValueError("Expected a, but got b"), "Expected a, but got b"),
    ],
    ids=["file", "own words", "module", "value"],
)
def test_errors_in_one_line(command, capsys, error, said):
    def work(flags):
        raise error

    command(work)
    assert run("report", "x") == 1
    said_so = capsys.readouterr().err
    assert said_so.startswith(f"tie-ext: {said}")
    assert said_so.count("\n") == 1


def test_a_closed_pipe_is_no_error(command, capfd, monkeypatch):
    def work(flags):
        raise BrokenPipeError

    command(work)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    assert run("report", "x") == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["report", "x"], "stopped\n"),
        (["train", "--resume", "runs/x"], "continue with: tie-ext train --resume runs/x\n"),
        (["reproduce"], "finished cells and epochs are kept, continue with the same command\n"),
    ],
)
def test_hints_of_what_was_stopped(words, hint, command, capsys):
    command(stop, words[0])
    assert run(*words) == 130
    assert capsys.readouterr().err.endswith(hint)


def test_left_out_labels_are_shown_once(command, capsys):
    batches = [(x, torch.where(y == 2, -1, y)) for x, y in make_batches()]

    def work(flags):
        for name in ("one", "one", "two"):
            list(BatchReader(batches, id_only=True, name=name))

    command(work)
    for _ in range(2):
        assert run("report", "x") == 0
        count = sum(int((y < 0).sum()) for _, y in batches)
        said = f": left out {count} images with labels < 0, as OOD\n"
        assert count
        assert capsys.readouterr().err == f"one{said}two{said}"
