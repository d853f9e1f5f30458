"""docs/fooling.md, of the records of fooling.py; tables.py writes it."""

import json
from collections import defaultdict
from pathlib import Path

from page import percent

from tie_ext.app.report import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "fooling"
HEAD = """# Fooling images: what is found by somebody who searches

Made by `python tests/bench/tables.py` of the records in `docs/results/fooling/`, which hold their commands. A searcher looks for images that a
finished network takes for a class: by a generator that starts afresh and is trained against the frozen network, or by gradient ascent from uniform
noise, from procedural images or from OOD test images. Nothing that is found need look like the class. *Blind*: the searcher sees the ID
logits. *Adaptive*: it sees the detector too, whatever that computes, and wants to be accepted. `tie_ext/bench/fooling.py` has the formulas.

Percent; mean ± standard deviation over the seeds of the network where there are several. Small is good, but for confidence. In a cell, fewest steps
first.
"""
TITLES = {
    "accepted": "Accepted, where 5 % of ID images are rejected",
    "judged": "Of the accepted, called the class asked for *and* accepted by networks trained apart",
    "confidence": "Mean probability of the class asked for, of all images found",
    "level 0": "Accepted without a threshold: level 0",
    "not level 1": "Not in garbage: level 0 or 2",
}


def groups() -> dict[tuple, list[dict]]:
    """Records of all seeds by data, training images, epochs, backbone, and images found of each class."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*-seed*.json")):
        record = json.loads(path.read_text())
        found[record["data"], record["images"]["train"], record["epochs"], record["backbone"], record["per_class"]].append(record)
    return found


def page() -> str:
    """The page; empty where there are no records yet."""
    if not groups():
        return ""
    parts = [HEAD]
    for (data, images, epochs, backbone, per_class), records in groups().items():
        seeds = ", ".join(str(record["seed"]) for record in records)
        parts.append(f"## {data}, {images} images, {epochs} epochs, {backbone}, seed {seeds}\n")
        judges = sorted({name for record in records for name in record["judges"]})
        rates = [rate for record in records for of in record["false_alarms"].values() for rate in of.values()]
        kinds = "; ".join(f"{kind} {' / '.join(map(str, steps))}" for kind, steps in _kinds(records).items())
        parts += [
            f"{per_class} images of each class from each start, and from each seed of the generator. Steps: {kinds}.",
            f"False alarms on ID test images: {percent([min(rates)])} to {percent([max(rates)])}. Judges: {', '.join(judges) or 'none yet'}.\n",
            *(f"    python tests/bench/{record['command']}" for record in records),
            "",
            *_sheets(records),
        ]
        for measure, title in TITLES.items():
            rows = [row for form in ("blind", "adaptive") for row in _rows(records, measure, form)]
            if rows:
                parts += [f"{title}:\n", table(rows), ""]
    return "\n".join(parts)


def _sheets(records: list[dict]) -> list[str]:
    """Where the sheets of the first seed are."""
    first = records[0]
    stem = f"{first['data']}-{first['images']['train']}x{first['epochs']}-{first['backbone']}-seed{first['seed']}"
    links = [f"[{path.stem.removeprefix(stem + '-')}](results/fooling/{path.name})" for path in sorted(RESULTS.glob(f"{stem}-*.png"))]
    if not links:
        return []
    return [f"Images accepted, a row for each detector as in the tables, blind at the left, adaptive at the right: {', '.join(links)}.\n"]


def _kinds(records: list[dict]) -> dict[str, list[int]]:
    """Steps of each kind of searcher that all records have."""
    common = set.intersection(*({row["searcher"] for row in record["rows"]} for record in records))
    kinds: dict[str, list[int]] = defaultdict(list)
    for searcher in dict.fromkeys(row["searcher"] for row in records[0]["rows"]):
        if searcher in common:
            kind, _, steps = searcher.partition(", ")
            kinds[kind].append(int(steps.partition(" ")[0]))
    return {kind: sorted(steps) for kind, steps in kinds.items()}


def _rows(records: list[dict], measure: str, form: str) -> list[dict]:
    """A row for each network and detector that have a measure, a column for each kind of searcher."""
    values: dict[tuple, list[float]] = defaultdict(list)
    for record in records:
        for row in record["rows"]:
            if row["form"] == form and row.get(measure) is not None:
                values[row["network"], row["detector"], row["searcher"]].append(row[measure])
    rows = []
    for network, detector in dict.fromkeys(key[:2] for key in values):
        row = {"searched, network, detector": f"{form}, {network}, {detector}"}
        for kind, steps in _kinds(records).items():
            cells = [values.get((network, detector, f"{kind}, {count} steps")) for count in steps]
            row[kind] = " / ".join(percent(cell, 1) if cell else "-" for cell in cells)
        rows.append(row)
    return rows
