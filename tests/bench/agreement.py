"""Which inversions plain networks take for the class that was asked for: by how clearly the code asks, and by what tau lets through.

    python tests/bench/agreement.py RUN PLAIN.safetensors [PLAIN.safetensors ...]

RUN is a folder of `tie-ext train`; the plain networks were trained apart, with other seeds. Adds the run to docs/results/agreement.json, from which
docs/research/agreement.md is made. Only inversions are looked at.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli.evaluation import all_logits
from tie_ext.cli.folder import read_settings
from tie_ext.cli.images import ImageSet
from tie_ext.cli.snapshots import to_bytes
from tie_ext.outliers.inversion import CLEAR, generate, soft_code
from tie_ext.scores.decision import uncertainty
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.views import eval_view

OUT = Path(__file__).parents[2] / "docs" / "results" / "agreement.json"
PER_CLASS, PARTS = 1000, 5
MARGINS = (0.0, 0.25, CLEAR, 1.0)
"""Training asks at 0."""


@torch.no_grad()
def shares_of(
    run: Path, judges: Sequence[TIENet], per_class: int = PER_CLASS
) -> dict[str, dict[str, float]]:
    """Shares of a run's inversions by how they were asked for: ``landed`` in the output asked for, ``judged`` to be it, mean over the judges."""
    net = TIENet.load(run / "network.safetensors")
    trainer = read_settings(run).recipe.trainer(net)
    trainer.load(run / "training.safetensors")
    generator = trainer.synthesizers[0].generator
    y = torch.arange(net.num_classes).repeat(per_class)
    found = {}
    for margin in MARGINS:
        torch.manual_seed(0)
        code = soft_code(y, net.num_classes + 1, margin)
        images = ImageSet(to_bytes(net, generate(eval_view(generator), code)), y)
        logits = all_logits(net, images)
        landed = (logits.argmax(1) == y).double()
        judged = (
            torch.stack([all_logits(judge, images)[:, :-1].argmax(1) == y for judge in judges])
            .double()
            .mean(0)
        )
        entries = code.topk(2, dim=1).values.double()

        def shares(
            of: Tensor, by: tuple[Tensor, ...] = (entries[:, 0], entries[:, 1], landed, judged)
        ) -> dict[str, float]:
            """Of some of the inversions, by their places."""
            means = (value[of].mean().item() for value in by)
            return {
                "inversions": len(of) / len(y),
                **dict(zip(("largest", "second", "landed", "judged"), means, strict=True)),
            }

        found[f"margin {margin}"] = shares(torch.arange(len(y)))
        if not margin:
            certain = uncertainty(logits.softmax(1)) <= net.tau
            found |= {
                "at most tau": shares(certain.argwhere()[:, 0]),
                "above tau": shares((~certain).argwhere()[:, 0]),
            }
            fifths = (entries[:, 0] - entries[:, 1]).argsort().chunk(PARTS)
            found |= {f"fifth {i}": shares(fifth) for i, fifth in enumerate(fifths, start=1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("judges", type=Path, nargs="+")
    a = parser.parse_args()
    settings = read_settings(a.run)
    found = shares_of(a.run, [TIENet.load(judge) for judge in a.judges])
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    tau = float(TIENet.load(a.run / "network.safetensors").tau)
    run = {
        "data": settings.data,
        "images": settings.images,
        "epochs": settings.config.epochs,
        "seed": settings.config.seed,
        "tau": tau,
    }
    command = f"python tests/bench/agreement.py RUN {' '.join(judge.name for judge in a.judges)}"
    key = f"{settings.data}-seed{settings.config.seed}"
    record[key] = {
        **run,
        "judges": [judge.stem for judge in a.judges],
        "shares": found,
        **provenance(),
        "command": command,
    }
    write_json(OUT, record)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
