"""The patches for OpenOOD: short, in its style, on the commit they name.

The patched trees train and score, with the numbers of tie_ext.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hosts.openood.conftest import draw

from patches.upstream import PATCHES, added, apply, cloned, git, other_than_pinned, python

slow = pytest.mark.slow
PLUG_INS, TIE = OURS = sorted(PATCHES.glob("openood/*.patch"))
CPU = Path(__file__).parents[2] / "tie_ext" / "openood" / "cpu.py"
NEW = [
    "openood/networks/tie_net.py",
    "openood/postprocessors/tie_postprocessor.py",
    "openood/trainers/tie_trainer.py",
    "openood/utils/plugins.py",
    "tests/unit/test_plugins.py",
]


@pytest.fixture(scope="module")
def patched(openood_root, tmp_path_factory) -> Path:
    """OpenOOD with both patches."""
    return apply(cloned(openood_root, tmp_path_factory.mktemp("patched") / "OpenOOD"), *OURS)


# What a reviewer sees first.


@pytest.mark.parametrize(
    ("patch", "lines", "files"),
    [(PLUG_INS, 87, 7), (TIE, 508, 15)],
    ids=lambda value: getattr(value, "stem", None),
)
def test_length_of_a_patch_without_our_names(patch, lines, files):
    found = added(patch)
    assert sum(map(len, found.values())) <= lines
    assert len(found) <= files
    assert "tie_ext" not in "\n".join(map("\n".join, found.values()))


@slow
def test_patches_apply_to_the_commit_named(openood_root, tmp_path):
    tree = cloned(openood_root, tmp_path / "OpenOOD")
    for patch in OURS:  # on its own, and one after the other
        assert not other_than_pinned(tree, PLUG_INS), (
            "this is not OpenOOD at the commit that patches/README.md names"
        )
        apply(tree, patch)
        git(tree, "reset", "-q", "--hard", "HEAD~1")
    apply(tree, *OURS)
    assert git(tree, "log", "--format=%s", "-2").splitlines() == [
        "Add TIE: training, inversion, exclusion",
        "Find trainers, networks and postprocessors of installed packages",
    ]


def revision(tree: Path, hook: str) -> str:
    """The version that OpenOOD's .pre-commit-config.yaml asks for of a tool."""
    before = (tree / ".pre-commit-config.yaml").read_text().partition(f"- id: {hook}\n")[0]
    return re.findall(r"rev: v?(\S+)", before)[-1]


