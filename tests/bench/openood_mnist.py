"""TIE trained and scored on MNIST by OpenOOD's own main.py, beside its own postprocessors on the same checkpoint; writes docs/openood.md.

    python tests/bench/openood_mnist.py --openood OPENOOD --data DATA --work WORK

OPENOOD is a checkout; DATA holds images_classic/ and benchmark_imglist/ as OpenOOD keeps them; WORK is a new folder to run in. Training images,
ID test images and images of each OOD set are the first ones of its lists, as many as --train and --test say.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from tie_ext.app.report import table
from tie_ext.support.files import write_json
from tie_ext.support.provenance import provenance

HOUSE = Path(__file__).parents[2]
OUT = HOUSE / "docs" / "results" / "openood"
NEAR, FAR = ("notmnist", "fashionmnist"), ("cifar10", "cifar100", "tin")
METHODS = ("tie", "tie_ue", "msp", "ebo", "odin", "mls", "klm", "gen", "react", "dice", "ash", "scale", "mds", "rmds", "knn", "vim", "she", "nnguide")
METHODS += ("fdbd", "gradnorm", "relation", "nci", "iodin", "gram", "vra")
ARGUMENTS = {"vim": ["--postprocessor.postprocessor_args.dim", "42"]}  # half of LeNet's 84 features; the config's 256 are more than it has


def workplace(work: Path, data: Path, train: int, test: int) -> None:
    """WORK/data with the images and shortened lists, and the OOD sets that DATA has."""
    lists = work / "data" / "benchmark_imglist" / "mnist"
    lists.mkdir(parents=True)
    (work / "data" / "images_classic").symlink_to((data / "images_classic").resolve())
    for path in (data / "benchmark_imglist" / "mnist").glob("*.txt"):
        rows = path.read_text().splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        (lists / path.name).write_text("".join(rows[: train if path.name.startswith("train") else test]))
    ood = "ood_dataset:\n  val:\n    imglist_pth: ./data/benchmark_imglist/mnist/val_tin.txt\n"
    for split, names in (("nearood", NEAR), ("farood", FAR)):
        ood += f"  {split}:\n    datasets: [{', '.join(names)}]\n"
        for name in names:
            ood += f"    {name}:\n      data_dir: ./data/images_classic/\n      imglist_pth: ./data/benchmark_imglist/mnist/test_{name}.txt\n"
    (work / "sets.yml").write_text(ood)


def run(a: argparse.Namespace, *arguments: str) -> float:
    """One of OpenOOD's runs, as a user starts it; seconds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(a.openood.resolve()), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", "-m", "tie_ext.openood", str(a.openood.resolve() / "main.py"), *arguments]
    start = time.perf_counter()
    with open(a.work / "log.txt", "a") as log:
        subprocess.run(command, cwd=a.work, env=environment, stdout=log, stderr=log, check=True)
    return time.perf_counter() - start


def configs(a: argparse.Namespace, *names: str) -> list[str]:
    """OpenOOD's where it has them, ours where not."""
    ours, theirs = HOUSE / "openood_configs", a.openood.resolve() / "configs"
    return ["--config", *(str(theirs / n if (theirs / n).exists() else ours / n if (ours / n).exists() else n) for n in names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openood", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train", type=int, default=20_000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    a = parser.parse_args()
    workplace(a.work, a.data, a.train, a.test)
    lenet = ["--network.backbone.name", "lenet", "--num_workers", "1"]
    training = ["--optimizer.num_epochs", str(a.epochs), "--optimizer.lr", "0.001"]
    files = ("datasets/mnist/mnist.yml", "networks/tie_net.yml", "pipelines/train/train_tie.yml", "preprocessors/base_preprocessor.yml")
    seconds = {"train": run(a, *configs(a, *files), *lenet, *training)}
    checkpoint = f"results/mnist_tie_net_tie_e{a.epochs}_lr0.001_default/s0/best.ckpt"
    numbers: dict[str, dict] = {}
    for name in METHODS:
        files = ("datasets/mnist/mnist.yml", "datasets/mnist/mnist_tie_ood.yml", "sets.yml", "networks/tie_net.yml")
        files += ("pipelines/test/test_ood.yml", "preprocessors/base_preprocessor.yml", f"postprocessors/{name}.yml")
        options = ["--network.checkpoint", checkpoint, "--postprocessor.APS_mode", "False", *ARGUMENTS.get(name, [])]
        seconds[name] = run(a, *configs(a, *files), *lenet, *options)
        with open(a.work / f"results/mnist_tie_net_test_ood_ood_{name}_default/s0/ood/ood.csv") as f:
            numbers[name] = {row.pop("dataset"): {k: float(v) for k, v in row.items()} for row in csv.DictReader(f)}
        print(name, numbers[name]["nearood"], flush=True)
    command = " ".join(["python", *sys.argv]).replace(str(a.openood), "OPENOOD").replace(str(a.data), "DATA").replace(str(a.work), "WORK")
    packages = ("torch", "torchvision", "numpy", "scikit-learn", "faiss-cpu")
    record = {"openood": "3c35632", "train": a.train, "test": a.test, "epochs": a.epochs, "seed": 0, "seconds": seconds, "numbers": numbers}
    write_json(OUT / "mnist.json", {**record, **provenance(packages=packages), "command": command})
    page()


def page() -> None:
    """docs/openood.md, from the record."""
    r = json.loads((OUT / "mnist.json").read_text())
    sets = [*NEAR, *FAR]
    rows = []
    for name, of in r["numbers"].items():
        cells = {s: f"{of[s]['AUROC']:.2f} / {of[s]['FPR@95']:.2f}" for s in sets}
        rows.append({"postprocessor": name, "ACC": f"{of[sets[0]]['ACC']:.2f}", **cells, "s": f"{r['seconds'][name]:.0f}"})
    text = (
        "# TIE in OpenOOD's own main.py, on MNIST\n\n"
        f"Generated by `{r['command']}` at commit {r['commit'][:7]}, with the defaults of then, from "
        f"`docs/results/openood/mnist.json`; one seed, OpenOOD at {r['openood']}, torch "
        f"{r['versions']['torch']}, CPU.\n\n"
        f"One `tie_net` around OpenOOD's LeNet, trained by `trainer: tie` through its TrainPipeline on {r['train']} MNIST images for {r['epochs']} "
        f"epochs ({r['seconds']['train']:.0f} s), and this checkpoint scored by `pipelines/test/test_ood.yml` with TIE's and {len(rows) - 2} of its "
        f"own postprocessors at the parameters of their configs (no search, as that would need OOD data), {r['test']} images of each set. A cell is "
        "AUROC / FPR@95 as its `ood.csv` has them; ACC is over the n ID outputs, as it counts, of a small network whose "
        "training images OpenOOD's preprocessor also mirrors; s is the whole run.\n\n"
        "Its own postprocessors read the n ID outputs and the features of a network that was trained with a garbage class, so this shows that they "
        "run on it, not how they do on a network of their own.\n\n"
    )
    (HOUSE / "docs" / "openood.md").write_text(f"{text}{table(rows)}\n")


if __name__ == "__main__":
    main()
