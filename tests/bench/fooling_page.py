"""docs/research/fooling.md and fooling_networks.md, of the records of fooling.py; tables.py writes them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from fooling_network import MARKED, SHOWN, Who, joined, section, shares_found, stem_of, strongest
from page import percent

from tie_ext.cli.tables import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "fooling"
HUNTED = ("20", "30", "50")
"""Steps of ascent by which the trial is judged."""
BAR, BLIND = 0.5, 0.01
"""What may be found against a network, in shares of what is found against another; and by a searcher who does not see the detector."""
OURS, PLAIN = "loop-search", "plain"
COMPARED = {
    "inversions": (("loop", "plain"), ("tie", "procedural")),
    "search": (("search", "plain"),),
    "both": (("loop-search", "plain"), ("tie-search", "procedural")),
    "inversions beside search": (("loop-search", "search"),),
    "both, beside ACET": (("loop-search", "acet-procedural"),),
}
"""Networks, and those that they stand beside, by what the former has more."""
JUDGED = ("garbage class", "combined", "combined, largest", "level 1")
"""Detectors that all networks with a garbage class have."""
BEST = "combined, largest"
"""The detector that is hardest to fool nearly everywhere."""
Records = Mapping[str, Sequence[dict]]
"""The records of each ID set, a seed each."""
HEAD = """# Fooling images: what is found by somebody who searches

