"""The tables of ``tie-ext reproduce``, made from its cells, beside the paper's own figures."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev

from tie_ext.cli.data import NAMES
from tie_ext.cli.folder import renamed
from tie_ext.cli.reproduce.comparison import LABELS, has_garbage, label
from tie_ext.cli.tables import table
from tie_ext.utils.files import read_json_lines, reading


def _paper(rows: str) -> dict[str, tuple[str, ...]]:
    """A table of the paper: names of ID sets, each before a value for each of :data:`NAMES`."""
    words, width = rows.split(), 1 + len(NAMES)
    lines = [words[i : i + width] for i in range(0, len(words), width)]
    return {name: tuple(cell.replace("/", " / ") for cell in row) for name, *row in lines}


PAPER_1 = _paper("""
mnist         99.1/97.5  89.5/23.4  99.1/31.7  99.4/36.2  98.6/28.9  98.3/25.6
fashionmnist  85.2/37.8  92.6/91.3  96.3/39.4  95.7/35.7  94.8/30.8  93.5/27.2
svhn          93.6/40.5  94.9/23.1  89.4/87.9  87.6/38.4  86.9/36.1  84.2/33.7
cifar10       97.8/46.9  95.7/36.8  88.2/25.1  85.5/84.7  83.6/39.2  81.4/37.0
cifar100      98.1/35.8  96.8/22.7  88.9/38.3  80.1/35.6  78.1/77.5  83.1/30.8
tinyimagenet  94.2/32.5  91.9/28.4  87.4/37.6  82.9/36.1  81.7/24.5  54.8/52.2
""")
"""The paper's Table 1, "TIE / no TIE" in percent: ID accuracy on the diagonal, else the share of
OOD images in the garbage class."""
PAPER_2 = _paper("""
mnist         -  7.47/5.99/2.86/0.83  45.50/33.75/22.47/0.04
              11.37/6.58/1.99/0.00  14.30/9.67/3.43/0.00  12.04/7.88/2.54/0.01
fashionmnist  66.77/45.65/51.21/8.81  -  13.22/1.95/0.90/3.98
              19.71/4.89/1.44/0.39  20.53/5.05/1.37/0.52  24.24/5.74/2.44/1.41
svhn          96.24/97.82/99.08/4.72  31.86/35.73/41.99/37.85  -
              15.15/12.59/20.17/79.29  16.98/15.68/23.20/78.35  16.47/14.10/20.56/80.86
cifar10       77.95/75.18/77.60/12.16  81.96/70.57/72.75/53.14  60.79/63.06/57.58/90.56
              -  66.32/66.19/67.12/94.45  67.74/66.63/67.08/94.76
cifar100      72.35/68.42/64.38/18.3  75.91/70.16/73.27/45.8  78.44/73.02/22.71/26.8
              66.87/19.2/64.11/66.2  -  69.54/64.07/73.85/88.3
tinyimagenet  71.92/74.65/72.44/21.8  68.11/77.03/74.10/42.6  65.47/60.64/25.36/46.3
              64.20/20.51/63.18/63.5  76.88/63.27/71.73/74.6  -
""")
"""Its Table 2, FPR@95 in percent: "UE / ODIN / energy / Mahalanobis"."""
OTHERS = ("notmnist", "noise", "uniform noise", "sphere noise")
"""OOD columns besides the paper's sets and the left-out classes."""
CELLS = "cells.jsonl"
"""File of the cells in a folder, one per line."""

Records = Sequence[Mapping]


def read_cells(path: Path) -> dict[str, dict]:
    """The cells in a file by name; none where there is no file.

    Raises:
        ValueError: If a line is no cell.
    """
    cells = {}
    for number, record in enumerate(read_json_lines(path, "a cell of `tie-ext reproduce`"), 1):
        with reading(f"a cell of `tie-ext reproduce` in line {number} of {path}"):
            record["data"], record["images"], record["method"], record["config"]["epochs"]
            cells[record["cell"]] = renamed(record)
    return cells


def tables(out: Path) -> str:
    """Markdown of all tables, from the cells in ``out/cells.jsonl``."""
    groups: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for record in read_cells(out / CELLS).values():
        key = record["data"], record["images"], record["config"]["epochs"]
        groups[key][record["method"]].append(record)
    parts = [
        "# The paper's tables, measured\n\nWritten by `tie-ext reproduce` from the cells beside "
        "it, which hold settings, commit and versions. Percent; mean ± standard deviation over "
        "the seeds. OOD is the positive class; larger scores are more OOD.\n"
    ]
    for (name, images, epochs), methods in sorted(groups.items()):
        group = Group(name, methods)
        parts += [
            group.title(images, epochs),
            *(f"    {line}" for line in commands(group.records)),
        ]
        for title, rows in group.tables().items():
            parts += [f"\n### {title}\n", table(rows or [{"": "-"}])]
        parts.append("")
    return "\n".join(parts)


def commands(records: Records) -> list[str]:
    """The commands that make the records; those that differ in the seeds alone as one."""
    seeds = defaultdict(set)
    for record in records:
        command = re.sub(r" --seeds( \d+)+", "", record["command"])
        seeds[command].add(str(record["config"]["seed"]))
    return [
        f"{command} --seeds {' '.join(sorted(of, key=int))}"
        for command, of in sorted(seeds.items())
    ]


