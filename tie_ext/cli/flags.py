"""The flags of every command, and the settings that they give."""

import argparse
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from tie_ext import __version__
from tie_ext.cli.settings import AttachSettings, ReproduceSettings, TrainSettings
from tie_ext.models.network import HEADS
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.inversion import InversionSettings
from tie_ext.scores.threshold import GUARANTEES
from tie_ext.training.config import TIEConfig
from tie_ext.training.explain import STEPS
from tie_ext.training.recipe import PRIORS, Recipe, names
from tie_ext.utils.checks import check_number

EXAMPLES = """examples:
  tie-ext demo
  tie-ext attach --backbone resnet20 --weights w.pt --data cifar10 --out runs/mine
  tie-ext score runs/mine IMAGES --out rows.csv"""
FOLDERS = """folder:PATH is a folder of images: PATH/train/CLASS/* and PATH/test/CLASS/* (or val,
valid, validation). Without test images one image in five of each class is held out as such, also
if the classes are in PATH itself; the seed chooses them."""
WEIGHTS = """FILE is a .pt, .pth, .ckpt or .safetensors file, Hugging Face's folder or index of
shards; the state_dict may be under any key and prefix, and no code is run. It tells whether images
are grey or colour. Its classes are those of the data, in that order."""
METAVARS = {str: "SET", int: "N", float: "X"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class UsageError(ValueError):
    """Flags that contradict each other, or a value out of range."""


@contextmanager
def usage() -> Iterator[None]:
    """Report a ValueError inside as the wrong value of a flag."""
    try:
        yield
    except ValueError as error:
        raise UsageError(error) from error


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``name`` is the command."""
    about = "Out-of-distribution detection with a garbage class for image classifiers."
    parser = argparse.ArgumentParser(
        prog="tie-ext",
        description=about,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tie_ext {__version__}")
    commands = parser.add_subparsers(
        required=True, dest="name", metavar=" | ".join(COMMANDS), parser_class=_Command
    )
    for name, (about, add_flags) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=about, description=about))
    return parser


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], Any]:
    """What makes a number of a flag's word, and refuses one out of range."""

    def parse(word: str) -> Any:
        try:
            check_number("it", value := kind(word), low, high, integer=kind is int, above=above)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return parse


RATE: Any = {"type": number(float, 0, 1, above=True), "metavar": "RATE"}
SEED: Any = {"type": number(int, 0, 2**31 - 1), "metavar": "N"}
COUNT: Any = {"type": number(int, 1, 10**6), "metavar": "N"}
FLAG: Any = {"action": "store_true"}


def _demo(demo) -> None:
    demo.path("--out", "FOLDER", "folder for table, figures and detector", default=Path("demo"))
    demo.flag("--seed", "random seed", default=0, **SEED)
    demo.flag("--train", "train a network with TIE instead, in two minutes", **FLAG)


def _train(train) -> None:
    train.epilog, train.argument_default = FOLDERS, argparse.SUPPRESS
    train.usage = "tie-ext train --data SET --out RUN [flags]\n       tie-ext train --resume RUN"
    train.path("--out", "RUN", "new run folder")
    train.path("--resume", "RUN", "continue a run that was stopped")
    train.device()
    train.settings(TrainSettings, "data", required=False)
    train.method()
    train.flag(
        "--head",
        "what gives the garbage logit: a head on every layer, or the paper's linear function "
        "(default: multilayer)",
        choices=HEADS,
    )
    train.flag(
        "--synthesizer",
        f"what proposes outliers: {', '.join(SYNTHESIZERS)}, several with commas, or none "
        "(default: inversion)",
        metavar="NAME",
    )
    train.flag(
        "--prior",
        f"what fills the garbage pool at first: {', '.join(PRIORS)}, likewise "
        "(default: procedural; with linear, multiscale)",
        metavar="NAME",
    )


def _attach(attach) -> None:
    attach.epilog, attach.argument_default = f"{WEIGHTS} {FOLDERS}", argparse.SUPPRESS
    attach.usage = "tie-ext attach --backbone NAME --weights FILE --data SET --out RUN ..."
    attach.path("--out", "RUN", "new run folder", required=True)
    attach.device()
    attach.settings(AttachSettings, "data")


def _score(score) -> None:
    score.path("run", "RUN", "folder of a run or of a saved detector, or a network's file")
    score.path("images", "IMAGE", "image files, and folders with all below them", nargs="+")
    score.flag(
        "--false-alarm",
        "reject at most this share of new ID images, by a threshold on the score "
        "(default: the detector's own rule, 0.05 for a combination)",
        **RATE,
    )
    score.path(
        "--monitor",
        "STATE",
        "carry a monitor of drift from run to run; exit code 3 once it has raised its alarm",
    )
    score.device()
    score.flag("--batch-size", "images scored at once", default=64, **COUNT)
    score.flag(
        "--workers",
        "processes that read images, 0 for none beside this one (default: one a processor)",
        type=number(int, 0, 1000),
        metavar="N",
    )
    score.path("--out", "FILE", "file for the rows (default: standard output)")


def _calibrate(calibrate) -> None:
    calibrate.path(
        "run", "RUN", "folder of a run or of a saved detector; its threshold is replaced"
    )
    calibrate.path(
        "images",
        "IMAGE",
        "ID images that nothing was trained on: files, and folders with all below them",
        nargs="+",
    )
    calibrate.flag(
        "--false-alarm",
        "reject at most this share of new ID images (default: the detector's, else 0.05)",
        **RATE,
    )
    calibrate.flag(
        "--guarantee",
        "what it bounds: the rate on average over such sets of images, or that of these "
        "images (default: the detector's, else average)",
        choices=GUARANTEES,
    )
    calibrate.flag(
        "--confidence",
        "probability that the bound holds, for pac (default: the detector's, else 0.95)",
        **RATE,
    )
    calibrate.flag(
        "--per-class", "a threshold for each predicted class that has enough images", **FLAG
    )
    calibrate.device()


def _report(report) -> None:
    report.path("run", "RUN", "run folder; with --images also that of a saved detector")
    report.path(
        "--images",
        "FOLDER",
        "group the images below that are rejected, on the page RUN/rejected.html",
    )
    report.path("--export", "DIR", "copy the images of each group into a folder of its own")


def _explain(explain) -> None:
    explain.path("run", "RUN", "run folder")
    explain.flag(
        "--root", "where the run's data sets are (default: as in the run)", metavar="FOLDER"
    )
    explain.flag("--steps", "generator steps", default=STEPS, **COUNT)


def _reproduce(reproduce) -> None:
    reproduce.usage, about = "tie-ext reproduce [flags]", "folder for cells and tables"
    reproduce.path("--out", "FOLDER", about, default=Path("reproduce"))
    reproduce.device()
    reproduce.settings(ReproduceSettings, "data")
    reproduce.method(without=("seed",))


COMMANDS = {
    "demo": ("attach a garbage class to a network that ships, and decide", _demo),
    "train": ("train a network with TIE", _train),
    "attach": ("give a trained network a garbage class, without training it again", _attach),
    "score": ("label, level, uncertainty and score of images, one row per image", _score),
    "calibrate": (
        "set the threshold of a saved detector anew, on ID images from where it is used",
        _calibrate,
    ),
    "report": (
        "figures, table and settings of a run on an HTML page; with --images, what is rejected",
        _report,
    ),
    "explain": ("show what the classes look like to a network, and why it rejects", _explain),
    "reproduce": (
        "compute the paper's tables, one line of JSON per cell; continues where it was stopped",
        _reproduce,
    ),
}
"""What each command does, and what adds its flags."""


class _Command(argparse.ArgumentParser):
    """A command, whose flags stand in groups of its help."""

    def flag(self, name: str, about: str, to: Any = None, **how: Any) -> None:
        """Add a flag, to a group or none; the help shows its default."""
        if how.get("default", argparse.SUPPRESS) != argparse.SUPPRESS:
            about += " (default: %(default)s)"
        (to or self).add_argument(name, help=about, **how)

    def path(self, name: str, metavar: str, about: str, **how: Any) -> None:
        """Add a flag, or an argument, that is a path."""
        self.flag(name, about, type=Path, metavar=metavar, **how)

    def device(self) -> None:
        """Add ``--device``."""
        self.flag("--device", "where to compute", default=DEVICE)

    def settings(
        self, cls: type, group: str, prefix: str = "", without: Collection[str] = (), **how: Any
    ) -> None:
        """Add a flag for every setting but some. One that is not given is left out, so that
        ``--resume`` can tell.
        """
        kinds, to = get_type_hints(cls), self.add_argument_group(group)
        for f in (f for f in fields(cls) if f.metadata and f.name not in without):
            about, flag = f.metadata, f.metadata["flag"]
            kind = (*get_args(kinds[f.name]), kinds[f.name])[0]
            value: dict[str, Any] = {"required": f.default is MISSING, **how}
            if kind is bool:
                value["action"] = "store_true"
            elif about["choices"]:
                value["choices"] = about["choices"]
            else:
                value |= {"type": kind, "metavar": flag.get("metavar", METAVARS[kind])}
                value["nargs"] = "+" if isinstance(f.default, tuple) else None
            name = f"--{prefix}{f.name.replace('_', '-')}"
            value["default"] = argparse.SUPPRESS
            self.flag(name, _help(about["help"], f.default), to, **value)

    def method(self, without: Collection[str] = ()) -> None:
        """Add the settings of the loop, and those of inversion."""
        self.settings(TIEConfig, "method", without=without)
        self.settings(InversionSettings, "method: --synthesizer inversion", "inversion-")


def _help(about: str, default: Any) -> str:
    """The meaning of a setting, without its reasons and sources, which the documents have; and its
    default.
    """
    about = re.sub(r"; [^;()]* \(docs/[^()]*\)", "", about)
    about = re.sub(r" \([^()]*(?:the paper|docs/|et al)[^()]*\)", "", about).rstrip(".")
    about = about[0].lower() + about[1:] if about[1:2].islower() else about
    if default not in (MISSING, None, ()) and default is not False:
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        about += f" (default: {shown})"
    return about.replace("%", "%%")


def settings_of(cls: type, given: Mapping[str, Any], **more: Any) -> Any:
    """The settings of a run that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """
    with usage():
        return cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given}, **more)


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """The method that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """
    changed = {
        f.name: given[flag]
        for f in fields(InversionSettings)
        if (flag := f"inversion_{f.name}") in given
    }
    with usage():
        InversionSettings(**changed)  # reports a value out of range before any data is read
        chosen: dict[str, dict] = {n: {} for n in names(given.get("synthesizer", "inversion"))}
        if changed and "inversion" not in chosen:
            raise ValueError(
                "Expected --synthesizer inversion beside its flags, but got them alone"
            )
        if changed:
            chosen["inversion"] = changed
        prior = names(given["prior"]) if "prior" in given else None
        config = settings_of(TIEConfig, given)
        return Recipe(config, chosen, prior, head=given.get("head", "linear"))


def check_device(device: str) -> None:
    """Refuse a device that is not there, before any data is read.

    Raises:
        UsageError: With the flag and what came.
    """
    try:
        torch.empty(0, device=device)
    # The latter from a torch that was built without the device.
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"Expected --device to be one that torch has here, as cpu, but got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
