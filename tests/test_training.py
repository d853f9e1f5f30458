"""The loop: what an epoch does, what it refuses, and that stopping changes nothing."""

import copy
import math
import re
import sys
from dataclasses import asdict, replace

import conftest
import numpy as np
import pytest
import torch
from conftest import FEW, SHAPE, TINY, Small, make_batches
from conftest import make_small as make_net
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from tie_ext import TIEConfig, TIENet, TIETrainer
from tie_ext.models.backbones import Conv3
from tie_ext.models.head import GarbageHead
from tie_ext.outliers import (
    SYNTHESIZERS,
    Candidates,
    Inversion,
    InversionSettings,
    Noise,
    NoiseSettings,
    Synthesizer,
)
from tie_ext.outliers.saliency import uniform_criterion
from tie_ext.scores.decision import uncertainty
from tie_ext.training.config import HeadConfig, SampleConfig
from tie_ext.training.fit_head import fit_head
from tie_ext.training.pool import GarbagePool
from tie_ext.training.recipe import Recipe
from tie_ext.training.strategies import GARBAGE_SHARE, class_weights
from tie_ext.training.survey import survey
from tie_ext.utils.batchnorm import settle_statistics
from tie_ext.utils.files import load_state, save_state
from tie_ext.utils.progress import Progress
from tie_ext.utils.random import seeded


def make_trainer(**changes):
    return conftest.make_trainer(make_net(), **changes)


def test_an_epoch_trains_inverts_and_excludes():
    trainer = make_trainer(lam=-math.inf)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    pool = len(trainer.pool)
    log = trainer.epoch(make_batches())
    assert any(not torch.equal(v, before[k]) for k, v in trainer.net.state_dict().items())
    assert {"classifier", "kl", "ce", "cosine"} <= set(log.losses)
    assert sum(log.proposed) == TINY.candidates
    assert log.excluded == log.proposed  # lambda = -inf excludes everything
    assert log.tau is None
    assert log.pool == len(trainer.pool) == pool + sum(log.excluded)
    assert trainer.net.tau == 1


def test_tau_is_the_papers_and_stays_with_the_network():
    trainer = make_trainer()
    batches = make_batches()
    log = trainer.epoch(batches)
    u = torch.cat([trainer.net.decide(x).uncertainty for x, _ in batches]).double()
    assert log.tau == pytest.approx((u.mean() + 0.5 * u.std(correction=0)).item(), rel=1e-5)
    assert trainer.net.tau.item() == pytest.approx(log.tau)


def test_class_weights_are_inverse_proportions():
    weights = class_weights(torch.tensor([10, 20, 30]), 1.0)
    sizes = torch.tensor([10, 20, 30, 60 * GARBAGE_SHARE])
    torch.testing.assert_close(
        weights * sizes / sizes.sum(), torch.tensor([1.0, 1.0, 1.0, 3 / 10]) / 4
    )
    torch.testing.assert_close(
        class_weights(torch.tensor([10, 20, 30, 40, 50]), 0.1)[-1],
        torch.tensor(0.1 * 5 / 10 * (1 + GARBAGE_SHARE) / (6 * GARBAGE_SHARE)),
    )


@pytest.mark.parametrize("n", [2, 10, 1000])
def test_garbage_share_of_the_loss_by_number_of_classes(n):
    weights = class_weights(torch.full((n,), 20), 1.0)
    id_weight, garbage = weights[:-1].sum() * 20, weights[-1] * n * 20 * GARBAGE_SHARE
    assert (garbage / (id_weight + garbage)).item() == pytest.approx(1 / 11, rel=1e-4)


def test_the_learning_rate_falls_along_half_a_cosine():
    trainer, used = make_trainer(epochs=3, lr=0.01), []
    for _ in range(4):
        trainer.epoch(make_batches())
        used.append(trainer.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([0.01, 0.0075, 0.0025, 0.0025])  # past the run's length it stays


def test_the_plain_network_trains_at_the_same_rates(monkeypatch):
    from tie_ext.cli.classifier import train_plain

    net, asked = make_net(), []
    before = net.fc.weight.clone()
    monkeypatch.setattr(TIEConfig, "lr_in", lambda self, epoch: asked.append(epoch) or 0.0)
    train_plain(net, make_batches(), TINY)
    assert asked == [0, 1]
    assert torch.equal(net.fc.weight, before)


def test_without_synthesizers_the_pool_stays_as_it_began():
    trainer = TIETrainer(make_net(), TINY, synthesizers=[])
    images = trainer.pool.state_dict()["images"].clone()
    log = trainer.epoch(make_batches())
    assert torch.equal(trainer.pool.state_dict()["images"], images)
    assert sum(log.proposed) == 0
    assert log.agreement == [None] * 4


@pytest.mark.parametrize("autocast_dtype", ["float32", "bfloat16"])
def test_stop_and_resume_equals_uninterrupted(autocast_dtype, tmp_path):
    batches = make_batches()
    whole = make_trainer(autocast_dtype=autocast_dtype)
    for _ in range(3):
        whole.epoch(batches)
    first = make_trainer(autocast_dtype=autocast_dtype)
    first.epoch(batches)
    first.save(tmp_path / "run.safetensors")
    torch.rand(7)  # a resumed process has another random state
    second = make_trainer(autocast_dtype=autocast_dtype)
    second.load(tmp_path / "run.safetensors")
    for _ in range(2):
        second.epoch(batches)
    for a, b in ((whole.net, second.net), (whole.synthesizers[0], second.synthesizers[0])):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y), name
    assert torch.equal(whole.pool.state_dict()["images"], second.pool.state_dict()["images"])
    logs = [
        [{**asdict(entry), "seconds": None} for entry in trainer.log]
        for trainer in (whole, second)
    ]
    assert logs[0] == logs[1]


