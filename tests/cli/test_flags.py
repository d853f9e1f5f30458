"""Flags: their help, their completion, and those that argparse refuses."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli.conftest import run
from tie_ext import __version__
from tie_ext.cli.flags import make_parser
from tie_ext.cli.main import COMMANDS
from tie_ext.cli.reproduce import comparison


def help_of(*words, capsys) -> str:
    with pytest.raises(SystemExit):
        run(*words, "--help")
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_two_screens_on_every_flag(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(command, capsys=capsys).splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 80
    assert not any(word in line for line in lines for word in ("docs/", "the paper:", "et al"))
    choices = (action.choices for action in make_parser()._actions)
    (parser,) = (of[command] for of in choices if isinstance(of, dict))
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_help_of_settings(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # argparse breaks lines at hyphens
    said = " ".join(help_of(command, capsys=capsys).split())
    assert "--garbage-weight X weight of the garbage class in the loss" in said
    assert "-inf excludes every candidate (--lam=-inf) (default: 2.0)" in said
    assert "`" not in said


def test_help_of_every_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    said = help_of("reproduce", capsys=capsys)
    listed = re.search(r"  --methods .*?default", said, re.S).group()
    assert not [method for method in comparison.LABELS if not re.search(rf"\b{method}\b", listed)]


def test_examples_and_version(capsys):
    examples = [line.split() for line in help_of(capsys=capsys).splitlines()[-3:]]
    parsed = [make_parser().parse_args(words[1:]).name for words in examples]
    assert parsed == ["demo", "attach", "score"]
    with pytest.raises(SystemExit):
        run("--version")
    assert capsys.readouterr().out == f"tie_ext {__version__}\n"


@pytest.mark.slow
def test_completion_by_the_words_of_the_page():
    pytest.importorskip("shtab")
    page = (Path(__file__).parents[2] / "docs/how-to/command-line.md").read_text()
    (command,) = re.findall(r"&& shtab (.*) >", page)
    words = [sys.executable, "-m", "shtab", *shlex.split(command)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "complete -o bashdefault" in said
    assert all(word in said for word in ("reproduce", "--false-alarm", "--synthesizer"))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "magic",
        "train --epochs many",
        "report",
        "score run",
        "score run x --no",
        "score run x --batch-size 0",
        "score run x --workers -1",
        "demo --seed -1",
        "explain run --steps 0",
        "calibrate run x --guarantee all",
    ],
)
def test_words_that_argparse_refuses(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*words.split())
    assert stopped.value.code == 2
    assert "usage: tie-ext" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods tie magic", "Expected a method, one of tie, "),
        ("--data mnist imagenette", "Expected a data set, one of mnist, "),
        ("--seeds 0 -1", "Expected seeds to be an integer in [0, "),
        ("--device abacus", "Expected --device to be one that torch has here"),
    ],
)
def test_wrong_flags_of_reproduce(words, message, tmp_path, capsys):
    assert run("reproduce", "--out", tmp_path / "new", *words.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
