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
    """Who makes a public ResNet."""
    return lambda root, cache: public_data.resnet(
        root / "networks" / f"{name}.safetensors", blocks, num_classes, project
    )


def small_sets(own: str, near: Sequence[str]) -> dict[str, int | None]:
    """The sets of a network for 32 pixels."""
    some = {
        **dict.fromkeys(near, 3000),
        **dict.fromkeys(SMALL_FAR, 2000),
        **dict.fromkeys(VALIDATION, 1000),
    }
    return {f"{own}-train": None, f"{own}-test": None, **some}


def conv3(own: str, root: Path, cache: Path) -> nn.Module:
    """The paper's CNN, trained here for five epochs, once."""
    from attached import train

    from tie_ext import TIENet
    from tie_ext.cli.classifier import classifier
    from tie_ext.cli.images import ImageSet
    from tie_ext.models.backbones import Conv3
    from tie_ext.utils.random import seeded

    path = cache / "networks" / f"{own}-conv3.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images = ImageSet(*public_data.read(root, f"{own}-train", 28, 1, 2 * FIT))
        with seeded(0):
            net = TIENet(Conv3(1, 10), 10, (1, 28, 28))
        with torch.enable_grad():
            train(net, images, 5, 0, path.with_suffix(".training"))
        net.save(path)
    return classifier(TIENet.load(path))


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


# What is used of tie_ext, all of it.


def reader(model: nn.Module, backbone: Backbone, num_classes: int):
    """The network with a head on every layer that has learned nothing yet."""
    from tie_ext import TIENet

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
    from tie_ext.pytorch_ood.recommended import chosen_members, fit_chosen, kept_sample

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


def said_by(places: Mapping[str, Path]) -> dict:
    """Command, commit and versions of a record."""
    from tie_ext.utils.provenance import provenance

    return provenance(places=places)


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


