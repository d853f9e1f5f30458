"""Shall the garbage head's gradient reach the classifier? One trained with its head, beside one that stays as it is; by validation images alone.

    python tests/bench/joint.py --root DATA --data fashionmnist --images 20000 --epochs 10 --seed 0

Joint: the recipe of tests/bench/attached.py, but half as many procedural images as ID images in every batch, and the head's loss added to the
classifier's. Detached: the plain network of the same seed, which attached.py left in --work, with the head that attach gives it. Of the joint
network two heads are judged: the one it was trained with, and one that attach gives it afterwards. No OOD test set is read. Writes
docs/results/attached/joint/NAME.json.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from attached import OUT, image_sets
from torch import Tensor

from tie_ext import Procedural, TIENet, attach
from tie_ext.app.data import ImageBatches, ImageSet, moved
from tie_ext.attach import WEIGHT
from tie_ext.backbones import BACKBONES
from tie_ext.bench.comparison import classifier
from tie_ext.support.files import write_json
from tie_ext.support.modules import frozen
from tie_ext.support.provenance import provenance
from tie_ext.support.random import seeded

STANDARD = 2000
"""ID images on which the head is standardised before each epoch."""


def train(net: TIENet, images: ImageSet, epochs: int, seed: int) -> float:
    """Classifier and head together; seconds."""
    start, proposer = time.perf_counter(), Procedural(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * -(-len(images) // 128))
    for epoch in range(epochs):
        with frozen(net), torch.no_grad():
            net.garbage.standardise(torch.cat([net.statistics(x)[1] for x, _ in ImageBatches(images.first(STANDARD, seed), 128)]))
        net.train()
        right = 0
        with seeded(seed, epoch):
            for rows in torch.randperm(len(images)).split(128):
                x, y = moved(images.x[rows], images.shape[-1] // 8).float() / 255, images.y[rows]
                if images.shape[0] == 3:
                    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
                outliers = proposer.draw((max(2, len(x) // 2), *images.shape))
                h, statistics = net.statistics(torch.cat([x, outliers]))
                odds = net.garbage(statistics).squeeze(1)
                logits = net.fc(h[: len(x)])
                garbage = F.softplus(odds[: len(x)]).mean() + WEIGHT * F.softplus(-odds[len(x) :]).mean()
                loss = F.cross_entropy(logits, y) + garbage / (1 + WEIGHT)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                right += int((logits.argmax(1) == y).sum())
        print(f"epoch {epoch + 1} of {epochs}: {right / len(images):.4f} of training images right, {time.perf_counter() - start:.0f} s", flush=True)
    net.eval()
    return time.perf_counter() - start


@torch.no_grad()
def judged(net: TIENet, sets: dict[str, ImageSet]) -> dict:
    """Accuracy, and the share in garbage of held-out and validation images, as the network decides and where 1 in 1000 held-out images are."""
    scores, garbage = {}, {}
    for name in sets:
        if name == "held" or name.startswith("val:"):
            decisions = [net.decide(x) for x, _ in ImageBatches(sets[name], 128)]
            scores[name] = torch.cat([decision.score for decision in decisions])
            garbage[name] = torch.cat([decision.level == 1 for decision in decisions]).double().mean().item()
    line = scores["held"].quantile(0.999)
    above = {name: (of > line).double().mean().item() for name, of in scores.items()}
    return {"accuracy": accuracy(net, sets["id"]), "in garbage": garbage, "above 1 in 1000 of ID": above}


def accuracy(net: TIENet, images: ImageSet) -> float:
    """Share of labels that the n ID logits have right."""
    labels: list[Tensor] = [net(x).argmax(1) for x, _ in ImageBatches(images, 128)]
    return (torch.cat(labels) == images.y).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, help="training images; default all but the held-out ones")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--backbone", choices=BACKBONES, default="conv3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=OUT / "work", help="where attached.py left its networks")
    a = parser.parse_args()
    sets = image_sets(a.data, a.root, a.images, a.seed)
    images, stem = sets["train"], f"{a.data}-{len(sets['train'])}x{a.epochs}-{a.backbone}-seed{a.seed}"
    n = len(images.classes)
    detached = attach(classifier(TIENet.load(a.work / f"{stem}.safetensors")), ImageBatches(images, 128), n, seed=a.seed)
    results = {"detached": judged(detached, sets)}
    with seeded(a.seed):
        net = TIENet(BACKBONES[a.backbone](images.shape[0], n), n, images.shape, garbage="layers")
    seconds = train(net, images, a.epochs, a.seed)
    results["joint"] = judged(net, sets)
    results["joint, then a head of its own"] = judged(attach(classifier(net), ImageBatches(images, 128), n, seed=a.seed), sets)
    for label, of in results.items():
        print(label, of, flush=True)
    write_json(OUT / "joint" / f"{stem}.json", {"network": stem, "seed": a.seed, "seconds": seconds, "results": results, **provenance()})


if __name__ == "__main__":
    main()
