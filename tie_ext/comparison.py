"""TIE beside what it has to beat, on the same data, backbone, initial weights and order of batches.

Methods: ``tie``; ``predecessor``, which expels every inversion; ``multiscale`` and ``white``, the (n+1)-class network whose garbage class
stays the noise it began with (no TIE); ``plain``, the n-class network that pytorch-ood's MSP, energy and Mahalanobis read; ``vernekar`` and
``ascood``, those papers' own training; ``openood:logitnorm`` and ``openood:ascood``, OpenOOD's own; and any synthesizers in TIE's loop, by
name, with commas between. Metrics are pytorch-ood's own (OOD is the positive class).
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from tie_ext.data import Batches, ImageSet, training_batches
from tie_ext.decision import decide
from tie_ext.networks import Standardized, TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.synthesis import frozen
from tie_ext.training import EpochLog, TIEConfig, TIETrainer, seeded

METHODS = ("tie", "predecessor", "multiscale", "white", "vernekar", "ascood", "plain")
"""TIE, its predecessor, the two no-TIE baselines, the training of two other papers, and the n-class network for post-hoc detectors."""
OPENOOD = ("openood:logitnorm", "openood:ascood")
"""Training methods that OpenOOD ships, trained by its own code where it is installed (:mod:`tie_ext.openood.baselines`)."""
LABELS = {
    "tie": "TIE",
    "predecessor": "predecessor (lambda = -inf)",
    "multiscale": "no TIE, multi-scale noise",
    "white": "no TIE, white noise",
    "vernekar": "Vernekar et al.",
    "ascood": "ASCOOD",
    "plain": "plain n-class network",
    "openood:logitnorm": "LogitNorm (OpenOOD's)",
    "openood:ascood": "ASCOOD (OpenOOD's)",
}
"""How tables name them."""


def check_method(method: str) -> None:
    """Refuse what is no method.

    Raises:
        ValueError: If it is neither one of :data:`METHODS` or :data:`OPENOOD` nor names of synthesizers.
    """
    if method not in (*METHODS, *OPENOOD) and not set(method.split(",")) <= set(SYNTHESIZERS):
        raise ValueError(
            f"Expected a method, one of {', '.join((*METHODS, *OPENOOD))}, or synthesizers ({', '.join(SYNTHESIZERS)}), but got {method!r}"
        )


def has_garbage(method: str) -> bool:
    """Whether a method trains a garbage class, or the n ID logits alone."""
    return method != "plain" and method not in OPENOOD


def label(method: str) -> str:
    """How tables name a method."""
    return LABELS.get(method, method.replace(",", " + "))


def make_trainer(method: str, net: TIENet, config: TIEConfig, progress: bool = False) -> TIETrainer:
    """The trainer of an (n+1)-class method.

    Raises:
        ValueError: If there is no such method, or it has no garbage class.
    """
    check_method(method)
    if not has_garbage(method):
        raise ValueError(f"Expected a method with a garbage class, but got {method!r}")
    synthesizers: list | None = [] if method in ("multiscale", "white") else None
    return TIETrainer(net, method_config(method, config), synthesizers, progress)


def method_config(method: str, config: TIEConfig) -> TIEConfig:
    """The settings as a method changes them: those of other papers, as they have them; the synthesizers by name."""
    if method == "predecessor":
        return replace(config, lam=-float("inf"))
    if method == "vernekar":  # no threshold, no noise, OOD class weight 0.1
        return replace(config, lam=-float("inf"), synthesizer="boundary", prior="none", garbage_weight=0.1)
    if method == "ascood":  # the authors' w = 1; every outlier joins
        return replace(config, lam=-float("inf"), synthesizer="gradient", prior="none", objective="uniform", garbage_weight=1.0)
    if method in ("multiscale", "white"):
        return replace(config, prior=method)
    return config if method in (*METHODS, *OPENOOD) else replace(config, synthesizer=method)


def settings_of(method: str, config: TIEConfig) -> dict:
    """The settings of :func:`method_config` as a record keeps them: JSON has no infinity."""
    return {key: str(value) if value == -float("inf") else value for key, value in asdict(method_config(method, config)).items()}


def train_plain(net: TIENet, batches: Batches, config: TIEConfig, progress: bool = False) -> None:
    """Train the n ID logits alone, by plain cross-entropy; the same optimiser, learning rates, epochs and seeds as TIE's."""
    net.train()
    device = net.fc.weight.device
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
    for t in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr_in(t)
        with seeded(config.seed * 100_003 + t + 1):
            for x, y in tqdm(batches, desc=f"epoch {t + 1}: plain", leave=False, disable=not progress):
                loss = F.cross_entropy(net(x.to(device)), y.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def train(
    method: str,
    backbone: Callable[[], nn.Module],
    images: ImageSet,
    config: TIEConfig,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    progress: bool = False,
    after_epoch: Callable[[TIETrainer], None] = lambda trainer: None,
    shift: int | None = None,
    state: Path | None = None,
) -> tuple[TIENet, list[EpochLog]]:
    """Train one method from the initial weights that ``config.seed`` gives, or go on where ``state`` stands.

    Arguments:
        method: One of :data:`METHODS` or :data:`OPENOOD`, or synthesizers by name.
        backbone: Makes the backbone.
        images: The ID training images.
        config: Settings of the run.
        batch_size: ID images a batch.
        device: Where to train.
        progress: Show progress bars.
        after_epoch: Called with the trainer after each epoch (where there is one).
        shift: Most pixels a training image is moved by; None for an eighth of its size.
        state: Where the trainer is kept after each epoch; if the file is there, training goes on from it, and ends as if it had never
            stopped. The n-class methods, which have no such trainer, begin anew.

    Returns:
        The network in evaluation mode, and the log (empty for ``plain`` and OpenOOD's).
    """
    with seeded(config.seed):
        inner = Standardized(backbone()) if method.endswith("ascood") else backbone()
        net = TIENet(inner, len(images.classes), images.shape, classes=images.classes).to(device)
    net.precision = config.precision
    batches = training_batches(images, batch_size, shift)
    log: list[EpochLog] = []
    if method == "plain":
        train_plain(net, batches, config, progress)
    elif method in OPENOOD:
        from tie_ext.openood import train_baseline

        train_baseline(method.removeprefix("openood:"), net, batches, config.epochs, config.seed)
    else:
        trainer = make_trainer(method, net, config, progress)
        if state is not None and state.exists():
            trainer.load(state)
        while len(trainer.log) < config.epochs:
            trainer.epoch(batches)
            after_epoch(trainer)
            if state is not None:
                trainer.save(state)
        log = trainer.log
    return net.eval(), log


@torch.no_grad()
def all_logits(net: TIENet, images: ImageSet) -> Tensor:
    """The n+1 logits ``(N, n+1)`` of all images, on the CPU; the network is left as it was."""
    device = net.fc.weight.device
    with frozen(net):
        return torch.cat([net(x.to(device), garbage=True).cpu() for x, _ in Batches(images, 500)])


def tie_scores(net: TIENet, sets: Mapping[str, ImageSet]) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
    """Score and decisions of an (n+1)-class network.

    Arguments:
        net: The network.
        sets: Image sets by name; the one with labels >= 0 is ID.

    Returns:
        Scores ``{"score": {set: (N,)}}``, larger = more OOD; and, by set, ``garbage_rate`` (rejected at level 1), ``rejected`` (at either
        level) and, for the ID set, ``accuracy`` over n+1 outputs; all in [0, 1].
    """
    scores, facts = {}, {}
    for name, images in sets.items():
        logits = all_logits(net, images)
        decision = decide(logits, net.tau.cpu())
        scores[name] = decision.score
        level = decision.level
        facts[name] = {"garbage_rate": (level == 1).double().mean().item(), "rejected": (level > 0).double().mean().item()}
        if bool((images.y >= 0).all()):
            facts[name]["accuracy"] = (logits.argmax(1) == images.y).double().mean().item()
    return {"score": scores}, facts


def posthoc_scores(net: TIENet, sets: Mapping[str, ImageSet], fit_on: ImageSet) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict]]:
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
    detectors = {"MSP": MaxSoftmax(net), "energy": EnergyBased(net), "Mahalanobis": Mahalanobis(net.features)}
    scores: dict[str, dict[str, Tensor]] = {}
    with frozen(net), torch.no_grad():
        for label, detector in detectors.items():
            if detector.requires_fit:
                detector.to(device).fit(Batches(fit_on, 500))
            scores[label] = {
                name: torch.cat([detector.predict(x.to(device)).cpu() for x, _ in Batches(images, 500)]) for name, images in sets.items()
            }
        facts = {
            name: {"accuracy": (all_logits(net, images)[:, :-1].argmax(1) == images.y).double().mean().item()}
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

    scores, labels = torch.cat([id_scores, ood_scores]), torch.cat([torch.zeros(len(id_scores)), -torch.ones(len(ood_scores))]).long()
    result = OODMetrics().update(scores, labels).compute()
    false_alarms, found, _ = roc_curve(labels < 0, scores)
    return {
        "auroc": result["AUROC"],
        "aupr": result["AUPR-OUT"],
        "aupr_in": result["AUPR-IN"],
        "fpr95": result["FPR95TPR"],
        "fpr95_id": (ood_scores <= id_scores.double().quantile(0.95, interpolation="higher")).double().mean().item(),
        "detection_error": float(((false_alarms + 1 - found) / 2).min()),
    }


def evaluate(method: str, net: TIENet, test: ImageSet, ood: Mapping[str, ImageSet], fit_on: ImageSet) -> tuple[dict, dict]:
    """All numbers of one trained method.

    Arguments:
        method: One of :data:`METHODS`.
        net: Its network.
        test: ID test images.
        ood: OOD image sets by name.
        fit_on: ID training images.

    Returns:
        ``{"accuracy": ..., "rejected": ..., "scores": {score: {set: {auroc, aupr, fpr95}}}, "garbage_rate": {set: ...}}`` and the scores
        themselves ``{score: {set: (N,)}}``, where the ID set is called ``id``.
    """
    sets = {"id": test, **ood}
    scores, facts = posthoc_scores(net, sets, fit_on) if not has_garbage(method) else tie_scores(net, sets)
    numbers = {
        "accuracy": facts["id"]["accuracy"],
        "scores": {label: {name: ood_metrics(of["id"], of[name]) for name in ood} for label, of in scores.items()},
    }
    if has_garbage(method):
        numbers["id_garbage_rate"], numbers["id_rejected"] = facts["id"]["garbage_rate"], facts["id"]["rejected"]
        numbers["garbage_rate"] = {name: facts[name]["garbage_rate"] for name in ood}
        numbers["rejected"] = {name: facts[name]["rejected"] for name in ood}
    return numbers, scores


def cell(
    method: str,
    backbone: Callable[[], nn.Module],
    images: ImageSet,
    test: ImageSet,
    ood: Mapping[str, ImageSet],
    config: TIEConfig,
    about: Mapping[str, object],
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    progress: bool = False,
    after_epoch: Callable[[TIETrainer], None] = lambda trainer: None,
    state: Path | None = None,
) -> tuple[dict, TIENet]:
    """Train and evaluate one method, and say all that is needed to do it again.

    Arguments:
        about: Facts about the data to record (names, counts).

    The other arguments are those of :func:`train` and :func:`evaluate`.

    Returns:
        A JSON-able record (numbers, log, seconds, peak memory after each epoch in MB, command, commit, versions, settings; ``gone_on_after``,
        the epochs that another process had trained before), and the network.
    """
    memory: list[float | None] = []
    start = time.perf_counter()

    def look(trainer: TIETrainer) -> None:
        memory.append(peak_memory())
        after_epoch(trainer)

    net, log = train(method, backbone, images, config, batch_size, device, progress, look, state=state)
    before = log[: len(log) - len(memory)]
    seconds = time.perf_counter() - start + sum(sum(entry.seconds.values()) for entry in before)
    numbers, _ = evaluate(method, net, test, ood, images)
    record = {
        "method": method,
        **about,
        "images": len(images),
        "test_images": len(test),
        "ood_images": {name: len(s) for name, s in ood.items()},
        "batch_size": batch_size,
        "config": settings_of(method, config),
        "numbers": numbers,
        "seconds": seconds,
        "gone_on_after": len(before),
        "peak_memory_mb": [None] * len(before) + memory,
        "log": [asdict(entry) for entry in log],
        **provenance(device),
    }
    return record, net


def peak_memory() -> float | None:
    """Most memory this process has held so far, MB (resident set); None where Python cannot tell, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def provenance(
    device: str | torch.device = "cpu", packages: Sequence[str] = ("torch", "torchvision", "numpy", "pytorch-ood", "scikit-learn")
) -> dict:
    """Command, commit, versions, processor (that of ``device``) and threads of this process."""
    versions = {"python": platform.python_version()}
    for package in ("tie_ext", *packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    where = Path(__file__).resolve().parent
    git = ["git", "-C", os.fspath(where), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    program = Path(sys.argv[0])
    name = "tie-ext" if program.resolve() == where / "cli.py" else program.name  # the former: `python -m tie_ext.cli`
    command = " ".join([name, *sys.argv[1:]])
    return {"command": command, "commit": commit, "versions": versions, "processor": processor(device), "threads": torch.get_num_threads()}


def processor(device: str | torch.device = "cpu") -> str:
    """Name of what computes on ``device``; times are compared on one only, and sums differ from one to another in their last bits."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux, or names the architecture alone
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()
