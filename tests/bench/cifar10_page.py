"""The paper's CIFAR-10 row in docs/research/papers.md, from the record of cifar10_loop.py."""

import json
from functools import cache
from pathlib import Path

from public_page import percent

from tie_ext.cli.tables import table

RECORD = Path(__file__).parents[2] / "docs" / "results" / "cifar10_resnet20.json"
LEVEL_1 = {
    "accuracy": "85.5",
    "mnist": "97.8",
    "fashionmnist": "95.7",
    "cifar100": "83.6",
    "tinyimagenet": "81.4",
}
"""TIE's Table 1: accuracy, and OOD images in garbage."""
LEVEL_2 = {
    "mnist": ("77.95", "75.18", "77.60", "12.16"),
    "fashionmnist": ("81.96", "70.57", "72.75", "53.14"),
    "cifar100": ("66.32", "66.19", "67.12", "94.45"),
    "tinyimagenet": ("67.74", "66.63", "67.08", "94.76"),
}
"""Table 2, FPR@95 of the scores below."""
SCORES = ("UE", "ODIN", "energy", "Mahalanobis")


@cache
def runs() -> dict:
    """Runs by head."""
    return json.loads(RECORD.read_text())["runs"]


def commands() -> str:
    """What made them."""
    return "\n".join(f"    {run['command']}" for run in runs().values())


def level_1() -> str:
    """Accuracy, and shares in garbage."""
    rows = []
    for name in ("accuracy", "id_garbage_rate", *runs()["linear"]["numbers"]["garbage_rate"]):
        row = {"images": name.replace("_", " "), "the paper": LEVEL_1.get(name, "")}
        for head, run in runs().items():
            of = run["numbers"]
            row[head] = percent(of.get(name, of["garbage_rate"].get(name)))
        rows.append(row)
    return table(rows)


def level_2() -> str:
    """FPR@95 of the paper's scores, of the linear logit's run."""
    rows = []
    for name, paper in LEVEL_2.items():
        of = runs()["linear"]["level 2"][name]
        for score, value in zip(SCORES, paper, strict=True):
            row = {"OOD set": name, "score": score, "the paper": value}
            for key, some in (("all", "all"), ("let through", "through")):
                row[key] = percent(of[score][some] and of[score][some]["fpr95"])
            rows.append(row)
    return table(rows)


def facts() -> dict[str, str]:
    """Single numbers."""
    of, many = runs()["linear"], runs()["multilayer"]
    return {
        "epochs": str(len(of["tau"])),
        "epochs multilayer": str(len(many["tau"])),
        "first": f"{of['excluded'][0]} of {of['proposed'][0]}",
        "last": f"{of['excluded'][-1]} of {of['proposed'][-1]}",
        "tau": f"{of['tau'][0]:.2f} and {of['tau'][-1]:.2f}",
        "rejected": percent(of["numbers"]["id_rejected"]),
    }


FACTS = ("epochs", "epochs multilayer", "first", "last", "tau", "rejected")
