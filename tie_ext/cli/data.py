"""Image sets by name or folder, brought to one shape; and noise.

OOD images are brought to the size (bilinear) and channels of the ID data: grey to colour by
repetition, colour to grey by ITU-R 601 luma.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.cli.image_folder import TEST, folder_images, is_split
from tie_ext.cli.images import ImageSet
from tie_ext.cli.transform import Transform

NAMES = ("mnist", "fashionmnist", "svhn", "cifar10", "cifar100", "tinyimagenet")
"""The paper's six sets."""
BUDGET = 2**28
"""Most bytes of an image set in memory: 20 000 colour images of 64 pixels. Those of a larger
folder are decoded each time; the results are the same."""
_TORCHVISION = dict(
    zip(NAMES, ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100"), strict=False)
)
_FOLDERS = {"tinyimagenet": ("tinyimagenet", "tin", "tiny-imagenet-200")}
_GREY = ("demo", "mnist", "fashionmnist")


def load(
    name: str,
    split: str,
    root: str | os.PathLike = "data",
    shape: Sequence[int] | None = None,
    download: bool = False,
    seed: int = 0,
) -> ImageSet:
    """As :func:`find`, squashed to ``shape``, and in memory where they fit."""
    how = Transform.squash(shape or own_shape(name))
    return kept(find(name, split, root, how, download, seed))


def find(
    name: str,
    split: str,
    root: str | os.PathLike,
    transform: Transform,
    download: bool = False,
    seed: int = 0,
) -> ImageSet:
    """A named set, or ``folder:PATH``, brought to a shape.

    A folder without ``test/`` is tested on its ``val/`` (``valid/``, ``validation/``); without
    that too, one image in five of each class is held out of training. The note of the test set
    says so.

    Arguments:
        name: One of :data:`NAMES`, any folder ``root/NAME/SPLIT/CLASS/*.png``, or ``folder:PATH``
            (``PATH/SPLIT/CLASS/*`` or, without splits, ``PATH/CLASS/*``). ``NAME:A-B`` is its
            classes A to B alone, relabelled from 0 (``mnist:0-4``).
        split: ``train``, ``test`` or ``ood`` (the test images; all images of a folder without).
        root: Where the sets are: as torchvision keeps them (``root/MNIST/raw``), or as image
            folders (``root/mnist/train/0/*.png``, also below ``root/images_classic``, OpenOOD's).
        transform: How images are brought to a shape.
        download: Let torchvision download what is missing.
        seed: Chooses the images held out of a folder without test images; the same seed and file
            names give the same images.

    Raises:
        ValueError: If the name is unknown or there are no images, saying where they were looked
            for.
    """
    if name.startswith("folder:"):
        return folder_images(Path(name.removeprefix("folder:")), split, seed, transform)
    if part := re.fullmatch(r"(\w+):(\d+)-(\d+)", name):
        whole = find(part[1], split, root, transform, download, seed)
        return whole.classes_between(int(part[2]), int(part[3]))
    folders = _FOLDERS.get(name, (name,))
    places = [base / n for base in (Path(root), Path(root, "images_classic")) for n in folders]
    # OpenOOD keeps SVHN's test images as a folder beside torchvision's training images.
    wanted = ("train",) if split == "train" and name in _TORCHVISION else ("train", *TEST)
    for place in places:
        if any(is_split(place, part) for part in wanted):
            return folder_images(place, split, seed, transform)
    if name in _TORCHVISION:
        return _torchvision(name, split == "train", Path(root), transform, download)
    looked = ", ".join(map(str, places))
    if name in NAMES:
        raise ValueError(
            f"Expected {name}, which torchvision does not have, in a folder, one of {looked}, "
            "but got none"
        )
    hint = f"; did you mean folder:{name}?" if Path(name).is_dir() else ""
    raise ValueError(
        f"Expected a data set, one of {', '.join(NAMES)} or folder:PATH, but got {name!r} and no "
        f"folder {looked}{hint}"
    )


def kept(images: ImageSet) -> ImageSet:
    """Images in memory where they fit in :data:`BUDGET`.

    Raises:
        ValueError: If one that is to be read cannot be.
    """
    return images.loaded() if len(images) * math.prod(images.shape) <= BUDGET else images


def own_shape(name: str) -> tuple[int, int, int]:
    """``(C, S, S)`` of a set by default; 3 channels and 64 pixels for a folder."""
    name = name if name.startswith("folder:") else name.partition(":")[0]
    if name in _GREY:
        return 1, 28, 28
    return (3, 32, 32) if name in _TORCHVISION else (3, 64, 64)


def _torchvision(name: str, train: bool, root: Path, how: Transform, download: bool) -> ImageSet:
    import torchvision  # only here, so that everything else works without it

    which = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        data = getattr(torchvision.datasets, _TORCHVISION[name])(root, download=download, **which)
    except RuntimeError as error:
        raise ValueError(
            f"Expected {name} in {root} as torchvision or an image folder keeps it, but got none "
            f"({error})"
        ) from error
    x = torch.as_tensor(np.asarray(data.data))
    if x.ndim == 4:
        x = x if name == "svhn" else x.permute(0, 3, 1, 2)
    y = torch.as_tensor(np.asarray(data.labels if name == "svhn" else data.targets)).long()
    classes = tuple(getattr(data, "classes", map(str, range(10))))
    return ImageSet(transformed(x.reshape(len(x), -1, *x.shape[-2:]), how), y, classes)


def transformed(x: Tensor, how: Transform) -> Tensor:
    """Uint8 images ``(N, C, H, W)``, transformed."""
    from PIL import Image

    arrays = x.permute(0, 2, 3, 1).squeeze(3).numpy()
    return torch.stack([how.pixels(Image.fromarray(array)) for array in arrays])


def noise(kind: str, count: int, shape: Sequence[int], seed: int = 0) -> ImageSet:
    """Noise as an OOD set.

    Arguments:
        kind: ``gaussian`` (N(0, 1) around mid-grey for data in [-1, 1], clipped), ``uniform``, or
            ``sphere`` (every direction from black, at the length of a white image, clipped).
        count: ImageSet.
        shape: ``(C, S, S)``.
        seed: Seed of the noise.

    Raises:
        ValueError: If there is no such kind.
    """
    kinds = {
        "gaussian": lambda x: x / 2 + 0.5,
        "sphere": lambda x: F.normalize(x.flatten(1)).view_as(x) * math.prod(shape) ** 0.5,
    }
    rng = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        x = torch.rand((count, *shape), generator=rng)
    elif kind in kinds:
        x = kinds[kind](torch.randn((count, *shape), generator=rng)).clamp(0, 1)
    else:
        raise ValueError(
            f"Expected kind to be 'gaussian', 'uniform' or 'sphere', but got {kind!r}"
        )
    return ImageSet((x * 255).round().to(torch.uint8), torch.full((count,), -1))
