"""The command line: ``tie-ext demo | train | score | report | reproduce``. The only room that prints."""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tie_ext import __version__
from tie_ext.backbones import BACKBONES
from tie_ext.config import TIEConfig
from tie_ext.decision import Decision, conformal_threshold
from tie_ext.network import TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.inversion import InversionSettings
from tie_ext.recipe import PRIORS, Recipe, names
from tie_ext.support.checks import check_number
from tie_ext.support.files import load_state
from tie_ext.support.settings import Settings

if TYPE_CHECKING:
    from tie_ext.app.run import RunSettings

# 1348 small images: fewer of everything. Digits of 8x8 pixels fill the image, so they are not shifted; without the shift garbage of full weight
# costs ID accuracy, and tau, which comes from training images then known by heart, needs a larger lambda (docs/ledger.md).
DEMO = Recipe(TIEConfig(epochs=10, lam=5.0, garbage_weight=0.1, candidates_per_class=100, pool_size=1000), {"inversion": {"steps": 40, "width": 16}})
FOLDERS = """folder:PATH is a folder of images: PATH/train/CLASS/* and PATH/test/CLASS/* (or val, valid, validation). Without test images one image in
five of each class is held out as such, also where the classes lie in PATH itself; the seed says which."""
METHODS = {"inversion": InversionSettings}
"""Synthesizers whose settings are flags; those of the others are their defaults."""


class UsageError(ValueError):
    """Flags that do not go together, or have a value out of range."""


