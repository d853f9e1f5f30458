"""Do generators of other seeds, and searchers who take longer, find what those of fooling.py did not?

    python tests/bench/fooling_long.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors [NAME ...]

Ascent from all kinds of start, and generators, against the combinations of the networks of fooling_rivals.py that are named; all detectors of a
network see what was found. Writes docs/results/fooling/long/NAME.json after each search, and goes on from there.
"""

import json
import time
from itertools import product

import adversarial_inputs
import torch
from adversarial_inputs import Detector, verdict
from attached import Trained, made_by, parser_of
from fooling import (
    GENERATOR,
    OUT,
    PER_CLASS,
    detectors_of,
    digest,
    id_sets,
    others_of,
    starts,
    together,
)
from torch import Tensor

from tie_ext import TIENet
from tie_ext.outliers.base import Candidates
from tie_ext.utils.files import write_json

SEARCHES = (
    ("generator", GENERATOR, 1),
    ("generator", GENERATOR, 2),
    ("generator", 5 * GENERATOR, 0),
    ("ascent", 1000, 0),
)
"""Searchers, their steps, and the seed of a generator."""
SEEN = ("blind", "combined", "combined, largest")
"""What they see: the ID logits alone, or a detector too."""


def searched(
    net: TIENet,
    y: Tensor,
    begun: Tensor,
    searcher: str,
    steps: int,
    seed: int,
    seen: Detector | None,
) -> Candidates:
    """What a searcher finds, from ``begun`` ``(k * M, C, S, S)`` where it climbs, for the classes ``y (M,)``."""
    if searcher == "generator":
        return Candidates(adversarial_inputs.invert(net, y, steps, seed, seen), y)
    asked = y.repeat(len(begun) // len(y))
    ((_, x),) = adversarial_inputs.ascend(net, begun, asked, seen, (steps,))
    return Candidates(x, asked)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", help="default: loop-search")
    parser.add_argument(
        "--most", type=int, default=SEARCHES[-1][1], help="steps; longer searches are left out"
    )
    a = parser.parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    sets["ood"] = together(others_of(of.data, a.root, sets["id"].shape))
    path = OUT / "long" / f"{a.network.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {"networks": {}, "rows": []}
    for name in a.names or ["loop-search"]:
        file = (
            a.network.with_name(f"{a.network.stem}-head.safetensors")
            if name == "plain"
            else OUT / "work" / f"{a.network.stem}-{name}.safetensors"
        )
        if record["networks"].get(name) != digest(file):  # trained anew since
            record["networks"][name] = digest(file)
            record["rows"] = [row for row in record["rows"] if row["network"] != name]
        done = [
            tuple(row[key] for key in ("searcher", "steps", "seed", "seen"))
            for row in record["rows"]
            if row["network"] == name
        ]
        net = TIENet.load(file)
        detectors = detectors_of(net, sets, with_hosts=False)
        y = torch.arange(net.num_classes).repeat(PER_CLASS)
        begun = torch.cat(list(starts(net, sets, y).values()))
        for search, seen in product(SEARCHES, SEEN):
            if search[1] > a.most or (*search, seen) in done:
                continue
            start = time.perf_counter()
            images = searched(net, y, begun, *search, None if seen == "blind" else detectors[seen])
            found = {
                label: verdict(net, detector, images)[0]["found"]
                for label, detector in detectors.items()
            }
            row = {
                "network": name,
                "seen": seen,
                **dict(zip(("searcher", "steps", "seed"), search, strict=True)),
                "found": found,
            }
            record["rows"].append(row | {"seconds": time.perf_counter() - start})
            print(record["rows"][-1], flush=True)
            write_json(path, {**record, **made_by(a.root)})


if __name__ == "__main__":
    main()
