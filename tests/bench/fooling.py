"""Which images that were searched for does a detector take for a class? The searchers are those of tie_ext/bench/fooling.py.

    python tests/bench/fooling.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors [NAME=FILE ...]

Reads a plain network that tests/bench/attached.py trained, and its garbage head (``...-head.safetensors``; attached here where that is missing), and
measures the hosts' detectors, the head, and both combined. NAME=FILE is a further network, with a garbage class of its own, that has seen none of the
same held-out images; its rate of false alarms on ID test images is recorded, and would tell. Judges are the networks of other seeds beside the
file. Writes docs/results/fooling/NAME.json after each searcher, goes on from there, and leaves sheets of what was accepted beside it.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from attached import OTHERS, image_sets
from PIL import Image
from torch import Tensor

from tie_ext import Procedural, TIENet, attach
from tie_ext.app.data import ImageBatches, ImageSet
from tie_ext.bench import fooling
from tie_ext.bench.comparison import classifier
from tie_ext.bench.fooling import Detector, Score, Searcher, outputs, with_line
from tie_ext.support.files import write_json
from tie_ext.support.provenance import provenance
from tie_ext.support.random import seeded
from tie_ext.synthesis import Candidates

OUT = Path(__file__).parents[2] / "docs" / "results" / "fooling"
GENERATOR, ASCENT = (200, 1000), (100, 1000)
"""Steps of a generator, and of gradient ascent."""
SEEDS, PER_CLASS = 3, 20
"""Seeds of the generator, and images of each class that each makes, or that are climbed from each kind of start."""
QUICK = 3
"""Images of each class where it has to be quick: fewest steps, one seed."""
SHOWN = 5
"""Classes on a sheet, evenly spaced."""


def read(net: TIENet, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Logits and features of all images."""
    return outputs(net, (x for x, _ in ImageBatches(images, 500)))


def with_head(path: Path, sets: Mapping[str, ImageSet], seed: int) -> TIENet:
    """A plain network with its garbage head, as tests/bench/attached.py attaches it."""
    head, images = path.with_name(f"{path.stem}-head.safetensors"), sets["train"]
    if head.exists():
        return TIENet.load(head)
    plain = TIENet.load(path)
    return attach(classifier(plain), ImageBatches(images, 128), plain.num_classes, classes=images.classes, seed=seed)


def detectors_of(net: TIENet, sets: Mapping[str, ImageSet]) -> tuple[dict[str, Detector], dict[str, Detector]]:
    """The hosts' detectors, and those that read the head too; one half of the held-out images sets scales, the other draws lines."""
    hosts = fooling.host_scores(net, read(net, sets["train"])[1], sets["train"].y)
    logits, h = read(net, sets["held"])
    half = len(h) // 2
    both: dict[str, Score] = {"head": fooling.garbage_score}
    both |= {f"head + {name}": fooling.combined([fooling.garbage_score, hosts[name]], logits[:half], h[:half]) for name in ("Mahalanobis++", "ViM")}
    lined = ({name: with_line(score, logits[half:], h[half:]) for name, score in scores.items()} for scores in (hosts, both))
    return next(lined), next(lined)


def judge(path: Path, root: str) -> tuple[TIENet, Detector]:
    """A network trained apart, on images of its own, with head and Mahalanobis++ combined: what it accepts, it takes for an image of the class."""
    data, size, _, seed = path.stem.split("-")
    sets = image_sets(data, root, int(size.partition("x")[0]), int(seed.removeprefix("seed")))
    net = with_head(path, sets, int(seed.removeprefix("seed")))
    return net, detectors_of(net, sets)[1]["head + Mahalanobis++"]


