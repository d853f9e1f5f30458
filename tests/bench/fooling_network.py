"""What docs/research/fooling_networks.md says of a record of fooling.py: all that was found against the networks trained on the same images."""

from collections.abc import Mapping, Sequence
from statistics import mean

from page import percent

from tie_ext.cli.tables import table

SHOWN = ("10", "30", "100")
"""Steps of ascent in the tables; the figure has all."""
MARKED = (
    f"after {' / '.join(SHOWN)} steps of ascent, mean over the kinds of start, / by the generator"
)
HARDEST = 8
"""Detectors in the first table."""
EVERYWHERE = ("blind", "garbage class", "combined", "combined, largest", "level 1")
"""What searchers see whose images every detector is judged by: one that sees another detector is there on some networks alone."""
Who = tuple[str, str]
"""Network and detector."""


def stem_of(record: dict) -> str:
    """The name of a record's network."""
    return f"{record['data']}-{record['images']['train']}x{record['epochs']}-{record['backbone']}-seed{record['seed']}"


def section(record: dict) -> list[str]:
    """All tables and figures of a record."""
    stem = stem_of(record)
    rates = [
        rate
        for of in record["false_alarms"].values()
        for label, rate in of.items()
        if "level" not in label
    ]
    accuracy = ", ".join(
        f"{name} {percent([value])}" for name, value in record["accuracy"].items()
    )
    steps = " / ".join(SHOWN)
    parts = [
        f"## {stem}\n",
        f"    python tests/bench/{record['command']}\n",
        f"{record['per_class']} images of each class from each kind of start, and by the generator. ID accuracy: {accuracy}. False alarms on ID test "
        f"images: {percent([min(rates)])} to {percent([max(rates)])}. Judges: {', '.join(record['judges']) or 'none'}.\n",
        f"![Share found against steps](../figures/fooling_steps_{stem}.png)\n",
        *_not_searched(record),
        *hardest(record["rows"], record["accuracy"]),
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
    return [*parts, f"![Images found, adaptive](../figures/fooling_{stem}.png)\n"]


def _not_searched(record: dict) -> list[str]:
    """What becomes of images that nobody searched for."""
    sets = [what for what in next(iter(record["garbage"].values())) if what != "id"]
    rows = []
    for name, of in record["garbage"].items():
        rows.append(
            {
                "network: detector": f"{name}: in garbage",
                "ID": percent([of["id"]]),
                **{what: percent([of[what]]) for what in sets},
            }
        )
        for label in ("combined", "combined, largest"):
            if label in record["false_alarms"][name]:
                shares = {what: percent([record["rejected"][name][what][label]]) for what in sets}
                rows.append(
                    {
                        "network: detector": f"{name}: {label}",
                        "ID": percent([record["false_alarms"][name][label]]),
                        **shares,
                    }
                )
    return ["Images that nobody searched for, rejected:\n", table(rows), ""]


def strongest(rows: Sequence[dict]) -> dict[Who, dict[str, dict[str, float]]]:
    """The most that any searcher found who sees the detector or one of :data:`EVERYWHERE`, by network and detector, kind of start, and steps
    (``found`` of a generator)."""
    most: dict[Who, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["seen"] not in (*EVERYWHERE, row["detector"]):
            continue
        kind = most.setdefault((row["network"], row["detector"]), {}).setdefault(
            row["searcher"], {}
        )
        for mark, share in (
            {mark: row["path"][mark] for mark in SHOWN}
            if "path" in row
            else {"found": row["found"]}
        ).items():
            kind[mark] = max(kind.get(mark, 0.0), share)
    return most


def shares_found(kinds: Mapping[str, Mapping[str, float]]) -> list[float]:
    """Found by ascent after each of the steps, mean over the kinds of start, and last by the generator, where there was one."""
    ascent = [mean(of[mark] for of in kinds.values() if mark in of) for mark in SHOWN]
    return ascent + [of["found"] for of in kinds.values() if "found" in of]


def joined(shares: Sequence[float]) -> str:
    return " / ".join(percent([share], 0) for share in shares)


def hardest(rows: Sequence[dict], accuracy: Mapping[str, float]) -> list[str]:
    """The detectors against which least is found by the strongest searcher."""
    found = {who: shares_found(kinds) for who, kinds in strongest(rows).items()}
    last = len(SHOWN) - 1
    shown = [
        {
            "network: detector": ": ".join(who),
            "ID accuracy": percent([accuracy[who[0]]]),
            "found": joined(found[who]),
        }
        for who in sorted(found, key=lambda who: (found[who][last], found[who]))[:HARDEST]
    ]
    return [f"Hardest to fool by the strongest searcher, {MARKED}:\n", table(shown), ""]


def _rows(rows: list[dict], what: str) -> list[dict]:
    """A row for each network and detector, a column for each searcher."""
    searchers = dict.fromkeys(row["searcher"] for row in rows)
    if what == "strongest":
        cells = {
            (*who, kind): _shares(of)
            for who, kinds in strongest(rows).items()
            for kind, of in kinds.items()
        }
    else:
        chosen = [
            row for row in rows if row["form"] == ("blind" if what == "blind" else "adaptive")
        ]
        cells = {
            (row["network"], row["detector"], row["searcher"]): _cell(row, what) for row in chosen
        }
    who = dict.fromkeys(key[:2] for key in cells)
    return [
        {
            "network: detector": ": ".join(label),
            **{searcher: cells.get((*label, searcher), "-") for searcher in searchers},
        }
        for label in who
    ]


def _cell(row: dict, what: str) -> str:
    if what in ("judged", "confidence"):
        return "-" if row[what] is None else percent([row[what]], 0)
    return _shares(row.get("path") or row)


def _shares(of: Mapping[str, float]) -> str:
    """Found by a generator, or after each of the steps."""
    return joined([of["found"]] if "found" in of else [of[mark] for mark in SHOWN])
