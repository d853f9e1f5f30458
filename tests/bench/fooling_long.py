"""Does a generator of another seed, or one that searches five times as long, find what that of fooling.py did not?

    python tests/bench/fooling_long.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors [NAME ...]

Adaptive generators against the combinations of the networks of fooling_rivals.py that are named; all detectors of a network see what was found.
Writes docs/results/fooling/long/NAME.json after each, and goes on from there.
"""

import json
import time

import torch
from attached import Trained, made_by, parser_of
from fooling import GENERATOR, OUT, PER_CLASS, detectors_of, id_sets

from tie_ext import TIENet
from tie_ext.bench import fooling
from tie_ext.bench.fooling import verdict
from tie_ext.support.files import write_json
from tie_ext.synthesis import Candidates

SEARCHES = ((GENERATOR, 1), (GENERATOR, 2), (5 * GENERATOR, 0))
"""Steps of a generator, and its seed."""
SEEN = ("combined", "combined, largest")
"""Detectors that the generators see."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", help="default: loop-search")
    a = parser.parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    path = OUT / "long" / f"{a.network.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["network"], row["seen"], row["steps"], row["seed"]) for row in rows}
    for name in a.names or ["loop-search"]:
        net = TIENet.load(OUT / "work" / f"{a.network.stem}-{name}.safetensors")
        detectors = detectors_of(net, sets, with_hosts=False)
        y = torch.arange(net.num_classes).repeat(PER_CLASS)
        for steps, seed in SEARCHES:
            for seen in SEEN:
                if (name, seen, steps, seed) in done:
                    continue
                start = time.perf_counter()
                images = Candidates(fooling.invert(net, y, steps, seed, detectors[seen]), y)
                found = {label: verdict(net, detector, images)[0]["found"] for label, detector in detectors.items()}
                rows.append({"network": name, "seen": seen, "steps": steps, "seed": seed, "found": found, "seconds": time.perf_counter() - start})
                print(rows[-1], flush=True)
                write_json(path, {"rows": rows, **made_by(a.root)})


if __name__ == "__main__":
    main()
