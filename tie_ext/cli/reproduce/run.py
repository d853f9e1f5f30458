"""``tie-ext reproduce``: the paper's Tables 1 and 2, cell by cell, a line of JSON each.

A cell is one training: an ID set, a method of :mod:`tie_ext.cli.reproduce.comparison`, a seed. It
is scored on all OOD sets that are found: the paper's, nearer ones, since far sets saturate
(notMNIST; the classes left out of ``mnist:0-4``), and noise. No cell is run twice.
"""

import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from tie_ext.cli import data
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.flags import check_device, recipe_of, settings_of
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.cli.reproduce import comparison
from tie_ext.cli.reproduce.comparison import cell, check_method, has_garbage
from tie_ext.cli.reproduce.tables import CELLS, read_cells, tables
from tie_ext.cli.settings import ReproduceSettings
from tie_ext.cli.transform import Transform
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import ood_score, uncertainty
from tie_ext.training.recipe import Recipe
from tie_ext.utils.files import add_json_line, write_atomically
from tie_ext.utils.progress import Progress
from tie_ext.utils.settings import differences
from tie_ext.utils.views import frozen_view

BACKBONE = dict(
    zip(data.NAMES, ("conv3", "conv3", "conv5", "conv5", "residual", "residual"), strict=True)
)
"""The paper's network for each of its sets (section 6.1)."""
LEVEL_2 = ("UE", "ODIN", "energy", "MSP", "Mahalanobis", "ViM")
"""Detectors on the n ID outputs: the paper's five, and ViM."""
OURS = ("score", "max ID probability")
"""Those on all n+1 outputs."""
NOISE = {"noise": "gaussian", "uniform noise": "uniform", "sphere noise": "sphere"}
"""Noise as OOD sets: name in the tables and kind of :func:`tie_ext.cli.data.noise`."""


@dataclass(frozen=True, kw_only=True)
class Plan(ReproduceSettings):
    """What to run; tables say where images or epochs are fewer than the paper's.

    Raises:
        ValueError: If a set, method or seed is unknown or out of range.
    """

    recipe: Recipe = field(default_factory=Recipe)
    """The settings, which methods may change; each cell has its own seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.data:
            if _whole(name) not in data.NAMES:
                raise ValueError(
                    f"Expected a data set, one of {', '.join(data.NAMES)} or some of its classes "
                    f"(NAME:0-4), but got {name!r}"
                )
        for method in self.methods:
            check_method(method)

    def recipe_for(self, seed: int) -> Recipe:
        """The settings of a cell with a seed."""
        return replace(self.recipe, config=replace(self.recipe.config, seed=seed))

    def stem(self, name: str, method: str, seed: int) -> str:
        """The name of a cell's files."""
        size = f"{self.images or 'all'}x{self.recipe.config.epochs}"
        method = method.replace(",", "+").replace(":", "_")
        return f"{name.replace(':', '_')}-{size}-{method}-seed{seed}"


def run(flags: Namespace) -> None:
    """Run the plan that the flags give, and print what could not be run."""
    check_device(flags.device)
    plan = settings_of(Plan, vars(flags), recipe=recipe_of(vars(flags)))
    for reason in run_plan(plan, flags.out, flags.device, progress=True):
        print(f"not run: {reason}")
    print(f"tables: {flags.out / 'tables.md'}")


def run_plan(plan: Plan, out: Path, device: str = "cpu", progress: bool = False) -> list[str]:
    """Run the cells of a plan that ``out/cells.jsonl`` does not hold yet, and write
    ``out/tables.md`` from all that it then holds.

    A cell that was stopped resumes after its last finished epoch, from ``out/states``.

    Returns:
        What was not run, with the reason.

    Raises:
        ValueError: If a line of ``out/cells.jsonl`` is no cell, or one of the plan's has other
            settings.
    """
    path, missing = out / CELLS, set[str]()
    cells = {plan.stem(*key): key for key in product(plan.data, plan.methods, plan.seeds)}
    for stem, record in read_cells(path).items():
        if stem in cells:
            _check_settings(path, record, cells[stem][1], plan.recipe_for(cells[stem][2]))
    for stem, (name, method, seed) in Progress(cells.items(), "cells", disable=not progress):
        if stem in read_cells(path):  # read again: another process may have run it
            continue
        try:
            images = image_sets(name, seed, plan.images, plan.root, plan.download)
        except ValueError as error:
            missing.add(f"{name}: {error}")
            continue
        train, backbone = images.train, BACKBONE[_whole(name)]
        make = partial(BACKBONES[backbone], train.shape[0], len(train.classes))
        about = {"cell": stem, "data": name, "backbone": backbone}
        state = out / "states" / f"{stem}.safetensors"
        recipe = plan.recipe_for(seed)
        record, net = cell(method, make, images, recipe, about, device, progress, state)
        record["level2"] = level_2(net, images, has_garbage(method))
        # Five digits of each number, which makes files a third as large.
        rounded = json.loads(json.dumps(record), parse_float=lambda x: float(f"{float(x):.5g}"))
        add_json_line(path, rounded, "cell")
        state.unlink(missing_ok=True)
    write_atomically(out / "tables.md", tables(out).encode())
    return sorted(missing)