class Group:
    """The cells of one ID set, number of images and number of epochs.

    Arguments:
        name: The ID set.
        methods: Records by method.
    """

    def __init__(self, name: str, methods: Mapping[str, Records]):
        order = [*LABELS, *sorted({*methods} - {*LABELS})]
        self.name, self.methods = name, {m: methods[m] for m in order if m in methods}
        self.garbage = {m: of for m, of in self.methods.items() if has_garbage(m)}
        self.records = [record for of in self.methods.values() for record in of]
        seen = {other for record in self.records for other in record["ood_images"]}
        seen |= {*NAMES} - {name.partition(":")[0]}
        self.columns = [o for o in ("other classes", *NAMES, *OTHERS) if o in seen]

    def title(self, images: int, epochs: int) -> str:
        """A heading that says what was measured."""
        seeds = sorted({record["config"]["seed"] for record in self.records})
        counts = sorted({n for record in self.records for n in record["ood_images"].values()})
        of_each = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        backbone = ", ".join(sorted({record["backbone"] for record in self.records}))
        return (
            f"## {self.name}: {backbone}, {images} images, {epochs} epochs, seeds {seeds}; "
            f"{of_each} images of each OOD set\n"
        )

    def tables(self) -> dict[str, list[dict]]:
        """Rows by title."""
        return {
            "Table 1: ID accuracy, and images in the garbage class": self.garbage_rates(),
            "Scores over all OOD images: FPR@95 (AUROC)": self.rankings("all"),
            "Table 2: the same over OOD images that level 1 let through": self.rankings("through"),
            "Rejected at either level / by the score alone, at the threshold that 5 % of the ID "
            "test images exceed": self.rejections(),
            "Cost": self.cost(),
        }

    def garbage_rates(self) -> list[dict]:
        """The paper's Table 1."""
        rows = []
        for method, records in self.methods.items():
            numbers = [record["numbers"] for record in records]
            row = {"": label(method), "seeds": str(len(numbers))}
            keys = {"ID accuracy": "accuracy", "ID in garbage": "id_garbage_rate"}
            for column, key in (keys | {"ID rejected": "id_rejected"}).items():
                row[column] = _spread(n.get(key) for n in numbers)
            rates = [n.get("garbage_rate", {}) for n in numbers]
            rows.append(row | {o: _spread(rate.get(o) for rate in rates) for o in self.columns})
        if self.name in PAPER_1:
            paper = dict(zip(NAMES, PAPER_1[self.name], strict=True))
            accuracy = paper.pop(self.name)
            rows.append({"": "the paper: TIE / no TIE", "ID accuracy": accuracy, **paper})
        return rows

    def rankings(self, which: str) -> list[dict]:
        """FPR@95 and AUROC of every score, over ``all`` OOD images or those let ``through``."""
        rows = []
        for method, records in (self.methods if which == "all" else self.garbage).items():
            levels = [record["level2"] for record in records]
            scores = next(found for found in levels[0].values() if isinstance(found, dict))
            for score in (s for s in scores if isinstance(scores[s], dict)):
                row = {"": f"{label(method)}, {score}"}
                for other in self.columns:
                    of = [m for at in levels if other in at and (m := at[other][score][which])]
                    fpr, auroc = (_spread(m[key] for m in of) for key in ("fpr95", "auroc"))
                    row[other] = f"{fpr} ({auroc})" if of else "-"
                rows.append(row)
        if which == "through" and self.name in PAPER_2:
            paper = dict(zip(NAMES, PAPER_2[self.name], strict=True))
            del paper[self.name]
            rows.append({"": "the paper: UE / ODIN / energy / Mahalanobis", **paper})
        return rows

    def rejections(self) -> list[dict]:
        """Rejected by the two levels, and by the score alone."""
        rows = []
        for method, records in self.garbage.items():
            rejected = _spread(r["numbers"]["id_rejected"] for r in records)
            row = {"": label(method), "ID": f"{rejected} / 5.00"}
            for other in self.columns:
                of = [r for r in records if other in r["level2"]]
                levels = _spread(r["numbers"]["rejected"][other] for r in of)
                alone = _spread(1 - r["level2"][other]["score"]["all"]["fpr95_id"] for r in of)
                row[other] = f"{levels} / {alone}" if of else "-"
            rows.append(row)
        return rows

    def cost(self) -> list[dict]:
        """Minutes of a cell, and seconds of an epoch."""
        rows = []
        for method, records in self.methods.items():
            minutes = mean(r["seconds"] for r in records) / 60
            row = {"": label(method), "minutes": f"{minutes:.1f}"}
            row["threads"] = str(records[0]["threads"])
            processors = {r.get("processor", "not recorded") for r in records}
            row["processor"] = ", ".join(sorted(processors))
            for stage in ("train", "invert", "exclude"):
                seconds = [entry["seconds"][stage] for r in records for entry in r["log"]]
                row[f"{stage}, s an epoch"] = f"{median(seconds):.1f}" if seconds else "-"
            rows.append(row)
        return rows


def _spread(shares: Iterable[float | None]) -> str:
    """Mean ± standard deviation of shares of 1, in percent; ``-`` of none."""
    scaled = [100 * share for share in shares if share is not None]
    if not scaled:
        return "-"
    return f"{mean(scaled):.2f}" + (f" ± {stdev(scaled):.2f}" if len(scaled) > 1 else "")
