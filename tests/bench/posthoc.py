"""The other papers' post-hoc detectors, i-ODIN (ASCOOD) and DMR's rejection network B, on the plain networks of `tie-ext reproduce`.

    python tests/bench/posthoc.py --root DATA --networks docs/results/reproduce/networks/*mnist-20000x10-plain-seed*.safetensors

Each network is scored on the OOD sets of its cell; ODIN stands beside, as what i-ODIN changes. B sees outliers made of the images that its
network was trained on. Writes docs/results/posthoc.json; tables.py makes a part of docs/research/synthesizers.md of it.
"""

import argparse
from pathlib import Path

import torch
from pytorch_ood.detector import ODIN
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli.batches import ImageBatches, training_batches
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.reproduce.run import image_sets
from tie_ext.outliers.marginal import MarginalRepresentations, MarginalSettings
from tie_ext.pytorch_ood import IODIN, RejectionNetwork
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.random import seeded
from tie_ext.utils.views import frozen_view

OUT = Path(__file__).parents[2] / "docs" / "results" / "posthoc.json"


def scores_of(net: TIENet, root: str, name: str, count: int, seed: int) -> dict:
    """Metrics by detector and OOD set."""
    images, test, ood = image_sets(name, seed, count, root)
    detectors = {"ODIN": ODIN(net), "i-ODIN": IODIN(net)}
    net = frozen_view(net)
    with seeded(seed):
        for k, label in ((1, "B, single"), (5, "B, 5 mixed")):
            outliers = MarginalRepresentations(net, MarginalSettings(k=k))
            detectors[label] = RejectionNetwork(net.features, outliers).fit(
                training_batches(images, 128)
            )

        def scores(detector, of) -> Tensor:
            return torch.cat([detector.predict(x).detach() for x, _ in ImageBatches(of, 500)])

        found = {}
        for label, detector in detectors.items():
            id_scores = scores(detector, test)
            found[label] = {
                other: ood_metrics(id_scores, scores(detector, of)) for other, of in ood.items()
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument("--networks", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    results = {}
    for path in args.networks:
        name, run, _, seed = path.stem.split("-")
        results[path.stem] = scores_of(
            TIENet.load(path),
            args.root,
            name,
            int(run.partition("x")[0]),
            int(seed.removeprefix("seed")),
        )
        done = args.networks[
            : len(results)
        ]  # written after each, 6 to 8 minutes of one core, so that a stop loses one at most
        command = f"python tests/bench/posthoc.py --root DATA --networks {' '.join(str(path) for path in done)}"
        write_json(OUT, {"results": results, **provenance(), "command": command})
        print(
            path.stem,
            {label: f"{of['notmnist']['auroc']:.4f}" for label, of in results[path.stem].items()},
            flush=True,
        )


if __name__ == "__main__":
    main()
