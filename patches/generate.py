"""Writes the patches from our sources: ``python patches/generate.py OPENOOD_CHECKOUT PYTORCH_OOD_TREE``.

Each patch adds new files and inserts lines; it removes none and carries no line of upstream's (zero-context hunks, so that
``git apply --unidiff-zero`` is what applies them). Where a line goes is found in the checkout by what stands before or behind it.
"""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
HOUSE = HERE.parent
CORE = ("checks", "decision", "distributed", "exclusion", "files", "inversion", "metrics", "networks", "outliers", "synthesis", "training")
OPENOOD, PYTORCH_OOD = "OpenOOD, main at 3c35632 (2025-12-01)", "pytorch-ood 0.4.0 (source distribution on PyPI)"


class Tree:
    """An upstream tree in memory, and what was done to it since the last patch."""

    def __init__(self, root: Path):
        self.root, self.lines, self.new, self.inserted = root, {}, {}, {}

    def add(self, path: str, text: str, executable: bool = False) -> None:
        """A new file."""
        if (self.root / path).exists():
            raise SystemExit(f"Expected no {path} in {self.root}, but got one")
        self.new[path] = (text, executable)

    def insert(self, path: str, where: str, text: str, before: bool = False) -> None:
        """Lines behind (or before) the one line that matches a regular expression; at the start of the file for an empty one."""
        if path not in self.lines:
            self.lines[path] = (self.root / path).read_text().splitlines()
        lines = self.lines[path]
        hits = [i for i, line in enumerate(lines) if where and re.search(where, line)]
        if where and len(hits) != 1:
            raise SystemExit(f"Expected one line like {where!r} in {path}, but got {len(hits)}")
        at = (hits[0] + (0 if before else 1)) if where else 0
        added = text.splitlines()
        lines[at:at] = added
        marks = self.inserted.setdefault(path, [])
        marks[:] = [(start + len(added) if start >= at else start, count) for start, count in marks] + [(at, len(added))]

    def patch(self, subject: str, about: str, against: str) -> str:
        """What was added and inserted since the last one, as text that ``git apply --unidiff-zero`` takes."""
        parts = [f"Subject: {subject}\n\n{about.strip()}\n\nAgainst {against}; apply with `git apply --unidiff-zero`.\n---\n"]
        for path, (text, executable) in sorted(self.new.items()):
            lines = text.splitlines()
            head = f"diff --git a/{path} b/{path}\nnew file mode {'100755' if executable else '100644'}\n--- /dev/null\n+++ b/{path}\n"
            parts.append(head + f"@@ -0,0 +1,{len(lines)} @@\n" + "".join(f"+{line}\n" for line in lines))
        for path, marks in sorted(self.inserted.items()):
            parts.append(f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n")
            earlier = 0
            for start, count in sorted(marks):
                body = self.lines[path][start : start + count]
                parts.append(f"@@ -{start - earlier},0 +{start + 1},{count} @@\n" + "".join(f"+{line}\n" for line in body))
                earlier += count
        self.new, self.inserted = {}, {}
        return "".join(parts)


def source(path: str, package: str, relative: str | None = None) -> str:
    """One of our files, with the core where the host has it; imported relatively where a prefix says so."""
    text = (HOUSE / "tie_ext" / path).read_text()
    if relative is not None:
        text = re.sub(r"^from tie_ext\.", f"from {relative}", text, flags=re.M)
    text = re.sub(r"tie_ext\.(?=(" + "|".join(CORE) + r")\b)", f"{package}.", text)
    text = re.sub(r"tie_ext\.(?=[A-Za-z_]\w*`)", f"{package}.", text)  # references in docstrings
    return text


def core(tree: Tree, folder: str, package: str) -> None:
    """The method itself, as a package of the host's."""
    names = "TIEConfig, TIETrainer"
    about = '"""TIE (Training-Inversion-Exclusion), the method itself: knows nothing of what is around it."""'
    tree.add(f"{folder}/__init__.py", f"{about}\n\nfrom .networks import TIENet\nfrom .training import {names}\n")
    for room in CORE:
        if room != "outliers":
            tree.add(f"{folder}/{room}.py", source(f"{room}.py", package, "."))
    for path in sorted((HOUSE / "tie_ext" / "outliers").glob("*.py")):
        tree.add(f"{folder}/outliers/{path.name}", source(f"outliers/{path.name}", package, ".."))


def discovery(tree: Tree) -> str:
    """OpenOOD 1: plug-ins by entry points."""
    tree.add("openood/utils/plugins.py", PLUGINS)
    tree.insert("openood/trainers/utils.py", r"^from openood\.utils import Config", "from openood.utils.plugins import load_plugin")
    tree.insert(
        "openood/trainers/utils.py",
        r"if config\.trainer\.name in \['cider', 'npos'\]",
        "        if config.trainer.name not in trainers:\n"
        "            return load_plugin('trainers', config.trainer.name)(net, train_loader,\n"
        "                                                                config)",
        before=True,
    )
    tree.insert("openood/networks/utils.py", r"^import openood\.utils\.comm as comm", "from openood.utils.plugins import has_plugin, load_plugin")
    tree.insert(
        "openood/networks/utils.py",
        r"net = \{'encoder': encoder, 'bn': bn, 'decoder': decoder\}",
        "    elif has_plugin('networks', network_config.name):\n        net = load_plugin('networks', network_config.name)(network_config)",
    )
    tree.insert("openood/postprocessors/utils.py", r"^from openood\.utils import Config", "from openood.utils.plugins import load_plugin")
    tree.insert(
        "openood/postprocessors/utils.py",
        r"return postprocessors\[config\.postprocessor\.name\]",
        "    if config.postprocessor.name not in postprocessors:\n        return load_plugin('postprocessors', config.postprocessor.name)(config)",
        before=True,
    )
    api = "openood/evaluation_api/postprocessor.py"
    tree.insert(api, r"^from openood\.utils\.config import", "from openood.utils.plugins import has_plugin, load_plugin")
    tree.insert(
        api,
        r"id_data_name: str\):$",
        "    if postprocessor_name not in postprocessors and has_plugin(\n"
        "            'postprocessors', postprocessor_name):\n"
        "        return load_plugin('postprocessors', postprocessor_name)(None)",
    )
    return tree.patch(
        "[PATCH 1/3] Discover third-party trainers, networks and postprocessors by entry points",
        "A package that declares entry points in the groups openood.trainers, openood.networks or openood.postprocessors is found by the name\n"
        "in a config, without a change here. Built-in names come first. A trainer is called with (net, train_loader, config), a network with\n"
        "its config, a postprocessor with the config, or None from the evaluation API.",
        OPENOOD,
    )


def cpu(tree: Tree) -> str:
    """OpenOOD 2: no GPU."""
    text = source("openood/cpu.py", "openood.tie")
    tree.add("openood/cpu.py", text)
    tree.insert(
        "openood/__init__.py",
        "",
        "from .cpu import without_cuda\n\n_on_cpu = without_cuda(wanted=True)  # changes nothing where CUDA is\n_on_cpu.__enter__()",
    )
    return tree.patch(
        "[PATCH 2/3] Run on machines without CUDA",
        "Where torch.cuda.is_available() is false, .cuda() leaves tensors and modules where they are and torch.load reads onto the CPU; so every\n"
        "trainer, evaluator and postprocessor runs there. Nothing changes where there is a GPU.",
        OPENOOD,
    )


def tie(tree: Tree) -> str:
    """OpenOOD 3: the method."""
    core(tree, "openood/tie", "openood.tie")
    tree.add("openood/networks/tie_net.py", source("openood/network.py", "openood.tie").replace("OpenOODTIENet", "TIEWrapperNet"))
    tree.add("openood/trainers/tie_trainer.py", source("openood/trainer.py", "openood.tie"))
    post = source("openood/postprocessors.py", "openood.tie")
    tree.add("openood/postprocessors/tie_postprocessor.py", post.replace("from openood.postprocessors import", "from .base_postprocessor import"))
    for path in sorted((HOUSE / "openood_configs").rglob("*.yml")):
        tree.add(f"configs/{path.relative_to(HOUSE / 'openood_configs')}", path.read_text())
    for data, net in (("mnist", "lenet"), ("cifar10", "resnet18_32x32")):
        tree.add(f"scripts/ood/tie/{data}_train_tie.sh", TRAIN.format(data=data, net=net), executable=True)
        tree.add(f"scripts/ood/tie/{data}_test_ood_tie.sh", TEST.format(data=data, net=net), executable=True)
    tree.insert("openood/trainers/utils.py", r"^from \.ascood_trainer import", "from .tie_trainer import OpenOODTIETrainer")
    tree.insert("openood/trainers/utils.py", r"'ascood': ASCOODTrainer,", "            'tie': OpenOODTIETrainer,")
    tree.insert("openood/networks/utils.py", r"^from \.ascood_net import", "from .tie_net import tie_net")
    tree.insert(
        "openood/networks/utils.py",
        r"net = ASCOODNet\(backbone=backbone\)",
        "\n    elif network_config.name == 'tie_net':\n        net = tie_net(network_config)",
    )
    both = "from .tie_postprocessor import TIEPostprocessor, TIEUEPostprocessor"
    rows = "{0}'tie': TIEPostprocessor,\n{0}'tie_ue': TIEUEPostprocessor,"
    tree.insert("openood/postprocessors/__init__.py", r"^from \.base_postprocessor import", both)
    tree.insert("openood/postprocessors/utils.py", r"^from \.base_postprocessor import", both)
    tree.insert("openood/postprocessors/utils.py", r"^        'vra': VRAPostprocessor,", rows.format(" " * 8))
    api = "openood/evaluation_api/postprocessor.py"
    tree.insert(api, r"^from openood\.utils\.config import", "from openood.postprocessors import TIEPostprocessor, TIEUEPostprocessor")
    tree.insert(api, r"^    'vra': VRAPostprocessor,", rows.format(" " * 4))
    counts = "".join(f"    '{name}': {n},\n" for name, n in (("mnist", 10), ("fashionmnist", 10), ("svhn", 10), ("tinyimagenet", 200)))
    tree.insert("openood/postprocessors/info.py", r"^num_classes_dict", counts)
    script = "scripts/eval_ood.py"
    tree.insert(script, r"^from openood\.networks\.ascood_net import", "from openood.networks.tie_net import TIEWrapperNet")
    net = "    elif 'tie_net' in root:\n        net = TIEWrapperNet(model_arch(num_classes=num_classes),\n"
    net += "                            num_classes,\n                            low=[0] * 3,\n                            high=[1] * 3)"
    tree.insert(script, r"^        net = T2FNormNet\(", f"{net}  # its value range comes with the checkpoint")
    tree.insert("setup.py", r"^        'torchvision", "        'safetensors',")
    tree.insert("README.md", r"arXiv'25-ASCOOD-", README)
    return tree.patch(
        "[PATCH 3/3] TIE: Training-Inversion-Exclusion",
        "Trainer tie, network tie_net around any backbone, postprocessors tie (two-level score) and tie_ue, with configs and scripts; class\n"
        "counts of the data sets it is tested on, which MDS, RMDS, KLM, SHE, Gram and OpenMax look up.\n"
        "Suhail, Afroz, Sethi: TIE, arXiv:2512.00229.",
        OPENOOD,
    )


def detector(tree: Tree) -> str:
    """pytorch-ood: the detector, its documentation and its test."""
    core(tree, "src/pytorch_ood/tie", "pytorch_ood.tie")
    text = source("pytorch_ood.py", "pytorch_ood.tie", "..tie.").replace("from pytorch_ood.", "from ..")
    tree.add("src/pytorch_ood/detector/tie.py", text.replace("tie_ext detector", "pytorch-ood TIE detector"))
    tree.insert("src/pytorch_ood/detector/__init__.py", r"^from \.tscaling import", "from .tie import TIEDetector, UncertaintyEstimate", before=True)
    tree.insert("src/pytorch_ood/detector/__init__.py", r'^    "TemperatureScaling",', '    "TIEDetector",\n    "UncertaintyEstimate",')
    tree.add("docs/detectors/tie.rst", DOCS)
    tree.add("tests/detectors/test_tie.py", TESTS)
    return tree.patch(
        "[PATCH] TIEDetector: a garbage class trained by inversion, with a threshold of guaranteed false-alarm rate",
        "The detector over a network with n+1 outputs, what trains one, and the paper's uncertainty estimate for any n-class network.\n"
        "Suhail, Afroz, Sethi: TIE, arXiv:2512.00229. Needs safetensors for saving and tqdm for bars.",
        PYTORCH_OOD,
    )


PLUGINS = '''"""Third-party trainers, networks and postprocessors, found by the entry points of installed packages."""
from importlib.metadata import entry_points


def _found(kind):
    return {entry.name: entry for entry in entry_points(group=f'openood.{kind}')}


def has_plugin(kind, name):
    """Whether an installed package offers the name.

    Args:
        kind: 'trainers', 'networks' or 'postprocessors'.
        name: What a config says.
    """
    return name in _found(kind)


def load_plugin(kind, name):
    """What an installed package offers by the name.

    Raises:
        KeyError: If none does.
    """
    found = _found(kind)
    if name not in found:
        known = ', '.join(sorted(found)) or 'none'
        raise KeyError(f'Expected a built-in of {kind} or a plug-in '
                       f'({known} installed), but got {name}')
    return found[name].load()
'''
TRAIN = """#!/bin/bash
# sh scripts/ood/tie/{data}_train_tie.sh

python main.py \\
    --config configs/datasets/{data}/{data}.yml \\
    configs/networks/tie_net.yml \\
    configs/pipelines/train/train_tie.yml \\
    configs/preprocessors/base_preprocessor.yml \\
    --network.backbone.name {net} "$@"
"""
TEST = """#!/bin/bash
# sh scripts/ood/tie/{data}_test_ood_tie.sh --network.checkpoint results/.../best.ckpt

python main.py \\
    --config configs/datasets/{data}/{data}.yml \\
    configs/datasets/{data}/{data}_ood.yml \\
    configs/networks/tie_net.yml \\
    configs/pipelines/test/test_ood.yml \\
    configs/preprocessors/base_preprocessor.yml \\
    configs/postprocessors/tie.yml \\
    --network.backbone.name {net} "$@"
"""
README = (
    "> - [x] [![tie](https://img.shields.io/badge/arXiv'25-TIE-fdd7e6?style=for-the-badge)](https://arxiv.org/abs/2512.00229)"
    " &nbsp;&nbsp; ![training] &nbsp; ![postprocess]"
)
DOCS = """TIE
*****************************

.. autoclass:: pytorch_ood.detector.TIEDetector
    :members:

.. autoclass:: pytorch_ood.detector.UncertaintyEstimate
    :members:
"""
TESTS = """import tempfile
import unittest

import torch

from src.pytorch_ood.detector import EnergyBased, TIEDetector, UncertaintyEstimate
from src.pytorch_ood.tie import TIEConfig, TIENet, TIETrainer
from src.pytorch_ood.tie.networks import Conv3


class TestTIE(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.x, self.y = torch.rand(24, 1, 28, 28), torch.arange(24) % 3
        self.net = TIENet(Conv3(1, 3), 3, (1, 28, 28))

    def train(self):
        config = TIEConfig(epochs=1, candidates_per_class=4, pool_size=40, generator_steps=2, generator_width=4)
        TIETrainer(self.net, config).epoch([(self.x[:12], self.y[:12]), (self.x[12:], self.y[12:])])
        return TIEDetector(self.net.eval())

    def test_one_epoch_then_scores(self):
        detector = self.train()
        logits = self.net(self.x, garbage=True)
        want = logits[:, -1] + EnergyBased.score(logits[:, :-1])
        torch.testing.assert_close(detector(self.x), want)
        self.assertEqual(detector.decide(self.x).level.shape, (24,))

    def test_false_alarms(self):
        detector = TIEDetector(self.net.eval(), false_alarm=0.2).fit([(self.x, self.y)])
        self.assertEqual(int((detector.decide(self.x).level > 0).sum()), 4)

    def test_saved_and_loaded(self):
        detector = self.train()
        with tempfile.TemporaryDirectory() as folder:
            detector.save(folder)
            torch.testing.assert_close(TIEDetector.load(folder)(self.x), detector(self.x))

    def test_uncertainty_estimate(self):
        scores = UncertaintyEstimate(None).predict_logits(torch.tensor([[100.0, 0, 0], [1, 1, 1]]))
        torch.testing.assert_close(scores, torch.tensor([0.0, 1.0]))
"""


def generate(openood: Path | None, pytorch_ood: Path | None) -> dict[str, str]:
    """All patches by file name."""
    patches = {}
    if openood is not None:
        tree = Tree(openood)
        patches["openood/0001-discover-plug-ins.patch"] = discovery(tree)
        patches["openood/0002-run-without-cuda.patch"] = cpu(tree)
        patches["openood/0003-tie.patch"] = tie(tree)
    if pytorch_ood is not None:
        patches["pytorch-ood/0001-tie-detector.patch"] = detector(Tree(pytorch_ood))
    return patches


def main() -> None:
    """Write them beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("openood", type=Path, help=f"a checkout of {OPENOOD}")
    parser.add_argument("pytorch_ood", type=Path, help=f"the tree of {PYTORCH_OOD}")
    a = parser.parse_args()
    for name, text in generate(a.openood, a.pytorch_ood).items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_text(text)
        sys.stdout.write(f"{HERE / name}\n")


if __name__ == "__main__":
    main()
