"""Folders of JPEGs: memory of training on many and on few, and images a second of ``tie-ext score`` beside its DataLoader alone, and beside that
DataLoader with the classifier's own pass, which a user pays without us.

    python tests/bench/folders.py memory --few 20000 --many 200000 --out docs/results/cost/folders-memory.json
    python tests/bench/folders.py speed --images 10000 --out docs/results/cost/folders-speed.json

Memory: peak of a process that trains an epoch on generated JPEGs of 64 pixels, two classes, and scores; 300 MB more are allowed for ten times as
many. Speed: medians of five, in turn; processor time of all processes on a CPU, as that is what decoding and scoring share.
"""

import argparse
import os
import subprocess
import sys
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

PEAK = "import sys; from tie_ext.cli.main import main; from tie_ext.utils.provenance import peak_memory; main(sys.argv[1:]); print(peak_memory())"
FAST = [
    "--epochs",
    "1",
    "--head",
    "linear",
    "--synthesizer",
    "white",
    "--candidates",
    "110",
    "--pool-size",
    "100",
    "--backbone",
    "conv3",
]


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


def peak(folder: Path, out: Path) -> float:
    """MB of a process that trains on a folder as it is and scores."""
    command = [
        sys.executable,
        "-c",
        PEAK,
        "train",
        "--data",
        f"folder:{folder}",
        "--size",
        "64",
        "--out",
        str(out),
        *FAST,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def memory(few: int, many: int) -> dict:
    """Peaks by count of images, and the difference, in MB."""
    with tempfile.TemporaryDirectory() as place:
        peaks = {
            count: peak(draw(Path(place) / str(count), count, 64), Path(place) / f"run{count}")
            for count in (few, many)
        }
    return {"pixels": 64, "peak_mb": peaks, "more_mb": peaks[many] - peaks[few]}


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
    parser.add_argument("what", choices=("memory", "speed"))
    parser.add_argument("--few", type=int, default=20_000)
    parser.add_argument("--many", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--pixels", type=int, default=400, help="of a JPEG, as cameras and the web have them"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    found = memory(a.few, a.many) if a.what == "memory" else speed(a.images, a.pixels, a.device)
    print(found)
    if a.out:
        write_json(a.out, {**found, **provenance(a.device)})


if __name__ == "__main__":
    main()
