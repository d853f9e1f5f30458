"""Image lists for OpenOOD, from folders: ``python -m tie_ext.openood.lists LIST FOLDER [FOLDER ...]``.

A line of a list is an image's path below OpenOOD's ``data_dir`` (``data/images_classic/`` and its like), a space and a label.
"""

import os
import re
import sys
from pathlib import Path

from tie_ext.utils.files import write_atomically

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""How the names of images end."""


def write_list(path: str | os.PathLike, *folders: str | os.PathLike) -> int:
    """Write the list of all images in folders.

    A folder with subfolders has a class in each; label 0 is the first of their names, numbers being in the order of numbers. In a folder without,
    every image has label -1, as OpenOOD has it for OOD images.

    Arguments:
        path: The list, for instance ``data/benchmark_imglist/svhn/train_svhn.txt``; folders on the way are made.
        folders: The folders, each in one whose name begins with ``images_``, OpenOOD's ``data_dir``.

    Returns:
        The number of images.

    Raises:
        ValueError: If a folder is not there, has no image, or is in no ``images_...``, or a name has a space, at which OpenOOD ends the path.
    """
    lines = [line for folder in folders for line in _lines(Path(os.path.abspath(folder)))]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def _lines(folder: Path) -> list[str]:
    """``path label`` of each image in a folder."""
    above = next((parent for parent in folder.parents if parent.name.startswith("images_")), None)
    if not folder.is_dir() or above is None:
        raise ValueError(
            f"Expected a folder of images below OpenOOD's data_dir, as data/images_classic/svhn/train, but got {folder}"
        )
    classes = sorted((sub for sub in folder.iterdir() if sub.is_dir()), key=_rank)
    labelled = (
        [(label, image) for label, sub in enumerate(classes) for image in _images(sub)]
        if classes
        else [(-1, i) for i in _images(folder)]
    )
    if not labelled:
        raise ValueError(
            f"Expected images in {folder}, or in a subfolder for each class, but got none"
        )
    for _, image in labelled:
        if re.search(r"\s", str(image.relative_to(above))):
            raise ValueError(
                f"Expected names without spaces, at which OpenOOD ends an image's path, but got {image}; rename it"
            )
    return [f"{image.relative_to(above).as_posix()} {label}" for label, image in labelled]


def _rank(path: Path) -> tuple:
    """Order of names: numbers first, as numbers, then letters."""
    return (0, int(path.name), "") if path.name.isdecimal() else (1, 0, path.name)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def main(arguments: list[str] | None = None) -> None:
    """Write one list.

    Arguments:
        arguments: The list and its folders; None for those of this process.

    Raises:
        SystemExit: If it cannot be written, saying why.
    """
    path, *folders = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not folders:
        raise SystemExit(
            "Expected a list and folders, as in `python -m tie_ext.openood.lists LIST FOLDER [FOLDER ...]`"
        )
    try:
        count = write_list(path, *folders)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write(f"{count} images in {path}\n")


if __name__ == "__main__":
    main()
