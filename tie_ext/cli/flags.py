"""The flags of every command, and the settings that they give."""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping
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
YES = "go on although test images are training images"
METHODS = {"inversion": InversionSettings}
"""Synthesizers with settings that are flags; the others have their defaults."""
METAVARS = {str: "SET", int: "N", float: "X"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = {"seed": 0, "steps": 1}
"""Counts that are no field of a settings object, and their smallest values."""


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
        prog="tie-ext", description=about, epilog=EXAMPLES, formatter_class=_Examples
    )
    parser.add_argument("--version", action="version", version=f"tie_ext {__version__}")
    commands = parser.add_subparsers(
        required=True, dest="name", metavar=" | ".join(COMMANDS), parser_class=_Command
    )
    for name, (about, add_flags) in COMMANDS.items():
        add_flags(commands.add_parser(name, help=about, description=about))
    return parser


def _demo(demo) -> None:
    about = "folder for table, figures and detector"
    demo.path("output", "--out", "FOLDER", about, default=Path("demo"))
    demo.flag("output", "--seed", "random seed", default=0, type=int, metavar="N")
    about = "train a network with TIE instead, in two minutes"
    demo.flag("output", "--train", about, action="store_true")


def _train(train) -> None:
    train.epilog, train.argument_default = FOLDERS, argparse.SUPPRESS
    train.usage = "tie-ext train --data SET --out RUN [flags]\n       tie-ext train --resume RUN"
    train.path("output", "--out", "RUN", "new run folder")
    train.path("output", "--resume", "RUN", "continue a run that was stopped")
    train.flag("output", "--yes", YES, action="store_true")
    train.settings(TrainSettings, "data", required=False)
    train.device("network")
    train.method()
    about = "what gives the garbage logit: a head on every layer, or the paper's linear function "
    train.flag("method", "--head", f"{about}(default: multilayer)", choices=HEADS)
    listed = ", ".join(SYNTHESIZERS)
    about = f"what proposes outliers: {listed}, several with commas, or none (default: inversion)"
    train.flag("method", "--synthesizer", about, metavar="NAME")
    about = f"what fills the garbage pool at first: {', '.join(PRIORS)}, likewise "
    about += "(default: procedural; with linear, multiscale)"
    train.flag("method", "--prior", about, metavar="NAME")


def _attach(attach) -> None:
    attach.epilog, attach.argument_default = f"{WEIGHTS} {FOLDERS}", argparse.SUPPRESS
    attach.usage = "tie-ext attach --backbone NAME --weights FILE --data SET --out RUN ..."
    attach.path("output", "--out", "RUN", "new run folder", required=True)
    attach.flag("output", "--yes", YES, action="store_true")
    attach.settings(AttachSettings, "data")
    attach.device("network")


def _score(score) -> None:
    score.usage = "tie-ext score RUN IMAGE [IMAGE ...] [flags]"
    about = "folder of a run or of a saved detector, or a network's file"
    score.path("data", "run", "RUN", about)
    about = "image files, and folders with all below them"
    score.path("data", "images", "IMAGE", about, nargs="+")
    about = "reject at most this share of new ID images, by a threshold on the score "
    about += "(default: the detector's own rule, 0.05 for a combination)"
    score.flag("method", "--false-alarm", about, type=float, metavar="RATE")
    about = "carry a monitor of drift from run to run; exit code 3 once it has raised its alarm"
    score.path("method", "--monitor", "STATE", about)
    score.device("method")
    about = "images scored at once"
    score.flag("speed", "--batch-size", about, default=64, type=int, metavar="N")
    about = "processes that read images, 0 for none beside this one (default: one a processor)"
    score.flag("speed", "--workers", about, type=int, metavar="N")
    score.path("output", "--out", "FILE", "file for the rows (default: standard output)")
    score.flag("output", "--format", "of the rows", default="csv", choices=("csv", "jsonl"))
    about = "name the likeliest class of a rejected image too"
    score.flag("output", "--every-label", about, action="store_true")


def _calibrate(calibrate) -> None:
    calibrate.usage = "tie-ext calibrate RUN IMAGE [IMAGE ...] [flags]"
    about = "folder of a run or of a saved detector; its threshold is replaced"
    calibrate.path("data", "run", "RUN", about)
    about = "ID images that nothing was trained on: files, and folders with all below them"
    calibrate.path("data", "images", "IMAGE", about, nargs="+")
    about = "reject at most this share of new ID images (default: the detector's, else 0.05)"
    calibrate.flag("method", "--false-alarm", about, type=float, metavar="RATE")
    about = (
        "what it bounds: the rate on average over such sets of images, or that of these images "
    )
    about += "(default: the detector's, else average)"
    calibrate.flag("method", "--guarantee", about, choices=GUARANTEES)
    about = "probability that the bound holds, for pac (default: the detector's, else 0.95)"
    calibrate.flag("method", "--confidence", about, type=float, metavar="P")
    about = "a threshold for each predicted class that has enough images"
    calibrate.flag("method", "--per-class", about, action="store_true")
    calibrate.device("method")


