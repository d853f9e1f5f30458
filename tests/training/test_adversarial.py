"""Adversarial images, and a loop that trains the network to be unsure of them."""

from dataclasses import replace

import pytest
import torch
from conftest import QUICK, SHAPE, TINY, Small, close, make_batches, make_small, same, states
from torch import nn
from torch.nn import functional as F

from tie_ext import TIENet, TIETrainer
from tie_ext.outliers import Noise
from tie_ext.training.adversarial import _RADIUS, max_log_prob, pgd
from tie_ext.training.config import HeadConfig

OUTPUTS = {"linear": 4, "multilayer": 3}
"""That the probabilities which PGD raises are of."""
heads = pytest.mark.parametrize("head", OUTPUTS)


def confidence(net: TIENet, x: torch.Tensor) -> torch.Tensor:
    """Log-probability of the likeliest ID class ``(B,)``."""
    logits = net.eval()(x, garbage=True)[
        :, : OUTPUTS["linear" if isinstance(net.garbage, nn.Linear) else "multilayer"]
    ]
    return logits.log_softmax(1)[:, :3].amax(1)


@heads
def test_confidence_after_steps_of_pgd(head):
    net, x = make_small(head).train(), torch.rand(12, *SHAPE)
    frozen = net.backbone.conv[1].eval().requires_grad_(False)
    before, start = states(net), x.clone()
    moved = pgd(net, x, 5)
    assert net.training
    assert not frozen.training
    assert [p.requires_grad for p in net.parameters()].count(False) == 2
    assert same(net, before)
    assert torch.equal(x, start)
    assert not moved.requires_grad
    assert confidence(net, moved).mean() > confidence(net, x).mean()
    assert torch.equal(pgd(net, x, 0), x)
    assert (pgd(net.half(), x.half(), 1) != x).flatten(1).any(1).all()


@heads
def test_direction_of_a_step_of_pgd(head):
    net, x = make_small(head).eval(), torch.rand(12, *SHAPE, requires_grad=True)
    (gradient,) = torch.autograd.grad(confidence(net, x).sum(), x)
    expected = (x + _RADIUS * gradient.sign()).clamp(0, 1).detach()
    close(pgd(net, x, 1), expected)


def test_range_of_pgd_in_each_channel():
    low, high = torch.tensor([-2.0, 0.0, 1.0]), torch.tensor([3.0, 1.0, 5.0])
    net = TIENet(Small(3, 3), 3, (3, *SHAPE[1:]), low=low.tolist(), high=high.tolist())
    x = net.from_unit(torch.rand(12, 3, *SHAPE[1:]))
    moved = pgd(net, x, 3)
    close((moved - x).abs().amax((0, 2, 3)), (high - low) * _RADIUS)
    assert (moved.amin((0, 2, 3)) >= low).all()
    assert (moved.amax((0, 2, 3)) <= high).all()


def test_max_log_prob_by_the_formula_of_acet():
    logits, y = torch.randn(5, 3), torch.tensor([0, 3, 1, 3, 2])
    expected = (logits[1].log_softmax(0).max() + logits[3].log_softmax(0).max()) / 2
    close(max_log_prob(logits, y), expected)
    assert max_log_prob(logits, y.clamp(max=2)) == 0


def trainer(net: TIENet, **changes) -> TIETrainer:
    config, head = replace(TINY, **changes), HeadConfig(**QUICK)
    return TIETrainer(net, config, [], [Noise(net)], head_config=head)


@pytest.mark.slow
@heads
def test_confidence_after_adversarial_training(head):
    found = []
    for steps in (0, 3):
        loop = trainer(make_small(head), epochs=12, lr=0.01, adversarial_steps=steps)
        for _ in range(12):
            loop.epoch(make_batches(sizes=(12, 12)))
        torch.manual_seed(1)
        found.append(confidence(loop.net, pgd(loop.net, loop.pool.draw(40), 3)).exp().mean())
    assert found[1] < found[0] - 0.1


def test_loss_of_the_loop_with_pgd(monkeypatch):
    monkeypatch.setattr(
        "tie_ext.training.strategies.pgd", lambda net, x, steps: x / 2 if steps == 4 else x
    )
    net, (x, y) = make_small("multilayer"), make_batches(sizes=(8,))[0]
    loop = trainer(net, adversarial_steps=4, garbage_weight=0.5)
    loop.pool.images[:] = 200
    with torch.no_grad():
        whole = net.train()(torch.cat([x, torch.full((2, *SHAPE), 100 / 255)]))
    expected = F.cross_entropy(whole[:8], y, 1 / y.bincount())
    expected += 0.5 * whole[8:].log_softmax(1).amax(1).mean()
    assert loop.epoch([(x, y)]).losses["classifier"] == pytest.approx(expected.item(), rel=1e-4)


@heads
def test_batchnorm_statistics_that_pgd_meets(head, monkeypatch):
    net, settled = make_small(head), []
    norm = net.backbone.conv[1]

    def searched(net: TIENet, x: torch.Tensor, steps: int) -> torch.Tensor:
        settled.append(bool(norm.num_batches_tracked) and bool(norm.running_mean.any()))
        return x

    monkeypatch.setattr("tie_ext.training.strategies.pgd", searched)
    trainer(net, adversarial_steps=1).epoch(make_batches(sizes=(8, 8)))
    assert settled == [False, True, True]  # two batches, and all that was kept of them
