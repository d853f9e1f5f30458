"""Put measured numbers and tables into a page's text, so that none of them is typed.

``{{RUN METHOD | WHAT}}`` is a number of the cells of ``tie-ext reproduce``. RUN is
``[FOLDER/]DATA[@IMAGESxEPOCHS]`` (``reproduce`` and ``20000x10`` where nothing else is said),
METHOD as in the names of the cells: ``{{mnist tie | accuracy}}``,
``{{bfloat16/cifar10@50000x20 tie | tau}}``. WHAT is one of:

* ``accuracy``, ``id garbage``, ``id rejected``, ``least confident``, ``seeds``, ``tau``;
* ``OOD SET: garbage``, ``rejected``, ``at 5 %`` (by the score alone), ``most confident``, or
  ``SCORE METRIC [through]``, as in ``fashionmnist: UE fpr95 through``.

``natural`` for an OOD set gives the smallest and the largest mean over those of CIFAR-10,
CIFAR-100 and TinyImageNet that are OOD.

``{{history NAME KEY}}`` is a table of docs/results/history/NAME.json, ``{{history NAME KEY | ROW
| COLUMN}}`` one of its cells; ``{{public WHAT}}`` what public_page.py gives.
"""

import json
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from tie_ext.cli.reproduce.tables import CELLS, read_cells
from tie_ext.cli.tables import table

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NATURAL = ("cifar10", "cifar100", "tinyimagenet")


def fill(text: str, others: Mapping[str, Callable[[], str]] = {}) -> str:
    """The text with every number and table in its place.

    Arguments:
        text: With places.
        others: What else may stand in a place, by its words.

    Raises:
        ValueError: If a place names no record, or nothing that its records hold.
    """

    def put(place: re.Match) -> str:
        try:
            return others[place[1]]() if place[1] in others else _found(place[1])
        except (ValueError, KeyError, TypeError, OSError, StopIteration) as error:
            raise ValueError(
                f"Expected {place[0]} to name a number that was measured, but got: {error!r}"
            ) from error

    return re.sub(r"\{\{(.+?)\}\}", put, text)


def _found(place: str) -> str:
    first, _, what = (part.strip() for part in place.partition("|"))
    return _archived(place) if first.startswith("history ") else _number(first, what)


def _archived(place: str) -> str:
    first, *cell = (part.strip() for part in place.split("|"))
    _, name, key = first.split()
    rows = json.loads((RESULTS / "history" / f"{name}.json").read_text())[key]
    if not cell:
        return table(rows)
    return next(row[cell[1]] for row in rows if cell[0] in row.values())


def _number(first: str, what: str) -> str:
    run, method = first.rsplit(" ", 1)
    of, _, which = what.rpartition(": ")
    records = _records(run, method)
    if what == "seeds":
        return str(len(records))
    if what == "tau":
        return f"{mean(record['log'][-1]['tau'] for record in records):.2f}"
    if of == "natural":
        own = run.rpartition("/")[2].partition("@")[0]
        means = [mean(map(_value(other, which), records)) for other in NATURAL if other != own]
        ends = [percent([value], _digits(value, which)) for value in (min(means), max(means))]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)
    values = list(map(_value(of, which), records))
    return percent(values, _digits(mean(values), which))


def _records(run: str, method: str) -> list[dict]:
    """The cell of each seed."""
    folder, _, name = run.rpartition("/")
    data, _, size = name.partition("@")
    pattern = f"{data.replace(':', '_')}-{size or '20000x10'}-{method}-seed*"
    cells = cells_in(folder or "reproduce")
    found = [cells[stem] for stem in sorted(cells) if fnmatchcase(stem, pattern)]
    if not found:
        raise ValueError(f"no record of {run} by {method}")
    return found


@cache
def cells_in(folder: str) -> dict[str, dict]:
    """The cells of a folder of docs/results/, by name; read once, as a page asks for many."""
    return read_cells(RESULTS / folder / CELLS)


def _value(other: str, which: str) -> Callable[[dict], float]:
    """What to read from a record, as a share of 1."""
    own = {"accuracy": "accuracy", "id garbage": "id_garbage_rate", "id rejected": "id_rejected"}
    if not other and which in own:
        return lambda record: record["numbers"][own[which]]
    if not other and which == "least confident":
        return lambda record: record["level2"]["least_confident_id"]
    if which in ("garbage", "rejected"):
        key = {"garbage": "garbage_rate"}.get(which, which)
        return lambda record: record["numbers"][key][other]
    if which == "at 5 %":
        return lambda record: 1 - record["level2"][other]["score"]["all"]["fpr95_id"]
    if which == "most confident":
        return lambda record: record["level2"][other]["most_confident_through"]
    read = re.fullmatch(r"(.+) (fpr95|auroc)( through)?", which)
    if read is None:
        raise ValueError(f"nothing called {which!r}")
    score, metric, through = read.groups()
    return lambda record: record["level2"][other][score]["through" if through else "all"][metric]


def _digits(value: float, which: str) -> int:
    """Two where a hundredth matters: accuracies, AUROC, ID images lost, and what is below 1 %;
    else one."""
    exact = which in ("accuracy", "id garbage") or "auroc" in which
    return 2 if exact or value < 0.01 else 1


def percent(values: list[float], digits: int = 2) -> str:
    """Mean of shares in percent, with the standard deviation where there are several."""
    scaled = [100 * v for v in values]
    spread = f" ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{mean(scaled):.{digits}f}{spread}"
