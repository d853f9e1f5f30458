"""Images a second of ``tie-ext score`` on a folder of JPEGs, beside its DataLoader alone, and beside that
DataLoader with the classifier's own pass, which a user pays without us.

    python tests/bench/folders.py --images 3000 --out docs/results/cost/folders-speed.json

Medians of five, in turn; processor time of all processes on a CPU, as that is what decoding and scoring
share.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from tie_ext import TIENet
from tie_ext.cli import reading, score
from tie_ext.cli.batches import scaled
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.transform import Transform
from tie_ext.models.backbones import Conv5
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance


def draw(folder: Path, count: int, size: int, classes: int = 2) -> Path:
    """So many JPEGs in folders by class: noise over a shade of the class, some hundred of them, under many names."""
    rng, kept = np.random.default_rng(0), []
    for i in range(count):
        place = folder / str(i % classes) / f"{i:06d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        if i < 200:
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(
                (size, size), Image.Resampling.BICUBIC
            )
            coarse.save(place, quality=90)
            kept.append(place.read_bytes())
        else:
            place.write_bytes(kept[i % 200])
    return folder


def spent() -> float:
    """Processor seconds of this process and of its workers that have ended."""
    of = os.times()
    return of.user + of.system + of.children_user + of.children_system


def speed(images: int, pixels: int, device: str) -> dict:
    """Images a second of each, and the share of the others' that scoring reaches."""
    torch.manual_seed(0)
    net = TIENet(Conv5(3, 10), 10, (3, 32, 32), head="multilayer").eval().to(device)
    alone = Conv5(3, 10).eval().to(device)
    rates: dict[str, list[float]] = {"loader": [], "loader and classifier": [], "score": []}

    @torch.no_grad()
    def work(kind: str) -> None:
        if kind == "score":
            for _ in score.score(net, net.decide, files, of.transform):
                pass
            return
        for x in of.parts(torch.arange(images).split(score.BATCH)):
            if kind != "loader":
                alone(scaled(x, net)).cpu()

    clock = spent if device == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as place:
        files = reading.list_images([draw(Path(place), images, pixels)])
        of = ImageFiles.of(files, Transform.squash((3, 32, 32)))
        for _ in range(5):
            for kind in rates:
                start = clock()
                work(kind)
                rates[kind].append(images / (clock() - start))
    medians = {kind: median(of) for kind, of in rates.items()}
    ratio = {kind: medians["score"] / medians[kind] for kind in rates if kind != "score"}
    return {"images": images, "pixels": pixels, "per_second": rates, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--pixels", type=int, default=400, help="of a JPEG, as cameras and the web have them"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    found = speed(a.images, a.pixels, a.device)
    print(found)
    if a.out:
        write_json(a.out, {**found, **provenance(a.device)})


if __name__ == "__main__":
    main()
