"""Whether a run may go on with other settings, data or files."""

from dataclasses import replace

import pytest
import torch
from conftest import FEW, TINY, make_batches, make_small, make_trainer, refused

from tie_ext import TIETrainer
from tie_ext.outliers import Inversion
from tie_ext.outliers.saliency import uniform_criterion
from tie_ext.training.config import HeadConfig
from tie_ext.training.recipe import Recipe
from tie_ext.utils.files import load_state, save_state


def trainer(head="linear", inverting=True, criterion=torch.nn.functional.cross_entropy, **changes):
    net, steps = make_small(head), changes.pop("steps", 600)
    synthesizers = [Inversion(net, FEW)] if inverting else []
    config, head_config = replace(TINY, **changes), HeadConfig(steps=steps)
    return TIETrainer(net, config, synthesizers, criterion=criterion, head_config=head_config)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"lam": 2.0, "autocast_dtype": "bfloat16"},
            r"settings of this one in .*, but got lam 0.5 instead of 2.0, autocast_dtype",
        ),
        ({"adversarial_steps": 2}, "adversarial_steps 0 instead of 2"),
        ({"inverting": False}, r"but got synthesizers \['Inversion'\] instead of \[\]"),
        ({"steps": 7}, r"but got head_config\.steps 600 instead of 7$"),
        (
            {"criterion": uniform_criterion},
            "got criterion 'torch.nn.* instead of 'tie_ext.*uniform",
        ),
        ({"head": "multilayer"}, "Expected"),
    ],
)
def test_resume_with_other_settings(other, message, tmp_path):
    trainer().save(tmp_path / "run")
    with refused(message):
        trainer(**other).load(tmp_path / "run")


def test_settings_of_two_alike_synthesizers(tmp_path):
    first, second = (
        Recipe(TINY, {"gradient": {"p_inv": share}, "shuffle": {}}).trainer(make_small())
        for share in (0.1, 0.5)
    )
    first.save(tmp_path / "run")
    with refused(r"Saliency 1.p_inv 0.1 instead of 0.5"):
        second.load(tmp_path / "run")


def test_settings_that_are_newer_than_the_file(tmp_path):
    trainer().save(tmp_path / "run")
    state = load_state(tmp_path / "run", "training")
    del state["config"]["autocast_dtype"]
    del state["methods"][0][1]["alpha"]
    save_state(tmp_path / "run", "training", state)
    trainer().load(tmp_path / "run")
    with refused("but got autocast_dtype 'float32' instead of 'bfloat16'"):
        trainer(autocast_dtype="bfloat16").load(tmp_path / "run")
    del state["methods"]  # as 0.1.0 wrote them
    save_state(tmp_path / "run", "training", state)
    with refused(r"of this version of .*, but got one of an earlier"):
        trainer().load(tmp_path / "run")


def test_resume_of_a_run_with_other_data(tmp_path):
    first, again = make_trainer(make_small()), make_trainer(make_small())
    first.epoch(make_batches())
    first.save(tmp_path / "run")
    again.load(tmp_path / "run")
    message = r"the data this run began with, \[6, 6, 4\] images of .*, but got \[3, 3, 2\]"
    with refused(message):
        again.epoch(make_batches(sizes=(8,)))
    assert again.epoch(make_batches(sizes=(8, 7))).epoch == 2  # a loader that drops a batch
    assert torch.equal(again.counts, first.counts)
