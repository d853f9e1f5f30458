"""The paper's CIFAR-10 row: levels 1 and 2 of runs of TIE's loop, beside its Tables 1 and 2.

    python tests/bench/cifar10_loop.py --runs RUNS --out docs/results/cifar10_resnet20.json

RUNS has two folders, ``linear`` and ``multilayer``, of ``tie-ext train``; the record has the calls
that made them.
"""

import argparse
import json
from pathlib import Path

import torch

from tie_ext.cli.folder import load_network, read_record, read_settings
from tie_ext.cli.reproduce.run import level_2
from tie_ext.cli.settings import load_images
from tie_ext.cli.transform import load_transform
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance


def row(folder: Path) -> dict:
    """Numbers of a run at its end, and what its loop did in each epoch."""
    record, settings, transform = (
        read_record(folder),
        read_settings(folder),
        load_transform(folder),
    )
    if transform is None:
        raise ValueError(f"Expected a run that says how it reads images in {folder}")
    flags = [
        f"--data {settings.data} --root DATA --backbone {settings.backbone}",
        f"--epochs {settings.recipe.config.epochs} --lam {settings.recipe.config.lam}",
        f"--head {settings.recipe.head} --ood {' '.join(settings.ood)} --out RUNS/{folder.name}",
    ]
    found = {
        "command": f"tie-ext train {' '.join(flags)}",
        **{name: record[name] for name in ("commit", "versions", "numbers")},
        **{name: [sum(of[name]) for of in record["log"]] for name in ("proposed", "excluded")},
        "tau": [of["tau"] for of in record["log"]],
    }
    if settings.recipe.head == "linear":  # the paper's
        images = load_images(settings, settings.recipe.config.seed, transform)
        found["level 2"] = level_2(load_network(folder), images)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("runs", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    found = {head: row(a.runs / head) for head in ("linear", "multilayer")}
    write_json(a.out, {"runs": found, **provenance(places={"RUNS": a.runs})})
    print(json.dumps({head: of["numbers"] for head, of in found.items()}, indent=1))


if __name__ == "__main__":
    main()
