"""pytorch-ood's own benchmark of an attached network: OpenOOD's CIFAR-10 sets, evaluated by ``Benchmark.evaluate``.

    python tests/bench/benchmark.py --root DATA/images_classic --public NETWORKS/cifar10_resnet20_akamaster.safetensors

The network is one that :func:`tie_ext.attach` has saved, of images in [0, 1], or (``--public``) the public ResNet-20, to which it is attached here.
The images lie in ROOT and the lists where pytorch-ood looks for them: both are what ``CIFAR10_OpenOOD(ROOT, transform)`` downloads, with gdown.
``--lists FOLDER`` makes lists there, of the folders in ROOT, for whoever has the images and not the lists. OOD sets without a list or an image are
left out and named. A row for each detector is printed, and kept in docs/results/benchmark.json with ``--keep``.
"""

import argparse
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import public_data
import torch
from pytorch_ood.api import Detector
from pytorch_ood.benchmark import Benchmark, CIFAR10_OpenOOD
from pytorch_ood.detector import GEN, KNN, EnergyBased, Mahalanobis, MaxSoftmax, ViM
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from tie_ext import TIENet, attach
from tie_ext.cli.tables import table
from tie_ext.openood.lists import write_list
from tie_ext.pytorch_ood import Combined, TIEDetector, combine
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

OUT = Path(__file__).parents[2] / "docs" / "results" / "benchmark.json"
SIZE = 32
"""Pixels to a side; the lists have larger and smaller images too."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the public network's images."""
COMBINED = (("GEN", "KNN"), ("GEN", "ViM"), ("GEN", "KNN", "ViM"))
"""Scores that read the logits, and scores that read the features, together."""
VALIDATION = 1000
"""ID test images that are for validation, in lists of our own."""


class AtHand(CIFAR10_OpenOOD):
    """The benchmark with the OOD sets that are on disk, and at most so many images of each set, drawn with one seed."""

    def __init__(self, root: str, most: int | None, *last: Callable):
        lists = Path(
            torch.hub.get_dir(), "openood_benchmark_imglist", "benchmark_imglist", self._subdir
        )
        self.missing = {
            name: reason
            for name, of in CIFAR10_OpenOOD._ood_imglists
            if (reason := self.lacks(Path(root), lists / of))
        }
        self._ood_imglists = [
            pair for pair in CIFAR10_OpenOOD._ood_imglists if pair[0] not in self.missing
        ]
        super().__init__(
            root, Compose([Resize(SIZE), CenterCrop(SIZE), ToTensor(), *last]), download=False
        )
        if not self.test_oods:
            raise ValueError(
                f"Expected at least one OOD set of the benchmark, but {'; '.join(f'{of}: {why}' for of, why in self.missing.items())}"
            )
        self.train_in, self.val_in, self.test_in, *self.test_oods = (
            few(images, most)
            for images in (self.train_in, self.val_in, self.test_in, *self.test_oods)
        )

    @staticmethod
    def lacks(root: Path, of: Path) -> str | None:
        """What an OOD set lacks; None where its list and the first image of it are there."""
        if not of.exists():
            return f"no list {of.name}"
        first = of.read_text().split(maxsplit=1)[0]
        return None if (root / first).exists() else f"no image {first}"


def write_lists(root: Path, hub: Path) -> None:
    """Lists of folders of images, ``SET/SPLIT/...``, where pytorch-ood looks for them in torch's hub.

    As in OpenOOD's, :data:`VALIDATION` images of the ID test set are for validation, drawn with one seed, and those tested are of the others.

    Raises:
        ValueError: If ID images, or those of TinyImageNet for validation, are missing.
    """
    torch.hub.set_dir(hub)
    place = hub / "openood_benchmark_imglist" / "benchmark_imglist" / CIFAR10_OpenOOD._subdir
    write_list(place / "train_cifar10.txt", root / "cifar10" / "train")
    write_list(place / "test_cifar10.txt", root / "cifar10" / "test")
    rows = (place / "test_cifar10.txt").read_text().splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    (place / "val_cifar10.txt").write_text("".join(rows[:VALIDATION]))
    (place / "test_cifar10.txt").write_text("".join(rows[VALIDATION:]))
    for of in [CIFAR10_OpenOOD._val_ood_imglist, *dict(CIFAR10_OpenOOD._ood_imglists).values()]:
        split, _, name = Path(of).stem.partition("_")
        if split == "val" or (root / name / split).is_dir():
            write_list(place / of, root / name / split)
            (place / of).write_text(re.sub(r" \d+$", " -1", (place / of).read_text(), flags=re.M))


