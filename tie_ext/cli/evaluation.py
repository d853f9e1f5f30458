"""How well a network tells OOD images from ID ones, by pytorch-ood's metrics; OOD is positive."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.images import Images, RunImages
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
def all_logits(net: TIENet, images: Images) -> Tensor:
    """The n+1 logits ``(N, n+1)`` of all images, on the CPU; the network is left as it was."""
    view = frozen_view(net)
    parts = [view(x, garbage=True).cpu() for x, _ in ImageBatches(images, scale=net)]
    return torch.cat(parts)


def _tie_scores(net: TIENet, images: RunImages) -> tuple[Scores, dict]:
    """The score of an (n+1)-class network, and what it decides.

    ID accuracy is over the n+1 outputs that were trained together; a head on every layer leaves
    the classifier as it is, and accuracy is over its n outputs, whatever the garbage class takes.
    """
    scores: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {"garbage_rate": {}, "rejected": {}}
    for name, of in images.sets.items():
        logits = all_logits(net, of)
        decision = decide(logits, net.tau.cpu())
        scores[name] = decision.score
        rates = {"garbage_rate": _mean(decision.level == 1), "rejected": _mean(decision.level > 0)}
        if name == "id":
            apart = isinstance(net.garbage, GarbageHead)
            label = decision.label if apart else logits.argmax(1)
            numbers |= {f"id_{rate}": value for rate, value in rates.items()}
            numbers["accuracy"] = _mean(label == of.y)
        else:
            for rate, value in rates.items():
                numbers[rate][name] = value
    return {"score": scores}, numbers


def _posthoc_scores(net: TIENet, images: RunImages) -> tuple[Scores, dict]:
    """Scores by pytorch-ood's MSP, energy and Mahalanobis on the n logits and features, and the ID
    accuracy over the n outputs.
    """
    from pytorch_ood.detector import EnergyBased, Mahalanobis, MaxSoftmax

    view = frozen_view(net)
    detectors = {
        "MSP": MaxSoftmax(view),
        "energy": EnergyBased(view),
        "Mahalanobis": Mahalanobis(view.features),  # type: ignore[arg-type]
    }
    detectors["Mahalanobis"].to(net.low.device).fit(ImageBatches(images.train, scale=net))
    scores: Scores = {label: {} for label in detectors}
    with torch.no_grad():
        for label, detector in detectors.items():
            for name, of in images.sets.items():
                scores[label][name] = _predict(detector, of, net)
    predicted = all_logits(net, images.test)[:, :-1].argmax(1)
    return scores, {"accuracy": _mean(predicted == images.test.y)}


def _predict(detector, images: Images, net: TIENet) -> Tensor:
    """Scores ``(N,)`` of images by a detector of a network, on the CPU."""
    return torch.cat([detector.predict(x).cpu() for x, _ in ImageBatches(images, scale=net)])


def ood_metrics(id_scores: Tensor, ood_scores: Tensor) -> dict[str, float]:
    """How well scores tell OOD from ID; OOD is the positive class, as in both hosts.

    Arguments:
        id_scores: ``(N,)``, larger = more OOD.
        ood_scores: ``(M,)``.

    Returns:
        All in [0, 1]: ``auroc``, ``aupr`` (of OOD images), ``aupr_in`` (of ID images) and
        ``fpr95``, by pytorch-ood; ``fpr95_id``, the share of OOD images accepted where 95 % of ID
        images are; ``detection_error``, the smallest probability of a mistake over all thresholds
        if both are equally likely (Vernekar et al., section 4.2).
    """
    from pytorch_ood.metrics import OODMetrics
    from sklearn.metrics import roc_curve

    scores = torch.cat([id_scores, ood_scores])
    labels = torch.cat([torch.zeros(len(id_scores)), -torch.ones(len(ood_scores))]).long()
    result = OODMetrics().update(scores, labels).compute()
    false_alarms, found, _ = roc_curve(labels < 0, scores)
    threshold = id_scores.double().quantile(0.95, interpolation="higher")
    return {
        "auroc": result["AUROC"],
        "aupr": result["AUPR-OUT"],
        "aupr_in": result["AUPR-IN"],
        "fpr95": result["FPR95TPR"],
        "fpr95_id": _mean(ood_scores <= threshold),
        "detection_error": float(((false_alarms + 1 - found) / 2).min()),
    }


def evaluate(net: TIENet, images: RunImages, garbage: bool = True) -> tuple[dict, Scores]:
    """All numbers of a trained network.

    Arguments:
        net: The network.
        images: The images; training images fit pytorch-ood's detectors.
        garbage: Whether it has a garbage class; else pytorch-ood's detectors read its n logits.

    Returns:
        Numbers ``{"accuracy": ..., "scores": {score: {set: metrics}}}``, with a garbage class also
        ``id_garbage_rate`` (rejected at level 1), ``id_rejected`` (at either level), and
        ``garbage_rate`` and ``rejected`` by set, all in [0, 1]; and the scores themselves.
    """
    scores, numbers = _tie_scores(net, images) if garbage else _posthoc_scores(net, images)
    return {**numbers, "scores": metrics(scores)}, scores


def metrics(scores: Scores) -> dict:
    """Metrics of scores by score and OOD set."""
    return {
        label: {name: ood_metrics(of["id"], x) for name, x in of.items() if name != "id"}
        for label, of in scores.items()
    }


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
        scores[name] = _predict(detector, of, net)
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
    numbers, scores = evaluate(net, images)
    combined, decision = score_combination(net, images, folder)
    numbers |= decision
    if images.transform is not None:
        images.transform.save(folder)
    numbers["scores"] |= metrics(combined)
    save_examples(folder, images)
    save_state(folder / "scores.safetensors", "scores", {label: scores["score"], **combined})
    return numbers


def too_few(count: int) -> str:
    """That a combination takes more held-out images; nothing where there are enough."""
    if count >= NEEDED:
        return ""
    return (
        f"{count} held-out images are too few for a threshold, which takes {NEEDED}: "
        "tie-ext score decides by the garbage class and tau alone"
    )


def _mean(outcome: Tensor) -> float:
    return outcome.double().mean().item()
