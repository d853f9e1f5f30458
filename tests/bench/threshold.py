"""One threshold on the score, fitted on held-out ID images as ``TIEDetector(net, false_alarm=...)`` does, beside the paper's two levels.

    python tests/bench/threshold.py --root DATA --networks docs/results/*/networks/*.safetensors

The networks are those of `tie-ext reproduce` that have a garbage class; folder and name say how each was trained; those
under figures/ are copies of what the runs of docs/research/figures.md saved. Half of the ID test images,
drawn at random, fits the threshold and the other half judges it; then the other way round; shares are the mean of both. Of networks trained
on all images a threshold is also fitted to the paper's ID accuracy, where the network reaches it. Writes docs/results/threshold.json; tables.py
makes docs/research/threshold.md of it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli.data import NAMES
from tie_ext.cli.evaluation import all_logits
from tie_ext.cli.reproduce.comparison import has_garbage
from tie_ext.cli.reproduce.run import image_sets
from tie_ext.cli.reproduce.tables import PAPER_1
from tie_ext.scores.decision import Decision, decide, decide_by_score, ood_score
from tie_ext.scores.threshold import conformal_threshold
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

OUT = Path(__file__).parents[2] / "docs" / "results" / "threshold.json"
FALSE_ALARMS = (0.01, 0.05)
AS_PAPER = "paper accuracy"
"""The rule that accepts as many ID images as what they are as the paper's network classifies correctly."""


def shares(decision: Decision, y: Tensor) -> dict[str, float]:
    """How many images are rejected, by the garbage class alone too, and how many are accepted as what they are."""
    accepted = decision.level == 0
    return {
        "garbage": (decision.level == 1).double().mean().item(),
        "rejected": (~accepted).double().mean().item(),
        "right": (accepted & (decision.label == y)).double().mean().item(),
    }


def threshold_of_accuracy(scores: Tensor, right: Tensor, share: float) -> Tensor | None:
    """Smallest threshold at which a share of all ID images is both accepted and right; none where fewer are right with every image accepted."""
    order = scores.argsort()
    enough = right[order].double().cumsum(0) / len(scores) >= share
    return scores[order][enough][0] if enough.any() else None


def judge(net: TIENet, name: str, images: int | None, seed: int, root: str) -> dict:
    """Shares by rule (``two levels``, the false alarms allowed, or the paper's accuracy) and set."""
    _, test, ood = image_sets(name, seed, images, root)
    logits, outside = (
        all_logits(net, test),
        {other: (all_logits(net, of), of.y) for other, of in ood.items()},
    )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    halves = order.chunk(2)

    def every(fitted: Callable[[Tensor], Tensor | None] | None) -> dict | None:
        """Shares by set, of a threshold fitted on one half, or of the two levels; none where a half cannot be fitted."""
        turns = []
        for fit, held in (halves, halves[::-1]):
            threshold = fitted(fit) if fitted else None
            if fitted and threshold is None:
                return None
            sets = {"id": (logits[held], test.y[held]), **outside}
            decided = {
                other: (
                    decide(x, net.tau)
                    if threshold is None
                    else decide_by_score(x, ood_score(x), threshold),
                    y,
                )
                for other, (x, y) in sets.items()
            }
            turns.append({other: shares(decision, y) for other, (decision, y) in decided.items()})
        return {
            other: {key: mean(turn[other][key] for turn in turns) for key in of}
            for other, of in turns[0].items()
        }

    score, right = ood_score(logits), logits[:, :-1].argmax(1) == test.y
    rules = {"two levels": every(None)}
    rules |= {
        str(rate): every(lambda fit, rate=rate: conformal_threshold(score[fit], rate))
        for rate in FALSE_ALARMS
    }
    if images is None and name in PAPER_1:
        accuracy = float(PAPER_1[name][NAMES.index(name)].split(" / ")[0]) / 100
        rules[AS_PAPER] = every(
            lambda fit: threshold_of_accuracy(score[fit], right[fit], accuracy)
        )
    return {rule: found for rule, found in rules.items() if found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument("--networks", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    results = json.loads(OUT.read_text())["results"] if OUT.exists() else {}
    for path in args.networks:
        name, run, method, seed = path.stem.rsplit("-", 3)
        key = f"{path.parent.parent.name}/{path.stem}"
        if has_garbage(method.replace("+", ",").replace("_", ":")) and key not in results:
            images = run.partition("x")[0]
            count = None if images == "all" else int(images)
            results[key] = judge(
                TIENet.load(path),
                name.replace("_", ":"),
                count,
                int(seed.removeprefix("seed")),
                args.root,
            )
            print(
                key,
                {
                    rule: {other: round(100 * s["rejected"], 1) for other, s in of.items()}
                    for rule, of in results[key].items()
                },
                flush=True,
            )
            command = "python tests/bench/threshold.py --root DATA --networks " + " ".join(
                f"docs/results/{k.replace('/', '/networks/')}.safetensors" for k in results
            )
            write_json(OUT, {"results": results, **provenance(), "command": command})


if __name__ == "__main__":
    main()
