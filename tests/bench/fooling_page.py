"""docs/research/fooling.md, of the records of fooling.py; tables.py writes it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from page import percent

from tie_ext.app.report import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "fooling"
SHOWN = ("10", "30", "100")
"""Steps of ascent in the tables; the figure has all."""
MARKED = f"after {' / '.join(SHOWN)} steps of ascent, mean over the kinds of start, / by the generator"
HUNTED = ("20", "30", "50")
"""Steps of ascent by which the trial is judged."""
HARDEST = 8
"""Detectors in the first table."""
BAR = 0.5
"""What a network taught by inversions may be found, in shares of what the same detector is without them."""
FAMILIES = {
    "head on every layer": ("plain", "loop", "loop-search", "search"),
    "linear logit": ("procedural", "tie", "tie-search", ""),
}
"""Networks without inversions and search, with inversions, with both, and with search alone."""
Who = tuple[str, str]
"""Network and detector."""
HEAD = """# Fooling images: what is found by somebody who searches

Made by `python tests/bench/tables.py` of the records in `docs/results/fooling/`, which hold their commands. A searcher looks for images that a
finished network takes for a class. Nothing that is found need look like the class.

- *Gradient ascent* on the class's probability, in steps of 1 % of the value range along the gradient's sign, from uniform noise, from procedural
  images or from OOD test images.
- *Generator*: one that starts afresh and is trained against the frozen network, 200 steps.

*Blind*: the searcher sees the ID logits. *Adaptive*: it sees the detector too, whatever that computes, and stops when it is accepted. An image is
*found* where the detector accepts it *and* the network calls it the class asked for. Given enough steps an adaptive searcher fools nearly every
detector: what tells them apart is how many it takes. A detector that gives a searcher no gradient looks hard to fool, until somebody searches by
another of the same network. So every detector sees what was found by all of them, and *the strongest searcher* counts. `tie_ext/bench/fooling.py` has
the formulas.

Lines reject 5 % of ID images; *level 1* is the garbage class's own decision, without a line. *Combined* is what `tie_ext.combine` makes of garbage
class, ViM and GEN; *combined, largest* the same with `rule="max"`. Networks, so far as a record has them:

- *plain*, with the head of `attach`; *procedural*, a linear garbage class taught by procedural images alone.
- *loop*, the default of `tie-ext train`, the head taught by procedural images and inversions; *tie*, the paper's linear logit, by noise and
  inversions.
- *loop-search* and *tie-search*, both with `--search 5 --lr 0.003`: what a batch has of the pool is moved first, by five steps, to where the network
  is surest. Both pools begin with procedural images. *search*: the same with `--synthesizer none`, which makes no inversions.
- *acet* and *acet-procedural*, trained as *plain* is, but against noise or procedural images moved likewise (the paper's ACET: 40 steps), with the
  head of `attach`; *hunted*, the head of `attach` taught again by what searchers found.

Percent. Small is good.
"""


def page() -> str:
    """The page; empty where there are no records yet."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]
    return "\n".join([HEAD, *(part for record in records for part in _section(record)), *_long(), *_hunted()]) if records else ""


def _long() -> list[str]:
    """What other generators find, and longer ones."""
    parts = []
    for path in sorted((RESULTS / "long").glob("*.json")):
        record = json.loads(path.read_text())
        found: dict[Who, dict[str, float]] = {}
        for row in record["rows"]:
            search = f"{row['steps']} steps, seed {row['seed']}"
            for label, share in row["found"].items():
                most = found.setdefault((row["network"], label), {})
                most[search] = max(most.get(search, 0.0), share)
        rows = [{"network: detector": ": ".join(who), **{search: percent([share], 0) for search, share in of.items()}} for who, of in found.items()]
        said = "Adaptive to either combination, the more that was found; every detector of the network sees the images.\n"
        parts += [f"## Other generators, and longer ones: {path.stem}\n", f"    python tests/bench/{record['command']}\n", said, table(rows), ""]
    return parts


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
        *_not_searched(record),
        *_hardest(record["rows"], record["accuracy"]),
    ]
    titles = {
        "strongest": f"By the strongest searcher, found after {steps} steps:",
        "blind": f"Blind, found after {steps} steps:",
        "adaptive": f"Adaptive, found after {steps} steps:",
        "judged": "Adaptive, of the found, called the class asked for *and* accepted by networks trained apart, by their own combination:",
        "confidence": "Adaptive, mean probability of the class asked for, of the found:",
    }
    for what, title in titles.items():
        rows = _rows(record["rows"], what)
        if rows:
            parts += [title + "\n", table(rows), ""]
    return [*parts, f"![Images found, adaptive](../figures/fooling_{stem}.png)\n", *_decided(record["rows"])]


def _not_searched(record: dict) -> list[str]:
    """What becomes of images that nobody searched for."""
    sets = [what for what in next(iter(record["garbage"].values())) if what != "id"]
    rows = []
    for name, of in record["garbage"].items():
        rows.append({"network: detector": f"{name}: in garbage", "ID": percent([of["id"]]), **{what: percent([of[what]]) for what in sets}})
        for label in ("combined", "combined, largest"):
            if label in record["false_alarms"][name]:
                shares = {what: percent([record["rejected"][name][what][label]]) for what in sets}
                rows.append({"network: detector": f"{name}: {label}", "ID": percent([record["false_alarms"][name][label]]), **shares})
    return ["Images that nobody searched for, rejected:\n", table(rows), ""]


