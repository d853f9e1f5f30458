"""docs/research/fooling.md and fooling_networks.md, of the records of fooling.py; tables.py writes them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from fooling_network import MARKED, SHOWN, Who, joined, section, shares_found, strongest
from page import percent

from tie_ext.app.report import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "fooling"
HUNTED = ("20", "30", "50")
"""Steps of ascent by which the trial is judged."""
BAR = 0.5
"""What a network taught by inversions may be found, in shares of what the same detector is without them."""
FAMILIES = {"head on every layer": "plain", "linear logit": "procedural"}
"""The network with neither inversions nor search, by what gives the garbage logit."""
TAUGHT = {
    "inversions": {"head on every layer": "loop", "linear logit": "tie"},
    "both": {"head on every layer": "loop-search", "linear logit": "tie-search"},
    "search": {"head on every layer": "search"},
}
"""What a loop adds to that, and the network that has it."""
BEST = "combined, largest"
"""The detector that is hardest to fool nearly everywhere."""
RIVAL, OWN = "acet-procedural", "loop-search"
Records = Mapping[str, Sequence[dict]]
"""The records of each ID set, a seed each."""
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

Percent. Small is good. [fooling_networks.md](fooling_networks.md) has every searcher against every network.
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
    front = [HEAD, *_found(by_set), *_decided(by_set), *_cost(by_set), *_long(), *_hunted()]
    return {"fooling.md": "\n".join(front), "fooling_networks.md": "\n".join([DETAIL, *(part for record in records for part in section(record))])}


def _found(by_set: Records) -> list[str]:
    """The strongest searcher against each detector, mean over seeds."""
    most = {name: [strongest(record["rows"]) for record in records] for name, records in by_set.items()}
    rows = []
    for who in dict.fromkeys(who for found in most.values() for one in found for who in one):
        cells = {}
        for name, found in most.items():
            shares = [shares_found(one[who]) for one in found if who in one]
            cells[name] = f"{joined([mean(column) for column in zip(*shares, strict=False)])} ({len(shares)})" if shares else "-"
        rows.append({"network: detector": ": ".join(who), **cells})
    said = f"Found by the strongest searcher {MARKED}. Mean over the seeds, whose number stands in brackets.\n"
    return ["## What is found\n", said, table(rows), ""]


def _ratios(records: Sequence[dict], what: str) -> list[float]:
    """What is found with ``what`` of :data:`TAUGHT`, in shares of what is found without, of all detectors, searchers and seeds; those where there is
    nothing to find either way are left out."""
    ratios = []
    for most in (strongest(record["rows"]) for record in records):
        for garbage, network in TAUGHT[what].items():
            for (name, detector), kinds in most.items():
                without = most.get((FAMILIES[garbage], detector))
                if name == network and without is not None:
                    ratios += [b / a if a else math.inf for a, b in zip(shares_found(without), shares_found(kinds), strict=False) if a or b]
    return ratios


def _bar(records: Sequence[dict], what: str) -> str:
    """Whether it is held on one ID set."""
    ratios, networks = _ratios(records, what), set(TAUGHT[what].values())
    if not ratios:
        return "-"
    seeds = sum(any(network in networks for network, _ in strongest(record["rows"])) for record in records)
    held = mean(ratio <= BAR for ratio in ratios)
    return f"{min(ratios):.2f} to {max(ratios):.2f}, {'held' if held == 1 else f'held in {percent([held], 0)} %'} ({seeds})"


def _decided(by_set: Records) -> list[str]:
    """Whether inversions, and search in every batch, make searched images harder to find."""
    rows = [{"ID images": name, **{what: _bar(records, what) for what in TAUGHT}} for name, records in by_set.items()]
    rows = [row for row in rows if any(row[what] != "-" for what in TAUGHT)]
    if not rows:
        return []
    return [
        "## Do inversions help, and does search?\n",
        "What is found against a network with inversions, with both, and with search in every batch, in shares of what is found against the same "
        f"detector of the network with neither: every detector, after {', '.join(SHOWN)} steps and by the generator. The bar: at most {BAR:g} in "
        "each of these. Seeds in brackets; inf: some was found where there was nothing to find before. The networks differ in their learning rate "
        "too (*plain*: SGD; *loop*: 0.001; with search 0.003, chosen by looking at FashionMNIST), and *tie* begins with noise.\n",
        table(rows),
        "",
        *_beside_the_rival(by_set),
    ]


def _beside_the_rival(by_set: Records) -> list[str]:
    """Another bar: half of what is found against the best rival."""
    said = []
    for name, records in by_set.items():
        for most in (strongest(record["rows"]) for record in records):
            if (RIVAL, BEST) in most and (OWN, BEST) in most:
                said.append(f"{name}: {joined(shares_found(most[RIVAL, BEST]))} beside {joined(shares_found(most[OWN, BEST]))}")
    if not said:
        return []
    return [
        f"The best rival is ACET from drawn images (*{RIVAL}*), which is what the search in the loop does: found against its *{BEST}*, beside "
        f"*{OWN}*'s, {'; '.join(said)}. So the loop cannot have half of what the best rival has.\n"
    ]


def _blind(record: dict, network: str) -> str:
    """The most that searchers found who did not see the detector, by ascent and by the generator."""
    rows = [row for row in record["rows"] if (row["network"], row["detector"], row["form"]) == (network, BEST, "blind")]
    ascent = [row["path"][mark] for row in rows for mark in SHOWN if "path" in row]
    return joined([max(ascent, default=0.0), *(row["found"] for row in rows if "path" not in row)]) if rows else "-"


def _cost(by_set: Records) -> list[str]:
    """Accuracy, garbage, and what blind searchers find, by network."""
    rows = []
    for name, records in by_set.items():
        for network in dict.fromkeys(network for record in records for network in record["accuracy"]):
            having = [record for record in records if network in record["accuracy"]]
            garbage = [record["garbage"][network] for record in having]
            sets = [what for what in garbage[0] if what != "id"]
            blind = [_blind(record, network) for record in having]
            rows.append(
                {
                    "ID images: network": f"{name}: {network}",
                    "ID accuracy": percent([record["accuracy"][network] for record in having]),
                    "ID in garbage": percent([of["id"] for of in garbage]),
                    "OOD in garbage, least": percent([min(of[what] for what in sets) for of in garbage], 1),
                    "blind": ", ".join(blind),
                }
            )
    said = (
        f"Images that nobody searched for, and searchers who do not see the detector: the most that they find against *{BEST}*, by ascent after "
        f"{', '.join(SHOWN)} steps from any start / by the generator, a seed after the other. The bar for them is 1 %.\n"
    )
    return ["## What it costs, and blind searchers\n", said, table(rows), ""]


def _long() -> list[str]:
    """What generators of other seeds find, and searchers who take longer."""
    parts = []
    for path in sorted((RESULTS / "long").glob("*.json")):
        record = json.loads(path.read_text())
        found: dict[Who, dict[str, float]] = {}
        for row in record["rows"]:
            search = "blind, the most" if row["seen"] is None else f"{row['searcher']}, {row['steps']} steps"
            for label, share in row["found"].items():
                most = found.setdefault((row["network"], label), {})
                most[search] = max(most.get(search, 0.0), share)
        searches = sorted({search for of in found.values() for search in of}, key=lambda search: (search.startswith("blind"), search))
        rows = [
            {"network: detector": ": ".join(who), **{search: percent([of[search]], 0) if search in of else "-" for search in searches}}
            for who, of in found.items()
        ]
        said = (
            "The most that was found by those who see either combination, and of generators by two more seeds; ascent: mean over the kinds of start. "
            "Every detector of the network sees the images.\n"
        )
        parts += [f"## Other generators, and longer searches: {path.stem}\n", f"    python tests/bench/{record['command']}\n", said, table(rows), ""]
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
