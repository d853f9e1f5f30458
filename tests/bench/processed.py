"""ID test images as other programs would have given them, most of them by Pillow: a rejector should let them pass.

Of what the head is taught (:mod:`tie_ext.training.augmentation`) there are size, blur, contrast, brightness, gamma, rotation, moves and noise, most of them
stronger here; sharpening, a median and JPEG it has never seen.
"""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from tie_ext.cli.images import ImageSet

MANY = 1000
"""Images of each kind; the same for all."""
PROCESSED = "id:"
"""Begins the names of these sets."""


def by_pillow(change: Callable[[Image.Image], Image.Image]) -> Callable[[Tensor], Tensor]:
    """A change of uint8 images ``(N, C, H, W)``."""

    def changed(x: Tensor) -> Tensor:
        images = [
            Image.fromarray(one.squeeze(2) if one.shape[2] == 1 else one)
            for one in x.permute(0, 2, 3, 1).numpy()
        ]
        return (
            torch.from_numpy(np.stack([np.asarray(change(image)) for image in images]))
            .view(-1, *x.shape[2:], x.shape[1])
            .permute(0, 3, 1, 2)
        )

    return changed


def by_torch(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of images in [0, 1]."""
    return lambda x: (change(x.float() / 255).clamp(0, 1) * 255).round().to(torch.uint8)


def resized(image: Image.Image, by: float) -> Image.Image:
    """To another size and back."""
    size = tuple(round(by * side) for side in image.size)
    return image.resize(size, Image.Resampling.BILINEAR).resize(
        image.size, Image.Resampling.BILINEAR
    )


def coded(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=50)
    return Image.open(file)


def noisy(x: Tensor) -> Tensor:
    return x + 0.03 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "size by 8/7 and back": by_pillow(lambda image: resized(image, 8 / 7)),
    "size by 6/7 and back": by_pillow(lambda image: resized(image, 6 / 7)),
    "blur, 0.7 pixels": by_pillow(lambda image: image.filter(ImageFilter.GaussianBlur(0.7))),
    "sharpened": by_pillow(lambda image: image.filter(ImageFilter.UnsharpMask(1, 100, 0))),
    "median of 3 x 3": by_pillow(lambda image: image.filter(ImageFilter.MedianFilter(3))),
    "darker by a fifth": by_torch(lambda x: 0.8 * x),
    "brighter by a tenth": by_torch(lambda x: x + 0.1),
    "gamma 1.5": by_torch(lambda x: x**1.5),
    "turned by 10 degrees": by_pillow(lambda image: image.rotate(10, Image.Resampling.BILINEAR)),
    "moved by 2 pixels": by_torch(lambda x: x.roll((2, 2), (2, 3))),
    "JPEG of quality 50": by_pillow(coded),
    "noise of 0.03": by_torch(noisy),
}
"""How images are changed, by what a table says."""


def processed_sets(test: ImageSet) -> dict[str, ImageSet]:
    """The same ID test images, in each way; by name."""
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:MANY]
    return {
        f"{PROCESSED}{kind}": ImageSet(change(test.x[rows]), test.y[rows], test.classes)
        for kind, change in KINDS.items()
    }
