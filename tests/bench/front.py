"""The network that README.md loads, with its card, and the picture at the top of the page: docs/model/ and docs/figures/front.png.

    python tests/bench/front.py --root DATA --network docs/results/attached/work/mnist-20000x10-conv3-seed0-head.safetensors

The network is that of tests/bench/attached.py (``--data mnist --images 20000 --epochs 10 --seed 0``), in half precision so that the file is small.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from attached import image_sets
from matplotlib.figure import Figure
from torch import Tensor

from tie_ext import TIEDetector, TIENet
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.images import ImageSet
from tie_ext.cli.tables import table
from tie_ext.scores.decision import Decision
from tie_ext.utils.files import write_atomically, write_json
from tie_ext.utils.provenance import provenance

DOCS = Path(__file__).parents[2] / "docs"
NETWORK, RECORD, CARD = (
    DOCS / "model" / name for name in ("mnist.safetensors", "mnist.json", "README.md")
)
SHOWN = {
    "id": ("digits (ID)", 6),
    "fashionmnist": ("clothes", 3),
    "notmnist": ("letters", 3),
    "cifar10": ("photographs", 3),
}
"""Sets of the picture: their names there, and how many images."""
LEVELS = ("accepted", "garbage", "uncertain")


@torch.no_grad()
def decisions(net: TIENet, images: ImageSet) -> Decision:
    """Of all images."""
    return Decision(
        *(
            torch.cat(parts)
            for parts in zip(*(net.decide(x) for x, _ in ImageBatches(images, 500)), strict=True)
        )
    )


def picture(sets: dict[str, ImageSet], decided: dict[str, Decision], line: float) -> Figure:
    """Images with label, level and score above the histogram of all scores, with the line that 5 % of ID images are above."""
    count = sum(many for _, many in SHOWN.values())
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplot_mosaic(
        [[str(i) for i in range(count)], ["scores"] * count], height_ratios=[1, 2.2]
    )
    place = 0
    for name, (_, many) in SHOWN.items():
        y = sets[name].y
        rows = (
            [int((y == label).nonzero()[0]) for label in range(many)]
            if name == "id"
            else range(many)
        )  # one of each class
        for row in rows:
            ax, of = axes[str(place)], decided[name]
            ax.imshow(
                sets[name].x[row].permute(1, 2, 0).squeeze(-1), cmap="gray", vmin=0, vmax=255
            )
            ax.set_xticks([])
            ax.set_yticks([])
            level = LEVELS[int(of.level[row])]
            said = sets["id"].classes[int(of.label[row])] if level == "accepted" else level
            ax.set_title(
                f"{said}\n{float(of.score[row]):+.1f}",
                fontsize=9,
                color="tab:green" if level == "accepted" else "tab:red",
            )
            place += 1
    ax = axes["scores"]
    every = torch.cat([decided[name].score for name in SHOWN])
    edges = np.linspace(float(every.quantile(0.001)), float(every.quantile(0.999)), 80)
    for name, (title, _) in SHOWN.items():
        ax.hist(decided[name].score.numpy(), edges.tolist(), density=True, alpha=0.55, label=title)
    ax.axvline(line, color="k", linewidth=1)
    ax.annotate(
        "5 % of digits are\nright of this line",
        (line, ax.get_ylim()[1]),
        (4, -4),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )
    ax.set(xlabel="score (larger = more out-of-distribution)", ylabel="density")
    ax.legend(loc="upper center", frameon=False)
    return figure


def measured(
    net: TIENet, sets: dict[str, ImageSet], decided: dict[str, Decision], line: float
) -> dict:
    """Shares by set: in garbage, uncertain, above threshold; ID accuracy."""
    of = {
        name: {
            "garbage": share(d.level == 1),
            "uncertain": share(d.level == 2),
            "above threshold": share(d.score > line),
            "images": len(d.level),
        }
        for name, d in decided.items()
    }
    return {
        "accuracy": share(decided["id"].label == sets["id"].y),
        "line": line,
        "tau": float(net.tau),
        "sets": of,
    }


def share(which: Tensor) -> float:
    """Of True."""
    return which.double().mean().item()


def card() -> str:
    """docs/model/README.md, from the record."""
    r = json.loads(RECORD.read_text())
    rows = [
        {
            "images": "digits (ID)" if name == "id" else name,
            "in garbage": f"{100 * of['garbage']:.2f}",
            "uncertain": f"{100 * of['uncertain']:.2f}",
            "above threshold": f"{100 * of['above threshold']:.2f}",
        }
        for name, of in r["sets"].items()
    ]
    return (
        "# Model card: MNIST digits with a garbage class\n\n"
        "`mnist.safetensors`: the paper's three-convolution network for 28x28 grey images in [0, 1], trained without a garbage class on 20 000 MNIST images for 10 "
        "epochs, and a garbage head attached to it and fitted on procedural images. No OOD image was used. It is for trying things out, not for any use that "
        "matters: 20 000 images and one seed. Half precision; load it with `TIENet.load(path).float()`.\n\n"
        f"Made by `{r['command']}`. ID accuracy {100 * r['accuracy']:.2f} %. tau, from held-out digits: {r['tau']:.4f}. The threshold on the score that "
        f"5 % of held-out digits exceed: {r['line']:.2f}. Percent of test images:\n\n"
        f"{table(rows)}\n\n"
        "MNIST: Y. LeCun, C. Cortes, C. Burges, CC BY-SA 3.0. The weights are under this repository's licence.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument("--network", type=Path, required=True)
    a = parser.parse_args()
    sets = {
        name: of
        for name, of in image_sets("mnist", a.root, 20_000, 0).items()
        if name != "train" and not name.startswith("val:")
    }
    held = ImageBatches(sets.pop("held"), 500)
    net = TIENet.load(a.network)
    detector = TIEDetector(net, lam=2.0).fit(
        held
    )  # tau from images that the network has not learned by heart
    assert detector.tau is not None
    net.tau.copy_(detector.tau)
    net.half().save(NETWORK)
    net = TIENet.load(NETWORK).float().eval()
    line = TIEDetector(net, false_alarm=0.05).fit(held).threshold
    assert line is not None
    decided = {name: decisions(net, of) for name, of in sets.items()}
    command = f"python tests/bench/front.py --root DATA --network {a.network}"
    write_json(
        RECORD, {**measured(net, sets, decided, float(line)), **provenance(), "command": command}
    )
    write_atomically(CARD, card().encode())
    picture(sets, decided, float(line)).savefig(DOCS / "figures" / "front.png", dpi=110)
    print(card())


if __name__ == "__main__":
    main()
