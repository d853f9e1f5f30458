"""The tables of ``tie-ext reproduce``, made of its cells, beside the paper's own figures."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from tie_ext.cli.data import NAMES
from tie_ext.cli.report import table
from tie_ext.cli.reproduce.comparison import METHODS, has_garbage, label
from tie_ext.utils.files import read_json_lines, reading

# The paper's Table 1, "TIE / No TIE" in percent: ID accuracy on the diagonal, else the share of OOD images in the garbage class.
PAPER_1 = {
    "mnist": (
        "99.1 / 97.5",
        "89.5 / 23.4",
        "99.1 / 31.7",
        "99.4 / 36.2",
        "98.6 / 28.9",
        "98.3 / 25.6",
    ),
    "fashionmnist": (
        "85.2 / 37.8",
        "92.6 / 91.3",
        "96.3 / 39.4",
        "95.7 / 35.7",
        "94.8 / 30.8",
        "93.5 / 27.2",
    ),
    "svhn": (
        "93.6 / 40.5",
        "94.9 / 23.1",
        "89.4 / 87.9",
        "87.6 / 38.4",
        "86.9 / 36.1",
        "84.2 / 33.7",
    ),
    "cifar10": (
        "97.8 / 46.9",
        "95.7 / 36.8",
        "88.2 / 25.1",
        "85.5 / 84.7",
        "83.6 / 39.2",
        "81.4 / 37.0",
    ),
    "cifar100": (
        "98.1 / 35.8",
        "96.8 / 22.7",
        "88.9 / 38.3",
        "80.1 / 35.6",
        "78.1 / 77.5",
        "83.1 / 30.8",
    ),
    "tinyimagenet": (
        "94.2 / 32.5",
        "91.9 / 28.4",
        "87.4 / 37.6",
        "82.9 / 36.1",
        "81.7 / 24.5",
        "54.8 / 52.2",
    ),
}
# Its Table 2, FPR@95 in percent: "UE / ODIN / energy / Mahalanobis".
PAPER_2 = {
    "mnist": (
        "-",
        "7.47 / 5.99 / 2.86 / 0.83",
        "45.50 / 33.75 / 22.47 / 0.04",
        "11.37 / 6.58 / 1.99 / 0.00",
        "14.30 / 9.67 / 3.43 / 0.00",
        "12.04 / 7.88 / 2.54 / 0.01",
    ),
    "fashionmnist": (
        "66.77 / 45.65 / 51.21 / 8.81",
        "-",
        "13.22 / 1.95 / 0.90 / 3.98",
        "19.71 / 4.89 / 1.44 / 0.39",
        "20.53 / 5.05 / 1.37 / 0.52",
        "24.24 / 5.74 / 2.44 / 1.41",
    ),
    "svhn": (
        "96.24 / 97.82 / 99.08 / 4.72",
        "31.86 / 35.73 / 41.99 / 37.85",
        "-",
        "15.15 / 12.59 / 20.17 / 79.29",
        "16.98 / 15.68 / 23.20 / 78.35",
        "16.47 / 14.10 / 20.56 / 80.86",
    ),
    "cifar10": (
        "77.95 / 75.18 / 77.60 / 12.16",
        "81.96 / 70.57 / 72.75 / 53.14",
        "60.79 / 63.06 / 57.58 / 90.56",
        "-",
        "66.32 / 66.19 / 67.12 / 94.45",
        "67.74 / 66.63 / 67.08 / 94.76",
    ),
    "cifar100": (
        "72.35 / 68.42 / 64.38 / 18.3",
        "75.91 / 70.16 / 73.27 / 45.8",
        "78.44 / 73.02 / 22.71 / 26.8",
        "66.87 / 19.2 / 64.11 / 66.2",
        "-",
        "69.54 / 64.07 / 73.85 / 88.3",
    ),
    "tinyimagenet": (
        "71.92 / 74.65 / 72.44 / 21.8",
        "68.11 / 77.03 / 74.10 / 42.6",
        "65.47 / 60.64 / 25.36 / 46.3",
        "64.20 / 20.51 / 63.18 / 63.5",
        "76.88 / 63.27 / 71.73 / 74.6",
        "-",
    ),
}
OTHERS = ("notmnist", "noise", "uniform noise", "sphere noise")
"""OOD columns beside the paper's sets and the left-out classes."""


CELLS = "cells.jsonl"
"""The file that has the cells of a folder, one a line."""


