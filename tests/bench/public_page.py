"""docs/research/public_networks.md, of the records of public_networks.py; tables.py writes it."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from tie_ext.cli.tables import table

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "public_networks"
OURS = ("combine", "attach", "combine's KNN")
"""What is no rival."""
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
HEAD = """# Networks that others trained

Made by `python tests/bench/tables.py` of the records in `docs/results/public_networks/`, which
this command makes (it goes on where it was stopped; each record holds its own call):

    python tests/bench/public_networks.py --images DATA --cache CACHE \\
        --out docs/results/public_networks

Measured with tie_ext {version}, pytorch-ood {host}. **Worst regret**: for each network, and for
its near and its far sets apart, AUROC of the detector that `combine` gives minus that of the best
single score of others *of that very column, chosen by looking at it*; AUROC is averaged over sets,
seeds and choices of classes before. The worst of these is the number. At that version it is **{worst}**, and
the mean over columns {mean}. The best a single score can do is {single}.

- **CIFAR.** Weights: akamaster/pytorch_resnet_cifar10 and Vitor-OP/ood-neural-collapse-cifar100.
  Fitted on 10 000 training images (CIFAR-100: 9000); 2000 official test images for calibration,
  the others to test. Near: the other CIFAR, and the classes of TinyImageNet that are not there to
  choose by, also those that CIFAR has too. Far: MNIST, FashionMNIST, notMNIST, Gaussian and
  uniform noise. Every image is brought to 32 pixels in the same way.
- **ImageNet.** 1000 photographs, one a class: 600 to fit, 200 for calibration, 200 to test. *Most
  of them are among the images that the network was trained on*, which flatters every score alike.
  Far: receipts, blood cells, satellite images, scenes. What needs several images of each class has
  no number.
- **Flowers, trash.** EfficientNet-lite0's features and a linear layer learned on two thirds of the
  images of some classes; a ninth for calibration, the rest to test. Five random choices of the
  classes. Near: the classes that were left out. Far: as ImageNet, the other of the two sets,
  clothes, digits.
- **MNIST, FashionMNIST.** The project's CNN, five epochs of 20 000 images, fitted on half of them.
  No near sets. Far: each other, notMNIST, CIFAR-10, TinyImageNet, noise.

