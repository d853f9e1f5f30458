"""Bars in a terminal, lines elsewhere."""

import re
import sys

import pytest
from conftest import FEW, TINY, make_batches, make_small

from tie_ext import TIETrainer
from tie_ext.outliers import Inversion
from tie_ext.utils.progress import Progress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("asked", [{}, {"progress": False}, {"progress": True}])
def test_progress_of_the_stages_of_an_epoch(asked, terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("tie_ext.utils.progress.SECONDS", 0.0)
    net = make_small()
    trainer = TIETrainer(net, TINY, [Inversion(net, FEW)], **asked)
    for _ in range(2):
        trainer.epoch(make_batches())
    shown = capsys.readouterr().err
    stages = [f"epoch {t}: {s}:" for t in (1, 2) for s in ("train", "invert", "tau", "exclude")]
    assert [stage in shown for stage in stages] == [asked.get("progress", False)] * 8
    assert not re.search("epoch [03]", shown)
    # Bars that are done do not stay; lines do.
    assert ("\n" in shown) == (bool(shown) and not terminal)
    assert ("\r" in shown) == (bool(shown) and terminal)
    if shown and not terminal:
        assert re.search(r"^epoch 1: train: 16/16 \[.* images/s, loss \d", shown, re.MULTILINE)


def test_seconds_between_lines_of_progress(capsys, monkeypatch):
    now = [1000.0]
    for clock in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, lambda: now[0])
    monkeypatch.setattr(Progress, "last", now[0])
    for stage in "abc":  # of 8 seconds each
        for _ in Progress(range(4), stage):
            now[0] += 2
    assert [line[0] for line in capsys.readouterr().err.splitlines()] == ["b", "c"]
