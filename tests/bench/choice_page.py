"""The tables of docs/research/public_networks.md on how the combination was chosen, from the record
of choice.py."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tie_ext.cli.tables import table

RECORD = Path(__file__).parents[2] / "docs" / "results" / "choice.json"
TRUST = {"training": "", "held-out": " by held-out images", "votes": " by votes"}


@cache
def record() -> dict:
    """``choice.json``."""
    return json.loads(RECORD.read_text())


def called(of: Mapping) -> str:
    """A candidate in a few words."""
    weights = "/".join(f"{of[name]:g}" for name in ("knn", "gaussians", "garbage"))
    more = "".join(f" and {name}" for name in of["tails"][2:])
    kind = "one tail" if of["one"] else "tails"
    body = " + ".join(of["body"])
    return f"{body}; {weights}{TRUST[of['trust']]}; {kind}{more}, {of['tail']:g}"


def candidates() -> str:
    """What combine has, what validation and test columns would have chosen, and 0.3.0's."""
    names = {
        "by validation": "best by validation",
        "of all": "best with others' scores",
        "first": "first choice",
        "before": "0.3.0",
        "by test": "best by test",
    }
    if record()["chosen"]["candidate"] == record()["by validation"]["candidate"]:
        names["by validation"] += ": **combine**"
    else:
        names = {"chosen": "**combine**", **names}
    rows = []
    for key, name in names.items():
        of = record()[key]
        row = {"": name, "members and weights": called(of["candidate"])}
        for kind in ("validation", "test"):
            row[f"{kind}: worst (mean)"] = f"{of[kind]['worst']:.1f} ({of[kind]['mean']:.1f})"
        rows.append(row)
    return table(rows)


def left_out() -> str:
    """Chosen without one kind of network, worst regret in the test columns of that kind."""
    rows, chosen = [], record()["chosen"]["test"]["columns"]
    for kind, of in record()["left out"].items():
        own = [chosen[column] for column in of["by validation"]["test"]["columns"]]
        row = {"left out": kind, "chosen by the others": called(of["by validation"]["candidate"])}
        row["worst there"] = f"{of['by validation']['test']['worst']:.1f}"
        row["with others' scores"] = f"{of['of all']['test']['worst']:.1f}"
        rows.append(row | {"combine": f"{min(own):.1f}"})
    return table(rows)


def fresh() -> str:
    """Regret in choices of classes that were new."""
    rows = []
    for column in record()["chosen"]["fresh"]["columns"]:
        row = {"column": column.replace(" test", ":")}
        for name, key in (("combine", "chosen"), ("first choice", "first"), ("0.3.0", "before")):
            row[f"{name}: regret"] = f"{record()[key]['fresh']['columns'][column]:.1f}"
        rows.append(row | {"best single score": record()["chosen"]["fresh"]["rivals"][column]})
    return table(rows)


def count() -> str:
    """How many candidates there are."""
    return str(record()["candidates"])
