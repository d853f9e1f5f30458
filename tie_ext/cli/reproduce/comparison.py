"""TIE beside what it has to beat, on the same data, backbone, initial weights and order of batches.

Methods: ``tie``; ``layers``, the same with a head on every layer and procedural images, as `tie-ext train` has it; ``predecessor``, which expels
every inversion; ``multiscale`` and ``white``, the (n+1)-class network whose garbage class stays the noise it began with (no TIE); ``plain``, the
n-class network that pytorch-ood's MSP, energy and Mahalanobis read; ``attach``, a garbage head on that network, which stays as it is; ``vernekar``
and ``ascood``, those papers' own training; ``openood:logitnorm`` and ``openood:ascood``, OpenOOD's own; and any synthesizers in TIE's loop, by name,
with commas between.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from tie_ext.cli.data import ImageBatches, Images, training_batches
from tie_ext.cli.evaluation import evaluate
from tie_ext.models.network import TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.saliency import Standardized
from tie_ext.training.attach import attach
from tie_ext.training.config import TIEConfig
from tie_ext.training.log import EpochLog
from tie_ext.training.recipe import Recipe
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.provenance import peak_memory, provenance
from tie_ext.utils.random import seeded

METHODS = (
    "tie",
    "layers",
    "predecessor",
    "multiscale",
    "white",
    "vernekar",
    "ascood",
    "attach",
    "plain",
)
"""TIE by the paper's garbage logit and by a head on every layer, its predecessor, the two no-TIE baselines, the training of two other papers, and
the n-class network with and without a garbage head."""
OPENOOD = ("openood:logitnorm", "openood:ascood")
"""Training methods that OpenOOD ships, trained by its own code where it is installed (:mod:`tie_ext.cli.reproduce.openood_baselines`)."""
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


def recipe_of(method: str, recipe: Recipe) -> Recipe:
    """A recipe as a method changes it: other papers' settings as they have them, the synthesizers by name.

    Raises:
        ValueError: If there is no such method.
    """
    check_method(method)
    config = recipe.config
    everything = replace(config, lam=-float("inf"))
    if method == "predecessor":
        return replace(recipe, config=everything)
    if method == "vernekar":  # no threshold, no noise, OOD class weight 0.1
        return Recipe(
            replace(everything, garbage_weight=0.1),
            {"boundary": recipe.synthesizers.get("boundary", {})},
            (),
        )
    if method == "ascood":  # the authors' w = 1; every outlier joins
        return Recipe(
            everything, {"gradient": recipe.synthesizers.get("gradient", {})}, (), "uniform"
        )
    if method == "layers":
        return replace(recipe, head="multilayer", prior=("procedural",))
    if method in ("multiscale", "white"):
        return replace(recipe, synthesizers={}, prior=(method,))
    if method in (*METHODS, *OPENOOD):
        return recipe
    return replace(
        recipe,
        synthesizers={name: recipe.synthesizers.get(name, {}) for name in method.split(",")},
    )


def train_plain(
    net: TIENet, batches: ImageBatches, config: TIEConfig, progress: bool = False
) -> None:
    """Train the n ID logits alone, by plain cross-entropy; the same optimiser, learning rates, epochs and seeds as TIE's."""
    net.train()
    device = net.fc.weight.device
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
    for t in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr_in(t)
        with seeded(config.seed, t + 1, 0):  # the stream of TIE's epoch
            for x, y in tqdm(
                batches, desc=f"epoch {t + 1}: plain", leave=False, disable=not progress
            ):
                loss = F.cross_entropy(net(x.to(device)), y.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()


def classifier(net: TIENet) -> nn.Module:
    """The n-class network that a plainly trained one of :data:`tie_ext.models.backbones.BACKBONES` is, without the garbage class."""
    model = copy.deepcopy(net.backbone)
    model.fc = copy.deepcopy(net.fc)
    return model.eval()


def attached(net: TIENet, images: Images, seed: int, progress: bool = False) -> TIENet:
    """The same classifier with a garbage head on every layer, taught by procedural images beside the training images."""
    return attach(
        classifier(net),
        ImageBatches(images, 500),
        net.num_classes,
        class_names=net.class_names,
        seed=seed,
        progress=progress,
    )


def train_method(
    method: str,
    backbone: Callable[[], nn.Module],
    images: Images,
    recipe: Recipe,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    progress: bool = False,
    after_epoch: Callable[[TIETrainer], None] = lambda trainer: None,
    shift: int | None = None,
    state: Path | None = None,
) -> tuple[TIENet, list[EpochLog]]:
    """Train one method from the initial weights that the recipe's seed gives, or go on where ``state`` stands.

    Arguments:
        method: One of :data:`METHODS` or :data:`OPENOOD`, or synthesizers by name.
        backbone: Makes the backbone.
        images: The ID training images.
        recipe: Settings of the run, as the method is to change them (:func:`recipe_of`).
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
    recipe = recipe_of(method, recipe)
    config = recipe.config
    with seeded(config.seed):
        inner = Standardized(backbone()) if method.endswith("ascood") else backbone()
        net = TIENet(
            inner,
            len(images.classes),
            images.shape,
            class_names=images.classes,
            head=recipe.head,
        ).to(device)
    net.autocast_dtype = config.autocast_dtype
    batches = training_batches(images, batch_size, shift)
    log: list[EpochLog] = []
    if method in ("plain", "attach"):
        train_plain(net, batches, config, progress)
        if method == "attach":
            net = attached(net, images, config.seed, progress)
    elif method in OPENOOD:
        from tie_ext.openood import check_requirements

        check_requirements()  # before OpenOOD's own imports fail one by one
        from tie_ext.cli.reproduce.openood_baselines import train_baseline

        train_baseline(method.removeprefix("openood:"), net, batches, config.epochs, config.seed)
    else:
        trainer = recipe.trainer(net, progress)
        if state is not None and state.exists():
            trainer.load(state)
        while len(trainer.log) < config.epochs:
            trainer.epoch(batches)
            after_epoch(trainer)
            if state is not None:
                trainer.save(state)
        log = trainer.log
    return net.eval(), log


def cell(
    method: str,
    backbone: Callable[[], nn.Module],
    images: Images,
    test: Images,
    ood: Mapping[str, Images],
    recipe: Recipe,
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

    The other arguments are those of :func:`train_method` and :func:`tie_ext.cli.evaluation.evaluate`.

    Returns:
        A JSON-able record (numbers, log, seconds, peak memory after each epoch in MB, command, commit, versions, settings; ``gone_on_after``,
        the epochs that another process had trained before), and the network.
    """
    memory: list[float | None] = []
    start = time.perf_counter()

    def look(trainer: TIETrainer) -> None:
        memory.append(peak_memory())
        after_epoch(trainer)

    net, log = train_method(
        method, backbone, images, recipe, batch_size, device, progress, look, state=state
    )
    before = log[: len(log) - len(memory)]
    seconds = time.perf_counter() - start + sum(sum(entry.seconds.values()) for entry in before)
    numbers, _ = evaluate(net, test, ood, images, has_garbage(method))
    record = {
        "method": method,
        **about,
        "images": len(images),
        "test_images": len(test),
        "ood_images": {name: len(s) for name, s in ood.items()},
        "batch_size": batch_size,
        **recipe_of(method, recipe).record(),
        "numbers": numbers,
        "seconds": seconds,
        "gone_on_after": len(before),
        "peak_memory_mb": [None] * len(before) + memory,
        "log": [asdict(entry) for entry in log],
        **provenance(device),
    }
    return record, net
