"""Which scalar ranks both levels best, on ID data and what is made of it or of noise; no OOD set is looked at.

    python tests/bench/score_ablation.py --root DATA --networks docs/results/reproduce/networks/mnist-allx*-tie-seed0.safetensors

Negatives: MNIST test images. Positives: noise (white, uniform, multi-scale), test images whose 7x7-pixel tiles are shuffled, means of two test
images of different classes; and, as a question of its own, test images that the network gets wrong. Writes docs/results/score_ablation.json;
tables.py makes docs/research/score_ablation.md of it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli import data
from tie_ext.cli.evaluation import all_logits, ood_metrics
from tie_ext.cli.images import ImageSet
from tie_ext.cli.tables import table
from tie_ext.outliers import Domain, Noise
from tie_ext.scores.decision import ood_score, uncertainty
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

DOCS = Path(__file__).parents[2] / "docs"


def best_id_odds(logits: Tensor) -> Tensor:
    """Log-odds of any output but the best ID class."""
    best = logits[:, :-1].argmax(1, keepdim=True)
    return logits.scatter(1, best, -torch.inf).logsumexp(1) - logits.gather(1, best)[:, 0]


def folded(logits: Tensor) -> Tensor:
    """Squared distance of p to the nearest ID vertex of the simplex: UE with the hole filled."""
    p = logits.softmax(1)
    return (p[:, :-1] - torch.eye(p.shape[1] - 1)[p[:, :-1].argmax(1)]).square().sum(1) + p[
        :, -1
    ].square()


SCORES = {
    "log-odds of garbage": ood_score,
    "p of garbage": lambda logits: logits.softmax(1)[:, -1],
    "log-odds against best ID class": best_id_odds,
    "distance to nearest ID vertex": folded,
    "UE, n+1 outputs": lambda logits: uncertainty(logits.softmax(1)),
    "UE, n outputs": lambda logits: uncertainty(logits[:, :-1].softmax(1)),
}


def tiles(x: Tensor) -> Tensor:
    """Each image cut into 16 tiles of 7x7 pixels, shuffled."""
    parts = x.unfold(2, 7, 7).unfold(3, 7, 7).reshape(len(x), 16, 7, 7)
    order = torch.rand(len(x), 16).argsort(1)
    parts = parts[torch.arange(len(x))[:, None], order].reshape(len(x), 4, 4, 7, 7)
    return parts.permute(0, 1, 3, 2, 4).reshape(len(x), 1, 28, 28)


def positives(test: ImageSet) -> dict[str, ImageSet]:
    count, shape = len(test), test.shape
    multiscale = (
        (
            Noise(Domain(10, shape, torch.tensor(0.0), torch.tensor(1.0))).draw((count, *shape))
            * 255
        )
        .round()
        .to(torch.uint8)
    )
    other = torch.randperm(count)
    mixed = ((test.x.int() + test.x[other].int()) // 2).to(torch.uint8)[test.y != test.y[other]]
    made = {"multi-scale noise": multiscale, "shuffled tiles": tiles(test.x), "mixtures": mixed}
    return {
        "white noise": data.noise("gaussian", count, shape),
        "uniform noise": data.noise("uniform", count, shape),
        **{name: ImageSet(x, torch.full((len(x),), -1)) for name, x in made.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--networks", type=Path, nargs="+", required=True)
    a = parser.parse_args()
    torch.manual_seed(0)
    test = data.load("mnist", "test", a.root)
    sets = positives(test)
    results: dict = {}
    for path in a.networks:
        net = TIENet.load(path)
        logits = all_logits(net, test)
        wrong = logits[:, :-1].argmax(1) != test.y
        others = {name: all_logits(net, images) for name, images in sets.items()}
        results[path.stem] = {
            label: {name: ood_metrics(score(logits), score(of)) for name, of in others.items()}
            | {"misclassified": ood_metrics(score(logits)[~wrong], score(logits)[wrong])}
            for label, score in SCORES.items()
        }
    said = provenance(places={"DATA": a.root, "NETWORKS": a.networks[0].parent})
    write_json(DOCS / "results" / "score_ablation.json", {"results": results, **said})
    names = [*sets, "misclassified"]
    for metric in ("auroc", "fpr95"):
        means = {
            label: {
                name: sum(r[label][name][metric] for r in results.values()) / len(results)
                for name in names
            }
            for label in SCORES
        }
        print(metric)
        print(
            table(
                [
                    {"score": label} | {name: f"{100 * v:.2f}" for name, v in of.items()}
                    for label, of in means.items()
                ]
            )
        )


if __name__ == "__main__":
    main()
