"""The paper's tables, cell by cell: what is run, what is not, and what the tables say."""

import json
import math
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, make_batches, make_net, make_trainer, set_head_defaults
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tie_ext import TIETrainer
from tie_ext.cli import main as cli
from tie_ext.cli.batches import ImageBatches
from tie_ext.cli.evaluation import ood_metrics
from tie_ext.cli.main import main
from tie_ext.cli.reproduce import run, tables
from tie_ext.cli.reproduce.comparison import recipe_of, train_method
from tie_ext.models.backbones import Conv3
from tie_ext.models.head import GarbageHead
from tie_ext.outliers import Inversion
from tie_ext.outliers.inversion import CLEAR
from tie_ext.training.recipe import Recipe
from tie_ext.utils.provenance import peak_memory, provenance

Image = pytest.importorskip("PIL.Image")
RECIPE = Recipe(replace(TINY, epochs=1), {"inversion": {"steps": 2, "width": 4}})


def changed(**settings) -> Recipe:
    return replace(RECIPE, config=replace(RECIPE.config, **settings))


def cells(out) -> dict[str, dict]:
    return tables.read_cells(out / tables.CELLS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two of the paper's sets as image folders, a few drawn images each."""
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


@pytest.fixture(scope="module")
def done(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    plan = run.Plan(
        root=str(root),
        data=("mnist", "svhn"),
        seeds=(0, 1),
        methods=("tie", "plain"),
        recipe=RECIPE,
    )
    return out, plan, run.run_plan(plan, out)


def test_every_cell_with_data_is_there_and_says_how_it_was_made(done):
    out, _, _ = done
    records = cells(out)
    assert list(records) == [
        f"mnist-allx1-{method}-seed{seed}" for method in ("plain", "tie") for seed in (0, 1)
    ]
    record = records["mnist-allx1-tie-seed1"]
    assert {
        "command",
        "commit",
        "versions",
        "processor",
        "threads",
        "config",
        "synthesizers",
        "prior",
        "numbers",
        "level2",
        "seconds",
    } <= set(record)
    assert record["config"]["seed"] == 1


def test_what_has_no_data_is_said(done):
    out, _, missing = done
    assert len(missing) == 1
    assert missing[0].startswith("svhn: ")
    assert "## Not run" in (out / "tables.md").read_text()


def test_what_was_not_run_stays_said_until_it_can_be(done, root, tmp_path):
    _, plan, _ = done
    for name in ("svhn", "mnist", "cifar10"):
        run.run_plan(replace(plan, data=(name,), seeds=(0,), methods=("plain",)), tmp_path)
    assert list(json.loads((tmp_path / "not_run.json").read_text())) == ["svhn", "cifar10"]
    run._note_missing(tmp_path / "not_run.json", ("svhn",), {})
    assert "- cifar10: " in (text := tables.tables(tmp_path))
    assert "- svhn: " not in text


def test_a_cell_of_other_settings_is_not_taken_for_one_of_these(done, monkeypatch):
    out, plan, _ = done
    monkeypatch.setattr(
        run,
        "cell",
        lambda *_, **__: pytest.fail("a cell was run before the settings were looked at"),
    )
    with pytest.raises(
        ValueError,
        match=r"Expected mnist-allx1-tie-seed0 in .*cells.jsonl to be .*, but got one with lam "
        r"0.5 instead of 3.0",
    ):
        run.run_plan(replace(plan, methods=("predecessor", "tie"), recipe=changed(lam=3.0)), out)
    run.run_plan(
        replace(plan, methods=("plain",), recipe=changed(lam=3.0)), out
    )  # which has no lambda


def test_a_cell_is_not_run_twice(done, monkeypatch):
    out, plan, _ = done
    monkeypatch.setattr(run, "cell", lambda *_, **__: pytest.fail("a finished cell was run again"))
    run.run_plan(plan, out)


def test_level_two_counts_what_came_through_and_agrees_with_the_first_table(done):
    out, _, _ = done
    for seed in (0, 1):
        record = cells(out)[f"mnist-allx1-tie-seed{seed}"]
        found = record["level2"]["fashionmnist"]
        assert found["through"] == round(
            (1 - record["numbers"]["garbage_rate"]["fashionmnist"]) * 30
        )
        assert set(found["score"]["all"]) == {"auroc", "fpr95", "fpr95_id"}
        assert "scores" not in record["numbers"]  # the same again
        for label in run.LEVEL_2:
            assert 0 <= found[label]["all"]["auroc"] <= 1
            if found["through"] == 30:
                assert found[label]["through"] == found[label]["all"]


def test_the_tables_stand_beside_the_papers(done):
    text = (done[0] / "tables.md").read_text()
    assert "89.5 / 23.4" in text
    assert "7.47 / 5.99 / 2.86 / 0.83" in text
    assert "| TIE, ODIN" in text
    assert "±" in text
    assert "## mnist: conv3, 40 images, 1 epochs, seeds [0, 1]" in text


@pytest.mark.parametrize(
    ("program", "name"),
    [(cli.__file__, "tie-ext"), ("/usr/bin/tie-ext", "tie-ext"), ("elsewhere/cli.py", "cli.py")],
)
def test_a_record_names_a_command_that_can_be_typed(monkeypatch, program, name):
    monkeypatch.setattr(sys, "argv", [program, "reproduce", "--seeds", "0"])
    assert provenance()["command"] == f"{name} reproduce --seeds 0"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--root", "/home/me/data"], "--root DATA"),
        (["--root", "/home/me/data/"], "--root DATA/"),
        (["--root=/home/me/data/mnist"], "--root=DATA/mnist"),
        (["/home/me/data2", "/home/me"], "/home/me/data2 /home/me"),
        (["--data", "data"], "--data data"),
        (["--heads", "head, two words"], "--heads 'head, two words'"),
    ],
)
def test_a_command_says_a_name_for_a_place_that_lies_elsewhere_for_everyone(
    monkeypatch, words, said
):
    monkeypatch.setattr(sys, "argv", ["attached.py", *words])
    assert provenance(places={"DATA": "/home/me/data"})["command"] == f"attached.py {said}"
    assert provenance(places={"DATA": "/home/me/data/"})["command"] == f"attached.py {said}"