Up to three seeds of head and of the images that are fitted on, up to five choices with a seed
each; the table of runs has how many. Textures, which others have as a far set, are not at hand.
ODIN, Gram and NAC ask for gradients or early layers of each image: they are of the first seed, or
choice, and of the first {few} images of each set. pytorch-ood's detectors have its defaults; with
NAC's, made to be tuned for each network, nearly every image is covered in full. ASH, SCALE, ReAct
and VRA shape pooled features. ViM has half of the dimensions. Mahalanobis++ is pytorch-ood's
Mahalanobis on features of length 1. WeiPer + KLD has its authors' settings for CIFAR-10, CIFAR-100
and ImageNet, by the number of classes; they were found on features of 512 and more dimensions, and
its histograms of 64 are noise. *combine* is that version's (garbage head, KNN, GEN summed), before body and tails; *attach* the head
alone.
"""


def name(column: str) -> str:
    """Of ``NETWORK near`` and the like, for people."""
    network, kind = column.split()
    return f"{CALLED[network]}, {kind}"


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def measured(summary: dict, place: int) -> str:
    """A table of all scores, near / far by network, those with the best worst regret first."""
    columns, rows = summary["columns"], []
    names = [*OURS, *(score for score in summary["regret"] if score not in OURS)]
    for score in names:
        row = {"score": f"**{score}**" if score in OURS else score}
        for network, called in CALLED.items():
            cells = [columns.get(f"{network} {kind}", {}).get(score) for kind in ("near", "far")]
            shown = [percent(cell and cell[place]) for cell in cells]
            if any(f"{network} {kind}" in columns for kind in ("near", "far")):
                row[called] = " / ".join(shown)
        if place == 0:
            worst, average, count = summary["regret"][score]
            most = max(of[2] for of in summary["regret"].values())
            row["worst regret"] = percent(worst) + ("" if count == most else f" (of {count})")
            row["mean regret"] = percent(average)
        rows.append(row)
    return table(rows)


def regret_rows(summary: dict) -> list[dict[str, str]]:
    """What combine has beside the best rival, by column."""
    rows = []
    for column, of in summary["of combine"].items():
        scores = summary["columns"][column]
        ours, best = scores[OURS[0]][0], scores[of["best"]][0]
        low, high = of.get("interval", (None, None))
        between = "" if low is None else f"{percent(low)} to {percent(high)}"
        row = {
            "column": name(column),
            "combine": percent(ours),
            "best single score": f"{of['best']} {percent(best)}",
        }
        rows.append(row | {"regret": percent(of["regret"]), "95 % of bootstraps": between})
    return rows


def validation_rows(summary: dict, records: list[dict]) -> list[dict[str, str]]:
    """AUROC of each validation set, mean over the runs."""
    rows = []
    for score in (*OURS, *(score for score in summary["regret"] if score not in OURS)):
        found: dict[str, list[float]] = defaultdict(list)
        for record in records:
            of = record["scores"].get(score) or {}
            for place in record["validation"]:
                if place in of:
                    found[f"{record['network']} {place}"].append(of[place][0])
        if found:
            row = {"score": score}
            for network, called in CALLED.items():
                cells = [found.get(f"{network} {place}") for place in records[0]["validation"]]
                if any(cells):
                    row[called] = " / ".join(percent(values and mean(values)) for values in cells)
            rows.append(row)
    return rows


def runs_rows(records: list[dict]) -> list[dict[str, str]]:
    """Accuracy, false alarms and the time that attach took."""
    by: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        by[record["network"]].append(record)
    rows = []
    for network, called in CALLED.items():
        if of := by.get(network):
            sizes = of[0]["images"]
            alarms = mean(record["scores"][OURS[0]]["false alarms"] for record in of)
            row = {
                "network": called,
                "runs": len(of),
                "accuracy": percent(mean(record["accuracy"] for record in of)),
            }
            row["fit / calibration / test"] = " / ".join(
                str(sizes[part]) for part in ("fit", "calibration", "test")
            )
            rows.append(
                row
                | {
                    "false alarms of combine": percent(alarms),
                    "attach, s": f"{mean(r['attach, seconds'] for r in of):.0f}",
                }
            )
    return rows


def reasons(summary: dict, records: list[dict]) -> str:
    """Which scores have no number where, and why."""
    found = {(score, of["network"]): why for of in records for score, why in of["why not"].items()}
    for column, scores in summary["columns"].items():
        network, kind = column.split()
        for score in summary["regret"]:
            if kind != "validation" and scores.get(score) is None:
                found.setdefault((score, network), "not run")
    by: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (score, network), why in sorted(found.items()):
        by[network, SAID.get(why, " ".join(why.split()))].append(score)
    lines = [f"- {CALLED[network]}: {', '.join(of)}: {why}" for (network, why), of in by.items()]
    return "\n".join(lines) or "None."


def page() -> str:
    """The page; empty where there are no records yet."""
    if not (RESULTS / "regret.json").exists():
        return ""
    summary = json.loads((RESULTS / "regret.json").read_text())
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]
    most = max(of[2] for of in summary["regret"].values())
    single = next(
        score for score, of in summary["regret"].items() if score not in OURS and of[2] == most
    )
    worst, average, _ = summary["regret"][OURS[0]]
    facts = {
        "version": summary["versions"]["tie_ext"],
        "host": summary["versions"]["pytorch-ood"],
        "worst": percent(worst),
        "mean": percent(average),
        "single": f"{percent(summary['regret'][single][0])} ({single})",
        "few": "500 (photographs: 50)",
    }
    parts = [
        HEAD.format(**facts),
        "## AUROC, near / far\n",
        "Percent. In bold what is ours, which is no rival. *(of N)*: the score has numbers in N\n"
        "columns alone.\n",
        measured(summary, 0),
        "\n## Where combine stands\n",
        "The interval is of images drawn again, for those networks that have few.\n",
        table(regret_rows(summary)),
        "\n## FPR@95, near / far\n",
        "OOD images accepted where 95 % of the ID test images are; percent.\n",
        measured(summary, 1),
        "\n## Rejected at 5 % false alarms, near / far\n",
        "The threshold is drawn on the calibration images (combine: on half of them, its scale\n"
        "takes the other half); percent.\n",
        measured(summary, 2),
        "\n## Validation sets\n",
        "Sets that settings may be chosen by: AUROC on twenty classes of TinyImageNet / glyphs /\n"
        "photographs and textures. They are in no mean above.\n",
        table(validation_rows(summary, records)),
        "\n## Runs\n",
        table(runs_rows(records)),
        "\n## No number\n",
        reasons(summary, records),
        "",
    ]
    return "\n".join(parts)