Made by `python tests/bench/tables.py` of the records in `docs/results/fooling/`, which hold their commands. A searcher looks for images that a
finished network takes for a class. Nothing that is found need look like the class. Words are explained in the
[glossary](../method.md#glossary).

- *Gradient ascent* raises the class's probability, in steps of 1 % of the value range along the gradient's sign. It starts from uniform noise, from
  procedural (drawn) images, or from OOD test images.
- A *generator* starts afresh and is trained against the frozen network, 200 steps.

*Blind*: the searcher sees the ID logits, and never stops. *Adaptive*: it sees the detector too, whatever that computes, and leaves an image as it is
once it is found. An image is *found* where the detector accepts it *and* the network calls it the class asked for. Each kind of start, and each
generator, has 50 images, so that 2 % are one image. A detector that gives a searcher no gradient looks hard to fool, until somebody searches by
another of the same network. So every detector sees what was found by all searchers that all networks have, and *the strongest* counts.
`tests/bench/adversarial_inputs.py` has the formulas.

Detectors reject 5 % of ID images. *Level 1* is the garbage class's own decision, which rejects far fewer. *Combined* is of the
garbage class, ViM and GEN, as `combine` was then (it has KNN now); *combined, largest* the same with `rule="max"`. Networks:

- *plain*: trained with cross-entropy, with the head that `attach` teaches from procedural images. *procedural*: a garbage class that is a linear
  function of the features, taught by procedural images too.
- *loop*: the default of `tie-ext train`, whose head learns inversions beside procedural images. *tie*: the paper's linear garbage class, noise and
  inversions. *predecessor*: *tie* that expels every inversion, sure or not.
- *loop-search*: *loop* with `--search 5 --lr 0.003`. Beside each batch come garbage images. They are moved, by five steps of ascent, to where the
  network is pgd of a class, and the network learns to be unsure of them. *search*: the same without inversions.
- *acet-procedural*: the published way to do this (ACET), beside plain training, from procedural images, with the head of `attach`. The paper takes
  40 steps, here are five, as in *loop-search*.

Percent. Small is good. [fooling_networks.md](fooling_networks.md) has every searcher against every network.

What follows from the tables below: inversions alone make nothing harder to find. Search in every batch does on grey images, against ascent most of
all. On CIFAR-10 it helps against ascent from noise alone, and costs accuracy. With inversions beside it a single generator finds less; the strongest
of three still finds more than half of what it finds without them. What is found gets rarer, it is not kept out: somebody who starts from real images
of something else still gets through often. So inversions are good for pictures, not as a guard.
"""
DETAIL = """# Fooling images: every searcher against every network

Made by `python tests/bench/tables.py`. [fooling.md](fooling.md) says what the words mean, and what follows.
"""


def pages() -> dict[str, str]:
    """The pages by name; none where there are no records yet."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]
    if not records:
        return {}
    by_set: dict[str, list[dict]] = {}
    for record in records:
        by_set.setdefault(record["data"], []).append(record)
    front = [
        HEAD,
        *_decided(by_set),
        *_found(by_set),
        *_cost(by_set),
        *_like(by_set),
        *_long(),
        *_hunted(),
    ]
    return {
        "fooling.md": "\n".join(front),
        "fooling_networks.md": "\n".join(
            [DETAIL, *(part for record in records for part in section(record))]
        ),
    }


def found_by_all(record: dict) -> dict[Who, dict[str, dict[str, float]]]:
    """The strongest searchers of a record, with the generators of other seeds that fooling_long.py has."""
    path = RESULTS / "long" / f"{stem_of(record)}.json"
    long = json.loads(path.read_text())["rows"] if path.exists() else []
    more = [
        {
            "network": row["network"],
            "seen": row["seen"],
            "searcher": f"generator, {row['steps']} steps",
            "detector": label,
            "found": share,
        }
        for row in long
        for label, share in row["found"].items()
        if row["searcher"] == "generator"
    ]
    names = {row["searcher"] for row in record["rows"]}
    return strongest([*record["rows"], *(row for row in more if row["searcher"] in names)])


class Comparison(NamedTuple):
    """What is found against a detector of one network, and of another, by one searcher."""

    start: str
    steps: str
    ours: float
    theirs: float

    @property
    def held(self) -> bool:
        """Whether it is at most :data:`BAR` of the other."""
        return self.ours <= BAR * self.theirs


def comparisons(records: Sequence[dict], what: str) -> Iterator[Comparison]:
    """Those of :data:`COMPARED`; none where nothing is found on either side."""
    for most in map(found_by_all, records):
        for ours, theirs in COMPARED[what]:
            for detector in JUDGED:
                for start, found in most.get((ours, detector), {}).items():
                    other = most.get((theirs, detector), {}).get(start, {})
                    for steps in found.keys() & other.keys():
                        if found[steps] or other[steps]:
                            yield Comparison(start, steps, found[steps], other[steps])


def _held(of: Sequence[Comparison]) -> str:
    """How often the bar is held, and the worst."""
    if not of:
        return "-"
    worst = max(one.ours / one.theirs if one.theirs else float("inf") for one in of)
    return f"{sum(one.held for one in of)} of {len(of)}; {worst:.2f}"


def _decided(by_set: Records) -> list[str]:
    """Whether inversions, and search in every batch, make searched images harder to find; and the other bars."""
    rows = []
    for what in COMPARED:
        of = {name: list(comparisons(records, what)) for name, records in by_set.items()}
        if not any(of.values()):
            continue
        rows.append(
            {
                "what one network has more": what,
                **{name: _held(found) for name, found in of.items()},
            }
        )
        starts = (
            dict.fromkeys(one.start for found in of.values() for one in found)
            if what == "both"
            else ()
        )
        for start in starts:
            rows.append(
                {
                    "what one network has more": f"- both, {start}",
                    **{
                        name: _held([one for one in found if one.start == start])
                        for name, found in of.items()
                    },
                }
            )
    if not rows:
        return []
    said = (
        f"The same detector on two networks. The bar: at most {BAR:g} of what is found on the other. First stands how many comparisons "
        f"hold it, of all where anything is found: {len(JUDGED)} detectors, after {', '.join(SHOWN)} steps from each kind of start and by the "
        "strongest generator, all seeds. Then stands the worst share (inf: nothing was found on the other). The first rows compare a network "
        "that has inversions, search, or both with one that has neither; the last two, *loop-search* with other networks that search. "
        "Comparisons of one network depend on each other. Networks differ in their learning rate too (*plain*: SGD; *loop*: 0.001; with "
        "search 0.003, chosen by looking at FashionMNIST). *loop-search* met generators of three seeds, most others of one (below), which is "
        "to its disadvantage.\n"
    )
    return [
        "## Do inversions help, and does search?\n",
        said,
        table(rows),
        "",
        *_alike(by_set),
        *_bars(by_set),
    ]


def _alike(by_set: Records) -> list[str]:
    """Where the loop expelled no inversion, a network with inversions is that without them."""
    alike = [
        stem_of(record)
        for records in by_set.values()
        for record in records
        if record["networks"].get("loop-search") == record["networks"].get("search", "none")
    ]
    if not alike:
        return []
    said = "*loop-search* and *search* are the same network, to the last bit: no inversion was uncertain enough to be expelled"
    return [f"On {', '.join(alike)} {said}.\n"]


def _bars(by_set: Records) -> list[str]:
    """The other bars for :data:`OURS`."""
    columns = {}
    for name, records in by_set.items():
        having = [record for record in records if OURS in record["accuracy"]]
        if not having:
            continue
        accuracy = {
            network: [record["accuracy"][network] for record in having]
            for network in (OURS, PLAIN)
        }
        spread = stdev(accuracy[PLAIN]) if len(having) > 1 else None
        short = mean(accuracy[PLAIN]) - mean(accuracy[OURS])
        within = "one seed" if spread is None else "held" if short <= spread else "not held"
        blind = {
            label: max(most_blind(record, OURS, label) for record in having) for label in JUDGED
        }
        least = {
            network: mean(least_in_garbage(record, network) for record in having)
            for network in (OURS, PLAIN)
        }
        columns[name] = {
            "ID accuracy within the seeds' spread": f"{percent([mean(accuracy[OURS])])} beside {percent(accuracy[PLAIN])}: {within}",
            "OOD sets in garbage, the least, no worse": f"{percent([least[OURS]], 1)} beside {percent([least[PLAIN]], 1)}: "
            + ("held" if least[OURS] >= least[PLAIN] else "not held"),
            f"blind searchers find at most {percent([BLIND], 0)} %": ", ".join(
                f"{label} {percent([share], 0)}" for label, share in blind.items()
            )
            + (": held" if max(blind.values()) <= BLIND else ": not held"),
        }
    if not columns:
        return []
    bars = next(iter(columns.values()))
    said = f"Other bars, *{OURS}* beside *{PLAIN}*. Blind: the most of any start, seed and number of steps.\n"
    return [
        said,
        table([{"bar": bar, **{name: of[bar] for name, of in columns.items()}} for bar in bars]),
        "",
    ]


def most_blind(record: dict, network: str, detector: str) -> float:
    """The most that any searcher found who did not see the detector, after any of the steps."""
    rows = [
        row
        for row in record["rows"]
        if (row["network"], row["detector"], row["form"]) == (network, detector, "blind")
    ]
    return max(
        (
            share
            for row in rows
            for share in (
                [row["path"][mark] for mark in SHOWN] if "path" in row else [row["found"]]
            )
        ),
        default=0.0,
    )


def least_in_garbage(record: dict, network: str) -> float:
    """Share of the OOD set that is in garbage least."""
    return min(share for what, share in record["garbage"][network].items() if what != "id")


def _found(by_set: Records) -> list[str]:
    """The strongest searcher against each detector, mean over seeds."""
    most = {
        name: [strongest(record["rows"]) for record in records] for name, records in by_set.items()
    }
    rows = []
    for who in dict.fromkeys(who for found in most.values() for one in found for who in one):
        cells = {}
        for name, found in most.items():
            shares = [shares_found(one[who]) for one in found if who in one]
            cells[name] = (
                f"{joined([mean(column) for column in zip(*shares, strict=False)])} ({len(shares)})"
                if shares
                else "-"
            )
        rows.append({"network: detector": ": ".join(who), **cells})
    said = f"Found by the strongest searcher {MARKED}, one each. Mean over the seeds, whose number stands in brackets; -: not measured.\n"
    return ["## What is found\n", said, table(rows), ""]


def _cost(by_set: Records) -> list[str]:
    """Accuracy, and what is in garbage, by network."""
    rows = []
    for name, records in by_set.items():
        for network in dict.fromkeys(
            network for record in records for network in record["accuracy"]
        ):
            having = [record for record in records if network in record["accuracy"]]
            rows.append(
                {
                    "ID images: network": f"{name}: {network}",
                    "ID accuracy": percent([record["accuracy"][network] for record in having]),
                    "ID in garbage": percent(
                        [record["garbage"][network]["id"] for record in having]
                    ),
                    "OOD in garbage, the least": percent(
                        [least_in_garbage(record, network) for record in having], 1
                    ),
                }
            )
    said = "Images that nobody searched for. [cost.md](cost.md#an-epoch) has the time that search takes.\n"
    return ["## What it costs\n", said, table(rows), ""]


def _like(by_set: Records) -> list[str]:
    """What is found may be an image of the class: what networks trained apart say, and how sure the network is."""
    rows = []
    for name, records in by_set.items():
        for network in dict.fromkeys(
            network for record in records for network in record["accuracy"]
        ):
            row = {"ID images: network": f"{name}: {network}"}
            for kind in ("ascent", "generator"):
                chosen = [
                    one
                    for record in records
                    for one in record["rows"]
                    if (one["network"], one["detector"], one["form"], "path" in one)
                    == (network, BEST, "adaptive", kind == "ascent")
                ]
                for what, label in (("judged", "by networks apart"), ("confidence", "confidence")):
                    values = [one[what] for one in chosen if one[what] is not None]
                    row[f"{kind}: {label}"] = percent([mean(values)], 0) if values else "-"
            if any(
                value != "-"
                for key, value in row.items()
                if ":" in key and key != "ID images: network"
            ):
                rows.append(row)
    said = (
        f"Of what adaptive searchers found against *{BEST}*: the share that networks trained apart accept, by their own combination, and call the "
        "same class; and the mean probability of the class. Where networks apart agree, much of what was found looks like the class.\n"
    )
    return ["## Does what is found look like the class?\n", said, table(rows), ""] if rows else []


def _long() -> list[str]:
    """What generators of other seeds find, and searchers who take longer."""
    parts = []
    for path in sorted((RESULTS / "long").glob("*.json")):
        record = json.loads(path.read_text())
        found: dict[Who, dict[str, float]] = {}
        for row in record["rows"]:
            search = (
                "blind, the most"
                if row["seen"] == "blind"
                else f"{row['searcher']}, {row['steps']} steps"
            )
            for label, share in row["found"].items():
                most = found.setdefault((row["network"], label), {})
                most[search] = max(most.get(search, 0.0), share)
        searches = sorted(
            {search for of in found.values() for search in of},
            key=lambda search: (search.startswith("blind"), search),
        )
        rows = [
            {
                "network: detector": ": ".join(who),
                **{
                    search: percent([of[search]], 0) if search in of else "-"
                    for search in searches
                },
            }
            for who, of in found.items()
        ]
        parts += [
            f"### {path.stem}\n",
            f"    python tests/bench/{record['command']}\n",
            table(rows),
            "",
        ]
    said = (
        "The most that is found by searchers who see one of the combinations, and by blind ones. Generators of 200 steps have two other seeds than "
        "above, longer ones the same; ascent is the mean over the kinds of start. Every detector of the network sees the images.\n"
    )
    return ["## Other generators, and longer searches\n", said, *parts] if parts else []


def _hunted() -> list[str]:
    """The trial of a head that is taught by what was found against it."""
    parts = []
    for path in sorted((RESULTS / "hunted").glob("*.json")):
        record = json.loads(path.read_text())
        rows = [
            {
                "round": str(row["round"]) if row["round"] else "0: attach",
                "images kept": row["kept"],
                "false alarms": percent([row["false_alarms"]]),
                **{
                    kind: " / ".join(percent([found[mark]], 0) for mark in HUNTED)
                    for kind, found in row["found"].items()
                },
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
