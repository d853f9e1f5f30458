"""The law book over all synthesizers, and what is particular to noise and inversion."""

import copy
from functools import partial

import pytest
import torch
from conftest import SHAPE, domain, make_net, make_small
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tie_ext import TIENet
from tie_ext.outliers import SYNTHESIZERS, Inversion, InversionSettings, Noise, NoiseSettings
from tie_ext.outliers import make as make_by_name
from tie_ext.outliers.inversion import CLEAR, generate, loss_terms, soft_code
from tie_ext.utils.views import frozen_view

QUICK = {
    "inversion": {"steps": 2, "batch_size": 4, "width": 4},
    "boundary": {"latent_size": 3, "vae_epochs": 1},
    "marginal": {"k": 2, "vae_epochs": 1},
}
MAKERS = {
    name: partial(make_by_name, name, domain(), **QUICK.get(name, {})) for name in SYNTHESIZERS
}


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


@pytest.mark.parametrize("K", [11, 101, 1001])
def test_codes_name_their_class_as_clearly_among_a_thousand_as_among_ten(K):
    y = torch.randint(K, (4000,))
    code = soft_code(y, K)
    assert torch.equal(code.argmax(1), y)
    of_ten = torch.randn(4000, 11).softmax(1).topk(2, dim=1).values.mean(0)
    torch.testing.assert_close(code.topk(2, dim=1).values.mean(0), of_ten, rtol=0, atol=0.02)
    assert ((code > 0).sum(1) == 11).all()
    rivals = (code > 0).sum(0)
    assert (
        rivals.min() > 0.3 * rivals.float().mean()
    )  # each class stands beside others as often as any


def test_a_code_of_many_classes_weighs_as_much_in_a_generator_as_one_of_ten():
    seeds = []
    for K in (11, 1001):
        generator = Inversion(domain(K - 1), InversionSettings(width=4)).generator
        generator.layers[0].register_forward_pre_hook(
            lambda module, args: seeds.append(args[0][:, 64:, 0, 0])
        )
        generator.eval()(torch.randn(200, 64), soft_code(torch.randint(K, (200,)), K))
    few, many = (seed.square().sum(1).sqrt().mean() for seed in seeds)
    assert 0.5 < many / few < 2


def test_any_number_of_inversions_is_generated_a_few_at_a_time():
    inversion, sizes = Inversion(make_small(), InversionSettings(width=4)), []
    inversion.generator.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x, y = inversion.invert(torch.arange(600) % 4)
    assert sizes == [256, 256, 88]
    assert (len(x), y.tolist()) == (600, (torch.arange(600) % 4).tolist())


def test_training_asks_as_it_comes_and_people_clearly(monkeypatch):
    asked = []

    def spy(generator, code):
        asked.append(code)
        return generate(generator, code)

    monkeypatch.setattr("tie_ext.outliers.inversion.generate", spy)
    net, y = make_net(), torch.arange(4).repeat(50)
    inversion = Inversion(net, InversionSettings(steps=2, batch_size=100, width=8))

    def margin(ask):
        asked.clear()
        ask()
        first, second = torch.cat(asked).log().topk(2, dim=1).values.T
        return (first - second).min()

    assert margin(lambda: inversion.fit(net, [], 0.0)) < 0.1
    assert margin(lambda: inversion.sample(net, torch.zeros(200, *SHAPE), y)) < 0.1
    assert margin(lambda: inversion.invert(y, margin=0.0)) < 0.1
    assert margin(lambda: inversion.invert(y)) > 0.5 - 1e-5


def test_loss_terms_are_the_papers():
    logits, h, code = torch.randn(6, 4), torch.rand(6, 5), torch.randn(6, 4).softmax(1)
    p = logits.softmax(1)
    terms = loss_terms(logits, h, code)
    kl = (code * (code / p).log()).sum(1).mean()
    ce = -p[range(6), code.argmax(1)].log().mean()
    pairs = [
        torch.cosine_similarity(h[i], h[j], dim=0) for i in range(6) for j in range(6) if i != j
    ]
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