def test_commands_that_differ_in_their_seeds_alone_stand_as_one():
    made = [
        ("--methods tie --seeds 2 --epochs 5", 2),
        ("--methods tie --seeds 0 1 --epochs 5", 0),
        ("--methods tie --epochs 5", 1),
        ("--epochs 5", 0),
    ]
    records = [
        {"command": f"tie-ext reproduce {flags}", "config": {"seed": seed}} for flags, seed in made
    ]
    other = {"command": "tie-ext reproduce --epochs 5", "config": {"seed": 0}}
    expected = [
        "tie-ext reproduce --epochs 5 --seeds 0",
        "tie-ext reproduce --methods tie --epochs 5 --seeds 0 1 2",
    ]
    assert tables.commands([*records, other]) == expected


def test_the_tables_set_two_levels_beside_one_threshold(done):
    text = (
        (done[0] / "tables.md")
        .read_text()
        .split("### Rejected at either level")[1]
        .split("###")[0]
    )
    header, row = (
        [part.strip() for part in line.split("|")]
        for line in (text.splitlines()[2], text.splitlines()[4])
    )
    either, one = (value.split()[0] for value in row[header.index("fashionmnist")].split(" / "))
    records = [cells(done[0])[f"mnist-allx1-tie-seed{seed}"] for seed in (0, 1)]
    assert float(either) == pytest.approx(
        np.mean([100 * r["numbers"]["rejected"]["fashionmnist"] for r in records]), abs=0.005
    )
    assert float(one) == pytest.approx(
        np.mean(
            [100 - 100 * r["level2"]["fashionmnist"]["score"]["all"]["fpr95_id"] for r in records]
        ),
        abs=0.005,
    )


