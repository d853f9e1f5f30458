"""The command line: ``tie-ext demo | train | attach | score | report | explain | reproduce``. The only room that prints."""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tie_ext.cli.flags import UsageError, check_flags, make_parser, recipe_of, usage
from tie_ext.models.backbones import BACKBONES
from tie_ext.training.config import TIEConfig
from tie_ext.training.recipe import Recipe
from tie_ext.utils.checks import check_number
from tie_ext.utils.files import load_state

if TYPE_CHECKING:
    from tie_ext.cli.settings import RunSettings

# 1348 small images: fewer of everything. Digits of 8x8 pixels fill the image, so they are not shifted; without the shift garbage of full weight
# costs ID accuracy, and tau, which comes from training images then known by heart, needs a larger lambda (docs/research/ledger.md).
DEMO = Recipe(
    TIEConfig(epochs=10, lam=5.0, garbage_weight=0.1, candidates=1100, pool_size=1000),
    {"inversion": {"steps": 40, "width": 16}},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see ``tie-ext --help``.

    Returns:
        0 when done, 1 where the input is not as expected, 2 where the flags are not, 130 when interrupted.
    """
    a = make_parser().parse_args(arguments)
    try:
        with _output():
            COMMANDS[a.name](a)
    except ModuleNotFoundError as error:
        print(
            f"tie-ext: {error}; pip install 'tie_ext[cli]' brings what the command line needs",
            file=sys.stderr,
        )
        return 1
    except UsageError as error:
        print(f"tie-ext: {error}", file=sys.stderr)
        return 2
    except (
        ValueError,
        OSError,
        FloatingPointError,
        ImportError,
    ) as error:  # the last where OpenOOD is asked for and not there
        # Of our own errors the text alone, without the number that Python puts before it.
        said = (
            error.strerror
            if isinstance(error, OSError) and error.strerror and error.filename is None
            else error
        )
        print(f"tie-ext: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hints = {"reproduce": "; finished cells and epochs are kept, go on with the same command"}
        if a.name == "train":
            run = vars(a).get("out") or vars(a).get("resume")
            hints["train"] = (
                f"; finished epochs are kept, go on with: tie-ext train --resume {run}"
            )
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
        if (
            error.errno is not None
            and error.filename is None
            and not str(error.strerror or error).startswith("Expected")
        ):
            with suppress(OSError, ValueError):
                os.dup2(
                    os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
                )  # or Python would try again when it ends
            raise OSError(
                error.errno,
                f"Expected to write to the standard output, but got: {error.strerror or error}",
            ) from error
        raise


def _reproduce(a: argparse.Namespace) -> None:
    from tie_ext.cli import data
    from tie_ext.cli.reproduce import comparison, run

    check_flags(vars(a))
    with usage():
        for method in a.methods or ():
            comparison.check_method(method)
        for name in a.data or ():
            if name.partition(":")[0] not in data.NAMES:
                raise ValueError(
                    f"Expected a data set, one of {', '.join(data.NAMES)} or some of its classes (NAME:0-4), but got {name!r}"
                )
        for seed in a.seeds:
            check_number("--seeds", seed, 0, 2**31 - 1, integer=True)
    chosen = {
        name: tuple(value)
        for name, value in (("sets", a.data), ("methods", a.methods), ("seeds", a.seeds))
        if value
    }
    plan = run.Plan(
        root=a.root, images=a.images, download=a.download, recipe=recipe_of(vars(a)), **chosen
    )
    missing = run.run(plan, a.out, a.device, _interactive())
    for reason in missing:
        print(f"not run: {reason}")
    print(f"tables: {a.out / 'tables.md'}")


def _demo(a: argparse.Namespace) -> None:
    from tie_ext.cli import report
    from tie_ext.cli.calibrate_run import combined_scores
    from tie_ext.cli.evaluation import evaluate
    from tie_ext.cli.folder import clear
    from tie_ext.cli.reproduce import comparison
    from tie_ext.cli.settings import RunSettings, load_images
    from tie_ext.cli.train_run import train_on
    from tie_ext.utils.files import locked, save_state, write_json

    check_flags(vars(a))
    start = time.perf_counter()
    settings = RunSettings(
        data="demo",
        batch_size=32,
        shift=0,
        recipe=replace(DEMO, config=replace(DEMO.config, seed=a.seed)),
    )
    images, test, ood = load_images(settings, a.seed)
    _check_place(a.out, settings)
    print(
        f"{len(images)} digits to train on, {len(test)} to test; OOD: {', '.join(f'{len(s)} {name}' for name, s in ood.items())}"
    )
    with locked(a.out):
        _check_place(a.out, settings)  # again, as another process may have been at it
        clear(a.out)
        print("1 of 2: TIE, a network trained with its garbage class", flush=True)
        record = train_on(a.out, settings, images, test, ood, progress=_interactive())
        numbers, scores = (
            {"TIE": record["numbers"]},
            load_state(a.out / "scores.safetensors", "scores"),
        )
        print("2 of 2: a plain network, and a garbage class attached to it", flush=True)
        plain, _ = comparison.train_method(
            "plain",
            BACKBONES["conv3"],
            images,
            settings.recipe,
            settings.batch_size,
            progress=_interactive(),
            shift=0,
        )
        nets = {
            "attach": comparison.attached(plain, images, a.seed, _interactive()),
            "plain": plain,
        }
        for method, net in nets.items():
            numbers[comparison.LABELS[method]], values = evaluate(
                net, test, ood, images, comparison.has_garbage(method)
            )
            if method == "attach":
                metrics, combined = combined_scores(net, images, test, ood)
                numbers[comparison.LABELS[method]]["scores"] |= metrics
                values |= combined
            scores |= {
                comparison.LABELS[method] if label == "score" else label: sets
                for label, sets in values.items()
            }
        save_state(a.out / "scores.safetensors", "scores", scores)
        write_json(a.out / "run.json", {**record, "comparison": numbers})
    print(report.tables(numbers))
    print("\n".join(report.WORDS))
    print(f"seed {a.seed}, {time.perf_counter() - start:.0f} s of training and scoring")
    print(f"report: {report.write_report(a.out)}\ndetector: {a.out / 'network.safetensors'}")


def _check_place(folder: Path, settings: "RunSettings") -> None:
    """Refuse a folder that holds anything of a run but the demo of before, which gives way."""
    from tie_ext.cli.folder import written

    if (there := written(folder)) and not _is_demo(folder, settings):
        raise ValueError(
            f"Expected a folder for the demo, but got {folder}, which holds {there[-1].name} of something else; give another --out"
        )


def _is_demo(folder: Path, settings: "RunSettings") -> bool:
    """Whether a folder holds a demo: a finished one, or one that was stopped and has these settings, whatever its seed."""
    from tie_ext.cli.folder import read_settings

    try:
        record = json.loads((folder / "run.json").read_text())
        if record["settings"]["data"] != "demo":
            return False
        if "comparison" in record:  # by whatever version
            return True
        theirs = read_settings(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    config = replace(theirs.recipe.config, seed=settings.recipe.config.seed)
    return (
        replace(theirs, recipe=replace(theirs.recipe, config=config)).record() == settings.record()
    )


def _train(a: argparse.Namespace) -> None:
    from tie_ext.cli import data, processes, registry, report
    from tie_ext.cli.settings import RunSettings
    from tie_ext.cli.train_run import train_run

    check_flags(vars(a))
    given = {name: value for name, value in vars(a).items() if name not in ("name", "device")}
    folder, settings = given.get("resume"), None
    if folder is not None:
        if other := sorted(set(given) - {"resume"}):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in other)
            raise UsageError(
                f"Expected --resume RUN alone or with --device, but got {flags} too; a run keeps its settings"
            )
    elif "data" not in given or "out" not in given:
        raise UsageError(
            "Expected --data and --out (or --resume RUN), but got neither or only one of them"
        )
    else:
        given = {"head": "multilayer", **given}
        folder, recipe = (
            given.pop("out"),
            recipe_of(
                {"prior": "procedural" if given["head"] == "multilayer" else "multiscale", **given}
            ),
        )
        for name in ("ood", "val_ood", "mean", "std"):
            given[name] = tuple(given.get(name, ()))
        given.setdefault("backbone", "conv3" if data.own_shape(given["data"])[0] == 1 else "conv5")
        with usage():
            registry.check_name(given["backbone"])
            settings = RunSettings(
                **{f.name: given[f.name] for f in fields(RunSettings) if f.name in given},
                recipe=recipe,
            )
    with processes.together(a.device) as device:
        first = processes.first()
        record = train_run(
            folder,
            settings,
            device,
            progress=first and _interactive(),
            say=print if first else None,
        )
    if not first:
        return
    print(report.tables({"TIE": record["numbers"]}))
    print(report.worst_validation(record["numbers"]), end="")
    print(report.decides(record["numbers"]), end="")
    print(report.idle(record["log"]), end="")
    print(f"run: {folder}; pictures: tie-ext report {folder}")


def _attach(a: argparse.Namespace) -> None:
    from tie_ext.cli import attach_run, registry, report

    check_flags(vars(a))
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(a).items()
    }
    with usage():
        registry.check_name(a.backbone)
        settings = attach_run.AttachSettings(
            **{f.name: given[f.name] for f in fields(attach_run.AttachSettings) if f.name in given}
        )
    numbers = attach_run.attach_run(a.out, settings, a.device, progress=_interactive(), say=print)[
        "numbers"
    ]
    print(report.tables({attach_run.LABEL: numbers}))
    print(report.worst_validation(numbers), end="")
    print(report.decides(numbers), end="")
    print("ID accuracy is that of the network as it came")
    print(f"run: {a.out}; pictures: tie-ext report {a.out}")


def _score(a: argparse.Namespace) -> None:
    from tie_ext.cli import score
    from tie_ext.cli.decide_run import decider
    from tie_ext.cli.folder import load_network

    check_flags({"device": a.device})
    if a.false_alarm is not None:
        with usage():
            check_number("--false-alarm", a.false_alarm, 0, 1, above=True)
    net = load_network(a.run).to(a.device)
    decide = decider(net, a.run, a.false_alarm)
    rows = score.scored(
        net,
        decide,
        score.listed(a.images),
        a.every_label,
        _interactive() and (a.out is not None or not sys.stdout.isatty()),
    )
    broken = []
    with _written(a.out) as out:
        table = (
            csv.DictWriter(out, score.COLUMNS, lineterminator="\n") if a.format == "csv" else None
        )
        for i, (row, error) in enumerate(rows):
            if table and i == 0:
                table.writeheader()
            if table:
                table.writerow(row)
            else:
                out.write(json.dumps(row) + "\n")
            if error is not None:
                broken.append(error)
            if (i + 1) % score.BATCH == 0:
                out.flush()
    if broken:
        raise ValueError(
            broken[0]
            + (
                f"; {len(broken) - 1} others are none either, see {score.UNREADABLE!r}"
                if len(broken) > 1
                else ""
            )
        )


@contextmanager
def _written(path: Path | None) -> Iterator[TextIO]:
    """A file that rows are written to as they come; the standard output where there is no path."""
    if path is None:
        yield sys.stdout
        return
    try:
        with open(path, "w", newline="") as out:
            yield out
    except OSError as error:
        raise OSError(
            f"Expected to write rows to {path}, but got: {error.strerror or error}"
        ) from error


def _report(a: argparse.Namespace) -> None:
    from tie_ext.cli import report

    print(report.write_report(a.run))


def _explain(a: argparse.Namespace) -> None:
    from tie_ext.cli.explain_page import explain_run

    with usage():
        check_number("--steps", a.steps, 1, 10**6, integer=True)
    print(explain_run(a.run, a.steps, a.root, _interactive()))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "demo": _demo,
    "train": _train,
    "attach": _attach,
    "score": _score,
    "report": _report,
    "explain": _explain,
    "reproduce": _reproduce,
}
"""What each command does."""


def _interactive() -> bool:
    return sys.stderr.isatty()


if __name__ == "__main__":
    sys.exit(main())
