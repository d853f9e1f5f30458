"""``tie-ext calibrate``: a threshold anew, on images from where the detector is used."""

from argparse import Namespace

import torch
from torch import Tensor

from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.evaluation import FALSE_ALARM
from tie_ext.cli.flags import check_device
from tie_ext.cli.folder import read_detector
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.reading import list_images
from tie_ext.cli.score import BATCH, transform_of
from tie_ext.pytorch_ood.base import Thresholded
from tie_ext.utils.files import locked
from tie_ext.utils.views import eval_view


def run(flags: Namespace) -> None:
    """Score the images, set the threshold by them, and save the detector in its place."""
    check_device(flags.device)
    if not flags.run.is_dir():
        raise ValueError(f"Expected the folder of a run or of a detector, but got {flags.run}")
    detector, net, home = read_detector(flags.run)
    transform, known = transform_of(net, flags.run)
    net.to(flags.device)
    detector.to(flags.device)
    images = ImageFiles.of(list_images(flags.images), transform)
    with locked(home):
        scores, labels = read_scores(detector, images)
        was = detector.threshold
        detector.recalibrate(
            flags.false_alarm or detector.false_alarm or FALSE_ALARM,
            scores,
            labels,
            guarantee=flags.guarantee or detector.guarantee,
            confidence=flags.confidence or detector.confidence,
            per_class=flags.per_class or detector.per_class,
        )
        detector.save(home)
        if known:
            transform.save(home)
    print(tell(detector, scores, labels, was))


@torch.no_grad()
def read_scores(detector: Thresholded, images: ImageFiles) -> tuple[Tensor, Tensor]:
    """Scores ``(N,)`` of images, larger = more OOD, and their predicted classes ``(N,)``.

    Raises:
        ValueError: If an image cannot be read.
    """
    net, found = detector.network, []  # type: ignore[attr-defined]
    for x, _ in ImageBatches(images, BATCH, scale=net):
        found.append((detector.predict(x).cpu(), eval_view(net)(x).argmax(dim=1).cpu()))
    scores, labels = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(labels)


def tell(detector: Thresholded, scores: Tensor, labels: Tensor, was: Tensor | None) -> str:
    """The new threshold and what it promises, and what the earlier one did on the images."""
    threshold, rate = detector.threshold, detector.false_alarm
    promises = {
        "average": "on average over such sets of images",
        "pac": f"with confidence {detector.confidence} for these images",
    }
    lines = []
    if was is not None:
        of = was.cpu() if not was.ndim else was.cpu()[labels.clamp(max=len(was) - 1)]
        lines.append(f"before: {int((scores > of).sum())} of {len(scores)} images rejected")
    values = threshold.reshape(-1).tolist() if threshold is not None else []
    lines.append(f"threshold: {', '.join(f'{value:.4g}' for value in values)}")
    each = " of each predicted class with enough images" if detector.per_class else ""
    lines.append(
        f"at most {rate:.3g} of new ID images{each} are rejected, "
        f"{promises[detector.guarantee]}, as long as they come as these {len(scores)} did"
    )
    return "\n".join(lines)
