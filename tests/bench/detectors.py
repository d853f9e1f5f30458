"""Every detector of pytorch-ood beside ours, on attached networks: how well each tells OOD test sets, and what it costs.

    python tests/bench/detectors.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed?-head.safetensors

Reads networks that tests/bench/attached.py left, whose n ID logits are the plain network's, and the same images. Every detector has its default
settings. Those that read logits, features or the last feature maps get them from one pass for all; the others read the images, after all those of
every network, and are tested on 1000 of each set alone. Times are of each detector's own ``predict``, the pass included. A detector that cannot be
made for a network, fails on it or gives all ID images one score is kept with the reason. Writes docs/results/detectors/STEM.json after each
detector, and goes on after the last one there.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytorch_ood.detector as theirs
import torch
from attached import image_sets
from pytorch_ood.api import (
    Detector,
    FeatureMapsDetector,
    FeaturesDetector,
    GradientDetector,
    LogitsDetector,
)
from torch import Tensor, nn

from tie_ext import TIENet
from tie_ext.cli import data
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.images import ImageSet
from tie_ext.pytorch_ood import (
    IODIN,
    Combined,
    MahalanobisPlusPlus,
    TIEDetector,
    UncertaintyEstimate,
)
from tie_ext.pytorch_ood.members import Outputs
from tie_ext.pytorch_ood.recommended import Sample, chosen_members, fit_chosen
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.random import seeded

OUT = Path(__file__).parents[2] / "docs" / "results" / "detectors"
HELD = ("KLMatching", "TemperatureScaling")
"""Detectors that their papers fit on a validation set; the others are on the training images."""
OURS = ("TIEDetector", "Combined", "UncertaintyEstimate", "MahalanobisPlusPlus", "IODIN")
IMAGES = (
    "IODIN",
    "ODIN",
    "MahalanobisODIN",
    "GradNorm",
    "GradUncertainty",
    "MultiMahalanobis",
    "Gram",
    "NACUE",
    "MCD",
)
"""Detectors that read the images themselves."""
TIMED = 1000
"""ID test images by which the time is told, and images of each set by which detectors that read images are tested."""


class Seen(NamedTuple):
    """What one pass over a set of images gives."""

    logits: Tensor
    """``(N, n+1)``."""
    features: Tensor
    """``(N, F)``."""
    maps: Tensor
    """``(N, C, H, W)`` after the last convolution."""
    y: Tensor
    """``(N,)``."""


@torch.no_grad()
def see(net: TIENet, images: ImageSet) -> Seen:
    """One pass over images."""
    maps: list[Tensor] = []
    hook = net.backbone.conv[11].register_forward_hook(lambda module, given, out: maps.append(out))
    pairs = [net.outputs(x) for x, _ in ImageBatches(images, 500)]
    hook.remove()
    return Seen(
        torch.cat([of[0] for of in pairs]),
        torch.cat([of[1] for of in pairs]),
        torch.cat(maps).contiguous(),
        images.y,
    )


def makers(net: TIENet, seen: dict[str, Seen]) -> dict[str, Callable[[], Detector]]:
    """How each detector is made on the paper's CNN, by its name."""
    conv, fc = net.backbone.conv, net.fc
    blocks = [conv[:4], conv[4:8], conv[8:12]]  # each ends in pooling
    maps, rest = conv[:12], nn.Sequential(conv[12:], net.backbone.hidden, fc)
    weight, bias = fc.weight.detach(), fc.bias.detach()
    on_logits = (
        "EnergyBased",
        "Entropy",
        "GEN",
        "KLMatching",
        "MaxLogit",
        "MaxSoftmax",
        "MCD",
        "ODIN",
        "OpenMax",
        "TemperatureScaling",
    )
    on_logits += ("WeightedEBO",)
    on_features = ("GMM", "KNN", "Mahalanobis", "MahalanobisODIN", "MCM", "RMD")
    on_both = ("fDBD", "LTS", "NCI", "NNGuide", "PNML", "ReAct", "SHE", "VRA")
    on_maps = ("ASH", "RankFeat", "SCALE")
    of: dict[str, Callable[[], Detector]] = {
        name: lambda name=name: getattr(theirs, name)(net) for name in on_logits
    }
    of |= {name: lambda name=name: getattr(theirs, name)(net.features) for name in on_features}
    of |= {name: lambda name=name: getattr(theirs, name)(net.features, fc) for name in on_both}
    of |= {name: lambda name=name: getattr(theirs, name)(maps, rest) for name in on_maps}
    # The last layer's gradients, as in its examples; without a default: p as OpenOOD has it, half the features as principal ones.
    of |= {
        name: lambda name=name: getattr(theirs, name)(net, lambda of: of.startswith("fc."))
        for name in ("GradNorm", "GradUncertainty")
    }
    of["DICE"] = lambda: theirs.DICE(net.features, weight, bias, p=0.9)
    of["ViM"] = lambda: theirs.ViM(net.features, net.feature_size // 2, weight, bias)
    of["Gram"] = lambda: theirs.Gram(rest, blocks, net.num_classes)
    of["MultiMahalanobis"] = lambda: theirs.MultiMahalanobis(blocks)
    of["NACUE"] = lambda: theirs.NACUE(net, [*blocks, net.backbone.hidden])
    of["TIEDetector"] = lambda: TIEDetector(net)
    of["Combined"] = lambda: combination(net, seen)
    of["UncertaintyEstimate"] = lambda: UncertaintyEstimate(net)
    of["MahalanobisPlusPlus"] = lambda: MahalanobisPlusPlus(net.features)
    of["IODIN"] = lambda: IODIN(net)
    return of


@torch.no_grad()
def combination(net: TIENet, seen: dict[str, Seen]) -> Combined:
    """What :func:`tie_ext.combine` gives, of a pass that has been made."""
    sample, held = Sample(seen["train"].features, seen["train"].y), seen["held"]
    detector = Combined(chosen_members(sample, net, (net.fc.weight, net.fc.bias)))
    outputs = Outputs(held.logits[:, :-1], held.features, held.logits)
    return fit_chosen(detector, sample, [(outputs, held.y)])


def member_scores(detector: Combined, of: Seen) -> Tensor:
    """Scores ``(N, k)`` of the members."""
    return torch.stack([read(member, of) for member in detector.detectors], dim=1)


def read(detector: Detector, of: Seen) -> Tensor:
    """Scores ``(N,)`` of what has been seen."""
    if isinstance(detector, Combined):
        return detector.predict_scores(member_scores(detector, of))
    if isinstance(detector, LogitsDetector):
        return detector.predict_logits(
            of.logits if isinstance(detector, TIEDetector) else of.logits[:, :-1]
        )
    if isinstance(detector, FeaturesDetector):
        return detector.predict_features(of.features)
    return detector.predict_feature_maps(
        of.features if isinstance(detector, theirs.ReAct | theirs.VRA) else of.maps
    )


def fit(detector: Detector, of: Seen) -> None:
    """Fit a detector on what has been seen."""
    if isinstance(detector, LogitsDetector):
        detector.fit_logits(of.logits[:, :-1], of.y)
    elif isinstance(detector, FeaturesDetector):
        detector.fit_features(of.features, of.y)
    elif isinstance(detector, FeatureMapsDetector):
        detector.fit_feature_maps(of.features, of.y)


def judged(
    name: str, make: Callable[[], Detector], sets: dict[str, ImageSet], seen: dict[str, Seen]
) -> dict:
    """Metrics by OOD test set, and processor seconds of 1000 images; or why there are none."""
    tested = [of for of in sets if of not in ("train", "held")]
    try:
        detector = make()
        with torch.set_grad_enabled(isinstance(detector, GradientDetector)):
            if name in IMAGES and detector.requires_fit:
                detector.fit(ImageBatches(sets["train"], 500))
            elif (
                name not in IMAGES
                and name != "Combined"
                and (detector.requires_fit or name == "ReAct")
            ):
                fit(detector, seen["held" if name in HELD else "train"])
            start = time.process_time()
            first = predicted(detector, sets["id"].first(TIMED))
            seconds = (time.process_time() - start) / TIMED * 1000
            if (first == first[0]).all():
                return {"reason": "gives all ID images one score"}
            if name in IMAGES:
                scores = {
                    of: predicted(detector, sets[of].first(TIMED)) for of in tested if of != "id"
                } | {"id": first}
            else:
                scores = {of: read(detector, seen[of]).detach() for of in tested}
    except (TypeError, ValueError, RuntimeError, IndexError, AssertionError) as error:
        return {"reason": f"{type(error).__name__}: {error}"}
    metrics = {of: ood_metrics(scores["id"], scores[of]) for of in tested if of != "id"}
    most = {"images": TIMED} if name in IMAGES else {}
    return {
        **most,
        "seconds": seconds,
        "sets": {
            of: {key: found[key] for key in ("auroc", "fpr95_id")} for of, found in metrics.items()
        },
    }


def predicted(detector: Detector, images: ImageSet) -> Tensor:
    """Scores ``(N,)`` by the detector's own ``predict``."""
    return torch.cat([detector.predict(x).detach() for x, _ in ImageBatches(images, 500)])


def judge(network: Path, root: str, from_images: bool) -> None:
    """Run the detectors of one network that are not in its record yet."""
    stem = network.name.removesuffix("-head.safetensors")
    of, size, backbone, of_seed = stem.split("-")
    (images, epochs), seed = map(int, size.split("x")), int(of_seed.removeprefix("seed"))
    path = OUT / f"{stem}.json"
    done = json.loads(path.read_text())["detectors"] if path.exists() else {}
    net = TIENet.load(network)
    left = [
        name for name in makers(net, {}) if (name in IMAGES) == from_images and name not in done
    ]
    if not left:
        return
    sets = {
        name: images
        for name, images in image_sets(of, root, images, seed).items()
        if not name.startswith("val:")
    }
    seen = {} if from_images else {name: see(net, images) for name, images in sets.items()}
    about = {"data": of, "images": images, "epochs": epochs, "backbone": backbone, "seed": seed}
    said = {
        **provenance(),
        "command": f"detectors.py --root DATA docs/results/attached/work/{network.name}",
    }
    make = makers(net, seen)
    for name in left:
        with seeded(0):
            done[name] = judged(name, make[name], sets, seen)
        write_json(path, {**about, **said, "detectors": done})
        print(stem, name, done[name].get("reason") or done[name]["seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="data")
    parser.add_argument(
        "networks", nargs="+", type=Path, help="STEM-head.safetensors, as attached.py names it"
    )
    a = parser.parse_args()
    data.load = functools.cache(data.load)  # the same files for every seed
    for from_images in (False, True):
        for network in a.networks:
            judge(network, a.root, from_images)


if __name__ == "__main__":
    main()
