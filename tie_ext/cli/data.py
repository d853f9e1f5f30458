"""Image sets: the named ones from disk, folders of images, noise, and a small set that needs no download; and batches of them.

Images are uint8 ``(N, C, S, S)`` and leave as float in [0, 1], or in a network's value range. OOD images are brought to the ID data's size
(bilinear) and channels (grey to colour by repeating, colour to grey by ITU-R 601 luma).
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.cli.images import SUFFIXES, ImageFiles, Images, ImageSet, images_below, read_image
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.checks import check_number

__all__ = [
    "ImageBatches",
    "ImageFiles",
    "ImageSet",
    "Images",
    "demo",
    "held_out",
    "load",
    "moved",
    "noise",
    "own_shape",
    "read_image",
    "reshape",
]

NAMES = ("mnist", "fashionmnist", "svhn", "cifar10", "cifar100", "tinyimagenet")
"""The paper's six sets."""
_TORCHVISION = {
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
}
_FOLDERS = {"tinyimagenet": ("tinyimagenet", "tin", "tiny-imagenet-200")}
_CLASSES = {
    "fashionmnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "cifar10": (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ),
}
"""Names of classes, as torchvision has them, for folders whose names are numbers."""
_TEST = ("test", "val", "valid", "validation")
"""What a folder of test images may be called; the first that is there is taken."""
_SHAPES = {
    "demo": (1, 28, 28),
    "mnist": (1, 28, 28),
    "fashionmnist": (1, 28, 28),
    "tinyimagenet": (3, 64, 64),
}
IN_MEMORY = ("auto", "yes", "no")
"""Where the images of a folder are kept while they are used: decoded once in memory, or on disk, decoded anew each time; ``auto``, in memory where
they take at most :data:`BUDGET`. The result is the same."""
HELD_OUT = "held out"
"""What the note of a test set says of images that were taken from those of training."""
BUDGET = 2**28
"""Bytes of an image set that is kept in memory unless told otherwise: 20 000 colour images of 64 pixels."""


def moved(x: Tensor, most: int) -> Tensor:
    """Each image moved by up to ``most`` pixels in either direction: a random crop of the padded image, as OpenOOD trains with.

    Arguments:
        x: Images ``(B, C, H, W)``; what moves in is 0.
        most: In pixels; 0 leaves them, and the random state, as they are.
    """
    if most == 0:
        return x
    B, _, H, W = x.shape
    top, left = torch.randint(2 * most + 1, (2, B, 1)).to(x.device)
    rows, columns = top + torch.arange(H, device=x.device), left + torch.arange(W, device=x.device)
    padded = F.pad(x, (most, most, most, most))
    # Contiguous, as indexing leaves the channels last, and backbones that view their maps as rows fail on that.
    return (
        padded[
            torch.arange(B, device=x.device)[:, None, None],
            :,
            rows[:, :, None],
            columns[:, None, :],
        ]
        .permute(0, 3, 1, 2)
        .contiguous()
    )


class ImageBatches:
    """Re-iterable batches ``(x, y)`` of images: float, int64; a DataLoader's work without its overhead where they are in memory.

    Arguments:
        images: The set.
        batch_size: Images a batch; the last one may be smaller.
        shuffle: A new order at each iteration, from torch's global random state.
        shift: Most pixels each image is moved by, in either direction, anew at each iteration; what moves in is black. Random crops of
            the padded image, as OpenOOD trains with.
        scale: Who knows the value range that images leave in, on the device they leave on; None for [0, 1].
    """

    def __init__(
        self,
        images: Images,
        batch_size: int = 128,
        shuffle: bool = False,
        shift: int = 0,
        scale: Bounded | None = None,
    ):
        check_number("batch_size", batch_size, 1, 10**6, integer=True)
        check_number("shift", shift, 0, images.shape[-1], integer=True)
        self.images, self.batch_size, self.shuffle, self.shift, self.scale = (
            images,
            batch_size,
            shuffle,
            shift,
            scale,
        )

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def _rows(self) -> Tensor:
        return torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self._rows().split(self.batch_size)
        for part, pixels in zip(rows, self.images.parts(rows), strict=True):
            yield scaled(moved(pixels, self.shift), self.scale), self.images.y[part]


