"""One detector beside every single score, on networks that others trained.

    python tests/bench/public_networks.py --images DATA --cache CACHE --out OUT

DATA holds packed image sets and, in ``networks/``, weights (public_data.py). Each *run*, a
network with a seed of head and of the images fitted on, is judged once and leaves
``NETWORK-seedN.json`` in OUT, docs/results/public_networks; ``regret.json`` there sums them up,
and tables.py makes a page of them. Everything that is slow stays in CACHE, and a second call goes
on where the first one stopped:

* ``passes/BACKBONE/SET.safetensors``, one pass over an image set: ``features (N, F)``,
  ``statistics (N, S)`` of every layer, as a garbage head reads them, and ``labels (N,)``;
* ``runs/NETWORK-seedN/head.safetensors``, the head that attach fitted;
* ``runs/NETWORK-seedN/scores.safetensors``: ``scores/NAME/SET (N,)``, larger = more OOD,
  ``features/SET``, ``logits/SET``, ``labels/SET``, ``rows/SET`` of the pass (``sources.json``
  says of which), and the last layer, ``weight`` and ``bias``. SET is ``fit``, ``calibration``
  (held-out ID images), ``test`` (ID) or an OOD set. Scores have no ``fit``; ``failed.json`` says
  what has none;
* ``runs/NETWORK-seedN/gradients.safetensors``, of the first seed: the same of ODIN, Gram and NAC,
  on the first images of each set alone.

**Worst regret.** For each network, and for its near and its far sets apart: AUROC of what
``combine`` gives minus that of the best single rival of that very column, chosen by looking at
it; each AUROC is averaged over sets, seeds and choices of classes before they are compared.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache as cached
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import public_data
import rivals
import torch
import torch.nn.functional as F
from public_data import Images
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tie_ext import TIENet
from tie_ext.cli.batches import shifted
from tie_ext.cli.classifier import classifier
from tie_ext.models.backbones import Conv3
from tie_ext.scores.threshold import conformal_threshold
from tie_ext.utils.provenance import provenance
from tie_ext.utils.random import seeded

SEEDS = (0, 1, 2)
CHOICES = 5
"""Random choices of the classes that are ID, each with a seed of its own."""
FIT, HELD = 10_000, 2000
"""Images of a small network to fit on, and held out of its ID test images for calibration."""
FEW = 100
"""Images of a set that is far from photographs, and from another kind of picture."""
SMALL_FAR = ("mnist-test", "fashionmnist-test", "notmnist", "gaussian", "uniform")
VALIDATION = ("tin-val", "glyphs", "photos")
PHOTOS_FAR = ("photos_receipts", "photos_blood", "photos_satellite", "photos_scenes")


class Backbone(NamedTuple):
    """A network as its authors left it, and how it takes images."""

    make: Callable[[Path, Path], nn.Module]
    """Of the folders of images and of the cache."""
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    sets: Mapping[str, int | None]
    """Most images of each set that is passed through it."""
    parts: Callable[[nn.Module], tuple[list, list, nn.Module]]
    """Stages that each take what the one before gives, the modules they end in, and what makes
    logits of the last maps."""

    @property
    def range(self) -> tuple[list[float], list[float]]:
        """Smallest and largest value of its images, by channel."""
        pairs = list(zip(self.mean, self.deviation, strict=True))
        return [(0 - m) / s for m, s in pairs], [(1 - m) / s for m, s in pairs]

    def read(self, root: Path, name: str) -> Images:
        """An image set as it takes them."""
        return public_data.read(root, name, self.size, len(self.mean), self.sets[name])

    def batches(self, images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images and labels, channels last, which a CPU does best with."""
        middle, deviation = (torch.tensor(of).view(-1, 1, 1) for of in (self.mean, self.deviation))
        for x, y in zip(images.x.split(size), images.y.split(size), strict=True):
            x = (x.float() / 255 - middle) / deviation
            yield x.contiguous(memory_format=torch.channels_last), y

    @property
    def batch(self) -> int:
        """Images of a batch."""
        return 128 if self.size < 100 else 32


