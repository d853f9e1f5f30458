"""Groups of rejected images against what they show, written to docs/results/rejects.json.

python tests/bench/rejects.py --root DATA --cache FOLDER
"""

import argparse
from collections import Counter
from pathlib import Path

import torch
from drift import noisy
from judged import Judged, judged
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from tie_ext.cli.tables import table
from tie_ext.pytorch_ood import Rejects, rejects
from tie_ext.utils.files import read_json, write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.views import eval_view

RECORD = Path(__file__).parents[2] / "docs" / "results" / "rejects.json"
FIGURE = RECORD.parents[1] / "figures" / "rejects.png"
SHOWN = 12
SETS = {"clothes": "clothes, 5 of 10 known", "flowers": "flowers, 3 of 5 known; receipts, blood"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    flags = parser.parse_args()
    sets = read_json(RECORD, "a record")["sets"] if RECORD.exists() else {}
    for name in flags.sets:
        of = judged(name, flags.root, flags.cache)
        if name == "clothes":
            figure(of)
        sets[name] = judge(of)
    places = {"DATA": flags.root, "FOLDER": flags.cache}
    write_json(RECORD, {"sets": sets} | provenance(places=places))


def judge(of: Judged) -> dict:
    """Adjusted Rand index of the groups, and of k-means on the logits, which is told the number
    of kinds; and what changed images of known classes are called."""
    batches = of.x.split(50)
    found = rejects(of.detector, batches)
    rows, labels = flat(found)
    truth = [of.truth[row] for row in rows]
    net = eval_view(of.detector.network)
    with torch.no_grad():
        logits = torch.cat([net(x) for x in batches])[rows]
    theirs = KMeans(len(set(truth)), n_init=10, random_state=0).fit_predict(logits)
    groups = [
        {
            "kind": group.kind,
            "shows": dict(Counter(of.truth[row] for row in group.rows.tolist()).most_common()),
        }
        for group in found.groups
    ]
    return {
        "rejected": found.rejected,
        "kinds": len(set(truth)),
        "ours": adjusted_rand_score(truth, labels),
        "kmeans": adjusted_rand_score(truth, theirs),
        "groups": groups,
        "changed": {name: called(of, x) for name, x in changes(of).items()},
    }


def figure(of: Judged) -> None:
    """The most typical images of each group."""
    found = rejects(of.detector, of.x.split(50))
    drawing = Figure(figsize=(7, 0.55 * len(found.groups)), layout="constrained")
    axes = drawing.subplots(len(found.groups), SHOWN, squeeze=False)
    for line, group in zip(axes, found.groups, strict=True):
        for ax, image in zip(line, of.x[group.rows[:SHOWN]], strict=False):
            ax.imshow(image[0], cmap="gray")
        for ax in line:
            ax.axis("off")
        words = f"{len(group.rows)} images, {group.kind}"
        line[0].text(-3, 14, words, ha="right", va="center", fontsize=8)
    drawing.savefig(FIGURE, dpi=90)


def flat(found: Rejects) -> tuple[list[int], list[int]]:
    """Places of rejected images, and the group of each; those of none have one of their own."""
    parts = [*(group.rows for group in found.groups), *found.others.split(1)]
    rows = [row for part in parts for row in part.tolist()]
    return rows, [number for number, part in enumerate(parts) for _ in part]


def changes(of: Judged) -> dict[str, Tensor]:
    """Images of known classes, changed."""
    net, x = of.detector.network, of.known[-300:]
    x = net.to_unit(x)
    width = x.shape[-1] / 28
    kernel = 2 * round(2 * width) + 1
    changed = {
        "blur": gaussian_blur(x, kernel, 1.0 * width),
        "noise": noisy(x, 0.15),
        "brightness": (1.8 * x).clamp(0, 1),
    }
    return {name: net.from_unit(value).clamp(net.low, net.high) for name, value in changed.items()}


def called(of: Judged, x: Tensor) -> dict[str, int]:
    """How many rejected images are in groups of each kind, of changed ones alone."""
    counts: Counter = Counter()
    for group in rejects(of.detector, x.split(50)).groups:
        counts[group.kind] += len(group.rows)
    return dict(counts)


def said() -> str:
    """What changed images of known classes are called."""
    sets = read_json(RECORD, "the record of rejected images")["sets"]
    words = []
    for name, of in sets.items():
        for change, counts in of["changed"].items():
            right, every = counts.get("preprocessing", 0), sum(counts.values())
            words.append(f"{name}, {change}: {right} of {every}")
    return (
        "Rejected images of known classes that were blurred, made noisy or brighter, and are in "
        f"groups called *unusual preprocessing*: {'; '.join(words)}."
    )


def page() -> str:
    """The table of docs/how-to/drift.md."""
    record = read_json(RECORD, "the record of rejected images")
    rows = [
        {
            "images": title,
            "rejected": found["rejected"],
            "groups (kinds)": f"{len(found['groups'])} ({found['kinds']})",
            "adjusted Rand index": f"{found['ours']:.2f}",
            "k-means on logits": f"{found['kmeans']:.2f}",
        }
        for title, found in ((SETS[name], of) for name, of in record["sets"].items())
    ]
    return table(rows)


PLACES = {"table": page, "called": said}
"""What stands in docs/how-to/drift.md."""


if __name__ == "__main__":
    main()
