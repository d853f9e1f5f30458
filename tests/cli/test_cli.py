"""The command line as a user types it, on small images written for the test."""

import csv
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_net, set_head_defaults

from tie_ext import TIEDetector, TIENet, TIETrainer, __version__
from tie_ext.cli import data, explain, figures, registry, report, tables
from tie_ext.cli.flags import make_parser
from tie_ext.cli.folder import load_network, written
from tie_ext.cli.images import ImageFiles, ImageSet, RunImages
from tie_ext.cli.main import main
from tie_ext.cli.reproduce import comparison
from tie_ext.cli.snapshots import load_examples, save_examples
from tie_ext.scores.decision import Decision
from tie_ext.scores.threshold import conformal_threshold
from tie_ext.training.log import EpochLog
from tie_ext.utils.files import load_state

Image = pytest.importorskip("PIL.Image")
FAST = [
    "--epochs",
    "3",
    "--candidates",
    "55",
    "--pool-size",
    "40",
    "--inversion-steps",
    "2",
    "--inversion-width",
    "4",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, dark and bright, in train and test."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for label, low in (("dark", 0), ("bright", 128)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 128, (40, 36, 3), dtype=np.uint8)).save(
                    root / split / label / f"{i}.png"
                )
    return root


def train(folder, out, *more):
    return [
        "train",
        "--data",
        f"folder:{folder}",
        "--size",
        "28",
        "--out",
        str(out),
        "--backbone",
        "conv3",
        *FAST,
        *more,
    ]


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(train(folder, out)) == 0
    return out


def test_train_leaves_a_run_that_says_what_it_did(run):
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["recipe"]["config"]["epochs"] == 3
    assert len(record["log"]) == 3
    assert {"accuracy", "scores", "garbage_rate"} <= set(record["numbers"])
    assert {"command", "commit", "versions", "processor", "threads"} <= set(record)


@pytest.mark.slow
def test_the_shift_is_a_setting_of_the_run(run, folder, tmp_path):
    assert main(train(folder, tmp_path / "still", "--shift", "0")) == 0
    records = [json.loads((path / "run.json").read_text()) for path in (run, tmp_path / "still")]
    assert [record["settings"]["shift"] for record in records] == [None, 0]
    assert records[0]["log"][0]["losses"] != records[1]["log"][0]["losses"]


@pytest.mark.parametrize("how", ["csv", "jsonl"])
def test_score_gives_one_row_an_image(run, folder, capsys, how):
    images = [str(folder / "test" / "dark" / f"{i}.png") for i in range(3)]
    assert main(["score", str(run), *images, "--format", how]) == 0
    out = capsys.readouterr().out
    rows = (
        list(csv.DictReader(out.splitlines()))
        if how == "csv"
        else [json.loads(line) for line in out.splitlines()]
    )
    assert [row["image"] for row in rows] == images
    assert all(
        (row["label"] in ("bright", "dark")) == (row["level"] == "accepted") for row in rows
    )
    assert all(
        row["level"] in ("accepted", "garbage", "uncertain")
        and 0 <= float(row["uncertainty"]) <= 1
        and float(row["score"])
        for row in rows
    )


def test_score_by_a_threshold_rejects_no_more_test_images_than_asked(run, folder, capsys):
    images = [
        str(folder / "test" / label / f"{i}.png") for label in ("dark", "bright") for i in range(6)
    ]
    for rate, most in ((0.25, 3), (0.5, 6)):
        assert main(["score", str(run), "--false-alarm", str(rate), *images]) == 0
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        kept = [float(row["score"]) for row in rows if row["level"] == "accepted"]
        rejected = [float(row["score"]) for row in rows if row["level"] != "accepted"]
        assert len(rejected) in (
            most - 1,
            most,
        )  # the run scored these very images: one is the threshold, give or take its last bit
        assert max(kept) < min(rejected)


def rows_of(text):
    return list(csv.DictReader(text.splitlines()))


def test_score_goes_through_folders_and_says_the_same_as_of_each_file(
    run, folder, tmp_path, capsys
):
    files = [
        str(folder / split / label / f"{i}.png")
        for split in ("test", "train")
        for label in ("bright", "dark")
        for i in sorted(range(6), key=str)
    ]
    deep = tmp_path / "images"
    for i, file in enumerate(files * 8):  # more than this process decodes by itself
        (deep / f"{i % 3}" / "below").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, deep / f"{i % 3}" / "below" / f"{i:03d}.png")
    (deep / "notes.txt").write_text("no image")
    assert (
        main(["score", str(run), str(deep), "--every-label", "--out", str(tmp_path / "rows.csv")])
        == 0
    )
    assert capsys.readouterr().out == ""
    rows = rows_of((tmp_path / "rows.csv").read_text())
    assert [row["image"] for row in rows] == sorted(str(file) for file in deep.rglob("*.png"))
    assert main(["score", str(run), "--every-label", *files]) == 0
    alone = {row["image"]: row for row in rows_of(capsys.readouterr().out)}
    for row in rows:
        of = alone[files[int(Path(row["image"]).stem) % len(files)]]
        assert (row["label"], row["level"]) == (of["label"], of["level"])
        assert float(row["score"]) == pytest.approx(float(of["score"]), abs=1e-3)


