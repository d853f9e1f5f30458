"""How a run decides: by which detector, and by which line."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from tie_ext.cli.calibrate_run import COMBINED, FALSE_ALARM
from tie_ext.cli.folder import OWN, load_combined, load_saved, load_scores
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import TIEDetector
from tie_ext.scores.decision import Decision
from tie_ext.scores.threshold import conformal_threshold


def decider(
    net: TIENet, place: Path, false_alarm: float | None = None
) -> Callable[[Tensor], Decision]:
    """The decision of a saved detector, or of a run: by a line on the score of its combination; where it has none, on the network's own, or by
    the paper's rule.

    The line is drawn on ID test images as the run scored them.

    Arguments:
        net: The network of the run.
        place: The run folder, that of a saved detector, or the network's file in a run folder.
        false_alarm: Share of ID images that may be rejected; None for the paper's rule, or :data:`FALSE_ALARM` where there is a combination.

    Raises:
        FileNotFoundError: If the scores are needed and not there.
        ValueError: If a file is damaged or foreign, a saved detector has no threshold or is to have another, or there are too few ID test images
            for such a line.
    """
    if (saved := load_saved(place)) is not None:
        if false_alarm is not None:
            raise ValueError(
                f"Expected a run folder beside --false-alarm, but got {place}, a saved detector, which has its own threshold"
            )
        by_training = (
            isinstance(saved, TIEDetector)
            and saved.false_alarm is None
            and (saved.tau is not None or bool(net.tau.isfinite()))
        )
        if saved.threshold is None and not by_training:
            raise ValueError(
                f"Expected a detector with a threshold in {place}, but got one without; fit it and save it again"
            )
        return saved.to(net.low.device).decide
    folder = place if place.is_dir() else place.parent
    combined = load_combined(folder)
    if combined is None and false_alarm is None:
        return net.decide
    detector = TIEDetector(net) if combined is None else combined.to(net.low.device)
    labels, of = (
        OWN if combined is None else (COMBINED,),
        load_scores(folder / "scores.safetensors"),
    )
    label = next((label for label in labels if label in of), None)
    if label is None:
        raise ValueError(
            f"Expected scores of {' or '.join(labels)} in {folder / 'scores.safetensors'}, but got those of {', '.join(of)}"
        )
    detector.false_alarm = FALSE_ALARM if false_alarm is None else false_alarm
    detector.threshold = conformal_threshold(of[label]["id"], detector.false_alarm)
    return detector.decide
