"""Which scores to combine, and by which rule: chosen on ID and validation images by the worst column, then judged on the OOD test sets.

    python tests/bench/combined.py docs/results/attached/work/*.scores.safetensors

Reads what tests/bench/attached.py left. Every combination of up to three scores is tried with every rule. The scale of each score comes from one
half of the held-out ID images, the threshold at 5 % false alarms from the other; the ID test set judges both. AUROC and FPR@95 are against that
set. What counts is the AUROC in the worst of all validation columns of all runs; of those within ALIKE of the best, the highest mean over these
columns is chosen. Writes docs/results/attached/combined.json. With ``--later`` nothing is chosen: what that record chose is judged on networks that
came after it, beside the best of all combinations without the head, and docs/results/attached/combined_later.json is written.
"""

import argparse
import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import torch
from attached import SAMPLED
from processed import PROCESSED
from torch import Tensor

from tie_ext.cli.evaluation import ood_metrics
from tie_ext.scores.combination import FORMULAS as RULES
from tie_ext.scores.combination import reference
from tie_ext.scores.threshold import conformal_threshold
from tie_ext.utils.files import load_state, write_json
from tie_ext.utils.provenance import provenance

OUT = Path(__file__).parents[2] / "docs" / "results" / "attached" / "combined.json"
LATER = OUT.with_name("combined_later.json")
FALSE_ALARM = 0.05
ALIKE = 0.002
"""Differences of AUROC that another seed would turn round."""


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an OOD image scores higher than an ID one, ties by half."""
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside) + torch.searchsorted(ordered, outside, right=True)
    return (below.double().mean() / (2 * len(ordered))).item()


def combined(
    scores: Mapping[str, Mapping[str, Tensor]], members: tuple[str, ...], rule: str
) -> dict[str, Tensor]:
    """Combined scores by set; the scale comes from the first half of the held-out images."""
    every = {
        name: torch.stack([scores[member][name].double() for member in members], dim=1)
        for name in scores[members[0]]
    }
    held = every.pop("held")
    learned = reference(held[: len(held) // 2])
    return {
        name: RULES[rule](learned, of)
        for name, of in {**every, "calibration": held[len(held) // 2 :]}.items()
    }


def validation(
    runs: Mapping[str, Mapping], members: tuple[str, ...], rule: str
) -> dict[str, float]:
    """AUROC of each validation column."""
    columns = {}
    for run, scores in runs.items():
        of = combined(scores, members, rule)
        columns |= {
            f"{run} {name}": auroc(of["id"], of[name]) for name in of if name.startswith("val:")
        }
    return columns


def judged(scores: Mapping, members: tuple[str, ...], rule: str) -> dict:
    """Metrics of each OOD test set, and the false alarms at the calibrated threshold, also of ID images that were processed."""
    of = combined(scores, members, rule)
    threshold = conformal_threshold(of.pop("calibration"), FALSE_ALARM)
    rejected = {
        name: (x > threshold).double().mean().item()
        for name, x in of.items()
        if name == "id" or name.startswith(PROCESSED)
    }
    test = {
        name: x for name, x in of.items() if name not in rejected and not name.startswith("val:")
    }
    return {
        "false_alarms": rejected.pop("id"),
        "processed": rejected,
        "sets": {
            name: {
                **{key: ood_metrics(of["id"], x)[key] for key in ("auroc", "fpr95_id")},
                "accepted": (x <= threshold).double().mean().item(),
            }
            for name, x in test.items()
        },
    }


COMBINE = (("GEN", SAMPLED, "head"), "stouffer")
"""What :func:`tie_ext.combine` had until body and tails: the choice of the record, with KNN of fewer training images."""
BEFORE = (("GEN", "ViM", "head"), "stouffer")
"""What it had, chosen when there were fewer networks."""


def chosen(tried: Mapping[tuple, tuple[float, float]], candidates: list[tuple]) -> tuple:
    """Members and rule: of those whose worst column is :data:`ALIKE` the best, the ones with the highest mean."""
    line = max(tried[key][0] for key in candidates) - ALIKE
    return max((key for key in candidates if tried[key][0] >= line), key=lambda key: tried[key][1])


def every_combination(scores: Mapping) -> list[tuple[tuple[str, ...], str]]:
    """Every combination of up to three scores, by every rule."""
    labels = [label for label in scores if not label.startswith("head, ") and label != SAMPLED]
    members = [of for size in (1, 2, 3) for of in combinations(labels, size)]
    return [(of, rule) for of in members for rule in (RULES if len(of) > 1 else ["zsum"])]


def best_without_head(scores: Mapping) -> dict[str, dict]:
    """By OOD test set the combination without the head that ranks it best: what nobody can choose who has not seen that set."""
    best: dict[str, dict] = {}
    for members, rule in every_combination(
        {label: of for label, of in scores.items() if label != "head"}
    ):
        of = combined(scores, members, rule)
        for name in of:
            if name in ("id", "calibration") or name.startswith(("val:", PROCESSED)):
                continue
            if (found := auroc(of["id"], of[name])) > best.get(name, {"auroc": -1})["auroc"]:
                best[name] = {"members": members, "rule": rule, "auroc": found}
    return best


def record_of(
    runs: Mapping[str, Mapping], best: Mapping[str, tuple], validated: list[dict]
) -> dict:
    """What is written: the chosen combinations, judged on each network."""
    return {
        "runs": list(runs),
        "false_alarm": FALSE_ALARM,
        "validation": validated,
        "judged": {
            name: {
                "members": members,
                "rule": rule,
                "runs": {run: judged(scores, members, rule) for run, scores in runs.items()},
            }
            for name, (members, rule) in best.items()
        },
        **provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scores", type=Path, nargs="+")
    parser.add_argument(
        "--later",
        action="store_true",
        help="choose nothing: judge what was chosen before, on these networks",
    )
    a = parser.parse_args()
    runs = {
        path.name.removesuffix(".scores.safetensors"): load_state(path, "scores")
        for path in a.scores
    }
    if a.later:
        chosen_on = json.loads(OUT.read_text())["runs"]
        if known := sorted(set(chosen_on) & set(runs)):
            raise ValueError(
                f"Expected networks that came later, but got {', '.join(known)}, on which the combinations were chosen"
            )
        best = {
            name: (tuple(of["members"]), of["rule"])
            for name, of in json.loads(OUT.read_text())["judged"].items()
            if name != "combine"
        }
        best = {"combine": COMBINE, "combine before": BEFORE, **best}
        without = {run: best_without_head(scores) for run, scores in runs.items()}
        write_json(LATER, {**record_of(runs, best, []), "best_without_head": without})
        return
    tried = {}
    for members, rule in every_combination(next(iter(runs.values()))):
        columns = validation(runs, members, rule)
        tried[members, rule] = (min(columns.values()), sum(columns.values()) / len(columns))
    ranked = sorted(tried, key=tried.__getitem__, reverse=True)
    best = {
        "combine": COMBINE,
        "combine before": BEFORE,
        "chosen": chosen(tried, ranked),
        "without the head": chosen(tried, [key for key in ranked if "head" not in key[0]]),
        "single, without the head": chosen(
            tried, [key for key in ranked if len(key[0]) == 1 and "head" not in key[0]]
        ),
        "head": (("head",), "zsum"),
    }
    best |= {
        f"chosen by {rule}": chosen(
            tried, [key for key in ranked if key[1] == rule and len(key[0]) > 1]
        )
        for rule in RULES
    }
    validated = [
        {
            "members": members,
            "rule": rule,
            "worst": tried[members, rule][0],
            "mean": tried[members, rule][1],
        }
        for members, rule in ranked
    ]
    write_json(OUT, record_of(runs, best, validated))
    for name, (members, rule) in best.items():
        worst, mean = tried[members, rule]
        print(
            f"{name}: {' + '.join(members)} by {rule}: validation worst {worst:.4f}, mean {mean:.4f}"
        )
    for members, rule in ranked[:20]:
        print(f"  {' + '.join(members)} by {rule}: {tried[members, rule]}")


if __name__ == "__main__":
    main()
