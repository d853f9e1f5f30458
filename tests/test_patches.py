"""The patches apply to the upstream trees they name, and the patched trees train an epoch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[1] / "patches"
OURS = sorted(PATCHES.glob("openood/*.patch"))


def apply(tree: Path, patches: list[Path]) -> None:
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    for patch in patches:
        run = subprocess.run(["git", "apply", "--unidiff-zero", str(patch)], cwd=tree, capture_output=True, text=True)
        assert run.returncode == 0, f"{patch.name}: {run.stderr}"


def copy(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to, ignore=shutil.ignore_patterns(".git", "data", "results", "__pycache__")))


@pytest.mark.parametrize("patch", OURS, ids=lambda p: p.stem)
def test_a_patch_only_adds(patch):
    body = patch.read_text().partition("\n---\n")[2]
    for line in body.splitlines():
        assert line.startswith(("+", "@@ -", "diff --git ", "new file mode ", "--- a/", "--- /dev/null")), line
    assert len(re.findall(r"^@@ -\d+,0 ", body, re.M)) == body.count("\n@@ ")


def environment(tree: Path) -> dict:
    return {**os.environ, "PYTHONPATH": str(tree)}


def train(tree: Path, place: Path, mark: str, steps: str) -> str:
    configs = [
        "datasets/mnist/mnist.yml",
        "networks/tie_net.yml",
        "pipelines/train/train_tie.yml",
        "preprocessors/base_preprocessor.yml",
    ]
    ours = PATCHES.parent / "openood_configs"
    paths = [str(tree / "configs" / c if (tree / "configs" / c).exists() else ours / c) for c in configs]
    options = ["--optimizer.num_epochs", "1", "--num_workers", "0", "--mark", mark, "--network.backbone.name", "lenet"]
    less = [f"--trainer.trainer_args.{steps}", "2", "--trainer.trainer_args.candidates_per_class", "10"]
    command = [sys.executable, "-W", "ignore", str(tree / "main.py"), "--config", *paths, *options, *less]
    run = subprocess.run(command, cwd=place, env=environment(tree), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Training Completed!" in run.stdout
    return run.stdout


def test_the_patched_openood_trains_tie_by_itself(openood_root, workplace, tmp_path):
    tree = copy(openood_root, tmp_path / "tree")
    apply(tree, [p for p in OURS if p.parent.name == "openood"])
    train(tree, workplace, "patched", "generator_steps")
    checkpoint = workplace / "results/mnist_tie_net_tie_e1_lr0.001_patched/s0/best.ckpt"
    code = (
        "import sys; sys.modules['tie_ext'] = None\n"  # so that nothing of it can be imported
        "import torch, openood.pipelines\n"
        "from openood.networks import get_network\n"
        "from openood.postprocessors import get_postprocessor\n"
        "from openood.evaluation_api.postprocessor import postprocessors\n"
        "from openood.utils.config import Config, merge_configs\n"
        f"files = ['datasets/mnist/mnist.yml', 'networks/tie_net.yml', 'postprocessors/tie.yml']\n"
        f"config = merge_configs(Config(num_gpus=1), *[Config('{tree}/configs/' + f) for f in files])\n"
        "config.network.backbone.name = 'lenet'; config.network.pretrained = True\n"
        f"config.network.checkpoint = '{checkpoint}'\n"
        "config.num_workers = config.num_machines = 1; config.parse_refs()\n"
        "net = get_network(config.network).eval()\n"
        "pred, conf = get_postprocessor(config).postprocess(net, torch.rand(2, 3, 28, 28))\n"
        "from openood.networks.lenet import LeNet\n"
        "from openood.networks.tie_net import TIEWrapperNet\n"  # as the patched scripts/eval_ood.py builds it
        "again = TIEWrapperNet(LeNet(10), 10, low=[0] * 3, high=[1] * 3)\n"
        "again.load_state_dict(torch.load(config.network.checkpoint))\n"
        "assert again.high.flatten().tolist() == [1, 1, 1] and again.low.flatten().tolist() == [-1, -1, -1]\n"
        f"compile(open('{tree}/scripts/eval_ood.py').read(), 'eval_ood.py', 'exec')\n"
        "assert conf.shape == (2,) and {'tie', 'tie_ue'} <= set(postprocessors)\n"
        "print('scored')"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=workplace, env=environment(tree), capture_output=True, text=True)
    assert run.stdout.endswith("scored\n"), run.stderr[-3000:]


def test_an_openood_that_discovers_plug_ins_finds_the_installed_tie_ext(openood_root, workplace, tmp_path):
    from importlib.metadata import entry_points

    if not entry_points(group="openood.trainers"):
        pytest.skip("tie_ext is not installed, so it has no entry points")
    tree = copy(openood_root, tmp_path / "tree")
    apply(tree, [p for p in OURS if p.parent.name == "openood"][:2])
    train(tree, workplace, "found", "synthesizers.inversion.steps")