def strongest(rows: Sequence[dict]) -> dict[Who, dict[str, dict[str, float]]]:
    """The most that any searcher found, by network and detector, kind of start, and steps (``found`` of a generator)."""
    most: dict[Who, dict[str, dict[str, float]]] = {}
    for row in rows:
        kind = most.setdefault((row["network"], row["detector"]), {}).setdefault(row["searcher"], {})
        for mark, share in ({mark: row["path"][mark] for mark in SHOWN} if "path" in row else {"found": row["found"]}).items():
            kind[mark] = max(kind.get(mark, 0.0), share)
    return most


def _found(kinds: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Found by ascent after each of the steps, mean over the kinds of start, and last by the generator, where there was one."""
    ascent = [mean(of[mark] for of in kinds.values() if mark in of) for mark in SHOWN]
    return ascent + [of["found"] for of in kinds.values() if "found" in of]


def _joined(shares: Sequence[float]) -> str:
    return " / ".join(percent([share], 0) for share in shares)


def _hardest(rows: Sequence[dict], accuracy: Mapping[str, float]) -> list[str]:
    """The detectors against which least is found by the strongest searcher."""
    found = {who: _found(kinds) for who, kinds in strongest(rows).items()}
    last = len(SHOWN) - 1
    shown = [
        {"network: detector": ": ".join(who), "ID accuracy": percent([accuracy[who[0]]]), "found": _joined(found[who])}
        for who in sorted(found, key=lambda who: (found[who][last], found[who]))[:HARDEST]
    ]
    return [f"Hardest to fool by the strongest searcher, {MARKED}:\n", table(shown), ""]


def _decided(rows: Sequence[dict]) -> list[str]:
    """Whether inversions, and search in every batch, make searched images harder to find."""
    most = strongest(rows)
    shown, ratios = [], {"inversions": [], "both": [], "search": []}
    for garbage, networks in FAMILIES.items():
        for detector in dict.fromkeys(label for _, label in most):
            found = [_found(most[network, detector]) if (network, detector) in most else [] for network in networks]
            if not found[0] or not any(found[1:]):
                continue
            for what, shares in zip(ratios, found[1:], strict=True):
                ratios[what] += [b / a if a else math.inf for a, b in zip(found[0], shares, strict=False) if a or b]
            cells = zip(("neither", *ratios), found, strict=True)
            shown.append({"garbage class: detector": f"{garbage}: {detector}", **{what: _joined(shares) or "-" for what, shares in cells}})
    if not shown:
        return []
    said = [
        f"with {what} {min(of):.2f} to {max(of):.2f}, {'held' if max(of) <= BAR else 'not held'}"
        + (" (inf: some, where there was nothing)" if math.inf in of else "")
        for what, of in ratios.items()
        if of
    ]
    return [
        "### Do inversions help, and does search?\n",
        f"The same detector with neither inversions nor search in every batch, with inversions, with both, with search; {MARKED}. The bar: at most "
        f"{BAR:g} of what is found with neither, in each of these. It is {'; '.join(said)}. The networks differ in "
        "their learning rate too (*plain*: SGD; *loop*: 0.001; with search 0.003, chosen by looking at FashionMNIST), and *tie* begins with noise.\n",
        table(shown),
        "",
        *_beside_the_rival(most),
    ]


def _beside_the_rival(most: Mapping[Who, dict[str, dict[str, float]]]) -> list[str]:
    """The issue's other bars: beside ACET, the best rival."""
    rival, own = ("acet-procedural", "combined, largest"), ("loop-search", "combined, largest")
    if rival not in most or own not in most:
        return []
    return [
        f"The best rival is ACET from drawn images (*acet-procedural*: combined, largest), which is what the search in the loop does: "
        f"{_joined(_found(most[rival]))} beside {_joined(_found(most[own]))} of *loop-search*. "
        "So the loop cannot have half of what the best rival has.\n"
    ]


def _rows(rows: list[dict], what: str) -> list[dict]:
    """A row for each network and detector, a column for each searcher."""
    searchers = dict.fromkeys(row["searcher"] for row in rows)
    if what == "strongest":
        cells = {(*who, kind): _shares(of) for who, kinds in strongest(rows).items() for kind, of in kinds.items()}
    else:
        chosen = [row for row in rows if row["form"] == ("blind" if what == "blind" else "adaptive")]
        cells = {(row["network"], row["detector"], row["searcher"]): _cell(row, what) for row in chosen}
    who = dict.fromkeys(key[:2] for key in cells)
    return [{"network: detector": ": ".join(label), **{searcher: cells.get((*label, searcher), "-") for searcher in searchers}} for label in who]


def _cell(row: dict, what: str) -> str:
    if what in ("judged", "confidence"):
        return "-" if row[what] is None else percent([row[what]], 0)
    return _shares(row.get("path") or row)


def _shares(of: Mapping[str, float]) -> str:
    """Found by a generator, or after each of the steps."""
    return _joined([of["found"]] if "found" in of else [of[mark] for mark in SHOWN])
