"""``tie-ext demo``: TIE, a plain network, and a garbage class attached to it, on built-in
images.
"""

import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from tie_ext.cli import report, tables
from tie_ext.cli.classifier import attached, plain_network
from tie_ext.cli.evaluation import evaluate, metrics, score_combination
from tie_ext.cli.flags import check_flags, interactive
from tie_ext.cli.folder import clear, read_record, read_settings, written
from tie_ext.cli.images import RunImages
from tie_ext.cli.settings import TrainSettings, load_images
from tie_ext.cli.train import train_in
from tie_ext.models.backbones import BACKBONES
from tie_ext.training.config import TIEConfig
from tie_ext.training.recipe import Recipe
from tie_ext.utils.files import load_state, locked, save_state, write_json

# For 1348 small images. Digits of 8x8 pixels fill the image, so they are not shifted; without the
# shift, garbage of full weight costs ID accuracy, and tau, which comes from training images that
# are learned by heart, needs a larger lambda (docs/research/defaults.md).
RECIPE = Recipe(
    TIEConfig(epochs=10, lam=5.0, garbage_weight=0.1, candidates=1100, pool_size=1000),
    {"inversion": {"steps": 40, "width": 16}},
)
BATCH_SIZE = 32
ATTACH, PLAIN = "attach", "plain n-class network"


def run(flags: Namespace) -> None:
    """Train and compare, write report and detector, and print the tables."""
    check_flags(vars(flags))
    start, folder = time.perf_counter(), flags.out
    recipe = replace(RECIPE, config=replace(RECIPE.config, seed=flags.seed))
    settings = TrainSettings(data="demo", batch_size=BATCH_SIZE, shift=0, recipe=recipe)
    images = load_images(settings, flags.seed)
    _check_folder(folder, settings)
    sets = ", ".join(f"{len(x)} {name}" for name, x in images.ood.items())
    count = f"{len(images.train)} digits to train on, {len(images.test)} to test"
    print(f"{count}; OOD: {sets}")
    with locked(folder):
        _check_folder(folder, settings)  # again: another process may have used it meanwhile
        clear(folder)
        print("1 of 2: TIE, a network trained with its garbage class", flush=True)
        record = train_in(folder, settings, images, progress=interactive())
        print("2 of 2: a plain network, and a garbage class attached to it", flush=True)
        numbers, scores = _compare(settings, images)
        numbers = {"TIE": record["numbers"], **numbers}
        path = folder / "scores.safetensors"
        save_state(path, "scores", load_state(path, "scores") | scores)
        write_json(folder / "run.json", {**record, "comparison": numbers})
    print(tables.tables(numbers))
    print("\n".join(tables.WORDS))
    print(f"seed {flags.seed}, {time.perf_counter() - start:.0f} s of training and scoring")
    print(f"report: {report.write_report(folder)}\ndetector: {folder / 'network.safetensors'}")


def _compare(settings: TrainSettings, images: RunImages) -> tuple[dict, dict]:
    """Numbers and scores of a plain network, and of a garbage class attached to it."""
    config = settings.recipe.config
    plain = plain_network(
        BACKBONES["conv3"], images.train, config, BATCH_SIZE, shift=0, progress=interactive()
    )
    net = attached(plain, images.train, config.seed, interactive())
    numbers, scores = {}, {}
    numbers[ATTACH], found = evaluate(net, images)
    scores[ATTACH] = found["score"]
    combined = score_combination(net, images)
    numbers[ATTACH]["scores"] |= metrics(combined)
    numbers[PLAIN], found = evaluate(plain, images, garbage=False)
    return numbers, scores | combined | found


def _check_folder(folder: Path, settings: TrainSettings) -> None:
    """Refuse a folder that holds files of a run, but for an earlier demo, which is replaced."""
    files = written(folder)
    if files and not _is_demo(folder, settings):
        raise ValueError(
            f"Expected a folder for the demo, but got {folder}, which holds {files[-1].name} of "
            "something else; give another --out"
        )


def _is_demo(folder: Path, settings: TrainSettings) -> bool:
    """Whether a folder holds a finished demo, or one that was stopped, whatever its seed."""
    try:
        record = read_record(folder)
        if record["settings"]["data"] != "demo":
            return False
        if "comparison" in record:  # of any version
            return True
        found = read_settings(folder)
    except (OSError, ValueError, KeyError):
        return False
    seed = settings.recipe.config.seed
    config = replace(found.recipe.config, seed=seed)
    same = replace(found, recipe=replace(found.recipe, config=config))
    return same.record() == settings.record()