def test_inversions_are_judged_by_plain_networks_of_the_other_seeds(done):
    judged = json.loads((done[0] / "inversions.json").read_text())
    assert {name: list(by) for name, by in judged.items()} == {
        f"mnist-allx1-tie-seed{seed}": [f"mnist-allx1-plain-seed{1 - seed}"] for seed in (0, 1)
    }
    assert all(0 <= share <= 1 for by in judged.values() for share in by.values())
    assert "plain networks" in (done[0] / "tables.md").read_text()


def test_what_was_judged_stays_when_networks_are_deleted(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "out")
    before = json.loads((tmp_path / "out" / "inversions.json").read_text())
    (tmp_path / "out" / "networks" / "mnist-allx1-plain-seed0.safetensors").unlink()
    run.run_plan(done[1], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "inversions.json").read_text()) == before


def test_some_classes_against_the_others_on_a_subset_by_another_synthesizer(root, tmp_path):
    plan = run.Plan(
        root=str(root),
        data=("mnist:0-4",),
        seeds=(0,),
        methods=("shuffle,multiscale",),
        images=20,
        recipe=RECIPE,
    )
    assert run.run_plan(plan, tmp_path) == []
    record = cells(tmp_path)["mnist_0-4-20x1-shuffle+multiscale-seed0"]
    assert list(record["synthesizers"]) == ["shuffle", "multiscale"]
    assert record["ood_images"] == dict.fromkeys(["other classes", "fashionmnist", *run.NOISE], 2)
    assert "## mnist:0-4: conv3, 20 images" in (tmp_path / "tables.md").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["logitnorm", "ascood"])
def test_openoods_own_training_makes_a_cell(openood_root, root, tmp_path, name):
    plan = run.Plan(
        root=str(root), data=("mnist",), seeds=(0,), methods=(f"openood:{name}",), recipe=RECIPE
    )
    assert run.run_plan(plan, tmp_path) == []
    record = cells(tmp_path)[f"mnist-allx1-openood_{name}-seed0"]
    assert "garbage_rate" not in record["numbers"]
    assert set(record["level2"]["fashionmnist"]) == {*run.LEVEL_2, "through"}
    assert "(OpenOOD's), MSP" in (tmp_path / "tables.md").read_text()


def test_the_command_line_runs_it(root, tmp_path, capsys):
    small = [
        "--inversion-steps",
        "1",
        "--inversion-width",
        "4",
        "--candidates",
        "20",
        "--pool-size",
        "20",
        "--epochs",
        "1",
    ]
    arguments = [
        "reproduce",
        "--root",
        str(root),
        "--out",
        str(tmp_path),
        "--data",
        "fashionmnist",
        "--methods",
        "white",
        "--seeds",
        "3",
        *small,
    ]
    assert main(arguments) == 0
    assert list(cells(tmp_path)) == ["fashionmnist-allx1-white-seed3"]
    assert "tables.md" in capsys.readouterr().out
    assert main([*arguments[: -len(small)], "--methods", "magic"]) == 2
    with open(tmp_path / "cells.jsonl", "a") as file:
        file.write("{}\n")
    assert main(arguments) == 1
    assert "Expected a cell of `tie-ext reproduce` in line 2 of" in capsys.readouterr().err


