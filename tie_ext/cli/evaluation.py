"""How well a network tells OOD images from ID ones; metrics are pytorch-ood's own, OOD is the positive class."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tie_ext.cli.data import ImageBatches, Images
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet
from tie_ext.scores.decision import decide
from tie_ext.utils.modules import frozen


@torch.no_grad()
def all_logits(net: TIENet, images: Images) -> Tensor:
    """The n+1 logits ``(N, n+1)`` of all images, brought to the network's value range, on the CPU; the network is left as it was."""
    device = net.fc.weight.device
    with frozen(net):
        return torch.cat(
            [
                net(net.from_unit(x.to(device)), garbage=True).cpu()
                for x, _ in ImageBatches(images, 500)
            ]
        )


def tie_scores(
    net: TIENet, sets: Mapping[str, Images]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
    """Score and decisions of an (n+1)-class network.

    Arguments:
        net: The network.
        sets: Image sets by name; the one with labels >= 0 is ID.

    Returns:
        Scores ``{"score": {set: (N,)}}``, larger = more OOD; and, by set, ``garbage_rate`` (rejected at level 1), ``rejected`` (at either
        level) and, for the ID set, ``accuracy``; all in [0, 1]. The latter is over the n+1 outputs that were trained together; a head on every
        layer leaves the classifier as it is, and its accuracy is that over n, whatever the garbage class takes.
    """
    apart = isinstance(net.garbage, GarbageHead)
    scores, facts = {}, {}
    for name, images in sets.items():
        logits = all_logits(net, images)
        decision = decide(logits, net.tau.cpu())
        scores[name] = decision.score
        level = decision.level
        facts[name] = {
            "garbage_rate": (level == 1).double().mean().item(),
            "rejected": (level > 0).double().mean().item(),
        }
        if bool((images.y >= 0).all()):
            label = decision.label if apart else logits.argmax(1)
            facts[name]["accuracy"] = (label == images.y).double().mean().item()
    return {"score": scores}, facts


def posthoc_scores(
    net: TIENet, sets: Mapping[str, Images], fit_on: Images
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
    """Scores of pytorch-ood's MSP, energy and Mahalanobis on the n ID logits and features of a network.

    Arguments:
        net: The network, on the CPU or a GPU.
        sets: Image sets by name.
        fit_on: ID training images, for the detectors that are fitted.

    Returns:
        As :func:`tie_scores`: scores by detector and set, larger = more OOD; and the ID accuracy over the n outputs.
    """
    from pytorch_ood.detector import EnergyBased, Mahalanobis, MaxSoftmax

    device = net.fc.weight.device
    detectors = {
        "MSP": MaxSoftmax(net),
        "energy": EnergyBased(net),
        "Mahalanobis": Mahalanobis(net.features),
    }
    scores: dict[str, dict[str, Tensor]] = {}
    with frozen(net), torch.no_grad():
        for label, detector in detectors.items():
            if detector.requires_fit:
                detector.to(device).fit(ImageBatches(fit_on, 500))
            scores[label] = {
                name: torch.cat(
                    [detector.predict(x.to(device)).cpu() for x, _ in ImageBatches(images, 500)]
                )
                for name, images in sets.items()
            }
        facts = {
            name: {
                "accuracy": (all_logits(net, images)[:, :-1].argmax(1) == images.y)
                .double()
                .mean()
                .item()
            }
            for name, images in sets.items()
            if bool((images.y >= 0).all())
        }
    return scores, facts


def ood_metrics(id_scores: Tensor, ood_scores: Tensor) -> dict[str, float]:
    """How well scores tell OOD from ID; OOD is the positive class, as in both hosts.

    Arguments:
        id_scores: ``(N,)``, larger = more OOD.
        ood_scores: ``(M,)``.

    Returns:
        All in [0, 1]: ``auroc``, ``aupr`` (of OOD images), ``aupr_in`` (of ID images) and ``fpr95``, computed by pytorch-ood; ``fpr95_id``, the
        share of OOD images accepted where 95 % of ID images are; ``detection_error``, the least probability of a mistake over all thresholds
        where both are equally likely (Vernekar et al., section 4.2).
    """
    from pytorch_ood.metrics import OODMetrics
    from sklearn.metrics import roc_curve

    scores, labels = (
        torch.cat([id_scores, ood_scores]),
        torch.cat([torch.zeros(len(id_scores)), -torch.ones(len(ood_scores))]).long(),
    )
    result = OODMetrics().update(scores, labels).compute()
    false_alarms, found, _ = roc_curve(labels < 0, scores)
    return {
        "auroc": result["AUROC"],
        "aupr": result["AUPR-OUT"],
        "aupr_in": result["AUPR-IN"],
        "fpr95": result["FPR95TPR"],
        "fpr95_id": (ood_scores <= id_scores.double().quantile(0.95, interpolation="higher"))
        .double()
        .mean()
        .item(),
        "detection_error": float(((false_alarms + 1 - found) / 2).min()),
    }


def evaluate(
    net: TIENet, test: Images, ood: Mapping[str, Images], fit_on: Images, garbage: bool = True
) -> tuple[dict, dict]:
    """All numbers of a trained network.

    Arguments:
        net: The network.
        test: ID test images.
        ood: OOD image sets by name.
        fit_on: ID training images.
        garbage: It has learned a garbage class; else pytorch-ood's detectors read its n logits.

    Returns:
        ``{"accuracy": ..., "rejected": ..., "scores": {score: {set: {auroc, aupr, fpr95}}}, "garbage_rate": {set: ...}}``
        and the scores themselves ``{score: {set: (N,)}}``, where the ID set is called ``id``.
    """
    sets = {"id": test, **ood}
    scores, facts = posthoc_scores(net, sets, fit_on) if not garbage else tie_scores(net, sets)
    numbers = {
        "accuracy": facts["id"]["accuracy"],
        "scores": {
            label: {name: ood_metrics(of["id"], of[name]) for name in ood}
            for label, of in scores.items()
        },
    }
    if garbage:
        numbers["id_garbage_rate"], numbers["id_rejected"] = (
            facts["id"]["garbage_rate"],
            facts["id"]["rejected"],
        )
        numbers["garbage_rate"] = {name: facts[name]["garbage_rate"] for name in ood}
        numbers["rejected"] = {name: facts[name]["rejected"] for name in ood}
    return numbers, scores