def scaled(x: Tensor, scale: Bounded | None) -> Tensor:
    """Images uint8 ``(B, C, S, S)`` as float in a network's value range, on its device; in [0, 1] where there is none."""
    return (
        x.float() / 255 if scale is None else scale.from_unit(x.to(scale.low.device).float() / 255)
    )


def training_batches(
    images: Images, batch_size: int = 128, shift: int | None = None, scale: Bounded | None = None
) -> ImageBatches:
    """What every method trains on: shuffled, and each image moved a little.

    Not only for accuracy: tau comes from the uncertainty of training images, which falls to 0 for images that are learned by heart.

    Arguments:
        images: The set.
        batch_size: Images a batch.
        shift: Most pixels an image is moved by; None for an eighth of its size (28 pixels: 3; 32: 4, as OpenOOD's crops).
        scale: As :class:`ImageBatches` has it.
    """
    return ImageBatches(
        images,
        batch_size,
        shuffle=True,
        shift=images.shape[-1] // 8 if shift is None else shift,
        scale=scale,
    )


def load(
    name: str,
    split: str,
    root: str | os.PathLike = "data",
    shape: Sequence[int] | None = None,
    download: bool = False,
    seed: int = 0,
    in_memory: str = "yes",
) -> Images:
    """A named set, or ``folder:PATH``, brought to a shape.

    A folder without ``test/`` is tested on its ``val/`` (``valid/``, ``validation/``); without that too, one image in five of each class is
    held out of training. The note of the test set says so.

    Arguments:
        name: One of :data:`NAMES`, any folder ``root/NAME/SPLIT/CLASS/*.png``, or ``folder:PATH`` (``PATH/SPLIT/CLASS/*`` or, without
            splits, ``PATH/CLASS/*``). ``NAME:A-B`` is its classes A to B alone, relabelled from 0 (``mnist:0-4``).
        split: ``train``, ``test``, or ``ood``: the test images or, where a folder has none, all, as nobody trains on them; or ``val``: the
            images of a folder's ``val/`` alone, unlabelled: OOD images that settings may be chosen by.
        root: Where the sets lie: as torchvision keeps them (``root/MNIST/raw``), or as image folders (``root/mnist/train/0/*.png``, also
            below ``root/images_classic``, as OpenOOD keeps them).
        shape: ``(C, S, S)`` to bring the images to; None for the set's own, 3 channels and 64 pixels for a folder.
        download: Let torchvision download what is missing.
        seed: Which images are held out where a folder has no test images; the same for the same seed and names of files.
        in_memory: Of :data:`IN_MEMORY`; what torchvision keeps in one file is read whole.

    Raises:
        ValueError: If the name is unknown, a file is no image, or there are no images, saying where they were looked for.
    """
    if split not in ("train", "test", "ood", "val"):
        raise ValueError(
            f"Expected split to be 'train', 'test', 'ood' or 'val', but got {split!r}"
        )
    channels, size = (shape or own_shape(name))[:2]
    if name.startswith("folder:"):
        place = Path(name.removeprefix("folder:"))
        return kept(
            _validation([place], channels, size)
            if split == "val"
            else _split(place, split, seed, channels, size),
            in_memory,
        )
    if part := re.fullmatch(r"(\w+):(\d+)-(\d+)", name):
        return load(part[1], split, root, shape, download, seed, in_memory).classes_between(
            int(part[2]), int(part[3])
        )
    places = _places(Path(root), name)
    if split == "val":
        return kept(_validation(places, channels, size), in_memory)
    # Test images alone may lie beside torchvision's training images: OpenOOD keeps SVHN so.
    wanted = ("train",) if split == "train" and name in _TORCHVISION else ("train", *_TEST)
    if folder := next(
        (place for place in places if any(_is_split(place, part) for part in wanted)), None
    ):
        images = kept(_split(folder, split, seed, channels, size), in_memory)
        return (
            images.labelled(images.y, _CLASSES[name])
            if name in _CLASSES and images.classes == tuple(map(str, range(10)))
            else images
        )
    if name in _TORCHVISION:
        return _torchvision(
            name, "train" if split == "train" else "test", Path(root), channels, size, download
        )
    looked = ", ".join(str(place / ("train" if split == "train" else "test")) for place in places)
    if name in NAMES:
        raise ValueError(
            f"Expected {split} images of {name}, which torchvision does not have, in a folder, one of {looked}, but got none"
        )
    hint = f"; did you mean folder:{name}?" if Path(name).is_dir() else ""
    raise ValueError(
        f"Expected a data set, one of {', '.join(NAMES)} or folder:PATH, but got {name!r} and no folder {looked}{hint}"
    )


