"""What a run is asked to do, and the images of it."""

from dataclasses import dataclass, field, fields, replace
from textwrap import shorten

from tie_ext.cli import data
from tie_ext.cli.data import Images
from tie_ext.training.recipe import Recipe
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.checks import check_number

LARGEST = 2048
"""Pixels of a side."""


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The images of a run, and the network they are for.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    data: str
    """A named set or ``folder:PATH``; ``demo`` for the built-in digits."""
    root: str = "data"
    """Where the named sets lie."""
    backbone: str = "conv3"
    """The network by name, of :func:`tie_ext.cli.registry.build`."""
    images: int | None = None
    """Take a random subset of this many training images; None for all."""
    size: int | None = None
    """Image size; None for the set's own."""
    batch_size: int = 128
    """ID images a batch."""
    ood: tuple[str, ...] = ()
    """Sets to score at the end, beside noise."""
    val_ood: tuple[str, ...] = ()
    """Sets whose validation images are scored too, as ``val:NAME``: settings may be chosen by them, and by none of the others."""
    download: bool = False
    """Let torchvision download what is missing."""
    in_memory: str = "auto"
    """Where the images of folders are kept while they are used, of :data:`tie_ext.cli.data.IN_MEMORY`."""
    mean: tuple[float, ...] = ()
    """What is taken off images in [0, 1], a number or one a channel, as the network was trained; none where it takes them as they are."""
    std: tuple[float, ...] = ()
    """What they are divided by then."""

    def __post_init__(self) -> None:
        for name, kind in (("data", str), ("root", str), ("backbone", str), ("download", bool)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"Expected {name} to be a {kind.__name__}, but got {getattr(self, name)!r}"
                )
        for name in ("ood", "val_ood"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(each, str) for each in value):
                raise ValueError(f"Expected {name} to be names of image sets, but got {value!r}")
        if self.in_memory not in data.IN_MEMORY:
            raise ValueError(
                f"Expected in_memory to be one of {', '.join(data.IN_MEMORY)}, but got {self.in_memory!r}"
            )
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"Expected as many --mean as --std, but got {len(self.mean)} and {len(self.std)}"
            )
        for name, values, low in (("--mean", self.mean, 0), ("--std", self.std, 1e-3)):
            for value in values:
                check_number(name, value, low, 1)
        for name, low, high in (
            ("images", 1, 10**9),
            ("size", 1, LARGEST),
            ("batch_size", 1, 10**6),
        ):
            if getattr(self, name) is not None or name == "batch_size":
                check_number(name, getattr(self, name), low, high, integer=True)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def range(self, channels: int) -> Bounded:
        """What black and white are to the network.

        Raises:
            ValueError: If mean and std are of another number of channels.
        """
        if len(self.mean) not in (0, 1, channels):
            raise ValueError(
                f"Expected --mean and --std of 1 or {channels} numbers, as the network takes {channels} channels, but got {len(self.mean)}"
            )
        pairs = list(zip(self.mean, self.std, strict=True)) or [(0.0, 1.0)]
        return Bounded(
            tuple(0 - mean / std for mean, std in pairs),
            tuple((1 - mean) / std for mean, std in pairs),
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings(ImageSettings):
    """What a run is asked to do; together with the images it determines the result.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    weights: str | None = None
    """File of the weights that the network begins with; None for random ones."""
    shift: int | None = None
    """Most pixels a training image is moved by; None for an eighth of its size."""
    recipe: Recipe = field(default_factory=Recipe)
    """The method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and not isinstance(self.weights, str):
            raise ValueError(f"Expected weights to be a file, but got {self.weights!r}")
        if self.shift is not None:
            check_number("shift", self.shift, 0, LARGEST, integer=True)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {**super().record(), "recipe": self.recipe.record()}


def load_images(
    settings: ImageSettings, seed: int, channels: int | None = None
) -> tuple[Images, Images, dict[str, Images]]:
    """ID training set, ID test set and OOD sets of a run.

    Arguments:
        settings: Which.
        seed: Of the subset, and of what is held out.
        channels: C; None for the set's own.

    Raises:
        ValueError: If a set is missing or unknown.
    """
    own = data.own_shape(settings.data)
    C, S = channels or own[0], settings.size or own[1]
    try:
        return _images(settings, seed, (C, S, S))
    except OSError as error:
        raise ValueError(
            f"Expected to read the images of {shorten(settings.data, 80)}, but got: {error.strerror or error}"
        ) from error


def _images(
    settings: ImageSettings, seed: int, shape: tuple[int, int, int]
) -> tuple[Images, Images, dict[str, Images]]:

    def read(name: str, split: str, most: int | None = None) -> Images:
        images = data.load(
            name, split, settings.root, shape, settings.download, seed, in_memory="no"
        )
        return data.kept(images.first(most, seed), settings.in_memory)

    train: Images
    test: Images
    others: dict[str, Images]
    if settings.data == "demo":
        whole, test, found = data.demo()
        train, test, *shaped = (
            replace(images, x=data.reshape(images.x, *shape[:2]))
            for images in (whole, test, *found.values())
        )
        train, others = train.first(settings.images, seed), dict(zip(found, shaped, strict=True))
    else:
        train, test = read(settings.data, "train", settings.images), read(settings.data, "test")
        others = {"noise": data.noise("gaussian", min(len(test), 10_000), shape)}
    if test.classes != train.classes:
        raise ValueError(
            f"Expected the same classes in training and test images, but got {train.classes} and {test.classes}"
        )
    validation = {f"val:{name}": read(name, "val") for name in settings.val_ood}
    ood = {name: read(name, "ood") for name in settings.ood}
    return train, test, validation | ood | others
