"""The images that a run keeps for its figures: inversions after each epoch, and test examples."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tie_ext.cli.batches import scaled
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.outliers.inversion import Inversion
from tie_ext.utils.files import load_state, save_state
from tie_ext.utils.random import seeded
from tie_ext.utils.views import frozen_view

EXAMPLES = 24
"""Images kept of a set."""
PER_CLASS = 8
"""Inversions kept of each output."""
POINTS = 500
"""Test images whose features are kept, and five times the garbage images."""


@torch.no_grad()
def save_snapshot(
    folder: Path,
    epoch: int,
    net: TIENet,
    synthesizers: Sequence[Synthesizer],
    garbage: Callable[[int], Tensor],
    test: ImageSet,
) -> None:
    """Save what the figures show of an epoch: inversions of every output or other outliers, and
    features of test images and garbage.

    Arguments:
        folder: The run folder.
        epoch: Its number; 0 where nothing was trained.
        net: The network.
        synthesizers: Those that propose outliers.
        garbage: Gives up to the asked number of garbage images ``(M, C, H, W)``.
        test: ID test images.
    """
    n, some, state = net.num_classes, test.first(POINTS).loaded(), {}
    view, x, y = frozen_view(net), scaled(some.x, net), some.y
    few = slice(2 * PER_CLASS)
    with seeded(epoch):
        for i, synthesizer in enumerate(synthesizers):
            if isinstance(synthesizer, Inversion):
                found = synthesizer.invert(torch.arange(n + 1).repeat_interleave(PER_CLASS)).x
                images = to_bytes(net, found)
                state["inversions"] = images.reshape(n + 1, PER_CLASS, *images.shape[1:])
            else:
                found = synthesizer.sample(view, x[few], y[few].to(x.device)).x
                state[f"outliers_{i}"] = to_bytes(net, found)
        other = garbage(POINTS // 5).to(x.device)
        state["features"] = view.features(torch.cat([x, other]))
        state["labels"] = torch.cat([y, torch.full((len(other),), n)])
    save_state(folder / "epochs" / f"{epoch:04d}.safetensors", "snapshot", state)


def to_bytes(net: TIENet, x: Tensor) -> Tensor:
    """Images in the network's value range as uint8."""
    return (net.to_unit(x) * 255).round().to(torch.uint8)


def load_snapshots(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Snapshots by epoch.

    Raises:
        ValueError: If one is damaged or foreign.
    """
    files = sorted((Path(folder) / "epochs").glob("[0-9]*.safetensors"))
    return {int(path.stem): load_state(path, "snapshot") for path in files}


def save_examples(folder: Path, run: RunImages) -> None:
    """Save some test images of each set, from all over it, as sets may be sorted by class."""
    examples = {}
    for name, images in run.sets.items():
        rows = torch.linspace(0, len(images) - 1, min(EXAMPLES, len(images))).long()
        examples[name] = images.take(rows).loaded().x
    save_state(folder / "examples.safetensors", "examples", examples)


def load_examples(folder: Path) -> dict[str, Tensor]:
    """Test images uint8 ``(M, C, S, S)`` by set, the ID set ``id`` first; none of a run that kept
    none.

    Raises:
        ValueError: If the file is damaged or foreign.
    """
    path = Path(folder) / "examples.safetensors"
    return load_state(path, "examples") if path.is_file() else {}