def _report(report) -> None:
    about = "run folder; with --images also that of a saved detector"
    report.path("data", "run", "RUN", about)
    about = "group the images below that are rejected, on the page RUN/rejected.html"
    report.path("data", "--images", "FOLDER", about)
    about = "copy the images of each group into a folder of its own"
    report.path("output", "--export", "DIR", about)


def _explain(explain) -> None:
    explain.path("data", "run", "RUN", "run folder")
    about = "where the run's data sets are (default: as in the run)"
    explain.flag("data", "--root", about, metavar="FOLDER")
    how = {"type": int, "metavar": "N"}
    explain.flag("method", "--steps", "generator steps", default=STEPS, **how)


def _reproduce(reproduce) -> None:
    reproduce.usage = "tie-ext reproduce [flags]"
    about = "folder for cells and tables"
    reproduce.path("output", "--out", "FOLDER", about, default=Path("reproduce"))
    reproduce.settings(ReproduceSettings, "data")
    reproduce.method(without=("seed",))
    reproduce.device("method")


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


class _Flags(argparse.HelpFormatter):
    """Help with room for long flags."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)


class _Examples(_Flags, argparse.RawDescriptionHelpFormatter):
    """The same, with the lines of the epilog as they are."""


class _Command(argparse.ArgumentParser):
    """A command, whose flags stand in groups of its help."""

    def __init__(self, **how: Any):
        super().__init__(formatter_class=_Flags, **how)
        self.groups: dict[str, Any] = {}

    def flag(self, group: str, name: str, about: str, **how: Any) -> None:
        """Add a flag; the help shows its default."""
        if group not in self.groups:
            self.groups[group] = self.add_argument_group(group)
        if how.get("default", argparse.SUPPRESS) != argparse.SUPPRESS:
            about += f" (default: {how['default']})"
        self.groups[group].add_argument(name, help=about, **how)

    def path(self, group: str, name: str, metavar: str, about: str, **how: Any) -> None:
        """Add a flag, or an argument, that is a path."""
        self.flag(group, name, about, type=Path, metavar=metavar, **how)

    def device(self, group: str) -> None:
        """Add ``--device``."""
        self.flag(group, "--device", "where to compute", default=DEVICE)

    def settings(
        self, cls: type, group: str, prefix: str = "", without: Collection[str] = (), **how: Any
    ) -> None:
        """Add a flag for every setting but some. One that is not given is left out, so that
        ``--resume`` can tell.
        """
        kinds = get_type_hints(cls)
        for f in (f for f in fields(cls) if f.metadata and f.name not in without):
            about, flag = f.metadata, f.metadata["flag"]
            kind = (*get_args(kinds[f.name]), kinds[f.name])[0]
            value: dict[str, Any] = {"default": argparse.SUPPRESS, **how}
            if f.default is MISSING:
                value.setdefault("required", True)
            if kind is bool:
                value["action"] = "store_true"
            elif about["choices"]:
                value["choices"] = about["choices"]
            else:
                value |= {"type": kind, "metavar": flag.get("metavar", METAVARS[kind])}
                value["nargs"] = "+" if isinstance(f.default, tuple) else None
            name = f"--{prefix}{f.name.replace('_', '-')}"
            self.flag(flag.get("group", group), name, _help(about["help"], f.default), **value)

    def method(self, without: Collection[str] = ()) -> None:
        """Add the settings of the loop, and those of :data:`METHODS`."""
        self.settings(TIEConfig, "method", without=without)
        for name, settings in METHODS.items():
            self.settings(settings, f"method: --synthesizer {name}", f"{name}-")


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
    chosen: dict[str, dict] = {n: {} for n in names(given.get("synthesizer", "inversion"))}
    with usage():
        for name, settings in METHODS.items():
            flags = {f.name: f"{name}_{f.name}" for f in fields(settings)}  # type: ignore[arg-type]
            changed = {key: given[flag] for key, flag in flags.items() if flag in given}
            if changed and name not in chosen:
                flag = next(iter(changed)).replace("_", "-")
                raise ValueError(
                    f"Expected --synthesizer {name} beside --{name}-{flag}, but got it alone"
                )
            settings(**changed)  # reports a value out of range before any data is read
            if changed:
                chosen[name] = changed
        prior = names(given["prior"]) if "prior" in given else None
        config = settings_of(TIEConfig, given)
        return Recipe(config, chosen, prior, head=given.get("head", "linear"))


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuse counts out of range and a device that is not there, before any data is read.

    Raises:
        UsageError: With the flag, its range and what came.
    """
    with usage():
        for name, smallest in COUNTS.items():
            if given.get(name) is not None:
                check_number(f"--{name}", given[name], smallest, 2**31 - 1, integer=True)
        try:
            torch.empty(0, device=given.get("device", "cpu"))
        # The latter from a torch that was built without the device.
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                "Expected --device to be one that torch has here, as cpu, but got "
                f"{given['device']!r}: {reason}"
            ) from error
