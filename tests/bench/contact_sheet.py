"""What the procedural families, and ID images processed another way, look like: docs/figures/procedural.png, a row each, colour left and grey right.

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
COUNT = {3: 10, 1: 6}
"""Images in a row, of three channels and of one."""


def photos(count: int) -> Tensor:
    """Crops ``(count, 3, 32, 32)`` of scikit-learn's two photographs: they stand for ID images."""
    whole = (
        torch.stack(
            [torch.from_numpy(image.copy()) for image in load_sample_images().images]
        ).permute(0, 3, 1, 2)
        / 255
    )
    corners = torch.linspace(0, whole.shape[3] - 256, count).long().tolist()
    crops = torch.stack(
        [whole[i % 2, :, 100:356, left : left + 256] for i, left in enumerate(corners)]
    )
    return F.interpolate(crops, (SIDE, SIDE), mode="area")


def digits(count: int) -> Tensor:
    """Digits ``(count, 1, 32, 32)`` of scikit-learn's set."""
    return F.interpolate(
        torch.from_numpy(load_digits().images[:count, None]).float() / 16,
        (SIDE, SIDE),
        mode="bilinear",
    )


def rows() -> dict[str, list[Tensor]]:
    """Images in colour and in grey, by the name of the row."""
    rng, sizes = Rng(), [(count, channels, SIDE, SIDE) for channels, count in COUNT.items()]
    made = {
        f"{name} {share:.0%}" if share else f"{name} (unused)": [
            greyed(draw(s, rng), rng) for s in sizes
        ]
        for name, (share, draw) in FAMILIES.items()
    }
    mixture = Procedural(Domain(10, None, torch.tensor(0.0), torch.tensor(1.0)))
    images = [photos(COUNT[3]), digits(COUNT[1])]
    return {
        **made,
        "mixture": [mixture.draw(s) for s in sizes],
        "ID images": images,
        "processed": [corrupt(x, rng) for x in images],
        "shuffled tiles": [shuffled_tiles(x, rng) for x in images],
        "permuted pixels": [permuted_pixels(x, rng) for x in images],
    }


def main() -> None:
    """Write the sheet."""
    torch.manual_seed(0)
    table, step = rows(), SIDE + GAP
    sheet = Image.new(
        "RGB", (LABEL + step * (sum(COUNT.values()) + 1), step * len(table)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for i, (name, parts) in enumerate(table.items()):
        pen.text((4, i * step + 10), name, fill="black")
        left = LABEL
        for images in parts:
            for image in (
                (images * 255).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
            ):
                sheet.paste(Image.fromarray(image), (left, i * step))
                left += step
            left += step // 2
    sheet.save(SHEET, optimize=True)


if __name__ == "__main__":
    main()
