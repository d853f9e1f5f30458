"""Plain training, attach and TIE on MNIST by OpenOOD's own main.py, scored beside its own postprocessors; writes docs/research/openood.md.

    python tests/bench/openood_mnist.py --openood OPENOOD --data DATA --work WORK

OPENOOD is a checkout; DATA holds images_classic/ and benchmark_imglist/ as OpenOOD keeps them; WORK is a folder to run in, where a run that was
stopped goes on. Training images, ID test images and images of each OOD set are the first ones of its shuffled lists, as many as --train and --test
say.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tie_ext.cli.tables import table
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

HOUSE = Path(__file__).parents[2]
OUT = HOUSE / "docs" / "results" / "openood"
NEAR, FAR = ("notmnist", "fashionmnist"), ("cifar10", "cifar100", "tin")
THEIRS = (
    "msp",
    "ebo",
    "odin",
    "mls",
    "klm",
    "gen",
    "react",
    "rng",
    "ash",
    "scale",
    "mds",
    "rmds",
    "knn",
    "vim",
    "she",
    "nnguide",
    "fdbd",
)
THEIRS += ("gradnorm", "relation", "nci", "iodin", "gram", "vra")
ARGUMENTS = {
    "vim": ["--postprocessor.postprocessor_args.dim", "42"]
}  # half of LeNet's 84 features; the config's 256 are more than it has
TRAINED: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("mnist_lenet_base_e{epochs}_lr0.1_default", THEIRS),
    "attach": ("mnist_tie_net_attach_lenet_default", ("tie", "tie_combined")),
    "TIE": ("mnist_tie_net_tie_e{epochs}_lr0.05_default", ("tie", "tie_ue", "tie_combined")),
}
"""Where OpenOOD leaves the seeds of a network, and the postprocessors that score it."""


def workplace(work: Path, data: Path, train: int, test: int) -> None:
    """WORK/data with the images and shortened lists, and the OOD sets that DATA has."""
    lists = work / "data" / "benchmark_imglist" / "mnist"
    if lists.exists():
        return
    lists.mkdir(parents=True)
    (work / "data" / "images_classic").symlink_to((data / "images_classic").resolve())
    for path in (data / "benchmark_imglist" / "mnist").glob("*.txt"):
        rows = path.read_text().splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        (lists / path.name).write_text(
            "".join(rows[: train if path.name.startswith("train") else test])
        )
    ood = "ood_dataset:\n  val:\n    imglist_pth: ./data/benchmark_imglist/mnist/val_glyphs.txt\n"
    for split, names in (("nearood", NEAR), ("farood", FAR)):
        ood += f"  {split}:\n    datasets: [{', '.join(names)}]\n"
        for name in names:
            ood += f"    {name}:\n      data_dir: ./data/images_classic/\n      imglist_pth: ./data/benchmark_imglist/mnist/test_{name}.txt\n"
    (work / "sets.yml").write_text(ood)


def run(a: argparse.Namespace, files: Sequence[str], *arguments: str) -> float:
    """One of OpenOOD's runs, as a user starts it, with configs of OpenOOD's where it has them and ours where not; seconds."""
    ours, theirs = HOUSE / "openood_configs", a.openood.resolve() / "configs"
    files = [*files, "preprocessors/base_preprocessor.yml"]
    configs = [
        str(theirs / f if (theirs / f).exists() else ours / f if (ours / f).exists() else f)
        for f in files
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(a.openood.resolve()), os.environ.get("PYTHONPATH", "")]
        ),
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tie_ext.openood",
        str(a.openood.resolve() / "main.py"),
        "--config",
        *configs,
        *arguments,
    ]
    start = time.perf_counter()
    with open(a.work / "log.txt", "a") as log:
        subprocess.run(
            [*command, "--num_workers", "1", "--merge_option", "merge"],
            cwd=a.work,
            env=environment,
            stdout=log,
            stderr=log,
            check=True,
        )
    return time.perf_counter() - start


def trained(a: argparse.Namespace, network: str, seed: int) -> Path:
    """The checkpoint of a network, below WORK: trained now, or found. The seconds of its training stand beside it."""
    folder = Path("results") / TRAINED[network][0].format(epochs=a.epochs) / f"s{seed}"
    seconds = a.work / folder / "seconds.json"
    if not seconds.exists():
        common = ["--seed", str(seed)]
        epochs = ["--optimizer.num_epochs", str(a.epochs)]
        if network == "plain":
            took = run(
                a,
                ["datasets/mnist/mnist.yml", "networks/lenet.yml", "pipelines/train/baseline.yml"],
                *epochs,
                *common,
            )
        elif network == "attach":
            files = [
                "datasets/mnist/mnist.yml",
                "networks/tie_net.yml",
                "pipelines/train/attach_tie.yml",
            ]
            plain = str(trained(a, "plain", seed))
            took = run(
                a,
                files,
                "--network.backbone.name",
                "lenet",
                "--network.backbone.checkpoint",
                plain,
                *common,
            )
        else:
            files = [
                "datasets/mnist/mnist.yml",
                "networks/tie_net.yml",
                "pipelines/train/train_tie.yml",
            ]
            took = run(a, files, "--network.backbone.name", "lenet", *epochs, *common)
        write_json(seconds, took)
    return folder / "best.ckpt"


def scored(
    a: argparse.Namespace, network: str, seed: int, name: str
) -> dict[str, dict[str, float]]:
    """What OpenOOD's ood.csv says of a postprocessor, by set: FPR@95, AUROC, AUPR, ACC."""
    checkpoint = trained(a, network, seed)
    kept = a.work / checkpoint.with_name(f"{name}.csv")
    if not kept.exists():
        around = ["networks/lenet.yml"] if network == "plain" else ["networks/tie_net.yml"]
        backbone = [] if network == "plain" else ["--network.backbone.name", "lenet"]
        files = [
            "datasets/mnist/mnist.yml",
            "datasets/mnist/mnist_tie_ood.yml",
            "sets.yml",
            *around,
            "pipelines/test/test_ood.yml",
        ]
        options = [
            "--network.checkpoint",
            str(checkpoint),
            "--postprocessor.APS_mode",
            "False",
            "--seed",
            str(seed),
            *ARGUMENTS.get(name, []),
        ]
        run(a, [*files, f"postprocessors/{name}.yml"], *backbone, *options)
        net = "lenet" if network == "plain" else "tie_net"
        found = a.work / f"results/mnist_{net}_test_ood_ood_{name}_default/s{seed}/ood/ood.csv"
        kept.with_suffix(".new").write_text(found.read_text())
        kept.with_suffix(".new").replace(kept)
    with open(kept) as f:
        return {
            row.pop("dataset"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(f)
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--openood", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    workplace(a.work, a.data, a.train, a.test)
    numbers: dict[str, dict[str, list]] = {}
    for network, (_, names) in TRAINED.items():
        for name in names:
            numbers.setdefault(network, {})[name] = [
                scored(a, network, seed, name) for seed in range(a.seeds)
            ]
            print(network, name, [of["nearood"] for of in numbers[network][name]], flush=True)
    seconds = {
        network: [
            json.loads((a.work / trained(a, network, seed)).with_name("seconds.json").read_text())
            for seed in range(a.seeds)
        ]
        for network in TRAINED
    }
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "faiss-cpu")
    said = provenance(
        packages=packages, places={"OPENOOD": a.openood, "DATA": a.data, "WORK": a.work}
    )
    record = {
        "openood": "3c35632",
        "train": a.train,
        "test": a.test,
        "epochs": a.epochs,
        "seconds": seconds,
        "numbers": numbers,
    }
    write_json(OUT / "mnist.json", {**record, **said})
    page()


def mean(found: Sequence[Mapping], of: str, figure: str) -> float:
    """A figure of a set, over the seeds."""
    return float(np.mean([seed[of][figure] for seed in found]))


def page() -> None:
    """docs/research/openood.md, from the record."""
    r = json.loads((OUT / "mnist.json").read_text())
    rows = []
    for network, names in r["numbers"].items():
        for name, found in names.items():
            worst, of = min((mean(found, s, "AUROC"), s) for s in (*NEAR, *FAR))
            pairs = {
                part: f"{mean(found, s, 'AUROC'):.2f} / {mean(found, s, 'FPR@95'):.2f}"
                for part, s in (("near", "nearood"), ("far", "farood"))
            }
            rows.append(
                {
                    "network: postprocessor": f"{network}: {name}",
                    "ACC": f"{mean(found, 'nearood', 'ACC'):.2f}",
                    **pairs,
                }
            )
            rows[-1]["worst"] = f"{worst:.2f} ({of})"
    kept = "".join(
        f" {name}: run before, at {commit}." for name, commit in r.get("kept", {}).items()
    )
    seconds = {network: f"{np.mean(took):.0f}" for network, took in r["seconds"].items()}
    seeds = len(next(iter(r["seconds"].values())))
    text = (
        "# OpenOOD's own main.py, on MNIST\n\n"
        f"Made by `python tests/bench/{r['command']}` at commit {r['commit'][:7]}, of `docs/results/openood/mnist.json`. OpenOOD at "
        f"{r['openood']}, torch {r['versions']['torch']}, CPU.{kept}\n\n"
        f"OpenOOD's LeNet, {r['train']} training images, {r['epochs']} epochs, {seeds} seeds, each run by its main.py. *plain*: its baseline "
        "trainer. *attach*: trainer `attach` on that very network, which stays as it is. *TIE*: trainer `tie` as `train_tie.yml` has it, SGD at half "
        "the rate of *plain*. CIFAR-10 was not run: OpenOOD's networks for it are too slow for a CPU. Seconds for training one, loading "
        f"included: {', '.join(f'{network} {took}' for network, took in seconds.items())}.\n\n"
        f"{r['test']} images of each set. Postprocessors have the parameters of their configs, since no real OOD image is used to search better "
        f"ones. A cell is AUROC / FPR@95, a mean over seeds. Near: {', '.join(NEAR)}. Far: {', '.join(FAR)}. Worst: the lowest AUROC of the five "
        "sets. ACC is over the n ID outputs; OpenOOD's preprocessor also mirrors the digits that it trains on. "
        "tie_combined had ViM then, in the place of KNN.\n\n"
    )
    (HOUSE / "docs" / "research" / "openood.md").write_text(f"{text}{table(rows)}\n")


if __name__ == "__main__":
    main()
