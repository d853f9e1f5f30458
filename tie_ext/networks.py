"""The networks: a wrapper that adds the garbage class to any backbone, the paper's CNNs, and the conditional generator.

Symbols: ``x (B, C, H, W)`` images, ``h (B, F)`` penultimate features, ``n`` ID classes, ``logits (B, n)`` or ``(B, n+1)`` with garbage last,
``z (B, Z)`` latent vectors, ``code (B, n+1)`` soft class codes.
"""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import overload

import torch
from torch import Tensor, nn

from tie_ext.checks import check_images, check_number
from tie_ext.decision import Decision, decide
from tie_ext.files import load_state, save_state

PRECISIONS = ("float32", "bfloat16")
"""What a backbone can compute in; weights, features and logits are float32 in any case."""


class TIENet(nn.Module):
    """An n-class network with one more output, the garbage class.

    ``forward(x)`` gives the n ID logits, so that every OOD score made for an n-class network reads it unchanged;
    ``forward(x, garbage=True)`` gives all n+1. The head is split in two, ``fc`` (n outputs) and ``garbage`` (one), which together are one
    linear layer of n+1 outputs; so ``fc`` is the ID head wherever a host looks for it.

    Arguments:
        backbone: A classifier ``(B, C, H, W) -> (B, m)`` that returns what its last linear layer gives, logits and no softmax: a
            torchvision model, a network with ``fc``, or one of :data:`BACKBONES`. It is copied. Its last linear layer becomes ``fc`` if
            it has n outputs already (pre-trained weights are kept), and is replaced by a new one if not.
        num_classes: n >= 2.
        image_shape: ``(C, S, S)`` of the images it is for; None to take any (such a network cannot be trained by TIE).
        low: Smallest value of the images, a number or one a channel (what ``Normalize`` makes of 0).
        high: Largest value of the images (what it makes of 1).
        classes: Name of each ID class, by label.

    Raises:
        ValueError: If the backbone has no linear layer to stand on, returns something else than its last one does, does not take images
            of ``image_shape`` (the latter two are tried where it is given), n < 2, or low is not below high.

    Example:
        >>> net = TIENet(Conv3(in_channels=1, num_classes=10), num_classes=10, image_shape=(1, 28, 28))
        >>> x = torch.rand(2, 1, 28, 28)
        >>> net(x).shape, net(x, garbage=True).shape
        (torch.Size([2, 10]), torch.Size([2, 11]))
    """

    tau: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        image_shape: Sequence[int] | None = None,
        low: float | Sequence[float] = 0.0,
        high: float | Sequence[float] = 1.0,
        classes: Sequence[str] = (),
    ):
        super().__init__()
        check_number("num_classes", num_classes, 2, math.inf, integer=True)
        if classes and len(classes) != num_classes:
            raise ValueError(f"Expected {num_classes} class names, but got {len(classes)}")
        self.num_classes, self.classes = num_classes, tuple(classes)
        self.image_shape = None if image_shape is None else tuple(image_shape)
        register_range(self, low, high)
        self.backbone = copy.deepcopy(backbone)  # cutting its head off must not change the caller's network
        if self.image_shape is not None:
            ramp = torch.linspace(0, 1, math.prod(self.image_shape)).view(1, *self.image_shape)
            _try(self.backbone, self.low + (self.high - self.low) * ramp)
        head = _cut_head(self.backbone)
        self.feature_size = head.in_features
        self.fc = head if head.out_features == num_classes else nn.Linear(head.in_features, num_classes)
        self.garbage = nn.Linear(head.in_features, 1)
        # The largest UE of an accepted prediction. Infinite, which leaves level 2 off, until training has set it.
        self.register_buffer("tau", torch.tensor(math.inf))
        self.precision = "float32"  # one of PRECISIONS; training sets it, and it is saved, so that a threshold meets the scores it was fitted to

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features ``(B, F)`` of images ``(B, C, H, W)``."""
        if self.precision == "float32":
            return self.backbone(x).flatten(1)
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.backbone(x).flatten(1).float()

    @overload
    def forward(self, x: Tensor, *, garbage: bool = False) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, return_feature: bool, *, garbage: bool = False) -> tuple[Tensor, Tensor]: ...

    def forward(self, x, return_feature=False, *, garbage=False):
        """Logits, and features where asked.

        Arguments:
            x: Images ``(B, C, H, W)``.
            return_feature: Give ``(logits, features)``, as OpenOOD's networks do.
            garbage: Give n+1 logits, the garbage class last, instead of n.

        Returns:
            Logits ``(B, n)`` or ``(B, n+1)``; with ``return_feature`` also features ``(B, F)``.
        """
        h = self.features(x)
        logits = self.head(h) if garbage else self.fc(h)
        return (logits, h) if return_feature else logits

    def head(self, h: Tensor) -> Tensor:
        """All n+1 logits ``(B, n+1)`` of features ``(B, F)``."""
        return torch.cat([self.fc(h), self.garbage(h)], dim=1)

    def forward_threshold(self, x: Tensor, threshold: float) -> Tensor:
        """ID logits ``(B, n)`` of features cut off above ``threshold``, as ReAct asks for."""
        return self.fc(self.features(x).clip(max=threshold))

    def get_fc(self) -> tuple:
        """Weight ``(n, F)`` and bias ``(n,)`` of the ID head as numpy arrays, as OpenOOD's networks give them."""
        return self.fc.weight.detach().cpu().numpy(), self.fc.bias.detach().cpu().numpy()

    def get_fc_layer(self) -> nn.Linear:
        """The ID head itself."""
        return self.fc

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level of images, by one forward pass in evaluation mode.

        Arguments:
            x: Images ``(B, C, H, W)`` in the value range of training; B = 1 is fine.

        Returns:
            The :class:`~tie_ext.decision.Decision`; the mode of the network is left as it was.

        Raises:
            ValueError: If ``x`` is not a finite floating-point batch of images of the shape and value range of training.
        """
        self.check(x)
        with evaluating(self):
            return decide(self(x, garbage=True), self.tau)

    def check(self, x: Tensor) -> None:
        """Refuse what :meth:`decide` refuses.

        Raises:
            ValueError: If ``x`` is not a finite floating-point batch of images of the shape and value range of training.
        """
        check_images(x, self.image_shape, self.low.to(x.device), self.high.to(x.device))

    def save(self, path: str | os.PathLike) -> None:
        """Write the network with its tau, image shape, value range and class names; atomically, as safetensors + JSON.

        Raises:
            OSError: If it cannot be written; an earlier file is intact.
        """
        about = {"num_classes": self.num_classes, "image_shape": self.image_shape, "classes": self.classes, "precision": self.precision}
        names = [name for name, backbone in BACKBONES.items() if type(self.backbone) is backbone]
        save_state(path, "network", {**about, "backbone": names[0] if names else None, "weights": self.state_dict()})

    @classmethod
    def load(cls, path: str | os.PathLike, backbone: nn.Module | None = None) -> "TIENet":
        """Read what :meth:`save` wrote, on the CPU, in evaluation mode.

        Arguments:
            path: The file.
            backbone: The architecture, where it is not one of :data:`BACKBONES`; its weights come from the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, foreign, of another architecture, or needs a ``backbone``.
        """
        state = load_state(path, "network")
        try:
            weights, shape, name = state["weights"], state["image_shape"], state["backbone"]
            n = len(weights["fc.weight"])  # of the weights, not of what the header claims: a network is no larger than its file
            if backbone is None and name not in BACKBONES:
                raise ValueError(f"Expected a `backbone` for {path}, whose architecture is not one of {', '.join(BACKBONES)}, but got None")
            if backbone is None:
                backbone = BACKBONES[name](shape[0], n)
            net = cls(backbone, n, shape, weights["low"].flatten().tolist(), weights["high"].flatten().tolist(), state["classes"])
            net.load_state_dict(weights)
            net.precision = state.get("precision", "float32")  # earlier files had none other
            if net.precision not in PRECISIONS:
                raise ValueError(f"Expected a precision in {path}, one of {', '.join(PRECISIONS)}, but got {net.precision!r}")
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"Expected a network of this architecture in {path}, but got: {error}") from error
        return net.eval()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; the mode of every part as it was outside."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def register_range(module: nn.Module, low: float | Sequence[float] | Tensor, high: float | Sequence[float] | Tensor) -> None:
    """Give a module the value range of the data as buffers ``low`` and ``high``, each ``(1 or C, 1, 1)``.

    Raises:
        ValueError: If low is not below high, or they have different lengths.
    """
    bounds = [torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1).clone() for value in (low, high)]
    if bounds[0].shape != bounds[1].shape or not bool((bounds[0] < bounds[1]).all()):
        raise ValueError(f"Expected low < high, numbers or one for each channel, but got low={low!r}, high={high!r}")
    module.register_buffer("low", bounds[0])
    module.register_buffer("high", bounds[1])


def _head(backbone: nn.Module) -> str:
    """Name of the last linear layer, ``fc`` where there is one."""
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"Expected a backbone that ends in a linear layer, but got {type(backbone).__name__} without any")
    return "fc" if "fc" in linear else linear[-1]


def _cut_head(backbone: nn.Module) -> nn.Linear:
    """Replace the last linear layer by the identity, and give it back."""
    name = _head(backbone)
    head = backbone.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, nn.Identity())
    return head  # type: ignore[return-value]


def _try(backbone: nn.Module, x: Tensor) -> None:
    """Run a backbone once: what follows its head would be taken for features without a word, and a wrong shape found late."""
    name, outputs = _head(backbone), []
    hook = backbone.get_submodule(name).register_forward_hook(lambda module, args, output: outputs.append(output.clone()))
    try:
        with evaluating(backbone), torch.no_grad():
            y = backbone(x.to(next(backbone.parameters())))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(f"Expected a backbone for images {tuple(x.shape[1:])}, but {type(backbone).__name__} fails on one: {error}") from error
    finally:
        hook.remove()
    if not (outputs and isinstance(y, Tensor) and y.shape == outputs[-1].shape and torch.allclose(y, outputs[-1], 0, 0, equal_nan=True)):
        raise ValueError(
            f"Expected a backbone that returns what its last linear layer gives, but {type(backbone).__name__} returns something else than "
            f"`{name}` does; return the logits, without a softmax, and call the last linear layer `fc`"
        )


def _conv(cin: int, cout: int, pool: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def _channels_last(x: Tensor) -> Tensor:
    """The same images, a pixel's channels side by side in memory; unlike ``x.to(memory_format=...)`` inside ``torch.func.vmap`` too."""
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