def test_a_missing_openood_is_a_message(root, tmp_path, capsys, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Expected the packages that OpenOOD imports, but got no openood")

    monkeypatch.setattr(run, "run", missing)
    assert (
        main(
            [
                "reproduce",
                "--root",
                str(root),
                "--out",
                str(tmp_path),
                "--methods",
                "openood:ascood",
            ]
        )
        == 1
    )
    assert "tie-ext: Expected the packages" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_goes_on(root, tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stopped)
    assert main(["reproduce", "--root", str(root), "--out", str(tmp_path)]) == 130
    assert "kept, continue with the same command" in capsys.readouterr().err


def test_methods_change_the_recipe_as_their_papers_say():
    everything = -math.inf
    assert recipe_of("tie", RECIPE) == RECIPE
    assert recipe_of("predecessor", RECIPE) == changed(lam=everything)
    assert recipe_of("white", RECIPE) == replace(RECIPE, synthesizers={}, prior=("white",))
    assert recipe_of("ascood", RECIPE) == Recipe(
        changed(lam=everything).config, {"gradient": {}}, (), "uniform"
    )
    assert recipe_of("vernekar", RECIPE) == Recipe(
        changed(lam=everything, garbage_weight=0.1).config, {"boundary": {}}, ()
    )
    assert recipe_of("boundary,inversion", RECIPE) == replace(
        RECIPE, synthesizers={"boundary": {}, "inversion": {"steps": 2, "width": 4}}
    )
    with pytest.raises(ValueError, match="Expected a method, one of tie"):
        recipe_of("magic", RECIPE)


def test_the_predecessor_expels_everything_and_no_tie_nothing():
    log = recipe_of("predecessor", RECIPE).trainer(make_net()).epoch(make_batches())
    assert log.excluded == log.proposed
    assert sum(log.proposed) > 0
    assert sum(recipe_of("white", RECIPE).trainer(make_net()).epoch(make_batches()).proposed) == 0


def test_every_method_sees_the_first_epoch_in_the_same_order(done, monkeypatch):
    images, *_ = run.image_sets("mnist", 0, None, done[1].root)
    orders = {}
    for method in ("tie", "plain"):
        seen, draw = [], ImageBatches._order
        monkeypatch.setattr(
            ImageBatches,
            "_order",
            lambda self, seen=seen, draw=draw: seen.append(draw(self)) or seen[-1],
        )
        train_method(method, Conv3, images, changed(seed=3), batch_size=8)
        orders[method] = seen
        monkeypatch.setattr(ImageBatches, "_order", draw)
    assert torch.equal(orders["tie"][0], orders["plain"][0])


def test_attach_stands_on_the_plain_network(done, monkeypatch):
    set_head_defaults(monkeypatch, steps=5)
    images, *_ = run.image_sets("mnist", 0, None, done[1].root)
    asked = (("plain", 1), ("attach", 1), ("attach", 2))
    plain, attached, other = (
        train_method(method, Conv3, images, changed(seed=seed))[0] for method, seed in asked
    )
    x = images.x[:5].float() / 255
    assert torch.equal(attached(x), plain(x))
    assert isinstance(attached.garbage, GarbageHead)
    assert attached.class_names == images.classes
    assert not torch.equal(attached.garbage.network[0].weight, other.garbage.network[0].weight)


def test_layers_is_the_loop_of_tie_ext_train(done, monkeypatch):
    set_head_defaults(monkeypatch, steps=5)
    images, *_ = run.image_sets("mnist", 0, None, done[1].root)
    net, log = train_method("layers", Conv3, images, RECIPE)
    assert isinstance(net.garbage, GarbageHead)
    assert sum(log[-1].proposed) > 0
    taught = {"head": "multilayer", "prior": ["procedural"]}
    assert recipe_of("layers", RECIPE).record() == {**recipe_of("tie", RECIPE).record(), **taught}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tie", "plain"])
def test_every_method_computes_in_the_precision_of_the_settings(method, done):
    out, plan, _ = done
    images, *_ = run.image_sets("mnist", 0, None, plan.root)
    recipe = changed(autocast_dtype="bfloat16")
    assert train_method(method, Conv3, images, recipe)[0].autocast_dtype == "bfloat16"
    with pytest.raises(ValueError, match="with autocast_dtype 'float32' instead of 'bfloat16'"):
        run._check_settings(out, cells(out)[f"mnist-allx1-{method}-seed0"], method, recipe)


def test_a_cell_of_before_a_setting_has_its_default(done):
    out, plan, _ = done
    record = cells(out)["mnist-allx1-tie-seed0"]
    del record["config"]["adversarial_steps"]
    recipe = plan.recipe
    run._check_settings(out, record, "tie", recipe)
    with pytest.raises(ValueError, match="with adversarial_steps 0 instead of 5"):
        run._check_settings(
            out, record, "tie", replace(recipe, config=replace(recipe.config, adversarial_steps=5))
        )


@pytest.mark.parametrize("method", ["vernekar", "ascood"])
def test_other_papers_training_sees_their_outliers_alone(method):
    trainer = recipe_of(method, RECIPE).trainer(make_net())
    assert len(trainer.pool) == 0  # the first epoch has ID images alone
    batches = make_batches()
    first = trainer.epoch(batches)
    assert first.pool == sum(first.proposed) == first.proposed[-1] > 0
    assert trainer.epoch(batches).losses["classifier"] > 0


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=12),
    st.lists(st.integers(0, 5), min_size=2, max_size=12),
)
def test_detection_error_is_that_of_the_best_threshold(inside, outside):
    assume(len({*inside, *outside}) > 1)  # pytorch-ood warns of constant scores
    a, b = torch.tensor(inside).double(), torch.tensor(outside).double()
    best = min(
        ((a > t).double().mean() + (b <= t).double().mean()).item() / 2 for t in range(-1, 7)
    )
    assert ood_metrics(a, b)["detection_error"] == pytest.approx(best)


