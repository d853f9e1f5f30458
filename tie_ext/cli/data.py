"""Image sets by name or folder, brought to one shape; and noise.

OOD images are brought to the size (bilinear) and channels of the ID data: grey to colour by
repetition, colour to grey by ITU-R 601 luma.
"""

import math
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.cli.image_folder import TEST, folder_images, is_split
from tie_ext.cli.images import Images, ImageSet
from tie_ext.cli.transform import Transform

NAMES = ("mnist", "fashionmnist", "svhn", "cifar10", "cifar100", "tinyimagenet")
"""The paper's six sets."""
IN_MEMORY = ("auto", "yes", "no")
"""Where the images of a folder are kept: decoded once in memory, or on disk, decoded each time;
``auto``: in memory up to :data:`BUDGET`. The results are the same."""
BUDGET = 2**28
"""Most bytes of an image set in memory by ``auto``: 20 000 colour images of 64 pixels."""
_TORCHVISION = dict(
    zip(NAMES, ("MNIST", "FashionMNIST", "SVHN", "CIFAR10", "CIFAR100"), strict=False)
)
_FOLDERS = {"tinyimagenet": ("tinyimagenet", "tin", "tiny-imagenet-200")}
_CLASSES = {
    "fashionmnist": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot",
    "cifar10": "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck",
}
"""Names that torchvision gives the classes, for folders whose names are numbers."""
_GREY = ("demo", "mnist", "fashionmnist")
_SPLITS = ("train", "test", "ood", "val")


def load(
    name: str,
    split: str,
    root: str | os.PathLike = "data",
    shape: Sequence[int] | None = None,
    download: bool = False,
    seed: int = 0,
    in_memory: str = "yes",
    transform: Transform | None = None,
) -> Images:
    """A named set, or ``folder:PATH``, brought to a shape.

    A folder without ``test/`` is tested on its ``val/`` (``valid/``, ``validation/``); without
    that too, one image in five of each class is held out of training. The note of the test set
    says so.

    Arguments:
        name: One of :data:`NAMES`, any folder ``root/NAME/SPLIT/CLASS/*.png``, or ``folder:PATH``
            (``PATH/SPLIT/CLASS/*`` or, without splits, ``PATH/CLASS/*``). ``NAME:A-B`` is its
            classes A to B alone, relabelled from 0 (``mnist:0-4``).
        split: ``train``, ``test``, ``ood`` (the test images; all images of a folder without), or
            ``val`` (the images of a folder's ``val/`` alone, unlabelled, to choose settings by).
        root: Where the sets are: as torchvision keeps them (``root/MNIST/raw``), or as image
            folders (``root/mnist/train/0/*.png``, also below ``root/images_classic``, OpenOOD's).
        shape: ``(C, S, S)``; None for the set's own, 3 channels and 64 pixels for a folder.
        download: Let torchvision download what is missing.
        seed: Chooses the images held out of a folder without test images; the same seed and file
            names give the same images.
        in_memory: One of :data:`IN_MEMORY`; sets that torchvision keeps in one file are read
            whole.
        transform: How images are brought to a shape, which it has; None to squash them to
            ``shape``.

    Raises:
        ValueError: If the name is unknown, a file is no image, or there are no images, saying
            where they were looked for.
    """
    if split not in _SPLITS:
        raise ValueError(
            f"Expected split to be 'train', 'test', 'ood' or 'val', but got {split!r}"
        )
    how = transform or Transform.squash(shape or own_shape(name))
    if name.startswith("folder:"):
        place = Path(name.removeprefix("folder:"))
        return keep(folder_images([place], place, split, seed, how), in_memory)
    if part := re.fullmatch(r"(\w+):(\d+)-(\d+)", name):
        whole = load(part[1], split, root, shape, download, seed, in_memory, transform)
        return whole.classes_between(int(part[2]), int(part[3]))
    folders = _FOLDERS.get(name, (name,))
    places = [base / n for base in (Path(root), Path(root, "images_classic")) for n in folders]
    # OpenOOD keeps SVHN's test images as a folder beside torchvision's training images.
    wanted = ("train",) if split == "train" and name in _TORCHVISION else ("train", *TEST)
    found = next((p for p in places if any(is_split(p, part) for part in wanted)), None)
    if found or split == "val":
        images = keep(folder_images(places, found, split, seed, how), in_memory)
        by_number = name in _CLASSES and images.classes == tuple(map(str, range(10)))
        return images.labelled(images.y, tuple(_CLASSES[name].split(","))) if by_number else images
    train = "train" if split == "train" else "test"
    if name in _TORCHVISION:
        return _torchvision(name, train, Path(root), how, download)
    looked = ", ".join(str(place / train) for place in places)
    if name in NAMES:
        raise ValueError(
            f"Expected {split} images of {name}, which torchvision does not have, in a folder, "
            f"one of {looked}, but got none"
        )
    hint = f"; did you mean folder:{name}?" if Path(name).is_dir() else ""
    raise ValueError(
        f"Expected a data set, one of {', '.join(NAMES)} or folder:PATH, but got {name!r} and no "
        f"folder {looked}{hint}"
    )