class _PlainCNN(nn.Module):
    """Convolutions (BatchNorm, ReLU, pooling where told), then two fully connected layers (BatchNorm and ReLU after the first).

    Our own networks compute in channels last, which takes a CPU about half the time (Conv3, 28x28). A user's backbone keeps its layout,
    since code that views its maps as rows, as many networks and hosts' detectors do, fails in another.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int], pools: Sequence[bool], feature_size: int):
        super().__init__()
        self.feature_size = feature_size
        layers: list[nn.Module] = []
        for cin, cout, pool in zip((in_channels, *widths), widths, pools, strict=False):
            layers += _conv(cin, cout, pool)
        # Pooling to 3x3 whatever the image size; one size of hidden layer for 28 as for 224 pixels.
        self.conv = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(9 * widths[-1], feature_size, bias=False), nn.BatchNorm1d(feature_size), nn.ReLU(inplace=True))
        self.fc = nn.Linear(feature_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(self.hidden(self.conv(_channels_last(x))))


class Conv3(_PlainCNN):
    """The paper's CNN for MNIST and FashionMNIST: three convolutional, two fully connected layers, BatchNorm and ReLU (section 6.1).

    The paper gives no widths. Here: 32, 64, 128 channels and 128 features.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__(in_channels, num_classes, (32, 64, 128), (True, True, True), 128)


