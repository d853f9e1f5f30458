"""The plain n-class network that TIE is compared with, and a garbage class attached to it."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tie_ext.cli.batches import ImageBatches, sampled_batches
from tie_ext.cli.images import ImageSet
from tie_ext.models.network import TIENet
from tie_ext.training.attach import attach
from tie_ext.training.config import TIEConfig
from tie_ext.utils.progress import Progress
from tie_ext.utils.random import seeded


def make_network(
    backbone: Callable[[], nn.Module],
    images: ImageSet,
    config: TIEConfig,
    device: str | torch.device = "cpu",
    head: str = "linear",
    bounds: tuple = (0.0, 1.0),
) -> TIENet:
    """A network for the classes and the shape of some images, with the initial weights of a seed.

    Arguments:
        backbone: Makes the backbone.
        images: The ID training images.
        config: Holds the seed, and the arithmetic of the backbone.
        device: Where it is to be.
        head: What gives the garbage logit, one of :data:`tie_ext.models.network.HEADS`.
        bounds: Smallest and largest value of the images, numbers or one per channel.
    """
    names, (low, high) = images.classes, bounds
    with seeded(config.seed):
        net = TIENet(backbone(), len(names), images.shape, low, high, names, head)
    net.autocast_dtype = config.autocast_dtype
    return net.to(device)


def train_plain(
    net: TIENet, batches: ImageBatches, config: TIEConfig, progress: bool = False
) -> None:
    """Train the n ID logits alone, by cross-entropy; with the optimiser, learning rates, epochs
    and seeds of TIE.
    """
    net.train()
    device = net.fc.weight.device
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
    for t in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr_in(t)
        with seeded(config.seed, t + 1, 0):  # the stream of TIE's epoch
            bar = Progress(batches, f"epoch {t + 1}: plain", disable=not progress)
            for x, y in bar:
                loss = F.cross_entropy(net(x.to(device)), y.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def classifier(net: TIENet) -> nn.Module:
    """The n-class network inside a plainly trained one, without the garbage class."""
    model = copy.deepcopy(net.backbone)
    model.fc = copy.deepcopy(net.fc)
    return model.eval()


def attached(net: TIENet, images: ImageSet, seed: int, progress: bool = False) -> TIENet:
    """The same classifier with a garbage head on every layer, fitted to procedural images."""
    return attach(
        classifier(net),
        sampled_batches(images, seed),
        net.num_classes,
        class_names=net.class_names,
        seed=seed,
        progress=progress,
    )