def small_parts(own: str, seed: int, labels: Mapping[str, Tensor]) -> dict[str, Part]:
    """Nine tenths of the training images at most, held-out and test images of the ID test set."""
    train, test = f"{own}-train", f"{own}-test"
    fit = order(len(labels[train]), seed)[: min(FIT, len(labels[train]) * 9 // 10)]
    held, judged = order(len(labels[test]), 0).tensor_split([HELD])
    parts = {"fit": (train, fit), "calibration": (test, held), "test": (test, judged)}
    rows = {name: Part(of, rows, labels[of][rows]) for name, (of, rows) in parts.items()}
    return rows | whole(labels, [name for name in labels if not name.startswith(f"{own}-")])


def imagenet_parts(seed: int, labels: Mapping[str, Tensor]) -> dict[str, Part]:
    """One image of each class: 600 to fit on, 200 held out, 200 to test."""
    of = "photos_imagenet"
    three = zip(
        ("fit", "calibration", "test"),
        order(len(labels[of]), seed).tensor_split([600, 800]),
        strict=True,
    )
    parts = {name: Part(of, rows, labels[of][rows]) for name, rows in three}
    return parts | whole(labels, (*PHOTOS_FAR, *VALIDATION))


def chosen_parts(
    of: str, known: int, far: Sequence[str], seed: int, labels: Mapping[str, Tensor]
) -> dict[str, Part]:
    """A random choice of the classes, two thirds of their images to fit on, a ninth held out; near
    is what was left out."""
    y = labels[of]
    classes = order(int(y.max()) + 1, seed)
    label = torch.full_like(classes, -1)
    label[classes[:known].sort().values] = torch.arange(known)
    rows = (label[y] >= 0).nonzero()[:, 0]
    rows = rows[order(len(rows), seed)]
    three = rows.tensor_split([len(rows) * 6 // 9, len(rows) * 7 // 9])
    parts = {
        name: Part(of, some, label[y[some]])
        for name, some in zip(("fit", "calibration", "test"), three, strict=True)
    }
    others = (label[y] < 0).nonzero()[:, 0]
    return (
        parts
        | {"left out": Part(of, others, label[y[others]])}
        | whole(labels, (*far, *VALIDATION))
    )


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


class Run:
    """A network with a seed, and what is cached of it."""

    def __init__(self, name: str, seed: int, root: Path, cache: Path):
        self.name, self.seed, self.root, self.cache = name, seed, root, cache
        self.network = NETWORKS[name]
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
        """What attach taught, once."""
        path = self.folder / "head.safetensors"
        if not path.exists():
            start, images = time.perf_counter(), self.images("fit")
            pairs = list(self.backbone.batches(images, self.backbone.batch))
            every = (
                len(images.y.unique()) == self.network.num_classes
            )  # else attach would miss the labels of some classes
            batches = pairs if every else [x for x, _ in pairs]
            head = fitted_head(model, self.backbone, self.network.num_classes, batches, self.seed)
            write(path, {**head, "seconds": torch.tensor(time.perf_counter() - start)})
        return load_file(path)

    def score(self) -> None:
        """Every score that reads features, once."""
        if (self.folder / "scores.safetensors").exists():
            return
        model = self.model()
        head = self.head(model)
        seconds = head.pop("seconds")
        seen, net = self.seen(), reader(model, self.backbone, self.network.num_classes)
        fc = net.fc.requires_grad_(False)
        h, _, y = seen["fit"]
        sets = {of: one.features.split(2000) for of, one in seen.items() if of != "fit"}
        found, failed = rivals.scores_of(rivals.makers(fc, h, y), sets)
        own, threshold = own_scores(net, head, seen)
        tensors = {
            f"scores/{name}/{of}": one
            for name, sets in (own | found).items()
            for of, one in sets.items()
        }
        for of, one in seen.items():
            tensors |= {
                f"features/{of}": one.features,
                f"logits/{of}": fc(one.features),
                f"labels/{of}": one.labels,
            }
            tensors[f"rows/{of}"] = self.parts[of].rows
        (self.folder / "failed.json").write_text(json.dumps(failed, indent=1))
        (self.folder / "sources.json").write_text(
            json.dumps({of: part.source for of, part in self.parts.items()}, indent=1)
        )
        last = {
            "weight": fc.weight,
            "bias": fc.bias,
            "threshold": torch.tensor(threshold),
            "seconds": seconds,
        }
        write(self.folder / "scores.safetensors", tensors | last)
        print(f"{self.name}, seed {self.seed}: scored; attach took {seconds:.0f} s", flush=True)

    def gradients(self) -> None:
        """Scores that read images or early layers, once, on the first images of each set."""
        path = self.folder / "gradients.safetensors"
        if path.exists():
            return
        start, model = time.perf_counter(), self.model()
        stages, layers, last = self.backbone.parts(model)
        few = 500 if self.backbone.size < 100 else 50
        size = 50
        fit = list(self.backbone.batches(self.images("fit"), size))
        sets = {
            of: [x for x, _ in self.backbone.batches(self.images(of, few), size)]
            for of in self.parts
            if of not in ("fit", *VALIDATION)
        }
        make = rivals.image_makers(model, stages, layers, last, self.network.num_classes, fit)
        found, failed = rivals.scores_of(make, sets)
        write(
            path,
            {
                f"scores/{name}/{of}": one
                for name, of_set in found.items()
                for of, one in of_set.items()
            },
        )
        (self.folder / "failed_gradients.json").write_text(json.dumps(failed, indent=1))
        print(
            f"{self.name}: ODIN, Gram and NAC, {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    def scores(self) -> dict[str, dict[str, Tensor]]:
        """All scores by name and set."""
        found: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for file in ("scores", "gradients"):
            path = self.folder / f"{file}.safetensors"
            for key, one in (load_file(path) if path.exists() else {}).items():
                if key.startswith("scores/"):
                    _, name, of = key.split("/")
                    found[name][of] = one
        return dict(found)

    def failed(self) -> dict[str, str]:
        """Why there are no scores of some names."""
        paths = [self.folder / name for name in ("failed.json", "failed_gradients.json")]
        return {
            name: why
            for path in paths
            if path.exists()
            for name, why in json.loads(path.read_text()).items()
        }

    def record(self) -> dict:
        """AUROC, FPR@95 and the share rejected at 5 % false alarms, by score and set."""
        kept = load_file(self.folder / "scores.safetensors")
        right = kept["logits/test"].argmax(1) == kept["labels/test"]
        numbers: dict[str, dict | None] = {}
        for name, of in self.scores().items():
            threshold = (
                float(kept["threshold"])
                if name == OURS[0]
                else rivals.threshold(of["calibration"])
            )
            numbers[name] = {
                "false alarms": round((of["test"] > threshold).double().mean().item(), 4)
            }
            for ood in of:
                if ood not in ("calibration", "test"):
                    three = (
                        rivals.auroc(of["test"], of[ood]),
                        rivals.fpr95(of["test"], of[ood]),
                        (of[ood] > threshold).double().mean().item(),
                    )
                    numbers[name][ood] = [round(value, 4) for value in three]
        about = {
            "network": self.name,
            "seed": self.seed,
            "accuracy": round(right.double().mean().item(), 4),
        }
        sets = {"near": self.network.near, "far": self.network.far, "validation": VALIDATION}
        sizes = {
            "images": {name: len(part.rows) for name, part in self.parts.items()},
            "attach, seconds": round(float(kept["seconds"])),
        }
        return (
            about
            | sets
            | sizes
            | {"scores": numbers | dict.fromkeys(self.failed()), "why not": self.failed()}
        )


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
    left = {of: path for of, path in left.items() if not path.exists()}
    if not left:
        return
    net = reader(
        backbone.make(root, cache).to(memory_format=torch.channels_last).eval(),
        backbone,
        num_classes,
    )
    for of, path in left.items():
        start = time.perf_counter()
        images = backbone.read(root, of)
        pairs = [net.statistics(x) for x, _ in backbone.batches(images, backbone.batch)]
        found = {
            "features": torch.cat([h for h, _ in pairs]),
            "statistics": torch.cat([s for _, s in pairs]),
        }
        write(path, {**found, "labels": images.y})
        print(f"{name}: {len(images.y)} of {of}, {time.perf_counter() - start:.0f} s", flush=True)


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


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: of.detach().contiguous().clone() for name, of in tensors.items()},
        path.with_suffix(".new"),
    )
    path.with_suffix(".new").replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="packed image sets, and networks/"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        required=True,
        help="passes, heads and scores, which are not committed",
    )
    parser.add_argument("--out", type=Path, required=True, help="records")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(CHOICES)))
    parser.add_argument("--fast", action="store_true", help="leave out ODIN, Gram and NAC")
    a = parser.parse_args()
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    pairs = [
        (name, seed) for seed in a.seeds for name in a.networks if seed in NETWORKS[name].seeds
    ]
    places = {"DATA": a.images, "CACHE": a.cache}
    for name, seed in pairs:
        passed(
            NETWORKS[name].backbone,
            a.images,
            a.cache,
            1000 if NETWORKS[name].linear else NETWORKS[name].num_classes,
        )
        run = Run(name, seed, a.images, a.cache)
        run.score()
        keep(run, a.out, places)
    for name in () if a.fast else a.networks:
        run = Run(name, NETWORKS[name].seeds[0], a.images, a.cache)
        run.gradients()
        keep(run, a.out, places)
    summary = summed(a.out, a.images, a.cache, list(NETWORKS))
    (a.out / "regret.json").write_text(json.dumps(summary | said_by(places)) + "\n")
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