@pytest.mark.slow
def test_inversion_learns_to_land_where_it_is_asked():
    net = TIENet(Quadrants(), 3, SHAPE)
    net.garbage.weight.data = torch.tensor([[0.0, 0.0, 0.0, 20.0]])
    net.garbage.bias.data.zero_()
    inversion = Inversion(net, InversionSettings(steps=150, batch_size=32, width=8))
    y = torch.arange(64) % 4

    def agreement():
        with torch.no_grad():
            return [
                (frozen_view(net)(inversion.invert(y, by).x, garbage=True).argmax(1) == y)
                .float()
                .mean()
                for by in (0.0, CLEAR)
            ]

    before = agreement()
    inversion.fit(net, [], 0.0)
    assert max(before) < 0.5
    assert min(agreement()) > 0.8


def spread(h):
    """Mean cosine similarity of different rows, pair by pair."""
    pairs = [
        torch.cosine_similarity(h[i], h[j], dim=0)
        for i in range(len(h))
        for j in range(len(h))
        if i != j
    ]
    return torch.stack(pairs).mean()


@pytest.mark.parametrize(("progress", "gamma"), [(0.0, 1.0), (0.25, 3.0), (1.0, 9.0)])
def test_the_generators_gradient_is_that_of_the_weighted_terms(progress, gamma):
    net = make_small()
    settings = InversionSettings(
        steps=1, batch_size=6, width=4, alpha=0.3, beta=2.0, gamma_start=1.0, gamma_end=9.0
    )
    inversion = Inversion(net, settings)
    by_hand = copy.deepcopy(inversion.generator)
    torch.manual_seed(7)
    losses = inversion.fit(net, [], progress)
    torch.manual_seed(7)
    y = torch.randint(4, (6,))
    code = soft_code(y, 4)
    x = by_hand.train()(torch.randn(6, by_hand.latent_size), code)
    logits, h = frozen_view(net).outputs(x)
    log_p = logits.log_softmax(1)
    kl = (code * (code.log() - log_p)).sum(1).mean()
    ce = -log_p[range(6), y].mean()
    (0.3 * kl + 2.0 * ce + gamma * spread(h)).backward()
    for ours, theirs in zip(inversion.generator.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    assert losses["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert losses["ce"] == pytest.approx(ce.item(), rel=1e-4)
    assert losses["cosine"] == pytest.approx(spread(h).item(), rel=1e-3)
    assert losses["agreement"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


@pytest.mark.slow
def test_the_cosine_term_spreads_the_features():
    def spread_after(gamma):
        net = make_small()
        inversion = Inversion(
            net,
            InversionSettings(
                steps=60,
                batch_size=16,
                width=4,
                alpha=0.0,
                beta=0.0,
                gamma_start=gamma,
                gamma_end=gamma,
            ),
        )
        inversion.fit(net, [], 0.0)
        with torch.no_grad():
            return spread(frozen_view(net).features(inversion.invert(torch.arange(16) % 4).x))

    assert spread_after(10.0) < spread_after(0.0) - 0.02


def test_losses_are_means_over_the_steps():
    net = make_small()
    settings = InversionSettings(
        steps=3, batch_size=5, width=4, lr=1e-9
    )  # so that nothing changes but the draws
    inversion = Inversion(net, settings)
    terms = []

    def kept(*args):
        terms.append(loss_terms(*args))
        return terms[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tie_ext.outliers.inversion.loss_terms", kept)
        losses = inversion.fit(net, [], 0.0)
    assert len(terms) == 3
    for name in ("kl", "ce", "cosine"):
        assert losses[name] == pytest.approx(
            sum(each[name].item() for each in terms) / 3, rel=1e-5
        )


def test_sampling_asks_for_every_output_equally_often_and_short_batches_for_none_first():
    inversion = Inversion(make_small(), InversionSettings(steps=1, width=4))
    assert inversion.sample(None, torch.zeros(8, *SHAPE), None).y.bincount(
        minlength=4
    ).tolist() == [2, 2, 2, 2]
    firsts = torch.cat([inversion.sample(None, torch.zeros(1, *SHAPE), None).y for _ in range(60)])
    assert (firsts.bincount(minlength=4) > 4).all()


def test_inverting_leaves_the_generator_as_it_was():
    inversion = Inversion(make_small(), InversionSettings(steps=1, width=4))
    inversion.generator.train()
    before = {k: v.clone() for k, v in inversion.generator.state_dict().items()}
    x, y = inversion.invert(torch.arange(4))
    assert inversion.generator.training
    assert not x.requires_grad
    assert y.tolist() == [0, 1, 2, 3]
    assert all(torch.equal(v, before[k]) for k, v in inversion.generator.state_dict().items())


def test_the_optimiser_goes_with_the_state_and_shares_nothing_with_it():
    net = make_small()
    first, second = (
        Inversion(net, InversionSettings(steps=2, batch_size=4, width=4, lr=0.1)) for _ in range(2)
    )
    first.fit(net, [], 0.0)
    state = first.state_dict()
    second.load_state_dict(state)
    assert second.optimizer.state_dict()["state"][0]["step"] == 2
    kept = state["_extra_state"]["state"][0]["exp_avg"].clone()
    second.fit(net, [], 0.0)
    assert torch.equal(state["_extra_state"]["state"][0]["exp_avg"], kept)
    assert first.optimizer.param_groups[0]["lr"] == 0.1


def test_the_gamma_of_a_run_goes_from_its_start_to_its_end():
    settings = InversionSettings(gamma_start=10.0, gamma_end=100.0)
    assert [settings.gamma(progress) for progress in (0.0, 0.5, 1.0)] == [10.0, 55.0, 100.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"batch_size": 1},
        {"lr": 0.0},
        {"lr": 1.5},
        {"alpha": -1},
        {"beta": -1},
        {"gamma_end": -1},
        {"width": 0},
    ],
)
def test_inversions_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"Expected {next(iter(settings))} to be"):
        InversionSettings(**settings)


def test_another_methods_settings_are_refused():
    with pytest.raises(
        TypeError, match="Expected InversionSettings for Inversion, but got NoiseSettings"
    ):
        Inversion(make_small(), NoiseSettings())


def test_noise_of_any_shape_has_no_doubled_lines():
    for H, W in ((28, 56), (56, 28), (30, 47)):
        x = Noise(domain()).draw((60, 1, H, W))
        inside = ((x > 0.02) & (x < 0.98)).double().mean(
            (1, 2, 3)
        ) > 0.9  # those that are not clipped to shapes
        columns, rows = x[inside].diff(dim=3).abs(), x[inside].diff(dim=2).abs()
        assert columns.mean((0, 1, 2)).min() > 0.2 * columns.mean()
        assert rows.mean((0, 1, 3)).min() > 0.2 * rows.mean()


def test_images_and_labels_of_any_type_will_do(make, net):
    x, y = batch()
    for dtype in (torch.float64, torch.float16):
        synthesizer = make()
        synthesizer.fit(net, [(x.to(dtype), y.int())], 0.0)
        candidates = synthesizer.sample(net, x.to(dtype), y.int())
        assert candidates.x.is_floating_point()
        assert candidates.x.shape == x.shape


def test_the_generator_has_the_width_it_is_told():
    wide, narrow = (
        sum(
            p.numel()
            for p in Inversion(domain(), InversionSettings(width=w)).generator.parameters()
        )
        for w in (16, 4)
    )
    assert wide == sum(p.numel() for p in Inversion(domain()).generator.parameters()) > 4 * narrow


def test_agreement_is_the_mean_over_all_steps(monkeypatch):
    net = make_net()
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.copy_(
            torch.tensor([9.0, 0.0, 0.0])
        )  # which class 0 is the answer to, whatever comes
        net.garbage.weight.zero_()
        net.garbage.bias.zero_()
    asked = iter([torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: next(asked))
    losses = Inversion(domain(), InversionSettings(steps=2, batch_size=4, width=4)).fit(
        net, [], 0.0
    )
    assert losses["agreement"] == 0.5
