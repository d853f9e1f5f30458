"""The command line around its commands: errors of the standard output, and what is logged."""

import errno
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batches, make_net

from tie_ext.cli import main as cli
from tie_ext.utils.loader import BatchReader


@pytest.fixture
def command(monkeypatch):
    """Makes a function the command ``report``."""

    def replace(run):
        monkeypatch.setitem(cli.COMMANDS, "report", "tests_report")
        monkeypatch.setitem(sys.modules, "tests_report", SimpleNamespace(run=run))

    return replace


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space"),
            "Expected to write to the standard output, but got: No",
        ),
        (OSError(errno.EPIPE, "Broken pipe"), "Expected to write to the standard output, but got"),
        (OSError(errno.ENOSPC, "No space", "a.png"), "[Errno 28] No space: 'a.png'"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied"),
        (
            OSError(errno.ENOSPC, "Expected to write 3 bytes to x"),
            "Expected to write 3 bytes to x",
        ),
    ],
    ids=["full disk", "closed pipe", "full disk of a file", "no stream", "own words"],
)
def test_errors_of_the_standard_output(command, capsys, error, said):
    def run(flags):
        raise error

    command(run)
    assert cli.main(["report", "x"]) == 1
    assert capsys.readouterr().err.startswith(f"tie-ext: {said}")


def test_left_out_labels_are_shown_once(command, capsys):
    batches = [(x, torch.where(y == 2, -1, y)) for x, y in make_batches()]

    def run(flags):
        for name in ("one", "one", "two"):
            list(BatchReader(batches, id_only=True, name=name))

    command(run)
    for _ in range(2):
        assert cli.main(["report", "x"]) == 0
        count = sum(int((y < 0).sum()) for _, y in batches)
        said = f": left out {count} images with labels < 0, as OOD\n"
        assert count
        assert capsys.readouterr().err == f"one{said}two{said}"


def test_a_detector_is_preferred_to_an_older_one_below(tmp_path):
    pytest.importorskip("pytorch_ood")
    from tie_ext.cli.folder import load_decision
    from tie_ext.pytorch_ood import TIEDetector

    for folder, threshold in ((tmp_path, 1.0), (tmp_path / "combined", 2.0)):
        detector = TIEDetector(make_net().eval())
        detector.threshold = torch.tensor(threshold)
        detector.save(folder)
    for place, expected in ((tmp_path, 1.0), (tmp_path / "combined", 2.0)):
        assert load_decision(place)[1].__self__.threshold == expected
    (tmp_path / "detector.json").unlink()
    assert load_decision(tmp_path)[1].__self__.threshold == 2.0