def searchers(net: TIENet, sets: Mapping[str, ImageSet], quick: bool) -> dict[str, Searcher]:
    """Searchers by name, the fast ones first."""
    y = torch.arange(net.num_classes).repeat(QUICK if quick else PER_CLASS)
    shape, others = (len(y), *net.image_shape), torch.cat([sets[name].x for name in OTHERS if name in sets])
    with seeded(0):
        starts = {
            "noise": net.scaled(torch.rand(shape)),
            "procedural": Procedural(net).draw(shape),
            "OOD images": others[torch.randperm(len(others))[: len(y)]].float() / 255,
        }

    def generator(steps: int) -> Searcher:
        seeds = range(1 if quick else SEEDS)
        return lambda net, detector: Candidates(torch.cat([fooling.invert(net, y, steps, seed, detector) for seed in seeds]), y.repeat(len(seeds)))

    def ascent(start: Tensor, steps: int) -> Searcher:
        return lambda net, detector: Candidates(fooling.climb(net, start, y, steps, detector), y)

    found = {}
    for slow, fast in list(zip(GENERATOR, ASCENT, strict=True))[: 1 if quick else None]:
        found |= {f"{name}, {fast} steps": ascent(start, fast) for name, start in starts.items()} | {f"generator, {slow} steps": generator(slow)}
    return found


def sheet(rows: Sequence[tuple[dict, Candidates, Tensor]], classes: int) -> Image.Image:
    """A row for each detector, blind at the left and adaptive at the right: an accepted image of some classes, white where there is none."""
    shown = torch.linspace(0, classes - 1, min(SHOWN, classes)).round().long().tolist()
    side = rows[0][1].x.shape[-1]
    step = side + 2
    page = Image.new("RGB", (step * (2 * len(shown) + 1), step * (len(rows) // 2)), "white")
    for place, (_, found, accepted) in enumerate(rows):
        for column, y in enumerate(shown):
            for x in found.x[accepted & (found.y == y)][:1]:
                pixels = (x * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
                page.paste(Image.fromarray(pixels), (step * (column + place % 2 * (len(shown) + 1)), step * (place // 2)))
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} images a class, one seed of the generator, the fewest steps")
    parser.add_argument("network", type=Path)
    parser.add_argument("others", nargs="*", metavar="NAME=FILE", help="networks with a garbage class")
    a = parser.parse_args()
    data, size, backbone, seed = a.network.stem.split("-")
    images, _, epochs = size.partition("x")
    sets = image_sets(data, a.root, int(images), int(seed.removeprefix("seed")))
    attached = with_head(a.network, sets, int(seed.removeprefix("seed")))
    hosts, both = detectors_of(attached, sets)
    targets = {"plain": (TIENet.load(a.network), hosts), "attach": (attached, both)}
    for name, _, file in (other.partition("=") for other in a.others):
        net = TIENet.load(file)
        logits, h = read(net, sets["held"])
        targets[name] = net, {"garbage class": with_line(fooling.garbage_score, *(part[len(part) // 2 :] for part in (logits, h)))}
    apart = sorted(set(a.network.parent.glob(f"{data}-{size}-{backbone}-seed?.safetensors")) - {a.network})
    judges = [judge(path, a.root) for path in apart]
    about = {
        "data": data,
        "backbone": backbone,
        "epochs": int(epochs),
        "seed": int(seed.removeprefix("seed")),
        "images": {name: len(sets[name]) for name in ("train", "held", "id")},
        "per_class": QUICK if a.quick else PER_CLASS,
        "judges": [path.stem for path in apart],
    }
    path = OUT / f"{a.network.stem}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if any(record.get(key) != value for key, value in about.items()):
        record = {**about, "false_alarms": {}, "seconds": {}, "rows": []}
    for name, (net, detectors) in targets.items():
        logits, h = read(net, sets["id"])
        record["false_alarms"][name] = {label: 1 - of.accepts(logits, h).double().mean().item() for label, of in detectors.items()}
    for searcher, search in searchers(attached, sets, a.quick).items():
        for name, (net, detectors) in targets.items():
            if f"{name}: {searcher}" in record["seconds"]:
                continue
            start, found = time.perf_counter(), []
            for row, candidates in fooling.measure(net, detectors, {searcher: search}, judges):
                found.append((row, candidates, detectors[row["detector"]].accepts(*outputs(net, candidates.x.split(500)))))
                record["rows"].append({"network": name, **row})
                shares = ", ".join(f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
                print(f"{name}: {row['detector']}, {row['form']}, {searcher}: {shares}", flush=True)
            record["seconds"][f"{name}: {searcher}"] = time.perf_counter() - start
            write_json(path, {**record, **provenance()})
            page = sheet(found, net.num_classes)
            page.save(OUT / f"{a.network.stem}-{name}-{searcher.replace(', ', '-').replace(' ', '_')}.png".lower(), optimize=True)


if __name__ == "__main__":
    main()
