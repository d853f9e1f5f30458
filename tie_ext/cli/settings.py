"""The settings of a run, which are flags of the command line too, and its images."""

from dataclasses import MISSING, dataclass, field, fields, replace

from tie_ext.cli import data
from tie_ext.cli.data import NAMES
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.cli.presets import make_transform
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
    backbone: str = setting("conv3", BACKBONE, metavar="NAME")
    mean: tuple[float, ...] = setting(
        (),
        "mean that normalisation subtracts from images in [0, 1], one or one per channel "
        "(default: the network's own, by --transform; else 0)",
        low=0,
        high=1,
    )
    std: tuple[float, ...] = setting(
        (),
        "standard deviation it divides by (default: likewise; else 1)",
        low=1e-3,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"Expected as many --mean as --std, but got {len(self.mean)} and {len(self.std)}"
            )

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
    backbone: str = setting("conv3", f"{BACKBONE} (default: conv3)", metavar="NAME")
    weights: str | None = setting(
        None,
        "start from this state_dict; its classes may be others",
        metavar="FILE",
    )
    recipe: Recipe = field(default_factory=Recipe)

    def record(self) -> dict:
        """The settings as JSON has them."""
        return {**super().record(), "recipe": self.recipe.record()}


@dataclass(frozen=True, kw_only=True)
class AttachSettings(ImageSettings):
    """The settings of ``tie-ext attach``; with images and weights they determine the result."""

    backbone: str = setting(MISSING, BACKBONE, metavar="NAME")
    weights: str = setting(MISSING, "its state_dict (see below)", metavar="FILE")
    autocast_dtype: str = setting(
        "float32",
        "arithmetic of the network; bfloat16 is faster where hardware has it",
        choices=AUTOCAST_DTYPES,
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
        metavar="METHOD",
    )
    seeds: tuple[int, ...] = setting((0, 1, 2), "one training each", low=0, high=LARGEST)


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

    def read(name: str, split: str, count: int | None = None) -> ImageSet:
        images = data.find(name, split, settings.root, transform, settings.download, seed)
        return data.kept(images.first(count, seed))

    others: dict[str, ImageSet]
    if settings.data == "demo":
        from tie_ext.cli.demo_images import clothes, strangers

        found = {"train": clothes()[0], "test": clothes()[1], **strangers()}
        others = {
            name: replace(images, x=data.transformed(images.x, transform))
            for name, images in found.items()
        }
        train, test = others.pop("train").first(settings.images, seed), others.pop("test")
    else:
        train, test = read(settings.data, "train", settings.images), read(settings.data, "test")
        noise = data.noise("gaussian", min(len(test), NOISE_IMAGES), transform.shape)
        others = {"noise": noise}
    if test.classes != train.classes:
        raise ValueError(
            "Expected the same classes in training and test images, but got "
            f"{train.classes} and {test.classes}"
        )
    ood = {name: read(name, "ood") for name in settings.ood}
    return RunImages(train, test, ood | others, transform)
