"""The demo's images: real ones that ship with scikit-learn and matplotlib, nothing to download."""

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.cli.data import noise, reshape
from tie_ext.cli.images import ImageSet

FONTS = [
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "STIXGeneral",
]
LETTERS = "ACEFHJKLMNPRTUVWXYadehkmnprtuvwxy"
"""Letters that look like no digit."""


def demo() -> tuple[ImageSet, ImageSet, dict[str, ImageSet]]:
    """Digits as ID images; photographs, letters and noise as OOD images; all grey, 28x28.

    ID images are scikit-learn's handwritten digits of 8x8 pixels. OOD images are reduced to 8x8
    pixels too, so that blur does not give them away.

    Returns:
        ID training set, ID test set (one image in four), OOD sets by name.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = _through_8x8(torch.as_tensor(x).reshape(-1, 1, 8, 8) * (255 / 16))
    labels, classes = torch.as_tensor(y).long(), tuple(map(str, range(10)))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    split = len(order) // 4
    test, train = (
        ImageSet(images[rows], labels[rows], classes) for rows in (order[:split], order[split:])
    )
    ood = {"photographs": _photographs(450), "letters": _letters()}
    return train, test, {**ood, "noise": noise("gaussian", 450, (1, 28, 28))}


def _through_8x8(x: Tensor) -> Tensor:
    small = F.interpolate(x.float(), (8, 8), mode="bilinear", align_corners=False, antialias=True)
    return reshape(small.round().clamp(0, 255).to(torch.uint8), 1, 28)


def _ood(x: list[Tensor]) -> ImageSet:
    return ImageSet(_through_8x8(torch.stack(x)), torch.full((len(x),), -1))


def _photographs(count: int) -> ImageSet:
    """Patches of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [
        reshape(torch.tensor(p).permute(2, 0, 1)[None], 1, 416)[0]
        for p in load_sample_images().images
    ]
    patches = []
    for i in range(count):
        top, left = rng.integers(0, 416 - 64, 2)
        patches.append(photographs[i % 2][:, top : top + 64, left : left + 64])
    return _ood(patches)


def _letters() -> ImageSet:
    """Printed letters in matplotlib's fonts."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    folder = os.path.join(get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(os.path.join(folder, f"{name}.ttf"), 56) for name in FONTS]
    return _ood([_letter(letter, font) for font in fonts for letter in LETTERS])


def _letter(letter: str, font) -> Tensor:
    """A letter ``(1, 64, 64)`` that fills the image's height, as the digits do."""
    from PIL import Image, ImageDraw

    page, canvas = Image.new("L", (128, 128)), Image.new("L", (64, 64))
    ImageDraw.Draw(page).text((32, 24), letter, fill=255, font=font)
    left, top, right, bottom = page.getbbox() or (0, 0, 1, 1)
    width = max(1, round(64 * (right - left) / (bottom - top)))
    mark = page.crop((left, top, right, bottom)).resize((width, 64)).resize((min(64, width), 64))
    canvas.paste(mark, (max(0, (64 - width) // 2), 0))
    return torch.from_numpy(np.array(canvas))[None]
