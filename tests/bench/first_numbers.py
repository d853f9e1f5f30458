"""TIE, the two no-TIE baselines and the plain network on MNIST, one JSON a cell; a cell that exists is not run again.

    python tests/bench/first_numbers.py --root DATA --images 60000 --epochs 20 --seeds 0
    python tests/bench/first_numbers.py --root DATA --images 20000 --epochs 10 --seeds 0 1 2

DATA holds the image sets as the README says. Results go to docs/results/first_numbers/.
"""

import argparse
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path

from tie_ext import data
from tie_ext.comparison import METHODS, cell
from tie_ext.files import write_json
from tie_ext.networks import Conv3
from tie_ext.training import TIEConfig

OUT = Path(__file__).parents[2] / "docs" / "results" / "first_numbers"
OOD = {"mnist": ("fashionmnist", "cifar10", "cifar100", "tinyimagenet"), "fashionmnist": ("mnist", "cifar10", "cifar100", "tinyimagenet")}


def run(method: str, name: str, root: Path, images: int, config: TIEConfig, path: Path, command: str, networks: Path) -> None:
    """One cell, in a process of its own so that its peak memory is its own."""
    train, test = data.load(name, "train", root).first(images, config.seed), data.load(name, "test", root)
    ood = {other: data.load(other, "test", root, test.shape) for other in OOD[name]} | {"noise": data.noise("gaussian", 10_000, test.shape)}
    record, net = cell(method, Conv3, train, test, ood, config, {"data": name, "backbone": "conv3"})
    net.save(networks / f"{path.stem}.safetensors")
    write_json(path, record | {"command": command})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--data", default="mnist", choices=list(OOD))
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=["tie", "multiscale", "white", "plain"], choices=METHODS)
    parser.add_argument("--generator-steps", type=int, default=TIEConfig.generator_steps)
    parser.add_argument("--generator-width", type=int, default=TIEConfig.generator_width)
    parser.add_argument("--networks", type=Path, default=Path("runs/networks"), help="where the trained networks go")
    parser.add_argument("--tag", default="", help="appended to the file names of runs with other settings")
    a = parser.parse_args()
    config = TIEConfig(epochs=a.epochs, generator_steps=a.generator_steps, generator_width=a.generator_width)
    command = " ".join(["python", *sys.argv]).replace(str(a.root), "DATA").replace(str(a.networks), "NETWORKS")
    for seed in a.seeds:
        for method in a.methods:
            path = OUT / f"{a.data}-{a.images}x{a.epochs}-{method}-seed{seed}{a.tag}.json"
            if path.exists():
                continue
            print(path.name, flush=True)
            process = multiprocessing.get_context("spawn").Process(
                target=run,
                args=(method, a.data, a.root, a.images, replace(config, seed=seed), path, command, a.networks),
            )
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{path.name} failed")


if __name__ == "__main__":
    main()
