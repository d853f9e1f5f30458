"""docs/research/fooling.md, of the records of fooling.py; tables.py writes it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from page import percent

from tie_ext.app.report import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "fooling"
SHOWN = ("10", "30", "100")
"""Steps of ascent in the tables; the figure has all."""
HUNTED = ("20", "30", "50")
"""Steps of ascent by which the trial is judged."""
HARDEST = 5
"""Detectors in the first table."""
BAR = 0.5
"""What a network taught by inversions may be found, in shares of what the same detector is without them."""
PAIRS = {
    "head on every layer, score": (("plain", "attach"), ("loop", "garbage class")),
    "head on every layer, level 1": (("plain", "attach, level 1"), ("loop", "level 1")),
    "linear logit, score": (("procedural", "garbage class"), ("tie", "garbage class")),
    "linear logit, level 1": (("procedural", "level 1"), ("tie", "level 1")),
}
"""Network and detector without inversions and with them."""
HEAD = """# Fooling images: what is found by somebody who searches

Made by `python tests/bench/tables.py` of the records in `docs/results/fooling/`, which hold their commands. A searcher looks for images that a
finished network takes for a class. Nothing that is found need look like the class.

- *Gradient ascent* on the class's probability, in steps of 1 % of the value range along the gradient's sign, from uniform noise, from procedural
  images or from OOD test images.
- *Generator*: one that starts afresh and is trained against the frozen network, 200 steps.

*Blind*: the searcher sees the ID logits. *Adaptive*: it sees the detector too, whatever that computes, and stops when it is accepted. An image is
*found* where the detector accepts it *and* the network calls it the class asked for. Given enough steps an adaptive searcher fools nearly every
detector: what tells them apart is how many it takes. Where the blind searcher finds more (MSP), the detector's part of the objective held the
adaptive one back: the stronger of both counts. `tie_ext/bench/fooling.py` has the formulas.

Lines reject 5 % of ID images; *level 1* is the garbage class's own decision, without a line. Networks, so far as a record has them: *plain*, with
the hosts' detectors, the head of `attach`, and what `tie_ext.combine` makes of head, ViM and GEN; *procedural*, a linear garbage class taught by
procedural images alone; *tie*, the paper's linear one, by noise and inversions; *loop*, the default of `tie-ext train`, a head on every layer taught
by procedural images and inversions; *acet*, trained against noise moved to where the network is surest, five steps in each batch (its paper: 40);
*acet-attach*, the same network with attach's head; *acet2-attach*, likewise, but half of what was moved in training began as procedural images;
*hunted*, the head of attach taught again by what searchers found.
"""
NAMES = "\nPercent. Small is good, but for steps.\n"


def page() -> str:
    """The page; empty where there are no records yet."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]
    return "\n".join([HEAD + NAMES, *(part for record in records for part in _section(record)), *_hunted()]) if records else ""


def _hunted() -> list[str]:
    """The trial of a head that is taught by what was found against it."""
    parts = []
    for path in sorted((RESULTS / "hunted").glob("*.json")):
        record = json.loads(path.read_text())
        rows = [
            {
                "round": str(row["round"]) if row["round"] else "0: attach",
                "images kept": row["kept"],
                "false alarms": percent([row["false alarms"]]),
                **{kind: " / ".join(percent([found[mark]], 0) for mark in HUNTED) for kind, found in row["found"].items()},
            }
            for row in record["rounds"]
        ]
        title = f"## A head that is taught by what was found against it: {path.stem}\n"
        said = (
            f"One trial: rounds of adaptive ascent from noise and procedural images ({record['searched']} a round) against the head as it stands; "
            f"all that was found is kept beside procedural images, and the head is taught anew, with fewer ID images ({record['id']}) than attach "
            f"has. Found by adaptive ascent from new starts after {' / '.join(HUNTED)} steps, percent:\n"
        )
        parts += [title, f"    python tests/bench/{record['command']}\n", said, table(rows), ""]
    return parts


