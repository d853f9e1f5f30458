"""The law book over all synthesizers, and what is particular to noise and inversion."""

from functools import partial

import pytest
import torch
from conftest import SHAPE, domain, make_net
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tie_ext import Inversion, InversionSettings, Noise, NoiseSettings, TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers import make as make_by_name
from tie_ext.outliers.inversion import loss_terms, soft_code
from tie_ext.support.modules import frozen

QUICK = {
    "inversion": {"steps": 2, "batch_size": 4, "width": 4},
    "boundary": {"latent_size": 3, "vae_epochs": 1},
    "marginal": {"k": 2, "vae_epochs": 1},
}
MAKERS = {name: partial(make_by_name, name, domain(), **QUICK.get(name, {})) for name in SYNTHESIZERS}


def fitted(make, net):
    synthesizer = make()
    synthesizer.fit(net, [batch()], 0.0)
    return synthesizer


@pytest.fixture(params=list(MAKERS))
def make(request):
    return MAKERS[request.param]


def batch():
    return torch.rand(6, *SHAPE), torch.arange(6) % 3


def test_candidates_are_finite_images_in_range_aimed_at_an_output(make, net):
    x, y = batch()
    candidates = fitted(make, net).sample(net, x, y)
    assert candidates.x.shape == x.shape
    assert torch.isfinite(candidates.x).all()
    assert 0 <= candidates.x.min() <= candidates.x.max() <= 1
    assert candidates.y.shape == (6,)
    assert ((candidates.y >= 0) & (candidates.y <= 3)).all()


def test_same_seed_same_sample(make, net):
    x, y = batch()
    samples = []
    for _ in range(2):
        torch.manual_seed(3)
        synthesizer = make()
        synthesizer.fit(net, [(x, y)], 0.0)
        samples.append(synthesizer.sample(net, x, y))
    assert torch.equal(samples[0].x, samples[1].x)


