"""The law book over all synthesizers: what each proposes, keeps, learns and leaves as it was."""

from functools import partial

import pytest
import torch
from conftest import SHAPE, TINY, domain, make_batches, make_net, make_small, refused, same, states

from tie_ext.outliers import SYNTHESIZERS, Inversion, NoiseSettings
from tie_ext.outliers import make as make_by_name
from tie_ext.training.recipe import Recipe

QUICK = {
    "inversion": {"steps": 2, "batch_size": 4, "width": 4},
    "boundary": {"latent_size": 3, "vae_epochs": 1},
    "marginal": {"k": 2, "vae_epochs": 1},
}


@pytest.fixture(params=list(SYNTHESIZERS))
def make(request):
    return partial(make_by_name, request.param, domain(), **QUICK.get(request.param, {}))


def sample(synthesizer, net, x, y, progress=0.0):
    torch.manual_seed(3)
    synthesizer.fit(net, [(x, y)], progress)
    return synthesizer.sample(net, x, y)


def batch():
    return torch.rand(6, *SHAPE), torch.arange(6) % 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_candidates_in_range_aimed_at_an_output(make, net, dtype):
    x, y = batch()
    candidates = sample(make(), net, x.to(dtype), y.int())
    assert candidates.x.shape == x.shape
    assert candidates.x.is_floating_point()
    assert candidates.x.isfinite().all()
    assert 0 <= candidates.x.min() <= candidates.x.max() <= 1
    assert candidates.y.shape == (6,)
    assert ((candidates.y >= 0) & (candidates.y <= 3)).all()


def test_candidates_of_equal_seeds_and_states(make, net):
    x, y = batch()
    torch.manual_seed(3)
    first = make()
    candidates = sample(first, net, x, y)
    torch.manual_seed(3)
    second, third = make(), make()
    assert torch.equal(sample(second, net, x, y).x, candidates.x)
    third.load_state_dict(first.state_dict())
    after = [sample(of, net, x, y, 1.0).x for of in (first, third)]
    assert torch.equal(*after)


def test_classifier_and_batch_after_a_sample(make):
    net = make_net().train()
    net.fc.eval()
    net.garbage.weight.requires_grad_(False)
    x, y = batch()
    before, given = states(net), (x.clone(), y.clone())
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    sample(make(), net, x, y, 0.5)
    assert same(net, before)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SYNTHESIZERS, "inversion,boundary,shuffle"])
def test_resumed_runs_with_each_synthesizer(name, tmp_path):
    recipe = Recipe(TINY, {each: QUICK.get(each, {}) for each in name.split(",")})
    trainer, again = (recipe.trainer(make_small()) for _ in range(2))
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "t")
    again.load(tmp_path / "t")
    for each in (trainer, again):
        assert sum(each.epoch(make_batches()).proposed) == 4 * 4 * len(name.split(","))
    assert same(trainer.net, again.net)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("inversion", {"steps": 0}),
        ("inversion", {"batch_size": 1}),
        ("inversion", {"lr": 1.5}),
        ("gradient", {"kind": "blur"}),
        ("gradient", {"alpha": -1}),
        ("boundary", {"inside": 1.5}),
        ("boundary", {"beta": (0.1,)}),
        ("marginal", {"k": 0}),
        ("procedural", {"from_images": 1.2}),
    ],
)
def test_settings_that_are_out_of_range(name, settings):
    with refused(f"Expected {next(iter(settings))} to be"):
        make_by_name(name, domain(), **settings)


def test_settings_and_names_of_other_methods():
    with pytest.raises(
        TypeError, match=r"Expected InversionSettings for .*, but got NoiseSettings"
    ):
        Inversion(make_small(), NoiseSettings())
    with refused("Expected a synthesizer"):
        make_by_name("noise", domain())