def test_the_random_state_outside_is_left_alone():
    trainer, state = make_trainer(), torch.get_rng_state()
    trainer.epoch(make_batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_last_batch_of_one_is_fine():
    make_trainer().epoch(make_batches(sizes=(8, 1)))


def test_another_value_range_is_kept():
    net = TIENet(Conv3(3, 3), 3, (3, 28, 28), low=(-1.0, -2.0, 0.0), high=(1.0, 2.0, 3.0))
    x = torch.stack(
        [torch.rand(6, 28, 28) * 2 - 1, torch.rand(6, 28, 28) * 4 - 2, torch.rand(6, 28, 28) * 3],
        dim=1,
    )
    trainer = TIETrainer(net, TINY, [Inversion(net, FEW)])
    trainer.epoch([(x, torch.arange(6) % 3)])
    garbage = trainer.pool.draw(50)
    assert (garbage >= net.low).all()
    assert (garbage <= net.high).all()


def bad(x=None, y=None):
    batches = make_batches()
    return [batches[0], (batches[1][0] if x is None else x, batches[1][1] if y is None else y)]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (
            bad(x=torch.rand(8, 3, 28, 28)),
            r"shape \(B, 1, 28, 28\), but got a torch.float32 tensor of shape \(8, 3, 28, 28\)",
        ),
        (bad(x=torch.rand(8, 1, 32, 32)), "Expected images of shape"),
        (bad(x=torch.zeros(8, *SHAPE, dtype=torch.uint8)), "Expected floating-point images"),
        (bad(x=torch.full((8, *SHAPE), float("nan"))), "Expected finite images, but got 6272 NaN"),
        (bad(x=torch.full((8, *SHAPE), float("inf"))), "Expected finite images"),
        (bad(x=torch.rand(8, *SHAPE) * 255), "Expected images in the value range"),
        (
            bad(x=torch.rand(0, *SHAPE), y=torch.zeros(0, dtype=torch.long)),
            "Expected at least one image",
        ),
        (bad(y=torch.full((8,), 3)), r"Expected labels in \[0, 3\), but got labels in \[3, 3\]"),
        (
            [(x, torch.full((8,), -1)) for x, _ in make_batches()],
            "Expected ID images in loader, but got 16 with labels < 0 alone",
        ),
        (bad(y=torch.zeros(8)), "Expected integer labels"),
        (bad(y=torch.zeros(7, dtype=torch.long)), r"Expected integer labels of shape \(8,\)"),
        ([], "Expected ID images in loader, but got an empty loader"),
        (
            [(torch.rand(4, *SHAPE), torch.tensor([0, 0, 1, 1]))],
            r"Expected samples of all 3 classes, but got none of class \[2\]",
        ),
        ([torch.rand(4, *SHAPE)], "Expected labels beside the images of loader"),
        ([(torch.rand(4, *SHAPE), torch.zeros(4), None)], "Expected integer labels"),
        (TensorDataset(torch.rand(4, *SHAPE), torch.zeros(4)), "which gives one image at a time"),
    ],
)
def test_bad_data_is_refused_before_any_work(batches, message):
    trainer = make_trainer()
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer.epoch(batches)
    assert all(torch.equal(v, before[k]) for k, v in trainer.net.state_dict().items())
    assert trainer.log == []


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"pool_size": 0},
        {"candidates": -1},
        {"candidates": 1.5},
        {"garbage_weight": 0},
        {"autocast_dtype": "float16"},
        {"seed": -1},
        {"lam": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=f"Expected {next(iter(settings))} to be .*, but got"):
        TIEConfig(**settings)


