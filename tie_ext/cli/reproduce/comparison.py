"""TIE and the methods it is compared with, on the same data, backbone, initial weights and order
of batches.

Methods: ``tie``; ``layers``, the same with a head on every layer and procedural images, as
``tie-ext train`` has it; ``predecessor``, which excludes every inversion; ``multiscale`` and
``white``, the (n+1)-class network whose garbage class stays the noise it began with (no TIE);
``plain``, the n-class network that pytorch-ood's MSP, energy and Mahalanobis read; ``attach``, a
garbage head on that network, which stays as it is; ``vernekar`` and ``ascood``, those papers' own
training; ``openood:logitnorm`` and ``openood:ascood``, OpenOOD's own; and any synthesizers in
TIE's loop, by name, separated by commas.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tie_ext.cli.batches import ImageBatches, training_batches
from tie_ext.cli.classifier import attached, make_network, train_plain
from tie_ext.cli.evaluation import evaluate
from tie_ext.cli.images import Images, RunImages
from tie_ext.models.network import TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.saliency import Standardized
from tie_ext.training.config import TIEConfig
from tie_ext.training.log import EpochLog
from tie_ext.training.recipe import Recipe
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.provenance import peak_memory, provenance

LABELS = {
    "tie": "TIE",
    "layers": "TIE, head on every layer",
    "predecessor": "predecessor (lambda = -inf)",
    "multiscale": "no TIE, multi-scale noise",
    "white": "no TIE, white noise",
    "vernekar": "Vernekar et al.",
    "ascood": "ASCOOD",
    "attach": "attach",
    "plain": "plain n-class network",
    "openood:logitnorm": "LogitNorm (OpenOOD's)",
    "openood:ascood": "ASCOOD (OpenOOD's)",
}
"""Names of the methods in tables."""
OPENOOD = tuple(method for method in LABELS if method.startswith("openood:"))
"""Methods that OpenOOD ships, trained by its own code where it is installed."""
METHODS = tuple(method for method in LABELS if method not in OPENOOD)
"""The methods of this package, but combinations of synthesizers."""

BATCH_SIZE = 128
"""ID images per batch."""


def check_method(method: str) -> None:
    """Refuse what is no method.

    Raises:
        ValueError: If it is not one of :data:`LABELS`, nor names of synthesizers.
    """
    if method not in LABELS and not set(method.split(",")) <= set(SYNTHESIZERS):
        raise ValueError(
            f"Expected a method, one of {', '.join(LABELS)}, or synthesizers "
            f"({', '.join(SYNTHESIZERS)}), but got {method!r}"
        )


def has_garbage(method: str) -> bool:
    """Whether a method trains a garbage class, or the n ID logits alone."""
    return method != "plain" and method not in OPENOOD


def label(method: str) -> str:
    """The name of a method in tables."""
    return LABELS.get(method, method.replace(",", " + "))


def recipe_of(method: str, recipe: Recipe) -> Recipe:
    """A recipe as a method changes it: other papers' settings as in those papers.

    Raises:
        ValueError: If there is no such method.
    """
    check_method(method)
    exclude_all = replace(recipe.config, lam=-math.inf)

    def synthesizers(*names: str) -> dict:
        return {name: recipe.synthesizers.get(name, {}) for name in names}

    if method == "predecessor":
        return replace(recipe, config=exclude_all)
    if method == "vernekar":  # no threshold, no noise, OOD class weight 0.1
        config = replace(exclude_all, garbage_weight=0.1)
        return Recipe(config, synthesizers("boundary"), ())
    if method == "ascood":  # the authors' w = 1; every outlier joins
        return Recipe(exclude_all, synthesizers("gradient"), (), "uniform")
    if method == "layers":
        return replace(recipe, head="multilayer", prior=None)
    if method in ("multiscale", "white"):
        return replace(recipe, synthesizers={}, prior=(method,))
    if method in LABELS:
        return recipe
    return replace(recipe, synthesizers=synthesizers(*method.split(",")))


def train_method(
    method: str,
    backbone: Callable[[], nn.Module],
    images: Images,
    recipe: Recipe,
    batch_size: int = BATCH_SIZE,
    device: str | torch.device = "cpu",
    progress: bool = False,
    after_epoch: Callable[[TIETrainer], None] = lambda trainer: None,
    shift: int | None = None,
    state: Path | None = None,
) -> tuple[TIENet, list[EpochLog]]:
    """Train one method from the initial weights that the recipe's seed gives, or resume it.

    Arguments:
        method: A method (see the module).
        backbone: Makes the backbone.
        images: The ID training images.
        recipe: Settings of the run, which the method may change (:func:`recipe_of`).
        batch_size: ID images per batch.
        device: Where to train.
        progress: Show progress bars.
        after_epoch: Called with the trainer after each epoch (where there is one).
        shift: Largest shift of a training image, in pixels; None for an eighth of its size.
        state: File of the trainer's state, written after each epoch; where it exists, training
            resumes from it. The n-class methods have no such state and start again.

    Returns:
        The network in evaluation mode, and the log (empty for ``plain`` and OpenOOD's).
    """
    recipe = recipe_of(method, recipe)
    config = recipe.config

    def make() -> nn.Module:
        return Standardized(backbone()) if method.endswith("ascood") else backbone()

    net = make_network(make, images, config, device, recipe.head)
    batches = training_batches(images, batch_size, shift)
    if has_garbage(method) and method != "attach":
        trainer = recipe.trainer(net, progress)
        if state is not None and state.exists():
            trainer.load(state)
        while len(trainer.log) < config.epochs:
            trainer.epoch(batches)
            after_epoch(trainer)
            if state is not None:
                trainer.save(state)
        return net.eval(), trainer.log
    if method in OPENOOD:
        _train_by_openood(method, net, batches, config)
    else:
        train_plain(net, batches, config, progress)
    if method == "attach":
        net = attached(net, images, config.seed, progress)
    return net.eval(), []


def _train_by_openood(method: str, net: TIENet, batches: ImageBatches, config: TIEConfig) -> None:
    from tie_ext.openood import check_requirements

    check_requirements()  # before OpenOOD's own imports fail one by one
    from tie_ext.cli.reproduce.openood_baselines import train_baseline

    train_baseline(method.removeprefix("openood:"), net, batches, config.epochs, config.seed)


def cell(
    method: str,
    backbone: Callable[[], nn.Module],
    images: RunImages,
    recipe: Recipe,
    about: Mapping[str, object],
    device: str | torch.device = "cpu",
    after_epoch: Callable[[TIETrainer], None] = lambda trainer: None,
    **how: Any,
) -> tuple[dict, TIENet]:
    """Train and evaluate one method.

    Arguments:
        images: The images to train and to score.
        about: Facts about the data to record (names, counts).

    The other arguments are those of :func:`train_method`.

    Returns:
        A record for JSON (numbers, log, seconds, peak memory after each epoch in MB, command,
        commit, versions, settings; ``gone_on_after``, the epochs that an earlier process trained),
        and the network.
    """
    memory: list[float | None] = []
    start = time.perf_counter()

    def measure(trainer: TIETrainer) -> None:
        memory.append(peak_memory())
        after_epoch(trainer)

    how |= {"device": device, "after_epoch": measure}
    net, log = train_method(method, backbone, images.train, recipe, **how)
    before = log[: len(log) - len(memory)]
    seconds = time.perf_counter() - start + sum(sum(entry.seconds.values()) for entry in before)
    numbers, _ = evaluate(net, images, has_garbage(method))
    return {
        "method": method,
        **about,
        "images": len(images.train),
        "test_images": len(images.test),
        "ood_images": {name: len(s) for name, s in images.ood.items()},
        "batch_size": how.get("batch_size", BATCH_SIZE),
        **recipe_of(method, recipe).record(),
        "numbers": numbers,
        "seconds": seconds,
        "gone_on_after": len(before),
        "peak_memory_mb": [None] * len(before) + memory,
        "log": [asdict(entry) for entry in log],
        **provenance(device),
    }, net
