"""Results as text tables and sentences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tie_ext.cli.evaluation import COMBINED, FALSE_ALARM

WORDS = (
    "Percent. AUROC: how often an OOD image scores above an ID image; 50 is chance.",
    "FPR@95: ID images that are rejected where 95 % of the OOD images are.",
    "In garbage: rejected by the garbage class (level 1), without a threshold.",
    "ID rejected: by the garbage class or by uncertainty (level 2), without one on the score.",
)
"""What the columns of the tables are."""


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as an aligned Markdown table, with the columns of the first row."""
    columns = list(rows[0])
    cells = [columns, *([str(row.get(c, "-")) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells]
    first, *others = [f"| {' | '.join(line)} |" for line in padded]
    return "\n".join([first, "|" + "|".join("-" * (w + 2) for w in widths) + "|", *others])


def id_rows(methods: Mapping[str, Mapping]) -> list[dict[str, object]]:
    """What each method does to ID test images, in percent."""
    keys = {"ID accuracy": "accuracy", "ID in garbage": "id_garbage_rate"}
    keys["ID rejected"] = "id_rejected"
    rows: list[dict[str, object]] = []
    for label, numbers in methods.items():
        shares = {k: f"{100 * numbers[v]:.2f}" if v in numbers else "-" for k, v in keys.items()}
        rows.append({"method": label, **shares})
    return rows


def ood_rows(methods: Mapping[str, Mapping]) -> list[dict[str, object]]:
    """Metrics of each method, score and OOD set, in percent."""
    rows: list[dict[str, object]] = []
    for label, numbers in methods.items():
        rate = numbers.get("garbage_rate")
        for score, sets in numbers["scores"].items():
            for name, m in sets.items():
                row = {"method": label if score == "score" else f"{label}, {score}", "OOD": name}
                row |= {"AUROC": f"{100 * m['auroc']:.2f}", "FPR@95": f"{100 * m['fpr95']:.2f}"}
                row["in garbage"] = f"{100 * rate[name]:.1f}" if rate else "-"
                rows.append(row)
    return rows


def summary(label: str, numbers: Mapping, folder: Path) -> str:
    """What a command says of a finished run."""
    tables = f"{table(id_rows({label: numbers}))}\n\n{table(ood_rows({label: numbers}))}"
    return f"{tables}\n{decides(numbers)}run: {folder}; figures: tie-ext report {folder}"


def decides(numbers: Mapping) -> str:
    """A line on how ``tie-ext score`` decides, where that is not the rule of the first table."""
    if COMBINED not in numbers["scores"]:
        return ""
    return (
        "tie-ext score decides by the combined score, with a threshold that rejects at most "
        f"{FALSE_ALARM:.0%} of new ID images on average (another: --false-alarm); the first table "
        "is of the network's own rule\n"
    )


def idle(log: Sequence[Mapping]) -> str:
    """A line where candidates were proposed and none was excluded in any epoch: the loop then adds
    nothing to what the pool was filled with.
    """
    taus = [entry["tau"] for entry in log if entry["tau"] is not None]
    excluded, proposed = (
        any(sum(entry[key]) for entry in log) for key in ("excluded", "proposed")
    )
    if not taus or excluded or not proposed:
        return ""
    return (
        "no candidate was uncertain enough to become garbage in any epoch: tau was at least "
        f"{min(taus):.2f}, and uncertainty is at most 1. The network is not sure enough of its "
        "training images: train it longer, or give a smaller --lam\n"
    )
