"""pytorch-ood's own benchmark of an attached network: OpenOOD's CIFAR-10 sets, evaluated by ``Benchmark.evaluate``.

    python tests/bench/benchmark.py --root DATA/images_classic docs/results/attached/work/cifar10-45000x28-resnet20-seed0-head.safetensors

ROOT has the images as OpenOOD keeps them. A row for each detector and OOD set is printed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from pytorch_ood.api import Detector
from pytorch_ood.benchmark import Benchmark, CIFAR10_OpenOOD
from pytorch_ood.detector import EnergyBased, MaxSoftmax
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from tie_ext import TIENet
from tie_ext.app.report import table
from tie_ext.pytorch_ood import TIEDetector, combine


def evaluated(benchmark: Benchmark, detectors: Mapping[str, Detector], loader: Mapping) -> list[dict]:
    """A row for each detector and OOD set, percent; images are passed once for detectors that read the same of them."""
    rows = []
    for name, detector in detectors.items():
        with torch.no_grad():
            found = benchmark.evaluate(detector, loader_kwargs=dict(loader), cache=True)
        rows += [
            {"detector": name, "OOD set": of["Dataset"], "AUROC": f"{100 * of['AUROC']:.2f}", "FPR@95": f"{100 * of['FPR95TPR']:.2f}"} for of in found
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data/images_classic")
    parser.add_argument("--download", action="store_true", help="fetch what is missing (needs gdown)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("network", type=Path, help="an attached network of images in [0, 1]")
    a = parser.parse_args()
    net = TIENet.load(a.network)
    benchmark = CIFAR10_OpenOOD(a.root, ToTensor(), download=a.download)
    loader = {"batch_size": a.batch_size}
    training, held_out = (DataLoader(images, **loader) for images in (benchmark.train_set(), benchmark.val_in))
    detectors = {
        "MSP": MaxSoftmax(net),
        "energy": EnergyBased(net),
        "TIEDetector": TIEDetector(net),
        "Combined": combine(net, training, held_out),
    }
    print(table(evaluated(benchmark, detectors, loader)))


if __name__ == "__main__":
    main()