def test_an_image_is_named_where_it_is_believed_unless_asked(run, folder, tmp_path, capsys):
    Image.effect_noise((28, 28), 200).save(tmp_path / "noise.png")
    for more, named in (([], False), (["--every-label"], True)):
        assert (
            main(
                [
                    "score",
                    str(run),
                    "--false-alarm",
                    "0.9",
                    str(folder / "test"),
                    str(tmp_path / "noise.png"),
                    *more,
                ]
            )
            == 0
        )
        rows = rows_of(capsys.readouterr().out)
        assert {row["level"] for row in rows} > {"accepted"}
        assert all((row["label"] != "") == (named or row["level"] == "accepted") for row in rows)


def test_a_file_that_is_no_image_loses_no_other_row(run, folder, tmp_path, capsys):
    shutil.copytree(folder / "test", tmp_path / "images")
    for name in ("0.png", "3.png"):
        (tmp_path / "images" / "dark" / name).write_bytes(b"no image")
    for how in ("csv", "jsonl"):
        assert main(["score", str(run), str(tmp_path / "images"), "--format", how]) == 1
        said = capsys.readouterr()
        rows = (
            rows_of(said.out)
            if how == "csv"
            else [json.loads(line) for line in said.out.splitlines()]
        )
        assert len(rows) == 12
        broken = [row for row in rows if row["level"] == "unreadable"]
        assert [Path(row["image"]).name for row in broken] == ["0.png", "3.png"]
        assert all(not row[name] for row in broken for name in ("label", "uncertainty", "score"))
        assert "0.png, but got: " in said.err
        assert "1 more are unreadable too" in said.err
        assert said.err.count("\n") == 1


def test_a_path_with_nothing_there_is_told_before_any_row(run, folder, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("of before")
    assert (
        main(
            [
                "score",
                str(run),
                str(folder / "test"),
                str(tmp_path / "typo"),
                "--out",
                str(tmp_path / "rows.csv"),
            ]
        )
        == 1
    )
    assert "typo, or a folder of them, but there is nothing" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text() == "of before"


@pytest.mark.slow
def test_report_is_one_page_that_needs_nothing_else(run, capsys):
    assert (run / ".lock").exists()  # which a report passes over
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("<figure>") == 6
    assert page.count('<ul class="gallery">') == 2
    assert "http" not in page.replace("http-equiv", "")
    assert "AUROC" in page
    assert "ID rejected" in page
    assert {"inversions.png", "metrics.png", "features.png", "curves_TIE.png"} <= {
        p.name for p in (run / "figures").iterdir()
    }
    assert {path for path in run.rglob("*") if path.is_file()} - {run / ".lock"} == set(
        written(run)
    )


def test_report_shows_accepted_and_rejected_images():
    level, label = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 1])
    decision = Decision(label, torch.zeros(4), torch.tensor([-3.0, 7.5, 1.0, -2.0]), level)
    x = torch.zeros(4, 1, 28, 28, dtype=torch.uint8)
    said = {
        name: [shown[1:] for shown in report._shown(x, decision, name, ["cat", "dog"])]
        for name in ("id", "letters")
    }
    captions = ["accepted, cat, -3.0", "accepted, dog, -2.0", "garbage, dog, 7.5"]
    captions.append("uncertain, cat, 1.0")
    assert said["id"] == list(zip(captions, [False, False, True, True], strict=True))
    assert said["letters"] == list(zip(captions, [True, True, False, False], strict=True))


@pytest.mark.parametrize(("accepted", "shown"), [(24, 10), (3, 3), (0, 0), (12, 5)])
def test_report_shows_ten_images_of_a_set(accepted, shown):
    level = (torch.arange(24) >= accepted).long()
    decision = Decision(level, torch.zeros(24), torch.zeros(24), level)
    x = torch.zeros(24, 1, 4, 4, dtype=torch.uint8)
    found = list(report._shown(x, decision, "id", ["cat", "dog"]))
    assert [of.mistake for of in found] == [False] * shown + [True] * (10 - shown)


