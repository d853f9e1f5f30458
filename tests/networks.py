"""Networks as people bring them, small: those that ``attach`` takes, and those that it refuses."""

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Small
from torch import nn

SHAPE = (1, 16, 16)


class Net(Small):
    """A small network with another last layer, and something behind it."""

    def __init__(self, last: nn.Module | None = None, behind: Callable = lambda z: z):
        super().__init__()
        self.fc, self.behind = self.fc if last is None else last, behind

    def forward(self, x: torch.Tensor) -> Any:
        return self.behind(self.fc(self.conv(x)))


class Reordered(Small):
    """Its last layer is registered first, under two names."""

    def __init__(self):
        super().__init__()
        last, convolutions = nn.Linear(48, 3), self.conv
        del self.fc, self.conv
        self.classifier = self.head = last
        self.conv, self.unused = convolutions, nn.Linear(48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x))


class Averaged(Small):
    """Two heads, as in DeiT and LeViT."""

    def __init__(self):
        super().__init__()
        self.head, self.head_dist = nn.Linear(48, 3), nn.Linear(48, 3)
        del self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(x)
        return (self.head(h) + self.head_dist(h.tanh())) / 2


class Squeezed(Small):
    """A convolution gives maps of each class, as in SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = self.conv[:6], nn.Conv2d(12, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(x)).relu_().mean((2, 3))


class Blocks(nn.Module):
    """Transformer blocks on tokens ``(B, T, C)``, or on maps ``(B, H, W, C)``."""

    def __init__(self, maps: bool = False):
        super().__init__()
        self.maps, self.patches = maps, nn.Conv2d(1, 12, 4, stride=4)
        self.blocks = nn.Sequential(*[Block() for _ in range(9)])
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).permute(0, 2, 3, 1)
        return self.head(
            self.blocks(tokens if self.maps else tokens.flatten(1, 2)).flatten(1, -2).mean(1)
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = (
            nn.LayerNorm(12),
            nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Case(NamedTuple):
    """A network that is taken."""

    make: Callable[[], nn.Module]
    about: str = ""
    num_classes: int = 3
    logits: Callable | None = None


def weight_normed() -> nn.Module:
    return Net(nn.utils.parametrizations.weight_norm(nn.Linear(48, 3)))


TAKEN = {
    "logits `(B, n)` of a linear layer, under any name": Case(Small),
    "the last layer registered first, or under two names": Case(Reordered),
    "weight normalisation": Case(weight_normed),
    "blocks on tokens `(B, T, C)`": Case(Blocks, "the blocks are read"),
    "blocks on maps `(B, H, W, C)`": Case(partial(Blocks, True), "the blocks are read"),
    "a tuple": Case(partial(Net, behind=lambda z: (z, z.sum()))),
    "a dict": Case(partial(Net, behind=lambda z: {"loss": None, "logits": z})),
    "an object with `.logits`": Case(partial(Net, behind=lambda z: SimpleNamespace(logits=z))),
    "anything else that holds logits": Case(
        partial(Net, behind=lambda z: SimpleNamespace(out=z)),
        "`attach(..., logits=lambda y: y.out)`; load with `Selected(model, logits)` as backbone",
        logits=lambda y: y.out,
    ),
    "a softmax behind": Case(
        partial(Net, behind=lambda z: z.softmax(1)), "`net(x)` keeps it, scores do without"
    ),
    "a log-softmax behind": Case(partial(Net, behind=lambda z: z.log_softmax(1)), "the same"),
    "a temperature behind": Case(partial(Net, behind=lambda z: z / 2.5), "the same"),
    "two heads that are averaged": Case(Averaged, "the features of both, side by side"),
    "a 1x1 convolution of pooled features": Case(
        lambda: Net(nn.Sequential(nn.Unflatten(1, (48, 1, 1)), nn.Conv2d(48, 3, 1), nn.Flatten()))
    ),
    "a 1x1 convolution whose maps are averaged": Case(
        Squeezed, "its pooled input and the logits are features; `combine` leaves fDBD out"
    ),
    "one logit for two classes": Case(
        lambda: Net(nn.Linear(48, 1)), "`net(x)` is `[0, z]`; so it is behind a sigmoid", 2
    ),
    "one logit `(B,)`": Case(
        lambda: Net(nn.Linear(48, 1), lambda z: z.sigmoid().squeeze(1)), "the same", 2
    ),
    "`torch.compile(model)`": Case(
        lambda: torch.compile(Small(), backend="eager"), "the network inside; compile the result"
    ),
    "`DataParallel`, `DistributedDataParallel`": Case(
        lambda: nn.DataParallel(Small()), "the network inside"
    ),
    "a part that is compiled": Case(lambda: Net(torch.compile(nn.Linear(48, 3), backend="eager"))),
}
"""By what the network returns or is."""


def quantised() -> nn.Module:
    quantize_dynamic = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(Small().eval(), {nn.Linear})


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Small().eval(), torch.rand(1, *SHAPE))


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 9), nn.ReLU(), nn.Linear(9, 3))


REFUSED = {
    "a network in training mode": (lambda: Small().train(), "call model.eval"),
    "a function": (lambda: lambda x: x, "Expected a network, an nn.Module, but got a function"),
    "weights on `meta`": (lambda: Small().to("meta"), "Expected a network with its weights"),
    "TorchScript": (scripted, "give the module that it was made of"),
    "quantised layers": (quantised, "attach to the network before it is quantised"),
    "no convolutions and no blocks": (flat, "with convolutions or transformer blocks"),
    "another number of outputs than `num_classes`": (
        lambda: Small(5),
        "Expected a model with 3 outputs",
    ),
    "an output that is no function of logits": (
        partial(Net, behind=lambda z: z.cos()),
        "or give `logits`, a function that takes what the network returns",
    ),
    "an output that differs each time": (
        lambda: Net(nn.Sequential(_Random(), nn.Linear(48, 3))),
        "leave out what is random in evaluation mode",
    ),
}
"""By what the network is: how it is made, and what the error advises."""


class _Random(nn.Module):
    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z + torch.rand_like(z)
