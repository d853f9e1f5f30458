"""The settings of a run, which are flags of the command line too, and its images."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from textwrap import shorten
from typing import Any

from tie_ext.cli import data
from tie_ext.cli.data import IN_MEMORY, NAMES
from tie_ext.cli.images import ImageFiles, Images, RunImages
from tie_ext.cli.presets import check_kind, make_transform
from tie_ext.cli.reading import Survey, left_out, repeated
from tie_ext.cli.transform import Transform
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.classifier import AUTOCAST_DTYPES
from tie_ext.training.recipe import Recipe
from tie_ext.utils.settings import Settings, setting

LARGEST_SIDE = 2048
"""In pixels."""
LARGEST = 2**31 - 1
"""Of seeds and of numbers of images."""
BACKBONE = f"{', '.join(BACKBONES)}, torchvision:NAME or timm:NAME"
NOISE_IMAGES = 10_000
"""Most noise images to score."""
NETWORK: Any = {"group": "network", "metavar": "NAME"}
CHANNELS: Any = {"group": "network", "metavar": "X"}


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """The images of a run, and the network that reads them.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    data: str = setting(MISSING, f"{', '.join(NAMES)}, folder:PATH (see below) or demo")
    root: str = setting("data", "where the named sets are", metavar="FOLDER")
    download: bool = setting(False, "let torchvision download what is missing")
    ood: tuple[str, ...] = setting((), "OOD sets to score at the end, besides noise")
    val_ood: tuple[str, ...] = setting(
        (), "OOD sets to choose settings by: their images in val/ are scored too"
    )
    images: int | None = setting(
        None, "take a random subset of N training images", low=1, high=LARGEST
    )
    size: int | None = setting(
        None,
        "size of the images, N x N pixels (default: the network's own, by --transform; else the "
        "set's, 64 for folders)",
        low=1,
        high=LARGEST_SIDE,
    )
    transform: str | None = setting(
        None,
        "how an image becomes N x N pixels: torchvision or timm (as the network's weights have "
        "it), crop (resized, the middle cropped) or squash (default: crop for folders and "
        "networks of torchvision and timm, else squash)",
        metavar="HOW",
    )
    exif_transpose: bool = setting(
        False, "turn photographs as EXIF says, which torchvision's loaders do not"
    )
    batch_size: int = setting(128, "ID images per batch", low=1, high=10**6)
    in_memory: str = setting(
        "auto", "keep images of folders in memory; auto: up to 256 MB", choices=IN_MEMORY
    )
    backbone: str = setting("conv3", BACKBONE, **NETWORK)
    mean: tuple[float, ...] = setting(
        (),
        "mean that normalisation subtracts from images in [0, 1], one or one per channel "
        "(default: the network's own, by --transform; else 0)",
        low=0,
        high=1,
        **CHANNELS,
    )
    std: tuple[float, ...] = setting(
        (),
        "standard deviation it divides by (default: likewise; else 1)",
        low=1e-3,
        high=1,
        **CHANNELS,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"Expected as many --mean as --std, but got {len(self.mean)} and {len(self.std)}"
            )
        check_kind(self._transform(), self.backbone)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def image_transform(self, channels: int | None = None) -> Transform:
        """How the images of the run are read.

        Arguments:
            channels: C of the network; None for the set's own.

        Raises:
            ValueError: If there is no such transform for the network, or mean and std are of
                another number of channels.
            ImportError: If timm is asked for, and is not installed.
        """
        own = data.own_shape(self.data)
        channels = channels or own[0]
        if len(self.mean) not in (0, 1, channels):
            raise ValueError(
                f"Expected --mean and --std of 1 or {channels} numbers, as the network takes "
                f"{channels} channels, but got {len(self.mean)}"
            )
        return make_transform(
            self._transform(),
            self.backbone,
            channels,
            self.size,
            own[1],
            self.mean,
            self.std,
            self.exif_transpose,
        )

    def _transform(self) -> str:
        named = self.data.partition(":")[0] in (*NAMES, "demo")
        return self.transform or ("crop" if ":" in self.backbone and not named else "squash")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ImageSettings):
    """The settings of ``tie-ext train``; together with the images they determine the result."""

    shift: int | None = setting(
        None,
        "shift training images at random by up to N pixels (default: size / 8)",
        low=0,
        high=LARGEST_SIDE,
    )
    # It learns most in a minute, colour images too.
    backbone: str = setting("conv3", f"{BACKBONE} (default: conv3)", **NETWORK)
    weights: str | None = setting(
        None,
        "start from this state_dict; its classes may be others",
        group="network",
        metavar="FILE",
    )
    recipe: Recipe = field(default_factory=Recipe)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {**super().record(), "recipe": self.recipe.record()}


