"""What scoring costs beside the backbone's own forward pass: the head, and the combination, at 32 and at 224 pixels.

    python tests/bench/cost_of_scoring.py --out docs/results/cost/scoring.json

Untrained networks and random images, as neither changes the cost. Five rounds, each with one pass of every kind in turn; medians. On a CPU the
time is the processor's, on one thread, so that what else runs there does not count.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from tie_ext import Combined, TIENet, attach
from tie_ext.cli import registry
from tie_ext.models.backbones import ResNet20
from tie_ext.pytorch_ood.knn import MAX_SAMPLES
from tie_ext.pytorch_ood.recommended import Sample, chosen_members
from tie_ext.training.config import HeadConfig
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

ROUNDS = 5
CASES = {
    "conv5, 32 pixels": (lambda: registry.build("conv5", 3, 10), 32, 128),
    "resnet20, 32 pixels": (lambda: ResNet20(3, 10), 32, 128),
    "torchvision resnet18, 224 pixels": (
        lambda: registry.build("torchvision:resnet18", 3, 10),
        224,
        16,
    ),
}
"""Backbone, pixels, and images a batch."""


def made(backbone: nn.Module, size: int, device: str) -> tuple[TIENet, Combined]:
    """A network with a head, and the combination of it, fitted to noise."""
    x = torch.rand(40, 3, size, size)
    batches = [(part, torch.arange(len(part)) % 10) for part in x.split(20)]
    # What the head has learned costs nothing here.
    net = attach(backbone.to(device), batches, 10, head_config=HeadConfig(steps=10))
    # As many training images as combine keeps, and its KNN, trusted or not.
    rows = torch.rand(MAX_SAMPLES, net.feature_size, device=device)
    sample = Sample(rows, torch.arange(MAX_SAMPLES) % 10)
    members = chosen_members(sample, net, (net.fc.weight, net.fc.bias))
    return net, Combined(members, 0.2).fit(batches)


def seconds(work: Callable[[Tensor], object], x: Tensor) -> float:
    """Of one pass."""
    clock = time.process_time if x.is_cpu else time.perf_counter
    start = clock()
    with torch.no_grad():
        work(x)
    if not x.is_cpu:
        torch.accelerator.synchronize()
    return clock() - start


def measured(name: str, device: str) -> dict:
    """Medians in seconds of a pass of each kind, and their ratios to the backbone's."""
    make, size, batch = CASES[name]
    backbone = make().eval()
    net, combined = made(backbone, size, device)
    x = torch.rand(batch, 3, size, size, device=device)
    kinds = {"backbone": backbone, "head": net.decide, "combination": combined.decide}
    for work in kinds.values():
        seconds(work, x)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, work in kinds.items():
            times[kind].append(seconds(work, x))
    medians = {kind: median(of) for kind, of in times.items()}
    return {
        "batch": batch,
        "seconds": times,
        "ratio": {kind: medians[kind] / medians["backbone"] for kind in ("head", "combination")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    for name in CASES:
        found[name] = measured(name, a.device)
        print(
            f"{name}: "
            + ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in found[name]["ratio"].items()),
            flush=True,
        )
    if a.out:
        write_json(a.out, {"cases": found, **provenance(a.device)})


if __name__ == "__main__":
    main()