def _section(record: dict) -> list[str]:
    stem = f"{record['data']}-{record['images']['train']}x{record['epochs']}-{record['backbone']}-seed{record['seed']}"
    rates = [rate for of in record["false_alarms"].values() for label, rate in of.items() if "level" not in label]
    accuracy = ", ".join(f"{name} {percent([value])}" for name, value in record["accuracy"].items())
    steps = " / ".join(SHOWN)
    parts = [
        f"## {stem}\n",
        f"    python tests/bench/{record['command']}\n",
        f"{record['per_class']} images of each class from each kind of start, and by the generator. ID accuracy: {accuracy}. False alarms on ID test "
        f"images: {percent([min(rates)])} to {percent([max(rates)])}. Judges: {', '.join(record['judges']) or 'none'}.\n",
        f"![Share found against steps](../figures/fooling_steps_{stem}.png)\n",
        *_garbage(record.get("garbage", {})),
        *_hardest(record["rows"], record["accuracy"]),
    ]
    titles = {
        "blind": f"Blind, found after {steps} steps:",
        "adaptive": f"Adaptive, found after {steps} steps:",
        "half": "Adaptive, steps by which half were found (of 0, 1, 2, 3, 5, 10, 20, 30, 50, 100):",
        "judged": "Adaptive, of the found, called the class asked for *and* accepted by networks trained apart, by their own combination:",
        "confidence": "Adaptive, mean probability of the class asked for, of the found:",
    }
    for what, title in titles.items():
        rows = _rows(record["rows"], what)
        if rows:
            parts += [title + "\n", table(rows), ""]
    return [*parts, f"![Images found, adaptive](../figures/fooling_{stem}.png)\n", *_decided(record["rows"])]


def _garbage(rates: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What the garbage class takes of images that nobody searched for."""
    rows = [{"network": name, **{what: percent([rate]) for what, rate in of.items()}} for name, of in rates.items()]
    return ["Images that nobody searched for, in garbage:\n", table(rows), ""] if rows else []


def _hardest(rows: Sequence[dict], accuracy: Mapping[str, float]) -> list[str]:
    """The detectors against which least is found, by the stronger of blind and adaptive ascent, mean over the kinds of start."""
    paths: dict[tuple[str, str], dict[str, list[dict]]] = {}
    for row in rows:
        if "path" in row:
            paths.setdefault((row["network"], row["detector"]), {}).setdefault(row["searcher"], []).append(row["path"])
    found = {who: [mean(max(path[mark] for path in of) for of in kinds.values()) for mark in SHOWN] for who, kinds in paths.items()}
    steps = " / ".join(SHOWN)
    shown = [
        {
            "network: detector": ": ".join(who),
            "ID accuracy": percent([accuracy[who[0]]]),
            f"found after {steps}": " / ".join(percent([share], 0) for share in found[who]),
        }
        for who in sorted(found, key=lambda who: found[who][::-1])[:HARDEST]
    ]
    return [
        f"Hardest to fool, by the stronger of blind and adaptive ascent, mean over the kinds of start; found after {steps} steps:\n",
        table(shown),
        "",
    ]


def _decided(rows: Sequence[dict]) -> list[str]:
    """Whether inversions make searched images harder to find."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["form"] == "adaptive" and "path" in row:
            found.setdefault((row["network"], row["detector"]), []).append(row["path"])
    shown, ratios = [], []
    for label, (without, taught) in PAIRS.items():
        if without in found and taught in found:
            shares = [[mean(path[mark] for path in found[of]) for mark in SHOWN] for of in (without, taught)]
            ratios += [b / a for a, b in zip(*shares, strict=True) if a]
            cells = [" / ".join(percent([share], 0) for share in of) for of in shares]
            shown.append({"garbage class": label, "without inversions": cells[0], "with inversions": cells[1]})
    if not shown:
        return []
    held = max(ratios) <= BAR
    return [
        f"### Do inversions help? {'Yes' if held else 'No'}\n",
        f"The same detector taught by procedural images alone, and by inversions too. Adaptive ascent, found after {' / '.join(SHOWN)} steps, mean "
        f"over the kinds of start. The bar: with inversions at most {BAR:g} of what is found without, at each of these steps. It is "
        f"{'held' if held else 'not held'}: {min(ratios):.2f} to {max(ratios):.2f}."
        + ("" if held else " So inversions are for pictures ([explain.md](explain.md)), and no defence."),
        "",
        table(shown),
        "",
    ]


def _rows(rows: list[dict], what: str) -> list[dict]:
    """A row for each network and detector, a column for each searcher."""
    form = "blind" if what == "blind" else "adaptive"
    chosen = [row for row in rows if row["form"] == form and not (what == "half" and "path" not in row)]
    searchers = dict.fromkeys(row["searcher"] for row in chosen)
    cells = {(row["network"], row["detector"], row["searcher"]): _cell(row, what) for row in chosen}
    who = dict.fromkeys(key[:2] for key in cells)
    return [{"network: detector": ": ".join(label), **{searcher: cells.get((*label, searcher), "-") for searcher in searchers}} for label in who]


def _cell(row: dict, what: str) -> str:
    if what == "half":
        return "-" if row["half"] is None else str(row["half"])
    if what in ("judged", "confidence"):
        return "-" if row[what] is None else percent([row[what]], 0)
    return " / ".join(percent([row["path"][mark]], 0) for mark in SHOWN) if "path" in row else percent([row["found"]], 0)