def _check_settings(path: Path, record: Mapping, method: str, recipe: Recipe) -> None:
    """Refuse a cell that was made with other settings than this plan's."""
    wanted, found = (
        {**(values := each.record()).pop("config"), **values}
        for each in (comparison.recipe_of(method, recipe), Recipe.of_record(record))
    )
    if not has_garbage(method):
        matter = ("epochs", "lr", "autocast_dtype", "seed")
        wanted, found = ({key: values[key] for key in matter} for values in (wanted, found))
    if other := differences(found, wanted):
        raise ValueError(
            f"Expected {record['cell']} in {path} to be a cell of these settings, but got one "
            f"with {other}; give another --out"
        )


def _whole(name: str) -> str:
    """The set that ``mnist:0-4`` is a part of."""
    return name.partition(":")[0]


def image_sets(
    name: str, seed: int, count: int | None = None, root: str = "data", download: bool = False
) -> RunImages:
    """The images of a cell: all OOD sets that are found.

    Arguments:
        name: ID set.
        seed: Seed of the subset.
        count: Training images, and a tenth as many of each OOD set; None for all.
        root: Where the sets are.
        download: Let torchvision download what is missing.

    Raises:
        ValueError: If the ID set is not there.
    """
    load = partial(data.load, root=root, download=download)
    images, test = load(name, "train"), load(name, "test")
    ood: dict[str, ImageSet] = {}
    if name != _whole(name):
        whole = load(_whole(name), "test")
        ood["other classes"] = whole.take(
            ~torch.isin(whole.y, torch.tensor([whole.classes.index(c) for c in test.classes]))
        )
    for other in (*data.NAMES, "notmnist"):
        if other != _whole(name):
            try:
                ood[other] = load(other, "test", shape=images.shape)
            except ValueError:
                continue  # its column stays empty
    for label, kind in NOISE.items():
        ood[label] = data.noise(kind, min(len(test), 10_000), images.shape)
    few = None if count is None else max(1, count // 10)
    ood = {label: of.first(few) for label, of in ood.items()}
    return RunImages(images.first(count, seed), test, ood, Transform.squash(images.shape))


def level_2(net: TIENet, images: RunImages, garbage: bool = True) -> dict:
    """The paper's Table 2: detectors on the n ID logits, over the OOD images that level 1 let
    through, and over all of them.

    Arguments:
        net: The network.
        images: The images; training images fit Mahalanobis and ViM.
        garbage: Whether the network has a garbage class; else level 1 lets everything through.

    Returns:
        ``{set: {"through": count, score: {"through": metrics or None, "all": metrics}}}``; None
        where fewer than two images came through, and only ``all`` without a garbage class.
        ``score`` is ours, ``max ID probability`` is minus the largest of the n ID probabilities
        among n+1 (Vernekar et al.). For the predecessor's claim, the largest of the n+1
        probabilities: ``least_confident_id`` of ID images that level 1 accepts, and
        ``most_confident_through`` of each set.
    """
    scores = _level_2_scores(net, images)
    known = scores.pop("id")
    found: dict = {}
    for name, of in scores.items():
        through = of["through"].bool()
        found[name] = {"through": int(through.sum()) if garbage else len(through)}
        for label, x in of.items():
            if label in LEVEL_2 or (garbage and label in OURS):
                found[name][label] = {"all": ood_metrics(known[label], x)}
                if garbage:
                    some = ood_metrics(known[label], x[through]) if through.sum() > 1 else None
                    found[name][label]["through"] = some
        if garbage:
            most = of["confidence"][through].max().item() if through.any() else None
            found[name]["most_confident_through"] = most
    if garbage:
        found["least_confident_id"] = known["confidence"][known["through"].bool()].min().item()
    return found


def _level_2_scores(net: TIENet, images: RunImages) -> dict[str, dict[str, Tensor]]:
    """Scores ``(N,)`` of each set on the CPU, which images level 1 lets ``through``, and their
    ``confidence``.
    """
    from pytorch_ood.detector import ODIN, EnergyBased, Mahalanobis, MaxSoftmax, ViM

    view, device = frozen_view(net), net.fc.weight.device
    odin, mahalanobis = ODIN(view), Mahalanobis(None).to(device)
    vim = ViM(None, net.feature_size // 2, net.fc.weight, net.fc.bias).to(device)
    with torch.no_grad():
        h = torch.cat([view.features(x.to(device)) for x, _ in ImageBatches(images.train)])
    for detector in (mahalanobis, vim):
        detector.fit_features(h, images.train.y.to(device))
    found: dict[str, dict[str, Tensor]] = {}
    for name, of in images.sets.items():
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for x, _ in ImageBatches(of):
            x = x.to(device)
            with torch.no_grad():
                logits, h = view.outputs(x)
            p, known = logits.softmax(1), logits[:, :-1]
            scores = {
                "score": ood_score(logits),
                "max ID probability": -p[:, :-1].amax(1),
                "UE": uncertainty(known.softmax(1)),
                "ODIN": odin.predict(x),
                "energy": EnergyBased.score(known),
                "MSP": MaxSoftmax.score(known),
                "Mahalanobis": mahalanobis.predict_features(h),
                "ViM": vim.predict_features(h),
                "through": logits.argmax(1) != net.num_classes,
                "confidence": p.amax(1),
            }
            for label, score in scores.items():
                parts[label].append(score.detach().cpu())
        found[name] = {label: torch.cat(each) for label, each in parts.items()}
    return found
