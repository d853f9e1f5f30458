"""The demo's network and images, which ship with this package, scikit-learn and matplotlib.

Nothing is downloaded. The folder ``clothes`` has a card of network and images.
"""

import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tie_ext.cli.data import noise, transformed
from tie_ext.cli.images import ImageSet
from tie_ext.cli.transform import Transform

FOLDER = Path(__file__).parent / "clothes"
NETWORK = FOLDER / "conv3.safetensors"
"""The state_dict of a :class:`~tie_ext.models.backbones.Conv3` trained on FashionMNIST."""
SIDE = 28
SMALL = Transform.squash((1, SIDE, SIDE))
COUNT = 300
"""Images of an OOD set."""
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral"]


def clothes() -> tuple[ImageSet, ImageSet, ImageSet]:
    """FashionMNIST, grey and 28x28: 2000 training images of the network, 1600 images that it
    has not seen to calibrate on, and 800 others.
    """
    from PIL import Image

    about = json.loads((FOLDER / "images.json").read_text())
    with Image.open(FOLDER / "images.png") as sheet:
        rows = torch.from_numpy(np.array(sheet)).unflatten(1, (-1, SIDE)).unflatten(0, (-1, SIDE))
    images = rows.transpose(1, 2).reshape(-1, 1, SIDE, SIDE)
    whole = ImageSet(images, torch.tensor(about["labels"]), tuple(about["classes"]))
    train, test = torch.arange(len(whole)).split([about["train"], len(whole) - about["train"]])
    calibration, new = test.tensor_split([2 * len(test) // 3])
    return whole.take(train), whole.take(calibration), whole.take(new)


def strangers() -> dict[str, ImageSet]:
    """What are no clothes, by name: digits, letters, photographs and noise, grey and 28x28."""
    x = {"digits": _digits(), "letters": _letters(), "photographs": _photographs()}
    sets = {name: ImageSet(of, torch.full((len(of),), -1)) for name, of in x.items()}
    return {**sets, "noise": noise("gaussian", COUNT, (1, SIDE, SIDE))}


def _digits() -> Tensor:
    """Scikit-learn's handwritten digits of 8x8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    x = torch.as_tensor(load_digits().images[:COUNT]) * (255 / 16)
    return transformed(x[:, None].to(torch.uint8), SMALL)


def _photographs() -> Tensor:
    """Patches of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [torch.tensor(x).permute(2, 0, 1) for x in load_sample_images().images]
    patches = []
    for i in range(COUNT):
        top, left = rng.integers(0, 427 - 112, 2)
        patches.append(photographs[i % 2][:, top : top + 112, left : left + 112])
    return transformed(torch.stack(patches), SMALL)


def _letters() -> Tensor:
    """Printed letters in matplotlib's fonts."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    folder, letters = os.path.join(get_data_path(), "fonts", "ttf"), []
    for name in FONTS:
        font = ImageFont.truetype(os.path.join(folder, f"{name}.ttf"), 24)
        for code in (*range(65, 91), *range(97, 123)):
            page = Image.new("L", (SIDE, SIDE))
            place = (SIDE // 2, SIDE // 2)
            ImageDraw.Draw(page).text(place, chr(code), fill=255, font=font, anchor="mm")
            letters.append(torch.from_numpy(np.array(page)))
    return torch.stack(letters)[:, None]
