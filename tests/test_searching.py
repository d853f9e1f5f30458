"""Images that were searched for, and a loop that teaches the network to be unsure of them."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import SHAPE, TINY, Small, make_batches, make_small

from tie_ext import TIEConfig, TIENet, TIETrainer
from tie_ext.outliers import Noise
from tie_ext.training.adversarial import _RADIUS, max_log_prob, pgd
from tie_ext.training.config import HeadConfig

ONE_STEP = HeadConfig(steps=1, epoch_steps=1)


def make_net(garbage: str) -> TIENet:
    torch.manual_seed(0)
    return TIENet(Small(3), 3, SHAPE, head=garbage)


def sure(net: TIENet, x: torch.Tensor) -> float:
    """Mean largest probability of an ID class, among all that the search counts."""
    with torch.no_grad():
        return (
            net.eval()(x, garbage=isinstance(net.garbage, torch.nn.Linear))
            .softmax(1)[:, :3]
            .amax(1)
            .mean()
            .item()
        )


@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
def test_pgd_raises_confidence(garbage):
    net, x = make_net(garbage).train(), torch.rand(12, *SHAPE)
    frozen = (
        next(part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d))
        .eval()
        .requires_grad_(False)
    )
    before, start = copy.deepcopy(net.state_dict()), x.clone()
    moved = pgd(net, x, 5)
    assert net.training
    assert not frozen.training
    assert [p.requires_grad for p in net.parameters()].count(False) == 2
    assert not moved.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(x, start)
    assert (moved - x).abs().max() <= _RADIUS + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert sure(net, moved) > sure(net, x)


@pytest.mark.parametrize(("garbage", "outputs"), [("linear", 4), ("multilayer", 3)])
def test_direction_of_a_pgd_step(garbage, outputs):
    net, x = make_net(garbage).eval(), torch.rand(12, *SHAPE, requires_grad=True)
    net.backbone.requires_grad_(False)
    logits = net(x, garbage=True)[:, :outputs]
    (gradient,) = torch.autograd.grad(logits.log_softmax(1)[:, :3].amax(1).sum(), x)
    torch.testing.assert_close(
        pgd(net, x, 1), (x + _RADIUS * gradient.sign()).clamp(0, 1).detach()
    )


def test_pgd_keeps_the_range_of_each_channel():
    torch.manual_seed(0)
    net = TIENet(Small(3, 3), 3, (3, *SHAPE[1:]), low=(-2.0, 0.0, 1.0), high=(3.0, 1.0, 5.0))
    x = net.from_unit(torch.rand(12, 3, *SHAPE[1:]))
    moved = pgd(net, x, 3)
    for channel, (low, high) in enumerate(((-2, 3), (0, 1), (1, 5))):
        far, part = (moved - x)[:, channel].abs().max(), moved[:, channel]
        assert far == pytest.approx((high - low) * _RADIUS, rel=1e-4)
        assert part.min() >= low
        assert part.max() <= high


def test_no_step_moves_nothing():
    x = torch.rand(4, *SHAPE)
    assert torch.equal(pgd(make_net("linear"), x, 0), x)


def test_max_log_prob_is_acets_formula():
    logits, y = torch.randn(5, 3), torch.tensor([0, 3, 1, 3, 2])
    expected = (logits[1].log_softmax(0).max() + logits[3].log_softmax(0).max()) / 2
    torch.testing.assert_close(max_log_prob(logits, y), expected)
    assert max_log_prob(logits, y.clamp(max=2)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
def test_adversarial_training_lowers_confidence(garbage):
    found = {}
    for search in (0, 3):
        net = make_net(garbage)
        config = replace(TINY, epochs=12, lr=0.01, adversarial_steps=search)
        head = HeadConfig(steps=30, epoch_steps=20)
        trainer = TIETrainer(net, config, [], [Noise(net)], head_config=head)
        for _ in range(12):
            trainer.epoch(make_batches(sizes=(12, 12)))
        torch.manual_seed(1)
        found[search] = sure(net, pgd(net, trainer.pool.draw(40), 3))
    assert found[3] < found[0] - 0.1


def test_loss_of_the_loop_with_pgd(monkeypatch):
    monkeypatch.setattr(
        "tie_ext.training.strategies.pgd", lambda net, x, steps: x / 2 if steps == 4 else x
    )
    net = make_net("multilayer")
    config = replace(TINY, adversarial_steps=4, garbage_weight=0.5)
    trainer = TIETrainer(net, config, [], [Noise(net)], head_config=ONE_STEP)
    trainer.pool.images[:] = 200
    (x, y), before = make_batches(sizes=(8,))[0], copy.deepcopy(net).train()
    with torch.no_grad():
        whole = before(torch.cat([x, torch.full((2, *SHAPE), 100 / 255)]))
    counts = torch.bincount(y, minlength=3)
    expected = (
        torch.nn.functional.cross_entropy(whole[:8], y, 1 / counts)
        + 0.5 * whole[8:].log_softmax(1).amax(1).mean()
    )
    assert trainer.epoch([(x, y)]).losses["classifier"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
def test_batchnorm_settles_on_adversarial_images(garbage, monkeypatch):
    net = make_net(garbage)
    norm, settled = (
        next(part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d)),
        [],
    )

    def searched(net: TIENet, x: torch.Tensor, steps: int) -> torch.Tensor:
        settled.append(bool(norm.num_batches_tracked) and bool(norm.running_mean.any()))
        return x

    monkeypatch.setattr("tie_ext.training.strategies.pgd", searched)
    config = replace(TINY, epochs=2, adversarial_steps=1)
    trainer = TIETrainer(net, config, [], [Noise(net)], head_config=ONE_STEP)
    trainer.epoch(make_batches(sizes=(8, 8)))
    assert settled == [False, True, True]  # two batches, and all that was kept of them


@pytest.mark.parametrize("garbage", ["linear", "multilayer"])
def test_stop_and_resume_equals_uninterrupted(tmp_path, garbage):
    def trainer() -> TIETrainer:
        net = make_net(garbage)
        head = HeadConfig(steps=5, epoch_steps=5)
        config = replace(TINY, adversarial_steps=2)
        return TIETrainer(net, config, [], [Noise(net)], head_config=head)

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(2):
        whole.epoch(make_batches())
    first.epoch(make_batches())
    first.save(tmp_path / "run")
    second.load(tmp_path / "run")
    second.epoch(make_batches())
    pairs = zip(whole.net.state_dict().values(), second.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_resume_with_other_adversarial_steps(tmp_path):
    trainer = TIETrainer(make_small(), replace(TINY, adversarial_steps=2), [])
    trainer.save(tmp_path / "run")
    with pytest.raises(ValueError, match="adversarial_steps"):
        TIETrainer(make_small(), TINY, []).load(tmp_path / "run")


def test_negative_adversarial_steps():
    with pytest.raises(ValueError, match="adversarial_steps"):
        TIEConfig(adversarial_steps=-1)


def test_a_step_is_taken_in_half_precision_too():
    net = make_net("linear").half().eval()
    x = torch.rand(6, *SHAPE).half()
    assert (pgd(net, x, 1) != x).flatten(1).any(1).all()


def test_frozen_layer_and_bfloat16_with_pgd():
    net = make_net("linear")
    frozen = next(part for part in net.modules() if isinstance(part, torch.nn.BatchNorm2d))
    net.train()
    frozen.eval()
    before = frozen.running_mean.clone()
    log = TIETrainer(
        net, replace(TINY, adversarial_steps=2, autocast_dtype="bfloat16"), [], [Noise(net)]
    ).epoch(make_batches(sizes=(8, 1)))
    assert log.losses["classifier"] > 0
    assert not frozen.training
    assert torch.equal(frozen.running_mean, before)
