"""Does a garbage head gain where its gradient reaches the backbone? Detached and joint training, judged by validation sets and held-out ID images.

    python tests/bench/joint.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors

Reads a plain network that tests/bench/attached.py trained, for *detached*. For *joint*, the same network is trained again from the same initial
weights in the same order, with half as many procedural images in each batch, and the head's binary cross-entropy beside the cross-entropy of the
ID images. Then both get a new head by ``attach``, so that they differ in the backbone alone. Writes docs/results/attached/joint/NAME.json.
"""

import time

import torch
import torch.nn.functional as F
from attached import OUT, Trained, batches, image_sets, made_by, parser_of
from torch import Tensor

from tie_ext import TIENet, attach
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.classifier import classifier
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.images import ImageSet
from tie_ext.models.backbones import BACKBONES
from tie_ext.outliers.procedural import Procedural
from tie_ext.utils.files import write_json
from tie_ext.utils.random import seeded

POOL = 20000
"""Procedural images that joint training draws from."""


def train_jointly(net: TIENet, pool: Tensor, images: ImageSet, epochs: int, seed: int) -> None:
    """The recipe of tests/bench/attached.py, and the head on every layer with it."""
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=epochs * -(-len(images) // 128)
    )
    for epoch in range(epochs):
        net.train()
        start = time.perf_counter()
        with seeded(seed, epoch):
            for x, y in batches(images):
                garbage = pool[torch.randint(len(pool), (len(x) // 2,))].float() / 255
                h, s = net.statistics(torch.cat([x, garbage]))
                with (
                    torch.no_grad()
                ):  # as batch normalisation does: a moving mean and deviation of the ID images
                    net.garbage.mean.lerp_(s[: len(x)].mean(0), 0.05)
                    net.garbage.deviation.lerp_(s[: len(x)].std(0).clamp_min(1e-3), 0.05)
                target = torch.cat([torch.zeros(len(x)), torch.ones(len(garbage))])
                weight = torch.cat([torch.ones(len(x)), torch.full((len(garbage),), 2.0)])
                loss = F.cross_entropy(net.fc(h[: len(x)]), y)
                loss = loss + F.binary_cross_entropy_with_logits(
                    net.garbage(s).squeeze(1), target, weight
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(
                    net.parameters(), 5.0
                )  # or the loss on MNIST is not finite after an epoch
                optimizer.step()
                schedule.step()
        print(
            f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
    net.eval()


def judged(plain: TIENet, sets: dict[str, ImageSet], seed: int) -> dict:
    """What a new head on a network's classifier tells."""
    images = sets["train"]
    net = attach(
        classifier(plain),
        ImageBatches(images, 128),
        plain.num_classes,
        class_names=images.classes,
        seed=seed,
    )
    right, scores, garbage = 0, {}, {}
    with torch.no_grad():
        for name, of in sets.items():
            if name in ("held", "id") or name.startswith("val:"):
                decisions = [net.decide(x) for x, _ in ImageBatches(of, 500)]
                scores[name] = torch.cat([decision.score for decision in decisions])
                garbage[name] = (
                    torch.cat([decision.level == 1 for decision in decisions])
                    .double()
                    .mean()
                    .item()
                )
            if name == "held":
                right = sum(int((net(x).argmax(1) == y).sum()) for x, y in ImageBatches(of, 500))
    metrics = {
        name: ood_metrics(scores["held"], x)
        for name, x in scores.items()
        if name.startswith("val:")
    }
    metrics = {
        name: {key: of[key] for key in ("auroc", "fpr95_id")} for name, of in metrics.items()
    }
    return {
        "held_accuracy": right / len(sets["held"]),
        "garbage_rate": garbage,
        "validation": metrics,
    }


def main() -> None:
    a = parser_of(__doc__).parse_args()
    of = Trained.read(a.network.stem)
    seed = of.seed
    sets = image_sets(of.data, a.root, of.images, seed)
    plain = TIENet.load(a.network)
    results = {"detached": judged(plain, sets, seed)}
    print(results["detached"], flush=True)
    with seeded(seed):
        net = TIENet(
            BACKBONES[of.backbone](plain.image_shape[0], plain.num_classes),
            plain.num_classes,
            plain.image_shape,
            head="multilayer",
        )
    with seeded(seed, 0, 0, 1):
        pool = torch.cat(
            [
                (Procedural(net).draw((500, *plain.image_shape)) * 255).round().byte()
                for _ in range(POOL // 500)
            ]
        )
    train_jointly(net, pool, sets["train"], of.epochs, seed)
    results["joint"] = judged(net, sets, seed)
    print(results["joint"], flush=True)
    write_json(
        OUT / "joint" / f"{a.network.stem}.json",
        {"network": a.network.stem, "results": results, **made_by(a.root)},
    )


if __name__ == "__main__":
    main()
