"""docs/research/benchmark.md, of the record of benchmark.py; tables.py writes it."""

import json

from benchmark import OUT, shown

HEAD = """# OpenOOD's CIFAR-10 benchmark, run by pytorch-ood

Made by `python tests/bench/tables.py` of `docs/results/benchmark.json`, which this command wrote:

    {command}

`Benchmark.evaluate` of pytorch-ood, on a public ResNet-20 (cifar10_resnet20_akamaster, which [public_networks.md](public_networks.md) uses too)
with a garbage class attached; percent, of its `OODMetrics`.
FPR@95 is its FPR95TPR: ID images that are taken for OOD ones where 95 % of the OOD images are found. Other pages turn that round. The head is of before 0.3: it read four statistics of a channel, and KNN 5000 images.

{numbers}.
They are a random sample. The lists have OpenOOD's names, but the images in them are those at hand. CIFAR-10, CIFAR-100 and MNIST are lossless,
TinyImageNet is JPEG, as it came; all are brought to 32 pixels by the benchmark's transform. As in OpenOOD's lists, 1000 images of the CIFAR-10 test
set are for validation, and those tested are of the others. The garbage class is attached to the training images; `combine` is what it gives on
them and on those for validation. All others are the library's own detectors, fitted on the training images, and combinations of them by z-scores
(Stouffer's rule), scaled on the validation images; none of these reads the garbage class. A cell is AUROC / FPR@95.

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


def pull_request() -> str:
    """The rows of the library's own detectors and their combinations; empty without a record."""
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    return shown([row for row in rows if row["detector"] not in ("TIEDetector", "combine")])
