"""The paper's CNNs and ResNet-20, for users without a network of their own.

Symbols: ``x (B, C, H, W)`` images, ``h (B, F)`` penultimate features, ``n`` classes. All give
logits ``(B, n)``, without a softmax.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def _conv(cin: int, cout: int, pool: bool) -> list[nn.Module]:
    convolution = nn.Conv2d(cin, cout, 3, padding=1, bias=False)
    layers: list[nn.Module] = [convolution, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def _channels_last(x: Tensor) -> Tensor:
    """The same images in channels-last memory format; unlike ``x.to(memory_format=...)`` also
    inside ``torch.func.vmap``.
    """
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


class _PlainCNN(nn.Module):
    """Convolutions with BatchNorm and ReLU, some with pooling, then two fully connected layers,
    the first with BatchNorm and ReLU.

    These networks compute in channels last, which takes a CPU about half the time (Conv3, 28x28).
    A user's backbone keeps its layout, since many networks and detectors of hosts view maps as
    rows, which fails in another.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        pools: Sequence[bool],
        feature_size: int,
    ):
        super().__init__()
        self.feature_size = feature_size
        layers: list[nn.Module] = []
        for cin, cout, pool in zip((in_channels, *widths), widths, pools, strict=False):
            layers += _conv(cin, cout, pool)
        # Pooled to 3x3, so that the hidden layer has one size for images of 28 and of 224 pixels.
        self.conv = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.hidden = nn.Sequential(
            nn.Linear(9 * widths[-1], feature_size, bias=False),
            nn.BatchNorm1d(feature_size),
            nn.ReLU(inplace=True),
        )
        self.fc = nn.Linear(feature_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(self.hidden(self.conv(_channels_last(x))))


class Conv3(_PlainCNN):
    """The paper's CNN for MNIST and FashionMNIST: three convolutional and two fully connected
    layers, BatchNorm and ReLU (section 6.1).

    Paper: no widths. Here: 32, 64, 128 channels and 128 features.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10):
        super().__init__(in_channels, num_classes, (32, 64, 128), (True, True, True), 128)


class Conv5(_PlainCNN):
    """The paper's CNN for SVHN and CIFAR-10: five convolutional and two fully connected layers
    (section 6.1).

    Paper: no widths. Here: 64, 64, 128, 128, 256 channels and 256 features.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10):
        widths, pools = (64, 64, 128, 128, 256), (False, True, False, True, True)
        super().__init__(in_channels, num_classes, widths, pools, 256)


class _Residual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or cin != cout:
            projection = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.skip = nn.Sequential(projection, nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.skip(x)).relu()


class _ResidualNet(nn.Module):
    """A 3x3 stem, stages of residual blocks, and average pooling.

    Arguments:
        in_channels: C.
        num_classes: n.
        widths: Channels of the stem and of each stage; every stage but the first halves the image.
        blocks: Residual blocks a stage.
    """

    def __init__(self, in_channels: int, num_classes: int, widths: Sequence[int], blocks: int):
        super().__init__()
        self.feature_size = widths[-1]
        layers = _conv(in_channels, widths[0], pool=False)
        for i, (cin, cout) in enumerate(pairwise(widths)):
            layers.append(_Residual(cin, cout, 1 if i == 0 else 2))
            layers += [_Residual(cout, cout, 1) for _ in range(blocks - 1)]
        self.stages = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(self.stages(_channels_last(x)))


class ResidualCNN(_ResidualNet):
    """The paper's "deeper CNN with residual connections" for CIFAR-100 and TinyImageNet (section
    6.1).

    Paper: no layout. Here: four stages of two residual blocks with 64, 128, 256, 512 channels.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 100):
        super().__init__(in_channels, num_classes, (64, 64, 128, 256, 512), 2)


class ResNet20(_ResidualNet):
    """The small residual network for CIFAR-10, of 0.27 million weights: three stages of three
    blocks with 16, 32, 64 channels.

    References:
        K. He et al. *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2;
        shortcuts by projection (option B).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10):
        super().__init__(in_channels, num_classes, (16, 16, 32, 64), 3)


BACKBONES: dict[str, type[nn.Module]] = {
    "conv3": Conv3,
    "conv5": Conv5,
    "residual": ResidualCNN,
    "resnet20": ResNet20,
}
"""The networks above, by the names that the command line takes."""
