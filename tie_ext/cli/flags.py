"""The flags of every command, and the settings that they give."""

import argparse
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from tie_ext import __version__
from tie_ext.cli.settings import AttachSettings, ImageSettings, TrainSettings
from tie_ext.models.network import HEADS
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.inversion import InversionSettings
from tie_ext.training.config import TIEConfig
from tie_ext.training.explain import STEPS
from tie_ext.training.recipe import PRIORS, Recipe, names
from tie_ext.utils.checks import check_number
from tie_ext.utils.settings import Settings

EXAMPLES = """examples:
  tie-ext demo
  tie-ext attach --backbone resnet20 --weights w.pt --data cifar10 --out runs/mine
  tie-ext score runs/mine IMAGES --out rows.csv"""
FOLDERS = """folder:PATH is a folder of images: PATH/train/CLASS/* and PATH/test/CLASS/* (or val,
valid, validation). Without test images one image in five of each class is held out as such, also
if the classes are in PATH itself; the seed chooses them."""
WEIGHTS = """FILE is a state_dict in safetensors or as torch.save writes it, alone or in a
checkpoint; no code in it is run. It tells whether images are grey or colour. Its classes are those
of the data, in that order."""
METHODS = {"inversion": InversionSettings}
"""Synthesizers with settings that are flags; the others have their defaults."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = {"images": 1, "seed": 0, "steps": 1, "batch_size": 1, "workers": 0}
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


def interactive() -> bool:
    """Whether to show progress bars."""
    return sys.stderr.isatty()


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``name`` is the command."""
    about = "Out-of-distribution detection with a garbage class for image classifiers."
    parser = argparse.ArgumentParser(
        prog="tie-ext", description=about, epilog=EXAMPLES, formatter_class=_Examples
    )
    parser.add_argument("--version", action="version", version=f"tie_ext {__version__}")
    add = (_demo, _train, _attach, _score, _report, _explain, _reproduce)
    commands = parser.add_subparsers(
        required=True, dest="name", metavar=" | ".join(each.__name__[1:] for each in add)
    )
    for each in add:
        each(commands)
    return parser


def _demo(commands) -> None:
    demo = _command(commands, "demo", "train and compare on built-in images, in a minute or two")
    output = demo.add_argument_group("output")
    _path(output, "--out", "FOLDER", "folder for table, figures and detector", Path("demo"))
    output.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed (default: 0)"
    )


def _train(commands) -> None:
    train = _command(
        commands,
        "train",
        "train a network with TIE",
        FOLDERS,
        # Flags that are not given are left out, so that --resume can tell.
        argument_default=argparse.SUPPRESS,
        usage="tie-ext train --data SET --out RUN [flags]\n       tie-ext train --resume RUN",
    )
    output = train.add_argument_group("output")
    _path(output, "--out", "RUN", "new run folder")
    _path(output, "--resume", "RUN", "continue a run that was stopped")
    groups = _options(train, TrainSettings, needed=False)
    _device(groups["network"])
    method = _method(train)
    about = "what gives the garbage logit: a head on every layer, or the paper's linear function "
    method.add_argument("--head", choices=HEADS, help=f"{about}(default: multilayer)")
    listed = ", ".join(SYNTHESIZERS)
    about = f"what proposes outliers: {listed}, several with commas, or none (default: inversion)"
    method.add_argument("--synthesizer", metavar="NAME", help=about)
    about = f"what fills the garbage pool at first: {', '.join(PRIORS)}, likewise "
    about += "(default: procedural; with linear, multiscale)"
    method.add_argument("--prior", metavar="NAME", help=about)


def _attach(commands) -> None:
    attach = _command(
        commands,
        "attach",
        "give a trained network a garbage class, without training it again",
        f"{WEIGHTS} {FOLDERS}",
        argument_default=argparse.SUPPRESS,
        usage="tie-ext attach --backbone NAME --weights FILE --data SET --out RUN ...",
    )
    _path(attach.add_argument_group("output"), "--out", "RUN", "new run folder", required=True)
    _device(_options(attach, AttachSettings)["network"])