class Viewing(nn.Module):
    """A network that, like many, takes its feature maps to lie one channel after the other."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 4, 3, stride=4), nn.Linear(4 * 7 * 7, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().view(-1, 4 * 7 * 7))


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_backbone_keeps_its_memory_layout(channels, synthesizer):
    settings = {"steps": 2, "width": 4} if synthesizer == "inversion" else {}
    trainer = Recipe(TINY, {synthesizer: settings}).trainer(
        TIENet(Viewing(channels), 3, (channels, 28, 28))
    )
    trainer.epoch([(x.repeat(1, channels, 1, 1), y) for x, y in make_batches()])
    assert all(p.is_contiguous() for p in trainer.net.parameters())


def test_in_bfloat16_only_the_backbone_computes_so(tmp_path):
    trainer = make_trainer(autocast_dtype="bfloat16")
    trainer.epoch(make_batches())
    net, x = trainer.net.eval(), make_batches()[0][0]
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    logits, h = net.outputs(x)
    assert logits.dtype == h.dtype == torch.float32
    net.save(tmp_path / "net.safetensors")
    again = TIENet.load(tmp_path / "net.safetensors", Small())
    assert torch.equal(
        again(x, garbage=True), logits
    )  # a threshold fitted before it was saved meets the same scores
    again.autocast_dtype = "float32"
    assert not torch.equal(again(x, garbage=True), logits)
    torch.testing.assert_close(again(x, garbage=True), logits, rtol=0.05, atol=0.05)


def test_a_network_without_an_image_shape_is_refused():
    with pytest.raises(ValueError, match="Expected a TIENet with an image_shape"):
        TIETrainer(TIENet(Conv3(), 10), TINY)


def test_a_loss_that_explodes_is_named():
    trainer = make_trainer()
    torch.nn.init.constant_(trainer.net.fc.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="Expected a finite training loss"):
        trainer.epoch(make_batches())


def test_a_run_of_other_settings_is_refused(tmp_path):
    trainer = make_trainer()
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "run.safetensors")
    with pytest.raises(
        ValueError,
        match=r"settings of this one in .*, but got lam 0.5 instead of 2.0, autocast_dtype",
    ):
        make_trainer(lam=2.0, autocast_dtype="bfloat16").load(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"but got synthesizers \['Inversion'\] instead of \[\]"):
        TIETrainer(make_net(), TINY, synthesizers=[]).load(tmp_path / "run.safetensors")


def test_resume_with_another_head_config(tmp_path):
    make_trainer().save(tmp_path / "run")
    net = make_net()
    other = TIETrainer(net, TINY, [Inversion(net, FEW)], head_config=HeadConfig(steps=7))
    with pytest.raises(ValueError, match=r"but got head_config\.steps 600 instead of 7$"):
        other.load(tmp_path / "run")


def test_an_epoch_leaves_out_images_with_a_label_below_zero():
    batches, logs = make_batches(), []
    mixed = [
        (torch.cat([x, torch.rand(3, *SHAPE)]), torch.cat([y, torch.full((3,), -1)]))
        for x, y in batches
    ]
    torch.manual_seed(0)
    for loader in (batches, [{"image": x, "label": y} for x, y in mixed]):
        trainer = make_trainer()
        logs.append({**asdict(trainer.epoch(loader)), "seconds": None})
        assert trainer.counts.tolist() == [6, 6, 4]
    assert logs[0] == logs[1]


def test_default_of_a_setting_newer_than_the_file(tmp_path):
    trainer = make_trainer()
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "run.safetensors")
    state = load_state(tmp_path / "run.safetensors", "training")
    del state["config"]["autocast_dtype"]
    del state["methods"][0][1]["alpha"]
    save_state(tmp_path / "run.safetensors", "training", state)
    make_trainer().load(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="but got autocast_dtype 'float32' instead of 'bfloat16'"):
        make_trainer(autocast_dtype="bfloat16").load(tmp_path / "run.safetensors")


def test_uniform_criterion_makes_garbage_uncertain():
    torch.manual_seed(0)
    x = torch.zeros(24, *SHAPE)
    for i in range(24):
        x[i, :, 8 * (i % 3) : 8 * (i % 3) + 8] = 1
    trainer = TIETrainer(
        conftest.make_net(),
        replace(TINY, epochs=15, garbage_weight=3.0),
        [],
        criterion=uniform_criterion,
    )
    for _ in range(15):
        trainer.epoch([(x, torch.arange(24) % 3)])
    inside, outside = trainer.net.decide(x), trainer.net.decide(trainer.pool.draw(24))
    assert torch.equal(inside.label, torch.arange(24) % 3)
    assert outside.uncertainty.mean() > 0.8 > 0.5 > inside.uncertainty.mean()
    assert outside.score.min() > inside.score.max()


def test_garbage_share_of_batches_while_the_pool_fills():
    trainer = make_trainer(lam=-math.inf)
    trainer.counts, seen = torch.tensor([10, 10, 10]), []
    for _ in range(3):
        seen.append(
            [int((y == 3).sum()) for _, y in trainer.garbage.mix(make_batches(sizes=(12, 9)))]
        )
        trainer.pool.add(torch.rand(10, *SHAPE))
    assert seen == [[3, 2]] * 3
    assert [len(y) for _, y in trainer.garbage.mix(make_batches(sizes=(1, 2)))] == [
        2,
        3,
    ]  # one at least


# What a broken loop would not pass.


def some_images(count):
    """ID images of many contrasts, so that a network is sure of some of them and not of others."""
    rng = torch.Generator().manual_seed(4)
    x = torch.cat([x for x, _ in make_batches()])
    return x.repeat(-(-count // len(x)), 1, 1, 1)[:count] * (
        0.8 + 0.2 * torch.rand(count, 1, 1, 1, generator=rng)
    )


class Fixed(Synthesizer):
    """Proposes given images, one after the other, and records its arguments."""

    def __init__(self, net, images=None):
        super().__init__(net)
        self.images = some_images(400) if images is None else images
        self.progress, self.fitted, self.given = [], [], 0

    def fit(self, classifier, batches, progress):
        self.progress.append(progress)
        self.fitted.append([(x.dtype, y.dtype, len(x)) for x, y in batches])
        return {"fixed": 1.5}

    def sample(self, classifier, x, y):
        first, self.given = self.given, self.given + len(x)
        return Candidates(
            self.images[first : first + len(x)],
            torch.arange(first, first + len(x)) % (self.num_classes + 1),
        )


def seen_by(net):
    """Every batch of images that reaches the backbone, from now on."""
    seen = []
    net.backbone.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, args[0].clone()))
    )
    return seen


def test_garbage_in_every_batch():
    net = make_net()
    trainer = TIETrainer(net, TINY, [], [])
    pooled = torch.rand(20, *SHAPE).mul(255).round() / 255
    trainer.pool.add(pooled)
    seen, batches = seen_by(net), make_batches(sizes=(12, 9))
    trainer.epoch(batches)
    training = [x for mode, x in seen if mode]
    assert [len(x) for x in training] == [
        15,
        11,
        26,
    ]  # trained on, then BatchNorm's statistics of what was kept
    kept = (torch.cat([x for x, _ in batches]), None)
    for given, (x, _) in zip(training, [*batches, kept], strict=True):
        assert torch.equal(given[: len(x)], x)
        distance = torch.cdist(given[len(x) :].flatten(1), pooled.flatten(1)).amin(1)
        assert distance.max() < 1e-3
    scored = [x for mode, x in seen if not mode]
    assert [len(x) for x in scored] == [21]  # tau is that of ID images alone


@pytest.mark.parametrize("lam", [-1.0, 0.0, 0.5])
def test_excluded_candidates_are_those_above_tau(lam):
    net = make_net()
    proposals = Fixed(net)
    trainer = TIETrainer(
        net, replace(TINY, lam=lam, candidates=240, pool_size=300), [proposals], []
    )
    batches = make_batches()
    log = trainer.epoch(batches)
    with torch.no_grad():
        net.eval()
        u, inside = (
            uncertainty(net(x, garbage=True).softmax(1))
            for x in (proposals.images[:240], torch.cat([x for x, _ in batches]))
        )
    tau = (inside.double().mean() + lam * inside.double().std(correction=0)).item()
    assert log.tau == pytest.approx(tau, rel=1e-5)
    out = u > log.tau
    assert 0 < out.sum() < 240, "the test wants some of both"
    aim = torch.arange(240) % 4
    assert log.proposed == [60] * 4
    assert log.excluded == aim[out].bincount(minlength=4).tolist()
    assert log.pool == len(trainer.pool) == out.sum()
    expelled = (proposals.images[:240][out] * 255).round().to(torch.uint8)
    assert torch.equal(trainer.pool.state_dict()["images"], expelled)


def test_answers_to_candidates_by_output():
    net = make_net()
    proposals = Fixed(net)
    log = TIETrainer(net, replace(TINY, candidates=40), [proposals], []).epoch(make_batches())
    with torch.no_grad():
        p = net.eval()(proposals.images[:40], garbage=True).softmax(1)
    aim = torch.arange(40) % 4
    for c in range(4):
        of, top = p[aim == c], p[aim == c].topk(2, dim=1).values
        assert log.agreement[c] == pytest.approx(
            (of.argmax(1) == c).float().mean().item(), abs=1e-6
        )
        assert log.entropy[c] == pytest.approx(-(of * of.log()).sum(1).mean().item(), rel=1e-4)
        assert log.confidence[c] == pytest.approx(top[:, 0].mean().item(), rel=1e-4)
        assert log.margin[c] == pytest.approx((top[:, 0] - top[:, 1]).mean().item(), rel=1e-3)
        assert log.uncertainty[c] == pytest.approx(uncertainty(of).mean().item(), rel=1e-4)


def test_accuracy_is_that_of_the_n_plus_1_outputs():
    trainer, batches = make_trainer(), make_batches(sizes=(12, 7))
    log = trainer.epoch(batches)
    with torch.no_grad():
        right = [trainer.net.eval()(x, garbage=True).argmax(1) == y for x, y in batches]
    assert log.accuracy == pytest.approx(torch.cat(right).float().mean().item())


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, [0.0]), (2, [0.0, 1.0]), (3, [0.0, 0.5, 1.0])]
)
def test_progress_given_to_synthesizers(epochs, expected):
    net = make_net()
    proposals = Fixed(net)
    trainer = TIETrainer(net, replace(TINY, epochs=epochs), [proposals], [])
    logs = [trainer.epoch(make_batches()) for _ in range(epochs)]
    assert proposals.progress == expected
    assert [log.epoch for log in logs] == list(range(1, epochs + 1))
    assert logs[0].losses["fixed"] == 1.5
    assert set(logs[0].seconds) == {"train", "invert", "exclude"}
    assert all(0 <= second < 60 for second in logs[0].seconds.values())


@pytest.mark.parametrize("garbage_weight", [1.0, 0.1])
def test_class_weights_in_the_loss(garbage_weight):
    net = make_net()
    x, y = torch.rand(9, *SHAPE), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
    trainer = TIETrainer(net, replace(TINY, garbage_weight=garbage_weight), [], [])
    trainer.pool.add(torch.rand(1, *SHAPE))  # the one that is drawn
    before = copy.deepcopy(net).train()
    whole = torch.cat([x, trainer.pool.draw(2)])
    target = torch.cat([y, torch.full((2,), 3)])
    with torch.no_grad():
        nll = -before(whole, garbage=True).log_softmax(1)[torch.arange(11), target]
    weight = torch.tensor([1 / 6, 1 / 2, 1 / 1, garbage_weight * 3 / 10 / (9 * GARBAGE_SHARE)])[
        target
    ]
    log = trainer.epoch([(x, y)])
    assert log.losses["classifier"] == pytest.approx(
        ((weight * nll).sum() / weight.sum()).item(), rel=1e-4
    )
    assert abs(log.losses["classifier"] - nll.mean().item()) > 1e-3


def test_unequal_classes_change_the_gradient():
    def first_step(counts):
        trainer = TIETrainer(make_net(), TINY, [], [])
        trainer.counts, trainer._counted = torch.tensor(counts), True
        trainer._train(make_batches(sizes=(9,)))
        return torch.cat([p.grad.flatten() for p in trainer.net.parameters()])

    assert torch.equal(first_step([3, 3, 3]), first_step([5, 5, 5]))
    assert not torch.allclose(first_step([3, 3, 3]), first_step([1, 3, 5]), atol=1e-4)


def test_the_pool_begins_half_full():
    net = make_net()
    assert len(TIETrainer(net, replace(TINY, pool_size=101), []).pool) == 51
    assert len(TIETrainer(net, replace(TINY, pool_size=100), []).pool) == 50
    assert len(TIETrainer(net, TINY, [], []).pool) == 0
    white, multi = Noise(net, NoiseSettings(kind="white")), Noise(net)
    both = (
        TIETrainer(net, replace(TINY, pool_size=41), [], [white, multi])
        .pool.state_dict()["images"]
        .float()
    )
    rough = (both[..., 1:] - both[..., :-1]).abs().mean((1, 2, 3))
    assert len(both) == 21
    assert (rough[:11] > 60).all()  # eleven of one, ten of the other
    assert (rough[11:] < 60).any()


class Asked(Noise):
    """A prior that keeps what it was asked for."""

    def __init__(self, net):
        super().__init__(net)
        self.shapes = []

    def draw(self, shape):
        self.shapes.append(shape)
        return super().draw(shape)


def test_shares_of_several_priors_in_the_first_pool():
    net = make_net()
    priors = [Asked(net) for _ in range(3)]
    TIETrainer(net, replace(TINY, pool_size=31), [], priors)  # 16 in all
    assert [prior.shapes for prior in priors] == [[(6, *SHAPE)], [(5, *SHAPE)], [(5, *SHAPE)]]


def test_the_pool_holds_the_range_of_the_network():
    net = TIENet(Small(3), 3, SHAPE, low=-1.0, high=3.0)
    pool = TIETrainer(net, TINY, [], [Noise(net, NoiseSettings(kind="white"))]).pool.draw(60)
    assert pool.min() < -0.9
    assert pool.max() > 2.9


class Rng(Synthesizer):
    """Keeps the random numbers that a run gives it, by the stage that gave them."""

    def __init__(self, net):
        super().__init__(net)
        self.rolled = []

    def fit(self, classifier, batches, progress):
        self.rolled.append(torch.rand(1).item())
        return {}

    def sample(self, classifier, x, y):
        return Candidates(x, y)


class Rolling(list):
    """Batches that draw a random number each time they are read, as a shuffling loader does."""

    def __init__(self, batches):
        super().__init__(batches)
        self.rolled = []

    def __iter__(self):
        self.rolled.append(torch.rand(1).item())
        return super().__iter__()


def weight_sum(generator):
    return sum(p.double().abs().sum().item() for p in generator.parameters())


def rolls(seed):
    """What a run draws: the data's order, the inversion stage, a first generator, a first pool."""
    net, batches = make_net(), Rolling(make_batches())
    rng = Rng(net)
    trainer = TIETrainer(net, replace(TINY, seed=seed), [rng])
    for _ in range(2):
        trainer.epoch(batches)
    generator = TIETrainer(make_net(), replace(TINY, seed=seed)).synthesizers[0].generator
    pool = TIETrainer(make_net(), replace(TINY, seed=seed), []).pool
    return (
        batches.rolled,
        rng.rolled,
        weight_sum(generator),
        pool.state_dict()["images"].float().mean().item(),
    )


