"""The paper's CNNs and ResNet-20, for those who bring no network of their own.

Symbols: ``x (B, C, H, W)`` images, ``h (B, F)`` penultimate features, ``n`` classes. All give logits ``(B, n)``, without a softmax.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def _conv(cin: int, cout: int, pool: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [
        nn.Conv2d(cin, cout, 3, padding=1, bias=False),
        nn.BatchNorm2d(cout),
        nn.ReLU(inplace=True),
    ]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def _channels_last(x: Tensor) -> Tensor:
    """The same images, a pixel's channels side by side in memory; unlike ``x.to(memory_format=...)`` inside ``torch.func.vmap`` too."""
    return x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).permute(0, 3, 1, 2)


class _PlainCNN(nn.Module):
    """Convolutions (BatchNorm, ReLU, pooling where told), then two fully connected layers (BatchNorm and ReLU after the first).

    Our own networks compute in channels last, which takes a CPU about half the time (Conv3, 28x28). A user's backbone keeps its layout,
    since code that views its maps as rows, as many networks and hosts' detectors do, fails in another.
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
        # Pooling to 3x3 whatever the image size; one size of hidden layer for 28 as for 224 pixels.
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
        super().__init__(
            in_channels,
            num_classes,
            (64, 64, 128, 128, 256),
            (False, True, False, True, True),
            256,
        )


class _Residual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        same = stride == 1 and cin == cout
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
        )

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
            block
            for i, (cin, cout) in enumerate(pairwise(widths))
            for block in (_Residual(cin, cout, 1 if i == 0 else 2), _Residual(cout, cout, 1))
        ]
        self.stages = nn.Sequential(
            *_conv(in_channels, 64, pool=False), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(self.stages(_channels_last(x)))


class ResNet20(nn.Module):
    """The small residual network of CIFAR-10, of 0.27 million weights: three stages of three blocks with 16, 32, 64 channels.

    References:
        K. He et al. *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2; shortcuts by projection (option B).
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10):
        super().__init__()
        self.feature_size = 64
        widths = (16, 16, 32, 64)
        blocks = [
            block
            for i, (cin, cout) in enumerate(pairwise(widths))
            for block in (
                _Residual(cin, cout, 1 if i == 0 else 2),
                _Residual(cout, cout, 1),
                _Residual(cout, cout, 1),
            )
        ]
        self.stages = nn.Sequential(
            *_conv(in_channels, 16, pool=False), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, C, H, W)``."""
        return self.fc(self.stages(_channels_last(x)))


BACKBONES: dict[str, type[nn.Module]] = {
    "conv3": Conv3,
    "conv5": Conv5,
    "residual": ResidualCNN,
    "resnet20": ResNet20,
}
"""The paper's own CNNs, and ResNet-20, by the names the command line takes."""
