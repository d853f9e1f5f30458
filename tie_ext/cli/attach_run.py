"""A run that gives a trained network a garbage class: weights in a file, images on disk, and the run folder that comes of them.

The folder is as training leaves one (:mod:`tie_ext.cli.folder`), so that scores, thresholds and reports need not know how the network was made.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tie_ext.cli import data, registry
from tie_ext.cli.calibrate_run import COMBINED, NEEDED, combined_scores, too_few
from tie_ext.cli.data import ImageBatches
from tie_ext.cli.evaluation import evaluate
from tie_ext.cli.folder import OWN, attached, clear, read_record, written
from tie_ext.cli.settings import ImageSettings, load_images
from tie_ext.cli.snapshots import save_examples, save_snapshot
from tie_ext.models.network import AUTOCAST_DTYPES
from tie_ext.outliers.procedural import Procedural
from tie_ext.training.attach import attach
from tie_ext.utils.checks import check_number
from tie_ext.utils.files import locked, save_state, sha256, write_json
from tie_ext.utils.provenance import provenance

LABEL = OWN[1]
"""What tables and scores call such a network."""
KNOWN = ". If the network was trained on these, its threshold rejects more than it says: put images that it has not seen into test/"
"""Where images were held out here, of which a network that came trained may know."""


@dataclass(frozen=True, kw_only=True)
class AttachSettings(ImageSettings):
    """What a garbage class is attached to; together with images and weights it determines the result.

    Raises:
        ValueError: If a setting is of the wrong type or out of range.
    """

    weights: str
    """File of the network's weights."""
    seed: int = 0
    """Of the subset, of what is held out, and of the head."""
    autocast_dtype: str = "float32"
    """What the network computes in, one of :data:`tie_ext.models.network.AUTOCAST_DTYPES`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("seed", self.seed, 0, 2**31 - 1, integer=True)
        if self.autocast_dtype not in AUTOCAST_DTYPES:
            raise ValueError(
                f"Expected a autocast_dtype, one of {', '.join(AUTOCAST_DTYPES)}, but got {self.autocast_dtype!r}"
            )


def attach_run(
    folder: str | os.PathLike,
    settings: AttachSettings,
    device: str = "cpu",
    progress: bool = False,
    say: Callable[[str], object] | None = None,
) -> dict:
    """Attach a garbage class to a trained network, score the test images, and leave a run folder.

    Arguments:
        folder: The run folder.
        settings: What to attach to.
        device: Where to compute.
        progress: Show progress bars.
        say: Told what a person has to know: before the work, how the test images were come by, which ``run.json`` says too, and that they are too
            few for a threshold; after it, that the network may be guessing.

    Returns:
        The content of ``run.json``; its ``accuracy`` is that of the network as it came, in the precision of the settings,
        whatever the garbage class takes.

    Raises:
        ValueError: If a setting, the data, the weights or the network is not as expected, the folder holds a run, or another process is at it.
        FileNotFoundError: If there are no weights.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    _refuse_a_run(folder)
    weights = registry.read_weights(settings.weights)
    channels = registry.channels_of(settings.backbone, weights, settings.weights)
    scale = settings.range(channels)
    images, test, ood = load_images(settings, settings.seed, channels)
    model = registry.load(
        settings.backbone, channels, len(images.classes), weights, settings.weights
    ).to(device)
    for held in (test, *ood.values()):
        held.check()
    say = say or (lambda text: None)
    for said in (test.note + (KNOWN if data.HELD_OUT in test.note else ""), too_few(len(test))):
        if said:
            say(said)
    with locked(folder):
        _refuse_a_run(
            folder
        )  # again, as another process may have begun one while the images were read
        batches = ImageBatches(images, settings.batch_size, scale=scale)
        low, high = (bound.flatten().tolist() for bound in (scale.low, scale.high))
        names, seed, autocast_dtype = images.classes, settings.seed, settings.autocast_dtype
        net = attach(
            model,
            batches,
            len(names),
            low,
            high,
            names,
            seed=seed,
            progress=progress,
            autocast_dtype=autocast_dtype,
        )
        numbers, scores = evaluate(net, test, ood, images)
        about = {"test_images": test.note} if test.note else {}
        record = {
            "settings": settings.record(),
            "weights_sha256": sha256(settings.weights),
            **about,
        }
        record |= provenance(device)
        clear(folder)  # of one that was stopped while it wrote
        write_json(folder / "run.json", record)  # first, as it says whose the others are
        net.save(folder / "network.safetensors")
        metrics, combined = combined_scores(net, images, test, ood, folder / COMBINED)
        numbers["scores"] |= metrics
        proposer = Procedural(net).to(device)
        save_snapshot(
            folder, 0, net, [proposer], lambda count: proposer.draw((count, *images.shape)), test
        )
        save_examples(folder, test, ood)
        save_state(folder / "scores.safetensors", "scores", {LABEL: scores["score"], **combined})
        write_json(folder / "run.json", {**record, "numbers": numbers})
    if _by_chance(numbers["accuracy"], len(images.classes), len(test)):
        said = "are these its weights, --mean, --std and --size, and the classes in the order of its training (by name)?"
        say(
            f"ID accuracy is {numbers['accuracy']:.1%}, which guessing among {len(images.classes)} classes could give: {said}"
        )
    return {**record, "numbers": numbers}


def _by_chance(accuracy: float, classes: int, images: int) -> bool:
    """Whether guessing does as well, within two standard deviations; of a few images nobody can tell."""
    return images >= NEEDED and accuracy <= 1 / classes + 2 * math.sqrt(
        (1 - 1 / classes) / classes / images
    )


def _refuse_a_run(folder: Path) -> None:
    """Refuse a folder with anything of a run in it, but for a run of this kind that was stopped while it wrote."""
    there = written(folder)
    if there and not (attached(folder) and "numbers" not in read_record(folder)):
        raise ValueError(
            f"Expected a new folder, but got {folder}, which holds {there[-1].name} of a run; give another --out"
        )
