"""Are inversions of a class what independent networks take for it too?

    python tests/bench/explained.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors [--steps STEPS]

Reads a plain network that tests/bench/attached.py trained, inverts it by :func:`tie_ext.explain`, and asks the networks of other seeds beside the
file. Adds to docs/results/explained.json, and draws the inversions beside their nearest training images into docs/figures/.
"""

import json
import time
from pathlib import Path

import torch
from attached import Trained, made_by, other_seeds, parser_of
from fooling import FIGURES, id_sets

from tie_ext import TIENet, explain
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.explain import class_grid
from tie_ext.training.explain import STEPS
from tie_ext.utils.files import write_json

RECORD = Path(__file__).parents[2] / "docs" / "results" / "explained.json"
PER_CLASS = 20
"""Inversions of each class."""


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    a = parser.parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    start = time.perf_counter()
    found = explain(
        TIENet.load(a.network),
        ImageBatches(sets["train"], 500),
        per_class=PER_CLASS,
        steps=a.steps,
    )
    seconds = time.perf_counter() - start
    x = found.inversions.flatten(0, 1)
    y = torch.arange(len(found.inversions)).repeat_interleave(PER_CLASS)
    judged = {}
    for path in other_seeds(a.network):
        with torch.no_grad():
            judged[path.stem] = (TIENet.load(path)(x).argmax(1) == y).double().mean().item()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record[a.network.stem] = {
        "steps": a.steps,
        "inversions": len(x),
        "agreement": found.agreement,
        "judged": judged,
        "seconds": seconds,
        **made_by(a.root),
    }
    write_json(RECORD, record)
    class_grid(found, sets["train"].classes, 4).savefig(
        FIGURES / f"explain_{a.network.stem}.png", dpi=80, bbox_inches="tight"
    )
    print(f"{a.network.stem}: as asked {found.agreement:.4f}, judged {judged}, {seconds:.0f} s")


if __name__ == "__main__":
    main()
