"""Which images that were searched for does a detector take for a class? The searchers are those of tests/bench/adversarial_inputs.py.

    python tests/bench/fooling.py --root DATA docs/results/attached/work/fashionmnist-20000x10-conv3-seed0.safetensors

Reads a plain network that tests/bench/attached.py trained, with its garbage head (``...-head.safetensors``), and the networks that
fooling_rivals.py trained on the same images, so far as they are there. The rate of false alarms on ID test images is recorded, and would tell if
one had seen the held-out ones. Judges are the networks of other seeds beside the file. Writes docs/results/fooling/NAME.json after each search,
goes on from there, and ends with a sheet of what was found in docs/figures/.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

import adversarial_inputs
import torch
from adversarial_inputs import (
    Detector,
    Score,
    outputs,
    verdict,
    with_threshold,
)
from attached import HELD, Trained, made_by, other_seeds, parser_of
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from tie_ext import TIENet
from tie_ext.cli import data
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.images import ImageSet
from tie_ext.models.head import GarbageHead
from tie_ext.outliers import Procedural
from tie_ext.outliers.base import Candidates
from tie_ext.scores.combination import largest
from tie_ext.utils.files import load_state, save_state, write_json
from tie_ext.utils.random import seeded

OUT = Path(__file__).parents[2] / "docs" / "results" / "fooling"
FIGURES = Path(__file__).parents[2] / "docs" / "figures"
RIVALS = (
    "procedural",
    "predecessor",
    "tie",
    "tie-search",
    "loop",
    "loop-search",
    "search",
    "acet",
    "acet-procedural",
    "hunted",
)
"""Of fooling_rivals.py; those that are there are measured."""
HOSTS = ("plain",)
"""Networks on which the hosts' detectors are measured too."""
GENERATOR = 200
"""Steps of a generator."""
PER_CLASS = 5
"""Images of each class from each kind of start, and by the generator."""
OTHERS = ("mnist", "fashionmnist", "notmnist")
"""OOD sets whose images ascent starts from, but for the ID set."""
SHOWN = (0, 5, 9)
"""Classes on the sheet."""
LABEL = 190
"""Pixels that a label on it takes."""


def id_sets(name: str, root: str, count: int, seed: int) -> dict[str, ImageSet]:
    """``train``, ``held`` and ``id`` as attached.py has them."""
    whole, test = data.load(name, "train", root), data.load(name, "test", root)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    rows = {"held": order[-HELD:], "train": order[:-HELD][:count]}
    return {
        part: ImageSet(whole.x[of], whole.y[of], test.classes) for part, of in rows.items()
    } | {"id": test}


def others_of(name: str, root: str, shape: tuple[int, int, int]) -> dict[str, ImageSet]:
    """OOD test sets by name, in the shape of the ID images."""
    return {other: data.load(other, "test", root, shape) for other in OTHERS if other != name}


def together(sets: Mapping[str, ImageSet]) -> ImageSet:
    """All images of some sets, whose classes have no names."""
    return ImageSet(*(torch.cat([getattr(of, part) for of in sets.values()]) for part in "xy"), ())


