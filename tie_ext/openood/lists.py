"""Image lists for OpenOOD, from folders.

``python -m tie_ext.openood.lists LIST FOLDER [FOLDER ...]`` writes one. A line of a list is an
image's path below OpenOOD's ``data_dir`` (such as ``data/images_classic/``), a space and a label.
"""

import os
import re
import sys
from pathlib import Path

from tie_ext.utils.files import write_atomically

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""File name extensions of images."""


def write_list(path: str | os.PathLike, *folders: str | os.PathLike) -> int:
    """Write the list of all images in folders.

    A folder with subfolders has one class in each; label 0 is the first of their names, and names
    that are numbers are sorted as numbers. In a folder without subfolders every image has label
    -1, as OOD images have in OpenOOD.

    Arguments:
        path: The list, such as ``data/benchmark_imglist/svhn/train_svhn.txt``; its folder is made.
        folders: The folders, each below one whose name begins with ``images_``, the ``data_dir``.

    Returns:
        The number of images.

    Raises:
        ValueError: If a folder does not exist, has no image or is not below ``images_...``, or a
            path has a space, where OpenOOD ends it.
    """
    lines = [line for folder in folders for line in _lines(Path(os.path.abspath(folder)))]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def _lines(folder: Path) -> list[str]:
    """``path label`` of each image in a folder."""
    data_dir = next((p for p in folder.parents if p.name.startswith("images_")), None)
    if not folder.is_dir() or data_dir is None:
        raise ValueError(
            "Expected a folder of images below OpenOOD's data_dir, as "
            f"data/images_classic/svhn/train, but got {folder}"
        )
    classes = sorted((sub for sub in folder.iterdir() if sub.is_dir()), key=_rank)
    groups = enumerate(classes) if classes else [(-1, folder)]
    labelled = [(label, image) for label, group in groups for image in _images(group)]
    if not labelled:
        raise ValueError(
            f"Expected images in {folder}, or in a subfolder for each class, but got none"
        )
    for _, image in labelled:
        if re.search(r"\s", str(image.relative_to(data_dir))):
            raise ValueError(
                f"Expected paths without spaces, where OpenOOD ends a path, but got {image}; "
                "rename it"
            )
    return [f"{image.relative_to(data_dir).as_posix()} {label}" for label, image in labelled]


def _rank(path: Path) -> tuple:
    """Sort key of names: numbers first, by value, then all others."""
    return (0, int(path.name), "") if path.name.isdecimal() else (1, 0, path.name)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)


def main(arguments: list[str] | None = None) -> None:
    """Write one list.

    Arguments:
        arguments: The list and its folders; None for those of this process.

    Raises:
        SystemExit: If it cannot be written, with the reason.
    """
    path, *folders = (sys.argv[1:] if arguments is None else arguments) or [""]
    if not folders:
        raise SystemExit(
            "Expected a list and folders, as in "
            "`python -m tie_ext.openood.lists LIST FOLDER [FOLDER ...]`"
        )
    try:
        count = write_list(path, *folders)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write(f"{count} images in {path}\n")


if __name__ == "__main__":
    main()
