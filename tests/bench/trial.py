"""One trial of other settings, judged on ID data and noise alone: held-out *training* images, what is made of them, and noise.

No OOD set and no test image is looked at.

    python tests/bench/trial.py NAME '{"lam": 5.0}' --root DATA [--data mnist] [--images 20000] [--epochs 6] [--shift 0] [--variant per-class]
        [--judge PLAIN.safetensors ...]

Writes docs/results/trials/NAME.json; what came of it stands in docs/ledger.md.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from score_ablation import positives  # beside this file
from torch import Tensor
from variants import VARIANTS

from tie_ext import Conv3, Noise, TIEConfig, TIENet, TIETrainer, data, ood_score, uncertainty
from tie_ext.comparison import all_logits, ood_metrics, provenance
from tie_ext.data import Batches, ImageSet
from tie_ext.files import write_json
from tie_ext.outliers import make
from tie_ext.training import seeded

OUT = Path(__file__).parents[2] / "docs" / "results" / "trials"


@torch.no_grad()
def look(net: TIENet, held_out: ImageSet, outliers: dict[str, ImageSet]) -> dict:
    """Accuracy and false alarms on held-out ID images, and how well noise and outliers made of those images are told from them."""
    logits, of = all_logits(net, held_out), {name: all_logits(net, images) for name, images in outliers.items()}
    garbage, score = logits.argmax(1) == net.num_classes, ood_score(logits)
    rejected = garbage | (uncertainty(logits.softmax(1)) > net.tau)
    return {
        "accuracy": (logits.argmax(1) == held_out.y).double().mean().item(),
        "accuracy_n": (logits[:, :-1].argmax(1) == held_out.y).double().mean().item(),
        "id_garbage_rate": garbage.double().mean().item(),
        "id_rejected": rejected.double().mean().item(),
        "garbage_rate": {name: (x.argmax(1) == net.num_classes).double().mean().item() for name, x in of.items()},
        "scores": {name: ood_metrics(score, ood_score(x)) for name, x in of.items()},
    }


def judged(trainer: TIETrainer, judges: list[TIENet], per_class: int = 500) -> dict[str, float]:
    """Share of inversions that plain networks take for the class asked for: of all, of those that tau lets through, asked clearly."""
    y = torch.arange(trainer.net.num_classes).repeat(per_class)

    def asked(margin: float) -> tuple[ImageSet, Tensor]:
        with seeded(len(trainer.log)):
            images = ImageSet((trainer.synthesizers[0].invert(y, margin).x * 255).round().to(torch.uint8), y)
        return images, torch.stack([all_logits(judge, images)[:, :-1].argmax(1) == y for judge in judges]).double().mean(0)

    images, right = asked(0.0)
    certain = uncertainty(all_logits(trainer.net, images).softmax(1)) <= trainer.net.tau
    shares = {"judged": right.mean().item(), "judged_certain": right[certain].mean().item(), "certain": certain.double().mean().item()}
    return {**shares, "judged_clear": asked(0.5)[1].mean().item()}


def outlines(images: ImageSet) -> ImageSet:
    """Line drawings of ID images: how steep each is at each pixel."""
    x = F.pad(images.x.float(), (1, 1, 1, 1))
    across, down = x[:, :, 1:-1, 2:] - x[:, :, 1:-1, :-2], x[:, :, 2:, 1:-1] - x[:, :, :-2, 1:-1]
    return ImageSet((across.square() + down.square()).sqrt().clamp(max=255).to(torch.uint8), torch.full((len(x),), -1))


def shapes(count: int) -> ImageSet:
    """Black and white noise: multi-scale noise cut off at a random level."""
    noise = Noise()._mixture((count, 1, 28, 28))
    cut = (noise > torch.randn(count, 1, 1, 1) * noise.std((1, 2, 3), keepdim=True) + noise.mean((1, 2, 3), keepdim=True)) * 255
    return ImageSet(cut.to(torch.uint8), torch.full((count,), -1))


def decoded(net: TIENet, images: ImageSet) -> ImageSet:
    """DMR's class-free images, from a VAE of the held-out images; no trial trains on them."""
    synthesizer = make("marginal", net)
    synthesizer.fit(net, Batches(images, 128, shuffle=True), 0.0)
    x = torch.cat([synthesizer.sample(net, x, y).x for x, y in Batches(images.first(5000), 500)])
    return ImageSet((x * 255).round().to(torch.uint8), torch.full((len(x),), -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("changes", type=json.loads, help="settings of TIEConfig as JSON")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--data", default="mnist", choices=("mnist", "fashionmnist"))
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--shift", type=int, default=0, help="most pixels a training image is moved by")
    parser.add_argument("--variant", choices=list(VARIANTS), default="none", help="another garbage class, or other weights")
    parser.add_argument("--judge", type=Path, nargs="*", default=[], help="plain networks, trained apart, that judge the inversions")
    a = parser.parse_args()
    full = data.load(a.data, "train", a.root)
    train = full.first(a.images, 0)
    rest = torch.randperm(len(full), generator=torch.Generator().manual_seed(0))[a.images : a.images + 20_000]
    held_out = ImageSet(full.x[rest], full.y[rest], full.classes)
    with seeded(0):
        outliers = positives(held_out.first(5000)) | {"black and white noise": shapes(5000), "outlines": outlines(held_out.first(5000))}
    config = TIEConfig(epochs=a.epochs, **a.changes)
    with seeded(config.seed):
        net = VARIANTS[a.variant][0](Conv3(1, 10), 10, train.shape, classes=train.classes)
    with seeded(0):
        outliers |= {"class-free": decoded(net, held_out)}
    trainer, epochs = VARIANTS[a.variant][1](net, config), []
    judges = [TIENet.load(path).eval() for path in a.judge]
    for _ in range(a.epochs):
        log = trainer.epoch(Batches(train, 128, shuffle=True, shift=a.shift))
        agreement = sum(share or 0.0 for share in log.agreement[:-1]) / net.num_classes  # 0 where there is no TIE
        about = {"tau": log.tau, "excluded": sum(log.excluded) / max(1, sum(log.proposed)), "agreement": agreement}
        about |= judged(trainer, judges) if judges else {}
        epochs.append({**look(net, held_out, outliers), **about})
        print(a.name, json.dumps(epochs[-1]), flush=True)
    command = " ".join(["python", *sys.argv]).replace(str(a.root), "DATA")
    for judge in a.judge:
        command = command.replace(str(judge), judge.name)
    changes = {key: str(value) if value == -float("inf") else value for key, value in a.changes.items()}  # JSON has no infinity
    record = {"changes": changes, "data": a.data, "images": a.images, "shift": a.shift, "variant": a.variant, "epochs": epochs}
    write_json(OUT / f"{a.name}.json", {**record, **provenance(), "command": command})


if __name__ == "__main__":
    main()
