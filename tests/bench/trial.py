"""One trial of other settings, judged on ID data and noise alone: held-out MNIST *training* images, no OOD set and no test image.

    python tests/bench/trial.py NAME '{"lam": 5.0}' --root DATA [--images 20000] [--epochs 6]

Writes docs/results/trials/NAME.json; what came of it stands in docs/ledger.md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from tie_ext import Conv3, TIEConfig, TIENet, TIETrainer, data, ood_score, uncertainty
from tie_ext.comparison import provenance
from tie_ext.data import Batches, ImageSet
from tie_ext.files import write_json
from tie_ext.training import seeded

OUT = Path(__file__).parents[2] / "docs" / "results" / "trials"


@torch.no_grad()
def look(net: TIENet, held_out: ImageSet, noise: ImageSet) -> dict:
    """Accuracy and false alarms on held-out ID images, the upper tail of their scores, and how much noise lands in garbage."""
    net.eval()
    logits, of_noise = (torch.cat([net(x, garbage=True) for x, _ in Batches(images, 1000)]) for images in (held_out, noise))
    garbage, score = logits.argmax(1) == net.num_classes, ood_score(logits)
    rejected = garbage | (uncertainty(logits.softmax(1)) > net.tau)
    return {
        "accuracy": (logits.argmax(1) == held_out.y).double().mean().item(),
        "accuracy_n": (logits[:, :-1].argmax(1) == held_out.y).double().mean().item(),
        "id_garbage_rate": garbage.double().mean().item(),
        "id_rejected": rejected.double().mean().item(),
        "score_q99": score.quantile(0.99).item(),
        "score_q999": score.quantile(0.999).item(),
        "noise_garbage_rate": (of_noise.argmax(1) == net.num_classes).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("changes", type=json.loads, help="settings of TIEConfig as JSON")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=6)
    a = parser.parse_args()
    full = data.load("mnist", "train", a.root)
    train = full.first(a.images, 0)
    rest = torch.randperm(len(full), generator=torch.Generator().manual_seed(0))[a.images : a.images + 20_000]
    held_out = ImageSet(full.x[rest], full.y[rest], full.classes)
    noise = data.noise("gaussian", 2000, train.shape)
    config = TIEConfig(epochs=a.epochs, **a.changes)
    with seeded(config.seed):
        net = TIENet(Conv3(1, 10), 10, train.shape, classes=train.classes)
    trainer, epochs = TIETrainer(net, config), []
    for _ in range(a.epochs):
        log = trainer.epoch(Batches(train, 128, shuffle=True))
        agreement = sum(share or 0.0 for share in log.agreement[:-1]) / net.num_classes
        epochs.append({**look(net, held_out, noise), "tau": log.tau, "excluded": sum(log.excluded) / sum(log.proposed), "agreement": agreement})
        print(a.name, log.epoch, {k: round(v, 5) for k, v in epochs[-1].items()}, flush=True)
    command = " ".join(["python", *sys.argv]).replace(str(a.root), "DATA")
    record = {"changes": a.changes, "images": a.images, "epochs": epochs}
    write_json(OUT / f"{a.name}.json", {**record, **provenance(), "command": command})


if __name__ == "__main__":
    main()
