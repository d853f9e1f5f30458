"""The combination of a run: fitted on its training images and one half of its ID test images; the other half judges it and draws its line."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tie_ext.cli.data import ImageBatches, Images
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import combine
from tie_ext.scores.threshold import calibration_size, conformal_threshold

COMBINED = "combined"
"""What a run calls it: the folder of the detector, and its scores."""
FALSE_ALARM = 0.05
"""Share of ID images that may be rejected, where nobody says."""
NEEDED = 2 * calibration_size(FALSE_ALARM)
"""ID test images that a combination takes."""


def combined_scores(
    net: TIENet,
    images: Images,
    test: Images,
    ood: Mapping[str, Images],
    folder: Path | None = None,
) -> tuple[dict[str, dict], dict[str, dict[str, Tensor]]]:
    """Fit a combination, score, draw its line, and save it.

    Arguments:
        net: A network with a garbage head, on its device.
        images: ID training images.
        test: ID test images.
        ood: OOD image sets by name.
        folder: Where the detector is saved; None for nowhere.

    Returns:
        Metrics ``{"combined": {set: ...}}`` and scores ``{"combined": {set: (N,)}}``, larger = more OOD, as
        :func:`tie_ext.cli.evaluation.evaluate` has them; ``id`` are those of the ID test images that set no scale, by which the line is drawn:
        :data:`FALSE_ALARM` of ID images may be above it. Both empty where there are too few ID test images to draw one, :data:`NEEDED`.
    """
    if len(test) < NEEDED:
        return {}, {}
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    scaling, judging = (test.take(rows) for rows in order.chunk(2))
    detector = combine(
        net,
        train_loader=_batches(images, net),
        calibration_loader=_batches(scaling, net),
        false_alarm=None,
    )
    scores = {
        name: torch.cat([detector.predict(x).cpu() for x, _ in _batches(of, net)])
        for name, of in {"id": judging, **ood}.items()
    }
    detector.false_alarm, detector.threshold = (
        FALSE_ALARM,
        conformal_threshold(scores["id"], FALSE_ALARM),
    )
    if folder is not None:
        detector.save(folder)
    return {COMBINED: {name: ood_metrics(scores["id"], scores[name]) for name in ood}}, {
        COMBINED: scores
    }


def too_few(held: int) -> str:
    """That so many held-out images are too few for a combination; nothing where they are enough."""
    if held >= NEEDED:
        return ""
    return f"{held} held-out images are too few for a threshold, which takes {NEEDED}: tie-ext score decides by the garbage class and tau alone"


def _batches(images: Images, net: TIENet) -> ImageBatches:
    return ImageBatches(images, 500, scale=net)
