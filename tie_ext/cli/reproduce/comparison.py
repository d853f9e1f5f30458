"""TIE and the methods it is compared with, on the same data, backbone, initial weights and order
of batches.

Methods: ``tie``; ``layers``, the same with a head on every layer and procedural images, as
``tie-ext train`` has it; ``predecessor``, which excludes every inversion; ``multiscale`` and
``white``, the (n+1)-class network whose garbage class stays the noise it began with (no TIE);
``plain``, the n-class network that pytorch-ood's MSP, energy and Mahalanobis read; ``attach``, a
garbage head on that network, which stays as it is; ``vernekar`` and ``ascood``, those papers' own
training; and any synthesizers in TIE's loop, by name, separated by commas.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tie_ext.cli.batches import training_batches
from tie_ext.cli.classifier import attached, make_network, train_plain
from tie_ext.cli.evaluation import decisions
from tie_ext.cli.images import ImageSet, RunImages
from tie_ext.models.network import TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.saliency import Standardized
from tie_ext.training.log import EpochLog
from tie_ext.training.recipe import Recipe
from tie_ext.utils.provenance import provenance

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
}
"""Names of the methods in tables, but combinations of synthesizers."""

BATCH_SIZE = 128
"""ID images per batch."""
LOGGED = ("epoch", "tau", "proposed", "excluded", "seconds")
"""What a cell keeps of each epoch."""


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
    return method != "plain"


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
    images: ImageSet,
    recipe: Recipe,
    device: str | torch.device = "cpu",
    progress: bool = False,
    state: Path | None = None,
) -> tuple[TIENet, list[EpochLog]]:
    """Train one method from the initial weights that the recipe's seed gives, or resume it.

    Arguments:
        method: A method (see the module).
        backbone: Makes the backbone.
        images: The ID training images.
        recipe: Settings of the run, which the method may change (:func:`recipe_of`).
        device: Where to train.
        progress: Show progress bars.
        state: File of the trainer's state, written after each epoch; where it exists, training
            resumes from it. The n-class methods have no such state and start again.

    Returns:
        The network in evaluation mode, and the log (empty for ``plain`` and ``attach``).
    """
    recipe = recipe_of(method, recipe)
    config = recipe.config

    def make() -> nn.Module:
        return Standardized(backbone()) if method == "ascood" else backbone()

    net = make_network(make, images, config, device, recipe.head)
    batches = training_batches(images, BATCH_SIZE)
    if method in ("plain", "attach"):
        train_plain(net, batches, config, progress)
        if method == "attach":
            net = attached(net, images, config.seed, progress)
        return net.eval(), []
    trainer = recipe.trainer(net, progress)
    if state is not None and state.exists():
        trainer.load(state)
    while len(trainer.log) < config.epochs:
        trainer.epoch(batches)
        if state is not None:
            trainer.save(state)
    return net.eval(), trainer.log


def cell(
    method: str,
    backbone: Callable[[], nn.Module],
    images: RunImages,
    recipe: Recipe,
    about: Mapping[str, object],
    *how: Any,
) -> tuple[dict, TIENet]:
    """Train and evaluate one method.

    Arguments:
        images: The images to train and to score.
        about: Facts about the data to record (names, counts).

    The other arguments are those of :func:`train_method`.

    Returns:
        A record for JSON (numbers, log, seconds, command, commit, versions, settings), and the
        network.
    """
    start = time.perf_counter()
    net, log = train_method(method, backbone, images.train, recipe, *how)
    seconds = time.perf_counter() - start
    before = sum(sum(entry.seconds.values()) for entry in log)  # of earlier processes, too
    kept = [{key: getattr(entry, key) for key in LOGGED} for entry in log]
    return {
        "method": method,
        **about,
        "images": len(images.train),
        "test_images": len(images.test),
        "ood_images": {name: len(s) for name, s in images.ood.items()},
        "batch_size": BATCH_SIZE,
        **recipe_of(method, recipe).record(),
        "numbers": decisions(net, images, has_garbage(method))[0],
        "seconds": max(seconds, before),
        "log": kept,
        **provenance(net.low.device),
    }, net