def _score(commands) -> None:
    score = _command(
        commands,
        "score",
        "label, level, uncertainty and score of images, one row per image",
        usage="tie-ext score RUN IMAGE [IMAGE ...] [flags]",
    )
    data = score.add_argument_group("data")
    _path(data, "run", "RUN", "folder of a run or of a saved detector, or a network's file")
    _path(data, "images", "IMAGE", "image files, and folders with all below them", nargs="+")
    method = score.add_argument_group("method")
    method.add_argument(
        "--false-alarm",
        type=float,
        metavar="RATE",
        help="reject at most this share of new ID images, by a threshold on the score (default: "
        "the detector's own rule, 0.05 for a combination)",
    )
    _device(method)
    speed = score.add_argument_group("speed")
    about = "images scored at once (default: 64)"
    speed.add_argument("--batch-size", type=int, default=64, metavar="N", help=about)
    about = "processes that read images, 0 for none beside this one (default: one a processor)"
    speed.add_argument("--workers", type=int, metavar="N", help=about)
    output = score.add_argument_group("output")
    _path(output, "--out", "FILE", "file for the rows (default: standard output)")
    output.add_argument("--format", choices=("csv", "jsonl"), default="csv", help="default: csv")
    about = "name the likeliest class of a rejected image too"
    output.add_argument("--every-label", action="store_true", help=about)


def _report(commands) -> None:
    report = _command(commands, "report", "figures, table and settings of a run on an HTML page")
    _path(report, "run", "RUN", "run folder")


def _explain(commands) -> None:
    explain = _command(
        commands, "explain", "show what the classes look like to a network, and why it rejects"
    )
    data = explain.add_argument_group("data")
    _path(data, "run", "RUN", "run folder")
    about = "where the run's data sets are (default: as in the run)"
    data.add_argument("--root", metavar="FOLDER", help=about)
    explain.add_argument_group("method").add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help=f"generator steps (default: {STEPS})"
    )


def _reproduce(commands) -> None:
    reproduce = _command(
        commands,
        "reproduce",
        "compute the paper's tables, one line of JSON per cell; continues where it was stopped",
        usage="tie-ext reproduce [flags]",
    )
    output = reproduce.add_argument_group("output")
    _path(output, "--out", "FOLDER", "folder for cells and tables", Path("reproduce"))
    data = reproduce.add_argument_group("data")
    about = "ID sets, or some classes of one: mnist:0-4 (default: the paper's six)"
    data.add_argument("--data", nargs="+", metavar="SET", help=about)
    about = "where the data sets are (default: data)"
    data.add_argument("--root", default="data", metavar="FOLDER", help=about)
    about = "let torchvision download what is missing"
    data.add_argument("--download", action="store_true", help=about)
    about = "train on a random subset of N images"
    data.add_argument("--images", type=int, metavar="N", help=about)
    method = _method(reproduce, without=("seed",))
    method.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="tie, layers (as train has it), predecessor, multiscale, white, vernekar, ascood, "
        "attach, plain, or synthesizers by name (default: tie predecessor multiscale white plain)",
    )
    about = "one training each (default: 0 1 2)"
    method.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help=about)
    _device(method)


