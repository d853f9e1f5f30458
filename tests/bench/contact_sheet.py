"""The procedural families, and corrupted ID images: docs/figures/procedural.png, a row each,
colour left and grey right.

python tests/bench/contact_sheet.py
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from tie_ext.outliers import Domain, Procedural
from tie_ext.outliers.primitives import Rng
from tie_ext.outliers.procedural import FAMILIES, greyed, permuted_pixels, shuffled_tiles
from tie_ext.training.augmentation import corrupt

SHEET = Path(__file__).parents[2] / "docs" / "figures" / "procedural.png"
SIDE, GAP, LABEL = 32, 2, 96
SHAPES = [(10, 3, SIDE, SIDE), (6, 1, SIDE, SIDE)]
"""Of the images in a row."""


def photographs(count: int) -> Tensor:
    """Crops ``(count, 3, 32, 32)`` of scikit-learn's two photographs: they stand for ID images."""
    left = torch.linspace(0, 384, count).long().tolist()
    pictures = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    crops = [pictures[i % 2][100:356, a : a + 256] for i, a in enumerate(left)]
    return F.interpolate(torch.stack(crops).permute(0, 3, 1, 2) / 255, (SIDE, SIDE), mode="area")


def rows() -> dict[str, list[Tensor]]:
    """Images in colour and in grey, by the name of the row."""
    rng, few = Rng(), torch.from_numpy(load_digits().images[: SHAPES[1][0], None]).float() / 16
    made = {
        f"{name} {share:.0%}": [greyed(render(shape, rng), rng) for shape in SHAPES]
        for name, (share, render) in FAMILIES.items()
    }
    mixture = Procedural(Domain(10, None, torch.tensor(0.0), torch.tensor(1.0)))
    images = [photographs(SHAPES[0][0]), F.interpolate(few, (SIDE, SIDE), mode="bilinear")]
    changes = {"corrupted": corrupt, "shuffled tiles": shuffled_tiles}
    changes["permuted pixels"] = permuted_pixels
    return {
        **made,
        "mixture": [mixture.draw(shape) for shape in SHAPES],
        "ID images": images,
        **{name: [change(x, rng) for x in images] for name, change in changes.items()},
    }


def main() -> None:
    """Write the sheet."""
    torch.manual_seed(0)
    table, step = rows(), SIDE + GAP
    sheet = Image.new("RGB", (LABEL + step * 17, step * len(table)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, parts) in enumerate(table.items()):
        pen.text((4, i * step + 10), name, fill="black")
        for images, left in zip(parts, (LABEL, LABEL + step * 21 // 2), strict=True):
            pixels = (images * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
            for j, image in enumerate(pixels.numpy()):
                sheet.paste(Image.fromarray(image), (left + j * step, i * step))
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
