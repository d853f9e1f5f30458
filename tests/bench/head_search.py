"""How to teach a garbage head: how many outliers, which, how long. Chosen on held-out ID and validation images, by the worst column.

    python tests/bench/head_search.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors

Reads a plain network that tests/bench/attached.py trained. The statistics of all images are computed once; each head then takes seconds. Every head
is compared where it puts as many held-out ID images in garbage (1 in 1000), so that a head that is only more eager does not win. Writes
docs/results/attached/head_search/NAME.json.
"""

import argparse
import time
from pathlib import Path

import torch
from attached import OUT, image_sets
from torch import Tensor

from tie_ext import GarbageHead, TIENet, teaching
from tie_ext.app.data import ImageBatches
from tie_ext.bench.comparison import classifier
from tie_ext.outliers import make
from tie_ext.support.files import write_json
from tie_ext.support.modules import frozen
from tie_ext.support.provenance import provenance
from tie_ext.support.random import seeded

SEEDS = (0, 1)


@torch.no_grad()
def statistics(net: TIENet, batches) -> Tensor:
    """``(N, S)`` of all images."""
    with frozen(net):
        return torch.cat([net.statistics(x)[1] for x in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("network", type=Path)
    a = parser.parse_args()
    data, size, _, seed = a.network.stem.split("-")
    sets = image_sets(data, a.root, int(size.partition("x")[0]), int(seed.removeprefix("seed")))
    plain = TIENet.load(a.network)
    net = TIENet(classifier(plain), plain.num_classes, plain.image_shape, garbage="layers").eval()
    wanted = {name: of for name, of in sets.items() if name in ("train", "held") or name.startswith("val:")}
    seen = {name: statistics(net, (x for x, _ in ImageBatches(of, 500))) for name, of in wanted.items()}
    images, outside = ImageBatches(sets["train"], 500), {}
    with seeded(0):
        for name in ("procedural", "procedural", "procedural", "shuffle", "multiscale"):
            maker = make(name, net)
            drawn = statistics(net, (maker.sample(net, x, y).x for x, y in images))
            outside[name] = torch.cat([outside[name], drawn]) if name in outside else drawn
    n = len(sets["train"])
    trials = {  # outliers, steps, learning rate, hidden units
        "as it was": ({"procedural": n}, 1600, 1e-3, 128),
        "twice the outliers": ({"procedural": 2 * n}, 1600, 1e-3, 128),
        "three times": ({"procedural": 3 * n}, 1600, 1e-3, 128),
        "three times, 4800 steps": ({"procedural": 3 * n}, 4800, 1e-3, 128),
        "4800 steps": ({"procedural": n}, 4800, 1e-3, 128),
        "400 steps": ({"procedural": n}, 400, 1e-3, 128),
        "hidden 512": ({"procedural": 2 * n}, 1600, 1e-3, 512),
        "with tiles": ({"procedural": n, "shuffle": n // 4}, 1600, 1e-3, 128),
        "with multi-scale noise": ({"procedural": n, "multiscale": n // 2}, 1600, 1e-3, 128),
        "rate 3e-3": ({"procedural": n}, 1600, 3e-3, 128),
        "rate 1e-2": ({"procedural": n}, 1600, 1e-2, 128),
        "twice, rate 3e-3": ({"procedural": 2 * n}, 1600, 3e-3, 128),
        "twice, rate 1e-2": ({"procedural": 2 * n}, 1600, 1e-2, 128),
        "three times, rate 1e-2": ({"procedural": 3 * n}, 1600, 1e-2, 128),
    }
    results = {}
    for label, (parts, steps, rate, hidden) in trials.items():
        rows = torch.cat([outside[name][:count] for name, count in parts.items()])
        results[label] = []
        for seed in SEEDS:
            start = time.perf_counter()
            with seeded(seed):
                head = GarbageHead(net.garbage.layers, net.feature_size, hidden)
                teaching.RATE = rate
                teaching.teach(head, seen["train"], rows, steps)
            with torch.no_grad():
                scores = {name: head(of).squeeze(1) for name, of in seen.items()}
            line = scores["held"].quantile(0.999)
            result = {"held in garbage": (scores["held"] > 0).double().mean().item(), "seconds": time.perf_counter() - start}
            result |= {name: {"in garbage": (of > 0).double().mean().item(), "above 1 in 1000 of ID": (of > line).double().mean().item()}
                       for name, of in scores.items() if name.startswith("val:")}  # fmt: skip
            results[label].append(result)
            rates = ", ".join(f"{name} {r['in garbage']:.3f}/{r['above 1 in 1000 of ID']:.3f}" for name, r in result.items() if isinstance(r, dict))
            print(f"{label}: held {result['held in garbage']:.4%}; {rates}; {result['seconds']:.0f} s", flush=True)
    write_json(OUT / "head_search" / f"{a.network.stem}.json", {"network": a.network.stem, "results": results, **provenance()})


if __name__ == "__main__":
    main()
