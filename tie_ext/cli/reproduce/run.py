"""The paper's Tables 1 and 2, cell by cell: every pair of data sets, every method, every seed; a line of JSON a cell, and no cell twice.

A cell is one training: an ID set, a method of :mod:`tie_ext.cli.reproduce.comparison`, a seed. All OOD sets that are at hand are scored with it: the
paper's, and nearer ones, since far sets saturate (notMNIST; the classes that were left out of ``mnist:0-4``), and noise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tie_ext.cli import data
from tie_ext.cli.data import ImageBatches, Images, ImageSet
from tie_ext.cli.evaluation import all_logits, ood_metrics
from tie_ext.cli.reproduce.comparison import cell, check_method, has_garbage, recipe_of
from tie_ext.cli.reproduce.tables import CELLS, read_cells, tables
from tie_ext.cli.snapshots import to_bytes
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import TIENet
from tie_ext.outliers.inversion import Inversion
from tie_ext.scores.decision import ood_score, uncertainty
from tie_ext.training.config import TIEConfig
from tie_ext.training.recipe import Recipe
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.files import add_json_line, load_state, save_state, write_atomically, write_json
from tie_ext.utils.modules import frozen
from tie_ext.utils.random import seeded
from tie_ext.utils.settings import plain

BACKBONE = {
    "mnist": "conv3",
    "fashionmnist": "conv3",
    "svhn": "conv5",
    "cifar10": "conv5",
    "cifar100": "residual",
    "tinyimagenet": "residual",
}
"""The paper's network for each of its sets (section 6.1)."""

LEVEL_2 = ("UE", "ODIN", "energy", "MSP", "Mahalanobis", "ViM")
"""Detectors on the n ID outputs: the paper's five, and ViM."""
NOISE = {"noise": "gaussian", "uniform noise": "uniform", "sphere noise": "sphere"}
"""Noise as OOD sets: name in the tables and kind of :func:`tie_ext.cli.data.noise`."""


@dataclass(frozen=True)
class Plan:
    """What to run. The defaults are the paper's protocol; fewer images or epochs are labelled so in the tables."""

    root: str = "data"
    """Where the sets lie (:func:`tie_ext.cli.data.load`)."""
    sets: tuple[str, ...] = data.NAMES
    """ID sets, of :data:`tie_ext.cli.data.NAMES` or some of their classes (``mnist:0-4``); each is scored against all sets that are at hand."""
    methods: tuple[str, ...] = ("tie", "predecessor", "multiscale", "white", "plain")
    """Of :data:`tie_ext.cli.reproduce.comparison.METHODS`, or synthesizers by name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training each."""
    images: int | None = None
    """Train on a random subset of this many images, and score a tenth as many of each OOD set; all ID test images are scored."""
    download: bool = False
    """Let torchvision download what is missing."""
    recipe: Recipe = field(default_factory=Recipe)
    """The settings, as each method changes them; the seed is each cell's own."""


def run(plan: Plan, out: Path, device: str = "cpu", progress: bool = False) -> list[str]:
    """Run the cells of a plan that ``out/cells.jsonl`` does not hold yet, and write ``out/tables.md`` from all that it then holds.

    A cell that was stopped goes on after its last whole epoch, by ``out/states``.

    Returns:
        What was not run, with the reason.

    Raises:
        ValueError: If a set or method is unknown, a line of ``out/cells.jsonl`` is no cell, or one of the plan's is there with other settings.
    """
    for name in plan.sets:
        if _whole(name) not in data.NAMES:
            raise ValueError(
                f"Expected a data set, one of {', '.join(data.NAMES)} or some of its classes (NAME:0-4), but got {name!r}"
            )
    for method in plan.methods:
        check_method(method)
    missing: dict[str, str] = {}
    cells = {_stem(plan, *key): key for key in product(plan.sets, plan.methods, plan.seeds)}
    done = read_cells(out / CELLS)
    for stem, (_, method, seed) in cells.items():
        if stem in done:
            _check_settings(out / CELLS, done[stem], method, _with_seed(plan.recipe, seed))
    for stem, (name, method, seed) in tqdm(cells.items(), desc="cells", disable=not progress):
        if stem in read_cells(out / CELLS):  # read again, as another process may have been at it
            continue
        try:
            images, test, ood = image_sets(name, seed, plan.images, plan.root, plan.download)
        except ValueError as error:
            missing[name] = str(error)
            continue
        recipe = _with_seed(plan.recipe, seed)
        about = {"cell": stem, "data": name, "backbone": BACKBONE[_whole(name)]}
        backbone = partial(BACKBONES[about["backbone"]], images.shape[0], len(images.classes))
        keep = partial(_keep_inversions, out / "inversions" / f"{stem}.safetensors")
        state = out / "states" / f"{stem}.safetensors"
        record, net = cell(
            method,
            backbone,
            images,
            test,
            ood,
            recipe,
            about,
            device=device,
            progress=progress,
            after_epoch=keep,
            state=state,
        )
        record["level2"] = level_2(net, {"id": test, **ood}, images, garbage=has_garbage(method))
        net.save(out / "networks" / f"{stem}.safetensors")
        add_json_line(out / CELLS, record, "cell")
        state.unlink(missing_ok=True)
    _judge_inversions(out)
    _note_missing(out / "not_run.json", plan.sets, missing)
    write_atomically(out / "tables.md", tables(out).encode())
    return [f"{name}: {reason}" for name, reason in sorted(missing.items())]