def read_cells(path: Path) -> dict[str, dict]:
    """The cells in a file by their names; none where there is no file.

    Raises:
        ValueError: If a line is no cell.
    """
    cells = {}
    for number, record in enumerate(read_json_lines(path, "a cell of `tie-ext reproduce`"), 1):
        with reading(f"a cell of `tie-ext reproduce` in line {number} of {path}"):
            record["data"], record["images"], record["method"], record["config"]["epochs"]
            cells[record["cell"]] = record
    return cells


def tables(out: Path) -> str:
    """Markdown of both tables, beside the paper's figures, from the cells in ``out/cells.jsonl``."""
    cells: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for record in read_cells(out / CELLS).values():
        cells[record["data"], record["images"], record["config"]["epochs"]][
            record["method"]
        ].append(record)
    head = "Written by `tie-ext reproduce` from the cells beside it, which hold settings, commit and versions. Percent; mean ± standard deviation "
    parts = [
        f"# The paper's tables, measured\n\n{head}over the seeds. OOD is the positive class; larger scores are more OOD.\n"
    ]
    for (name, images, epochs), methods in sorted(cells.items()):
        seeds = sorted({record["config"]["seed"] for record in _all(methods)})
        counts = sorted(
            {count for record in _all(methods) for count in record["ood_images"].values()}
        )
        of_each = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        backbone = ", ".join(sorted({record["backbone"] for record in _all(methods)}))
        parts.append(
            f"## {name}: {backbone}, {images} images, {epochs} epochs, seeds {seeds}; {of_each} images of each OOD set\n"
        )
        parts += [f"    {command}" for command in _commands(_all(methods))]
        parts += [
            "\n### Table 1: ID accuracy, and images in the garbage class\n",
            table(_garbage_rates(name, methods)),
        ]
        parts += [
            "\n### Scores over all OOD images: FPR@95 (AUROC)\n",
            table(_rankings(name, methods, "all")),
        ]
        parts += [
            "\n### Table 2: the same over OOD images that level 1 let through\n",
            table(_rankings(name, methods, "through")),
        ]
        parts += [
            "\n### Rejected at either level / by the score alone, at the threshold that 5 % of the ID test images exceed\n",
            table(_rejections(name, methods)),
        ]
        parts.append(
            "\n### The predecessor's claim: the least confident ID image against the most confident OOD image let through\n"
        )
        parts += [table(_claim(name, methods)), "\n### Cost\n", table(_cost(methods)), ""]
        if rows := _judged(out, methods):
            parts += [
                "### Inversions that plain networks of the other seeds take for the class asked for\n",
                table(rows),
                "",
            ]
    if missing := _json(out / "not_run.json"):
        parts += [
            "## Not run\n",
            *(f"- {name}: {reason}" for name, reason in sorted(missing.items())),
            "",
        ]
    return "\n".join(parts)


def _commands(records: Sequence[Mapping]) -> list[str]:
    """What makes the records anew: their commands, those that differ in nothing but the seeds as one."""
    seeds = defaultdict(set)
    for record in records:
        seeds[re.sub(r" --seeds( \d+)+", "", record["command"])].add(record["config"]["seed"])
    return [
        f"{command} --seeds {' '.join(map(str, sorted(of)))}"
        for command, of in sorted(seeds.items())
    ]


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _columns(name: str, records: Sequence[Mapping]) -> list[str]:
    """OOD sets of a table: the left-out classes, the paper's, and the others, where any record has them."""
    seen = {other for record in records for other in record["ood_images"]}
    return [
        other
        for other in ("other classes", *NAMES, *OTHERS)
        if other in seen or (other in NAMES and other != name.partition(":")[0])
    ]


def _order(methods: Mapping[str, list[dict]]) -> list[str]:
    return [m for m in METHODS if m in methods] + sorted(m for m in methods if m not in METHODS)


def _all(methods: Mapping[str, list[dict]]) -> list[dict]:
    return [record for records in methods.values() for record in records]


def _garbage_rates(name: str, methods: Mapping[str, list[dict]]) -> list[dict]:
    rows = []
    for method in _order(methods):
        numbers = [record["numbers"] for record in methods[method]]
        row = {
            "": label(method),
            "seeds": str(len(numbers)),
            "ID accuracy": _spread([n["accuracy"] for n in numbers]),
        }
        for key, column in (("id_garbage_rate", "ID in garbage"), ("id_rejected", "ID rejected")):
            row[column] = _spread([n[key] for n in numbers]) if key in numbers[0] else "-"
        for other in _columns(name, _all(methods)):
            rates = [
                n["garbage_rate"][other] for n in numbers if other in n.get("garbage_rate", {})
            ]
            row[other] = _spread(rates) if rates else "-"
        rows.append(row)
    if name not in PAPER_1:
        return rows
    paper = dict(zip(NAMES, PAPER_1[name], strict=True))
    return [*rows, {"": "the paper: TIE / no TIE", "ID accuracy": paper.pop(name), **paper}]