def test_random_streams_of_seeds_epochs_and_processes(monkeypatch):
    runs = {}
    for seed, process in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr("tie_ext.training.trainer.rank", lambda process=process: process)
        runs[seed, process] = rolls(seed)
    batches, rng, weight, pool = zip(*runs.values(), strict=True)
    assert len({value for read in batches for value in read}) == sum(
        map(len, batches)
    )  # each time another order, in each run
    assert len({value for of in rng for value in of}) == sum(map(len, rng)) == 6
    assert len(set(weight)) == len(set(pool)) == 3


def test_the_streams_are_those_that_runs_before_had():
    batches, _, weight, _ = rolls(3)
    for epoch in (1, 2):
        with seeded(3, epoch, 0):
            assert batches[epoch - 1] == torch.rand(1).item()
    net = make_net()
    with seeded(3, 0, 0, 1):
        generator = Inversion(net).generator
    assert weight == weight_sum(generator)
    with seeded(3, 0, 0, 2):
        first = Noise(net).draw((20, *SHAPE))
    pool = TIETrainer(net, replace(TINY, seed=3), []).pool.state_dict()["images"]
    assert torch.equal(pool, (first * 255).round().to(torch.uint8))


class Counted(TensorDataset):
    """A data set that counts how often an image of it is read."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "make",
    [make_net, lambda: TIENet(Small(3), 3, SHAPE, head="multilayer")],
    ids=["linear", "multilayer"],
)
def test_each_image_is_read_once_an_epoch(make, tmp_path):
    images = Counted(torch.rand(50, *SHAPE), torch.arange(50) % 3)
    loader = DataLoader(images, 8, shuffle=True)
    for epochs in (2, 3):
        net = make()
        head = HeadConfig(steps=5, epoch_steps=5)
        trainer = TIETrainer(net, TINY, [Inversion(net, FEW)], head_config=head)
        if (tmp_path / "run").exists():
            trainer.load(tmp_path / "run")
        while len(trainer.log) < epochs:
            images.read = 0
            trainer.epoch(loader)
            assert images.read == len(images)
        trainer.save(tmp_path / "run")


def test_data_is_counted_once_and_again_after_a_stop(tmp_path, monkeypatch):
    looked = []
    count = TIETrainer._count
    monkeypatch.setattr(
        TIETrainer,
        "_count",
        lambda self, *args: looked.append(len(self.log)) or count(self, *args),
    )
    trainer = TIETrainer(make_net(), TINY, [])
    for _ in range(2):
        trainer.epoch(make_batches())
    trainer.save(tmp_path / "run")
    again = TIETrainer(make_net(), TINY, [])
    again.load(tmp_path / "run")
    for _ in range(2):
        again.epoch(make_batches())
    assert looked == [0, 2]


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device: they read a number, or need it for a size."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = ("_local_scalar_dense", "nonzero", "unique", "masked_select")
        self.count += func.overloadpacket.__name__ in waiting or "bool" in {
            str(getattr(i, "dtype", ""))[6:] for i in _indices(func, args)
        }
        return func(*args, **(kwargs or {}))


def _indices(func, args):
    return (
        [i for i in args[1] if i is not None]
        if func.overloadpacket.__name__ in ("index", "index_put", "index_put_")
        else []
    )


@pytest.mark.parametrize("search", [0, 2])
@pytest.mark.parametrize(
    "make",
    [make_net, lambda: TIENet(Small(3), 3, SHAPE, head="multilayer")],
    ids=["linear", "multilayer"],
)
def test_no_step_waits_for_the_device(make, search, monkeypatch):
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: None
    )  # which counts its steps on the CPU
    monkeypatch.setattr(
        GarbagePool, "draw", lambda self, k: self.low + torch.zeros(k, *SHAPE)
    )  # so is the pool
    waits = {}
    for steps in (2, 7):
        net = make()
        inversion = Inversion(net, InversionSettings(steps=steps, width=4, batch_size=4))
        trainer = TIETrainer(
            net, replace(TINY, adversarial_steps=search), [inversion], [Noise(net)]
        )
        trainer.counts, trainer._counted = torch.tensor([8, 8, 8]), True
        for name, work in (
            ("generator", lambda inversion=inversion, net=net: inversion.fit(net, [], 0.0)),
            (
                "train",
                lambda trainer=trainer, steps=steps: trainer._train(
                    make_batches(sizes=(8,) * steps)
                ),
            ),
            (
                "head",
                lambda steps=steps: fit_head(
                    GarbageHead({}, 80),
                    torch.rand(9, 80),
                    torch.rand(9, 80),
                    HeadConfig(steps=steps),
                ),
            ),
        ):
            with Waits() as mode:
                work()
            waits.setdefault(name, []).append(mode.count)
    assert {name: few == many for name, (few, many) in waits.items()} == dict.fromkeys(
        waits, True
    ), waits


def test_a_survey_counts_the_images_of_each_class():
    batches = make_batches(sizes=(8, 1, 2, 1))
    assert survey(batches, 3, torch.device("cpu")).tolist() == [6, 4, 2]


def test_bad_data_in_a_later_epoch():
    trainer = make_trainer()
    trainer.epoch(make_batches())
    with pytest.raises(ValueError, match="Expected images of shape"):
        trainer.epoch([(torch.rand(8, 1, 32, 32), torch.arange(8) % 3)])


def test_batches_after_a_batch_of_one():
    net = make_net()
    trainer = TIETrainer(net, TINY, [], [])
    seen = seen_by(net)
    trainer.epoch(make_batches(sizes=(1, 8, 2)))
    assert [len(x) for mode, x in seen if mode] == [8, 2, 11]


def test_size_of_the_sample_that_follows_training():
    net = make_net()
    seen, batches = seen_by(net), make_batches()
    trainer = TIETrainer(net, TINY, [], [], sample_config=SampleConfig(size=5))
    trainer.epoch(batches)
    assert [len(x) for _, x in seen] == [8, 8, 5, 5]  # trained on, BatchNorm's statistics, tau
    given = torch.cat([x for x, _ in batches])
    assert torch.equal(seen[2][1], seen[3][1])
    assert all(any(torch.equal(x, y) for y in given) for x in seen[3][1])
    trainer.epoch(batches)
    assert [len(x) for _, x in seen[4:]] == [8, 8, 16, 16]  # the last epoch keeps more
    trainer.sample_config = SampleConfig(memory=3 * 784 * 4)
    trainer.epoch(batches)
    assert [len(x) for _, x in seen[8:]] == [8, 8, 3, 3]


def test_losses_of_all_synthesizers():
    net = make_net()
    other = type("Other", (Fixed,), {"fit": lambda self, *args: {"other": 2.5}})
    log = TIETrainer(net, TINY, [Fixed(net), other(net)]).epoch(make_batches())
    assert set(log.losses) == {"classifier", "fixed", "other"}
    assert sum(log.proposed) == 2 * TINY.candidates


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("asked", [{}, {"progress": False}, {"progress": True}])
def test_progress_of_an_epoch(asked, terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("tie_ext.utils.progress.SECONDS", 0.0)
    net = make_net()
    trainer = TIETrainer(net, TINY, [Inversion(net, FEW)], **asked)
    trainer.epoch(make_batches())
    trainer.epoch(make_batches())
    shown = capsys.readouterr().err
    stages = [f"epoch {t}: {s}:" for t in (1, 2) for s in ("train", "invert", "tau", "exclude")]
    assert [stage in shown for stage in stages] == [asked.get("progress", False)] * 8
    assert ("epoch 3" in shown, "epoch 0" in shown) == (False, False)
    # Bars that are done do not stay; lines do.
    assert ("\n" in shown, "\r" in shown) == (
        bool(shown) and not terminal,
        bool(shown) and terminal,
    )
    if shown and not terminal:
        assert re.search(r"^epoch 1: train: 16/16 \[.* images/s, loss \d", shown, re.MULTILINE)


def test_lines_of_progress_are_ten_seconds_apart(capsys, monkeypatch):
    now = [1000.0]
    for clock in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, lambda: now[0])
    monkeypatch.setattr(Progress, "last", now[0])
    for stage in "abc":  # of 8 seconds each
        for _ in Progress(range(4), stage):
            now[0] += 2
    assert [line[0] for line in capsys.readouterr().err.splitlines()] == ["b", "c"]


def test_the_default_is_tie_as_in_the_paper():
    net = make_net()
    trainer = TIETrainer(net)
    assert [type(synthesizer) for synthesizer in trainer.synthesizers] == [Inversion]
    assert [type(prior) for prior in trainer.prior] == [Noise]
    assert trainer.config == TIEConfig()


def test_id_batches_that_candidates_are_proposed_from():
    net = make_net()
    asked = []

    class Asking(Fixed):
        def sample(self, classifier, x, y):
            asked.append((x.clone(), y.clone()))
            return super().sample(classifier, x, y)

    batches = make_batches(sizes=(8, 5))
    TIETrainer(net, replace(TINY, candidates=32), [Asking(net)], []).epoch(batches)
    assert [len(x) for x, _ in asked] == [13, 13, 6]
    TIETrainer(net, replace(TINY, candidates=32), [Asking(net)], []).epoch(
        make_batches(sizes=(31,))
    )
    assert [len(x) for x, _ in asked[3:]] == [31, 1]
    wanted, label = (torch.cat(part) for part in zip(*batches, strict=True))
    for x, y in asked[:3]:
        assert torch.equal(x, wanted[: len(x)])
        assert torch.equal(y, label[: len(y)])


# Defects that were found on reading.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
def test_images_of_any_floating_point_type_train(dtype, synthesizer):
    settings = {
        "inversion": {"steps": 1, "width": 4},
        "boundary": {"vae_epochs": 1},
        "marginal": {"vae_epochs": 1},
    }
    recipe = Recipe(TINY, {synthesizer: settings.get(synthesizer, {})})
    log = recipe.trainer(make_net()).epoch(
        [(x.to(dtype), y.int()) for x, y in make_batches()]
    )  # and int32 labels
    assert math.isfinite(log.losses["classifier"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
def test_networks_of_other_types_train_and_decide(dtype, synthesizer):
    settings = {
        "inversion": {"steps": 1, "width": 4},
        "boundary": {"vae_epochs": 1},
        "marginal": {"vae_epochs": 1},
    }
    net = make_net().to(dtype)
    log = (
        Recipe(TINY, {synthesizer: settings.get(synthesizer, {})})
        .trainer(net)
        .epoch(make_batches())
    )
    assert math.isfinite(log.losses["classifier"])
    assert {p.dtype for p in net.parameters()} == {dtype}
    decision = net.decide(make_batches()[0][0])
    assert decision.score.isfinite().all()
    assert decision.score.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_a_last_batch_of_one_is_fine_without_garbage_too():
    trainer = TIETrainer(make_net(), TINY, [], [])
    log = trainer.epoch(make_batches(sizes=(8, 1)))
    assert log.pool == 0
    with pytest.raises(ValueError, match="Expected batches of two or more images in every epoch"):
        TIETrainer(make_net(), TINY, [], []).epoch(
            [(x[None], torch.tensor([i])) for i, x in enumerate(make_batches()[0][0][:3])]
        )


def test_a_batchnorm_layer_that_was_frozen_stays_as_it_was():
    net = make_net()
    frozen_layer, other = (
        m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.num_features in (8, 12)
    )
    frozen_layer.eval()
    before = {k: v.clone() for k, v in frozen_layer.state_dict().items() if "running" in k}
    trainer = TIETrainer(net, TINY, [], None)
    for _ in range(2):
        trainer.epoch(make_batches())
        assert net.training
        assert not frozen_layer.training
        assert other.training
        net.eval()  # as one who looks at the network between epochs leaves it
    assert all(torch.equal(frozen_layer.state_dict()[k], v) for k, v in before.items())
    assert not torch.equal(other.running_mean, torch.zeros(12))
    assert other.momentum == 0.1


def test_batchnorm_statistics_are_the_mean_over_the_mixture():
    net = make_net()
    trainer = TIETrainer(net, TINY, [], None, sample_config=SampleConfig(batch_size=9))
    seen = seen_by(net)
    trainer.epoch(make_batches())
    inputs = [x for mode, x in seen if mode][2:]  # the first two were trained on
    first = net.backbone.conv[0]
    with torch.no_grad():
        means = torch.stack([first(x).mean((0, 2, 3)) for x in inputs])
    torch.testing.assert_close(
        net.backbone.conv[1].running_mean, means.mean(0), rtol=1e-4, atol=1e-5
    )
    assert net.backbone.conv[1].num_batches_tracked == len(inputs) == 2


def test_batches_that_can_be_read_once_are_refused():
    trainer = make_trainer()
    with pytest.raises(
        ValueError,
        match=r"something that can be read more than once, .*, but got a list_iterator",
    ):
        trainer.epoch(iter(make_batches()))


def test_resume_with_other_data(tmp_path):
    trainer = make_trainer()
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "run")
    again = make_trainer()
    again.load(tmp_path / "run")
    with pytest.raises(
        ValueError,
        match=r"the data this run began with, \[6, 6, 4\] images of .*, but got \[3, 3, 2\]",
    ):
        again.epoch(make_batches(sizes=(8,)))
    again.epoch(make_batches(sizes=(8, 7)))  # as a loader that drops its last batch


def test_numpys_numbers_are_settings():
    config = TIEConfig(epochs=np.int64(3), lr=np.float32(0.5), seed=np.uint8(4))
    assert (config.epochs, config.lr, config.seed) == (3, 0.5, 4)
    assert {type(value) for value in (config.epochs, config.seed)} == {int}
    for bad_value in (np.int64(0), np.float64(2.5), True, "3"):
        with pytest.raises(ValueError, match="Expected epochs to be an integer"):
            TIEConfig(epochs=bad_value)


def test_resume_with_a_loader_that_drops_a_batch(tmp_path):
    x, y = torch.rand(26, *SHAPE), torch.arange(26) % 3
    rng = torch.Generator().manual_seed(0)
    loader = DataLoader(
        TensorDataset(x, y), batch_size=8, shuffle=True, drop_last=True, generator=rng
    )
    trainer = make_trainer()
    trainer.epoch(loader)
    trainer.save(tmp_path / "run")
    again = make_trainer()
    again.load(tmp_path / "run")
    assert again.epoch(loader).epoch == 2
    assert torch.equal(again.counts, trainer.counts)


def test_resume_with_another_criterion(tmp_path):
    net = make_net()
    trainer = TIETrainer(net, TINY, [], criterion=uniform_criterion)
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "run")
    with pytest.raises(
        ValueError,
        match=r"but got criterion 'tie_ext.*uniform.*' instead of 'torch.nn.functional.cross_e",
    ):
        TIETrainer(make_net(), TINY, []).load(tmp_path / "run")


def test_names_of_settings_of_two_alike_synthesizers(tmp_path):
    recipe = Recipe(TINY, {"gradient": {"p_inv": 0.1}, "shuffle": {}})
    recipe.trainer(make_net()).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"Saliency 1.p_inv 0.1 instead of 0.5"):
        Recipe(TINY, {"gradient": {"p_inv": 0.5}, "shuffle": {}}).trainer(make_net()).load(
            tmp_path / "run"
        )


def test_training_state_of_0_1_0(tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "run")
    state = load_state(tmp_path / "run", "training")
    del state["methods"]
    save_state(tmp_path / "run", "training", state)
    with pytest.raises(
        ValueError,
        match=r"a training state of this version of .*, but got one of an earlier version",
    ):
        make_trainer().load(tmp_path / "run")


def test_synthesizers_can_ask_how_many_batches_there_are():
    net = make_net()

    class Counting(Fixed):
        def fit(self, classifier, batches, progress):
            self.batches = len(batches)
            return {}

    counting = Counting(net)
    TIETrainer(net, TINY, [counting]).epoch(make_batches(sizes=(8, 8, 8)))
    assert counting.batches == 3


def test_momentum_after_an_error_while_settling():
    net = make_net()

    def stops():
        yield torch.rand(4, *SHAPE)
        raise KeyError

    with pytest.raises(KeyError):
        settle_statistics(net, stops())
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


def test_a_network_from_a_trained_classifier_trains_all_its_parts():
    net = TIENet(Small(3).eval(), 3, SHAPE)
    assert not net.training
    before = net.backbone.conv[1].running_mean.clone()
    TIETrainer(net, TINY, [Inversion(net, FEW)]).epoch(make_batches())
    assert not torch.equal(net.backbone.conv[1].running_mean, before)


def test_bad_data_leaves_the_mode_and_no_gradients():
    net = TIENet(Small(3).eval(), 3, SHAPE)
    good, (x, y) = make_batches()
    with pytest.raises(ValueError, match="finite"):
        TIETrainer(net, TINY, [Inversion(net, FEW)]).epoch([good, (x * float("nan"), y)])
    assert not any(part.training for part in net.modules())
    assert all(p.grad is None for p in net.parameters())