class Conv5(_PlainCNN):
    """The paper's CNN for SVHN and CIFAR-10: five convolutional, two fully connected layers (section 6.1).

    The paper gives no widths. Here: 64, 64, 128, 128, 256 channels and 256 features.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10):
        super().__init__(in_channels, num_classes, (64, 64, 128, 128, 256), (False, True, False, True, True), 256)


class Standardized(nn.Module):
    r"""A classifier whose penultimate features are z-scored, image by image, and scaled: for :class:`TIENet` to stand on.

    .. math:: \tilde h = \sigma \, (h - \mathrm{mean}(h)) / \mathrm{std}(h), \quad \|\tilde h\| = \sigma \sqrt{F - 1}

    A bounded norm keeps the network from being overconfident, so that it can learn ID labels and uncertainty about outliers together.

    Arguments:
        backbone: A classifier as TIENet takes it. It is copied.
        sigma: Scale > 0 (the authors: 0.5).

    References:
        ASCOOD, section 3.2 and proposition 2.
    """

    def __init__(self, backbone: nn.Module, sigma: float = 0.5):
        super().__init__()
        check_number("sigma", sigma, 0, 1e6, above=True)
        self.backbone, self.sigma = copy.deepcopy(backbone), sigma
        self.fc = _cut_head(self.backbone)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, m)`` of images ``(B, C, H, W)``."""
        h = self.backbone(x).flatten(1)
        return self.fc(self.sigma * (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-6))