def few(images: Dataset, most: int | None) -> Dataset:
    """At most so many images, the same ones every time; all where most is None."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return Subset(images, order[:most].sort().values.tolist())


def attached_public(path: Path, training: DataLoader) -> TIENet:
    """The public ResNet-20 with a garbage class."""
    low, high = ([(of - m) / s for m, s in zip(MEAN, DEVIATION, strict=True)] for of in (0.0, 1.0))
    return attach(public_data.resnet(path, 3, 10), training, 10, low, high)


def fitted(net: TIENet, training: DataLoader, held_out: DataLoader) -> dict[str, Detector]:
    """pytorch-ood's own detectors, and three combinations of them by z-scores; none reads the garbage class."""
    k = max(1, len(training.dataset) // 100)
    found: dict[str, Detector] = {
        "MSP": MaxSoftmax(net),
        "energy": EnergyBased(net),
        "GEN": GEN(net),
        "KNN": KNN(net.features, k=k),
        "ViM": ViM(net.features, net.feature_size // 2, net.fc.weight, net.fc.bias),
        "Mahalanobis": Mahalanobis(net.features),
    }
    for name in ("KNN", "ViM", "Mahalanobis"):
        found[name].fit(training)
    for names in COMBINED:
        members = [found[name] for name in names]
        found[" + ".join(names)] = Combined(members, None, "zsum").fit(held_out)
    return found


def evaluated(
    benchmark: Benchmark, detectors: Mapping[str, Detector], loader: Mapping
) -> list[dict]:
    """AUROC and FPR@95 for each detector and OOD set; images are passed once for detectors that read the same of them."""
    rows = []
    for name, detector in detectors.items():
        with torch.no_grad():
            found = benchmark.evaluate(detector, loader_kwargs=dict(loader), cache=True)
        rows += [
            {"detector": name, "set": of["Dataset"], "auroc": of["AUROC"], "fpr95": of["FPR95TPR"]}
            for of in found
        ]
    return rows


def shown(rows: Sequence[Mapping]) -> str:
    """A table in percent: a row a detector, AUROC / FPR@95 of each OOD set, and mean AUROC."""
    by_detector: dict[str, list[Mapping]] = {}
    for row in rows:
        by_detector.setdefault(row["detector"], []).append(row)
    return table(
        [
            {
                "detector": name,
                **{
                    of["set"]: f"{100 * of['auroc']:.2f} / {100 * of['fpr95']:.2f}" for of in found
                },
                "mean AUROC": f"{100 * mean(of['auroc'] for of in found):.2f}",
            }
            for name, found in by_detector.items()
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data/images_classic")
    parser.add_argument(
        "--images", type=int, help="at most so many of each set, training images too (all)"
    )
    parser.add_argument(
        "--lists", type=Path, metavar="FOLDER", help="make the lists there, of the folders in ROOT"
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--keep", action="store_true", help=f"write {OUT.name}")
    parser.add_argument("--public", action="store_true", help="a public ResNet-20, to attach to")
    parser.add_argument("network", type=Path, help="an attached network of images in [0, 1]")
    a = parser.parse_args()
    if a.lists:
        write_lists(Path(a.root), a.lists)
    benchmark = AtHand(a.root, a.images, *([Normalize(MEAN, DEVIATION)] if a.public else []))
    for name, reason in benchmark.missing.items():
        print(f"{name} is left out: {reason}", flush=True)
    loader = {"batch_size": a.batch_size}
    training, held_out = (
        DataLoader(images, **loader) for images in (benchmark.train_set(), benchmark.val_in)
    )
    net = attached_public(a.network, training) if a.public else TIENet.load(a.network)
    detectors = fitted(net, training, held_out)
    detectors["TIEDetector"] = TIEDetector(net)
    detectors["combine"] = combine(net, calibration_loader=held_out)
    rows = evaluated(benchmark, detectors, loader)
    print(shown(rows))
    if a.keep:
        names = ("train", "validation", "ID test", *benchmark.ood_names)
        sets = (benchmark.train_in, benchmark.val_in, benchmark.test_in, *benchmark.test_oods)
        images = {name: len(of) for name, of in zip(names, sets, strict=True)}
        lists = " --lists FOLDER" if a.lists else ""
        place = "--public NETWORKS" if a.public else "docs/results/attached/work"
        command = f"benchmark.py --root DATA/images_classic{lists} --images {a.images} --keep {place}/{a.network.name}"
        write_json(
            OUT,
            {
                **provenance(),
                "command": command,
                "images": images,
                "missing": benchmark.missing,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