def _stem(plan: Plan, name: str, method: str, seed: int) -> str:
    """What a cell's files are called."""
    return f"{name.replace(':', '_')}-{plan.images or 'all'}x{plan.recipe.config.epochs}-{method.replace(',', '+').replace(':', '_')}-seed{seed}"


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    return replace(recipe, config=replace(recipe.config, seed=seed))


def _check_settings(path: Path, record: Mapping, method: str, recipe: Recipe) -> None:
    """Refuse to take a cell that was made with other settings for one of this plan."""
    wanted, found = _flat(recipe_of(method, recipe).record()), _flat(record)
    matter = wanted.keys() if has_garbage(method) else {"epochs", "lr", "autocast_dtype", "seed"}
    other = [
        f"{key} {found.get(key)!r} instead of {wanted[key]!r}"
        for key in matter
        if found.get(key) != wanted[key]
    ]
    if other:
        said = f"Expected {record['cell']} in {path} to be a cell of these settings, but got one with {', '.join(sorted(other))}"
        raise ValueError(f"{said}; give another --out")


def _flat(record: Mapping) -> dict:
    """A recipe's record by names that an error can say; a setting that came after the record has its default."""
    flat = {
        **plain(TIEConfig()),
        **record["config"],
        "prior": record.get("prior"),
        "criterion": record.get("criterion"),
    }
    for name, settings in record.get("synthesizers", {}).items():
        flat |= {f"{name}.{key}": value for key, value in settings.items()}
    return flat


def _note_missing(path: Path, tried: Sequence[str], missing: Mapping[str, str]) -> None:
    """Keep which sets could not be loaded and why; one that could be, or has been run already, is taken off."""
    known = json.loads(path.read_text()) if path.exists() else {}
    now = {**{name: reason for name, reason in known.items() if name not in tried}, **missing}
    if now != known:
        write_json(path, now)


def _keep_inversions(path: Path, trainer: TIETrainer, per_class: int = 100) -> None:
    """Keep inversions of each ID class, asked for as in training, at the end of this epoch; the next one writes over them."""
    for synthesizer in trainer.synthesizers:
        if isinstance(synthesizer, Inversion):
            with seeded(len(trainer.log)):
                x, y = synthesizer.invert(
                    torch.arange(trainer.net.num_classes).repeat_interleave(per_class),
                    margin=0.0,
                )
            save_state(path, "inversions", {"x": to_bytes(trainer.net, x).cpu(), "y": y.cpu()})


def _judge_inversions(out: Path) -> None:
    """How many inversions each plain network of the same set and another seed takes for the class asked for: ``out/inversions.json``.

    What was judged before stays where its networks are no longer there: cells are kept for good, networks need not be.
    """
    before = (
        json.loads((out / "inversions.json").read_text())
        if (out / "inversions.json").exists()
        else {}
    )
    found: dict[str, dict[str, float]] = {name: dict(by) for name, by in before.items()}
    done = read_cells(out / CELLS)
    for path in sorted((out / "inversions").glob("*.safetensors")):
        if path.stem not in done:
            continue  # another process is still at it
        state = load_state(path, "inversions")
        name, _, _, seed = path.stem.rsplit("-", 3)  # the stem of a cell, see _stem
        for judge in sorted((out / "networks").glob(f"{name}-*-plain-*.safetensors")):
            if not judge.stem.endswith(seed):
                logits = all_logits(TIENet.load(judge), ImageSet(state["x"], state["y"]))[:, :-1]
                found.setdefault(path.stem, {})[judge.stem] = (
                    (logits.argmax(1) == state["y"]).double().mean().item()
                )
    if found != before:
        write_json(
            out / "inversions.json",
            {name: dict(sorted(by.items())) for name, by in sorted(found.items())},
        )


def _whole(name: str) -> str:
    """The set that ``mnist:0-4`` is a part of."""
    return name.partition(":")[0]


