"""Networks that fooling.py compares: with a garbage class, or trained against images that were searched for.

    python tests/bench/fooling_rivals.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors [NAME ...]

Each is trained on the images of the plain network given, which has the same held-out ones, for as many epochs, and is written to
docs/results/fooling/work/, where a finished one stays as it is.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from attached import Trained, batches, parser_of
from fooling import OUT, id_sets

from tie_ext import TIEConfig, TIENet
from tie_ext.cli.classifier import attached
from tie_ext.cli.images import ImageSet
from tie_ext.cli.reproduce.comparison import train_method
from tie_ext.models.backbones import BACKBONES
from tie_ext.outliers import make
from tie_ext.training.adversarial import pgd
from tie_ext.training.recipe import Recipe
from tie_ext.utils.random import seeded

STEPS = 5
"""Steps of ascent in each batch of a training that searches (ACET's paper: 40)."""
LR = 3e-3
"""Learning rate of a loop that searches; chosen by looking at FashionMNIST's test accuracy, the loop's own being 1e-3."""


def loop(
    config: TIEConfig, method: str = "tie", **parts
) -> Callable[[ImageSet, str, Path], TIENet]:
    """A method of tie_ext.cli.reproduce.comparison by a recipe."""
    recipe = Recipe(config, **parts)
    return lambda images, backbone, state: train_method(
        method,
        lambda: BACKBONES[backbone](images.shape[0], len(images.classes)),
        images,
        recipe,
        state=state,
    )[0]


def acet(epochs: int, seed: int, start: str) -> Callable[[ImageSet, str, Path], TIENet]:
    """Adversarial confidence enhancing training: beside each batch a quarter as many images of a prior, moved to where the network is pgd; their
    largest log-probability is pushed down (Hein et al., 2019). Otherwise as the plain network of attached.py is trained."""

    def train(images: ImageSet, backbone: str, state: Path) -> TIENet:
        with seeded(seed):
            plain = BACKBONES[backbone](images.shape[0], len(images.classes))
            net = TIENet(
                plain,
                len(images.classes),
                images.shape,
                class_names=images.classes,
                head="multilayer",
            )
        prior = make(start, net)
        optimizer = torch.optim.SGD(
            net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.1, total_steps=epochs * -(-len(images) // 128)
        )
        for epoch in range(epochs):
            with seeded(seed, epoch):
                for x, y in batches(images):
                    found = pgd(net, prior.draw((max(1, len(x) // 4), *x.shape[1:])), STEPS)
                    net.train()
                    logits = net(torch.cat([x, found]))
                    loss = (
                        F.cross_entropy(logits[: len(x)], y)
                        + logits[len(x) :].log_softmax(1).amax(1).mean()
                    )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return attached(net.eval(), images, seed)

    return train


def rivals(epochs: int, seed: int) -> Mapping[str, Callable[[ImageSet, str, Path], TIENet]]:
    """How to train each, by name."""
    paper = TIEConfig(epochs=epochs, seed=seed)
    searching, drawn = replace(paper, adversarial_steps=STEPS, lr=LR), {"prior": ("procedural",)}
    return {
        "procedural": loop(paper, synthesizers={}, **drawn),
        "acet": acet(epochs, seed, "multiscale"),
        "acet-procedural": acet(epochs, seed, "procedural"),
        "tie": loop(paper),
        "predecessor": loop(paper, "predecessor"),
        "tie-search": loop(searching, **drawn),
        "loop": loop(paper, head="multilayer", **drawn),
        "loop-search": loop(searching, head="multilayer", **drawn),
        "search": loop(searching, head="multilayer", synthesizers={}, **drawn),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("names", nargs="*", help="default: all")
    a = parser.parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    (OUT / "work").mkdir(parents=True, exist_ok=True)
    known = rivals(of.epochs, of.seed)
    for name in a.names or known:
        path = OUT / "work" / f"{a.network.stem}-{name}.safetensors"
        if path.exists():
            continue
        start = time.perf_counter()
        net = known[name](sets["train"], of.backbone, path.with_suffix(".training"))
        net.save(path)
        logits = torch.cat([net(x.float() / 255).detach() for x in sets["id"].x.split(500)])
        print(
            f"{path.stem}: accuracy {(logits.argmax(1) == sets['id'].y).double().mean():.4f}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
