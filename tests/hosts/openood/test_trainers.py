"""OpenOOD's trainers ``tie`` and ``attach``: the core's epochs, and their settings."""

import pytest
import torch
from conftest import set_head_defaults
from torch.utils.data import DataLoader

from hosts.openood.conftest import (
    CONFIGS,
    Images,
    build,
    config,
    lenet,
    network_config,
    states_equal,
)
from tie_ext import TIEConfig, attach
from tie_ext.training.recipe import Recipe

yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.filterwarnings("ignore")
ADAM = {"name": "adam", "lr": 1e-3, "num_epochs": 2}
SGD = {**ADAM, "name": "sgd", "lr": 0.1, "momentum": 0.8, "weight_decay": 5e-4}
ARGUMENTS = {"synthesizers": {"inversion": {"steps": 1}}, "candidates": 20, "pool_size": 30}


def shifted(x):
    return 2 * x - 1


class Counted(Images):
    """Images in [-1, 1] that are counted as they are read."""

    def __init__(self):
        super().__init__(changed=shifted)
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def trainer(data=None, optimizer=ADAM, **changes):
    from openood.trainers import get_trainer

    about = {"name": "tie", "trainer_args": {**ARGUMENTS, **changes}}
    settings = config({"trainer": about, "optimizer": optimizer, "seed": 5})
    loader = DataLoader(Counted() if data is None else data, batch_size=20)
    return get_trainer(build(), loader, None, settings)


class Pairs(list):
    """A loader's dictionaries as pairs, read anew each time: a start draws a random number."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return ((batch["data"], batch["label"]) for batch in self.loader)


def test_an_epoch_is_that_of_the_core(openood):
    theirs = trainer(lam="-inf")
    net, metrics = theirs.train_epoch(1)
    settings = TIEConfig(epochs=2, lr=1e-3, seed=5, candidates=20, pool_size=30, lam=-float("inf"))
    core = Recipe(settings, {"inversion": {"steps": 1}}).trainer(build())
    log = core.epoch(Pairs(theirs.loader))
    assert (metrics["loss"], metrics["epoch_idx"]) == (log.losses["classifier"], 1)
    assert states_equal(net, core.net)


def test_an_epoch_reads_each_image_once(openood):
    data = Counted()
    of = trainer(data)
    for epoch in (1, 2):
        data.read.clear()
        of.train_epoch(epoch)
        assert sorted(data.read) == list(range(40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator_step": 3}, "generator_step"),
        ({"lr": 1.0}, "got lr"),
        ({"pool_size": 0}, "pool_size"),
        ({"optimizer": {**ADAM, "name": "lbfgs"}}, "sgd or adam .* got lbfgs"),
        ({"optimizer": {**SGD, "momentum": None}}, "momentum"),
    ],
)
def test_errors_of_wrong_settings(openood, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


def test_sgd_is_that_of_the_baseline_trainer(openood, openood_root):
    from openood.trainers.base_trainer import BaseTrainer

    files = (
        openood_root / "configs/pipelines/train/baseline.yml",
        CONFIGS / "pipelines/train/train_tie.yml",
    )
    theirs, ours = (yaml.safe_load(file.read_text())["optimizer"] for file in files)
    assert {**ours, "num_epochs": theirs["num_epochs"], "lr": 2 * ours["lr"]} == theirs
    of = trainer(optimizer=SGD)
    baseline = BaseTrainer(build(), of.loader, config({"optimizer": SGD})).optimizer
    of.trainer.epoch(Pairs(of.loader))
    assert type(of.trainer.optimizer) is type(baseline)
    assert of.trainer.optimizer.defaults == baseline.defaults
    assert of.trainer.optimizer.param_groups[0]["lr"] == 0.1


def test_training_file_has_the_defaults(openood):
    from openood.utils.config import Config

    from tie_ext.openood.trainers import recipe_of_config

    found = recipe_of_config(Config(str(CONFIGS / "pipelines/train/train_tie.yml")))
    # But for SGD, and what a head is fitted to.
    assert found.record() == Recipe(TIEConfig(lr=0.05), prior=("procedural",)).record()


def attaching(tmp_path, head: str, checkpoint: str):
    from openood.trainers import get_trainer

    torch.save(lenet(10).state_dict(), tmp_path / "lenet.ckpt")
    torch.save({}, tmp_path / "other.ckpt")  # of which OpenOOD itself would say nothing
    network = network_config(head=head)
    network.backbone["checkpoint"] = str(tmp_path / checkpoint) if checkpoint else "none"
    settings = config({"trainer": {"name": "attach"}, "network": network, "seed": 5})
    loader = DataLoader(Images(changed=torch.neg), batch_size=20)  # plain ones are beside them
    return get_trainer(build(head=head), loader, None, settings)


def test_trainer_attach_is_the_core(openood, tmp_path, monkeypatch):
    from tie_ext.openood.loaders import PlainImages

    set_head_defaults(monkeypatch, steps=20)
    of = attaching(tmp_path, "multilayer", "lenet.ckpt")
    net, metrics = of.train_epoch(1)
    assert metrics["epoch_idx"] == 1
    plain = PlainImages(DataLoader(Images(), batch_size=20))
    assert states_equal(net, attach(lenet(10), plain, 10, [-1.0] * 3, [1.0] * 3, seed=5))


@pytest.mark.parametrize(
    ("head", "checkpoint", "message"),
    [
        ("linear", "lenet.ckpt", "network.head multilayer"),
        ("multilayer", "", r"best\.ckpt"),
        ("multilayer", "other.ckpt", "network lenet, but got"),
    ],
)
def test_errors_of_trainer_attach(openood, tmp_path, head, checkpoint, message):
    with pytest.raises(ValueError, match=message):
        attaching(tmp_path, head, checkpoint)
