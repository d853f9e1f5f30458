"""How to teach a garbage head: what it reads, which outliers, how many, how long. Chosen on held-out ID and validation images, by the worst column.

    python tests/bench/head_search.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors

Reads a plain network that tests/bench/attached.py trained. The statistics of all images are computed once; each head then takes seconds. What is
compared is the share in garbage as the network decides, and beside it the share above the line that 1 in 1000 held-out ID images pass, by which a
head that is only more eager does not win. Writes docs/results/attached/head_search/NAME.json.
"""

import math
import time
from collections.abc import Iterable, Mapping

import torch
from attached import OUT, Trained, image_sets, made_by, parser_of
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.classifier import classifier
from tie_ext.models.head import GarbageHead
from tie_ext.models.statistics import STATISTICS
from tie_ext.outliers.primitives import Rng
from tie_ext.outliers.procedural import FAMILIES, greyed, permuted_pixels, shuffled_tiles
from tie_ext.training.augmentation import corrupt
from tie_ext.training.config import HeadConfig
from tie_ext.training.fit_head import fit_head
from tie_ext.utils.files import write_json
from tie_ext.utils.random import seeded
from tie_ext.utils.views import frozen_view

SEEDS = (0,)
AS_IT_WAS = {"shapes": 0.4, "noise": 0.25, "masks": 0.25, "waves": 0.1}
"""The first mixture."""
SHAPES = {"shapes": 0.7, "noise": 0.1, "masks": 0.15, "waves": 0.05}
MADE = ("tiles", "permuted")
"""Outliers made of ID images."""
TRIALS: dict[str, dict] = {
    "first mixture, a third made of ID images": {"shares": AS_IT_WAS, "made": 1 / 3},
    "first mixture": {"shares": AS_IT_WAS},
    "shapes": {},
    "shapes, mean and deviation alone": {"read": (0, 1)},
    "shapes, largest and smallest alone": {"read": (2, 3)},
    "shapes, a tenth made of ID images": {"made": 0.1},
    "shapes, a third made of ID images": {"made": 1 / 3},
    "shapes alone": {"shares": {"shapes": 1.0}},
    "shapes, one an image": {"times": 1},
    "shapes, three an image": {"times": 3},
    "shapes, weight 3": {"weight": 3.0},
    "shapes, weight 10": {"weight": 10.0},
    "shapes, weight 10, a tenth made of ID images": {"weight": 10.0, "made": 0.1},
    "shapes, three an image, weight 3": {"times": 3, "weight": 3.0},
    "shapes, three an image, weight 3, 800 steps": {"times": 3, "weight": 3.0, "steps": 800},
    "shapes, six an image, weight 3": {"times": 6, "weight": 3.0},
    "shapes, six an image, weight 10": {"times": 6, "weight": 10.0},
    "shapes, three an image, weight 3, processed": {"times": 3, "weight": 3.0, "processed": True},
    "shapes, three an image, weight 10, processed": {
        "times": 3,
        "weight": 10.0,
        "processed": True,
    },
    "shapes, three an image, weight 3, processed, 4800 steps": {
        "times": 3,
        "weight": 3.0,
        "processed": True,
        "steps": 4800,
    },
    "shapes, 800 steps": {"steps": 800},
    "shapes, 3200 steps": {"steps": 3200},
}
"""Where nothing else is said: two outliers an ID image by the second mixture, all statistics, weight 1, 1600 steps, ID images as they are alone.
*Processed*: the same processed another way beside them."""


