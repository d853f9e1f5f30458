"""The pictures that a run keeps: what the network makes of its classes after each epoch, and some test images of each set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tie_ext.cli.data import Images
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Synthesizer
from tie_ext.outliers.inversion import Inversion
from tie_ext.utils.checks import describe
from tie_ext.utils.files import load_state, reading, save_state
from tie_ext.utils.modules import frozen
from tie_ext.utils.random import seeded

EXAMPLES = 24
"""Images of a set that are kept for the pictures."""


@torch.no_grad()
def save_snapshot(
    folder: Path,
    epoch: int,
    net: TIENet,
    synthesizers: Sequence[Synthesizer],
    garbage: Callable[[int], Tensor],
    test: Images,
    per_class: int = 8,
    points: int = 500,
) -> None:
    """Keep what the pictures show of an epoch: inversions of every output or proposed outliers, and features of test images and garbage.

    Arguments:
        folder: The run folder.
        epoch: Its number; 0 where nothing was trained in epochs.
        net: The network.
        synthesizers: Who proposes outliers.
        garbage: Gives so many images ``(M, C, H, W)`` of garbage, or fewer.
        test: ID test images.
        per_class: Inversions of each output.
        points: Test images whose features are kept.
    """
    n, device = net.num_classes, net.low.device
    state: dict[str, Tensor] = {}
    some = test.first(points).loaded()
    with seeded(epoch), frozen(net):
        for i, synthesizer in enumerate(synthesizers):
            if isinstance(synthesizer, Inversion):
                x = synthesizer.invert(torch.arange(n + 1).repeat_interleave(per_class)).x
                state["inversions"] = to_bytes(net, x).reshape(n + 1, per_class, *x.shape[1:])
            else:
                x = net.from_unit((some.x[: 2 * per_class].float() / 255).to(device))
                state[f"outliers_{i}"] = to_bytes(
                    net, synthesizer.sample(net, x, some.y[: 2 * per_class].to(device)).x
                )
        x, other = (
            net.from_unit((some.x.float() / 255).to(device)),
            garbage(points // 5).to(device),
        )
        state["features"] = net.features(torch.cat([x, other]))
        state["labels"] = torch.cat([some.y, torch.full((len(other),), n)])
    save_state(folder / "epochs" / f"{epoch:04d}.safetensors", "snapshot", dict(state))


def to_bytes(net: TIENet, x: Tensor) -> Tensor:
    """Images in the network's value range as uint8."""
    return (net.to_unit(x) * 255).round().to(torch.uint8)


def load_snapshots(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Snapshots by epoch.

    Raises:
        ValueError: If one is damaged or foreign, or they are not of one run.
    """
    snapshots, first = {}, None
    for path in sorted((Path(folder) / "epochs").glob("*.safetensors")):
        with reading(f"the pictures of an epoch in {path}"):
            snapshot = load_state(path, "snapshot")
            first = snapshot if first is None else first
            for name, x in snapshot.items():
                picture = name not in ("features", "labels")
                if picture and (
                    x.dtype != torch.uint8
                    or x.ndim != (5 if name == "inversions" else 4)
                    or x.shape[-3] not in (1, 3)
                ):
                    raise ValueError(
                        f"Expected pictures of {name} in {path}, but got {describe(x)}"
                    )
                if picture and (
                    name not in first or x.shape != first[name].shape or x.numel() == 0
                ):
                    raise ValueError(
                        f"Expected {name} in {path} to be as in the other epochs, but got {describe(x)}"
                    )
            features, labels = snapshot["features"], snapshot["labels"]
            if (
                features.ndim != 2
                or not features.is_floating_point()
                or not len(features)
                or not bool(features.isfinite().all())
            ):
                raise ValueError(
                    f"Expected finite features of images in {path}, but got {describe(features)}"
                )
            if (
                labels.dtype != torch.long
                or labels.shape != features.shape[:1]
                or bool((labels < 0).any())
            ):
                raise ValueError(
                    f"Expected a label for each of {len(features)} images in {path}, but got {describe(labels)}"
                )
            snapshots[int(path.stem)] = snapshot
    return snapshots


def save_examples(folder: Path, test: Images, ood: Mapping[str, Images]) -> None:
    """Keep some test images of each set but those that settings are chosen by, from all over it, as sets may be sorted by class."""
    sets = {
        "id": test,
        **{name: images for name, images in ood.items() if not name.startswith("val:")},
    }
    some = {
        name: images.take(torch.linspace(0, len(images) - 1, min(EXAMPLES, len(images))).long())
        .loaded()
        .x
        for name, images in sets.items()
    }
    save_state(folder / "examples.safetensors", "examples", some)


def load_examples(folder: Path) -> dict[str, Tensor]:
    """Test images uint8 ``(M, C, S, S)`` by set, the ID set first and called ``id``; none of a run that kept none.

    Raises:
        ValueError: If the file is damaged or foreign.
    """
    path = Path(folder) / "examples.safetensors"
    if not path.is_file():
        return {}
    examples = load_state(path, "examples")
    for name, x in examples.items():
        if (
            not isinstance(name, str)
            or not isinstance(x, Tensor)
            or x.dtype != torch.uint8
            or x.ndim != 4
        ):
            raise ValueError(f"Expected images of {name!r} in {path}, but got {describe(x)}")
    return examples
