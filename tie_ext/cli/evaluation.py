"""How well a network tells OOD images from ID ones, by pytorch-ood's metrics; OOD is positive."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.images import RunImages
from tie_ext.cli.snapshots import save_examples
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import combine
from tie_ext.pytorch_ood.knn import MAX_SAMPLES
from tie_ext.scores.decision import decide
from tie_ext.scores.threshold import images_needed
from tie_ext.utils.files import save_state
from tie_ext.utils.views import frozen_view

COMBINED = "combined"
"""What tables and scores call the combination."""
FALSE_ALARM = 0.05
"""Share of ID images that a combination may reject, unless the user says."""
NEEDED = images_needed(FALSE_ALARM)
"""ID test images that a combination takes."""

Scores = dict[str, dict[str, Tensor]]
"""Scores ``(N,)`` by score and image set, larger = more OOD; the ID set is ``id``."""


@torch.no_grad()
def decisions(net: TIENet, images: RunImages, garbage: bool = True) -> tuple[dict, Scores]:
    """What a network decides on test images by its own rule.

    ID accuracy is over the n+1 outputs where they were trained together. A head on every layer
    leaves the classifier as it is, and accuracy is over its n outputs, whatever the garbage class
    takes.

    Arguments:
        net: The network, which is left as it was.
        images: The images.
        garbage: Whether it has a trained garbage class.

    Returns:
        Numbers in [0, 1]: ``accuracy``; with a garbage class ``id_garbage_rate`` (rejected at
        level 1), ``id_rejected`` (at either level), and ``garbage_rate`` and ``rejected`` by set.
        And the score.
    """
    view, scores = frozen_view(net), {}
    numbers: dict[str, Any] = {"garbage_rate": {}, "rejected": {}}
    for name, of in images.sets.items():
        logits = torch.cat([view(x, garbage=True).cpu() for x, _ in ImageBatches(of, scale=net)])
        decision = decide(logits, net.tau.cpu())
        scores[name] = decision.score
        rates = {"garbage_rate": _mean(decision.level == 1), "rejected": _mean(decision.level > 0)}
        if name == "id":
            apart = not garbage or isinstance(net.garbage, GarbageHead)
            label = decision.label if apart else logits.argmax(1)
            numbers |= {f"id_{rate}": value for rate, value in rates.items()}
            numbers["accuracy"] = _mean(label == of.y)
        else:
            for rate, value in rates.items():
                numbers[rate][name] = value
    return numbers if garbage else {"accuracy": numbers["accuracy"]}, {"score": scores}


def ood_metrics(id_scores: Tensor, ood_scores: Tensor) -> dict[str, float]:
    """How well scores tell OOD from ID; OOD is the positive class, as in both hosts.

    Arguments:
        id_scores: ``(N,)``, larger = more OOD.
        ood_scores: ``(M,)``.

    Returns:
        All in [0, 1]: ``auroc`` and ``fpr95``, by pytorch-ood; ``fpr95_id``, the share of OOD
        images accepted where 95 % of ID images are.
    """
    from pytorch_ood.metrics import OODMetrics

    scores = torch.cat([id_scores, ood_scores])
    labels = torch.cat([torch.zeros(len(id_scores)), -torch.ones(len(ood_scores))]).long()
    result = OODMetrics().update(scores, labels).compute()
    threshold = id_scores.double().quantile(0.95, interpolation="higher")
    accepted = _mean(ood_scores <= threshold)
    return {"auroc": result["AUROC"], "fpr95": result["FPR95TPR"], "fpr95_id": accepted}


def score_combination(
    net: TIENet, images: RunImages, folder: Path | None = None
) -> tuple[Scores, dict]:
    """Fit the combination of a network with a head, and score.

    Its threshold rejects at most :data:`FALSE_ALARM` of new ID images.

    Arguments:
        net: The network, on its device.
        images: The images; half of the ID test images set the scale of the scores and are used for
            nothing else, half set the threshold.
        folder: Where the detector is saved; None for nowhere.

    Returns:
        The scores, under :data:`COMBINED`; ``id`` are those that set the threshold. And under
        ``decision`` the rate, the threshold, and the share rejected by set. Both empty where there
        are fewer test images than :data:`NEEDED`, or no head.
    """
    if len(images.test) < NEEDED or not isinstance(net.garbage, GarbageHead):
        return {}, {}
    training = ImageBatches(images.train.first(MAX_SAMPLES), scale=net)
    detector = combine(
        net,
        calibration_loader=ImageBatches(images.test, scale=net),
        train_loader=training if net.train_features is None else None,
        false_alarm=FALSE_ALARM,
    )
    scores = {"id": cast(Tensor, detector.calibration_scores).cpu()}
    for name, of in images.ood.items():
        parts = [detector.predict(x).cpu() for x, _ in ImageBatches(of, scale=net)]
        scores[name] = torch.cat(parts)
    if folder is not None:
        detector.save(folder)
    threshold = float(cast(Tensor, detector.threshold))
    rejected = {name: _mean(scores[name] > threshold) for name in images.ood}
    decision = {"false_alarm": FALSE_ALARM, "threshold": threshold, "rejected": rejected}
    return {COMBINED: scores}, {"decision": decision}


def evaluate_run(folder: Path, label: str, net: TIENet, images: RunImages) -> dict:
    """Score the test images of a run, and save its detector, scores and examples.

    Returns:
        The numbers of ``run.json``.
    """
    numbers, own = decisions(net, images)
    combined, decision = score_combination(net, images, folder)
    images.transform.save(folder)
    save_examples(folder, images)
    save_state(folder / "scores.safetensors", "scores", {label: own["score"], **combined})
    metrics = {
        score: {name: ood_metrics(of["id"], x) for name, x in of.items() if name != "id"}
        for score, of in (own | combined).items()
    }
    return {**numbers, **decision, "scores": metrics}


def notes(images: RunImages) -> Iterator[str]:
    """What the user has to know of the images of a run before the work."""
    yield f"images are {images.transform}"
    if images.test.note:
        yield images.test.note
    if (count := len(images.test)) < NEEDED:
        yield (
            f"{count} held-out images are too few for a threshold, which takes {NEEDED}: "
            "tie-ext score decides by the garbage class and tau alone"
        )


def _mean(outcome: Tensor) -> float:
    return outcome.double().mean().item()