@dataclass(frozen=True, kw_only=True)
class AttachSettings(ImageSettings):
    """The settings of ``tie-ext attach``; with images and weights they determine the result."""

    backbone: str = setting(MISSING, BACKBONE, **NETWORK)
    weights: str = setting(MISSING, "its state_dict (see below)", group="network", metavar="FILE")
    autocast_dtype: str = setting(
        "float32",
        "arithmetic of the network; bfloat16 is faster where hardware has it",
        choices=AUTOCAST_DTYPES,
        group="network",
    )
    seed: int = setting(
        0, "seed of the subset, the held-out images and the garbage class", low=0, high=LARGEST
    )


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings(Settings):
    """What ``tie-ext reproduce`` runs. The defaults are the paper's protocol."""

    data: tuple[str, ...] = setting(NAMES, "ID sets, or some classes of one: mnist:0-4")
    root: str = setting("data", "where the data sets are", metavar="FOLDER")
    download: bool = setting(False, "let torchvision download what is missing")
    images: int | None = setting(
        None,
        "train on a random subset of N images, and score a tenth as many of each OOD set",
        low=1,
        high=LARGEST,
    )
    methods: tuple[str, ...] = setting(
        ("tie", "predecessor", "multiscale", "white", "plain"),
        "tie, layers (as train has it), predecessor, multiscale, white, vernekar, ascood, attach, "
        "plain, or synthesizers by name",
        group="method",
        metavar="METHOD",
    )
    seeds: tuple[int, ...] = setting(
        (0, 1, 2), "one training each", low=0, high=LARGEST, group="method"
    )


def load_images(settings: ImageSettings, seed: int, transform: Transform) -> RunImages:
    """The images of a run.

    Arguments:
        settings: The settings of the run.
        seed: Seed of the subset and of the held-out images.
        transform: How they are read.

    Raises:
        ValueError: If a set is missing or unknown, a file is no image, or training and test
            classes differ.
    """
    try:
        images = _load(settings, seed, transform)
    except OSError as error:
        raise ValueError(
            f"Expected to read the images of {shorten(settings.data, 80)}, but got: "
            f"{error.strerror or error}"
        ) from error
    if images.test.classes != images.train.classes:
        raise ValueError(
            "Expected the same classes in training and test images, but got "
            f"{images.train.classes} and {images.test.classes}"
        )
    return images


def _load(settings: ImageSettings, seed: int, transform: Transform) -> RunImages:
    files: list[ImageFiles] = []

    def read(name: str, split: str, count: int | None = None) -> Images:
        root, download, shape = settings.root, settings.download, transform.shape
        images = data.load(name, split, root, shape, download, seed, "no", transform)
        images = images.first(count, seed)
        if isinstance(images, ImageFiles):
            files.append(images)
        return images

    def kept(images: Images) -> Images:
        return data.keep(images, settings.in_memory)

    train: Images
    test: Images
    others: dict[str, Images]
    if settings.data == "demo":
        from tie_ext.cli.demo_images import clothes, strangers

        own, found = clothes()[:2], strangers()
        train, test, *shaped = (
            replace(images, x=data.transformed(images.x, transform))
            for images in (*own, *found.values())
        )
        train, others = train.first(settings.images, seed), dict(zip(found, shaped, strict=True))
    else:
        train, test = read(settings.data, "train", settings.images), read(settings.data, "test")
        noise = data.noise("gaussian", min(len(test), NOISE_IMAGES), transform.shape)
        others = {"noise": noise}
    validation = {f"val:{name}": read(name, "val") for name in settings.val_ood}
    ood = {name: read(name, "ood") for name in settings.ood}
    notes = survey(files, transform)
    sets = {name: kept(images) for name, images in (validation | ood | others).items()}
    same = 0.0
    if isinstance(train, ImageFiles) and isinstance(test, ImageFiles):
        same = repeated(test.files, train.files)  # type: ignore[arg-type]
    return RunImages(kept(train), kept(test), sets, transform, same, notes)


def survey(sets: Sequence[ImageFiles], transform: Transform) -> tuple[str, ...]:
    """What a user has to know of how images are read, from the headers of their files.

    Raises:
        ValueError: If a file has none that Pillow can read.
    """
    found = Survey()
    for images in sets:
        for file in images.files:
            found.add(os.fsdecode(file), transform.shape[1:])
    other = left_out({file for images in sets for file in images.left_out})
    return tuple(filter(None, (*transform.notes(found), other)))
