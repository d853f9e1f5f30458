"""The transforms that a user can ask for by name."""

import math
from typing import NamedTuple

from tie_ext.cli.transform import Transform
from tie_ext.utils.checks import check_number

TRANSFORMS = ("torchvision", "timm", "crop", "squash")
"""Kinds of transform; :func:`make_transform` says what each does."""
RATIO = 256 / 224
"""Shorter side of an image over the side of its crop, as most people resize and crop."""


class _Preset(NamedTuple):
    """How a network's images are meant to be read."""

    size: int
    ratio: float = RATIO
    """Side that an image is resized to over that of its crop."""
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    squash: bool = False
    """Whether proportions are lost."""


def make_transform(
    name: str,
    backbone: str,
    channels: int,
    size: int | None,
    own_size: int,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    exif_transpose: bool = False,
) -> Transform:
    """The transform that a user asks for.

    Arguments:
        name: ``torchvision``, the preset of the weights of a torchvision network, its default ones
            or those after a colon (``torchvision:IMAGENET1K_V1``); ``timm``, the data config of a
            timm network, or of that after a colon; ``crop``, the shorter side resized to
            :data:`RATIO` times the size, or the number after a colon, and the middle cropped, with
            a torchvision or timm network's own interpolation, size, mean and deviation;
            ``squash``, resized whatever the proportions.
        backbone: The network's name, as :mod:`tie_ext.cli.registry` takes it.
        channels: C, 1 or 3.
        size: Side of the result in pixels; None for the network's own, or ``own_size``.
        own_size: Side where nothing else says one.
        mean: Mean that replaces the network's own.
        std: Deviation that replaces it.
        exif_transpose: Turn photographs as their EXIF orientation says.

    Raises:
        ValueError: If there is no such transform for this network.
        ImportError: If timm is asked for, and is not installed.
    """
    (kind, colon, which), (registry, _, arch) = name.partition(":"), backbone.partition(":")
    if kind not in TRANSFORMS or (colon and (kind == "squash" or not which)):
        raise ValueError(
            f"Expected --transform to be one of {', '.join(TRANSFORMS)}, but got {name!r}"
        )
    if kind in PRESETS and kind != registry:
        raise ValueError(
            f"Expected --backbone {kind}:NAME beside --transform {kind}, but got {backbone}"
        )
    preset = _Preset(own_size, 1, squash=True)
    if kind != "squash":
        preset = _Preset(own_size)
        if arch:
            preset = PRESETS[registry](arch, which if kind == registry else "")
    if kind == "crop":
        preset = preset._replace(ratio=_ratio(which) if which else RATIO, squash=False)
    if not mean and channels == 3:
        mean, std = preset.mean, preset.std
    side = size or preset.size
    resize = math.floor(side * preset.ratio + 1e-6)
    return Transform(
        name,
        (channels, side, side),
        (resize, resize) if preset.squash else resize,
        preset.interpolation,
        mean,
        std,
        exif_transpose,
    )


def _ratio(text: str) -> float:
    ratio = float(text) if text.replace(".", "", 1).isdigit() else math.nan
    check_number("RATIO in --transform crop:RATIO", ratio, 1, 4)
    return ratio


def _torchvision(arch: str, weights: str) -> _Preset:
    """The preset of torchvision's weights."""
    from torchvision.models import get_model_weights

    known = get_model_weights(arch)
    if weights and weights not in known.__members__:
        raise ValueError(
            f"Expected weights of {arch}, one of {', '.join(known.__members__)}, but got "
            f"{weights!r}"
        )
    preset = (known[weights] if weights else known.DEFAULT).transforms()
    (size,), (resize,) = preset.crop_size, preset.resize_size
    mean, std = tuple(preset.mean), tuple(preset.std)
    return _Preset(size, resize / size, preset.interpolation.value, mean, std)


def _timm(arch: str, pretrained: str) -> _Preset:
    """The data config of a timm network."""
    import timm
    from timm.data import resolve_data_config

    config = timm.get_pretrained_cfg(pretrained or arch)
    found = resolve_data_config({}, pretrained_cfg=config.to_dict() if config else {})
    if found["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"Expected a data config of timm with crop_mode center or squash, but got that of "
            f"{pretrained or arch} with {found['crop_mode']}; read the images in Python"
        )
    mean, std = tuple(found["mean"]), tuple(found["std"])
    size, ratio = found["input_size"][-1], 1 / found["crop_pct"]
    return _Preset(size, ratio, found["interpolation"], mean, std, found["crop_mode"] == "squash")


PRESETS = {"torchvision": _torchvision, "timm": _timm}
"""Registries whose networks say how their images are read."""
