"""From an image file to an image of a network, as its own pipeline does it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tie_ext.cli.reading import eight_bits, register_heif
from tie_ext.utils.files import read_json, reading, write_json

if TYPE_CHECKING:
    from PIL import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
"""Pillow's, by the names that torchvision and timm give them."""


@dataclass(frozen=True)
class Transform:
    """Resizes an image and crops its middle, by torchvision; then normalises it.

    Arguments:
        name: What the user asked for, as :func:`tie_ext.cli.presets.make_transform` takes it.
        shape: ``(C, H, W)`` of the result, C 1 (luma of colour images) or 3 (grey ones repeated).
        resize: Pixels of the shorter side before the crop; or ``(height, width)``, whatever the
            proportions of the image.
        interpolation: One of :data:`INTERPOLATIONS`.
        mean: What is subtracted from values in [0, 1]: no number, one, or one per channel.
        std: What they are divided by then.
        exif_transpose: Turn photographs as their EXIF orientation says; torchvision's loaders
            do not.
    """

    name: str
    shape: tuple[int, int, int]
    resize: int | tuple[int, int]
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    exif_transpose: bool = False

    @classmethod
    def squash(cls, shape: Sequence[int], **more: Any) -> "Transform":
        """Every image resized to ``(C, H, W)``, whatever its proportions."""
        C, H, W = shape
        return cls("squash", (C, H, W), (H, W), **more)

    @property
    def bounds(self) -> tuple[list[float], list[float]]:
        """The values of black and white after normalisation, one for each of mean and std."""
        pairs = list(zip(self.mean, self.std, strict=True)) or [(0.0, 1.0)]
        low, high = ([(value - mean) / std for mean, std in pairs] for value in (0, 1))
        return low, high

    def __call__(self, image: "Image.Image") -> Tensor:
        """A Pillow image as a network takes it: float ``(C, H, W)``, normalised."""
        low, high = (torch.tensor(value).view(-1, 1, 1) for value in self.bounds)
        return low + (high - low) * (self.pixels(image).float() / 255)

    def pixels(self, image: "Image.Image") -> Tensor:
        """A Pillow image, uint8 ``(C, H, W)``, not normalised.

        Raises:
            ValueError: If its pixels have neither 8 nor 16 bits.
        """
        from PIL import ImageOps

        C, H, W = self.shape
        if self.exif_transpose:
            image = ImageOps.exif_transpose(image)
        image = eight_bits(image).convert("L" if C == 1 else "RGB")
        return torch.from_numpy(np.array(self._resized(image))).view(H, W, C).permute(2, 0, 1)

    def read(self, path: str) -> Tensor:
        """An image file, uint8 ``(C, H, W)``, not normalised; the first image of an animation, or
        of a file of several pages.

        Raises:
            ValueError: If Pillow cannot read it, or its pixels have neither 8 nor 16 bits.
        """
        from PIL import Image

        register_heif()
        try:
            with Image.open(path) as image:
                return self.pixels(image)
        except Exception as error:  # of many types, by the byte that Pillow fails at
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise ValueError(f"Expected an image file at {path}, but got: {reason}") from error

    def _resized(self, image: "Image.Image") -> "Image.Image":
        from PIL import Image

        H, W = self.shape[1:]
        if self.resize == (H, W):
            how = Image.Resampling[self.interpolation.upper()]
            return image if image.size == (W, H) else image.resize((W, H), how)
        from torchvision import transforms as T  # which takes a second to import

        side = self.resize if isinstance(self.resize, int) else list(self.resize)
        image = T.Resize(side, T.InterpolationMode(self.interpolation))(image)
        return T.CenterCrop([H, W])(image)

    def __str__(self) -> str:
        _, H, W = self.shape
        how = f"squashed to {W} x {H} pixels"
        if isinstance(self.resize, int):
            how = f"resized to {self.resize} pixels on the shorter side, {W} x {H} cropped"
        mean, std = (", ".join(f"{v:g}" for v in of) for of in (self.mean, self.std))
        return f"{how} (--transform {self.name}), --mean {mean or 0}, --std {std or 1}"

    def save(self, folder: Path) -> None:
        """Note it in the ``detector.json`` of a folder, where there is one."""
        path = folder / "detector.json"
        if path.is_file():
            write_json(path, {**read_json(path, "a detector"), "transform": asdict(self)})

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Transform":
        """What ``asdict`` made, after JSON.

        Raises:
            ValueError: If it is none.
        """
        from PIL import Image

        with reading("a transform of images in a record"):
            given: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in record.items()
            }
            found = cls(**given)
            found(Image.new("L", (2, 2)))  # fails where it is none
            return found


def load_transform(folder: Path) -> Transform | None:
    """How a run or a saved detector reads images; None where it does not say.

    Raises:
        ValueError: If the record is damaged.
    """
    for name in ("detector.json", "run.json"):
        path = folder / name
        if path.is_file():
            record = read_json(path, "a record of how images are read")
            found = record.get("transform") if isinstance(record, dict) else None
            if found is not None:
                return Transform.of_record(found)
    return None
