"""``tie-ext report``: what a run decided, with images, figures and settings, on one web page."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from tie_ext.cli import figures, page, rejected
from tie_ext.cli.batches import scaled
from tie_ext.cli.flags import UsageError
from tie_ext.cli.folder import OWN, STATE, is_attached, load_run, read_record
from tie_ext.cli.score import LEVELS
from tie_ext.cli.snapshots import load_examples, load_snapshots
from tie_ext.cli.tables import WORDS, decides, id_rows, idle, ood_rows
from tie_ext.utils.files import load_state, reading

Snapshots = Mapping[int, Mapping[str, Tensor]]
SHOWN = 10
"""Images shown of a set, half of them accepted where it has so many."""


def run(flags: Namespace) -> None:
    """Write the page, and print its path."""
    if flags.images is not None:
        rejected.run(flags)
    elif flags.export is not None:
        raise UsageError("Expected --images FOLDER beside --export, but got it alone")
    else:
        print(write_report(flags.run))


def write_report(folder: Path) -> Path:
    """Write ``RUN/report.html``: what was decided, examples, scores, one table; figures, further
    tables and settings below, folded away.

    Returns:
        The page, which needs no other file and no network.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If no epoch of it is finished, or a file is damaged, foreign or of another run.
        OSError: If the page cannot be written.
    """
    record, snapshots = read_record(folder), load_snapshots(folder)
    if not snapshots:
        raise ValueError(
            f"Expected a run with at least one finished epoch at {folder}, but got none"
        )
    with reading(f"a run whose files are of one network at {folder}"):
        body = list(_body(folder, record, snapshots))
    return page.write_page(folder / "report.html", folder.resolve().name, lead(record), body)


def lead(record: Mapping) -> str:
    """What was decided, in a sentence or two."""
    if "numbers" not in record:
        return "The run has not reached its last epoch; there are no test scores yet."
    numbers = record["numbers"]
    decision = numbers.get("decision", numbers)
    name, share = min(decision["rejected"].items(), key=lambda item: item[1])
    promise = ""
    if "false_alarm" in decision:
        promise = f" The detector rejects at most {decision['false_alarm']:.0%} of new images of "
        promise += "its classes on average."
    return (
        f"The network is {numbers['accuracy']:.1%} accurate on its classes.{promise} Of other "
        f"images it rejects {share:.1%} ({name}) or more."
    )


def _cards(numbers: Mapping) -> Iterator[page.Card]:
    decision = numbers.get("decision", numbers)
    promised = decision.get("false_alarm", 1)
    yield page.Card(f"{numbers['accuracy']:.1%}", "accuracy on the network's classes")
    if promised < 1:
        yield page.Card(f"{promised:.0%}", "false alarms promised, at most, on average")
    measured = decision.get("measured", decision.get("id_rejected"))
    if measured is not None:
        wrong = measured > 2 * promised
        yield page.Card(f"{measured:.1%}", "false alarms measured on new images", wrong)
    for name, share in decision["rejected"].items():
        yield page.Card(f"{share:.1%}", f"of {name} rejected", share < 0.5)


def _body(folder: Path, record: Mapping, snapshots: Snapshots) -> Iterator[str]:
    """The page from top to bottom."""
    net, _, decide = load_run(folder)
    names = [*(net.class_names or map(str, range(net.num_classes))), "garbage"]
    path, numbers = folder / "scores.safetensors", record.get("numbers")
    scores = load_state(path, "scores") if path.is_file() else {}
    if numbers:
        yield page.cards(_cards(numbers))
        if examples := load_examples(folder):
            shown = (
                page.gallery(
                    TITLES.get(name, name), _shown(x, decide(scaled(x, net)), name, names)
                )
                for name, x in examples.items()
            )
            yield page.section("Accepted and rejected", page.paragraph(EXAMPLES), *shown)
        for label in list(scores)[-1:]:  # the combination, where there is one
            drawn = figures.histograms(scores[label])
            yield page.section("Scores", page.figure(HISTOGRAM, drawn))
        yield page.section("Sets", page.table(_sets(numbers)), page.paragraph(" ".join(WORDS[:2])))
    attached = is_attached(record)
    log = [] if attached else load_state(folder / STATE, "training", ("log",))["log"]
    for title, caption, drawn in _figures(record, snapshots, log, names, scores):
        yield page.section(title, page.figure(caption, drawn), folded=True)
    if numbers:
        methods = {OWN[attached]: numbers}
        words = " ".join((*WORDS, decides(numbers)))
        parts = page.table(id_rows(methods)), page.table(ood_rows(methods)), page.paragraph(words)
        yield page.section("All scores", *parts, folded=True)
    settings = {k: v for k, v in record.items() if k not in ("log", "numbers")}
    text = page.preformatted(json.dumps(settings, indent=1))
    yield page.section("Settings and versions", text, folded=True)


def _shown(x: Tensor, decision, name: str, names: Sequence[str]) -> Iterator[page.Shown]:
    """Some accepted images of a set, then some rejected ones, from all over it."""
    sides = [((decision.level > 0) == side).nonzero().flatten() for side in (False, True)]
    for refused, (rows, others) in enumerate(zip(sides, sides[::-1], strict=True)):
        for row in figures.spread(rows, max(SHOWN // 2, SHOWN - len(others))):
            label, score = names[int(decision.label[row])], decision.score[row]
            word = LEVELS[int(decision.level[row])]
            caption = f"{word}, {label}, {score:.1f}"
            yield page.Shown(x[row], caption, bool(refused) == (name == "id"))


def _sets(numbers: Mapping) -> list[dict[str, object]]:
    """A row for each set of images that are of none of the classes."""
    scores, rejected = numbers["scores"], numbers.get("decision", numbers)["rejected"]
    best = list(scores)[-1]  # the combination, where there is one
    return [
        {
            "images": row["OOD"],
            **{column: row[column] for column in ("AUROC", "FPR@95")},
            "rejected": f"{100 * rejected[row['OOD']]:.1f}" if row["OOD"] in rejected else "-",
            "in garbage": row["in garbage"],
        }
        for row in ood_rows({"": {**numbers, "scores": {best: scores[best]}}})
    ]


def _figures(
    record: Mapping,
    snapshots: Snapshots,
    log: Sequence[Mapping],
    names: Sequence[str],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[tuple[str, str, Figure]]:
    """Title, caption and figure."""
    last = snapshots[max(snapshots)]
    if "inversions" in last:
        title = "Inversions: what each class looks like to the network"
        grid = figures.inversions_over_epochs(snapshots, names)
        yield title, "One inversion of each output over the epochs", grid
        grid = figures.inversion_grid(last["inversions"], names)
        yield "Inversions after the last epoch", "A row for each output", grid
    recipe = record["settings"].get("recipe", {})
    for i, name in enumerate(recipe.get("synthesizers", ["procedural"])):
        if (key := f"outliers_{i}") in last:
            grid = figures.inversion_grid(last[key][None], [""])
            yield f"Outliers: {name}", "Some of those that garbage is learned from", grid
    if log:
        caption = (
            "Proposed outliers by the output they were aimed at: entropy, confidence, margin, "
            f"uncertainty; {idle(log)}"
        )
        curves = figures.metric_curves(log, names)
        yield "Proposed outliers over the epochs", caption.strip("; \n"), curves
    caption = "Features of test images and garbage (t-SNE)"
    yield "Features", caption, figures.feature_map(snapshots, names)
    for label, of in scores.items():
        caption = f"{label}: ROC and precision-recall, OOD positive"
        yield f"Curves: {label}", caption, figures.roc_and_pr(of)


TITLES = {"id": "Images of the classes"}
EXAMPLES = (
    "Test images with the decision (garbage: the garbage class takes the image; uncertain: its "
    "score is above the threshold), the nearest class and the score. Larger score: more unlike "
    "the training images. Framed: a mistake."
)
HISTOGRAM = "Scores of held-out images of the classes (id) and of other images; dotted: threshold"
