"""Put measured numbers into a page's text, so that none of them is typed.

A place for a number is ``{{RUN METHOD | WHAT}}``. RUN is ``[FOLDER/]DATA[@IMAGESxEPOCHS]`` (``reproduce`` and ``20000x10`` where nothing else
is said) and METHOD as in the names of the cells, of every seed or of one: ``{{mnist tie | accuracy}}``, ``{{no-kl/mnist@allx20 tie#0 | accuracy}}``.
WHAT is one of:

* ``accuracy``, ``id garbage``, ``id rejected``, ``minutes`` (the first seed's), ``seeds``, ``least confident``;
* ``tau`` after the last epoch; ``expelled``, smallest and largest share of the inversions in each of the last five epochs;
* ``OOD SET: garbage``, ``rejected``, ``most confident``, or ``SCORE METRIC [through]``, as in ``fashionmnist: UE fpr95 through``;
* ``OOD SET: at RULE``, rejected by a rule of threshold.json (``two levels``, ``0.01``, ``0.05``, ``paper accuracy``), as in
  ``mnist: at 0.01``; ``right at RULE``, ID images accepted as what they are;
* ``judged WHICH``, of agreement.json (METHOD is ``inversions``), as in ``{{mnist inversions | judged margin 0.5}}``.

``natural`` for an OOD set gives the smallest and the largest mean over those of CIFAR-10, CIFAR-100 and TinyImageNet that are OOD.
"""

import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from tie_ext.cli.reproduce.tables import CELLS, read_cells

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NATURAL = ("cifar10", "cifar100", "tinyimagenet")


def fill(text: str) -> str:
    """The text with every number in its place.

    Raises:
        ValueError: If a place names no record, or nothing that its records hold.
    """

    def put(place: re.Match) -> str:
        try:
            return _number(place[1])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"Expected {place[0]} to name a number that was measured, but got: {error!r}"
            ) from error

    return re.sub(r"\{\{(.+?)\}\}", put, text)


def _number(place: str) -> str:
    left, _, what = (part.strip() for part in place.partition("|"))
    run, method = left.rsplit(" ", 1)
    of, _, which = what.rpartition(": ")
    if method == "inversions":
        return percent(
            [
                r["shares"][what.removeprefix("judged ")]["judged"]
                for r in _json("agreement.json").values()
                if r["data"] == run
            ],
            1,
        )
    records = _records(run, method)
    if what == "seeds":
        return str(len(records))
    if what == "minutes":
        return f"{records[0]['seconds'] / 60:.1f}"  # later seeds ran on other processors too
    if what == "tau":
        return f"{mean(record['log'][-1]['tau'] for record in records):.2f}"
    if what == "expelled":
        shares = [
            sum(epoch["excluded"]) / sum(epoch["proposed"])
            for record in records
            for epoch in record["log"][-5:]
        ]
        return f"{percent([min(shares)], 1)} to {percent([max(shares)], 1)}"
    if of == "natural":
        own = run.rpartition("/")[2].partition("@")[0]
        means = [mean(map(_value(other, which), records)) for other in NATURAL if other != own]
        ends = [percent([value], _digits(value, which)) for value in (min(means), max(means))]
        return ends[0] if ends[0] == ends[1] else " to ".join(ends)
    values = list(map(_value(of, which), records))
    return percent(values, _digits(mean(values), which))


def _records(run: str, method: str) -> list[dict]:
    """Each seed's cell, with what threshold.json has of its network as ``threshold``; either may be missing."""
    folder, _, name = run.rpartition("/")
    data, _, size = name.partition("@")
    folder = folder or "reproduce"
    method, _, seed = method.partition("#")
    pattern = f"{data.replace(':', '_')}-{size or '20000x10'}-{method}-seed{seed or '*'}"
    found = {
        name: dict(record)
        for name, record in cells_in(folder).items()
        if fnmatchcase(name, pattern)
    }
    for key, of in _json("threshold.json")["results"].items():
        if fnmatchcase(key, f"{folder}/{pattern}"):
            found.setdefault(key.rpartition("/")[2], {})["threshold"] = of
    if not found:
        raise ValueError(f"no record of {run} by {method}")
    return [found[stem] for stem in sorted(found)]


@cache
def cells_in(folder: str, file: str = CELLS) -> dict[str, dict]:
    """The cells of a folder of docs/results/, by name; read once, as a page asks for hundreds of numbers."""
    return read_cells(RESULTS / folder / file)


def _value(other: str, which: str) -> Callable[[dict], float]:
    """What to read from a record, as a share of 1."""
    own = {"accuracy": "accuracy", "id garbage": "id_garbage_rate", "id rejected": "id_rejected"}
    if not other and which in own:
        return lambda record: record["numbers"][own[which]]
    if not other and which == "least confident":
        return lambda record: record["level2"]["least_confident_id"]
    if which in ("garbage", "rejected"):
        return lambda record: record["numbers"][{"garbage": "garbage_rate"}.get(which, which)][
            other
        ]
    if which == "most confident":
        return lambda record: record["level2"][other]["most_confident_through"]
    if not other and which.startswith("right at "):
        return lambda record: record["threshold"][which.removeprefix("right at ")]["id"]["right"]
    if which.startswith("at "):
        return lambda record: record["threshold"][which.removeprefix("at ")][other]["rejected"]
    read = re.fullmatch(r"(.+) (fpr95|auroc)( through)?", which)
    if read is None:
        raise ValueError(f"nothing called {which!r}")
    score, metric, through = read.groups()
    return lambda record: record["level2"][other][score]["through" if through else "all"][metric]


def _json(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def _digits(value: float, which: str) -> int:
    """Two where a hundredth matters: accuracies, AUROC, ID images lost, and what is below 1 %; else one."""
    return (
        2
        if which in ("accuracy", "id garbage")
        or which.startswith("right")
        or "auroc" in which
        or value < 0.01
        else 1
    )


def percent(values: list[float], digits: int = 2) -> str:
    """Mean of shares in percent, with the standard deviation where there are several."""
    scaled = [100 * v for v in values]
    return f"{mean(scaled):.{digits}f}" + (
        f" ± {stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    )
