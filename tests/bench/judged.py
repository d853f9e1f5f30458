"""Two saved detectors on real images, for the benches of drift and of rejected images."""

from pathlib import Path
from typing import NamedTuple

import public_data
import torch
import torch.nn.functional as F
from public_data import Images, read
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tie_ext import attach, combine
from tie_ext.models.backbones import Conv3
from tie_ext.pytorch_ood import load_detector
from tie_ext.utils.random import seeded

KNOWN = {"clothes": 5, "flowers": 3}
"""Classes that the networks know, the first of each set; the others are unknown."""


class Judged(NamedTuple):
    """A detector, and images that nothing of it has seen."""

    detector: object
    x: Tensor
    """``(N, C, S, S)`` in the value range of the network."""
    truth: list[str]
    """What each shows; ``known`` for images of known classes."""
    known: Tensor
    """``(M, C, S, S)`` more images of known classes."""


def judged(name: str, root: Path, cache: Path) -> Judged:
    """The detector, from the folder of what was made before where it is there, and its images.

    Arguments:
        name: ``clothes`` or ``flowers``.
        root: The folder of packed sets.
        cache: Where the detector is kept.
    """
    return {"clothes": clothes, "flowers": flowers}[name](root, cache / name)


def clothes(root: Path, place: Path) -> Judged:
    """Conv3 on five kinds of clothes of FashionMNIST, five epochs of 10 000 images."""
    train = read(root, "fashionmnist-train", 28, 1)
    test = read(root, "fashionmnist-test", 28, 1)
    known, n = train.y < KNOWN["clothes"], KNOWN["clothes"]
    fit = Images(train.x[known][:10_000].float() / 255, train.y[known][:10_000])
    held = test.y < n
    x, y = test.x.float() / 255, test.y
    own, others = x[held], x[~held]
    with seeded(0):
        model = Conv3(1, n)
    if not (place / "detector.json").exists():
        with seeded(0):
            trained(model, fit, 5)
        made(model, fit, Images(own[:500], y[held][:500]), (0.0, 1.0), place)
    detector = load_detector(place, None)
    names = [f"class {label}" for label in y[~held].tolist()]
    return Judged(
        detector,
        torch.cat([own[500:800], others[:500]]),
        ["known"] * 300 + names[:500],
        own[800:],
    )


def flowers(root: Path, place: Path) -> Judged:
    """EfficientNet-lite0 of ImageNet with a new last layer for three kinds of flowers; the other
    two kinds, receipts and blood cells are unknown."""
    low, high = (0 - 0.498) / 0.502, (1 - 0.498) / 0.502
    every = read(root, "photos_flowers", 224)
    order = torch.randperm(len(every.y), generator=torch.Generator().manual_seed(0))
    x, y = scaled(every.x[order]), every.y[order]
    known, n = y < KNOWN["flowers"], KNOWN["flowers"]
    own, labels = x[known], y[known]
    model = public_data.efficientnet()
    fit, held = Images(own[:160], labels[:160]), Images(own[160:280], labels[160:280])
    if not (place / "detector.json").exists():
        model._fc = linear(model, fit, n)
        made(model, fit, held, (low, high), place)
    model._fc = nn.Linear(model._fc.in_features, n)
    detector = load_detector(place, model)
    others = {name: scaled(read(root, f"photos_{name}", 224).x) for name in ("receipts", "blood")}
    truth = [f"flower {label}" for label in y[~known].tolist()]
    truth = ["known"] * 40 + truth + [name for name, x in others.items() for _ in x]
    mixed = torch.cat([own[280:320], x[~known], *others.values()])
    return Judged(detector, mixed, truth, own[280:])


def scaled(x: Tensor) -> Tensor:
    """Images uint8 in the range of EfficientNet-lite0."""
    return (x.float() / 255 - 0.498) / 0.502


def trained(model: nn.Module, images: Images, epochs: int) -> None:
    """Train by cross-entropy."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images.x)).split(128):
            loss = F.cross_entropy(model(images.x[part]), images.y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def linear(model: nn.Module, images: Images, classes: int) -> nn.Linear:
    """A last layer for other classes: ridge regression on centred features, scaled to logits."""
    width = model._fc.in_features
    model._fc = nn.Identity()
    h = torch.cat([model(x) for x in images.x.split(32)])
    mean, target = h.mean(0), F.one_hot(images.y, classes).float()
    gram = (h - mean).T @ (h - mean) + 10 * torch.eye(width)
    w = 10 * torch.linalg.solve(gram, (h - mean).T @ (target - target.mean(0))).T
    layer = nn.Linear(width, classes)
    layer.weight.copy_(w)
    layer.bias.copy_(-w @ mean)
    return layer


def made(model: nn.Module, fit: Images, held: Images, bounds: tuple, place: Path) -> None:
    """Attach, combine and save."""

    def loader(images: Images) -> DataLoader:
        return DataLoader(TensorDataset(images.x, images.y), batch_size=100)

    few = Images(fit.x[:3000], fit.y[:3000])
    net = attach(model, loader(few), KNOWN[place.name], *bounds)
    detector = combine(net, train_loader=loader(few), calibration_loader=loader(held))
    detector.save(place)
