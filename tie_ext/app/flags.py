"""The flags of the command line: what there is, what it is called, and what is refused before any data is read."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tie_ext import __version__
from tie_ext.backbones import BACKBONES
from tie_ext.config import TIEConfig
from tie_ext.network import GARBAGE
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.inversion import InversionSettings
from tie_ext.recipe import PRIORS, Recipe, names
from tie_ext.support.checks import check_number
from tie_ext.support.settings import Settings

FOLDERS = """folder:PATH is a folder of images: PATH/train/CLASS/* and PATH/test/CLASS/* (or val, valid, validation). Without test images one image in
five of each class is held out as such, also where the classes lie in PATH itself; the seed says which."""
WEIGHTS = """FILE is a state_dict in safetensors or as torch.save writes it, alone or in a checkpoint; nothing in it is run. It says whether images
are grey or colour. Its classes are those of the data, in that order."""
METHODS = {"inversion": InversionSettings}
"""Synthesizers whose settings are flags; those of the others are their defaults."""


class UsageError(ValueError):
    """Flags that do not go together, or have a value out of range."""


@contextmanager
def usage() -> Iterator[None]:
    """What is refused inside is a flag's value."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from error


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``name`` is the one that was asked for."""
    parser = argparse.ArgumentParser(prog="tie-ext", description="TIE: out-of-distribution detection with a garbage class")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, dest="name", metavar="demo | train | attach | score | report | reproduce")

    demo = commands.add_parser("demo", help="train and compare on images that need no download, in two minutes")
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for table, figures and detector (default: demo)")
    demo.add_argument("--seed", type=int, default=0)

    # Flags that were not given are left out, so that --resume can tell.
    train = commands.add_parser("train", help="train TIE on a data set", epilog=FOLDERS, argument_default=argparse.SUPPRESS)
    train.add_argument("--out", type=Path, help="run folder")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped")
    _images(train, needed=False)
    train.add_argument("--backbone", choices=list(BACKBONES), help="default: conv3 for grey, conv5 for colour images")
    train.add_argument("--shift", type=int, help="most pixels a training image is moved by (default: an eighth of its size)")
    train.add_argument("--synthesizer", help=f"who proposes outliers, of {', '.join(SYNTHESIZERS)}, with commas between; none. Default: inversion.")
    train.add_argument(
        "--prior",
        help=f"what the garbage class begins with, of {', '.join(PRIORS)}, with commas between; none. Default: procedural, or "
        "multiscale with --garbage linear.",
    )
    train.add_argument(
        "--garbage",
        choices=GARBAGE,
        help="what gives the garbage logit: linear, the paper's function of the penultimate features; or layers, a head on every layer, from which "
        "no gradient reaches the classifier. Default: layers.",
    )
    _settings(train)

    says = "give a trained network a garbage class, without training it again"
    attach = commands.add_parser("attach", help=says, description=says, epilog=f"{WEIGHTS} {FOLDERS}", argument_default=argparse.SUPPRESS)
    attach.add_argument("--backbone", required=True, help=f"{', '.join(BACKBONES)}, torchvision:NAME or timm:NAME, as torchvision:resnet18")
    attach.add_argument("--weights", required=True, metavar="FILE", help="its state_dict (see below)")
    attach.add_argument("--out", required=True, type=Path, help="run folder")
    _images(attach, needed=True)
    attach.add_argument("--mean", type=float, nargs="+", metavar="X", help="of the images in [0, 1], if the network was trained with it taken off")
    attach.add_argument("--std", type=float, nargs="+", metavar="X", help="what they were divided by then; both a number, or one a channel")
    attach.add_argument("--seed", type=int, help="of the subset, the held-out images and the garbage class (default: 0)")

    says = "label, level, uncertainty and score of images, a row each"
    score = commands.add_parser("score", help=says, description=says)
    score.add_argument("run", type=Path, metavar="RUN", help="run folder, or a network's file")
    score.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files, and folders with all that is below them")
    score.add_argument("--out", type=Path, metavar="FILE", help="write rows there (default: standard output)")
    score.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: csv")
    score.add_argument("--every-label", action="store_true", help="name the likeliest class of a rejected image too")
    score.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute, as torch says it")
    score.add_argument(
        "--false-alarm",
        type=float,
        metavar="RATE",
        help="decide by one threshold on the score, fitted on the run's ID test images: a new ID image exceeds it at most at this rate; 0.05 where "
        "the run has a combined detector, else the paper's rule decides",
    )

    report = commands.add_parser("report", help="figures, table and settings of a run on one HTML page")
    report.add_argument("run", type=Path, metavar="RUN")

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
    return parser


def _images(parser: argparse.ArgumentParser, needed: bool) -> None:
    """What a run reads."""
    sets = "mnist, fashionmnist, svhn, cifar10, cifar100, tinyimagenet or folder:PATH (see below)"
    parser.add_argument("--data", required=needed, help=sets)
    parser.add_argument("--root", help="where the named sets lie (default: data)")
    parser.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    parser.add_argument("--ood", nargs="*", metavar="SET", help="sets to score at the end, beside noise")
    parser.add_argument("--val-ood", nargs="*", metavar="SET", help="sets whose validation images (in val/) are scored too, to choose settings by")
    parser.add_argument("--images", type=int, help="take a random subset of this many training images")
    parser.add_argument("--size", type=int, help="image size in pixels (default: the set's own, 64 for folders)")
    parser.add_argument("--batch-size", type=int, help="ID images a batch (default: 128)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


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


def recipe_of(given: dict[str, Any]) -> Recipe:
    """The method that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """
    with usage():
        config = TIEConfig(**{f.name: given[f.name] for f in fields(TIEConfig) if f.name in given})
        proposed: dict[str, dict] = {name: {} for name in names(given.get("synthesizer", "inversion"))}
        for name, settings in METHODS.items():
            changed = {f.name: given[f"{name}_{f.name}"] for f in fields(settings) if f"{name}_{f.name}" in given}
            if changed and name not in proposed:
                raise ValueError(f"Expected --synthesizer {name} beside --{name}-{next(iter(changed)).replace('_', '-')}, but got it alone")
            settings(**changed)  # a value out of range is said before any data is read
            if changed:
                proposed[name] = changed
        return Recipe(config, proposed, names(given.get("prior", "multiscale")), garbage=given.get("garbage", "linear"))


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuse counts out of range and a device that is not there, before any data is read.

    Raises:
        UsageError: With the flag, its range and what came.
    """
    with usage():
        for name, least in (("images", 1), ("size", 1), ("batch_size", 1), ("shift", 0), ("seed", 0)):
            if given.get(name) is not None:
                check_number(f"--{name.replace('_', '-')}", given[name], least, 2**31 - 1, integer=True)
        try:
            torch.empty(0, device=given.get("device", "cpu"))
        except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without it
            reason = str(error).splitlines()[0]
            raise ValueError(f"Expected --device to be one that torch has here, as cpu, but got {given['device']!r}: {reason}") from error