def kept(images: Images, in_memory: str) -> Images:
    """Images where :data:`IN_MEMORY` says they are to be.

    Raises:
        ValueError: If one that is to be read cannot be.
    """
    if in_memory not in IN_MEMORY:
        raise ValueError(
            f"Expected in_memory to be one of {', '.join(IN_MEMORY)}, but got {in_memory!r}"
        )
    return (
        images.loaded()
        if in_memory == "yes"
        or (in_memory == "auto" and len(images) * math.prod(images.shape) <= BUDGET)
        else images
    )


def own_shape(name: str) -> tuple[int, int, int]:
    """``(C, S, S)`` a set is loaded at unless told otherwise; 3 channels and 64 pixels for a folder."""
    name = name if name.startswith("folder:") else name.partition(":")[0]
    return _SHAPES.get(name, (3, 32, 32) if name in NAMES else (3, 64, 64))


def _places(root: Path, name: str) -> list[Path]:
    return [
        base / n for base in (root, root / "images_classic") for n in _FOLDERS.get(name, (name,))
    ]


def _torchvision(
    name: str, split: str, root: Path, channels: int, size: int, download: bool
) -> ImageSet:
    import torchvision  # only here, so that everything else works without it

    cls = getattr(torchvision.datasets, _TORCHVISION[name])
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        data = cls(str(root), download=download, **which)
    except RuntimeError as error:
        raise ValueError(
            f"Expected {name} in {root} as torchvision or an image folder keeps it, but got none ({error})"
        ) from error
    x = torch.as_tensor(np.asarray(data.data))
    if x.ndim == 3:
        x = x[:, None]
    elif name != "svhn":
        x = x.permute(0, 3, 1, 2)
    y = torch.as_tensor(np.asarray(data.labels if name == "svhn" else data.targets)).long()
    classes = tuple(getattr(data, "classes", map(str, range(10))))
    return ImageSet(reshape(x, channels, size), y, classes)


def _split(path: Path, split: str, seed: int, channels: int, size: int) -> ImageFiles:
    """The images of a folder to train on, to test on, or of an OOD set; see :func:`load`."""
    train, test = (
        next((path / name for name in names if _is_split(path, name)), None)
        for names in (("train",), _TEST)
    )
    if test is not None:
        if split != "train":
            images = _files(*_listed(test), channels, size)
            known = test.name == "test"
            return (
                images
                if known
                else replace(
                    images,
                    note=f"{path} has no test/: the {len(images)} images of {test.name}/ are the test set",
                )
            )
        if train is None:
            raise ValueError(
                f"Expected training images in {path / 'train'}, beside {test}, but got no such folder"
            )
        return _files(*_listed(train), channels, size)
    classes, files = _listed(train or path)
    if split == "ood":
        return _files(classes, files, channels, size)
    out = held_out(
        [(Path(os.path.relpath(file, train or path)).as_posix(), label) for file, label in files],
        seed,
    )
    part = [file for i, file in enumerate(files) if (i in out) == (split == "test")]
    if not part:
        raise ValueError(
            f"Expected a class of two images or more below {train or path}, to hold one out, but got one image of each"
        )
    images = _files(classes, part, channels, size)
    return (
        images
        if split == "train"
        else replace(images, note=_said(path, train is not None, classes, files, out, seed))
    )


def _validation(places: Sequence[Path], channels: int, size: int) -> ImageFiles:
    """The unlabelled images of the first ``val/`` there is."""
    for folder in (
        place / name for place in places for name in _TEST[1:] if _is_split(place, name)
    ):
        return _files(*_listed(folder), channels, size).unlabelled()
    looked = ", ".join(str(place / "val") for place in places)
    raise ValueError(f"Expected validation images in a folder, one of {looked}, but got none")


