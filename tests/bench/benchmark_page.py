"""docs/research/benchmark.md, of the record of benchmark.py; tables.py writes it."""

import json

from benchmark import OUT, shown

HEAD = """# OpenOOD's CIFAR-10 benchmark, run by pytorch-ood

Made by `python tests/bench/tables.py` of `docs/results/benchmark.json`, which this command wrote:

    {command}

`Benchmark.evaluate` of pytorch-ood, on an attached ResNet-20 of 28 epochs; percent, of its `OODMetrics`.
A cell is AUROC / FPR@95. FPR@95 is its FPR95TPR: ID images that are taken for OOD ones where 95 % of the OOD images are found. Other pages turn that round.

{numbers}.
The lists are not OpenOOD's own, and the images are JPEG files of 32 by 32 pixels in all sets. As in OpenOOD's lists, 1000 images of the
CIFAR-10 test set are for validation, and those tested are of the others. Combined is of the garbage class, ViM and
GEN, as `combine` was then (it has KNN now); ViM is fitted on the training images, and Combined on those for validation.

Left out, as they are not at hand: {missing}.
So this is not a row for the benchmark's own table.
"""


def page() -> str:
    """The page; empty where there is no record yet."""
    if not OUT.exists():
        return ""
    record = json.loads(OUT.read_text())
    numbers = "Images: " + ", ".join(f"{count} {name}" for name, count in record["images"].items())
    missing = ", ".join(f"{name} ({reason})" for name, reason in record["missing"].items())
    return f"{HEAD.format(command='python tests/bench/' + record['command'], numbers=numbers, missing=missing or 'none')}\n{shown(record['rows'])}\n"