@contextmanager
def _usage() -> Iterator[None]:
    """What is refused inside is a flag's value."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see ``tie-ext --help``.

    Returns:
        0 when done, 1 where the input is not as expected, 2 where the flags are not, 130 when interrupted.
    """
    a = _parser().parse_args(arguments)
    try:
        with _output():
            a.command(a)
    except ModuleNotFoundError as error:
        print(f"tie-ext: {error}; pip install 'tie_ext[cli]' brings what the command line needs", file=sys.stderr)
        return 1
    except UsageError as error:
        print(f"tie-ext: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, ImportError) as error:  # the last where OpenOOD is asked for and not there
        # Of our own errors the text alone, without the number that Python puts before it.
        said = error.strerror if isinstance(error, OSError) and error.strerror and error.filename is None else error
        print(f"tie-ext: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hints = {"reproduce": "; finished cells and epochs are kept, go on with the same command"}
        if a.name == "train":
            run = vars(a).get("out") or vars(a).get("resume")
            hints["train"] = f"; finished epochs are kept, go on with: tie-ext train --resume {run}"
        print(f"\ntie-ext: stopped{hints.get(a.name, '')}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _output() -> Iterator[None]:
    """All that is printed inside has arrived at the end.

    Raises:
        OSError: If it cannot be written, as where it goes to a file on a full disk.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno is not None and error.filename is None and not str(error.strerror or error).startswith("Expected"):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again when it ends
            raise OSError(error.errno, f"Expected to write to the standard output, but got: {error.strerror or error}") from error
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tie-ext", description="TIE: out-of-distribution detection with a garbage class")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="name", metavar="demo | train | score | report | reproduce")

    demo = commands.add_parser("demo", help="train and compare on images that need no download, in two minutes")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for table, figures and detector (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(command=_demo)

    # Flags that were not given are left out, so that --resume can tell.
    train = commands.add_parser("train", help="train TIE on a data set", epilog=FOLDERS, argument_default=argparse.SUPPRESS)
    train.add_argument("--data", help="mnist, fashionmnist, svhn, cifar10, cifar100, tinyimagenet or folder:PATH (see below)")
    train.add_argument("--out", type=Path, help="run folder")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    train.add_argument("--root", help="where the named sets lie (default: data)")
    train.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    train.add_argument("--ood", nargs="*", metavar="SET", help="sets to score at the end, beside noise")
    train.add_argument("--backbone", choices=list(BACKBONES), help="default: conv3 for grey, conv5 for colour images")
    train.add_argument("--images", type=int, help="train on a random subset of this many images")
    train.add_argument("--size", type=int, help="image size in pixels (default: the set's own, 64 for folders)")
    train.add_argument("--batch-size", type=int, help="ID images a batch (default: 128)")
    train.add_argument("--shift", type=int, help="most pixels a training image is moved by (default: an eighth of its size)")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--synthesizer", help=f"who proposes outliers, of {', '.join(SYNTHESIZERS)}, with commas between; none. Default: inversion.")
    train.add_argument("--prior", help=f"what the garbage class begins with, of {', '.join(PRIORS)}, with commas between; none. Default: multiscale.")
    _settings(train)
    train.set_defaults(command=_train)

    score = commands.add_parser("score", help="label, level, uncertainty and score of images, a row each")
    score.add_argument("run", type=Path, metavar="RUN")
    score.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    score.add_argument("--format", choices=("csv", "jsonl"), default="csv")
    score.add_argument(
        "--false-alarm",
        type=float,
        metavar="RATE",
        help="decide by one threshold on the score, fitted on the run's ID test images: a new ID image exceeds it at most at this rate",
    )
    score.set_defaults(command=_score)

    report = commands.add_parser("report", help="figures, table and settings of a run on one HTML page")
    report.add_argument("run", type=Path, metavar="RUN")
    report.set_defaults(command=_report)

    reproduce = commands.add_parser("reproduce", help="the paper's tables, a JSON a cell; goes on where it was stopped")
    reproduce.add_argument("--root", default="data", help="where the data sets lie (default: data)")
    reproduce.add_argument("--out", type=Path, default=Path("reproduce"), help="folder for cells and tables (default: reproduce)")
    reproduce.add_argument("--data", nargs="+", metavar="SET", help="ID sets, or some classes of one: mnist:0-4 (default: the paper's six)")
    reproduce.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="of tie_ext.bench.comparison, or synthesizers by name (default: TIE, its predecessor, no TIE, plain)",
    )
    reproduce.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    reproduce.add_argument("--images", type=int, help="train on a random subset of this many images")
    reproduce.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    reproduce.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    _settings(reproduce, without=("seed",))
    reproduce.set_defaults(command=_reproduce)
    return parser


def _settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Every setting of the method as a flag, with the help that its field carries."""
    _flags(parser, TIEConfig, "", without)
    for name, settings in METHODS.items():
        _flags(parser, settings, f"{name}-")


def _flags(parser: argparse.ArgumentParser, settings: type[Settings], prefix: str, without: Sequence[str] = ()) -> None:
    for f in (f for f in fields(settings) if f.name not in without):
        flag, about = f"--{prefix}{f.name.replace('_', '-')}", f.metadata
        said = about["help"].replace("%", "%%")
        parser.add_argument(flag, type=type(f.default), choices=about["choices"], default=argparse.SUPPRESS, help=f"{said} Default: {f.default}.")


def _recipe(given: dict[str, Any]) -> Recipe:
    """The method that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """
    with _usage():
        config = TIEConfig(**{f.name: given[f.name] for f in fields(TIEConfig) if f.name in given})
        proposed: dict[str, dict] = {name: {} for name in names(given.get("synthesizer", "inversion"))}
        for name, settings in METHODS.items():
            changed = {f.name: given[f"{name}_{f.name}"] for f in fields(settings) if f"{name}_{f.name}" in given}
            if changed and name not in proposed:
                raise ValueError(f"Expected --synthesizer {name} beside --{name}-{next(iter(changed)).replace('_', '-')}, but got it alone")
            settings(**changed)  # a value out of range is said before any data is read
            if changed:
                proposed[name] = changed
        return Recipe(config, proposed, names(given.get("prior", "multiscale")))


def _check_flags(given: Mapping[str, Any]) -> None:
    """Refuse counts out of range and a device that is not there, before any data is read.

    Raises:
        UsageError: With the flag, its range and what came.
    """
    with _usage():
        for name, least in (("images", 1), ("size", 1), ("batch_size", 1), ("shift", 0), ("seed", 0)):
            if given.get(name) is not None:
                check_number(f"--{name.replace('_', '-')}", given[name], least, 2**31 - 1, integer=True)
        try:
            torch.empty(0, device=given.get("device", "cpu"))
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
            reason = str(error).splitlines()[0]
            raise ValueError(f"Expected --device to be one that torch has here, as cpu, but got {given['device']!r}: {reason}") from error


def _reproduce(a: argparse.Namespace) -> None:
    from tie_ext.app import data
    from tie_ext.bench import comparison, reproduce

    _check_flags(vars(a))
    with _usage():
        for method in a.methods or ():
            comparison.check_method(method)
        for name in a.data or ():
            if name.partition(":")[0] not in data.NAMES:
                raise ValueError(f"Expected a data set, one of {', '.join(data.NAMES)} or some of its classes (NAME:0-4), but got {name!r}")
        for seed in a.seeds:
            check_number("--seeds", seed, 0, 2**31 - 1, integer=True)
    chosen = {name: tuple(value) for name, value in (("sets", a.data), ("methods", a.methods), ("seeds", a.seeds)) if value}
    plan = reproduce.Plan(root=a.root, images=a.images, download=a.download, recipe=_recipe(vars(a)), **chosen)
    missing = reproduce.run(plan, a.out, a.device, _interactive())
    for reason in missing:
        print(f"not run: {reason}")
    print(f"tables: {a.out / 'tables.md'}")


def _demo(a: argparse.Namespace) -> None:
    from tie_ext.app import report, run
    from tie_ext.app.evaluation import evaluate
    from tie_ext.bench import comparison
    from tie_ext.support.files import save_state, write_json

    _check_flags(vars(a))
    start = time.perf_counter()
    settings = run.RunSettings(data="demo", batch_size=32, shift=0, recipe=replace(DEMO, config=replace(DEMO.config, seed=a.seed)))
    images, test, ood = run.load_images(settings)
    if there := run.written(a.out):  # the demo of before gives way, nothing else does
        if not _is_demo(a.out, settings):
            raise ValueError(f"Expected a folder for the demo, but got {a.out}, which holds {there[-1].name} of something else; give another --out")
        run.clear(a.out)
    print(f"{len(images)} digits to train on, {len(test)} to test; OOD: {', '.join(f'{len(s)} {name}' for name, s in ood.items())}")
    record = run.train_run(a.out, settings, progress=_interactive())
    numbers, scores = {"TIE": record["numbers"]}, load_state(a.out / "scores.safetensors", "scores")
    for method in ("multiscale", "plain"):
        net, _ = comparison.train_method(method, BACKBONES["conv3"], images, settings.recipe, settings.batch_size, progress=_interactive(), shift=0)
        numbers[comparison.LABELS[method]], values = evaluate(net, test, ood, images, comparison.has_garbage(method))
        scores |= {comparison.LABELS[method] if label == "score" else label: sets for label, sets in values.items()}
    save_state(a.out / "scores.safetensors", "scores", scores)
    write_json(a.out / "run.json", {**record, "comparison": numbers})
    print(report.table([row for label, n in numbers.items() for row in report.result_rows(label, n)]))
    print(f"all numbers in percent; seed {a.seed}, {time.perf_counter() - start:.0f} s of training and scoring")
    print(f"report: {report.write_report(a.out)}\ndetector: {a.out / 'network.safetensors'}")


def _is_demo(folder: Path, settings: "RunSettings") -> bool:
    """Whether a folder holds a demo: a finished one, or one that was stopped and has these settings, whatever its seed."""
    from tie_ext.app import run

    try:
        record = json.loads((folder / "run.json").read_text())
        if record["settings"]["data"] != "demo":
            return False
        if "comparison" in record:  # by whatever version
            return True
        theirs = run.read_settings(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    config = replace(theirs.recipe.config, seed=settings.recipe.config.seed)
    return replace(theirs, recipe=replace(theirs.recipe, config=config)).record() == settings.record()


def _train(a: argparse.Namespace) -> None:
    from tie_ext.app import data, report, run

    _check_flags(vars(a))
    given = {name: value for name, value in vars(a).items() if name not in ("command", "name")}
    device = given.pop("device", "cuda" if torch.cuda.is_available() else "cpu")
    folder, settings = given.get("resume"), None
    if folder is not None:
        if other := sorted(set(given) - {"resume"}):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in other)
            raise UsageError(f"Expected --resume RUN alone or with --device, but got {flags} too; a run keeps its settings")
    elif "data" not in given or "out" not in given:
        raise UsageError("Expected --data and --out (or --resume RUN), but got neither or only one of them")
    else:
        folder, recipe = given.pop("out"), _recipe(given)
        settings = run.RunSettings(**{f.name: given[f.name] for f in fields(run.RunSettings) if f.name in given}, recipe=recipe)
        backbone = given.get("backbone") or ("conv3" if data.own_shape(settings.data)[0] == 1 else "conv5")
        settings = replace(settings, backbone=backbone, ood=tuple(settings.ood))
    record = run.train_run(folder, settings, device, progress=_interactive(), say=print)
    print(report.table(report.result_rows("TIE", record["numbers"])))
    print(f"run: {folder}; pictures: tie-ext report {folder}")


def _score(a: argparse.Namespace) -> None:
    from tie_ext.app import data

    if a.false_alarm is not None:
        with _usage():
            check_number("--false-alarm", a.false_alarm, 0, 1, above=True)
    net = TIENet.load(a.run / "network.safetensors" if a.run.is_dir() else a.run)
    folder = a.run if a.run.is_dir() else a.run.parent
    decide = net.decide if a.false_alarm is None else _deciding_at(net, folder / "scores.safetensors", a.false_alarm)
    if net.image_shape is None or net.image_shape[0] not in (1, 3) or net.image_shape[1] != net.image_shape[2]:
        raise ValueError(f"Expected a network for square images, grey or of three colours, but got one for images {net.image_shape}")
    channels, size, _ = net.image_shape
    out = csv.writer(sys.stdout) if a.format == "csv" else None
    if out:
        out.writerow(["image", "label", "level", "uncertainty", "score"])
    for start in range(0, len(a.images), 256):
        paths = a.images[start : start + 256]
        x = torch.stack([data.read_image(path, channels, size) for path in paths]).float() / 255
        for path, row in zip(paths, _rows(net, decide(net.low + (net.high - net.low) * x)), strict=True):
            if out:
                out.writerow([path, *row.values()])
            else:
                print(json.dumps({"image": str(path), **row}))


def _deciding_at(net: TIENet, scores: Path, false_alarm: float) -> Callable[[Tensor], Decision]:
    """The network's decision by a threshold on the score, fitted on ID test images as the run scored them."""
    from tie_ext.app.run import load_scores
    from tie_ext.pytorch_ood import TIEDetector

    detector, of = TIEDetector(net, false_alarm), load_scores(scores)
    if "TIE" not in of:
        raise ValueError(f"Expected scores of TIE in {scores}, but got those of {', '.join(of)}")
    detector.threshold = conformal_threshold(of["TIE"]["id"], false_alarm)
    return detector.decide


def _rows(net: TIENet, decision: Decision) -> list[dict]:
    columns = (field.tolist() for field in decision)
    return [
        {"label": net.classes[label] if net.classes else label, "level": level, "uncertainty": round(u, 6), "score": round(score, 4)}
        for label, u, score, level in zip(*columns, strict=True)
    ]


def _report(a: argparse.Namespace) -> None:
    from tie_ext.app import report

    print(report.write_report(a.run))


def _interactive() -> bool:
    return sys.stderr.isatty()


if __name__ == "__main__":
    sys.exit(main())
