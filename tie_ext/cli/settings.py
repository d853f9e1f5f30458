"""The settings of a run, which are flags of the command line too, and its images."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from textwrap import shorten
from typing import Any

from tie_ext.cli import data
from tie_ext.cli.data import IN_MEMORY, NAMES
from tie_ext.cli.images import Images, RunImages
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import AUTOCAST_DTYPES
from tie_ext.training.recipe import Recipe
from tie_ext.utils.checks import check_number

LARGEST_SIDE = 2048
"""In pixels."""
BACKBONE = f"{', '.join(BACKBONES)}, torchvision:NAME or timm:NAME"
NOISE_IMAGES = 10_000
"""Most noise images to score."""


def option(
    default: Any,
    help: str,
    metavar: str = "SET",
    kind: Callable = str,
    bounds: tuple[float, float] | None = None,
    *,
    several: str | None = None,
    choices: tuple[str, ...] | None = None,
    group: str = "data",
) -> Any:
    """A setting that is also a flag.

    Arguments:
        default: Its value where nothing is given; ``MISSING`` where it must be given.
        help: Its meaning, for the help of the command line.
        metavar: What stands for the value there.
        kind: ``str``, ``int``, ``float`` or ``bool``; of each entry where there are several.
        bounds: Smallest and largest number allowed.
        several: ``*`` or ``+`` where it is a tuple.
        choices: The words allowed.
        group: The part of the help it belongs to.
    """
    about = {"help": help, "metavar": metavar, "kind": kind, "bounds": bounds}
    about |= {"several": several, "choices": choices, "group": group}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The images of a run, and the network that reads them.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    data: str = option(MISSING, f"{', '.join(NAMES)}, folder:PATH (see below) or demo")
    root: str = option("data", "where the named sets are (default: data)", "FOLDER")
    download: bool = option(False, "let torchvision download what is missing", kind=bool)
    ood: tuple[str, ...] = option((), "OOD sets to score at the end, besides noise", several="*")
    val_ood: tuple[str, ...] = option(
        (), "OOD sets to choose settings by: their images in val/ are scored too", several="*"
    )
    images: int | None = option(
        None, "take a random subset of N training images", "N", int, (1, 2**31 - 1)
    )
    size: int | None = option(
        None,
        "resize images to N x N pixels (default: the set's own size, 64 for folders)",
        "N",
        int,
        (1, LARGEST_SIDE),
    )
    batch_size: int = option(128, "ID images per batch (default: 128)", "N", int, (1, 10**6))
    in_memory: str = option(
        "auto",
        "keep images of folders in memory; auto: up to 256 MB (default: auto)",
        choices=IN_MEMORY,
    )
    backbone: str = option("conv3", BACKBONE, "NAME", group="network")
    mean: tuple[float, ...] = option(
        (),
        "mean that normalisation subtracts from images in [0, 1], one or one per channel",
        "X",
        float,
        (0, 1),
        several="+",
        group="network",
    )
    std: tuple[float, ...] = option(
        (),
        "standard deviation it divides by",
        "X",
        float,
        (1e-3, 1),
        several="+",
        group="network",
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.metadata:
                _check(f"--{f.name.replace('_', '-')}", getattr(self, f.name), f)
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"Expected as many --mean as --std, but got {len(self.mean)} and {len(self.std)}"
            )

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def bounds(self, channels: int) -> tuple[list[float], list[float]]:
        """The values of black and white after normalisation, one for each of mean and std.

        Raises:
            ValueError: If mean and std are of another number of channels.
        """
        if len(self.mean) not in (0, 1, channels):
            raise ValueError(
                f"Expected --mean and --std of 1 or {channels} numbers, as the network takes "
                f"{channels} channels, but got {len(self.mean)}"
            )
        pairs = list(zip(self.mean, self.std, strict=True)) or [(0.0, 1.0)]
        low, high = ([(value - mean) / std for mean, std in pairs] for value in (0, 1))
        return low, high


def _check(name: str, value: Any, f: Any) -> None:
    """Refuse a value of the wrong type or out of range."""
    about = f.metadata
    if value is None and f.default is None:
        return
    if about["choices"] and value not in about["choices"]:
        raise ValueError(
            f"Expected {name} to be one of {', '.join(about['choices'])}, but got {value!r}"
        )
    if about["several"] and not isinstance(value, tuple):
        raise ValueError(f"Expected {name} to be a list, but got {value!r}")
    for entry in value if about["several"] else (value,):
        if about["bounds"]:
            check_number(name, entry, *about["bounds"], integer=about["kind"] is int)
        elif not isinstance(entry, about["kind"]):
            raise ValueError(
                f"Expected {name} to be of type {about['kind'].__name__}, but got {entry!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(ImageSettings):
    """The settings of ``tie-ext train``; together with the images they determine the result."""

    shift: int | None = option(
        None,
        "shift training images at random by up to N pixels (default: size / 8)",
        "N",
        int,
        (0, LARGEST_SIDE),
    )
    backbone: str = option(
        "conv3",
        f"{BACKBONE} (default: conv3, which learns most in a minute on a CPU)",
        "NAME",
        group="network",
    )
    weights: str | None = option(
        None, "start from this state_dict; its classes may be others", "FILE", group="network"
    )
    recipe: Recipe = field(default_factory=Recipe)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {**super().record(), "recipe": self.recipe.record()}


@dataclass(frozen=True, kw_only=True)
class AttachSettings(ImageSettings):
    """The settings of ``tie-ext attach``; with images and weights they determine the result."""

    backbone: str = option(MISSING, BACKBONE, "NAME", group="network")
    weights: str = option(MISSING, "its state_dict (see below)", "FILE", group="network")
    autocast_dtype: str = option(
        "float32",
        "arithmetic of the network; bfloat16 is faster where hardware has it (default: float32)",
        choices=AUTOCAST_DTYPES,
        group="network",
    )
    seed: int = option(
        0,
        "seed of the subset, the held-out images and the garbage class (default: 0)",
        "N",
        int,
        (0, 2**31 - 1),
    )


def load_images(settings: ImageSettings, seed: int, channels: int | None = None) -> RunImages:
    """The images of a run.

    Arguments:
        settings: The settings of the run.
        seed: Seed of the subset and of the held-out images.
        channels: C; None for the set's own.

    Raises:
        ValueError: If a set is missing or unknown, or training and test classes differ.
    """
    own = data.own_shape(settings.data)
    C, S = channels or own[0], settings.size or own[1]
    try:
        images = _load(settings, seed, (C, S, S))
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


def _load(settings: ImageSettings, seed: int, shape: tuple[int, int, int]) -> RunImages:
    def read(name: str, split: str, count: int | None = None) -> Images:
        root, download = settings.root, settings.download
        images = data.load(name, split, root, shape, download, seed, in_memory="no")
        return data.keep(images.first(count, seed), settings.in_memory)

    train: Images
    test: Images
    others: dict[str, Images]
    if settings.data == "demo":
        from tie_ext.cli.demo_images import demo

        whole, test, found = demo()
        train, test, *shaped = (
            replace(images, x=data.reshape(images.x, *shape[:2]))
            for images in (whole, test, *found.values())
        )
        train, others = train.first(settings.images, seed), dict(zip(found, shaped, strict=True))
    else:
        train, test = read(settings.data, "train", settings.images), read(settings.data, "test")
        others = {"noise": data.noise("gaussian", min(len(test), NOISE_IMAGES), shape)}
    validation = {f"val:{name}": read(name, "val") for name in settings.val_ood}
    ood = {name: read(name, "ood") for name in settings.ood}
    return RunImages(train, test, validation | ood | others)