def held_out(files: Sequence[tuple[str, int]], seed: int) -> set[int]:
    """Which files are kept for the test: one in five of each class, and of two or more at least one.

    Arguments:
        files: Name and label of each. The names decide, so that the order in which a disk lists them does not.
        seed: Another one gives other files.

    Returns:
        Their indices.
    """
    rows: dict[int, list[int]] = {}
    for i in sorted(
        range(len(files)),
        key=lambda i: hashlib.sha256(os.fsencode(f"{seed}/{files[i][0]}")).digest(),
    ):
        rows.setdefault(files[i][1], []).append(i)
    return {i for of in rows.values() for i in of[: max(len(of) // 5, int(len(of) > 1))]}


def _said(
    path: Path,
    has_train: bool,
    classes: Sequence[str],
    files: Sequence[tuple[str, int]],
    out: set[int],
    seed: int,
) -> str:
    """That test images were held out, how many, and of which classes there are none."""
    lacks = "train/ and no test/" if has_train else "no train/ and test/"
    none = [name for label, name in enumerate(classes) if label not in {files[i][1] for i in out}]
    names = ", ".join(none[:5]) + (f" and {len(none) - 5} more" if len(none) > 5 else "")
    said = f"{path} has {lacks}: {len(files) - len(out)} images to train on, {len(out)} {HELD_OUT} (one in five of each class, seed {seed})"
    return f"{said}; no test image of {names}, of which there is one image" if none else said


def _is_split(path: Path, name: str) -> bool:
    """Whether ``path/name`` is a split and no class of that name: it holds folders, or stands beside none but other splits."""
    if not (path / name).is_dir():
        return False
    return bool(_folders(path / name)) or all(
        folder.name in ("train", *_TEST) for folder in _folders(path)
    )


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, hidden ones left out, in sorted order (numbers by value)."""
    found = [p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
    return sorted(found, key=lambda p: p.name.zfill(12) if p.name.isdigit() else p.name)


def _listed(path: Path) -> tuple[tuple[str, ...], list[tuple[str, int]]]:
    """Classes, and file and label of all images below ``path/CLASS/``, in sorted order; hidden files and folders are left out.

    Raises:
        ValueError: If there is no such folder, no class in it, or no image in a class.
    """
    if not path.is_dir():
        raise ValueError(
            f"Expected a folder with one folder of images a class at {path}, but got no folder"
        )
    classes, files, kinds = _folders(path), [], ", ".join(sorted(SUFFIXES))
    for label, folder in enumerate(classes):
        seen = [(file, label) for file in images_below(folder)]
        if not seen:
            raise ValueError(
                f"Expected images in {folder}, one folder a class, but got none ({kinds}); add some, or take the folder away"
            )
        files += seen
    if not classes:
        raise ValueError(
            f"Expected images in folders, one a class, below {path}, but got none ({kinds})"
        )
    return tuple(p.name for p in classes), files


def _files(
    classes: tuple[str, ...], files: Sequence[tuple[str, int]], channels: int, size: int
) -> ImageFiles:
    return ImageFiles.of(
        [file for file, _ in files], channels, size, [label for _, label in files], classes=classes
    )


def reshape(x: Tensor, channels: int, size: int) -> Tensor:
    """Bring uint8 images ``(N, C, H, W)`` to ``(N, channels, size, size)``: luma or repetition, then bilinear."""
    if x.shape[1] == 3 and channels == 1:
        luma = torch.tensor([0.299, 0.587, 0.114])
        x = torch.cat(
            [
                (part.float() * luma.view(1, 3, 1, 1)).sum(1, keepdim=True).round().to(torch.uint8)
                for part in x.split(4096)
            ]
        )
    elif x.shape[1] == 1 and channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if x.shape[-2:] != (size, size):
        parts = [
            F.interpolate(
                part.float(), (size, size), mode="bilinear", align_corners=False, antialias=True
            )
            for part in x.split(4096)
        ]
        x = torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])
    return x.contiguous()


def noise(kind: str, count: int, shape: Sequence[int], seed: int = 0) -> ImageSet:
    """Noise as an OOD set.

    Arguments:
        kind: ``gaussian`` (N(0, 1) around mid-grey for data in [-1, 1], clipped), ``uniform``, or ``sphere`` (every direction from black,
            at the length of a white image, clipped to what an image can show).
        count: Images.
        shape: ``(C, S, S)``.
        seed: Of the noise.
    """
    rng = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        x = torch.rand((count, *shape), generator=rng)
    elif kind == "gaussian":
        x = (torch.randn((count, *shape), generator=rng) / 2 + 0.5).clamp(0, 1)
    elif kind == "sphere":
        x = F.normalize(torch.randn((count, *shape), generator=rng).flatten(1), dim=1).view(
            count, *shape
        )
        x = (x * math.prod(shape) ** 0.5).clamp(0, 1)
    else:
        raise ValueError(
            f"Expected kind to be 'gaussian', 'uniform' or 'sphere', but got {kind!r}"
        )
    return ImageSet((x * 255).round().to(torch.uint8), torch.full((count,), -1))


def demo() -> tuple[ImageSet, ImageSet, dict[str, ImageSet]]:
    """Real images that ship with scikit-learn and matplotlib: nothing to download.

    ID are scikit-learn's handwritten digits, 8x8 pixels. All OOD images go through the same 8x8 pixels, so that blur does not give them away:
    patches of scikit-learn's two photographs, printed letters (those that look like no digit) in matplotlib's fonts, and Gaussian noise.

    Returns:
        ID training set, ID test set (one image in four), OOD sets by name; grey, 28x28.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = _through_8x8(torch.as_tensor(x).reshape(-1, 1, 8, 8) * (255 / 16))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    classes = tuple(map(str, range(10)))
    labels = torch.as_tensor(y).long()
    train, test = (
        ImageSet(images[rows], labels[rows], classes)
        for rows in (order[len(order) // 4 :], order[: len(order) // 4])
    )
    return (
        train,
        test,
        {
            "photographs": _photographs(450),
            "letters": _letters(),
            "noise": noise("gaussian", 450, (1, 28, 28)),
        },
    )


def _through_8x8(x: Tensor) -> Tensor:
    small = F.interpolate(x.float(), (8, 8), mode="bilinear", align_corners=False, antialias=True)
    return reshape(small.round().clamp(0, 255).to(torch.uint8), 1, 28)


def _unlabelled(x: Tensor) -> ImageSet:
    return ImageSet(x, torch.full((len(x),), -1))


def _photographs(count: int) -> ImageSet:
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [
        reshape(torch.tensor(p).permute(2, 0, 1)[None], 1, 416)[0]
        for p in load_sample_images().images
    ]
    patches = []
    for i in range(count):
        top, left = rng.integers(0, 416 - 64, 2)
        patches.append(photographs[i % 2][:, top : top + 64, left : left + 64])
    return _unlabelled(_through_8x8(torch.stack(patches)))


def _letters() -> ImageSet:
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    drawn = []
    for face in (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSerif",
        "DejaVuSerif-Italic",
        "STIXGeneral",
    ):
        font = ImageFont.truetype(os.path.join(get_data_path(), "fonts", "ttf", f"{face}.ttf"), 56)
        for letter in "ACEFHJKLMNPRTUVWXYadehkmnprtuvwxy":
            page = Image.new("L", (128, 128))
            ImageDraw.Draw(page).text((32, 24), letter, fill=255, font=font)
            box = page.getbbox()  # as the digits: the mark fills the image's height
            mark = (
                page.crop(box).resize(
                    (max(1, round(64 * (box[2] - box[0]) / (box[3] - box[1]))), 64)
                )
                if box
                else page
            )
            canvas = Image.new("L", (64, 64))
            canvas.paste(
                mark.resize((min(64, mark.width), 64)), (max(0, (64 - mark.width) // 2), 0)
            )
            drawn.append(torch.from_numpy(np.array(canvas))[None])
    return _unlabelled(_through_8x8(torch.stack(drawn)))