class _Residual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        same = stride == 1 and cin == cout
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.skip(x)).relu()


class ResidualCNN(nn.Module):
    """The paper's "deeper CNN with residual connections" for CIFAR-100 and TinyImageNet (section 6.1).

    The paper gives no layout. Here: a 3x3 stem, four stages of two residual blocks with 64, 128, 256, 512 channels, average pooling.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 100):
        super().__init__()
        self.feature_size = 512
        widths = (64, 64, 128, 256, 512)
        blocks = [
            block for i, (cin, cout) in enumerate(pairwise(widths)) for block in (_Residual(cin, cout, 1 if i == 0 else 2), _Residual(cout, cout, 1))
        ]
        self.stages = nn.Sequential(*_conv(in_channels, 64, pool=False), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(self.stages(_channels_last(x)))


BACKBONES: dict[str, type[nn.Module]] = {"conv3": Conv3, "conv5": Conv5, "residual": ResidualCNN}
"""The paper's own CNNs by the names the command line takes."""


class Generator(nn.Module):
    """The conditional generator: latent vector and soft code to image, by 4 to 6 transposed convolutions.

    Arguments:
        image_shape: ``(C, H, W)`` of the images, square, 28 to 224 pixels, 1 or 3 channels.
        code_size: Length of the soft code, n+1.
        latent_size: Length Z of the latent vector.
        width: Channels of the stage before the image; earlier stages have up to four times as many.
        low: Smallest value of the data, a number or one a channel.
        high: Largest value of the data.

    Raises:
        ValueError: If the shape is not square, too small or too large, or the channels are neither 1 nor 3.

    References:
        TIE, section 6.1: 4-6 transposed convolutions, normally distributed weights.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        code_size: int,
        latent_size: int = 64,
        width: int = 32,
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
    ):
        super().__init__()
        channels, size = check_image_shape(image_shape)
        self.image_shape, self.code_size, self.latent_size = (channels, size, size), code_size, latent_size
        register_range(self, low, high)

        sizes = [size]  # from the image down to a seed of at most 7x7
        while sizes[-1] > 7:
            sizes.append(math.ceil(sizes[-1] / 2))
        sizes.reverse()
        sizes += [size] * max(0, 4 - len(sizes))  # the paper's least is four stages
        widths = [min(4, 2 ** (len(sizes) - 2 - i)) * width for i in range(len(sizes) - 1)] + [channels]

        layers: list[nn.Module] = [nn.ConvTranspose2d(latent_size + code_size, widths[0], sizes[0], bias=False)]
        for i in range(1, len(sizes)):
            layers += [nn.BatchNorm2d(widths[i - 1]), nn.ReLU(inplace=True)]
            layers.append(_upsample(widths[i - 1], widths[i], sizes[i - 1], sizes[i], bias=i == len(sizes) - 1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, code: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in ``[low, high]`` from latent vectors ``(B, Z)`` and soft codes ``(B, n+1)``, rows summing to 1."""
        # n+1 times the code has mean 1 for every number of classes, as z has variance 1.
        seed = torch.cat([z, code * self.code_size - 1], dim=1)
        x = self.layers(seed[:, :, None, None]).sigmoid()
        return (self.low + (self.high - self.low) * x).contiguous()  # for the backbone, whose layout is its own


def _upsample(cin: int, cout: int, before: int, after: int, bias: bool) -> nn.ConvTranspose2d:
    if after == before:
        return nn.ConvTranspose2d(cin, cout, 3, 1, 1, bias=bias)
    return nn.ConvTranspose2d(cin, cout, 4 if after == 2 * before else 3, 2, 1, bias=bias)  # to 2s, or to 2s - 1


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int]:
    """Channels and size of a square image shape.

    Raises:
        ValueError: If it is not ``(1 or 3, S, S)`` with S in [28, 224].
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2] or not 28 <= shape[1] <= 224:
        raise ValueError(f"Expected a square image shape (C, S, S) with C 1 or 3 and S in [28, 224], but got {shape}")
    return shape[0], shape[1]
