"""The loop with a head on every layer: a plain classifier, and a head that learns the pool."""

from dataclasses import asdict, replace

import conftest
import pytest
import torch
from conftest import FEW, SHAPE, TINY, Small, make_batches

from tie_ext import TIEConfig, TIENet, TIETrainer
from tie_ext.cli.classifier import train_plain
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import HEADS
from tie_ext.outliers import Inversion, InversionSettings, Noise, Procedural
from tie_ext.outliers.saliency import uniform_criterion
from tie_ext.training.config import HeadConfig, SampleConfig
from tie_ext.training.recipe import Recipe

QUICK = HeadConfig(steps=30, epoch_steps=20)


def make_net() -> TIENet:
    torch.manual_seed(0)
    return TIENet(Small(3), 3, SHAPE, head="multilayer")


def make_trainer(net: TIENet | None = None, **changes) -> TIETrainer:
    net = make_net() if net is None else net
    return TIETrainer(net, replace(TINY, **changes), [Inversion(net, FEW)], head_config=QUICK)


def classifier(net: TIENet) -> list[torch.Tensor]:
    return [*net.backbone.state_dict().values(), *net.fc.state_dict().values()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_classifier_is_the_plain_one():
    net, plain = make_net(), make_net()
    prior = [Noise(net), Procedural(net)]
    trainer = TIETrainer(net, TINY, [Inversion(net, FEW)], prior, head_config=QUICK)
    before = {name: value.clone() for name, value in net.garbage.state_dict().items()}
    batches = make_batches(
        sizes=(9, 9)
    )  # as many images of each class, or the loop would weigh them
    for _ in range(TINY.epochs):
        trainer.epoch(batches)
    train_plain(plain, batches, TINY)
    for mine, theirs in zip(classifier(net), classifier(plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert isinstance(net.garbage, GarbageHead)
    assert all(
        not torch.equal(value, before[name]) for name, value in net.garbage.state_dict().items()
    )


def test_a_pool_begins_with_what_suits_its_garbage_class():
    assert [type(each) for each in TIETrainer(make_net(), TINY, []).prior] == [Procedural]
    linear = TIENet(Small(3), 3, SHAPE)
    assert [type(each) for each in TIETrainer(linear, TINY, []).prior] == [Noise]
    assert [Recipe(head=head).prior for head in HEADS] == [("multiscale",), ("procedural",)]


def test_the_head_learns_the_pool():
    net = make_net()
    once, head = replace(TINY, epochs=1), HeadConfig(steps=300)
    trainer = TIETrainer(net, once, [], [Noise(net)], head_config=head)
    trainer.pool.images.zero_()
    trainer.pool.images[:, :, ::2] = 255
    log = trainer.epoch(make_batches())
    assert log.losses["head"] < 0.5
    garbage = trainer.pool.draw(20)
    net.eval()
    assert (net.decide(garbage).level == 1).all()
    assert (net.decide(make_batches()[0][0]).level != 1).all()


def test_images_that_the_head_is_fitted_to_in_each_epoch(monkeypatch):
    fitted, drawn, corrupted = [], [], []

    class Counted(Noise):
        def draw(self, shape):
            drawn.append(shape[0])
            return super().draw(shape)

    monkeypatch.setattr(
        "tie_ext.training.strategies.fit_head",
        lambda head, id_statistics, ood_statistics, config, progress: (
            fitted.append((len(id_statistics), len(ood_statistics), config.steps, config.weight))
            or 0.5
        ),
    )
    monkeypatch.setattr(
        "tie_ext.training.fit_head.corrupt", lambda x, *_: corrupted.append(len(x)) or x
    )
    net = make_net()
    config = replace(TINY, garbage_weight=2.0)
    trainer = TIETrainer(net, config, [], [Counted(net)], head_config=QUICK)
    drawn.clear()
    batches = make_batches(sizes=(9, 6))
    for _ in range(2):
        trainer.epoch(batches)
    assert drawn == [30, 30]
    assert sum(corrupted) == 30  # each image of both epochs
    # The ID images as they are and corrupted; in the last epoch more steps.
    assert fitted == [(30, 45, 20, 6.0), (30, 45, 30, 6.0)]


@pytest.mark.parametrize(
    ("images", "effort"), [(10, 1 / 16), (4687, 1 / 16), (37_500, 0.5), (75_000, 1), (10**7, 1)]
)
def test_effort_by_the_number_of_images(images, effort):
    assert make_trainer().garbage.effort(images) == pytest.approx(effort)
    assert conftest.make_trainer(conftest.make_small()).garbage.effort(images) == 1


def test_what_follows_training_is_in_proportion_to_the_images(monkeypatch):
    steps, fitted = [], []
    monkeypatch.setattr("tie_ext.training.strategies.FULL", 32)  # of which 16 are a half
    monkeypatch.setattr("tie_ext.training.strategies.FEWEST_STEPS", 3)
    monkeypatch.setattr(
        "tie_ext.training.strategies.fit_head",
        lambda head, id_statistics, ood_statistics, config, progress: (
            fitted.append((len(id_statistics) // 2, config.steps)) or 0.5
        ),
    )
    net = make_net()
    inversion = Inversion(net, InversionSettings(steps=8, width=4, batch_size=2))
    step = inversion._step
    inversion._step = lambda *args: steps.append(1) or step(*args)
    sample, head = SampleConfig(size=12, last_size=20), HeadConfig(steps=30, epoch_steps=10)
    config = replace(TINY, candidates=100)
    trainer = TIETrainer(net, config, [inversion], head_config=head, sample_config=sample)
    proposed = [sum(trainer.epoch(make_batches()).proposed) for _ in range(2)]
    assert len(steps) == 2 * 4
    assert fitted == [(6, 5), (10, 30)]  # the last epoch keeps more, and fits the head in full
    assert proposed == [6, 10]


def test_more_weight_of_garbage_puts_more_in_it():
    nets = [make_net() for _ in range(2)]
    for net, weight in zip(nets, (0.01, 100.0), strict=True):
        TIETrainer(net, replace(TINY, garbage_weight=weight), [], [Noise(net)]).epoch(
            make_batches()
        )
        net.eval()
    x = torch.rand(20, *SHAPE)
    light, heavy = (net.decide(x).score for net in nets)
    assert heavy.mean() > light.mean() + 1


@pytest.mark.slow
def test_stop_and_resume_equals_uninterrupted(tmp_path):
    whole, first = make_trainer(), make_trainer()
    for _ in range(3):
        whole.epoch(make_batches())
    first.epoch(make_batches())
    first.save(tmp_path / "run")
    torch.rand(7)
    second = make_trainer()
    second.load(tmp_path / "run")
    for _ in range(2):
        second.epoch(make_batches())
    assert same(whole.net.state_dict().values(), second.net.state_dict().values())
    logs = [
        [{**asdict(entry), "seconds": None} for entry in trainer.log]
        for trainer in (whole, second)
    ]
    assert logs[0] == logs[1]


def test_a_run_with_another_garbage_logit_is_refused(tmp_path):
    make_trainer().save(tmp_path / "run")
    with pytest.raises(ValueError, match="Expected"):
        conftest.make_trainer(conftest.make_small()).load(tmp_path / "run")


def test_head_loop_skips_batches_of_one():
    trainer = make_trainer(lam=-float("inf"))
    log = trainer.epoch(make_batches(sizes=(8, 1)))
    assert log.excluded == log.proposed
    assert sum(log.excluded) == 9  # one for each image of the sample
    assert log.pool == len(trainer.pool) == 29  # 20 of the prior beside them


def test_what_a_head_cannot_learn_is_refused():
    with pytest.raises(
        ValueError,
        match="Expected a prior for the garbage head on every layer to learn in",
    ):
        TIETrainer(make_net(), TIEConfig(), [], [])
    with pytest.raises(
        ValueError, match="Expected cross-entropy beside a garbage head on every layer"
    ):
        TIETrainer(make_net(), TIEConfig(), [], criterion=uniform_criterion)
    with pytest.raises(
        ValueError,
        match="Expected head to be one of linear, multilayer or a GarbageHead, but got 'all'",
    ):
        TIENet(Small(3), 3, SHAPE, head="all")
    with pytest.raises(ValueError, match="Expected an image_shape to find the layers that"):
        TIENet(Small(3), 3, head="multilayer")
