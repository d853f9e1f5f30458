"""Inversion: its codes, its loss, and what it asks for."""

import copy

import pytest
import torch
from conftest import SHAPE, close, domain, make_small, same, states
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tie_ext import TIENet
from tie_ext.outliers import Inversion, InversionSettings
from tie_ext.outliers.inversion import CLEAR, generate, loss_terms, soft_code
from tie_ext.utils.views import frozen_view

SETTINGS = {"steps": 2, "batch_size": 6, "width": 4}


def inversion(net=None, **settings):
    return Inversion(net or domain(), InversionSettings(**SETTINGS | settings))


@given(st.integers(2, 12), st.integers(1, 20), st.floats(0, 3))
def test_argmax_sum_and_margin_of_soft_codes(K, B, margin):
    y = torch.randint(K, (B,))
    code = soft_code(y, K, margin)
    assert torch.equal(code.argmax(1), y)
    close(code.sum(1), torch.ones(B))
    first, second = code.log().topk(2, dim=1).values.T
    assert (first - second > margin - 1e-5).all()


def test_soft_codes_as_a_softmax_of_normals():
    asked = soft_code(torch.zeros(20_000).long(), 5)
    free = torch.randn(100_000, 5).softmax(1)
    free = free[free.argmax(1) == 0]
    close(asked.mean(0), free.mean(0), atol=0.01, rtol=0)
    close(asked.std(0), free.std(0), atol=0.01, rtol=0)
    y = torch.arange(50) % 5
    torch.manual_seed(0)
    code = soft_code(y, 5)
    torch.manual_seed(0)
    clearer = soft_code(y, 5, margin=0.5)  # which changes nothing else
    lifted = code * (0.5 * F.one_hot(y, 5)).exp()
    close(clearer, lifted / lifted.sum(1, keepdim=True))


@pytest.mark.parametrize("K", [11, 101, 1001])
def test_soft_codes_of_a_thousand_classes(K):
    y = torch.randint(K, (4000,))
    code = soft_code(y, K)
    assert torch.equal(code.argmax(1), y)
    of_ten = torch.randn(4000, 11).softmax(1).topk(2, dim=1).values.mean(0)
    close(code.topk(2, dim=1).values.mean(0), of_ten, rtol=0, atol=0.02)
    named = code > 0
    assert (named.sum(1) == 11).all()
    assert named.sum(0).min() > 0.3 * named.sum(0).float().mean()  # each beside others as often
    seeds, generator = [], inversion(domain(K - 1)).generator.eval()
    generator.layers[0].register_forward_pre_hook(lambda _, args: seeds.append(args[0][:, 64:]))
    generator(torch.randn(200, 64), code[:200])
    assert 1 < seeds[0].square().sum((1, 2, 3)).sqrt().mean() < 6  # about as beside z of ten


def test_inversions_generated_a_few_at_a_time():
    of, sizes = inversion(), []
    of.generator.train().register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    before = states(of.generator)
    x, y = of.invert(torch.arange(600) % 4)
    assert sizes == [256, 256, 88]
    assert torch.equal(y, torch.arange(600) % 4)
    assert (x.shape, x.requires_grad) == ((600, *SHAPE), False)
    assert of.generator.training
    assert same(of.generator, before)


def test_margins_in_training_and_for_people(monkeypatch):
    asked, net, y = [], make_small(), torch.arange(4).repeat(50)
    monkeypatch.setattr(
        "tie_ext.outliers.inversion.generate",
        lambda generator, code: asked.append(code) or generate(generator, code),
    )
    of = inversion(net, batch_size=100)
    for ask, low, high in (
        (lambda: of.fit(net, [], 0.0), 0, 0.1),
        (lambda: of.sample(net, torch.zeros(200, *SHAPE), y), 0, 0.1),
        (lambda: of.invert(y, margin=0.0), 0, 0.1),
        (lambda: of.invert(y), 0.5 - 1e-5, 1),
    ):
        asked.clear()
        ask()
        first, second = torch.cat(asked).log().topk(2, dim=1).values.T
        assert low <= (first - second).min() < high


