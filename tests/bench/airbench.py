"""A CIFAR network that one core trains in half an hour, in the way of airbench94.

References:
    K. Jordan. *94% on CIFAR-10 in 3.29 Seconds on a Single GPU*, 2024, arXiv:2404.00498: network, flips in turn, Lookahead and settings. Otherwise
    than there: one view of an image in testing, whole epochs, a last batch that may be smaller, and a bias in the last layer.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext import TIENet
from tie_ext.cli.images import ImageSet
from tie_ext.utils.random import seeded

BATCH = 1024
LR = 11.5 / 7.667
"""Of the mean loss at a batch of 1024; the paper's 11.5 is decoupled from momentum, 1 + 1 / (1 - 0.85)."""
WEIGHT_DECAY = 0.0153 / 11.5
BIAS_FASTER = 64
SMOOTHING = 0.2
LEARNED = ("backbone.", "fc.")
WHITENING_EPOCHS = 3
"""After these the bias of the whitening layer stays; its weights never move."""


class _Half(nn.Sequential):
    """BatchNorm without scales, GELU."""

    def __init__(self, width: int):
        super().__init__(nn.BatchNorm2d(width, eps=1e-12, momentum=0.4), nn.GELU())
        self[0].weight.requires_grad = False


class AirBench(nn.Module):
    """Whitened 2x2 patches, three groups of two 3x3 convolutions with 64, 256 and 256 channels, and a linear head; 2.0 million weights."""

    def __init__(self, in_channels: int = 3, num_classes: int = 10):
        super().__init__()
        self.feature_size = 256
        self.whiten = nn.Conv2d(in_channels, 8 * in_channels, 2)
        self.whiten.weight.requires_grad = False
        layers: list[nn.Module] = [nn.GELU()]
        for cin, cout in pairwise((8 * in_channels, 64, 256, 256)):
            layers += [
                _conv(cin, cout),
                nn.MaxPool2d(2),
                _Half(cout),
                _conv(cout, cout),
                _Half(cout),
            ]
        self.layers = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten())
        self.fc = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(
            self.layers(self.whiten(x.contiguous(memory_format=torch.channels_last))) / 9
        )

    @torch.no_grad()
    def learn_patches(self, x: Tensor) -> None:
        """Sets the first layer to the principal directions of the patches of images, scaled to unit variance, each with both signs."""
        channels = x.shape[1]
        patches = (
            x.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * channels)
        )
        variance, directions = torch.linalg.eigh(patches.T.cov())
        filters = (directions / (variance + 3e-5).sqrt()).T.reshape(-1, channels, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))
        mean = patches.mean(0).reshape(1, channels, 2, 2)
        self.whiten.bias.copy_(-(self.whiten.weight * mean).sum((1, 2, 3)))


def _conv(cin: int, cout: int) -> nn.Conv2d:
    conv = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:cin])
    return conv


def batches(images: ImageSet, epoch: int, first: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in a new order, images moved by up to two pixels, and each mirrored in every other epoch; ``first (N)`` says in which."""
    size = images.shape[-1]
    for rows in torch.randperm(len(images)).split(BATCH):
        x = F.pad(images.x[rows].float() / 255, (2, 2, 2, 2), mode="reflect")
        across, down = torch.randint(5, (2, len(x), 1))
        ys, xs = down + torch.arange(size), across + torch.arange(size)
        x = x[torch.arange(len(x))[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(
            0, 3, 1, 2
        )
        mirrored = first[rows] ^ bool(epoch % 2)
        yield torch.where(mirrored[:, None, None, None], x.flip(3), x), images.y[rows]


def _faster(net: nn.Module) -> list[dict]:
    """Biases of BatchNorm learn faster, and decay no faster than the rest."""
    norms = [module.bias for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    known = {id(p) for p in norms}
    others = [p for p in net.parameters() if p.requires_grad and id(p) not in known]
    return [
        {"params": norms, "lr": LR * BIAS_FASTER, "weight_decay": WEIGHT_DECAY / BIAS_FASTER},
        {"params": others, "lr": LR, "weight_decay": WEIGHT_DECAY},
    ]


def train(
    net: TIENet,
    images: ImageSet,
    epochs: int,
    seed: int,
    state: Path,
    autocast_dtype: str = "float32",
) -> float:
    """SGD with a triangle of learning rates, smoothed labels and Lookahead. Seconds it took in all; goes on after the last finished epoch.

    The trained network computes in float32, whatever the precision of training was.
    """
    net.backbone.learn_patches(images.x[:5000].float() / 255)
    optimizer = torch.optim.SGD(_faster(net), momentum=0.85, nesterov=True)
    total = epochs * -(-len(images) // BATCH)
    peak = 0.23 * total
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            0.2 + 0.8 * step / peak if step < peak else 1 - 0.93 * (step - peak) / (total - peak)
        ),
    )
    first = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
    done, seconds, step = 0, 0.0, 0
    slow = {
        name: of.clone()
        for name, of in net.state_dict().items()
        if name.startswith(LEARNED) and of.is_floating_point()
    }
    net.autocast_dtype = autocast_dtype
    if state.exists():
        kept = torch.load(state, map_location=net.low.device, weights_only=True)
        net.load_state_dict(kept["net"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        slow, done, seconds, step = kept["slow"], kept["epochs"], kept["seconds"], kept["step"]
    for epoch in range(done, epochs):
        start = time.perf_counter()
        net.train()
        net.backbone.whiten.bias.requires_grad = epoch < WHITENING_EPOCHS
        right = 0
        with seeded(seed, epoch):
            for x, y in batches(images, epoch, first):
                logits = net(x)
                loss = F.cross_entropy(logits, y, label_smoothing=SMOOTHING)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                if step % 5 == 0:
                    _look_ahead(net, slow, 0.95**5 * (step / total) ** 3)
                right += int((logits.argmax(1) == y).sum())
        seconds += time.perf_counter() - start
        kept = {
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "slow": slow,
            "step": step,
        }
        torch.save({**kept, "epochs": epoch + 1, "seconds": seconds}, state.with_suffix(".new"))
        state.with_suffix(".new").replace(state)
        print(
            f"epoch {epoch + 1} of {epochs}: {right / len(images):.4f} of training images right, {seconds:.0f} s",
            flush=True,
        )
    net.load_state_dict({**net.state_dict(), **slow})
    net.autocast_dtype = "float32"
    net.eval()
    return seconds


@torch.no_grad()
def _look_ahead(net: nn.Module, slow: dict[str, Tensor], decay: float) -> None:
    """Slow weights go a step towards the fast ones, which are then set to them."""
    now = net.state_dict()
    for name, of in slow.items():
        of.lerp_(now[name].to(of.dtype), 1 - decay)
        now[name].copy_(of)
