"""Folders of images, one folder per class, and their splits."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tie_ext.cli.images import ImageFiles, ImageSet
from tie_ext.cli.reading import SUFFIXES, images_below, is_hidden
from tie_ext.cli.transform import Transform

HELD_OUT = "held out"
"""In the note of a test set whose images were split off the training images."""
TEST = ("test", "val", "valid", "validation")
"""Names of a folder of test images; the first that exists is taken."""


def folder_images(path: Path, split: str, seed: int, how: Transform) -> ImageSet:
    """One split of a folder.

    Arguments:
        path: The folder.
        split: ``train``, ``test`` or ``ood``.
        seed: Chooses the images held out of a folder without test images.
        how: How they are read.

    Raises:
        ValueError: If there are no such images, saying where they were looked for.
    """
    train, test = (
        next((path / name for name in names if is_split(path, name)), None)
        for names in (("train",), TEST)
    )
    if test is not None and split != "train":
        note = f"{path} has no test/: the images of {test.name}/ are the test set"
        return _images(test, how, "" if test.name == "test" else note)
    if test is not None and train is None:
        raise ValueError(
            f"Expected training images in {path / 'train'}, beside {test}, but got no such folder"
        )
    images = _images(train or path, how)
    if test is not None or split == "ood":
        return images
    paths = map(os.fsdecode, images.x)
    names = [Path(os.path.relpath(file, train or path)).as_posix() for file in paths]
    held = held_out(list(zip(names, images.y.tolist(), strict=True)), seed)
    if not held and split == "test":
        raise ValueError(
            f"Expected a class of two images or more below {path}, to hold one out, but got none"
        )
    chosen = torch.tensor([(i in held) == (split == "test") for i in range(len(images))])
    note = (
        f"{path} has no test/: {len(images) - len(held)} images to train on, {len(held)} "
        f"{HELD_OUT} (one in five of each class, seed {seed})"
    )
    return replace(images.take(chosen), note=note if split == "test" else "")


def held_out(files: Sequence[tuple[str, int]], seed: int) -> set[int]:
    """Choose the files that are held out: one in five of each class, at least one of two or more.

    Arguments:
        files: Name and label of each; the order in which a disk lists them does not matter.
        seed: Another one gives other files.

    Returns:
        Their indices.
    """
    order = [hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest() for name, _ in files]
    of_class: dict[int, list[int]] = {}
    for i in sorted(range(len(files)), key=order.__getitem__):
        of_class.setdefault(files[i][1], []).append(i)
    return {i for of in of_class.values() for i in of[: max(len(of) // 5, int(len(of) > 1))]}


def is_split(path: Path, name: str) -> bool:
    """Whether ``path/name`` is a split and not a class of that name: it holds folders, or all
    folders beside it are splits.
    """
    if not (path / name).is_dir():
        return False
    return bool(_folders(path / name)) or all(
        folder.name in ("train", *TEST) for folder in _folders(path)
    )


def _folders(path: Path) -> list[Path]:
    """The folders in a folder but hidden ones, sorted (numbers by value)."""
    found = [p for p in path.iterdir() if p.is_dir() and not is_hidden(p.name)]
    return sorted(found, key=lambda p: p.name.zfill(12) if p.name.isdigit() else p.name)


def _images(path: Path, how: Transform, note: str = "") -> ImageFiles:
    """All images below ``path/CLASS/``.

    Raises:
        ValueError: If there is no such folder, no class in it, or no image in a class.
    """
    if not path.is_dir():
        raise ValueError(
            f"Expected a folder with one folder of images per class at {path}, but got no folder"
        )
    classes, kinds = _folders(path), ", ".join(sorted(SUFFIXES))
    files, labels = [], []
    for label, folder in enumerate(classes):
        found = list(images_below(folder))
        if not found:
            raise ValueError(
                f"Expected images in {folder}, one folder per class, but got none ({kinds}); "
                "add some, or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    if not classes:
        raise ValueError(
            f"Expected images in folders, one per class, below {path}, but got none ({kinds})"
        )
    names = tuple(folder.name for folder in classes)
    return ImageFiles.of(files, how, labels, classes=names, note=note)
