"""docs/research/public_networks.md and the tables of public networks on other pages, from the
records of public_networks.py; tables.py writes them."""

import json
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean

from tie_ext.cli.tables import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "public_networks"
OURS = ("combine", "attach", "combine's KNN")
"""Ours, which are no rivals; the first is judged."""
LABELS = {"combine": "**combine**", "attach": "**garbage head alone**"}
FACTS = ("worst", "mean", "where", "single", "full", "version")
FULL = 0.98
"""AUROC of a rival above which there is little room."""
SHOWN = 5
"""Rivals in tables."""
CALLED = {
    "cifar10-resnet20": "CIFAR-10, ResNet-20",
    "cifar10-resnet56": "CIFAR-10, ResNet-56",
    "cifar100-resnet14": "CIFAR-100, ResNet-14",
    "imagenet": "ImageNet, EfficientNet-lite0",
    "flowers": "3 of 5 flowers",
    "trash": "4 of 6 kinds of trash",
    "mnist": "MNIST, our CNN",
    "fashionmnist": "FashionMNIST, our CNN",
}
"""Networks, in the order of the tables."""
SAID = {"AssertionError": "pytorch-ood asserts that every class up to the last has images"}
"""What is meant by an error that says nothing."""


@cache
def summary() -> dict:
    """``regret.json``."""
    return json.loads((RESULTS / "regret.json").read_text())


def columns() -> dict[str, dict]:
    """``NETWORK near`` and ``NETWORK far`` in the order of the tables, with all scores."""
    found = summary()["columns"]
    names = [f"{network} {kind}" for network in CALLED for kind in ("near", "far")]
    return {name: found[name] for name in names if name in found}


def rivals() -> list[str]:
    """Others' scores, the best worst regret first; those that lack two columns or more last."""
    regret = summary()["regret"]
    few = max(count for *_, count in regret.values()) - 1
    names = [name for name in regret if name not in OURS]
    return sorted(names, key=lambda name: (regret[name][2] < few, -regret[name][0]))


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def front() -> str:
    """Our detector, the head alone and the strongest rivals: means over columns."""
    rows = []
    for score in (*OURS[:2], *rivals()[:SHOWN]):
        row = {"detector": LABELS.get(score, score)}
        for kind in ("near", "far"):
            of = [
                c[score] for name, c in columns().items() if name.endswith(kind) and c.get(score)
            ]
            row[f"{kind}: mean (worst)"] = (
                f"{percent(mean(a for a, *_ in of))} ({percent(min(of)[0])})"
            )
        row["far: rejected"] = percent(mean(share for *_, share in of))
        rows.append(row | {"worst regret": _worst(score)})
    return table(rows)


def _worst(score: str) -> str:
    """Worst regret, and of how many columns if it has no number in some."""
    found = summary()["regret"]
    worst, _, count = found[score]
    return percent(worst) + ("" if count == found[OURS[0]][2] else f" (of {count})")


def regret() -> str:
    """What combine has beside the best rival, by column."""
    rows = []
    for column, of in summary()["of combine"].items():
        scores = summary()["columns"][column]
        low, high = of.get("interval", (None, None))
        row = {"column": _called(column), "combine": percent(scores[OURS[0]][0])}
        row["best single score"] = f"{of['best']} {percent(scores[of['best']][0])}"
        row["regret"] = percent(of["regret"])
        row["95 % of bootstraps"] = "" if low is None else f"{percent(low)} to {percent(high)}"
        rows.append(row)
    return table(rows)


def _called(column: str) -> str:
    network, kind = column.split()
    return f"{CALLED[network]}: {kind}"


def by_column(place: int) -> str:
    """AUROC (0), FPR@95 (1) or the share rejected (2) by column."""
    names = [*OURS, *rivals()[:SHOWN]]
    rows = [
        {"column": _called(column)}
        | {LABELS.get(n, n): percent(of[n][place] if of.get(n) else None) for n in names}
        for column, of in columns().items()
    ]
    return table(rows)


def every() -> str:
    """Worst and mean regret of every score."""
    found = summary()["regret"]
    rows = [
        {"score": LABELS.get(name, name), "worst regret": _worst(name)}
        | {"mean regret": percent(found[name][1])}
        for name in (*OURS, *rivals())
    ]
    return table(rows)


BARS = {
    "cifar10-resnet20 near": 89.3,
    "cifar10-resnet20 far": 99.1,
    "cifar10-resnet56 near": 89.3,
    "cifar10-resnet56 far": 99.1,
    "cifar100-resnet14 near": 72.0,
    "cifar100-resnet14 far": 95.0,
    "imagenet far": 97.0,
}
"""AUROC that combine was to reach, by column."""
WORST, MEAN = -0.5, 1.0
"""Regret that it was to reach."""


def bars() -> str:
    """What combine was to reach, and reaches."""
    worst, average, _ = summary()["regret"][OURS[0]]
    wanted = [("worst regret", WORST, worst), ("mean regret", MEAN, average)]
    wanted += [(_called(name), bar, columns()[name][OURS[0]][0]) for name, bar in BARS.items()]
    rows = []
    for name, bar, value in wanted:
        verdict = "held" if round(100 * value, 1) >= bar else "not held"
        rows.append({"column": name, "bar": f"{bar:.1f}", "combine": percent(value), "": verdict})
    return table(rows)


@cache
def records() -> list[dict]:
    """The records of all runs."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]


def accuracies() -> str:
    """Runs, accuracy and images of each network."""
    by: dict[str, list[dict]] = defaultdict(list)
    for record in records():
        by[record["network"]].append(record)
    rows = []
    for network in (name for name in CALLED if name in by):
        of = by[network]
        sizes = [str(of[0]["images"][part]) for part in ("fit", "calibration", "test")]
        alarms = mean(record["scores"][OURS[0]]["false alarms"] for record in of)
        row = {"network": CALLED[network], "runs": len(of)}
        row["accuracy"] = percent(mean(record["accuracy"] for record in of))
        row["fit / calibration / test"] = " / ".join(sizes)
        rows.append(row | {"false alarms of combine": percent(alarms)})
    return table(rows)


def reasons() -> str:
    """Which scores have no number where, and why."""
    by: dict[tuple[str, str], list[str]] = defaultdict(list)
    for score, network, why in sorted(
        {(score, of["network"], why) for of in records() for score, why in of["why not"].items()}
    ):
        by[network, SAID.get(why, " ".join(why.split()))].append(score)
    return "\n".join(f"- {CALLED[of]}: {', '.join(s)}: {why}." for (of, why), s in by.items())


def facts() -> dict[str, str]:
    """Single numbers of the page."""
    found = summary()
    worst, average, _ = found["regret"][OURS[0]]
    column = min(found["of combine"], key=lambda name: found["of combine"][name]["regret"])
    full = sum(
        found["columns"][name][of["best"]][0] >= FULL for name, of in found["of combine"].items()
    )
    return {
        "worst": percent(worst),
        "mean": percent(average),
        "where": _called(column),
        "single": f"{_worst(rivals()[0])}, {rivals()[0]}",
        "full": f"{full} of {len(found['of combine'])}",
        "version": f"tie_ext {found['versions']['tie_ext']} at commit {found['commit'][:7]}, "
        f"pytorch-ood {found['versions']['pytorch-ood']}",
    }