def spread(h):
    """Mean cosine similarity of different rows, pair by pair."""
    cosines = torch.cosine_similarity(h[:, None], h[None], dim=2)
    return cosines[~torch.eye(len(h)).bool()].mean()


@pytest.mark.parametrize(("progress", "gamma"), [(0.0, 1.0), (0.25, 3.0), (1.0, 9.0)])
def test_gradient_of_the_weighted_terms_of_the_paper(progress, gamma):
    net = make_small()
    weights = {"alpha": 0.3, "beta": 2.0, "gamma_start": 1.0, "gamma_end": 9.0}
    of = inversion(net, steps=1, **weights)
    by_hand = copy.deepcopy(of.generator)
    torch.manual_seed(7)
    losses = of.fit(net, [], progress)
    torch.manual_seed(7)
    y = torch.randint(4, (6,))
    code = soft_code(y, 4)
    logits, h = frozen_view(net).outputs(generate(by_hand.train(), code))
    log_p = logits.log_softmax(1)
    kl = (code * (code.log() - log_p)).sum(1).mean()
    ce = -log_p[range(6), y].mean()
    (0.3 * kl + 2.0 * ce + gamma * spread(h)).backward()
    for ours, theirs in zip(of.generator.parameters(), by_hand.parameters(), strict=True):
        close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    agreement = (logits.argmax(1) == y).float().mean()
    expected = {"kl": kl, "ce": ce, "cosine": spread(h), "agreement": agreement}
    assert losses == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-3)


def test_losses_as_means_over_the_steps(monkeypatch):
    net, terms = make_small(), []

    def kept(logits, h, code):
        agreement = (logits.argmax(1) == code.argmax(1)).float().mean()
        terms.append({**loss_terms(logits, h, code), "agreement": agreement})
        return loss_terms(logits, h, code)

    monkeypatch.setattr("tie_ext.outliers.inversion.loss_terms", kept)
    losses = inversion(net, steps=3, lr=1e-9).fit(net, [], 0.0)
    assert len(terms) == 3
    means = {name: sum(each[name].item() for each in terms) / 3 for name in terms[0]}
    assert losses == pytest.approx(means, rel=1e-5)


def test_outputs_that_a_sample_asks_for():
    of = inversion()
    counts = of.sample(None, torch.zeros(8, *SHAPE), None).y.bincount(minlength=4)
    assert counts.tolist() == [2, 2, 2, 2]
    firsts = torch.cat([of.sample(None, torch.zeros(1, *SHAPE), None).y for _ in range(60)])
    assert (firsts.bincount(minlength=4) > 4).all()


def test_state_of_the_optimiser_of_a_generator():
    net = make_small()
    first, second = (inversion(net, lr=0.1) for _ in range(2))
    first.fit(net, [], 0.0)
    state = first.state_dict()
    second.load_state_dict(state)
    assert second.optimizer.state_dict()["state"][0]["step"] == 2
    moment = state["_extra_state"]["state"][0]["exp_avg"]
    kept = moment.clone()
    second.fit(net, [], 0.0)
    assert torch.equal(moment, kept)  # nothing is shared with the state
    assert first.optimizer.param_groups[0]["lr"] == 0.1


class Quadrants(nn.Module):
    """Says which quadrant of an image is the brightest."""

    def __init__(self):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(4, 3, bias=False)
        self.fc.weight.data = 20 * torch.eye(3, 4)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))


@pytest.mark.slow
def test_agreement_of_inversions_with_what_is_asked():
    net = TIENet(Quadrants(), 3, SHAPE)
    net.garbage.weight.data = torch.tensor([[0.0, 0.0, 0.0, 20.0]])
    net.garbage.bias.data.zero_()
    of, y = inversion(net, steps=150, batch_size=32, width=8), torch.arange(64) % 4

    @torch.no_grad()
    def agreement():
        found = (net.eval()(of.invert(y, margin).x, garbage=True) for margin in (0.0, CLEAR))
        return [(logits.argmax(1) == y).float().mean() for logits in found]

    before = agreement()
    of.fit(net, [], 0.0)
    assert max(before) < 0.5
    assert min(agreement()) > 0.8
