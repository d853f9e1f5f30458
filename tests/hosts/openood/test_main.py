"""OpenOOD's own ``main.py``, as a user runs it: training, attaching, scoring."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hosts.openood.conftest import CONFIGS, draw, lenet, run_openood

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
OURS = ("tie", "tie_ue", "tie_combined", "dmr")
THEIRS = (
    "msp ebo odin mls klm gen react dice ash scale mds rmds knn vim she nnguide fdbd gradnorm "
)
THEIRS += "relation nci iodin gram vra"
METHODS = [*OURS, *THEIRS.split()]
ARGUMENTS = {"vim": {"dim": 20}, "knn": {"K": 5}}
TWO = (
    "ood_dataset:\n  nearood:\n    datasets: [fashionmnist]\n  farood:\n    datasets: [cifar10]\n"
)
MANY = """
import json, random, runpy, sys
import numpy, torch
main, *runs = json.load(open("many.json"))
for run in runs:
    # SHE fails where no moved training image of a class is told right
    random.seed(0), numpy.random.seed(0), torch.manual_seed(0)
    sys.argv = [main, *run]
    runpy.run_path(main, run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as OpenOOD wants it to run in: data/ with a few drawn images and their lists."""
    place = tmp_path_factory.mktemp("openood")
    lists = place / "data" / "benchmark_imglist" / "mnist"
    lists.mkdir(parents=True)
    known = {"train_mnist": 240, "val_mnist": 40, "test_mnist": 60}
    others = ("test_fashionmnist", "test_cifar10", "val_notmnist")
    for name, count in {**known, **dict.fromkeys(others, 40)}.items():
        rows = draw(place / "data/images_classic", name, count, name in known, (28, 28))
        (lists / f"{name}.txt").write_text(rows)
    (place / "two.yml").write_text(TWO)
    (place / "many.py").write_text(MANY)
    return place


def arguments(root: Path, *configs: Path | str, **options) -> list[str]:
    """Arguments of main.py on the stand-ins for MNIST; a dot is written ``__``."""
    files = ["datasets/mnist/mnist.yml", "preprocessors/base_preprocessor.yml"]
    files = [root / "configs" / name for name in files]
    files[1:1] = [CONFIGS / "networks/tie_net.yml", *configs]
    options = {"network__backbone__name": "lenet", "num_workers": 0, **options}
    flags = [(f"--{name.replace('__', '.')}", str(value)) for name, value in options.items()]
    return ["--config", *map(str, files), *(word for flag in flags for word in flag)]


def main_py(root: Path, place: Path, *configs: Path | str, **options) -> str:
    command = ("-m", "tie_ext.openood", root / "main.py", *arguments(root, *configs, **options))
    return run_openood(root, place, *command)


def scoring(root: Path, place: Path, name: str) -> list[Path]:
    ood = [CONFIGS / "datasets/mnist/mnist_tie_ood.yml", place / "two.yml"]
    post = (CONFIGS if name in OURS else root / "configs") / "postprocessors" / f"{name}.yml"
    return [*ood, root / "configs/pipelines/test/test_ood.yml", post]


TRAIN = CONFIGS / "pipelines/train/train_tie.yml"
LESS = {
    "trainer__trainer_args__synthesizers__inversion__steps": 3,
    "trainer__trainer_args__candidates": 100,
}
SCORES = "results/mnist_tie_net_test_ood_ood_{}/s0/ood"


@pytest.fixture(scope="module")
def checkpoint(openood_root, place) -> Path:
    """A tie_net around OpenOOD's LeNet, trained by its own main.py."""
    # Enough for every class to be right sometimes: SHE averages over the correct images of each.
    enough = {"optimizer__num_epochs": 25, "optimizer__lr": 0.1}
    said = main_py(openood_root, place, TRAIN, **enough, **LESS)
    assert "Training Completed!" in said
    assert said.count("excluded") == 25
    return place / "results" / "mnist_tie_net_tie_e25_lr0.1_default" / "s0" / "best.ckpt"


def test_every_postprocessor_scores_the_checkpoint(openood_root, place, checkpoint):
    assert torch.load(checkpoint, weights_only=True)["tau"].isfinite()
    runs = []
    for name in METHODS:
        options = {"network__checkpoint": checkpoint, "merge_option": "merge"}
        options["postprocessor__APS_mode"] = False
        for key, value in ARGUMENTS.get(name, {}).items():
            options[f"postprocessor__postprocessor_args__{key}"] = value
        runs.append(arguments(openood_root, *scoring(openood_root, place, name), **options))
    (place / "many.json").write_text(json.dumps([str(openood_root / "main.py"), *runs]))
    run_openood(openood_root, place, "-m", "tie_ext.openood", "many.py")
    for name in METHODS:
        table = (place / SCORES.format(f"{name}_default") / "ood.csv").read_text().split()
        head, *rows = [line.split(",") for line in table]
        names = [row[0] for row in rows]
        assert (head[0], *names) == ("dataset", "fashionmnist", "nearood", "cifar10", "farood")
        assert all(0 <= float(value) <= 100 for row in rows for value in row[1:]), name


def test_search_on_the_validation_set(openood_root, place, checkpoint):
    options = {"network__checkpoint": checkpoint, "merge_option": "merge"}
    configs = scoring(openood_root, place, "ash")
    said = main_py(openood_root, place, *configs, **options, postprocessor__APS_mode=True)
    assert "Starting automatic parameter search" in said
    assert (place / SCORES.format("ash_default") / "ood.csv").exists()


def test_a_head_for_a_trained_network(openood_root, place):
    torch.save(lenet(10).state_dict(), place / "lenet.ckpt")
    attach = CONFIGS / "pipelines/train/attach_tie.yml"
    main_py(openood_root, place, attach, network__backbone__checkpoint="lenet.ckpt", seed=1)
    saved = place / "results/mnist_tie_net_attach_lenet_default/s1/best.ckpt"
    options = {"network__head": "multilayer", "network__checkpoint": saved}
    configs = scoring(openood_root, place, "tie")
    main_py(openood_root, place, *configs, **options, mark="attached")
    table = (place / SCORES.format("tie_attached") / "ood.csv").read_text().split()
    assert table[1].startswith("fashionmnist")
    # Noise, told by a head on a network that has learned nothing.
    assert float(table[1].split(",")[2]) > 90
    counting = openood_root / "configs/pipelines/test/test_acc.yml"
    said = main_py(openood_root, place, counting, **options)
    assert "Complete Evaluation, accuracy" in said


PROCESSES = """
import os, sys
import torch.distributed as dist
import torch.multiprocessing as mp

def work(rank, folder, arguments):
    import openood.utils.comm as comm
    from openood.pipelines import get_pipeline
    from openood.utils import setup_config
    import tie_ext.openood as ours

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    comm._LOCAL_PROCESS_GROUP = dist.group.WORLD
    sys.argv = arguments
    with ours.without_cuda(wanted=False):
        ours.register()
        get_pipeline(setup_config()).run()

if __name__ == "__main__":
    mp.spawn(work, args=(os.getcwd(), sys.argv), nprocs=2)
"""


def test_training_in_two_processes(openood_root, place):
    (place / "processes.py").write_text(PROCESSES)
    options = {"optimizer__num_epochs": 1, "num_gpus": 2, "mark": "two", **LESS}
    given = arguments(openood_root, TRAIN, **options)
    said = run_openood(openood_root, place, "processes.py", *given)
    assert said.count("Training Completed!") == 1  # the first process speaks for both
    assert (place / "results/mnist_tie_net_tie_e1_lr0.05_two/s0/best.ckpt").exists()


@pytest.mark.parametrize("arguments", [[], ["no_such_script.py"]])
def test_error_of_the_launcher_without_a_script(arguments):
    command = [sys.executable, "-m", "tie_ext.openood", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode
    assert "Expected attach or one of OpenOOD's scripts" in run.stderr