def test_fpr_at_95_counts_from_either_side():
    a, b = torch.arange(100.0), torch.arange(50.0, 150.0)
    found = ood_metrics(a, b)
    assert found["fpr95"] == pytest.approx(0.45)  # at 55, which 95 of the OOD scores reach
    assert found["fpr95_id"] == pytest.approx(0.45 + 0.01)  # at 95


def test_memory_is_told_where_the_system_tells_it(monkeypatch):
    assert peak_memory() > 10
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory() is None


@pytest.mark.slow
def test_networks_of_shorter_runs_judge_too_and_those_of_other_sets_do_not(done, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "out")
    for other in (
        "mnist-20x1-plain-seed1",
        "mnist-20x1-plain-seed0",
        "mnist_0-4-20x1-plain-seed1",
        "fashionmnist-20x1-plain-seed1",
    ):
        shutil.copy(
            out / "networks" / "mnist-allx1-plain-seed1.safetensors",
            out / "networks" / f"{other}.safetensors",
        )
    run._judge_inversions(out)
    judged = json.loads((out / "inversions.json").read_text())
    assert list(judged["mnist-allx1-tie-seed0"]) == [
        "mnist-20x1-plain-seed1",
        "mnist-allx1-plain-seed1",
    ]


def test_inversions_that_are_judged_are_asked_for_as_in_training(tmp_path, monkeypatch):
    asked = []

    def spy(self, y, margin=CLEAR):
        asked.append(margin)
        return invert(self, y, margin)

    invert = Inversion.invert
    monkeypatch.setattr(Inversion, "invert", spy)
    run._keep_inversions(tmp_path / "inversions.safetensors", make_trainer(), per_class=2)
    assert asked == [0.0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tie", "predecessor", "white"])
def test_a_cell_that_is_killed_goes_on_where_it_stood_and_ends_the_same(
    method, root, tmp_path, monkeypatch
):
    def plan(**changes):
        return run.Plan(
            root=str(root),
            data=("mnist",),
            seeds=(0,),
            methods=(method,),
            recipe=changed(epochs=3, **changes),
        )

    def killed(self, batches):
        if len(self.log) == 2:
            raise KeyboardInterrupt
        return epoch(self, batches)

    epoch = TIETrainer.epoch
    run.run_plan(plan(), tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(TIETrainer, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run_plan(plan(), tmp_path / "killed")
    with pytest.raises(ValueError, match=r"states.*, but got lr 0.001 instead of 0.1"):
        run.run_plan(plan(lr=0.1), tmp_path / "killed")
    run.run_plan(plan(), tmp_path / "killed")
    whole, gone_on = (next(iter(cells(tmp_path / name).values())) for name in ("whole", "killed"))
    assert gone_on["numbers"] == whole["numbers"]
    assert gone_on["level2"] == whole["level2"]
    assert (whole["gone_on_after"], gone_on["gone_on_after"]) == (0, 2)
    assert len(gone_on["log"]) == len(gone_on["peak_memory_mb"]) == 3
    assert gone_on["seconds"] > sum(sum(entry["seconds"].values()) for entry in gone_on["log"])
    networks = [
        next((tmp_path / name / "networks").iterdir()).read_bytes() for name in ("whole", "killed")
    ]
    assert networks[0] == networks[1]
    assert not any((tmp_path / "killed" / "states").iterdir())