@torch.no_grad()
def statistics(net: TIENet, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """``(N, S)`` of all images, and the logarithm ``(N,)`` of the largest probability of an ID class."""
    net = frozen_view(net)
    pairs = [net.statistics(x) for x in batches]
    sureness = [net.fc(h).log_softmax(1).amax(1) for h, _ in pairs]
    return torch.cat([s for _, s in pairs]), torch.cat(sureness)


def columns(net: TIENet, kept: Iterable[int]) -> Tensor:
    """Indices of the features and of some of the four statistics of every channel."""
    parts, start = [torch.arange(net.feature_size)], net.feature_size
    for channels in net.garbage.layers.values():
        channels = min(channels, 128)
        parts += [torch.arange(start + k * channels, start + (k + 1) * channels) for k in kept]
        start += STATISTICS * channels
    return torch.cat(parts)


def outliers(net: TIENet, images: ImageBatches, most: Mapping[str, int]) -> dict[str, Tensor]:
    """Statistics of so many outliers of each family."""
    found, rng, shape = {}, Rng(), net.image_shape
    for name, count in most.items():
        if name in MADE:
            make = shuffled_tiles if name == "tiles" else permuted_pixels
            batches = (make(x, rng) for x, _ in images)
        else:
            batches = (
                net.from_unit(greyed(FAMILIES[name][1]((500, *shape), rng), rng))
                for _ in range(math.ceil(count / 500))
            )
        found[name] = statistics(net, batches)[0][:count]
        print(f"{len(found[name])} {name}", flush=True)
    return found


def main() -> None:
    a = parser_of(__doc__).parse_args()
    of = Trained.read(a.network.stem)
    sets = image_sets(of.data, a.root, of.images, of.seed)
    plain = TIENet.load(a.network)
    net = TIENet(classifier(plain), plain.num_classes, plain.image_shape, head="multilayer").eval()
    wanted = {
        name: images
        for name, images in sets.items()
        if name in ("train", "held") or name.startswith("val:")
    }
    seen = {
        name: statistics(net, (x for x, _ in ImageBatches(of, 500))) for name, of in wanted.items()
    }
    n = len(sets["train"])
    plans = []
    for label, trial in TRIALS.items():
        shares, made, total = (
            trial.get("shares", SHAPES),
            trial.get("made", 0.0),
            trial.get("times", 2) * n,
        )
        parts = {
            name: int(total * (1 - made) * share / sum(shares.values()))
            for name, share in shares.items()
        }
        plans.append(
            (label, trial, parts | {name: int(total * made / 2) for name in MADE if made})
        )
    most = {name: max(parts.get(name, 0) for _, _, parts in plans) for name in (*FAMILIES, *MADE)}
    with seeded(0):
        outside = outliers(net, ImageBatches(sets["train"], 500), most)
        again = statistics(net, (corrupt(x, Rng()) for x, _ in ImageBatches(sets["train"], 500)))[
            0
        ]
        way = statistics(net, (corrupt(x, Rng()) for x, _ in ImageBatches(sets["held"], 500)))
    seen["held, processed"] = way
    results = {}
    for label, trial, parts in plans:
        kept = columns(net, trial.get("read", range(STATISTICS)))
        inside = (
            torch.cat([seen["train"][0], again])[:, kept]
            if trial.get("processed")
            else seen["train"][0][:, kept]
        )
        rows = torch.cat([outside[name][:count, kept] for name, count in parts.items()])
        results[label] = []
        for seed in SEEDS:
            start = time.perf_counter()
            with seeded(seed):
                head = GarbageHead({}, len(kept))
                fit_head(
                    head,
                    inside,
                    rows,
                    HeadConfig(steps=trial.get("steps", 1600), weight=trial.get("weight", 1.0)),
                )
            seconds = time.perf_counter() - start
            with (
                torch.no_grad()
            ):  # in garbage: the head's odds are larger than any class's probability
                scores = {
                    name: head(s[:, kept]).squeeze(1) - largest
                    for name, (s, largest) in seen.items()
                }
            line = scores["held"].quantile(0.999)
            result = {
                "held_in_garbage": (scores["held"] > 0).double().mean().item(),
                "seconds": seconds,
            }
            result["held_corrupted_in_garbage"] = (
                (scores["held, processed"] > 0).double().mean().item()
            )
            result |= {name: {"in_garbage": (of > 0).double().mean().item(), "above_1_in_1000_of_id": (of > line).double().mean().item()}
                       for name, of in scores.items() if name.startswith("val:")}  # fmt: skip
            results[label].append(result)
            rates = ", ".join(
                f"{name} {r['in garbage']:.3f}/{r['above 1 in 1000 of ID']:.3f}"
                for name, r in result.items()
                if isinstance(r, dict)
            )
            print(
                f"{label}: held {result['held in garbage']:.3%}, processed {result['held, processed, in garbage']:.3%}; {rates}; {seconds:.0f} s",
                flush=True,
            )
    write_json(
        OUT / "head_search" / f"{a.network.stem}.json",
        {"network": a.network.stem, "results": results, **made_by(a.root)},
    )


if __name__ == "__main__":
    main()
