"""``tie-ext explain``: what the classes look like to a network, and why images are rejected.

RUN/explain.html   inversions of each class beside their nearest training images; rejected images,
                   and how far from ID images each layer finds them
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tie_ext.cli import page
from tie_ext.cli.batches import ImageBatches, scaled
from tie_ext.cli.figures import inversion_grid, layer_bars, spread
from tie_ext.cli.folder import is_attached, load_run, read_record
from tie_ext.cli.score import LEVELS, transform_of
from tie_ext.cli.settings import ImageSettings, load_images
from tie_ext.cli.snapshots import load_examples
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.training.explain import Explanation, explain
from tie_ext.utils.files import reading

SHOWN = 8
"""Rejected images on the page."""
GRID = (20, 4)
"""Classes on the page, and inversions of each."""
MAX_IMAGES = 20_000
"""Training images that are read."""


def run(flags: Namespace) -> None:
    """Invert the network of a run, look at what it rejects, write figures and page."""
    folder = flags.run
    record, examples = read_record(folder), load_examples(folder)
    net, _, decide = load_run(folder)
    if not examples:
        raise ValueError(
            f"Expected a run with examples.safetensors, which a run writes at its end, at "
            f"{folder}, but got none"
        )
    with reading(f"the settings of a run in {folder / 'run.json'}"):
        known = record["settings"]
        chosen = {name: known[name] for name in ("data", "root", "images", "size")}
        chosen |= {"root": flags.root} if flags.root else {}
        seed = known["seed"] if is_attached(record) else known["recipe"]["config"]["seed"]
        settings = ImageSettings(**chosen)
    images = load_images(settings, seed, transform_of(net, folder)[0])
    batches = ImageBatches(images.train.first(MAX_IMAGES), 250, scale=net)
    found = explain(net, batches, steps=flags.steps, progress=True)
    found.layers.calibrate(ImageBatches(images.test, 250, scale=net))
    names = net.class_names or tuple(map(str, range(net.num_classes)))
    x, captions = rejected(net, decide, examples, names)
    body = [page.section("Classes", page.figure(CLASSES, class_grid(found, names)))]
    rejects = page.paragraph("None of the images of other sets that the run kept is rejected.")
    if captions:
        distances = found.layers.compare(x).relative_distance
        bars = layer_bars(net.to_unit(x), captions, distances, found.layers.names)
        rejects = page.figure(LAYERS, bars)
    body.append(page.section("Rejected images", rejects))
    title = f"{folder.resolve().name}: what the network has learned"
    agree = AGREE.format(100 * found.agreement)
    print(page.write_page(folder / "explain.html", title, agree, body))


def rejected(
    net: TIENet,
    decide: Callable[[Tensor], Decision],
    examples: Mapping[str, Tensor],
    names: Sequence[str],
) -> tuple[Tensor, list[str]]:
    """Some rejected images ``(M, C, S, S)`` of OOD sets, in the network's value range, and a line
    on each.
    """
    found, captions = [], []
    others = {name: x for name, x in examples.items() if name != "id"}
    for place, (name, images) in enumerate(others.items()):
        x = scaled(images, net)
        label, _, score, level = decide(x)
        count = SHOWN // len(others) + (place < SHOWN % len(others))
        for row in spread((level > 0).nonzero().flatten(), count):
            found.append(x[row])
            decision = f"{LEVELS[int(level[row])]}, score {score[row]:.1f}"
            captions.append(f"{name}: {decision}, nearest class {names[int(label[row])]}")
    return torch.stack(found) if found else torch.empty(0), captions


def class_grid(found: Explanation, names: Sequence[str]) -> Figure:
    """A row per class: inversions, and the nearest training image of each; the first classes."""
    classes, columns = GRID
    left, right = (x[:classes, :columns] for x in (found.inversions, found.nearest))
    left, right = (found.layers.net.to_unit(x) for x in (left, right))
    grid = torch.cat([left, torch.ones_like(left[:, :1]), right], dim=1)
    figure = inversion_grid((grid * 255).round().byte(), names[:classes])
    figure.axes[0].set_title("inversions | nearest training images", fontsize=9)
    return figure


CLASSES = (
    "Left: images made from nothing that the network takes for the class, and that every layer "
    "finds usual for it. Right: the training image of the class that is nearest to each in the "
    "network's last features. What both sides share is what the network knows of a class; it does "
    "not see what they do not share."
)
LAYERS = (
    "Rejected images, and how far from ID images each layer finds them, first layer at the top: "
    "root mean square of its statistics in standard deviations, divided by what 5 % of ID test "
    "images exceed. Red: outside. Early layers see strokes and textures, late ones shapes and "
    "classes."
)
AGREE = "The network takes {:.1f} % of the inversions for the class asked for."