def keep(images: Images, in_memory: str) -> Images:
    """Images in memory or on disk, as one of :data:`IN_MEMORY` says.

    Raises:
        ValueError: If one that is to be read cannot be.
    """
    if in_memory not in IN_MEMORY:
        raise ValueError(
            f"Expected in_memory to be one of {', '.join(IN_MEMORY)}, but got {in_memory!r}"
        )
    small = len(images) * math.prod(images.shape) <= BUDGET
    return images.loaded() if in_memory == "yes" or (in_memory == "auto" and small) else images


def own_shape(name: str) -> tuple[int, int, int]:
    """``(C, S, S)`` of a set by default; 3 channels and 64 pixels for a folder."""
    name = name if name.startswith("folder:") else name.partition(":")[0]
    if name in _GREY:
        return 1, 28, 28
    return (3, 32, 32) if name in _TORCHVISION else (3, 64, 64)


def _torchvision(name: str, split: str, root: Path, how: Transform, download: bool) -> ImageSet:
    import torchvision  # only here, so that everything else works without it

    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        data = getattr(torchvision.datasets, _TORCHVISION[name])(root, download=download, **which)
    except RuntimeError as error:
        raise ValueError(
            f"Expected {name} in {root} as torchvision or an image folder keeps it, but got none "
            f"({error})"
        ) from error
    x = torch.as_tensor(np.asarray(data.data))
    if x.ndim == 3:
        x = x[:, None]
    elif name != "svhn":
        x = x.permute(0, 3, 1, 2)
    y = torch.as_tensor(np.asarray(data.labels if name == "svhn" else data.targets)).long()
    classes = tuple(getattr(data, "classes", map(str, range(10))))
    return ImageSet(transformed(x, how), y, classes)


def transformed(x: Tensor, how: Transform) -> Tensor:
    """Uint8 images ``(N, C, H, W)``, transformed."""
    C, H, W = how.shape
    if how.resize == (H, W) == (H, H):
        return reshape(x, C, H)
    from PIL import Image

    arrays = x.permute(0, 2, 3, 1).squeeze(3).numpy()
    return torch.stack([how.pixels(Image.fromarray(array)) for array in arrays])


def reshape(x: Tensor, channels: int, size: int) -> Tensor:
    """Bring uint8 images ``(N, C, H, W)`` to ``(N, channels, size, size)``: luma or repetition,
    then bilinear.
    """
    if x.shape[1] == 3 and channels == 1:
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        grey = [(part.float() * luma).sum(1, keepdim=True).round() for part in x.split(4096)]
        x = torch.cat([part.to(torch.uint8) for part in grey])
    elif x.shape[1] == 1 and channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if x.shape[-2:] != (size, size):
        resize = partial(F.interpolate, mode="bilinear", align_corners=False, antialias=True)
        parts = [resize(part.float(), (size, size)) for part in x.split(4096)]
        x = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
    return x.contiguous()


def noise(kind: str, count: int, shape: Sequence[int], seed: int = 0) -> ImageSet:
    """Noise as an OOD set.

    Arguments:
        kind: ``gaussian`` (N(0, 1) around mid-grey for data in [-1, 1], clipped), ``uniform``, or
            ``sphere`` (every direction from black, at the length of a white image, clipped).
        count: Images.
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