def _rankings(name: str, methods: Mapping[str, list[dict]], which: str) -> list[dict]:
    rows = []
    columns = _columns(name, _all(methods))
    for method in (m for m in _order(methods) if has_garbage(m) or which == "all"):
        records = methods[method]
        for score in next(iter(_sets_of(records[0]["level2"]).values())):
            if score not in ("through", "most_confident_through"):
                rows.append(
                    {
                        "": f"{label(method)}, {score}",
                        **{
                            other: _fpr_and_auroc(records, score, other, which)
                            for other in columns
                        },
                    }
                )
    if which == "all" or name not in PAPER_2:
        return rows or [{"": "-"}]
    paper = {
        other: figure for other, figure in zip(NAMES, PAPER_2[name], strict=True) if other != name
    }
    return [*rows, {"": "the paper: UE / ODIN / energy / Mahalanobis", **paper}]


def _rejections(name: str, methods: Mapping[str, list[dict]]) -> list[dict]:
    rows = []
    for method in (m for m in _order(methods) if has_garbage(m)):
        records = methods[method]
        row = {
            "": label(method),
            "ID": f"{_spread([r['numbers']['id_rejected'] for r in records])} / 5.00",
        }
        for other in _columns(name, _all(methods)):
            pairs = [
                (
                    r["numbers"]["rejected"][other],
                    1 - r["level2"][other]["score"]["all"]["fpr95_id"],
                )
                for r in records
                if other in r["level2"]
            ]
            row[other] = " / ".join(map(_spread, zip(*pairs, strict=True))) or "-"
        rows.append(row)
    return rows or [{"": "-"}]


def _sets_of(level2: Mapping) -> dict:
    return {other: found for other, found in level2.items() if isinstance(found, dict)}


def _claim(name: str, methods: Mapping[str, list[dict]]) -> list[dict]:
    rows = []
    for method in (m for m in _order(methods) if has_garbage(m)):
        levels = [record["level2"] for record in methods[method]]
        row = {
            "": label(method),
            "least confident ID": _spread([level["least_confident_id"] for level in levels]),
        }
        for other in _columns(name, _all(methods)):
            most = [
                level[other]["most_confident_through"]
                for level in levels
                if level.get(other, {}).get("through")
            ]
            row[other] = _spread(most) if most else "-"
        rows.append(row)
    return rows or [{"": "-"}]


def _judged(out: Path, methods: Mapping[str, list[dict]]) -> list[dict]:
    rows, judged = [], _json(out / "inversions.json")
    for method in _order(methods):
        names = {record["cell"] for record in methods[method]} & set(judged)
        if names:
            last = [record["log"][-1]["agreement"][:-1] for record in methods[method]]
            own = _spread(
                [mean(share for share in agreement if share is not None) for agreement in last]
            )
            others = _spread([mean(judged[name].values()) for name in sorted(names)])
            rows.append(
                {
                    "": label(method),
                    "the network itself (n+1 outputs)": own,
                    "plain networks": others,
                }
            )
    return rows


def _cost(methods: Mapping[str, list[dict]]) -> list[dict]:
    rows = []
    for method in _order(methods):
        records = methods[method]
        row = {
            "": label(method),
            "minutes": f"{mean(r['seconds'] for r in records) / 60:.1f}",
            "threads": str(records[0]["threads"]),
        }
        row["processor"] = ", ".join(sorted({r.get("processor", "not recorded") for r in records}))
        for stage in ("train", "invert", "exclude"):
            seconds = [entry["seconds"][stage] for r in records for entry in r["log"]]
            row[f"{stage}, s an epoch"] = f"{median(seconds):.1f}" if seconds else "-"
        rows.append(row)
    return rows


def _fpr_and_auroc(records: Sequence[Mapping], score: str, other: str, which: str) -> str:
    found = [r["level2"][other][score][which] for r in records if other in r["level2"]]
    found = [m for m in found if m is not None]
    return (
        f"{_spread([m['fpr95'] for m in found])} ({_spread([m['auroc'] for m in found])})"
        if found
        else "-"
    )


def _spread(values: Sequence[float]) -> str:
    scaled = [100 * v for v in values]
    return f"{mean(scaled):.2f}" + (f" ± {stdev(scaled):.2f}" if len(scaled) > 1 else "")
