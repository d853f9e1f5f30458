"""The flags of the command line: what there is, what it is called, and what is refused before any data is read."""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from tie_ext import __version__
from tie_ext.cli.data import IN_MEMORY
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import AUTOCAST_DTYPES, HEADS
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.inversion import InversionSettings
from tie_ext.training.config import TIEConfig
from tie_ext.training.explain import STEPS
from tie_ext.training.recipe import PRIORS, Recipe, names
from tie_ext.utils.checks import check_number
from tie_ext.utils.settings import Settings

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


EXAMPLES = """examples:
  tie-ext demo
  tie-ext attach --backbone resnet20 --weights w.pt --data cifar10 --out runs/mine
  tie-ext score runs/mine PICTURES --out rows.csv"""
SETS = (
    "mnist, fashionmnist, svhn, cifar10, cifar100, tinyimagenet, folder:PATH (see below) or demo"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``name`` is the one that was asked for."""
    says = "Out-of-distribution detection with a garbage class: TIE's training, or a head for a trained network."
    parser = argparse.ArgumentParser(
        prog="tie-ext", description=says, epilog=EXAMPLES, formatter_class=_Examples
    )
    parser.add_argument("--version", action="version", version=f"tie_ext {__version__}")
    commands = parser.add_subparsers(
        required=True,
        dest="name",
        metavar="demo | train | attach | score | report | explain | reproduce",
    )

    demo = _command(
        commands, "demo", "train and compare on images that need no download, in a minute or two"
    )
    output = demo.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("demo"),
        metavar="FOLDER",
        help="for table, figures and detector (default: demo)",
    )
    output.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)"
    )

    # Flags that were not given are left out, so that --resume can tell.
    usage = "tie-ext train --data SET --out RUN [flags]\n       tie-ext train --resume RUN"
    train = _command(
        commands,
        "train",
        "train TIE on a data set",
        FOLDERS,
        argument_default=argparse.SUPPRESS,
        usage=usage,
    )
    output = train.add_argument_group("output")
    output.add_argument("--out", type=Path, metavar="RUN", help="run folder, a new one")
    output.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with a run that was stopped"
    )
    data = _images(train, needed=False)
    data.add_argument(
        "--shift",
        type=int,
        metavar="N",
        help="most pixels a training image is moved by (default: size / 8)",
    )
    _network(
        train,
        "default: conv3 for grey, conv5 for colour images",
        "begin with this state_dict; its classes may be others",
    )
    method = _settings(train)
    method.add_argument(
        "--head",
        choices=HEADS,
        help="what tells garbage: a head on every layer, or the paper's linear logit (default: multilayer)",
    )
    said = f"who proposes outliers: {', '.join(SYNTHESIZERS)}, several with commas, or none (default: inversion)"
    method.add_argument("--synthesizer", metavar="NAME", help=said)
    said = f"what garbage begins with: {', '.join(PRIORS)}, likewise (default: procedural; with linear, multiscale)"
    method.add_argument("--prior", metavar="NAME", help=said)

    usage = "tie-ext attach --backbone NAME --weights FILE --data SET --out RUN ..."
    says = "give a trained network a garbage class, without training it again"
    attach = _command(
        commands,
        "attach",
        says,
        f"{WEIGHTS} {FOLDERS}",
        argument_default=argparse.SUPPRESS,
        usage=usage,
    )
    attach.add_argument_group("output").add_argument(
        "--out", required=True, type=Path, metavar="RUN", help="run folder, a new one"
    )
    data = _images(attach, needed=True)
    data.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the subset, the held-out images and the garbage class (default: 0)",
    )
    network = _network(attach, "", "its state_dict (see below)")
    network.add_argument(
        "--autocast-dtype",
        choices=AUTOCAST_DTYPES,
        help="what it computes in (default: float32); bfloat16 is faster where hardware has it",
    )

    usage = "tie-ext score RUN IMAGE [IMAGE ...] [flags]"
    score = _command(
        commands, "score", "label, level, uncertainty and score of images, a row each", usage=usage
    )
    data = score.add_argument_group("data")
    data.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="folder of a run or of a saved detector, or a network's file",
    )
    data.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="image files, and folders with all that is below them",
    )
    method = score.add_argument_group("method")
    method.add_argument(
        "--false-alarm",
        type=float,
        metavar="RATE",
        help="decide by one threshold on the score, drawn by the run's ID test images so that at most this share of new ID images is rejected "
        "(default: 0.05 where the run has a combined detector, else the network's own rule; a saved detector has its own)",
    )
    method.add_argument("--device", default=DEVICE, help=f"where to compute (default: {DEVICE})")
    output = score.add_argument_group("output")
    output.add_argument(
        "--out", type=Path, metavar="FILE", help="write rows there (default: standard output)"
    )
    output.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: csv")
    output.add_argument(
        "--every-label",
        action="store_true",
        help="name the likeliest class of a rejected image too",
    )

    report = _command(commands, "report", "figures, table and settings of a run on one HTML page")
    report.add_argument("run", type=Path, metavar="RUN", help="run folder")

    explain = _command(
        commands,
        "explain",
        "what the classes look like to a run's network, and which layers find a rejected image odd",
    )
    data = explain.add_argument_group("data")
    data.add_argument("run", type=Path, metavar="RUN", help="run folder")
    data.add_argument(
        "--root",
        metavar="FOLDER",
        help="where the run's data sets lie (default: as they did for the run)",
    )
    method = explain.add_argument_group("method")
    method.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        metavar="N",
        help=f"of the generator that makes the images (default: {STEPS})",
    )

    usage = "tie-ext reproduce [flags]"
    reproduce = _command(
        commands,
        "reproduce",
        "the paper's tables, a line of JSON a cell; goes on where it was stopped",
        usage=usage,
    )
    output = reproduce.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("reproduce"),
        metavar="FOLDER",
        help="for cells and tables (default: reproduce)",
    )
    data = reproduce.add_argument_group("data")
    data.add_argument(
        "--data",
        nargs="+",
        metavar="SET",
        help="ID sets, or some classes of one: mnist:0-4 (default: the paper's six)",
    )
    data.add_argument(
        "--root", default="data", metavar="FOLDER", help="where the data sets lie (default: data)"
    )
    data.add_argument(
        "--download", action="store_true", help="let torchvision download what is missing"
    )
    data.add_argument(
        "--images", type=int, metavar="N", help="train on a random subset of this many images"
    )
    method = _settings(reproduce, without=("seed",))
    method.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="tie, layers (as train has it), predecessor, multiscale, white, vernekar, ascood, attach, plain, or synthesizers by name "
        "(default: tie predecessor multiscale white plain)",
    )
    method.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    method.add_argument("--device", default=DEVICE, help=f"where to compute (default: {DEVICE})")
    return parser


class _Flags(argparse.HelpFormatter):
    """Help with room for the longest of the usual flags."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)


class _Examples(_Flags, argparse.RawDescriptionHelpFormatter):
    """The same, with the lines of an epilog as they are."""


def _command(
    commands: "argparse._SubParsersAction",
    name: str,
    says: str,
    epilog: str | None = None,
    **how: Any,
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=says, description=says, epilog=epilog, formatter_class=_Flags, **how
    )


def _images(parser: argparse.ArgumentParser, needed: bool) -> "argparse._ArgumentGroup":
    """What a run reads."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", required=needed, metavar="SET", help=SETS)
    group.add_argument("--root", metavar="FOLDER", help="where the named sets lie (default: data)")
    group.add_argument(
        "--download", action="store_true", help="let torchvision download what is missing"
    )
    group.add_argument(
        "--ood", nargs="*", metavar="SET", help="sets to score at the end, beside noise"
    )
    group.add_argument(
        "--val-ood",
        nargs="*",
        metavar="SET",
        help="sets whose images in val/ are scored too, to choose settings by",
    )
    group.add_argument(
        "--images", type=int, metavar="N", help="take a random subset of this many training images"
    )
    group.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="side of the square that images are brought to (default: the set's own, 64 for folders)",
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="ID images a batch (default: 128)"
    )
    group.add_argument(
        "--in-memory",
        choices=IN_MEMORY,
        help="keep images of folders in memory; auto: up to 256 MB (default: auto)",
    )
    return group


def _network(
    parser: argparse.ArgumentParser, default: str, weights: str
) -> "argparse._ArgumentGroup":
    """What is trained, or attached to."""
    group = parser.add_argument_group("network")
    said = f"{', '.join(BACKBONES)}, torchvision:NAME or timm:NAME"
    group.add_argument(
        "--backbone",
        required=not default,
        metavar="NAME",
        help=said + (f" ({default})" if default else ""),
    )
    group.add_argument("--weights", required=not default, metavar="FILE", help=weights)
    group.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="X",
        help="what is taken off images in [0, 1], one number or one a channel",
    )
    group.add_argument(
        "--std", type=float, nargs="+", metavar="X", help="what they are divided by then"
    )
    group.add_argument("--device", default=DEVICE, help=f"where to compute (default: {DEVICE})")
    return group


def _settings(
    parser: argparse.ArgumentParser, without: Sequence[str] = ()
) -> "argparse._ArgumentGroup":
    """Every setting of the method as a flag, with the help that its field carries."""
    group = parser.add_argument_group("method")
    _flags(group, TIEConfig, "", without)
    for name, settings in METHODS.items():
        _flags(parser.add_argument_group(f"method: --synthesizer {name}"), settings, f"{name}-")
    return group


def _flags(
    group: "argparse._ArgumentGroup",
    settings: type[Settings],
    prefix: str,
    without: Sequence[str] = (),
) -> None:
    for f in (f for f in fields(settings) if f.name not in without):
        about = f.metadata
        said = f"{_brief(about['help'])} (default: {f.default})".replace("%", "%%")
        flag, default = f"--{prefix}{f.name.replace('_', '-')}", argparse.SUPPRESS
        if about["choices"]:
            group.add_argument(flag, choices=about["choices"], default=default, help=said)
        else:
            group.add_argument(
                flag,
                type=type(f.default),
                metavar="N" if isinstance(f.default, int) else "X",
                default=default,
                help=said,
            )


def _brief(help: str) -> str:
    """What a setting means, without its reasons and sources, which the documents have."""
    help = re.sub(r"; [^;()]* \(docs/[^()]*\)", "", help)
    help = re.sub(r" \([^()]*(?:the paper|docs/|et al)[^()]*\)", "", help).rstrip(".")
    return help[0].lower() + help[1:] if help[1:2].islower() else help


def recipe_of(given: dict[str, Any]) -> Recipe:
    """The method that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """
    with usage():
        config = TIEConfig(**{f.name: given[f.name] for f in fields(TIEConfig) if f.name in given})
        proposed: dict[str, dict] = {
            name: {} for name in names(given.get("synthesizer", "inversion"))
        }
        for name, settings in METHODS.items():
            changed = {
                f.name: given[f"{name}_{f.name}"]
                for f in fields(settings)
                if f"{name}_{f.name}" in given
            }
            if changed and name not in proposed:
                raise ValueError(
                    f"Expected --synthesizer {name} beside --{name}-{next(iter(changed)).replace('_', '-')}, but got it alone"
                )
            settings(**changed)  # a value out of range is said before any data is read
            if changed:
                proposed[name] = changed
        return Recipe(
            config,
            proposed,
            names(given.get("prior", "multiscale")),
            head=given.get("head", "linear"),
        )


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuse counts out of range and a device that is not there, before any data is read.

    Raises:
        UsageError: With the flag, its range and what came.
    """
    with usage():
        for name, least in (
            ("images", 1),
            ("size", 1),
            ("batch_size", 1),
            ("shift", 0),
            ("seed", 0),
        ):
            if given.get(name) is not None:
                check_number(
                    f"--{name.replace('_', '-')}", given[name], least, 2**31 - 1, integer=True
                )
        try:
            torch.empty(0, device=given.get("device", "cpu"))
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # the latter from a torch that was built without it
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"Expected --device to be one that torch has here, as cpu, but got {given['device']!r}: {reason}"
            ) from error
