"""TIE on an accelerator: attach, an epoch and scoring, beside plain training and forward passes.

    python tests/bench/accelerator.py --out docs/results/cost/accelerator.json
    python tests/bench/accelerator.py --device cpu --quick

ResNet-18 at 32 pixels and ResNet-50 at 224 pixels (torchvision's, untrained), in float32 and
bfloat16. Images are procedural and lie on the device: no loader is measured. Images a second by
the clock on the wall, medians of turns, after one that is not counted; at most ten minutes on one
GPU. ``waits`` says which lines wait for the device; scores are compared with the CPU's.
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from tie_ext import TIEConfig, TIENet, TIETrainer, attach
from tie_ext.outliers import Inversion, InversionSettings, Procedural
from tie_ext.outliers.base import Domain
from tie_ext.training.config import HeadConfig
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

CLASSES = 10
NETWORKS = {"resnet18": (32, 20_480, 512), "resnet50": (224, 2560, 64)}
"""Image side, images, batch size."""
QUICK = (32, 20, 10)


def images(count: int, side: int, size: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Batches of procedural images and labels, on the device."""
    domain = Domain(CLASSES, (3, side, side), torch.tensor(0.0), torch.tensor(1.0))
    prior = Procedural(domain).to(device)
    y, shape = torch.arange(size, device=device) % CLASSES, (size, 3, side, side)
    return [(prior.draw(shape), y) for _ in range(count // size)]


def rate(count: int, work: Callable[[], object], turns: int) -> float:
    """Images a second."""
    rates = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - start))
    return median(rates[1:])


def plain_epoch(net: TIENet, optimizer: torch.optim.Optimizer, batches: list) -> None:
    """An epoch of plain training."""
    net.train()
    for x, y in batches:
        loss = F.cross_entropy(net(x).float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def each(call: Callable[[Tensor], object], batches: list) -> None:
    """A call for each batch."""
    for x, _ in batches:
        call(x)


def waits(work: Callable[[], object]) -> dict[str, int]:
    """Places that waited for the GPU, and how often."""
    if not torch.cuda.is_available():
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(each.filename).name}:{each.lineno}" for each in caught)


def measure(name: str, dtype: str, a: argparse.Namespace) -> dict:
    """Rates of one network in one type."""
    side, count, size = QUICK if a.quick else NETWORKS[name]
    batches, turns = images(count, side, size, a.device), 1 if a.quick else 3
    count = size * len(batches)
    model = getattr(torchvision.models, name)(num_classes=CLASSES)
    if name == "resnet18" and not a.quick:  # the stem of CIFAR's ResNets
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model = model.to(a.device)
    plain = TIENet(model, CLASSES, (3, side, side)).to(a.device)
    plain.autocast_dtype = dtype
    optimizer = torch.optim.Adam(plain.parameters())
    net = TIENet(model, CLASSES, (3, side, side), head="multilayer").to(a.device)
    few = {"candidates": 8, "pool_size": 16} if a.quick else {}
    config = TIEConfig(epochs=turns + 3, autocast_dtype=dtype, **few)  # the last is not measured
    inversion = Inversion(net, InversionSettings(steps=2, batch_size=4) if a.quick else None)
    head = HeadConfig(steps=5, epoch_steps=5) if a.quick else None
    trainer = TIETrainer(net, config, [inversion], head_config=head)
    found = {
        "plain epoch": rate(count, lambda: plain_epoch(plain, optimizer, batches), turns),
        "TIE epoch": rate(count, lambda: trainer.epoch(batches), turns),
        "stages": trainer.log[-1].seconds,
        "waits": waits(lambda: trainer.epoch(batches)),
    }
    how = {"autocast_dtype": dtype, "head_config": head}
    attaching = partial(attach, model.eval(), batches, CLASSES, **how)
    attached = attaching()
    plain.eval()
    for work, call in (("forward", plain), ("score", attached.decide)):
        found[work] = rate(count, lambda call=call: each(call, batches), turns)
    found["attach"] = rate(count, attaching, 1)
    found["epoch in plain epochs"] = found["plain epoch"] / found["TIE epoch"]
    found["scoring, attach in passes"] = [found["forward"] / found[x] for x in ("score", "attach")]
    if torch.cuda.is_available():
        found["peak memory, MB"] = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    x = batches[0][0][:16]
    here, there = attached.decide(x), attached.cpu().decide(x.cpu())
    found["largest difference of scores"] = (here.score.cpu() - there.score).abs().max().item()
    for name in ("label", "level"):
        equal = getattr(here, name).cpu() == getattr(there, name)
        found[f"equal {name}s"] = equal.double().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="few small images, to try it")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.manual_seed(0)
    record: dict = {"command": "accelerator.py", "quick": a.quick, "networks": {}}
    for name in NETWORKS:
        for dtype in ("float32",) if a.quick else ("float32", "bfloat16"):
            record["networks"][f"{name}, {dtype}"] = found = measure(name, dtype, a)
            print(name, dtype, found, flush=True)
            if a.out:  # after each, so that a run that is cut short leaves what it has
                write_json(a.out, record | provenance(a.device))


if __name__ == "__main__":
    main()