def bootstrapped(runs: Sequence[Run], kind: str, times: int = 200) -> dict[str, Tensor]:
    """AUROC ``(times,)`` of a network's near or far sets by score, mean over its runs, images
    drawn again with replacement."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for run in runs:
        for name, of in run.scores().items():
            rng = torch.Generator().manual_seed(
                run.seed
            )  # the same images for scores of the same images
            sets = [ood for ood in getattr(run.network, kind) if ood in of]
            found[name].append(torch.tensor([drawn(of, sets, rng) for _ in range(times)]))
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def drawn(of: Mapping[str, Tensor], sets: Sequence[str], rng: torch.Generator) -> float:
    """AUROC, mean over the sets, of images drawn with replacement."""
    again = {
        name: of[name][torch.randint(len(of[name]), (len(of[name]),), generator=rng)]
        for name in ("test", *sets)
    }
    return mean(rivals.auroc(again["test"], again[name]) for name in sets)


def interval(values: Tensor) -> list[float]:
    """The middle 95 %."""
    return [round(value, 4) for value in values.quantile(torch.tensor([0.025, 0.975])).tolist()]


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
    found: dict = {"columns": columns, "of combine": {}, "intervals": {}}
    for column, (value, best) in rivals.regrets(table, OURS[0], OURS).items():
        found["of combine"][column] = {"regret": round(value, 4), "best": best}
        name, kind = column.split()
        if BACKBONES[NETWORKS[name].backbone].size > 100:
            runs = [
                Run(name, seed, root, cache)
                for seed in NETWORKS[name].seeds
                if (out / f"{name}-seed{seed}.json").exists()
            ]
            again = bootstrapped(runs, kind)
            found["of combine"][column]["interval"] = interval(again[OURS[0]] - again[best])
            found["intervals"][column] = {
                score: interval(values) for score, values in again.items()
            }
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
        path.write_text(json.dumps(record | said_by(places)) + "\n")


if __name__ == "__main__":
    main()
