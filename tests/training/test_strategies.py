"""How garbage is learned: in the batches of the classifier, or by a head that learns the pool."""

from dataclasses import replace

import pytest
import torch
from conftest import (
    QUICK,
    SHAPE,
    TINY,
    close,
    make_batches,
    make_small,
    make_trainer,
    refused,
    states,
)

from tie_ext import TIENet, TIETrainer
from tie_ext.cli.classifier import train_plain
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import HEADS
from tie_ext.outliers import Inversion, InversionSettings, Noise
from tie_ext.outliers.saliency import uniform_criterion
from tie_ext.training.config import HeadConfig, SampleConfig
from tie_ext.training.recipe import Recipe
from tie_ext.training.strategies import GARBAGE_SHARE, class_weights


@pytest.mark.parametrize("counts", [[10, 20, 30], [20, 20], [7] * 1000])
@pytest.mark.parametrize("garbage_weight", [1.0, 0.1])
def test_class_weights_as_inverse_proportions(counts, garbage_weight):
    counts = torch.tensor(counts)
    weights = class_weights(counts, garbage_weight)
    each = weights[:-1] * counts
    close(each, each[:1].expand(len(counts)))
    garbage = weights[-1] * counts.sum() * GARBAGE_SHARE  # a tenth of the ID classes together
    assert (garbage / each.sum()).item() == pytest.approx(garbage_weight / 10, rel=1e-4)


def test_garbage_share_of_batches_while_the_pool_fills():
    trainer = make_trainer(make_small())
    for _ in range(3):
        mixed = trainer.garbage.mix(make_batches(sizes=(12, 9, 1, 2)))
        assert [int((y == 3).sum()) for _, y in mixed] == [3, 2, 1, 1]  # one at least
        trainer.pool.add(torch.rand(10, *SHAPE))


def test_plain_classifier_beside_a_head():
    net, plain = make_small("multilayer"), make_small("multilayer")
    trainer, before = make_trainer(net), states(net.garbage)
    batches = make_batches(sizes=(9, 9))  # as many of each class, or the loop would weigh them
    for _ in range(TINY.epochs):
        trainer.epoch(batches)
    train_plain(plain, batches, TINY)
    for mine, theirs in ((net.backbone, plain.backbone), (net.fc, plain.fc)):
        close(states(mine), states(theirs), rtol=1e-4, atol=1e-6)
    after = states(net.garbage)
    assert all(not torch.equal(value, before[name]) for name, value in after.items())


def test_pool_that_a_head_learns_to_reject():
    net = make_small("multilayer")
    once, head = replace(TINY, epochs=1), HeadConfig(steps=300)
    trainer = TIETrainer(net, once, [], [Noise(net)], head_config=head)
    trainer.pool.images.zero_()
    trainer.pool.images[:, :, ::2] = 255
    assert trainer.epoch(make_batches()).losses["head"] < 0.5
    assert (net.decide(trainer.pool.draw(20)).level == 1).all()
    assert (net.decide(make_batches()[0][0]).level != 1).all()


@pytest.fixture
def fitted(monkeypatch):
    """What heads are fitted to: numbers of ID and OOD images, steps, weight."""
    calls = []
    monkeypatch.setattr(
        "tie_ext.training.strategies.fit_head",
        lambda head, inside, outside, config, progress: (
            calls.append((len(inside), len(outside), config.steps, config.weight)) or 0.5
        ),
    )
    return calls


def test_images_that_a_head_is_fitted_to(monkeypatch, fitted):
    drawn, corrupted = [], []

    class Counted(Noise):
        def draw(self, shape):
            drawn.append(shape[0])
            return super().draw(shape)

    monkeypatch.setattr(
        "tie_ext.training.fit_head.corrupt", lambda x, *_: corrupted.append(len(x)) or x
    )
    net, config = make_small("multilayer"), replace(TINY, garbage_weight=2.0)
    trainer = TIETrainer(net, config, [], [Counted(net)], head_config=HeadConfig(**QUICK))
    drawn.clear()
    for _ in range(2):
        trainer.epoch(make_batches(sizes=(9, 6)))
    assert drawn == [30, 30]
    assert sum(corrupted) == 30  # each image of both epochs
    # The ID images as they are and corrupted; in the last epoch more steps.
    assert fitted == [(30, 45, 20, 6.0), (30, 45, 30, 6.0)]


@pytest.mark.parametrize(
    ("images", "effort"), [(10, 1 / 16), (6250, 1 / 16), (50_000, 0.5), (100_000, 1), (10**7, 1)]
)
def test_effort_by_the_number_of_images(images, effort):
    found = (make_trainer(make_small(head)).garbage.effort(images) for head in HEADS)
    assert list(found) == pytest.approx([1, effort])


def test_effort_after_training_in_proportion_to_images(monkeypatch, fitted):
    steps = []
    monkeypatch.setattr("tie_ext.training.strategies.FULL", 32)  # of which 16 are a half
    monkeypatch.setattr("tie_ext.training.strategies.FEWEST_STEPS", 3)
    net = make_small("multilayer")
    inversion = Inversion(net, InversionSettings(steps=8, width=4, batch_size=2))
    step = inversion._step
    inversion._step = lambda *args: steps.append(1) or step(*args)
    sample, head = (
        SampleConfig(size=12, last_size=20),
        HeadConfig(steps=30, epoch_steps=10, max_images=13),
    )
    config = replace(TINY, candidates=100)
    trainer = TIETrainer(net, config, [inversion], head_config=head, sample_config=sample)
    proposed = [sum(trainer.epoch(make_batches()).proposed) for _ in range(2)]
    assert len(steps) == 2 * 4
    # The last epoch keeps as many as attach fits a head to, and fits it in full.
    assert [(inside // 2, steps) for inside, _, steps, _ in fitted] == [(6, 5), (13, 30)]
    assert proposed == [6, 13]


def test_networks_and_losses_that_no_head_goes_with():
    net = make_small("multilayer")
    assert isinstance(net.garbage, GarbageHead)
    assert [Recipe(head=head).prior for head in HEADS] == [("multiscale",), ("procedural",)]
    with refused("Expected a prior for the garbage head on every layer"):
        TIETrainer(net, TINY, [], [])
    with refused("Expected cross-entropy beside a garbage head"):
        TIETrainer(net, TINY, [], criterion=uniform_criterion)
    with refused("one of linear, multilayer or a GarbageHead, but got 'a"):
        TIENet(net.backbone, 3, SHAPE, head="all")
    with refused("Expected an image_shape to find the layers that"):
        TIENet(net.backbone, 3, head="multilayer")