def test_a_report_shows_images_from_all_over_a_set_that_is_sorted_by_class(tmp_path):
    images = ImageSet(
        torch.arange(250, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4),
        torch.arange(250) // 25,
        tuple("abcdefghij"),
    )
    save_examples(tmp_path, RunImages(images, images, {"val:a": images, "b": images.first(3)}))
    kept = load_examples(tmp_path)
    assert list(kept) == ["id", "b"]
    assert set((kept["id"][:, 0, 0, 0] // 25).tolist()) == set(range(10))
    assert len(kept["b"]) == 3


def test_a_histogram_says_where_the_line_is():
    scores = {"id": torch.linspace(0, 1, 100), "noise": torch.linspace(2, 3, 50)}
    texts = [
        text.get_text() for text in figures.histograms(scores).axes[0].get_legend().get_texts()
    ]
    line = float(conformal_threshold(scores["id"], 0.05))
    assert f"threshold {line:.2f}: 5% of ID images are above it" in texts
    few = {"id": torch.linspace(0, 1, 5), "noise": scores["noise"]}  # too few to draw one
    assert len(figures.histograms(few).axes[0].get_legend().get_texts()) == 2


def test_curves_begin_at_one_id_image_and_no_legend_covers_them():
    scores = {
        "id": torch.linspace(0, 1, 200),
        "noise": torch.linspace(0.9, 2, 50),
        "letters": torch.linspace(0.5, 2, 50),
    }
    figure = figures.roc_and_pr(scores)
    roc, pr = figure.axes
    assert (roc.get_xscale(), pr.get_xscale()) == ("log", "linear")
    assert roc.get_xlim() == (1 / 200, 1)
    for drawn in (figure, figures.histograms(scores)):
        drawn.canvas.draw()
        (legend,) = drawn.legends or [drawn.axes[0].get_legend()]
        assert len(legend.get_texts()) >= 2
        assert not any(
            legend.get_window_extent().overlaps(ax.get_window_extent()) for ax in drawn.axes
        )


def test_bars_of_two_rejected_images_have_one_scale():
    times = torch.tensor([[0.5, 3.0], [0.2, 0.9]])
    figure = figures.layer_bars(torch.zeros(2, 1, 8, 8), ["a", "b"], times, ["conv.1", "features"])
    bars = figure.axes[1::2]
    assert [ax.get_xlim() for ax in bars] == [(0, pytest.approx(3.15))] * 2
    assert [[patch.get_facecolor()[0] > 0.8 for patch in ax.patches] for ax in bars] == [
        [False, True],
        [False, False],
    ]


def test_rejected_images_come_from_all_over_a_set():
    net = make_net()
    examples = {
        "id": torch.zeros(4, 1, 12, 12, dtype=torch.uint8),
        "letters": torch.zeros(20, 1, 12, 12, dtype=torch.uint8),
    }

    def decide(x):
        level = torch.tensor([0, *[1] * 18, 2])
        return Decision(
            torch.zeros(20, dtype=torch.long), torch.zeros(20), torch.arange(20.0), level
        )

    x, captions = explain.rejected(net, decide, examples, ("boot", "bag", "coat"))
    assert len(x) == explain.SHOWN
    assert captions[0] == "letters: garbage, score 1.0, nearest class boot"
    assert captions[-1] == "letters: uncertain, score 19.0, nearest class boot"
    _, captions = explain.rejected(
        net, decide, dict.fromkeys(("id", *"abcdef"), examples["letters"]), ("boot", "bag", "coat")
    )
    assert [caption[0] for caption in captions] == list("aabbcdef")


@pytest.mark.slow
def test_explain_leaves_one_page_with_classes_and_layers(run, folder, tmp_path, capsys):
    assert main(["explain", str(run), "--steps", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "explain.html")
    page = (run / "explain.html").read_text()
    assert page.count('src="data:image/png;base64,') in (
        1,
        2,
    )  # a second one if anything was rejected
    assert (run / "figures" / "explain_classes.png").is_file()
    assert {path for path in run.rglob("*") if path.is_file()} - {run / ".lock"} == set(
        written(run)
    )
    assert main(["explain", str(run), "--steps", "0"]) == 2
    assert main(["explain", str(tmp_path)]) == 1
    assert "Expected a run with a run.json" in capsys.readouterr().err


def test_help_names_every_method(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    listed = re.search(r"--methods .*?default", capsys.readouterr().out, re.S).group()
    assert not [method for method in comparison.METHODS if not re.search(rf"\b{method}\b", listed)]


@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_help_says_what_each_setting_means(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # argparse breaks lines at hyphens
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--garbage-weight X weight of the garbage class in the loss" in said
    assert "-inf excludes every candidate (--lam=-inf) (default: 2.0)" in said
    assert "`" not in said


@pytest.mark.parametrize(
    "command", ["demo", "train", "attach", "score", "calibrate", "report", "explain", "reproduce"]
)
def test_help_of_a_command_fits_two_screens_and_says_what_every_flag_does(
    command, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 80
    assert not any(word in line for line in lines for word in ("docs/", "the paper:", "et al"))
    (parser,) = [
        action.choices[command]
        for action in make_parser()._actions
        if isinstance(action.choices, dict)
    ]
    assert all(action.help for action in parser._actions)
    grouped = {
        action.dest for group in parser._action_groups[2:] for action in group._group_actions
    }
    assert command == "report" or {action.dest for action in parser._actions} - grouped == {"help"}


def test_help_ends_with_examples_that_parse_and_the_version_has_its_name(capsys):
    for arguments in (["--help"], ["--version"]):
        with pytest.raises(SystemExit):
            main(arguments)
    *said, version = capsys.readouterr().out.splitlines()
    assert version == f"tie_ext {__version__}"
    examples = [line.split() for line in said[-3:]]
    assert [words[0] for words in examples] == ["tie-ext"] * 3
    assert [make_parser().parse_args(words[1:]).name for words in examples] == [
        "demo",
        "attach",
        "score",
    ]


@pytest.mark.slow
def test_a_shell_completes_verbs_and_flags_by_the_words_of_the_page():
    pytest.importorskip("shtab")
    (command,) = re.findall(
        r"&& shtab (.*) >", (Path(__file__).parents[2] / "docs/how-to/command-line.md").read_text()
    )
    done = subprocess.run(
        [sys.executable, "-m", "shtab", *shlex.split(command)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "complete -o bashdefault" in done.stdout
    assert all(word in done.stdout for word in ("reproduce", "--false-alarm", "--synthesizer"))


@pytest.mark.slow
def test_a_loop_that_expels_nothing_says_so(folder, tmp_path, capsys):
    said = "no candidate was uncertain enough to become garbage"
    assert main(train(folder, tmp_path / "run", "--epochs", "1", "--lam", "100")) == 0
    assert said in capsys.readouterr().out
    assert main(["report", str(tmp_path / "run")]) == 0
    assert said in (tmp_path / "run" / "report.html").read_text()


def test_without_synthesizers_nothing_is_said_of_candidates():
    assert tables.idle([{"tau": 0.5, "proposed": [0, 0], "excluded": [0, 0]}]) == ""
    assert (
        tables.idle(
            [
                {"tau": 1.5, "proposed": [2, 0], "excluded": [0, 0]},
                {"tau": 0.5, "proposed": [2, 0], "excluded": [0, 1]},
            ]
        )
        == ""
    )
    assert "at least 0.75" in tables.idle(
        [{"tau": tau, "proposed": [2, 0], "excluded": [0, 0]} for tau in (1.5, 0.75)]
    )


def test_the_tables_say_what_the_record_does(run):
    numbers = json.loads((run / "run.json").read_text())["numbers"]
    (of_id,), (of_ood,) = tables.id_rows({"TIE": numbers}), tables.ood_rows({"TIE": numbers})
    shares = (numbers["accuracy"], numbers["id_garbage_rate"], numbers["id_rejected"])
    assert list(of_id.values()) == ["TIE", *(f"{100 * share:.2f}" for share in shares)]
    m, garbage = numbers["scores"]["score"]["noise"], numbers["garbage_rate"]["noise"]
    assert list(of_ood.values()) == [
        "TIE",
        "noise",
        f"{100 * m['auroc']:.2f}",
        f"{100 * m['fpr95']:.2f}",
        f"{100 * garbage:.1f}",
    ]


@pytest.mark.slow
def test_every_inversion_can_be_expelled(folder, tmp_path):
    assert main(train(folder, tmp_path / "run", "--lam=-inf", "--epochs", "1")) == 0
    log = json.loads((tmp_path / "run" / "run.json").read_text())["log"][0]
    assert log["tau"] is None
    assert log["excluded"] == log["proposed"]


@pytest.mark.slow
def test_other_synthesizers_are_a_flag_and_show_what_they_propose(folder, tmp_path):
    less = FAST[: FAST.index("--inversion-steps")]
    command = [
        "train",
        "--data",
        f"folder:{folder}",
        "--size",
        "28",
        "--out",
        str(tmp_path / "run"),
        *less,
        "--epochs",
        "1",
    ]
    assert main([*command, "--synthesizer", "gradient,boundary"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert {"outliers_gradient.png", "outliers_boundary.png"} <= {
        p.name for p in (tmp_path / "run" / "figures").iterdir()
    }


@pytest.mark.slow
def test_garbage_is_told_by_a_head_on_every_layer_unless_the_papers_logit_is_asked_for(
    folder, tmp_path, capsys, monkeypatch
):
    set_head_defaults(monkeypatch, steps=20)
    out = tmp_path / "run"
    assert main(train(folder, out, "--epochs", "1")) == 0
    record = json.loads((out / "run.json").read_text())
    assert (record["settings"]["recipe"]["head"], record["settings"]["recipe"]["prior"]) == (
        "multilayer",
        ["procedural"],
    )
    assert "head" in record["log"][0]["losses"]
    assert main(["train", "--resume", str(out)]) == 0
    assert main(["report", str(out)]) == 0
    capsys.readouterr()
    assert main(["score", str(out), str(folder / "test" / "dark" / "0.png")]) == 0
    assert main(train(folder, tmp_path / "other", "--prior", "none")) == 1
    assert "Expected a prior for the garbage head" in capsys.readouterr().err
    assert main(train(folder, tmp_path / "paper", "--head", "linear", "--epochs", "1")) == 0
    recipe = json.loads((tmp_path / "paper" / "run.json").read_text())["settings"]["recipe"]
    assert (recipe["head"], recipe["prior"]) == ("linear", ["multiscale"])


@pytest.mark.slow
def test_a_pool_that_stays_empty_is_no_trouble(folder, tmp_path):
    assert (
        main(
            train(
                folder,
                tmp_path / "run",
                "--head",
                "linear",
                "--prior",
                "none",
                "--lam",
                "1000",
                "--epochs",
                "2",
            )
        )
        == 0
    )
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [entry["pool"] for entry in record["log"]] == [0, 0]
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_bit_identical(run, folder, tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "tie_ext.cli.main", *train(folder, out)])
    while not (out / "training.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert main(["train", "--resume", str(out)]) == 0
    assert (out / "network.safetensors").read_bytes() == (run / "network.safetensors").read_bytes()
    assert (out / "scores.safetensors").read_bytes() == (run / "scores.safetensors").read_bytes()


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "tie_ext.cli.main", *train(folder, out, "--epochs", "500")]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # which a shell turns off in what it starts in the background
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=heard,
    )
    while not (out / "training.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"tie-ext train --resume {out}" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["score", "RUN", "missing.png"],
            "Expected an image file at missing.png, or a folder of them",
        ),
        (
            ["score", "nowhere", "x.png"],
            "Expected a run folder, or a network's file, at nowhere, but there is nothing",
        ),
        (["score", "RUN", "x.png", "--false-alarm", "0.01"], "Expected at least 99 ID images"),
        (["score", "ALONE", "x.png", "--false-alarm", "0.1"], "Expected a tie_ext scores file at"),
        (["score", "RUN", "."], "Expected images in . or below it, but got none"),
        (
            ["score", "RUN", "ALONE", "--out", "nowhere/rows"],
            "Expected to write rows to nowhere/rows, but got: No such file",
        ),
        (["report", "nowhere"], "Expected a run with a run.json"),
        (["train", "--resume", "nowhere"], "Expected a run with a run.json"),
        (["train", "--data", "nothing", "--out", "new"], "Expected a data set, one of mnist"),
        (
            ["train", "--data", "folder:nowhere", "--out", "new"],
            "Expected a folder with one folder of images per class",
        ),
        (
            ["train", "--data", "mnist", "--root", "nowhere", "--out", "new"],
            "Expected mnist in nowhere",
        ),
        (["train", "--data", "mnist", "--out", "RUN"], "holds a run; continue it with"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "network.safetensors", tmp_path / "ALONE")
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "mnist"], "Expected --data and --out"),
        (
            ["train", "--data", "mnist", "--out", "new", "--images", "0"],
            "Expected images to be an integer in [1, ",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--size", "0"],
            "Expected size to be an integer in [1, ",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--batch-size", "0"],
            "Expected batch_size to be an integer in [1, ",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--shift", "-1"],
            "Expected shift to be an integer in [0, ",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--device", "abacus"],
            "Expected --device to be one that torch has here, as cpu",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--lr", "0"],
            "Expected lr to be a number in (0, 1]",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--inversion-steps", "0"],
            "Expected steps to be an integer in [1, 1000000]",
        ),
        (
            [
                "train",
                "--data",
                "mnist",
                "--out",
                "new",
                "--synthesizer",
                "white",
                "--inversion-steps",
                "3",
            ],
            "Expected --synthesizer inversion beside",
        ),
        (
            ["train", "--data", "mnist", "--out", "new", "--synthesizer", "magic"],
            "Expected a synthesizer, one of inversion",
        ),
        (
            ["train", "--resume", "RUN", "--epochs", "3"],
            "Expected --resume RUN alone or with --device, but got --epochs too",
        ),
        (
            ["train", "--resume", "RUN", "--data", "mnist", "--lr", "0.1"],
            "but got --data, --lr too",
        ),
        (
            ["score", "RUN", "x.png", "--false-alarm", "2"],
            "Expected --false-alarm to be a number in (0, 1], but got 2.0",
        ),
        (
            ["score", "RUN", "x.png", "--false-alarm", "0"],
            "Expected --false-alarm to be a number in (0, 1], but got 0.0",
        ),
        (
            ["score", "RUN", "x.png", "--false-alarm", "nan"],
            "Expected --false-alarm to be a number in (0, 1], but got nan",
        ),
        (
            ["score", "RUN", "x.png", "--device", "abacus"],
            "Expected --device to be one that torch has here",
        ),
        (["demo", "--out", "new", "--seed", "-1"], "Expected --seed to be an integer in [0, "),
        (
            ["reproduce", "--out", "new", "--methods", "tie", "magic"],
            "Expected a method, one of tie, ",
        ),
        (
            ["reproduce", "--out", "new", "--data", "mnist", "imagenette"],
            "Expected a data set, one of mnist, ",
        ),
        (
            ["reproduce", "--out", "new", "--seeds", "0", "-1"],
            "Expected seeds to be an integer in [0, ",
        ),
        (
            ["reproduce", "--out", "new", "--images", "0"],
            "Expected images to be an integer in [1, ",
        ),
        (
            ["reproduce", "--out", "new", "--device", "abacus"],
            "Expected --device to be one that torch has here",
        ),
    ],
)
def test_wrong_flags_exit_as_argparse_does(run, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([a.replace("RUN", str(run)) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["magic"],
        ["train", "--epochs", "many"],
        ["report"],
        ["score", "run"],
        ["score", "run", "x", "--no"],
    ],
)
def test_what_argparse_refuses_exits_so_too(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_a_threshold_is_found_beside_the_networks_file_too(run, folder, capsys):
    image = str(folder / "test" / "dark" / "0.png")
    rows = []
    for place in (run, run / "network.safetensors"):
        assert main(["score", str(place), "--false-alarm", "0.25", image]) == 0
        rows.append(capsys.readouterr().out)
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_validation_sets_are_scored_beside_the_others_and_the_worst_is_named(
    folder, tmp_path, capsys
):
    other = tmp_path / "other"
    shutil.copytree(folder / "test", other / "val")
    assert (
        main(train(folder, tmp_path / "run", "--val-ood", f"folder:{other}", "--epochs", "1")) == 0
    )
    record, column = json.loads((tmp_path / "run" / "run.json").read_text()), f"val:folder:{other}"
    assert record["settings"]["val_ood"] == [f"folder:{other}"]
    assert list(record["numbers"]["garbage_rate"]) == [column, "noise"]
    auroc = next(iter(record["numbers"]["scores"].values()))[column]["auroc"]
    said = capsys.readouterr().out
    assert f"worst validation set: folder:{other}, AUROC {100 * auroc:.1f} by " in said
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["numbers"] == record["numbers"]
    assert main(train(folder, tmp_path / "none", "--val-ood", f"folder:{folder}")) == 1
    assert "Expected validation images in a folder, one of " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.parametrize(
    "change",
    [
        {"data": 1},
        {"backbone": []},
        {"images": 0},
        {"size": 10**9},
        {"batch_size": None},
        {"shift": -1},
        {"ood": "mnist"},
        {"ood": [1]},
        {"val_ood": "mnist"},
        {"download": "x"},
        {"data": "x" * 5000},
        {"recipe": 1},
    ],
    ids=str,
)
def test_a_run_of_wrong_settings_is_not_gone_on_with(copied, capsys, change):
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(
        json.dumps({**record, "settings": {**record["settings"], **change}})
    )
    assert main(["train", "--resume", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("config", {"pool_size": 10**9}),
        ("synthesizers", {"white": 1}),
        ("synthesizers", {"inversion": {"height": 1}}),
        ("synthesizers", ["inversion"]),
        ("criterion", []),
    ],
    ids=str,
)
def test_a_run_of_a_wrong_method_is_not_gone_on_with_and_nothing_is_made_by_it(
    copied, capsys, part, change
):
    record = json.loads((copied / "run.json").read_text())
    recipe = record["settings"]["recipe"]
    recipe[part] = {**recipe[part], **change} if part == "config" else change
    (copied / "run.json").write_text(json.dumps(record))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["train", "--resume", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024 * (
        1024 if sys.platform == "darwin" else 1
    )


@pytest.mark.parametrize(
    ("name", "kind", "state"),
    [
        ("scores", "scores", {"../../x": {"id": torch.ones(3)}}),
        ("scores", "scores", {"TIE": {"noise": torch.ones(3)}}),
        ("scores", "scores", {"TIE": {"id": torch.tensor([1.0, float("nan")])}}),
        ("scores", "scores", {"TIE": 3}),
        ("epochs/0002", "snapshot", {"features": torch.ones(3, 2)}),
        (
            "epochs/0002",
            "snapshot",
            {"features": torch.full((3, 2), float("nan")), "labels": torch.zeros(3).long()},
        ),
        (
            "epochs/0002",
            "snapshot",
            {
                "features": torch.ones(3, 2),
                "labels": torch.zeros(3).long(),
                "inversions": torch.ones(3),
            },
        ),
        (
            "epochs/0002",
            "snapshot",
            {"features": torch.ones(3, 2), "labels": torch.zeros(3).long(), "inversions": 1},
        ),
        ("training", "training", {"log": []}),
        ("training", "training", {"log": [{"epoch": 1}]}),
    ],
)
def test_a_report_of_wrong_files_is_refused_and_writes_nothing_elsewhere(
    copied, capsys, name, kind, state
):
    from tie_ext.utils.files import save_state

    save_state(copied / f"{name}.safetensors", kind, state)
    before = {path for path in copied.parent.rglob("*") if path.is_file()}
    assert main(["report", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")
    assert {path for path in copied.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content", ["", "[", "null", "[]", "{}", '{"settings": 1}', "[" * 100_000, "1" * 10_000]
)
def test_a_record_that_is_none_is_refused(copied, capsys, content):
    (copied / "run.json").write_text(content)
    for command in (["report", str(copied)], ["train", "--resume", str(copied)]):
        assert main(command) == 1
        assert capsys.readouterr().err.startswith("tie-ext: Expected ")


def test_a_link_to_nowhere_is_no_reason_to_begin_anew(copied, capsys):
    (copied / "training.safetensors").unlink()
    (copied / "training.safetensors").symlink_to("nowhere")
    assert main(["train", "--resume", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected a tie_ext training file")


def test_a_loss_that_overflowed_is_left_out_of_the_record(copied):

    from tie_ext.cli.folder import read_settings
    from tie_ext.cli.train import finish
    from tie_ext.utils.files import load_state

    log = [
        EpochLog(**entry)
        for entry in load_state(copied / "training.safetensors", "training")["log"]
    ]
    trainer = SimpleNamespace(
        log=[replace(log[0], losses={"classifier": 1.0, "kl": float("inf")})],
        device=torch.device("cpu"),
    )
    assert finish(copied, read_settings(copied), trainer, {}, {})["log"][0]["losses"] == {
        "classifier": 1.0,
        "kl": None,
    }


def test_results_that_are_no_numbers_are_refused(copied, capsys):
    record = json.loads((copied / "run.json").read_text())
    record["numbers"]["scores"]["score"]["noise"]["auroc"] = "x"
    (copied / "run.json").write_text(json.dumps(record))
    assert main(["report", str(copied)]) == 1
    assert capsys.readouterr().err.startswith("tie-ext: Expected ")


def test_a_network_that_takes_any_images_is_not_scored_by_the_command_line(copied, folder, capsys):
    from tie_ext import TIENet

    net = TIENet.load(copied / "network.safetensors")
    net.image_shape = None
    net.save(copied / "network.safetensors")
    assert main(["score", str(copied), str(folder / "test" / "dark" / "0.png")]) == 1
    assert "Expected a network for images of one shape" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_scores_that_find_the_disk_full_say_so(run, folder):
    command = [
        sys.executable,
        "-m",
        "tie_ext.cli.main",
        "score",
        str(run),
        str(folder / "test" / "dark" / "0.png"),
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "tie-ext: Expected to write to the standard output, but got: No space left on device"
    )
    assert done.stderr.count("\n") == 1


def test_mnist_loads_from_where_it_lies(data_root):
    train = data.load("mnist", "train", data_root)
    assert (len(train), train.shape, len(train.classes)) == (60_000, (1, 28, 28), 10)
    colour = data.load("mnist", "test", data_root, (3, 32, 32))
    assert colour.shape == (3, 32, 32)
    assert torch.equal(colour.x[:, 0], colour.x[:, 1])


@pytest.mark.slow
def test_images_are_held_out_of_a_folder_without_splits_and_the_same_on_resume(
    tmp_path, capsys, monkeypatch
):
    rng = np.random.default_rng(0)
    for label, low in (("dark", 0), ("bright", 128)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(low, low + 128, (28, 28), dtype=np.uint8)).save(
                tmp_path / "images" / label / f"{i}.png"
            )
    path, epoch = tmp_path / "images", TIETrainer.epoch
    line = (
        f"{path} has no train/ and test/: 16 images to train on, 4 held out (one in five of "
        f"each class, seed 3)"
    )
    assert main(train(path, tmp_path / "whole", "--seed", "3")) == 0
    said = capsys.readouterr().out
    assert said.splitlines().count(line) == 1
    assert "4 held-out images are too few for a threshold, which takes 37" in said
    held_out = data.load(f"folder:{path}", "test", shape=(3, 28, 28), seed=3)
    net = TIENet.load(tmp_path / "whole" / "network.safetensors")
    kept = load_state(tmp_path / "whole" / "scores.safetensors", "scores")["TIE"]["id"]
    assert torch.allclose(kept, net.decide(held_out.x.float() / 255).score, atol=1e-5)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["test_images"] == line
    with monkeypatch.context() as patched:
        patched.setattr(
            TIETrainer, "epoch", lambda self, batches: stop() if self.log else epoch(self, batches)
        )
        assert main(train(path, tmp_path / "stopped", "--seed", "3")) == 130
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    assert line in capsys.readouterr().out.splitlines()
    for name in ("network.safetensors", "scores.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("content", ["nothing", "one broken image", "broken images alone"])
def test_images_that_cannot_be_read_are_named_before_any_training(
    split, content, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(TIETrainer, "epoch", lambda *_: pytest.fail("training began"))
    shutil.copytree(folder, tmp_path / "images")
    place = tmp_path / "images" / split / "dark"
    for i, file in enumerate(sorted(place.iterdir())):
        if content == "nothing":
            file.unlink()
        elif content == "broken images alone" or i == 3:
            file.write_bytes(b"no image")
    named = {
        "nothing": place,
        "one broken image": place / "11.png" if split == "train" else place / "3.png",
        "broken images alone": place / "0.png",
    }
    assert main(train(tmp_path / "images", tmp_path / "run")) == 1
    error = capsys.readouterr().err
    assert error.startswith("tie-ext: Expected image") or error.startswith(
        "tie-ext: Expected an image file"
    )
    assert str(named[content]) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def listed(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


HELD = """
import sys, time
from pathlib import Path
from tie_ext import TIETrainer
from tie_ext.cli.main import main

gate, epoch = Path(sys.argv[1]), TIETrainer.epoch

def held(self, batches):
    (gate / f"at {len(self.log)}").touch()
    while not (gate / f"go {len(self.log)}").exists():
        time.sleep(0.01)
    return epoch(self, batches)

TIETrainer.epoch = held
sys.exit(main(sys.argv[2:]))
"""
"""The command line, which begins an epoch when it is told to."""


@pytest.mark.slow
def test_one_process_at_a_time_is_at_a_run(run, folder, tmp_path, capsys):
    out, gate = tmp_path / "busy", tmp_path
    first = subprocess.Popen(
        [sys.executable, "-c", HELD, str(gate), *train(folder, out)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        for done, attempts in enumerate(
            [[train(folder, out)], [train(folder, out), ["train", "--resume", str(out)]], []]
        ):
            while not (gate / f"at {done}").exists() and first.poll() is None:
                time.sleep(0.01)
            for attempt in attempts:
                assert main(attempt) == 1
                said = (
                    f"Expected {out} to be free, but got a folder that another process is "
                    f"writing a run to; wait for it, or stop it"
                )
                assert capsys.readouterr().err == f"tie-ext: {said}\n"
            (gate / f"go {done}").touch()
        printed, _ = first.communicate(timeout=120)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 0
    assert f"run: {out}" in printed
    for name in ("network.safetensors", "scores.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


def of_earlier_version(run):
    """Give a run the settings as 0.1.0 wrote them, which kept no examples."""
    (run / "examples.safetensors").unlink()
    record = json.loads((run / "run.json").read_text())
    later = ("recipe", "weights", "mean", "std", "in_memory")
    settings = {name: value for name, value in record["settings"].items() if name not in later}
    config = {
        "epochs": 3,
        "lr": 0.001,
        "lam": 2.0,
        "candidates_per_class": 5,
        "pool_size": 40,
        "prior": "multiscale",
        "synthesizer": "inversion",
    }
    config |= {
        "garbage_weight": 1.0,
        "garbage_shift": 0,
        "criterion": "garbage",
        "generator_steps": 2,
        "generator_lr": 0.001,
        "generator_width": 4,
    }
    config |= {
        "alpha": 0.1,
        "beta": 1.0,
        "gamma_start": 1.0,
        "gamma_end": 1.0,
        "code_margin": 0.0,
        "autocast_dtype": "float32",
        "seed": 0,
    }
    (run / "run.json").write_text(
        json.dumps({**record, "settings": {**settings, "config": config}})
    )


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_read_and_not_gone_on_with(run, folder, tmp_path, capsys):
    old = shutil.copytree(run, tmp_path / "old")
    of_earlier_version(old)
    image = str(folder / "test" / "dark" / "0.png")
    for more in ([], ["--false-alarm", "0.25"]):
        rows = []
        for place in (old, run):
            assert main(["score", str(place), image, *more]) == 0
            rows.append(capsys.readouterr().out)
        assert rows[0] == rows[1]
    (old / "report.html").unlink(missing_ok=True)
    assert main(["report", str(old)]) == 0
    page = (old / "report.html").read_text()
    assert "code_margin" in page
    assert page.count("<figure>") == 6
    before = listed(old)
    capsys.readouterr()
    assert main(["train", "--resume", str(old)]) == 1
    error = capsys.readouterr().err
    assert (
        "but got one that an earlier version made; finish it with that version, or start again "
        "in another folder" in error
    )
    assert error.count("\n") == 1
    assert listed(old) == before


@pytest.mark.slow
def test_a_folder_on_disk_trains_to_the_same_network_and_goes_on_without_reading_all_again(
    run, folder, tmp_path, monkeypatch
):
    out, epoch, seen, decoded = tmp_path / "run", TIETrainer.epoch, [], ImageFiles.decoded
    monkeypatch.setattr(
        ImageFiles,
        "decoded",
        lambda self, rows: seen.append(sum(map(len, rows))) or decoded(self, rows),
    )
    with monkeypatch.context() as patched:
        patched.setattr(
            TIETrainer,
            "epoch",
            lambda self, batches: stop() if len(self.log) == 2 else epoch(self, batches),
        )
        assert main(train(folder, out, "--in-memory", "no")) == 130
    first, seen[:] = sum(seen), []
    assert main(["train", "--resume", str(out)]) == 0
    assert sum(seen) < first
    monkeypatch.undo()
    for name in ("network.safetensors", "scores.safetensors"):
        assert (out / name).read_bytes() == (run / name).read_bytes()


def test_a_broken_test_image_on_disk_is_named_before_any_training(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(TIETrainer, "epoch", lambda *_: pytest.fail("training began"))
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "test" / "dark" / "3.png").write_bytes(b"no image")
    assert main(train(tmp_path / "images", tmp_path / "run", "--in-memory", "no")) == 1
    assert (
        f"Expected an image file at {tmp_path / 'images' / 'test' / 'dark' / '3.png'}"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_what_train_leaves_is_a_detector(run):
    net, x = TIENet.load(run / "network.safetensors"), torch.rand(5, 3, 28, 28)
    pairs = zip(TIEDetector.load(run).decide(x), net.decide(x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_torchvision_network_trains_from_weights_of_other_classes_on_normalised_images(
    folder, tmp_path, monkeypatch
):
    set_head_defaults(monkeypatch, steps=5, epoch_steps=5)
    torch.manual_seed(0)
    before = registry.build("torchvision:resnet18", 3, 7)
    torch.save(before.state_dict(), tmp_path / "w.pt")
    more = [
        "--backbone",
        "torchvision:resnet18",
        "--weights",
        str(tmp_path / "w.pt"),
        "--mean",
        "0.5",
        "--std",
        "0.25",
        "--lr",
        "1e-9",
        "--epochs",
        "1",
    ]
    out = tmp_path / "run"
    assert main(train(folder, out, *more, "--size", "32")) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["weights"] == str(tmp_path / "w.pt")
    assert len(record["weights_sha256"]) == 64
    net = load_network(out)
    assert (net.low.item(), net.high.item(), net.num_classes) == (-2, 2, 2)
    torch.testing.assert_close(net.backbone.conv1.weight, before.conv1.weight)
    (tmp_path / "w.pt").unlink()
    assert main(["train", "--resume", str(out)]) == 0  # which has the weights
    assert main(["score", str(out), str(folder / "test")]) == 0
    assert TIEDetector.load(out, registry.build("torchvision:resnet18", 3, 2)).decide(
        torch.zeros(1, 3, 32, 32)
    ).level.item() in (0, 1, 2)


def test_a_network_to_train_that_is_none_is_refused_before_any_data_is_read(
    folder, tmp_path, capsys
):
    assert main(train(folder, tmp_path / "new", "--backbone", "torchvision:resnet19")) == 2
    assert main(train(folder, tmp_path / "new", "--weights", str(tmp_path / "none.pt"))) == 1
    said = capsys.readouterr().err
    assert "Expected a classifier of torchvision by its name there" in said
    assert "Expected weights as a state_dict at" in said
    assert not (tmp_path / "new").exists()


def test_inversions_over_epochs_lie_as_many_epochs_apart_with_gaps_between():
    black = torch.zeros(3, 2, 1, 28, 28, dtype=torch.uint8)
    ax = figures.inversions_over_epochs(
        {epoch: {"inversions": black} for epoch in range(1, 11)}, ["a", "b", "garbage"]
    ).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["2", "4", "6", "8", "10"]
    picture = ax.images[0].get_array()
    assert picture.shape == (3 * 30, 5 * 30)
    assert (picture[:, 28:30] == 255).all()
    assert (picture[:28, :28] == 0).all()
    few = figures.inversions_over_epochs(
        {epoch: {"inversions": black} for epoch in (1, 2, 3)}, ["a", "b", "garbage"]
    ).axes[0]
    assert [label.get_text() for label in few.get_xticklabels()] == ["1", "2", "3"]
