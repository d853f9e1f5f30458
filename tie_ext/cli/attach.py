"""``tie-ext attach``: weights in a file and images on disk become a run folder with a garbage
class.
"""

import math
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from torch import nn

from tie_ext.cli import registry, tables
from tie_ext.cli.batches import sampled_batches
from tie_ext.cli.evaluation import NEEDED, evaluate_run, notes
from tie_ext.cli.flags import check_device, settings_of, usage
from tie_ext.cli.folder import OWN, check_new, clear
from tie_ext.cli.image_folder import HELD_OUT
from tie_ext.cli.images import RunImages
from tie_ext.cli.settings import AttachSettings, load_images
from tie_ext.cli.snapshots import save_snapshot
from tie_ext.outliers.procedural import Procedural
from tie_ext.training.attach import attach
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.files import locked, sha256, write_json
from tie_ext.utils.provenance import provenance
from tie_ext.utils.weight_files import read_checkpoint

SEEN = (
    "if the network was trained on these, its threshold rejects more than it says: put images "
    "that it has not seen into test/"
)
"""Warns where images are held out here, as the network may have been trained on them."""
LOW = 1.5
"""An accuracy of so many times chance, or less, is doubted."""
FAR = 0.1
"""So is one that is further below what the checkpoint says."""
ORDER = (
    "and do the classes have the order of its training (by name, numbers by value; torchvision's "
    "ImageFolder puts 10 before 2)?"
)


def run(flags: Namespace) -> None:
    """Attach a garbage class to a trained network, score the test images, leave a run folder."""
    check_device(flags.device)
    folder, settings = flags.out, settings_of(AttachSettings, vars(flags))
    with usage():
        registry.check_name(settings.backbone)
    check_new(folder)
    checkpoint = read_checkpoint(settings.weights)
    channels, _ = registry.sizes_of(settings.backbone, checkpoint)
    with usage():
        transform = settings.image_transform(channels)
    images = load_images(settings, settings.seed, transform)
    test, n = images.test, len(images.train.classes)
    model, left = registry.load(settings.backbone, channels, n, checkpoint)
    seen = SEEN if HELD_OUT in test.note else ""
    for note in filter(None, (left, *notes(images), seen)):
        print(note)
    with locked(folder):
        numbers = attach_in(folder, settings, model, images, checkpoint.path, flags.device)
    if doubt := doubts(numbers["accuracy"], n, len(test), checkpoint.accuracy):
        print(f"{doubt}: are these its weights, were its images {transform}, {ORDER}")
    print("ID accuracy is that of the network before")
    print(tables.summary(OWN[True], numbers, folder))


def attach_in(
    folder: Path,
    settings: AttachSettings,
    model: nn.Module,
    images: RunImages,
    weights: Path,
    device: str = "cpu",
) -> dict:
    """Attach in a folder that this process has locked, score the test images, and write all files
    of the run.

    Returns:
        The numbers of ``run.json``.
    """
    low, high = images.transform.bounds
    net = attach(
        model.to(device),
        sampled_batches(images.train, settings.seed, settings.batch_size, Bounded(low, high)),
        len(images.train.classes),
        low,
        high,
        images.train.classes,
        seed=settings.seed,
        progress=True,
        autocast_dtype=settings.autocast_dtype,
    )
    record = {"settings": settings.record(), "weights_sha256": sha256(weights)}
    record |= {"transform": asdict(images.transform)}
    record |= {"test_images": images.test.note} | provenance(device)
    clear(folder)  # of a run that was stopped while it wrote
    write_json(folder / "run.json", record)  # first, as it says whose the others are
    net.save(folder / "network.safetensors")
    procedural, shape = Procedural(net).to(device), images.train.shape
    save_snapshot(
        folder, 0, net, [procedural], lambda n: procedural.draw((n, *shape)), images.test
    )
    numbers = evaluate_run(folder, OWN[True], net, images)
    write_json(folder / "run.json", {**record, "numbers": numbers})
    return numbers


def doubts(accuracy: float, classes: int, images: int, said: float | None = None) -> str:
    """Why an accuracy makes one doubt that images are read as the network was trained; nothing
    where it does not.

    Arguments:
        accuracy: On the test images, in [0, 1].
        classes: n.
        images: Number of test images.
        said: The accuracy that the checkpoint says, or None.
    """
    chance = 1 / classes
    noise = 2 * math.sqrt(chance * (1 - chance) / images)  # two standard deviations
    if images >= NEEDED and accuracy <= max(chance + noise, LOW * chance):
        return f"ID accuracy is {accuracy:.1%}, which guessing among {classes} classes could give"
    if said is not None and accuracy < said - FAR - noise:
        return f"ID accuracy is {accuracy:.1%}, where the checkpoint says {said:.1%}"
    return ""
