"""What a run's network has learned, in pictures: its classes as it sees them, and which layers find a rejected image odd.

RUN/explain.html                  the page, which needs no other file
RUN/figures/explain_classes.png   inversions of each class beside their nearest training images
RUN/figures/explain_layers.png    rejected images, and how far outside ID images each layer finds them
"""

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tie_ext.cli.data import ImageBatches
from tie_ext.cli.decide_run import decider
from tie_ext.cli.folder import attached, load_network, read_record
from tie_ext.cli.report import PAGE_STYLE, inversion_grid, written
from tie_ext.cli.score import LEVELS
from tie_ext.cli.settings import ImageSettings, load_images
from tie_ext.cli.snapshots import load_examples
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import Decision
from tie_ext.training.explain import STEPS, Explanation, Outside, explain
from tie_ext.utils.files import locked, reading, write_atomically

SHOWN = 8
"""Rejected images on the page."""
MOST = 20_000
"""Training images that are read."""


def explain_run(
    folder: Path, steps: int = STEPS, root: str | None = None, progress: bool = False
) -> Path:
    """Invert the network of a run, and look at what it rejects; write pictures and a page into its folder.

    Arguments:
        folder: The run folder.
        steps: Of the generator.
        root: Where the run's data sets lie; None where they lay.
        progress: Show a progress bar.

    Returns:
        The page.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If a file is damaged or foreign, the run has not reached its end, or its images are missing.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    settings, net, examples = (
        read_record(folder)["settings"],
        load_network(folder),
        load_examples(folder),
    )
    if net.image_shape is None:
        raise ValueError(
            f"Expected a network for images of one shape at {folder}, but got one for any"
        )
    if not examples:
        raise ValueError(
            f"Expected a run with examples.safetensors, which a run leaves when it ends, at {folder}, but got none"
        )
    with reading(f"the settings of a run in {folder / 'run.json'}"):
        chosen = {name: settings[name] for name in ("data", "root", "images", "size")} | (
            {"root": root} if root else {}
        )
        seed = settings["seed"] if attached(folder) else settings["recipe"]["config"]["seed"]
    images, test, _ = load_images(ImageSettings(**chosen), seed, net.image_shape[0])
    found = explain(
        net, ImageBatches(images.first(MOST), 250, scale=net), steps=steps, progress=progress
    )
    found.layers.hold(ImageBatches(test, 250, scale=net))
    names = net.class_names or tuple(map(str, range(net.num_classes)))
    x, captions = rejected(net, decider(net, folder), examples, names)
    with locked(folder):
        parts = [written(folder, "explain_classes", CLASSES, class_grid(found, names))]
        if captions:
            parts.append(
                written(
                    folder,
                    "explain_layers",
                    LAYERS,
                    layer_figure(
                        net.to_unit(x), captions, found.layers.outside(x), found.layers.names
                    ),
                )
            )
        else:
            parts.append("<p>None of the images of other sets that the run kept is rejected.</p>")
        title = html.escape(folder.resolve().name)
        head, said = (
            f"{PAGE_STYLE.format(title=title)}<h1>{title}: what the network has learned</h1>",
            _AGREE.format(100 * found.agreement),
        )
        write_atomically(
            folder / "explain.html", f"{head}{said}{''.join(parts)}</body></html>".encode()
        )
    return folder / "explain.html"


def rejected(
    net: TIENet,
    decide: Callable[[Tensor], Decision],
    examples: Mapping[str, Tensor],
    names: Sequence[str],
) -> tuple[Tensor, list[str]]:
    """Some images ``(M, C, S, S)`` of other sets that the run rejects, in the network's value range, and a line on each."""
    found, captions = [], []
    others = {name: x for name, x in examples.items() if name != "id"}
    for place, (name, images) in enumerate(others.items()):
        x = net.from_unit(images.float() / 255)
        decision = decide(x)
        rows, most = (
            (decision.level > 0).nonzero().flatten(),
            SHOWN // len(others) + (place < SHOWN % len(others)),
        )
        for row in rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()].tolist():
            found.append(x[row])
            said = f"{name}: {LEVELS[int(decision.level[row])]}, score {float(decision.score[row]):.1f}"
            captions.append(f"{said}, nearest class {names[int(decision.label[row])]}")
    return torch.stack(found) if found else torch.empty(0), captions


def class_grid(found: Explanation, names: Sequence[str], most: int = 4) -> Figure:
    """A row a class: inversions at the left, the nearest training image of each at the right; the first 20 classes."""
    net, shown = found.layers.net, slice(None, most)
    gap = torch.full_like(found.inversions[:, :1], 1.0)
    pairs = [
        net.to_unit(found.inversions[:, shown].flatten(0, 1)),
        net.to_unit(found.nearest[:, shown].flatten(0, 1)),
    ]
    n, shape = len(found.inversions), found.inversions.shape[2:]
    left, right = (part.reshape(n, -1, *shape) for part in pairs)
    picture = (torch.cat([left, gap, right], 1)[:20] * 255).round().byte()
    figure = inversion_grid(picture, names[:20])
    figure.axes[0].set_title("inversions | nearest training images", fontsize=9)
    return figure


def layer_figure(
    x: Tensor, captions: Sequence[str], outside: Outside, layers: Sequence[str]
) -> Figure:
    """Each image ``(M, C, S, S)`` of [0, 1] beside a bar for each layer: how many times as far outside as all but 5 % of held-out ID images."""
    figure = Figure(figsize=(9, 0.4 + 0.22 * (len(layers) + 5) * len(x)), layout="constrained")
    axes = figure.subplots(len(x), 2, squeeze=False, width_ratios=(1, 4))
    farthest = 1.05 * max(
        1.0, float(outside.times.max())
    )  # of all, so that bars of two images can be compared
    for (picture, bars), image, caption, times in zip(
        axes, x, captions, outside.times, strict=True
    ):
        picture.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
        picture.set(xticks=[], yticks=[])
        bars.barh(
            range(len(layers)),
            times.tolist(),
            color=["tab:red" if t > 1 else "tab:gray" for t in times.tolist()],
        )
        bars.axvline(1, color="k", linewidth=0.8, linestyle=":")
        bars.set_yticks(range(len(layers)), layers, fontsize=7)
        bars.invert_yaxis()
        bars.set_xlim(0, farthest)
        bars.set_title(caption, fontsize=9, loc="left")
    axes[-1, 1].set_xlabel("times the distance that 5 % of ID images exceed (dotted: 1)")
    return figure


CLASSES = (
    "Left: images made from nothing that the network takes for the class, and that every layer finds usual for it. Right: the training image of the "
    "class that is nearest to each in the network's last features. What the two sides share is what the network knows of a class; what they do not "
    "share it does not see."
)
LAYERS = (
    "Images that were rejected, and how far outside ID images each layer finds them, first layer at the top: root mean square of its statistics in "
    "deviations, divided by what 5 % of ID test images exceed. Red: outside. Early layers see strokes and textures, late ones shapes and classes."
)
_AGREE = "<p>The network takes {:.1f} % of the inversions for the class asked for.</p>"