def image_sets(
    name: str, seed: int, count: int | None = None, root: str = "data", download: bool = False
) -> tuple[Images, Images, dict[str, Images]]:
    """The images of a cell.

    Arguments:
        name: ID set.
        seed: Of the subset.
        count: Training images; a tenth as many of each OOD set. None for all.
        root: Where the sets lie.
        download: Let torchvision download what is missing.

    Returns:
        ID training images, ID test images, and every OOD set that is at hand, by name.

    Raises:
        ValueError: If the ID set is not there.
    """
    images = data.load(name, "train", root, download=download)
    test = data.load(name, "test", root, download=download)
    ood = {}
    if name != _whole(name):
        whole = data.load(_whole(name), "test", root, download=download)
        ood["other classes"] = whole.without([whole.classes.index(c) for c in test.classes])
    for other in (*data.NAMES, "notmnist"):
        if other != _whole(name):
            try:
                ood[other] = data.load(other, "test", root, images.shape, download)
            except ValueError:
                continue  # its column stays empty
    ood |= {
        label: data.noise(kind, min(len(test), 10_000), images.shape)
        for label, kind in NOISE.items()
    }
    few = None if count is None else max(1, count // 10)
    return images.first(count, seed), test, {label: of.first(few) for label, of in ood.items()}


def level_2(net: TIENet, sets: Mapping[str, Images], fit_on: Images, garbage: bool = True) -> dict:
    """The paper's Table 2: detectors on the n ID logits, over the OOD images that level 1 let through, and over all of them.

    Arguments:
        net: The network.
        sets: Test images by name; the ID ones are called ``id``.
        fit_on: ID training images, for Mahalanobis and ViM.
        garbage: The network has learned a garbage class; else level 1 lets everything through.

    Returns:
        ``{set: {"through": count, score: {"through": metrics or None, "all": metrics}}}``; None where fewer than two images came through.
        ``score`` is ours, ``max ID probability`` is minus the largest of the n ID probabilities among n+1 (Vernekar et al.).
        And what the predecessor's claim compares: ``least_confident_id`` among ID images that level 1 accepts, and for each set
        ``most_confident_through``; the largest of the n+1 probabilities.
    """
    from pytorch_ood.detector import ODIN, EnergyBased, Mahalanobis, MaxSoftmax, ViM

    device = net.fc.weight.device
    odin, mahalanobis = ODIN(net), Mahalanobis(None).to(device)
    vim = ViM(None, net.feature_size // 2, net.fc.weight, net.fc.bias).to(device)
    values: dict[str, dict[str, Tensor]] = {}
    with frozen(net):
        features = torch.cat([net.features(x.to(device)) for x, _ in ImageBatches(fit_on, 500)])
        mahalanobis.fit_features(features, fit_on.y.to(device))
        vim.fit_features(features, fit_on.y.to(device))
        for name, images in sets.items():
            parts = [net.outputs(x.to(device)) for x, _ in ImageBatches(images, 500)]
            logits, h = (torch.cat(part) for part in zip(*parts, strict=True))
            p = logits.softmax(1)
            values[name] = {
                "UE": uncertainty(logits[:, :-1].softmax(1)),
                "ODIN": torch.cat(
                    [odin.predict(x.to(device)).detach() for x, _ in ImageBatches(images, 500)]
                ),
                "energy": EnergyBased.score(logits[:, :-1]),
                "MSP": MaxSoftmax.score(logits[:, :-1]),
                "Mahalanobis": mahalanobis.predict_features(h),
                "ViM": vim.predict_features(h),
                "through": torch.ones(len(p), dtype=torch.bool),
            }
            if garbage:
                through = logits.argmax(1) != net.num_classes
                values[name] |= {
                    "score": ood_score(logits),
                    "max ID probability": -p[:, :-1].amax(1),
                    "through": through,
                    "confidence": p.amax(1),
                }
    values = {name: {label: v.cpu() for label, v in of.items()} for name, of in values.items()}
    labels = ("score", "max ID probability", *LEVEL_2) if garbage else LEVEL_2
    found: dict = {}
    for name in sets:
        if name != "id":
            through = values[name]["through"]
            found[name] = {label: _metrics(values, label, name, through) for label in labels}
            found[name] |= {"through": int(through.sum())}
            if garbage:
                found[name]["most_confident_through"] = (
                    values[name]["confidence"][through].max().item() if through.any() else None
                )
    if garbage:
        found["least_confident_id"] = (
            values["id"]["confidence"][values["id"]["through"]].min().item()
        )
    return found


def _metrics(
    values: Mapping[str, Mapping[str, Tensor]], label: str, name: str, through: Tensor
) -> dict:
    inside = (
        ood_metrics(values["id"][label], values[name][label][through])
        if int(through.sum()) > 1
        else None
    )
    return {"through": inside, "all": ood_metrics(values["id"][label], values[name][label])}
