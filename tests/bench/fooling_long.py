"""Do generators of other seeds, and searchers who take longer, find what those of fooling.py did not?

    python tests/bench/fooling_long.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors [NAME ...]

Ascent from all kinds of start, and generators, against the combinations of the networks of fooling_rivals.py that are named; all detectors of a
network see what was found. Writes docs/results/fooling/long/NAME.json after each, and goes on from there.
"""

import json
import time

import torch
from attached import Trained, made_by, parser_of
from fooling import GENERATOR, OUT, PER_CLASS, detectors_of, id_sets, others_of, starts, together

from tie_ext import TIENet
from tie_ext.bench import fooling
from tie_ext.bench.fooling import verdict
from tie_ext.support.files import write_json
from tie_ext.synthesis import Candidates

SEARCHES = (("generator", GENERATOR, 1), ("generator", GENERATOR, 2), ("generator", 5 * GENERATOR, 0), ("ascent", 1000, 0))
"""Searchers, their steps, and the seed of a generator."""
SEEN = (None, "combined", "combined, largest")
"""Detectors that they see; None for blind ones."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", help="default: loop-search")
    a = parser.parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    path = OUT / "long" / f"{a.network.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    sets["ood"] = together(others_of(of.data, a.root, sets["id"].shape))
    done = {tuple(row[key] for key in ("network", "seen", "searcher", "steps", "seed")) for row in rows}
    for name in a.names or ["loop-search"]:
        net = TIENet.load(OUT / "work" / f"{a.network.stem}-{name}.safetensors")
        detectors = detectors_of(net, sets, with_hosts=False)
        y = torch.arange(net.num_classes).repeat(PER_CLASS)
        begun = starts(net, sets, y)
        for searcher, steps, seed in SEARCHES:
            for seen in SEEN:
                if (name, seen, searcher, steps, seed) in done:
                    continue
                start = time.perf_counter()
                if searcher == "generator":
                    images = Candidates(fooling.invert(net, y, steps, seed, detectors.get(seen)), y)
                else:
                    asked = y.repeat(len(begun))
                    ((_, x),) = fooling.climb(net, torch.cat(list(begun.values())), asked, detectors.get(seen), (steps,))
                    images = Candidates(x, asked)
                found = {label: verdict(net, detector, images)[0]["found"] for label, detector in detectors.items()}
                rows.append(
                    {
                        "network": name,
                        "seen": seen,
                        "searcher": searcher,
                        "steps": steps,
                        "seed": seed,
                        "found": found,
                        "seconds": time.perf_counter() - start,
                    }
                )
                print(rows[-1], flush=True)
                write_json(path, {"rows": rows, **made_by(a.root)})


if __name__ == "__main__":
    main()