class _Flags(argparse.HelpFormatter):
    """Help with room for long flags."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)


class _Examples(_Flags, argparse.RawDescriptionHelpFormatter):
    """The same, with the lines of the epilog as they are."""


def _command(commands, name: str, about: str, epilog: str | None = None, **how: Any):
    how |= {"help": about, "description": about, "epilog": epilog}
    return commands.add_parser(name, formatter_class=_Flags, **how)


def _path(group, name: str, metavar: str, about: str, default: Path | None = None, **how) -> None:
    if default is not None:
        how, about = {**how, "default": default}, f"{about} (default: {default})"
    group.add_argument(name, type=Path, metavar=metavar, help=about, **how)


def _device(group) -> None:
    about = f"where to compute (default: {DEVICE})"
    group.add_argument("--device", default=DEVICE, help=about)


def _options(parser, settings: type[ImageSettings], needed: bool = True) -> dict[str, Any]:
    """Every option of a run as a flag; the groups of the help by name."""
    groups = {name: parser.add_argument_group(name) for name in ("data", "network")}
    for f in fields(settings):
        about = f.metadata
        if not about:
            continue
        how: dict[str, Any] = {"help": about["help"]}
        if about["kind"] is bool:
            how["action"] = "store_true"
        else:
            how |= {"required": needed and f.default is MISSING, "type": about["kind"]}
            how["nargs"] = about["several"]
            how |= (
                {"choices": about["choices"]}
                if about["choices"]
                else {"metavar": about["metavar"]}
            )
        groups[about["group"]].add_argument(f"--{f.name.replace('_', '-')}", **how)
    return groups


def _method(parser, without: Collection[str] = ()):
    """Every setting of the method as a flag, with the help that its field carries."""
    group = parser.add_argument_group("method")
    parts: dict[str, tuple[Any, type]] = {"": (group, TIEConfig)}
    for name, settings in METHODS.items():
        title = f"method: --synthesizer {name}"
        parts[f"{name}-"] = parser.add_argument_group(title), settings
    for prefix, (part, cls) in parts.items():
        for f in (f for f in fields(cls) if f.name not in without):
            about = f"{_brief(f.metadata['help'])} (default: {f.default})".replace("%", "%%")
            how: dict[str, Any] = {"help": about, "default": argparse.SUPPRESS}
            if f.metadata["choices"]:
                how["choices"] = f.metadata["choices"]
            else:
                metavar = "N" if isinstance(f.default, int) else "X"
                how |= {"type": type(f.default), "metavar": metavar}
            part.add_argument(f"--{prefix}{f.name.replace('_', '-')}", **how)
    return group


def _brief(help: str) -> str:
    """The meaning of a setting without its reasons and sources, which the documents have."""
    help = re.sub(r"; [^;()]* \(docs/[^()]*\)", "", help)
    help = re.sub(r" \([^()]*(?:the paper|docs/|et al)[^()]*\)", "", help).rstrip(".")
    return help[0].lower() + help[1:] if help[1:2].islower() else help


def settings_of(cls: type, given: Mapping[str, Any], **more: Any) -> Any:
    """The settings of a run that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    with usage():
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}, **more)


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """The method that the given flags ask for.

    Raises:
        UsageError: If a value is out of range.
    """

    def of(settings: type[Settings], prefix: str = "") -> dict[str, Any]:
        named = {f.name: prefix + f.name for f in fields(settings)}  # type: ignore[arg-type]
        return {name: given[flag] for name, flag in named.items() if flag in given}

    with usage():
        config = TIEConfig(**of(TIEConfig))
        chosen: dict[str, dict] = {n: {} for n in names(given.get("synthesizer", "inversion"))}
        for name, settings in METHODS.items():
            changed = of(settings, f"{name}_")
            if changed and name not in chosen:
                flag = next(iter(changed)).replace("_", "-")
                raise ValueError(
                    f"Expected --synthesizer {name} beside --{name}-{flag}, but got it alone"
                )
            settings(**changed)  # reports a value out of range before any data is read
            if changed:
                chosen[name] = changed
        prior = names(given.get("prior", "multiscale"))
        return Recipe(config, chosen, prior, head=given.get("head", "linear"))


def check_flags(given: Mapping[str, Any]) -> None:
    """Refuse counts out of range and a device that is not there, before any data is read.

    Raises:
        UsageError: With the flag, its range and what came.
    """
    with usage():
        for name, smallest in COUNTS.items():
            if given.get(name) is not None:
                flag = f"--{name.replace('_', '-')}"
                check_number(flag, given[name], smallest, 2**31 - 1, integer=True)
        try:
            torch.empty(0, device=given.get("device", "cpu"))
        # The latter from a torch that was built without the device.
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                "Expected --device to be one that torch has here, as cpu, but got "
                f"{given['device']!r}: {reason}"
            ) from error