def test_classifier_and_batch_are_left_as_they_were(make):
    net = make_net().train()
    net.fc.eval()
    net.garbage.weight.requires_grad_(False)
    x, y = batch()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    xs, ys = x.clone(), y.clone()
    synthesizer = make()
    synthesizer.fit(net, [(x, y)], 0.5)
    synthesizer.sample(net, x, y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(x, xs)
    assert torch.equal(y, ys)


def test_state_dict_round_trip(make, net):
    x, y = batch()
    first, second = make(), make()
    first.fit(net, [(x, y)], 0.0)
    second.load_state_dict(first.state_dict())
    samples = []
    for synthesizer in (first, second):
        torch.manual_seed(5)
        synthesizer.fit(net, [(x, y)], 1.0)
        samples.append(synthesizer.sample(net, x, y).x)
    assert torch.equal(*samples)


def test_frozen_restores_after_an_error(net):
    net.train()
    with pytest.raises(KeyError), frozen(net):
        raise KeyError
    assert net.training
    assert all(p.requires_grad for p in net.parameters())


def test_multiscale_noise_has_more_power_at_low_frequencies_than_white():
    def smoothness(x):
        x = x - x.mean((2, 3), keepdim=True)
        return (x[..., 1:] * x[..., :-1]).mean() / x.square().mean()

    shape = (200, 1, 28, 28)
    assert smoothness(Noise(domain(), NoiseSettings(kind="white")).draw(shape)).abs() < 0.05
    assert smoothness(Noise(domain()).draw(shape)) > 0.4


def test_multiscale_noise_reaches_from_flat_to_black_and_white():
    x = Noise(domain(low=-1.0, high=2.0)).draw((500, 1, 28, 28))
    at_an_end = ((x == -1) | (x == 2)).double().mean((1, 2, 3))
    both_ends = (x == -1).any(3).any(2).any(1) & (x == 2).any(3).any(2).any(1)
    assert ((at_an_end > 0.8) & both_ends).double().mean() > 0.1  # shapes
    assert (x.std((1, 2, 3)) < 0.3).double().mean() > 0.1  # nearly flat


@given(st.integers(2, 12), st.integers(1, 20), st.floats(0, 3))
def test_soft_codes_are_distributions_with_the_argmax_asked_for_and_its_margin(K, B, margin):
    y = torch.randint(K, (B,))
    code = soft_code(y, K, margin)
    assert torch.equal(code.argmax(1), y)
    torch.testing.assert_close(code.sum(1), torch.ones(B))
    first, second = code.log().topk(2, dim=1).values.T
    assert (first - second > margin - 1e-5).all()


def test_a_margin_asks_more_clearly_and_changes_nothing_else():
    y = torch.arange(50) % 5
    torch.manual_seed(0)
    code = soft_code(y, 5)
    torch.manual_seed(0)
    clearer = soft_code(y, 5, margin=0.5)
    lifted = code * torch.where(F.one_hot(y, 5) == 1, torch.tensor(0.5).exp(), torch.tensor(1.0))
    torch.testing.assert_close(clearer, lifted / lifted.sum(1, keepdim=True))


def test_soft_codes_have_the_distribution_of_a_softmax_of_normals():
    asked = soft_code(torch.zeros(20_000, dtype=torch.long), 5)
    free = torch.randn(100_000, 5).softmax(1)
    free = free[free.argmax(1) == 0]
    torch.testing.assert_close(asked.mean(0), free.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(asked.std(0), free.std(0), atol=0.01, rtol=0)


def test_training_asks_as_it_comes_and_people_clearly(monkeypatch):
    asked = []

    def spy(self, code):
        asked.append(code)
        return generate(self, code)

    generate = Inversion._generate
    monkeypatch.setattr(Inversion, "_generate", spy)
    net, y = make_net(), torch.arange(4).repeat(50)
    inversion = Inversion(net, InversionSettings(steps=2, batch_size=100, width=8))

    def margin(ask):
        asked.clear()
        ask()
        first, second = torch.cat(asked).log().topk(2, dim=1).values.T
        return (first - second).min()

    assert margin(lambda: inversion.fit(net, [], 0.0)) < 0.1
    assert margin(lambda: inversion.sample(net, torch.zeros(200, *SHAPE), y)) < 0.1
    assert margin(lambda: inversion.invert(y, clearly=False)) < 0.1
    assert margin(lambda: inversion.invert(y)) > 0.5 - 1e-5


def test_loss_terms_are_the_papers():
    logits, h, code = torch.randn(6, 4), torch.rand(6, 5), torch.randn(6, 4).softmax(1)
    p = logits.softmax(1)
    terms = loss_terms(logits, h, code)
    kl = (code * (code / p).log()).sum(1).mean()
    ce = -p[range(6), code.argmax(1)].log().mean()
    pairs = [torch.cosine_similarity(h[i], h[j], dim=0) for i in range(6) for j in range(6) if i != j]
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["ce"], ce)
    torch.testing.assert_close(terms["cosine"], torch.stack(pairs).mean())


class Quadrants(nn.Module):
    """Says which quadrant of an image is the brightest."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(4, 3, bias=False)
        self.fc.weight.data = 20 * torch.eye(3, 4)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))


def test_inversion_learns_to_land_where_it_is_asked():
    net = TIENet(Quadrants(), 3, SHAPE)
    net.garbage.weight.data = torch.tensor([[0.0, 0.0, 0.0, 20.0]])
    net.garbage.bias.data.zero_()
    inversion = Inversion(net, InversionSettings(steps=150, batch_size=32, width=8))
    y = torch.arange(64) % 4

    def agreement():
        with torch.no_grad(), frozen(net):
            return [(net(inversion.invert(y, clearly).x, garbage=True).argmax(1) == y).float().mean() for clearly in (False, True)]

    before = agreement()
    inversion.fit(net, [], 0.0)
    assert max(before) < 0.5
    assert min(agreement()) > 0.8