@slow
@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("flake8", []),
        ("yapf", ["--diff"]),
        ("docformatter", ["--check", "--wrap-descriptions", "79"]),
        ("codespell", ["--ignore-words=codespell_ignored.txt"]),
        ("double-quote-string-fixer", []),
        ("isort", ["--check"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formatters_of_the_host_are_silent(patched, tool, arguments):
    if not shutil.which(tool):
        pytest.skip(
            f"no {tool} on the path: pip install flake8==3.8.3 yapf==0.30.0 docformatter==1.3.1 "
            "codespell==2.1.0 isort"
        )
    if tool in ("flake8", "yapf", "docformatter", "codespell"):
        said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
        if (wanted := revision(patched, tool)) not in said:
            pytest.skip(f"OpenOOD asks for {tool} {wanted}, but this is {said.strip()}")
    changed = [f"openood/{of}/utils.py" for of in ("networks", "postprocessors", "trainers")]
    files = [*NEW, *(changed if tool == "yapf" else [])]
    done = subprocess.run([tool, *arguments, *files], cwd=patched, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@slow
def test_training_config_has_our_defaults(patched):
    import yaml

    from tie_ext import TIEConfig
    from tie_ext.outliers import InversionSettings

    config = yaml.safe_load((patched / "configs/pipelines/train/train_tie_loop.yml").read_text())
    given, loop, inversion = config["trainer"]["trainer_args"], TIEConfig(), InversionSettings()
    named = {
        "generator_steps": "steps",
        "generator_batch_size": "batch_size",
        "generator_lr": "lr",
    }
    assert given == {
        name: getattr(loop, name, None) or getattr(inversion, named.get(name, name))
        for name in given
    }
    assert config["optimizer"] == {"name": "adam", "num_epochs": loop.epochs, "lr": loop.lr}


# By numbers what tie_ext is.


@slow
@pytest.mark.parametrize("backbone", ["lenet", "resnet18_32x32"])
def test_two_epochs_equal_ours_to_the_last_bit(patched, backbone):
    here = Path(__file__).parent
    found = json.loads(
        python(
            patched, str(here / "beside_tie_ext.py"), backbone, path=(here.parents[1],)
        ).splitlines()[-1]
    )
    assert found["equal"] == dict.fromkeys(
        ["loss", "tau", "pool", "generator", "weights", "of 100 classes", "scores"], True
    )
    # A threshold that divides nothing would prove little.
    assert backbone != "lenet" or any(0 < count < 52 for count in found["excluded"])


# Trained by its main.py, scored by its scripts.

LAUNCH = """
import json, runpy, sys

with runpy.run_path({cpu!r})['without_cuda'](wanted=False):
    sys.modules['tie_ext'] = None  # so that nothing of it can be imported
    import openood.evaluation_api.datasets as datasets, torch
    Loader = torch.utils.data.DataLoader
    datasets.DataLoader = lambda *args, **kwargs: Loader(*args, **{{**kwargs, 'num_workers': 0}})
    for sys.argv in json.load(open('runs.json')):
        runpy.run_path(sys.argv[0], run_name='__main__')
"""
SCORED = ["tie_loop", "msp", "react"]
NEAR, FAR = ["cifar100", "tin"], ["mnist", "svhn", "texture", "places365"]
OOD = [*NEAR, *FAR]


@pytest.fixture(scope="module")
def trained(patched) -> Path:
    """Two seeds of one epoch on a few images, scored as its scripts for CIFAR-10 do it."""
    lists = patched / "data/benchmark_imglist/cifar10"
    lists.mkdir(parents=True)
    known = {
        "train_cifar10": 20,
        **dict.fromkeys(("val_cifar10", "test_cifar10", "test_cifar10c"), 10),
    }
    for name in (*known, "val_tin", *(f"test_{ood}" for ood in OOD)):
        rows = draw(patched / "data/images_classic", name, known.get(name, 4), name in known)
        (lists / f"{name}.txt").write_text(rows)
    for folder in ("cifar10", *OOD):  # what is there is not downloaded
        (patched / "data/images_classic" / folder / "images").mkdir(parents=True)
    (command,) = re.findall(r"^python (main\.py.*?)\n\n?$", script(patched, "train"), re.M | re.S)
    small = "--dataset.train.batch_size 10 --optimizer.num_epochs 1 --num_workers 0"
    small += " --trainer.trainer_args.generator_steps 2 --merge_option merge"
    small += " --trainer.trainer_args.generator_batch_size 4 --trainer.trainer_args.candidates 11"
    runs = [
        [*command.replace("\\\n", "").replace("${SEED}", str(seed)).split(), *small.split()]
        for seed in range(2)
    ]
    (command,) = re.findall(
        r"^python (scripts/eval_ood\.py.*?)\n\n?$", script(patched, "test"), re.M | re.S
    )
    command = command.replace("\\\n", "").replace("_e20_", "_e1_").split()
    assert command[-4:] == ["--postprocessor", "tie_loop", "--save-score", "--save-csv"]
    runs += [[*command[:-3], name, "--save-csv"] for name in SCORED]
    (patched / "runs.json").write_text(json.dumps(runs))
    (patched / "launch.py").write_text(LAUNCH.format(cpu=str(CPU)))
    said = python(patched, "launch.py")
    assert said.count("Training Completed!") == 2
    return patched / "results" / "cifar10_tie_loop_net_tie_loop_e1_lr0.001_default"


def script(tree: Path, kind: str) -> str:
    """One of the scripts, for CIFAR-10, ending in an empty line."""
    path = tree / f"scripts/ood/tie_loop/{kind}_tie_loop.sh"
    return path.read_text().replace("${DATA}", "cifar10") + "\n"


@slow
def test_eval_ood_scores_every_seed_of_the_patch(trained):
    import pandas as pd

    assert sorted(path.name for path in trained.iterdir()) == ["ood", "s0", "s1"]
    for name in SCORED:
        table = pd.read_csv(trained / "ood" / f"{name}.csv", index_col=0)
        assert list(table.index) == [*NEAR, "nearood", *FAR, "farood"]
        assert table.map(lambda cell: 0 <= float(cell.split()[0]) <= 100).all(axis=None)
    ours = (trained / "ood" / "tie_loop.csv").read_text()
    assert ours != (trained / "ood" / "msp.csv").read_text()


@slow
def test_checkpoints_have_a_finite_tau(trained):
    import torch

    weights = []
    for folder in trained.glob("s*"):
        state = torch.load(folder / "best.ckpt", weights_only=True)
        assert state["tau"].isfinite()
        assert state["garbage.weight"].shape == (1, 512)
        weights.append(state["garbage.weight"])
    assert not torch.equal(*weights)


def test_names_hide_none_of_the_plug_in(patched):
    table = re.findall(
        r"^(\w+) = .tie_ext\.openood", (CPU.parents[2] / "pyproject.toml").read_text(), re.M
    )
    changed = "\n".join(map("\n".join, added(TIE).values()))
    assert {"tie", "attach", "tie_net"} <= set(table)
    assert not [name for name in table if f"'{name}'" in changed or f"name: {name}\n" in changed]


# Plug-ins.

PLUG = """
def of(kind):
    return type(kind, (), {'__init__': lambda self, *given: setattr(self, 'given', given)})
Trainer, Post = of('Trainer'), of('Post')
Post.config_path = __file__[:-3] + '.yml'
def network(config):
    import torch
    return torch.nn.Linear(config.size, 1)
"""
CALLS = """
import sys, torch
from torch.utils.data import DataLoader
from openood.evaluation_api.postprocessor import get_postprocessor as of_the_api
from openood.networks import get_network
from openood.postprocessors import get_postprocessor
from openood.trainers import get_trainer
from openood.utils.config import Config

of_net = {'name': 'plugged', 'size': 3, 'num_gpus': 0}
of_net |= {'pretrained': True, 'checkpoint': 'net.ckpt'}
net = get_network(Config(of_net))
assert torch.equal(net.weight, torch.ones(1, 3))  # its checkpoint is read as of a built-in
config = Config({'trainer': {'name': 'plugged'}, 'postprocessor': {'name': 'plugged'}})
loader = DataLoader([0])
assert get_trainer(net, loader, None, config).given == (net, loader, config)
assert get_trainer(net, [loader, loader], None, config).given == (net, loader, loader, config)
assert get_postprocessor(config).given == (config,)
import urllib.request
urllib.request.urlretrieve = None
post = of_the_api('nowhere', 'plugged', 'cifar10')
assert post.given[0].dataset.name == 'cifar10'
assert post.given[0].postprocessor.postprocessor_args.t == 0.5
assert post.APS_mode is True and post.hyperparam_search_done is False
config.trainer.name = config.postprocessor.name = 'other'
asked = [lambda: get_trainer(net, loader, None, config)]
asked += [lambda: get_network(Config({'name': 'other'})), lambda: get_postprocessor(config)]
asked += [lambda: of_the_api('.', 'other', 'cifar10')]
for ask in asked:
    try:
        ask()
    except KeyError as error:
        assert "'other' is neither built in" in str(error) and 'plugged' in str(error), error
    else:
        raise SystemExit('nothing was said of an unknown name')
from openood.postprocessors import BasePostprocessor
config.postprocessor.name = 'msp'
assert type(get_postprocessor(config)) is BasePostprocessor  # built-ins come first
print('called')
"""


def installed(folder: Path, name: str, entry_points: str) -> Path:
    """A folder that has a package's entry points as if it were installed there."""
    (folder / f"{name}-1.0.dist-info").mkdir(parents=True)
    (folder / f"{name}-1.0.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    )
    (folder / f"{name}-1.0.dist-info" / "entry_points.txt").write_text(entry_points)
    return folder


@pytest.fixture(scope="module")
def plugged(openood_root, tmp_path_factory) -> Path:
    """OpenOOD with the first patch alone."""
    return apply(cloned(openood_root, tmp_path_factory.mktemp("plugged") / "OpenOOD"), PLUG_INS)


@slow
def test_plug_ins_are_called_as_built_ins(plugged, tmp_path):
    import torch

    kinds = {"trainers": "Trainer", "networks": "network", "postprocessors": "Post"}
    points = (
        "".join(f"[openood.{kind}]\nplugged = plug:{name}\n" for kind, name in kinds.items())
        + "msp = plug:Post\n"
    )
    (installed(tmp_path, "plug", points) / "plug.py").write_text(PLUG)
    torch.save({"weight": torch.ones(1, 3), "bias": torch.zeros(1)}, plugged / "net.ckpt")
    (tmp_path / "plug.yml").write_text(
        "postprocessor:\n  APS_mode: True\n  postprocessor_args:\n    t: 0.5\n"
    )
    assert python(plugged, "-c", CALLS, path=(tmp_path,)).endswith("called\n")


OF_TIE_EXT = """
from torch.utils.data import DataLoader
from openood.networks import get_network
from openood.postprocessors import get_postprocessor
from openood.trainers import get_trainer
from openood.utils.config import Config, merge_configs
from tie_ext.openood import configs

files = ['networks/tie_net.yml', 'pipelines/train/train_tie.yml', 'postprocessors/tie.yml']
ours = [Config(str(configs() / file)) for file in files]
config = merge_configs(Config('configs/datasets/mnist/mnist.yml'), *ours)
config.num_gpus, config.trainer.trainer_args.pool_size = 0, 10
config.network.backbone.name = 'lenet'
config.parse_refs()
net = get_network(config.network)
trainer = get_trainer(net, DataLoader([0]), None, config)
from openood.evaluation_api.postprocessor import get_postprocessor as of_the_api
import tie_ext.openood
tie_ext.openood.unregister()  # so that only the entry points say the names
for name in ('tie', 'tie_ue', 'tie_combined', 'attach', 'dmr'):
    assert of_the_api('nowhere', name, 'cifar10').name == name
print(*[type(thing).__name__ for thing in (net, trainer, get_postprocessor(config))])
"""


@slow
def test_tie_ext_is_found_by_entry_points(plugged, tmp_path):
    table = re.findall(
        r'^\[project\.entry-points\."(openood\.\w+)"\]\n((?:\w+ = .*\n)+)',
        (CPU.parents[2] / "pyproject.toml").read_text(),
        re.M,
    )
    assert len(table) == 3
    points = "".join(f"[{group}]\n{lines}" for group, lines in table).replace('"', "")
    path = (installed(tmp_path, "tie_ext", points), CPU.parents[2])
    names = python(plugged, "-c", OF_TIE_EXT, path=path).split()[-3:]
    assert names == ["OpenOODTIENet", "OpenOODTIETrainer", "TIEPostprocessor"]