def public(name: str, blocks: int, num_classes: int, project: bool = False) -> Callable:
    """Who makes a public ResNet, of the folders of images and of the cache."""

    def make(root: Path, cache: Path) -> nn.Module:
        path = root / "networks" / f"{name}.safetensors"
        return public_data.resnet(path, blocks, num_classes, project)

    return make


def small_sets(own: str, near: Sequence[str]) -> dict[str, int | None]:
    """The sets of a network for 32 pixels."""
    some = {
        **dict.fromkeys(near, 3000),
        **dict.fromkeys(SMALL_FAR, 2000),
        **dict.fromkeys(VALIDATION, 1000),
    }
    return {f"{own}-train": None, f"{own}-test": None, **some}


def conv3(own: str, root: Path, cache: Path) -> nn.Module:
    """The paper's CNN, trained here once."""
    path = cache / "networks" / f"{own}-conv3.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with seeded(0):
            net = TIENet(Conv3(1, 10), 10, (1, 28, 28))
        with torch.enable_grad():
            train(net, public_data.read(root, f"{own}-train", 28, 1, 2 * FIT))
        net.save(path)
    return classifier(TIENet.load(path))


def train(net: nn.Module, images: Images, epochs: int = 5, size: int = 128) -> None:
    """Cross-entropy by SGD with one cycle of the learning rate, images shifted."""
    optimizer = torch.optim.SGD(
        net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(images.y) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    net.train()
    for epoch in range(epochs):
        with seeded(0, epoch):
            for rows in torch.randperm(len(images.y)).split(size):
                x = shifted(images.x[rows], images.x.shape[-1] // 8).float() / 255
                optimizer.zero_grad()
                F.cross_entropy(net(x), images.y[rows]).backward()
                optimizer.step()
                schedule.step()
    net.eval()


PHOTO_SETS = {
    **dict.fromkeys(("photos_imagenet", "photos_flowers", "photos_trash", *PHOTOS_FAR)),
    **dict.fromkeys(("fashionmnist-test", "mnist-test", *VALIDATION), FEW),
}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
OF_CIFAR10, OF_CIFAR100 = (
    small_sets(own, (f"{other}-test", "tin-test"))
    for own, other in (("cifar10", "cifar100"), ("cifar100", "cifar10"))
)


GREY_OTHERS = ("notmnist", "cifar10-test", "tin-test", "gaussian", "uniform")


def grey(own: str, other: str) -> Backbone:
    """The project's CNN on grey images."""
    sets = {
        f"{own}-train": 2 * FIT,
        f"{own}-test": None,
        **dict.fromkeys((f"{other}-test", *GREY_OTHERS), 2000),
    }
    return Backbone(
        partial(conv3, own),
        28,
        (0.0,),
        (1.0,),
        sets | dict.fromkeys(VALIDATION, 1000),
        conv3_parts,
    )


def conv3_parts(net: nn.Module) -> tuple[list, list, nn.Module]:
    """As :attr:`Backbone.parts` asks for them."""
    stages = [net.conv[:4], net.conv[4:8], net.conv[8:12]]
    return (
        stages,
        [stage[-1] for stage in stages],
        nn.Sequential(net.conv[12:], net.hidden, net.fc),
    )


def resnet_parts(net: nn.Module) -> tuple[list, list, nn.Module]:
    """As :attr:`Backbone.parts` asks for them."""
    return net.stages(), [net.layer1, net.layer2, net.layer3], pooled(net.linear)


def efficientnet_parts(net: nn.Module) -> tuple[list, list, nn.Module]:
    """As :attr:`Backbone.parts` asks for them."""
    return (
        public_data.efficientnet_stages(net),
        [net._blocks[i] for i in (4, 10, 15)],
        pooled(net._fc),
    )


def pooled(fc: nn.Linear) -> nn.Module:
    """Logits of the last maps."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc)


RESNET20, RESNET56 = (
    public("cifar10_resnet20_akamaster", 3, 10),
    public("cifar10_resnet56_akamaster", 9, 10),
)
RESNET14 = public("cifar100_resnet14_vitor-op", 2, 100, True)
BACKBONES = {
    "cifar10-resnet20": Backbone(RESNET20, 32, *IMAGENET, OF_CIFAR10, resnet_parts),
    "cifar10-resnet56": Backbone(RESNET56, 32, *IMAGENET, OF_CIFAR10, resnet_parts),
    "cifar100-resnet14": Backbone(RESNET14, 32, *CIFAR100, OF_CIFAR100, resnet_parts),
    "efficientnet-lite0": Backbone(
        lambda root, cache: public_data.efficientnet(),
        224,
        (0.498,) * 3,
        (0.502,) * 3,
        PHOTO_SETS,
        efficientnet_parts,
    ),
    "mnist-conv3": grey("mnist", "fashionmnist"),
    "fashionmnist-conv3": grey("fashionmnist", "mnist"),
}


# What is measured.


def reader(model: nn.Module, backbone: Backbone, num_classes: int):
    """The network with a head on every layer that has learned nothing yet."""
    shape = (len(backbone.mean), backbone.size, backbone.size)
    return TIENet(model, num_classes, shape, *backbone.range, head="multilayer").eval()


def fitted_head(
    model: nn.Module, backbone: Backbone, num_classes: int, batches: list, seed: int
) -> dict[str, Tensor]:
    """Weights of the head that attach fits, and what it keeps of training images."""
    from tie_ext import attach

    net = attach(model, batches, num_classes, *backbone.range, seed=seed)
    kept = {"train_features": net.train_features, "train_labels": net.train_labels}
    return net.garbage.state_dict() | {name: of for name, of in kept.items() if of is not None}


@torch.no_grad()
def own_scores(
    net, head: Mapping[str, Tensor], seen: Mapping[str, "Seen"]
) -> tuple[dict[str, dict[str, Tensor]], float]:
    """Scores by name and set of the head, of combine's KNN and of what combine gives, and the
    threshold of the latter."""
    from tie_ext import Combined
    from tie_ext.pytorch_ood.members import Outputs
    from tie_ext.pytorch_ood.recommended import chosen_members, fit_chosen
    from tie_ext.pytorch_ood.sample import kept_sample

    head = dict(head)
    net.keep_training(head.pop("train_features"), head.pop("train_labels", None))
    net.garbage.load_state_dict(head)

    def outputs(of: Seen) -> Outputs:
        pairs = zip(of.features.split(2000), of.statistics.split(2000), strict=True)
        every = torch.cat([net.all_logits(*pair) for pair in pairs])
        return Outputs(every[:, :-1], of.features, every)

    given = {name: outputs(of) for name, of in seen.items()}
    del given["fit"]
    sample = kept_sample(net)
    members = chosen_members(sample, None, (net.fc.weight, net.fc.bias))
    held = [(given["calibration"], seen["calibration"].labels)]
    combined = fit_chosen(Combined(members), sample, held)
    scores = {
        OURS[0]: {
            name: combined.predict_scores(combined.score_outputs(of)) for name, of in given.items()
        },
        OURS[1]: {name: members[0].predict_logits(of.all_logits) for name, of in given.items()},
        OURS[2]: {name: members[1].predict_features(of.features) for name, of in given.items()},
    }
    return scores, float(combined.threshold)


OURS = ("combine", "attach", "combine's KNN")
"""What is no rival; the first is what is judged."""


# Runs.


class Part(NamedTuple):
    """Some images of a pass."""

    source: str
    rows: Tensor
    labels: Tensor


class Seen(NamedTuple):
    """What a backbone gives for them."""

    features: Tensor
    statistics: Tensor
    labels: Tensor


class Network(NamedTuple):
    """A classifier that is judged."""

    backbone: str
    parts: Callable[[int, Mapping[str, Tensor]], dict[str, Part]]
    """Of a seed and the labels of each image set: what is ``fit`` on, ``calibration``, ``test``,
    and OOD sets."""
    near: tuple[str, ...]
    far: tuple[str, ...]
    num_classes: int
    seeds: Sequence[int] = SEEDS
    linear: bool = False
    """Its last layer is learned here, on what is fitted on."""


def order(count: int, seed: int) -> Tensor:
    """A random order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def whole(labels: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Part]:
    """OOD sets, all images of each."""
    return {
        name: Part(name, torch.arange(len(labels[name])), torch.full_like(labels[name], -1))
        for name in names
    }


def three(of: str, rows: Sequence[Tensor], labels: Tensor) -> dict[str, Part]:
    """Images to fit on, for calibration and to test."""
    names = ("fit", "calibration", "test")
    return {n: Part(of, some, labels[some]) for n, some in zip(names, rows, strict=True)}


def small_parts(own: str, seed: int, labels: Mapping[str, Tensor]) -> dict[str, Part]:
    """Nine tenths of the training images at most, held-out and test images of the ID test set."""
    train, test = f"{own}-train", f"{own}-test"
    fit = order(len(labels[train]), seed)[: min(FIT, len(labels[train]) * 9 // 10)]
    held, judged = order(len(labels[test]), 0).tensor_split([HELD])
    own_test = three(test, (held[:0], held, judged), labels[test])
    others = whole(labels, [name for name in labels if not name.startswith(f"{own}-")])
    return own_test | {"fit": Part(train, fit, labels[train][fit])} | others


def imagenet_parts(seed: int, labels: Mapping[str, Tensor]) -> dict[str, Part]:
    """One image of each class: 600 to fit on, 200 held out, 200 to test."""
    of = "photos_imagenet"
    rows = order(len(labels[of]), seed).tensor_split([600, 800])
    return three(of, rows, labels[of]) | whole(labels, (*PHOTOS_FAR, *VALIDATION))


def chosen_parts(
    of: str, known: int, far: Sequence[str], seed: int, labels: Mapping[str, Tensor]
) -> dict[str, Part]:
    """A random choice of the classes, two thirds of their images to fit on, a ninth held out; near
    is what was left out."""
    classes = order(int(labels[of].max()) + 1, seed)
    label = torch.full_like(classes, -1)
    label[classes[:known].sort().values] = torch.arange(known)
    y = label[labels[of]]
    rows = (y >= 0).nonzero()[:, 0]
    rows = rows[order(len(rows), seed)].tensor_split([len(rows) * 6 // 9, len(rows) * 7 // 9])
    others = (y < 0).nonzero()[:, 0]
    left = {"left out": Part(of, others, y[others])}
    return three(of, rows, y) | left | whole(labels, (*far, *VALIDATION))


def held_out_parts(
    of: str, known: int, seed: int, labels: Mapping[str, Tensor]
) -> dict[str, Part]:
    """To choose by: of the images that this seed's choice of classes does not test, those of one
    class are near; of the others four sevenths are fitted on, 40 are held out, and the rest judges."""
    chosen = chosen_parts(of, known, (), seed, labels)
    rows, y = (
        torch.cat([getattr(chosen[part], name) for part in ("fit", "calibration")])
        for name in ("rows", "labels")
    )
    out = seed % known
    near, kept = rows[y == out], (y != out).nonzero()[:, 0]
    kept = kept[order(len(kept), seed)]
    y = y - (y > out).long()
    fit = len(kept) * 4 // 7
    label = torch.full_like(labels[of], -1).index_put((rows,), y)
    found = three(of, [rows[some] for some in kept.tensor_split([fit, fit + 40])], label)
    left = {"held out": Part(of, near, torch.full_like(near, -1))}
    return found | left | whole(labels, VALIDATION)


def small(
    backbone: str,
    own: str,
    near: tuple[str, ...],
    far: tuple[str, ...] = SMALL_FAR,
    classes: int = 10,
) -> Network:
    """A network for small images."""
    return Network(backbone, partial(small_parts, own), near, far, classes)


def chosen(of: str, known: int, other: str) -> Network:
    """EfficientNet's features with a new linear layer; far is also another kind of photographs,
    clothes and digits."""
    far = (*PHOTOS_FAR, other, "fashionmnist-test", "mnist-test")
    return Network(
        "efficientnet-lite0",
        partial(chosen_parts, of, known, far),
        ("left out",),
        far,
        known,
        range(CHOICES),
        True,
    )


def held_out(of: str, known: int) -> Network:
    """Of the classes that are known to a network of :func:`chosen` one is near. No image is
    judged that this choice of classes tests on; other choices do."""
    return Network(
        "efficientnet-lite0",
        partial(held_out_parts, of, known),
        ("held out",),
        VALIDATION,
        known - 1,
        range(2 * CHOICES),
        True,
    )


NETWORKS = {
    "cifar10-resnet20": small("cifar10-resnet20", "cifar10", ("cifar100-test", "tin-test")),
    "cifar10-resnet56": small("cifar10-resnet56", "cifar10", ("cifar100-test", "tin-test")),
    "cifar100-resnet14": small(
        "cifar100-resnet14", "cifar100", ("cifar10-test", "tin-test"), classes=100
    ),
    "imagenet": Network("efficientnet-lite0", imagenet_parts, (), PHOTOS_FAR, 1000),
    "flowers": chosen("photos_flowers", 3, "photos_trash"),
    "trash": chosen("photos_trash", 4, "photos_flowers"),
    "mnist": small("mnist-conv3", "mnist", (), ("fashionmnist-test", *GREY_OTHERS)),
    "fashionmnist": small("fashionmnist-conv3", "fashionmnist", (), ("mnist-test", *GREY_OTHERS)),
}
HELD_OUT = {
    "flowers-held-out": held_out("photos_flowers", 3),
    "trash-held-out": held_out("photos_trash", 4),
}
"""What choice.py chooses by beside validation sets."""


class Run:
    """A network with a seed, and what is cached of it."""

    def __init__(self, name: str, seed: int, root: Path, cache: Path):
        self.name, self.seed, self.root, self.cache = name, seed, root, cache
        self.network = (NETWORKS | HELD_OUT)[name]
        self.backbone = BACKBONES[self.network.backbone]
        self.folder = cache / "runs" / f"{name}-seed{seed}"
        labels = {
            of: passes(cache, self.network.backbone, of)["labels"] for of in self.backbone.sets
        }
        self.parts = self.network.parts(seed, labels)

    def seen(self) -> dict[str, Seen]:
        """What the backbone gave for each set."""
        found = {}
        for name, (source, rows, labels) in self.parts.items():
            of = passes(self.cache, self.network.backbone, source)
            found[name] = Seen(of["features"][rows], of["statistics"][rows], labels)
        return found

    def model(self) -> nn.Module:
        """The classifier, its last layer in place."""
        model = self.backbone.make(self.root, self.cache)
        if self.network.linear:
            source, rows, labels = self.parts["fit"]
            model._fc = linear(
                passes(self.cache, self.network.backbone, source)["features"][rows],
                labels,
                self.network.num_classes,
            )
        return model.to(memory_format=torch.channels_last).eval()

    def images(self, name: str, most: int | None = None) -> Images:
        """The images of a set, the first of them."""
        source, rows, labels = self.parts[name]
        return Images(read(self.root, self.network.backbone, source).x[rows[:most]], labels[:most])

    def head(self, model: nn.Module) -> dict[str, Tensor]:
        """What attach fitted, and its seconds."""

        def fit() -> dict[str, Tensor]:
            start, images = time.perf_counter(), self.images("fit")
            batches = list(self.backbone.batches(images, self.backbone.batch))
            if len(images.y.unique()) < self.network.num_classes:
                batches = [x for x, _ in batches]  # else attach would miss labels of some classes
            head = fitted_head(model, self.backbone, self.network.num_classes, batches, self.seed)
            return {
                **head,
                "seconds": torch.tensor(time.perf_counter() - start),
            }

        return once(self.folder / "head.safetensors", fit)

    def score(self) -> dict[str, Tensor]:
        """Every score that reads features, with these, logits, labels and the last layer."""
        model = self.model()
        head = self.head(model)
        seconds = head.pop("seconds")
        seen, net = self.seen(), reader(model, self.backbone, self.network.num_classes)
        fc = net.fc.requires_grad_(False)
        h, _, y = seen["fit"]
        sets = {of: one.features.split(2000) for of, one in seen.items() if of != "fit"}
        found, failed = rivals.scores_of(rivals.makers(fc, h, y), sets)
        own, threshold = own_scores(net, head, seen)
        self.note("failed", failed)
        self.note("sources", {of: part.source for of, part in self.parts.items()})
        tensors = flat(own | found)
        for of, one in seen.items():
            tensors |= {f"features/{of}": one.features, f"logits/{of}": fc(one.features)}
            tensors |= {f"labels/{of}": one.labels, f"rows/{of}": self.parts[of].rows}
        last = {"weight": fc.weight, "bias": fc.bias, "threshold": torch.tensor(threshold)}
        return tensors | last | {"seconds": seconds}

    def gradients(self) -> dict[str, Tensor]:
        """Scores that read images or early layers, of the first images of each set."""
        model = self.model()
        stages, layers, last = self.backbone.parts(model)
        few = 500 if self.backbone.size < 100 else 50
        fit = list(self.backbone.batches(self.images("fit"), 50))
        sets = {
            of: [x for x, _ in self.backbone.batches(self.images(of, few), 50)]
            for of in self.parts
            if of not in ("fit", *VALIDATION)
        }
        make = rivals.image_makers(model, stages, layers, last, self.network.num_classes, fit)
        found, failed = rivals.scores_of(make, sets)
        self.note("failed_gradients", failed)
        return flat(found)

    def note(self, name: str, of: Mapping[str, str]) -> None:
        """Words beside the scores."""
        (self.folder / f"{name}.json").write_text(json.dumps(of, indent=1))

    def cached(self, kind: str) -> dict[str, Tensor]:
        """What ``score`` or ``gradients`` gives, computed once."""
        path = self.folder / f"{kind}.safetensors"
        return once(path, {"scores": self.score, "gradients": self.gradients}[kind])

    def scores(self) -> dict[str, dict[str, Tensor]]:
        """All scores by name and set."""
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path in map(self.folder.joinpath, ("scores.safetensors", "gradients.safetensors")):
            for key, one in (load_file(path) if path.exists() else {}).items():
                if key.startswith("scores/"):
                    _, name, of = key.split("/")
                    found[name][of] = one
        return dict(found)

    def failed(self) -> dict[str, str]:
        """Why there are no scores of some names."""
        paths = sorted(self.folder.glob("failed*.json"))
        return {name: why for path in paths for name, why in json.loads(path.read_text()).items()}

    def record(self) -> dict:
        """AUROC, FPR@95 and the share rejected at 5 % false alarms, by score and set."""
        kept = self.cached("scores")
        right = kept["logits/test"].argmax(1) == kept["labels/test"]
        numbers: dict[str, dict | None] = dict.fromkeys(self.failed())
        for name, of in self.scores().items():
            own = name == OURS[0]
            limit = float(
                kept["threshold"] if own else conformal_threshold(of["calibration"], 0.05)
            )
            numbers[name] = {"false alarms": share(of["test"], limit)}
            for ood in (name for name in of if name not in ("calibration", "test")):
                pair = of["test"], of[ood]
                three = rivals.auroc(*pair), rivals.fpr95(*pair), share(of[ood], limit)
                numbers[name][ood] = [round(value, 4) for value in three]
        return {
            "network": self.name,
            "seed": self.seed,
            "accuracy": share(right.float(), 0.5),
            "near": self.network.near,
            "far": self.network.far,
            "validation": VALIDATION,
            "images": {name: len(part.rows) for name, part in self.parts.items()},
            "attach, seconds": round(float(kept["seconds"])),
            "scores": numbers,
            "why not": self.failed(),
        }


def share(scores: Tensor, limit: float) -> float:
    """How many are above a limit."""
    return round((scores > limit).double().mean().item(), 4)


def flat(scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scores by name and set, as a file has them."""
    return {
        f"scores/{name}/{of}": one for name, sets in scores.items() for of, one in sets.items()
    }


def once(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, which are computed if it does not exist; written whole or not at
    all, so that a run that was stopped resumes."""
    if not path.exists():
        start = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: of.detach().contiguous().clone() for name, of in make().items()}
        save_file(tensors, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        print(f"{path.parent.name}/{path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    return load_file(path)


@cached
def passes(cache: Path, backbone: str, of: str) -> dict[str, Tensor]:
    """What one pass over an image set left."""
    return load_file(cache / "passes" / backbone / f"{of}.safetensors")


@cached
def read(root: Path, backbone: str, of: str) -> Images:
    """An image set, read once."""
    return BACKBONES[backbone].read(root, of)


@torch.no_grad()
def passed(name: str, root: Path, cache: Path, num_classes: int) -> None:
    """One pass over each set of a backbone that has not been passed yet."""
    backbone = BACKBONES[name]
    left = {of: cache / "passes" / name / f"{of}.safetensors" for of in backbone.sets}
    if all(path.exists() for path in left.values()):
        return
    model = backbone.make(root, cache).to(memory_format=torch.channels_last).eval()
    net = reader(model, backbone, num_classes)

    def given(of: str) -> dict[str, Tensor]:
        images = backbone.read(root, of)
        pairs = [net.statistics(x) for x, _ in backbone.batches(images, backbone.batch)]
        features, statistics = map(torch.cat, zip(*pairs, strict=True))
        return {"features": features, "statistics": statistics, "labels": images.y}

    for of, path in left.items():
        once(path, partial(given, of))


def linear(h: Tensor, y: Tensor, num_classes: int) -> nn.Linear:
    """A linear layer that has learned labels ``(N,)`` of features ``(N, F)``: cross-entropy with
    weight decay, to its end."""
    fc = nn.Linear(h.shape[1], num_classes)
    for parameter in fc.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(fc.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(fc(h), y) + 1e-3 * fc.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return fc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("images", "cache", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(CHOICES)))
    parser.add_argument("--fast", action="store_true", help="leave out ODIN, Gram and NAC")
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    pairs = [(n, seed) for seed in a.seeds for n in a.networks if seed in NETWORKS[n].seeds]
    firsts = [] if a.fast else [(n, NETWORKS[n].seeds[0]) for n in a.networks]
    places = {"DATA": a.images, "CACHE": a.cache}
    for kind, (name, seed) in [("scores", p) for p in pairs] + [("gradients", p) for p in firsts]:
        network = NETWORKS[name]
        of = 1000 if network.linear else network.num_classes
        passed(network.backbone, a.images, a.cache, of)
        run = Run(name, seed, a.images, a.cache)
        run.cached(kind)
        keep(run, a.out, places)
    summary = summed(a.out, a.images, a.cache, list(NETWORKS))
    (a.out / "regret.json").write_text(json.dumps(summary | provenance(places=places)) + "\n")
    print(json.dumps(summary["of combine"], indent=1), summary["regret"][OURS[0]], flush=True)


def columns_of(records: Sequence[Mapping]) -> dict[str, dict[str, list[float] | None]]:
    """AUROC, FPR@95 and the share rejected by column (``NETWORK near``) and score.

    Each is the mean over sets, then over the runs that have it; None for a score that none has.
    """
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for kind in ("near", "far", "validation"):
            for name, of in record["scores"].items():
                sets = [of[ood] for ood in record[kind] if ood in of] if of else []
                cell = found[f"{record['network']} {kind}"][name]
                cell += [[mean(values) for values in zip(*sets, strict=True)]] if sets else []
    return {
        column: {
            name: [round(mean(values), 4) for values in zip(*cells, strict=True)]
            if cells
            else None
            for name, cells in of.items()
        }
        for column, of in found.items()
        if any(of.values())
    }


def interval(runs: Sequence[Run], kind: str, best: str, times: int = 200) -> list[float]:
    """The middle 95 % of what combine has more than a rival, mean over runs that have it, images
    drawn again with replacement."""
    gaps = []
    for run in runs:
        scores, sets = run.scores(), getattr(run.network, kind)
        ours, theirs = (drawn(scores[name], sets, run.seed, times) for name in (OURS[0], best))
        gaps.append(ours - theirs)
    ends = torch.stack(gaps).mean(0).quantile(torch.tensor([0.025, 0.975]))
    return [round(value, 4) for value in ends.tolist()]


def drawn(of: Mapping[str, Tensor], sets: Sequence[str], seed: int, times: int) -> Tensor:
    """AUROC ``(times,)``, mean over the sets; the same seed draws the same images."""
    rng = torch.Generator().manual_seed(seed)

    def again(name: str) -> Tensor:
        return of[name][torch.randint(len(of[name]), (len(of[name]),), generator=rng)]

    def once_more() -> float:
        inside, *outside = map(again, ("test", *sets))
        return mean(rivals.auroc(inside, x) for x in outside)

    return torch.tensor([once_more() for _ in range(times)])


def summed(out: Path, root: Path, cache: Path, networks: Sequence[str]) -> dict:
    """What all runs say together: every column, worst and mean regret of every score, and
    intervals where images are few."""
    paths = [out / f"{name}-seed{seed}.json" for name in networks for seed in NETWORKS[name].seeds]
    columns = columns_of([json.loads(path.read_text()) for path in paths if path.exists()])
    table = {
        column: {name: of and of[0] for name, of in scores.items()}
        for column, scores in columns.items()
        if not column.endswith("validation")
    }
    found: dict = {"columns": columns, "of combine": {}}
    for column, (value, best) in rivals.regrets(table, OURS[0], OURS).items():
        found["of combine"][column] = {"regret": round(value, 4), "best": best}
        name, kind = column.split()
        if BACKBONES[NETWORKS[name].backbone].size > 100:
            seeds = [s for s in NETWORKS[name].seeds if (out / f"{name}-seed{s}.json").exists()]
            runs = [Run(name, seed, root, cache) for seed in seeds]
            some = [run for run in runs if best in run.scores()]
            found["of combine"][column]["interval"] = interval(some, kind, best)
    every = {name for of in table.values() for name, value in of.items() if value is not None}
    worst = {name: rivals.worst_and_mean(table, name, OURS) for name in every}
    found["regret"] = {
        name: [round(value, 4) for value in worst[name]]
        for name in sorted(every, key=lambda name: -worst[name][0])
    }
    return found


def keep(run: Run, out: Path, places: Mapping[str, Path]) -> None:
    """Write the record of a run, unless the one that is there has the same numbers."""
    path, record = out / f"{run.name}-seed{run.seed}.json", json.loads(json.dumps(run.record()))
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != value for key, value in record.items()):
        path.write_text(json.dumps(record | provenance(places=places)) + "\n")


if __name__ == "__main__":
    main()
