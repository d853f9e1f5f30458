"""Folders of images, one folder per class, and their splits."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tie_ext.cli.images import ImageFiles
from tie_ext.cli.reading import SUFFIXES, images_below, is_hidden, is_readable, left_out
from tie_ext.cli.transform import Transform

HELD_OUT = "held out"
"""In the note of a test set whose images were split off the training images."""
TEST = ("test", "val", "valid", "validation")
"""Names of a folder of test images; the first that exists is taken."""


class Listed(NamedTuple):
    """What is below a folder of one folder per class."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of their labels."""
    files: list[tuple[str, int]]
    """Path and label of each image, sorted."""
    unread: tuple[str, ...]
    """Image files that Pillow does not read here."""

    def images(self, how: Transform, note: str = "") -> ImageFiles:
        """Its images, to be read by a transform; ``note`` says how they were chosen."""
        paths, labels = [file for file, _ in self.files], [label for _, label in self.files]
        about = {"classes": self.classes, "note": note, "left_out": self.unread}
        return ImageFiles.of(paths, how, labels, **about)


def folder_images(
    places: Sequence[Path], path: Path | None, split: str, seed: int, how: Transform
) -> ImageFiles:
    """One split of a folder ``path``; validation images are those of the first place with any.

    Arguments:
        places: Folders that may have a split.
        path: The one that is taken; None for the first.
        split: ``train``, ``test``, ``ood`` or ``val``.
        seed: Chooses the images held out of a folder without test images.
        how: How they are read.

    Raises:
        ValueError: If there are no such images, saying where they were looked for.
    """
    if split == "val":
        return _list(_validation(places)).images(how).unlabelled()
    path = path or places[0]  # load() has found one
    train, test = (
        next((path / name for name in names if is_split(path, name)), None)
        for names in (("train",), TEST)
    )
    if test is not None and split != "train":
        listed = _list(test)
        note = f"{path} has no test/: the {len(listed.files)} images of {test.name}/ are the test"
        return listed.images(how, "" if test.name == "test" else f"{note} set")
    if test is not None and train is None:
        raise ValueError(
            f"Expected training images in {path / 'train'}, beside {test}, but got no such folder"
        )
    source = train or path
    listed = _list(source)
    if test is not None or split == "ood":
        return listed.images(how)
    return _held_out(path, source, listed, split, seed, how)


def _held_out(
    path: Path, source: Path, listed: Listed, split: str, seed: int, how: Transform
) -> ImageFiles:
    """The training images of a folder without test images, or those held out of them."""
    names = [(Path(os.path.relpath(file, source)).as_posix(), y) for file, y in listed.files]
    held = held_out(names, seed)
    part = [file for i, file in enumerate(listed.files) if (i in held) == (split == "test")]
    if not part:
        raise ValueError(
            f"Expected a class of two images or more below {source}, to hold one out, but got one "
            "image of each"
        )
    note = _split_note(path, source, listed, part, seed) if split == "test" else ""
    return listed._replace(files=part).images(how, note)


def _validation(places: Sequence[Path]) -> Path:
    for place in places:
        for name in TEST[1:]:
            if is_split(place, name):
                return place / name
    looked = ", ".join(str(place / "val") for place in places)
    raise ValueError(f"Expected validation images in a folder, one of {looked}, but got none")


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


def _split_note(
    path: Path, source: Path, listed: Listed, held: Sequence[tuple[str, int]], seed: int
) -> str:
    """How many images were held out, and of which classes there are none."""
    lacks = "no train/ and test/" if source == path else "train/ and no test/"
    note = (
        f"{path} has {lacks}: {len(listed.files) - len(held)} images to train on, {len(held)} "
        f"{HELD_OUT} (one in five of each class, seed {seed})"
    )
    tested = {label for _, label in held}
    none = [name for label, name in enumerate(listed.classes) if label not in tested]
    names = ", ".join(none[:5]) + (f" and {len(none) - 5} more" if len(none) > 5 else "")
    return f"{note}; no test image of {names}, of which there is one image" if none else note


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


def _list(path: Path) -> Listed:
    """All images below ``path/CLASS/``.

    Raises:
        ValueError: If there is no such folder, no class in it, or no image in a class.
    """
    if not path.is_dir():
        raise ValueError(
            f"Expected a folder with one folder of images per class at {path}, but got no folder"
        )
    classes, kinds = _folders(path), ", ".join(sorted(SUFFIXES))
    files: list[tuple[str, int]] = []
    unread: list[str] = []
    for label, folder in enumerate(classes):
        there = list(images_below(folder))
        found = [(file, label) for file in there if is_readable(file)]
        if not found:
            note = f" ({left_out(there)})" if there else ""
            raise ValueError(
                f"Expected images in {folder}, one folder per class, but got none ({kinds}); "
                f"add some, or remove the folder{note}"
            )
        files += found
        unread += [file for file in there if not is_readable(file)]
    if not classes:
        raise ValueError(
            f"Expected images in folders, one per class, below {path}, but got none ({kinds})"
        )
    return Listed(tuple(folder.name for folder in classes), files, tuple(unread))