def read(net: TIENet, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Logits and features of all images."""
    return outputs(net, (x for x, _ in ImageBatches(images, 500)))


def detectors_of(
    net: TIENet, sets: Mapping[str, ImageSet], with_hosts: bool
) -> dict[str, Detector]:
    """Detectors by name: the garbage class by its score and by its own decision; beside a head on every layer what :func:`tie_ext.combine` made of
    it in version 0.2.0, by its rule and by the largest; the hosts' where asked. One half of the held-out images sets scales, the other draws lines.
    """
    logits, h = read(net, sets["held"])
    half = len(h) // 2
    scores: dict[str, Score] = {"garbage class": adversarial_inputs.garbage_score}
    if isinstance(net.garbage, GarbageHead):
        hosts = adversarial_inputs.host_scores(net, read(net, sets["train"])[1], sets["train"].y)
        parts = [adversarial_inputs.garbage_score, hosts["ViM"], hosts["GEN"]]
        scores["combined"] = adversarial_inputs.combined(parts, logits[:half], h[:half])
        scores["combined, largest"] = adversarial_inputs.combined(
            parts, logits[:half], h[:half], largest
        )
        if with_hosts:
            scores = {
                name: hosts[name] for name in ("MSP", "energy", "Mahalanobis", "ViM")
            } | scores
    made = {name: with_threshold(score, logits[half:], h[half:]) for name, score in scores.items()}
    level_1 = with_threshold(adversarial_inputs.level_1_score, logits[half:], h[half:])
    return made | {"level 1": level_1._replace(threshold=torch.tensor(0.0))}


def judge(path: Path, root: str) -> tuple[TIENet, Detector]:
    """A network trained apart, on images of its own, with its own combination: what it accepts, it takes for an image of the class."""
    of = Trained.read(path.stem)
    sets = id_sets(of.data, root, of.images, of.seed)
    net = TIENet.load(path.with_name(f"{path.stem}-head.safetensors"))
    return net, detectors_of(net, sets, with_hosts=False)["combined"]


def starts(net: TIENet, sets: Mapping[str, ImageSet], y: Tensor) -> dict[str, Tensor]:
    """Where ascent begins, an image for each class asked for, by kind."""
    shape, others = (len(y), *net.image_shape), sets["ood"].x
    with seeded(0):
        return {
            "noise": net.from_unit(torch.rand(shape)),
            "procedural": Procedural(net).draw(shape),
            "OOD images": others[torch.randperm(len(others))[: len(y)]].float() / 255,
        }


def search(
    net: TIENet,
    sets: Mapping[str, ImageSet],
    detectors: Mapping[str, Detector],
    judges: Sequence[tuple[TIENet, Detector]],
    generator: bool,
    seen: Detector | None,
) -> Iterator[tuple[dict, Candidates, Tensor]]:
    """What one searcher finds: a row for each detector that then looks at it, and start, beside the images and which of them were found.

    An adaptive searcher's images are shown to the network's other detectors too (*crossed*): one that gives a searcher no gradient looks hard to
    fool, until somebody searches by another.
    """
    forms = {
        name: "blind" if seen is None else "adaptive" if detector is seen else "crossed"
        for name, detector in detectors.items()
    }
    y = torch.arange(net.num_classes).repeat(PER_CLASS)
    if generator:
        images = Candidates(adversarial_inputs.invert(net, y, GENERATOR, 0, seen), y)
        for name, detector in detectors.items():
            row, found = verdict(net, detector, images, () if forms[name] == "crossed" else judges)
            yield (
                {
                    "detector": name,
                    "form": forms[name],
                    "searcher": f"generator, {GENERATOR} steps",
                    **row,
                },
                images,
                found,
            )
        return
    kinds = starts(net, sets, y)
    paths: dict[tuple[str, str], dict[int, float]] = {}
    for step, x in adversarial_inputs.ascend(
        net, torch.cat(list(kinds.values())), y.repeat(len(kinds)), seen
    ):
        last = step == adversarial_inputs.MARKS[-1]
        for kind, part in zip(kinds, x.split(len(y)), strict=True):
            for name, detector in detectors.items():
                row, found = verdict(
                    net,
                    detector,
                    Candidates(part, y),
                    judges if last and forms[name] != "crossed" else (),
                )
                path = paths.setdefault((name, kind), {})
                path[step] = row["found"]
                if last:
                    yield (
                        {
                            "detector": name,
                            "form": forms[name],
                            "searcher": kind,
                            **row,
                            "path": path,
                        },
                        Candidates(part, y),
                        found,
                    )


def sheet(shown: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """A row for each detector, a group of images ``(k, C, S, S)`` for each searcher, black where nothing was found."""
    groups = next(iter(shown.values()))
    side, count = next(iter(groups.values())).shape[-1] + 2, len(SHOWN)
    page = Image.new(
        "RGB", (LABEL + (count * side + 12) * len(groups), 14 + side * len(shown)), "white"
    )
    pen = ImageDraw.Draw(page)
    for place, (label, kinds) in enumerate(shown.items()):
        pen.text((4, 14 + side * place + side // 2 - 6), label, fill="black")
        for group, (kind, images) in enumerate(kinds.items()):
            left = LABEL + group * (count * side + 12)
            pen.text((left, 1), kind.partition(",")[0], fill="black")
            for column, x in enumerate(images):
                page.paste(
                    Image.fromarray(x.expand(3, -1, -1).permute(1, 2, 0).numpy()),
                    (left + side * column, 14 + side * place),
                )
    return page


def curves(rows: Sequence[Mapping]) -> Figure:
    """Share found by adaptive ascent against its steps, a line for each network and detector, mean over the kinds of start."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    paths: dict[str, list[Mapping]] = {}
    for row in rows:
        if row["form"] == "adaptive" and "path" in row:
            paths.setdefault(f"{row['network']}: {row['detector']}", []).append(row["path"])
    for place, (label, found) in enumerate(paths.items()):
        marks = [mark for mark in found[0] if int(mark)]
        ax.plot(
            [int(mark) for mark in marks],
            [100 * mean(path[mark] for path in found) for mark in marks],
            ("o-", "s--", "^:", "v-.")[place // 10 % 4],
            label=label,
        )
    ax.set(xscale="log", xlabel="steps of gradient ascent", ylabel="found (%)")
    figure.legend(loc="outside right center", fontsize=7)
    return figure


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rejected(detector: Detector, logits: Tensor, h: Tensor) -> float:
    """Share of images that a detector rejects."""
    return 1 - detector.accepts(logits, h).double().mean().item()


def some(searched: Candidates, found: Tensor) -> Tensor:
    """One found image of each class that is shown, as uint8 ``(k, C, S, S)``."""
    chosen = torch.zeros(len(SHOWN), *searched.x.shape[1:], dtype=torch.uint8)
    for place, y in enumerate(SHOWN):
        for x in searched.x[found & (searched.y == y)][:1]:
            chosen[place] = (x * 255).round().byte()
    return chosen


def main() -> None:
    a = parser_of(__doc__).parse_args()
    of = Trained.read(a.network.stem)
    sets = id_sets(of.data, a.root, of.images, of.seed)
    others = others_of(of.data, a.root, sets["id"].shape)
    sets["ood"] = together(others)
    files = {name: OUT / "work" / f"{a.network.stem}-{name}.safetensors" for name in RIVALS}
    found = {
        "plain": a.network.with_name(f"{a.network.stem}-head.safetensors"),
        **{name: file for name, file in files.items() if file.exists()},
    }
    nets = {name: TIENet.load(file) for name, file in found.items()}
    apart = other_seeds(a.network)
    judges = [judge(path, a.root) for path in apart]
    about = {
        **{key: getattr(of, key) for key in ("data", "backbone", "epochs", "seed")},
        "images": {name: len(sets[name]) for name in ("train", "held", "id")},
        "per_class": PER_CLASS,
        "judges": [path.stem for path in apart],
    }
    path, pictures = OUT / f"{a.network.stem}.json", OUT / "work" / f"{a.network.stem}.shown"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = json.loads(path.read_text()) if path.exists() else {}
    about["networks"] = {name: digest(file) for name, file in found.items()}
    if (
        record.get("networks") is not None
    ):  # what was found against a network that has been trained anew since is found again
        for name in [
            name
            for name, digest in record["networks"].items()
            if about["networks"].get(name) != digest
        ]:
            record["rows"] = [row for row in record["rows"] if row["network"] != name]
            record["seconds"] = {
                key: value
                for key, value in record["seconds"].items()
                if not key.startswith(f"{name}, ")
            }
            for measure in ("accuracy", "garbage", "false_alarms", "rejected"):
                record[measure].pop(name, None)
        record["networks"] = about["networks"]
    if any(record.get(key) != value for key, value in about.items()):
        record = {**about, "accuracy": {}, "false_alarms": {}, "seconds": {}, "rows": []}
    shown = load_state(pictures, "shown") if record["rows"] and pictures.exists() else {}
    made = {name: detectors_of(net, sets, with_hosts=name in HOSTS) for name, net in nets.items()}
    for name, net in nets.items():
        logits, h = read(net, sets["id"])
        record["accuracy"][name] = (
            (logits[:, :-1].argmax(1) == sets["id"].y).double().mean().item()
        )
        read_others = {other: read(net, images) for other, images in others.items()}
        seen = {"id": logits, **{other: rows for other, (rows, _) in read_others.items()}}
        record.setdefault("garbage", {})[name] = {
            what: (rows.argmax(1) == net.num_classes).double().mean().item()
            for what, rows in seen.items()
        }
        rejected = {
            what: {label: _rejected(one, *rows) for label, one in made[name].items()}
            for what, rows in {"id": (logits, h), **read_others}.items()
        }
        record["false_alarms"][name] = rejected.pop("id")
        record.setdefault("rejected", {})[name] = rejected
    for generator in (False, True):
        for name, net in nets.items():
            for label, seen in [("blind", None), *made[name].items()]:
                key = f"{name}, {label}, {'generator' if generator else 'ascent'}"
                if key in record["seconds"]:
                    continue
                start = time.perf_counter()
                for row, searched, found in search(net, sets, made[name], judges, generator, seen):
                    record["rows"].append({"network": name, "seen": label, **row})
                    shares = ", ".join(
                        f"{what} {value:.3f}"
                        for what, value in row.items()
                        if isinstance(value, float)
                    )
                    print(
                        f"{name}: {row['detector']}, {label}, {row['searcher']}: {shares}; {row.get('path', '')}",
                        flush=True,
                    )
                    if row["form"] == "adaptive":
                        shown.setdefault(f"{name}: {label}", {})[row["searcher"]] = some(
                            searched, found
                        )
                record["seconds"][key] = time.perf_counter() - start
                save_state(pictures, "shown", shown)
                write_json(path, {**record, **made_by(a.root)})
        curves(json.loads(path.read_text())["rows"]).savefig(
            FIGURES / f"fooling_steps_{a.network.stem}.png", dpi=90
        )
        sheet(shown).save(FIGURES / f"fooling_{a.network.stem}.png", optimize=True)


if __name__ == "__main__":
    main()
