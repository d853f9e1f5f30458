"""The paper's tables, cell by cell: what is run, what is not, and what the tables say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from cli.conftest import run as command
from cli.conftest import stop
from tie_ext import TIETrainer
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.classifier import make_network
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.reproduce import run, tables
from tie_ext.cli.reproduce.comparison import recipe_of, train_method
from tie_ext.models.backbones import Conv3
from tie_ext.models.head import GarbageHead
from tie_ext.training.recipe import Recipe

RECIPE = Recipe(replace(TINY, epochs=1), {"inversion": {"steps": 2, "width": 4}})


def changed(**settings) -> Recipe:
    return replace(RECIPE, config=replace(RECIPE.config, **settings))


def cells(out) -> dict[str, dict]:
    return tables.read_cells(out / tables.CELLS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two of the paper's sets as image folders, a few rendered images each."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for name, bright in (("mnist", 0), ("fashionmnist", 100)):
        for split, count in (("train", 4), ("test", 3)):
            for label in range(10):
                (root / name / split / str(label)).mkdir(parents=True)
                for i in range(count):
                    image = rng.integers(bright, bright + 100, (28, 28), dtype=np.uint8)
                    image[2 * label : 2 * label + 6] = 255 - bright
                    Image.fromarray(image).save(root / name / split / str(label) / f"{i}.png")
    return root


def plan_of(root, *methods, recipe=RECIPE, **more) -> run.Plan:
    how = {"data": ("mnist",), "seeds": (0,), **more}
    return run.Plan(root=str(root), methods=methods, recipe=recipe, **how)


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    plan = plan_of(root, "tie", "plain", data=("mnist", "svhn"), seeds=(0, 1))
    return out, plan, run.run_plan(plan, out)


@pytest.fixture(scope="module")
def images(root):
    return run.image_sets("mnist", 0, None, str(root)).train


def test_a_record_of_every_cell_with_data(done):
    records = cells(done[0])
    names = [f"mnist-allx1-{method}-seed{seed}" for method in ("plain", "tie") for seed in (0, 1)]
    assert list(records) == names
    record = records["mnist-allx1-tie-seed1"]
    made = {"command", "commit", "versions", "processor", "threads", "config", "synthesizers"}
    assert made | {"prior", "numbers", "level2", "seconds", "log"} <= set(record)
    assert record["config"]["seed"] == 1
    assert {"epoch", "tau", "proposed", "excluded", "seconds"} == set(record["log"][0])
    assert set(records["mnist-allx1-plain-seed0"]["numbers"]) == {"accuracy"}
    (missing,) = done[2]
    assert missing.startswith("svhn: Expected svhn in ")


def test_a_cell_is_not_run_twice_nor_with_other_settings(done, monkeypatch):
    out, plan, _ = done
    monkeypatch.setattr(run, "cell", lambda *_: pytest.fail("a cell was run"))
    run.run_plan(plan, out)
    said = r"Expected mnist-allx1-tie-seed0 in .*, but got one with lam 0.5 instead of 3.0"
    with pytest.raises(ValueError, match=said):
        run.run_plan(replace(plan, methods=("predecessor", "tie"), recipe=changed(lam=3.0)), out)
    # The plain network has no lambda.
    run.run_plan(replace(plan, methods=("plain",), recipe=changed(lam=3.0)), out)
    record = cells(out)["mnist-allx1-tie-seed0"]
    del record["config"]["adversarial_steps"]  # of before the setting, which has its default
    run._check_settings(out, record, "tie", RECIPE)
    with pytest.raises(ValueError, match="with adversarial_steps 0 instead of 5"):
        run._check_settings(out, record, "tie", changed(adversarial_steps=5))


def test_level_two_counts_what_came_through(done):
    for seed in (0, 1):
        record = cells(done[0])[f"mnist-allx1-tie-seed{seed}"]
        found = record["level2"]["fashionmnist"]
        rate = record["numbers"]["garbage_rate"]["fashionmnist"]
        assert found["through"] == round((1 - rate) * 30)
        assert set(found["score"]["all"]) == {"auroc", "fpr95", "fpr95_id"}
        for label in run.LEVEL_2:
            assert 0 <= found[label]["all"]["auroc"] <= 1
            if found["through"] == 30:
                assert found[label]["through"] == found[label]["all"]
        assert 0 < record["level2"]["least_confident_id"] <= 1
    plain = cells(done[0])["mnist-allx1-plain-seed0"]["level2"]["fashionmnist"]
    assert set(plain) == {*run.LEVEL_2, "through"}
    assert set(plain["UE"]) == {"all"}


def test_tables_beside_the_papers(done):
    text = (done[0] / "tables.md").read_text()
    for part in (
        "## mnist: conv3, 40 images, 1 epochs, seeds [0, 1]",
        "89.5 / 23.4",
        "7.47 / 5.99 / 2.86 / 0.83",
        "| TIE, ODIN",
        "| plain n-class network, ViM",
        "±",
    ):
        assert part in text
    part = text.split("### Rejected at either level")[1].splitlines()
    header, row = ([of.strip() for of in part[line].split("|")] for line in (2, 4))
    shown = [of.split()[0] for of in row[header.index("fashionmnist")].split(" / ")]
    records = [cells(done[0])[f"mnist-allx1-tie-seed{seed}"] for seed in (0, 1)]
    either = [100 * of["numbers"]["rejected"]["fashionmnist"] for of in records]
    kept = [of["level2"]["fashionmnist"]["score"]["all"]["fpr95_id"] for of in records]
    expected = [np.mean(either), 100 - 100 * np.mean(kept)]
    assert list(map(float, shown)) == pytest.approx(expected, abs=0.006)


def test_commands_that_differ_in_their_seeds_alone():
    made = [
        ("--methods tie --seeds 2 --epochs 5", 2),
        ("--methods tie --seeds 0 1 --epochs 5", 0),
        ("--methods tie --epochs 5", 1),
        ("--epochs 5", 0),
    ]
    records = [
        {"command": f"tie-ext reproduce {flags}", "config": {"seed": seed}} for flags, seed in made
    ]
    assert tables.commands(records) == [
        "tie-ext reproduce --epochs 5 --seeds 0",
        "tie-ext reproduce --methods tie --epochs 5 --seeds 0 1 2",
    ]


def test_some_classes_against_the_others_on_a_subset(root, tmp_path):
    how = {"data": ("mnist:0-4",), "images": 20}
    assert run.run_plan(plan_of(root, "shuffle,multiscale", **how), tmp_path) == []
    record = cells(tmp_path)["mnist_0-4-20x1-shuffle+multiscale-seed0"]
    assert list(record["synthesizers"]) == ["shuffle", "multiscale"]
    assert record["ood_images"] == dict.fromkeys(["other classes", "fashionmnist", *run.NOISE], 2)
    assert "## mnist:0-4: conv3, 20 images" in (tmp_path / "tables.md").read_text()


def test_the_command(root, tmp_path, capsys):
    where = ["--root", root, "--out", tmp_path, "--data", "fashionmnist", "svhn"]
    small = ["--candidates", 20, "--pool-size", 20, "--epochs", 1]
    arguments = ["reproduce", *where, "--methods", "white", "--seeds", 3, *small]
    assert command(*arguments) == 0
    assert list(cells(tmp_path)) == ["fashionmnist-allx1-white-seed3"]
    said = capsys.readouterr().out
    assert "not run: svhn: Expected" in said
    assert f"tables: {tmp_path / 'tables.md'}" in said
    with open(tmp_path / "cells.jsonl", "a") as file:
        file.write("{}\n")
    assert command(*arguments) == 1
    assert "Expected a cell of `tie-ext reproduce` in line 2 of" in capsys.readouterr().err


def test_methods_change_the_recipe_as_their_papers_say():
    everything = changed(lam=-math.inf)
    assert recipe_of("tie", RECIPE) == RECIPE
    assert recipe_of("predecessor", RECIPE) == everything
    assert recipe_of("white", RECIPE) == replace(RECIPE, synthesizers={}, prior=("white",))
    uniform = Recipe(everything.config, {"gradient": {}}, (), "uniform")
    assert recipe_of("ascood", RECIPE) == uniform
    weighted = changed(lam=-math.inf, garbage_weight=0.1).config
    assert recipe_of("vernekar", RECIPE) == Recipe(weighted, {"boundary": {}}, ())
    both = {"boundary": {}, "inversion": {"steps": 2, "width": 4}}
    assert recipe_of("boundary,inversion", RECIPE) == replace(RECIPE, synthesizers=both)
    layers = {"head": "multilayer", "prior": ["procedural"]}
    assert recipe_of("layers", RECIPE).record() == {**RECIPE.record(), **layers}
    with pytest.raises(ValueError, match="Expected a method, one of tie"):
        recipe_of("magic", RECIPE)


def test_initial_weights_of_a_seed(images):
    first, again, other = (
        make_network(lambda: Conv3(1, 10), images, replace(TINY, seed=seed)).fc.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_method_sees_the_first_epoch_in_the_same_order(images, monkeypatch):
    orders, draw = [], ImageBatches._order
    monkeypatch.setattr(
        ImageBatches, "_order", lambda self: orders.append(draw(self)) or orders[-1]
    )
    train_method("tie", Conv3, images, changed(seed=3))
    first, orders[:] = orders[0], []
    train_method("plain", Conv3, images, changed(seed=3))
    assert torch.equal(first, orders[0])


def test_attach_stands_on_the_plain_network(images):
    asked = (("plain", 1), ("attach", 1), ("attach", 2))
    plain, attached, other = (
        train_method(method, Conv3, images, changed(seed=seed))[0] for method, seed in asked
    )
    x = images.x[:5].float() / 255
    assert torch.equal(attached(x), plain(x))
    assert isinstance(attached.garbage, GarbageHead)
    assert attached.class_names == images.classes
    assert not torch.equal(attached.garbage.network[0].weight, other.garbage.network[0].weight)


def test_fpr_at_95_from_either_side():
    found = ood_metrics(torch.arange(100.0), torch.arange(50.0, 150.0))
    assert found["fpr95"] == pytest.approx(0.45)  # at 55, which 95 of the OOD scores reach
    assert found["fpr95_id"] == pytest.approx(0.45 + 0.01)  # at 95


@pytest.mark.slow
def test_a_killed_cell_goes_on_and_ends_the_same(root, tmp_path, monkeypatch):
    whole, plan = tmp_path / "whole", plan_of(root, "tie", recipe=changed(epochs=3))
    run.run_plan(plan, whole)
    epoch, killed = TIETrainer.epoch, tmp_path / "killed"
    with monkeypatch.context() as patched:
        patched.setattr(
            TIETrainer,
            "epoch",
            lambda self, batches: stop() if len(self.log) == 2 else epoch(self, batches),
        )
        with pytest.raises(KeyboardInterrupt):
            run.run_plan(plan, killed)
    with pytest.raises(ValueError, match=r"states.*, but got lr 0.001 instead of 0.1"):
        run.run_plan(plan_of(root, "tie", recipe=changed(epochs=3, lr=0.1)), killed)
    run.run_plan(plan, killed)
    one, other = (next(iter(cells(out).values())) for out in (whole, killed))
    assert (other["numbers"], other["level2"]) == (one["numbers"], one["level2"])
    assert len(other["log"]) == 3
    assert other["seconds"] >= sum(sum(entry["seconds"].values()) for entry in other["log"]) - 1e-3
    assert not any((killed / "states").iterdir())
