"""The loop: what an epoch does, what it refuses, and that stopping changes nothing."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import (
    FEW,
    QUICK,
    SHAPE,
    TINY,
    close,
    make_batches,
    make_small,
    make_trainer,
    refused,
    same,
    states,
)
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
    Procedural,
    Synthesizer,
)
from tie_ext.training.config import HeadConfig, SampleConfig
from tie_ext.training.fit_head import fit_head
from tie_ext.training.pool import GarbagePool
from tie_ext.training.recipe import Recipe
from tie_ext.training.strategies import GARBAGE_SHARE

heads = pytest.mark.parametrize("head", ["linear", "multilayer"])


def seen_by(net):
    """Every batch of images that reaches the backbone from now on, and its mode."""
    seen = []
    net.backbone.register_forward_pre_hook(
        lambda module, args: seen.append((module.training, args[0].clone()))
    )
    return seen


def logs(trainer):
    return [{**asdict(entry), "seconds": None} for entry in trainer.log]


def test_epoch_of_training_inversion_and_exclusion():
    trainer, random = make_trainer(make_small(), lam=-math.inf), torch.get_rng_state()
    before, began = states(trainer.net), len(trainer.pool)
    log = trainer.epoch(make_batches())
    assert not same(trainer.net, before)
    assert set(log.losses) == {"classifier", "kl", "ce", "cosine", "agreement"}
    assert set(log.seconds) == {"train", "invert", "exclude"}
    assert sum(log.proposed) == TINY.candidates
    assert log.excluded == log.proposed  # lambda = -inf excludes everything
    assert log.pool == len(trainer.pool) == began + sum(log.excluded)
    assert (log.tau, trainer.net.tau) == (None, 1)
    assert torch.equal(torch.get_rng_state(), random)


def test_defaults_of_a_trainer_and_of_its_prior():
    trainer = TIETrainer(make_small())
    assert [type(synthesizer) for synthesizer in trainer.synthesizers] == [Inversion]
    assert [type(prior) for prior in trainer.prior] == [Noise]
    assert trainer.config == TIEConfig()
    multilayer = TIETrainer(make_small("multilayer"), TINY, [])
    assert [type(prior) for prior in multilayer.prior] == [Procedural]
    assert len(TIETrainer(make_small(), replace(TINY, pool_size=101), []).pool) == 51
    assert len(TIETrainer(make_small(), TINY, [], []).pool) == 0


def test_learning_rate_along_half_a_cosine():
    trainer, used = make_trainer(make_small(), epochs=3, lr=0.01), []
    for _ in range(4):
        trainer.epoch(make_batches())
        used.append(trainer.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([0.01, 0.0075, 0.0025, 0.0025])  # past the run's length it stays


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("linear", {}),
        ("linear", {"autocast_dtype": "bfloat16"}),
        ("linear", {"adversarial_steps": 2}),
        ("multilayer", {}),
        ("multilayer", {"adversarial_steps": 2}),
    ],
)
def test_stop_and_resume_equals_uninterrupted(head, changes, tmp_path):
    whole, first, second = (make_trainer(make_small(head), **changes) for _ in range(3))
    for _ in range(3):
        whole.epoch(make_batches())
    first.epoch(make_batches())
    first.save(tmp_path / "run")
    torch.rand(7)  # a resumed process has another random state
    second.load(tmp_path / "run")
    for _ in range(2):
        second.epoch(make_batches())
    assert same(whole.net, second.net)
    assert same(whole.synthesizers[0], second.synthesizers[0])
    pools = [trainer.pool.state_dict()["images"] for trainer in (whole, second)]
    assert torch.equal(*pools)
    assert logs(whole) == logs(second)


class Viewing(nn.Module):
    """A network that, like many, takes its feature maps to lie one channel after the other."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(channels, 4, 3, stride=4), nn.Linear(4 * 7 * 7, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().view(-1, 4 * 7 * 7))


@pytest.mark.parametrize("synthesizer", SYNTHESIZERS)
@pytest.mark.parametrize(
    ("channels", "images", "weights"),
    [
        (1, torch.float16, torch.float32),
        (3, torch.float64, torch.bfloat16),
        (3, torch.float32, torch.float64),
    ],
)
def test_epoch_in_any_type_and_memory_layout(channels, images, weights, synthesizer):
    settings = {
        "inversion": {"steps": 1, "width": 4},
        "boundary": {"vae_epochs": 1},
        "marginal": {"vae_epochs": 1},
    }
    net = TIENet(Viewing(channels), 3, (channels, 28, 28)).to(weights)
    trainer = Recipe(TINY, {synthesizer: settings.get(synthesizer, {})}).trainer(net)
    batches = [(x.repeat(1, channels, 1, 1).to(images), y.int()) for x, y in make_batches()]
    assert math.isfinite(trainer.epoch(batches).losses["classifier"])
    assert all(p.is_contiguous() and p.dtype == weights for p in net.parameters())
    score = net.decide(batches[0][0]).score
    assert score.isfinite().all()
    assert score.dtype == (torch.float64 if weights == torch.float64 else torch.float32)


def test_value_range_of_each_channel_in_the_pool():
    low, high = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    net = TIENet(Conv3(3, 3), 3, (3, 28, 28), low.tolist(), high.tolist())
    trainer = TIETrainer(net, TINY, [Inversion(net, FEW)], [Noise(net, NoiseSettings("white"))])
    trainer.epoch([(net.from_unit(torch.rand(6, 3, 28, 28)), torch.arange(6) % 3)])
    garbage = trainer.pool.draw(80)
    close(garbage.amin((0, 2, 3)), low, rtol=0, atol=0.1)
    close(garbage.amax((0, 2, 3)), high, rtol=0, atol=0.1)


def bad(x=None, y=None):
    first, (good, labels) = make_batches()
    return [first, (good if x is None else x, labels if y is None else y)]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (bad(torch.rand(8, 3, 28, 28)), r"shape \(B, 1, 28, 28\), but got .* \(8, 3, 28, 28\)"),
        (bad(torch.full((8, *SHAPE), math.nan)), "Expected finite images, but got 6272 NaN"),
        (bad(y=torch.full((8,), 3)), r"labels in \[0, 3\), but got labels in \[3, 3\]"),
        ([(x, y - 9) for x, y in make_batches()], "but got 16 with labels < 0 alone"),
        ([], "Expected ID images in loader, but got an empty loader"),
        ([(x, y % 2) for x, y in make_batches()], r"all 3 classes, but got none of class \[2\]"),
        ([torch.rand(4, *SHAPE)], "Expected labels beside the images of loader"),
        (TensorDataset(torch.rand(4, *SHAPE), torch.zeros(4)), "gives one image at a time"),
        (iter(make_batches()), "can be read more than once, .*, but got a list_iterator"),
        ([(x[:1], y[:1]) for x, y in make_batches()], "all 3 classes"),
    ],
)
def test_network_after_bad_data_in_the_first_epoch(batches, message):
    trainer = make_trainer(make_small().eval(), pool_size=1)
    before, optimizer = states(trainer.net), trainer.optimizer.state_dict()
    with refused(message):
        trainer.epoch(batches)
    assert same(trainer.net, before)
    assert trainer.optimizer.state_dict() == optimizer
    assert not any(part.training for part in trainer.net.modules())
    assert all(p.grad is None for p in trainer.net.parameters())
    assert trainer.log == []


def test_bad_data_and_losses_of_later_epochs():
    trainer = make_trainer(make_small())
    trainer.epoch(make_batches())
    with refused("Expected images of shape"):
        trainer.epoch([(torch.rand(8, 1, 32, 32), torch.arange(8) % 3)])
    nn.init.constant_(trainer.net.fc.weight, math.nan)
    with pytest.raises(FloatingPointError, match="Expected a finite training loss"):
        trainer.epoch(make_batches())
    with refused("Expected a TIENet with an image_shape"):
        TIETrainer(TIENet(Conv3(), 10), TINY)


def test_images_with_a_label_below_zero_in_an_epoch():
    batches, found = make_batches(), []
    more, none = torch.rand(3, *SHAPE), torch.full((3,), -1)
    mixed = [{"image": torch.cat([x, more]), "label": torch.cat([y, none])} for x, y in batches]
    for loader in (batches, mixed):
        torch.manual_seed(0)
        trainer = make_trainer(make_small())
        trainer.epoch(loader)
        assert trainer.counts.tolist() == [6, 6, 4]
        found.append(logs(trainer))
    assert found[0] == found[1]


class Fixed(Synthesizer):
    """Proposes ID images as they are, and records its arguments."""

    def __init__(self, net):
        super().__init__(net)
        self.progress, self.rolled, self.batches = [], [], []

    def fit(self, classifier, batches, progress):
        self.progress.append(progress)
        self.rolled.append(torch.rand(1).item())
        self.batches.append(len(batches))
        return {"fixed": 1.5}

    def sample(self, classifier, x, y):
        return Candidates(x, y)


@pytest.mark.parametrize(("epochs", "expected"), [(1, [0]), (2, [0, 1]), (3, [0, 0.5, 1])])
def test_what_synthesizers_are_given_and_give(epochs, expected):
    net = make_small()
    proposals = Fixed(net)
    other = type("Other", (Fixed,), {"fit": lambda self, *args: {"other": 2.5}})(net)
    trainer = TIETrainer(net, replace(TINY, epochs=epochs), [proposals, other], [])
    for _ in range(epochs):
        trainer.epoch(make_batches(sizes=(8, 8, 8)))
    assert (proposals.progress, proposals.batches) == (expected, [3] * epochs)
    assert [log.epoch for log in trainer.log] == list(range(1, epochs + 1))
    log = trainer.log[0]
    assert (log.losses["fixed"], log.losses["other"]) == (1.5, 2.5)
    assert sum(log.proposed) == 2 * TINY.candidates


def test_garbage_in_every_batch_of_an_epoch():
    net = make_small()
    trainer = TIETrainer(net, TINY, [], [])
    pooled = torch.rand(20, *SHAPE).mul(255).round() / 255
    trainer.pool.add(pooled)
    seen, batches = seen_by(net), make_batches(sizes=(12, 9))
    log = trainer.epoch(batches)
    assert (sum(log.proposed), log.agreement, log.pool) == (0, [None] * 4, 20)
    training = [x for mode, x in seen if mode]
    # Trained on, then BatchNorm's statistics of what was kept.
    assert [len(x) for x in training] == [15, 11, 26]
    kept = (torch.cat([x for x, _ in batches]), None)
    for given, (x, _) in zip(training, [*batches, kept], strict=True):
        assert torch.equal(given[: len(x)], x)
        distance = torch.cdist(given[len(x) :].flatten(1), pooled.flatten(1)).amin(1)
        assert distance.max() < 1e-3
    assert [len(x) for mode, x in seen if not mode] == [21]  # tau is that of ID images alone


@heads
@pytest.mark.parametrize("prior", [True, False])
def test_batches_of_one_image_in_an_epoch(head, prior):
    net = make_small(head)
    seen, priors = seen_by(net), [Noise(net)] if prior or head == "multilayer" else []
    trainer = TIETrainer(net, TINY, [], priors, head_config=HeadConfig(**QUICK))
    trainer.epoch(make_batches(sizes=(1, 8, 2)))
    garbage = prior and head == "linear"  # beside which one image is enough
    expected = [2, 10, 3, 14] if garbage else [8, 2] + [11] * (head == "linear")
    assert [len(x) for mode, x in seen if mode] == expected
    single = [(x[None], y[None]) for x, y in zip(*make_batches()[0], strict=True)]
    if not garbage:
        with refused("Expected batches of two or more images in every"):
            trainer.epoch(single)


@pytest.mark.parametrize("garbage_weight", [1.0, 0.1])
@pytest.mark.parametrize("labels", ["000000112", "012012012"])
def test_class_weights_in_the_loss_of_a_step(garbage_weight, labels):
    net, x, y = make_small(), torch.rand(9, *SHAPE), torch.tensor(list(map(int, labels)))
    trainer = TIETrainer(net, replace(TINY, garbage_weight=garbage_weight), [], [])
    if labels == "012012012":  # those of an epoch before count
        trainer.counts, trainer._counted = torch.tensor([6, 2, 1]), True
    trainer.pool.add(torch.rand(1, *SHAPE))  # the one that is drawn
    whole, target = torch.cat([x, trainer.pool.draw(2)]), torch.cat([y, torch.full((2,), 3)])
    with torch.no_grad():
        nll = -net.train()(whole, garbage=True).log_softmax(1)[torch.arange(11), target]
    each = torch.tensor([1 / 6, 1 / 2, 1 / 1, garbage_weight * 3 / 10 / (9 * GARBAGE_SHARE)])
    expected = (each[target] * nll).sum() / each[target].sum()
    loss = trainer.epoch([(x, y)]).losses["classifier"]
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert abs(loss - nll.mean().item()) > 1e-4


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
    net, batches, config = make_small(), Rolling(make_batches()), replace(TINY, seed=seed)
    fixed = Fixed(net)
    trainer = TIETrainer(net, config, [fixed])
    for _ in range(2):
        trainer.epoch(batches)
    default = TIETrainer(make_small(), config)
    generator = default.synthesizers[0].generator
    return batches.rolled, fixed.rolled, weight_sum(generator), default.pool.images[:20].clone()


def test_random_streams_of_seeds_and_processes(monkeypatch):
    runs = []
    for seed, process in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr("tie_ext.training.trainer.rank", lambda process=process: process)
        runs.append(rolls(seed))
    batches, fitted, weight, pools = zip(*runs, strict=True)
    for drawn in (batches, fitted):  # each time another order, in each run
        assert len({value for of in drawn for value in of}) == sum(map(len, drawn)) >= 6
    assert len(set(weight)) == len({pool.float().mean() for pool in pools}) == 3


class Counted(TensorDataset):
    """A data set that counts how often an image of it is read."""

    read = 0

    def __getitem__(self, index):
        self.read += 1
        return super().__getitem__(index)


@heads
def test_each_image_is_read_once_an_epoch(head, tmp_path):
    images = Counted(torch.rand(50, *SHAPE), torch.arange(50) % 3)
    loader = DataLoader(images, 8, shuffle=True)
    for epochs in (2, 3):
        trainer = make_trainer(make_small(head))
        if (tmp_path / "run").exists():
            trainer.load(tmp_path / "run")
        while len(trainer.log) < epochs:
            images.read = 0
            trainer.epoch(loader)
            assert images.read == len(images)
        trainer.save(tmp_path / "run")


class Waits(TorchDispatchMode):
    """Counts operations that wait for the device: they read a number, or need it for a size."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        self.count += name in ("_local_scalar_dense", "nonzero", "unique", "masked_select") or any(
            index is not None and index.dtype == torch.bool for index in indices
        )
        return func(*args, **(kwargs or {}))


@heads
@pytest.mark.parametrize("search", [0, 2])
def test_no_step_waits_for_the_device(head, search, monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)  # counts on the CPU
    monkeypatch.setattr(  # so is the pool
        GarbagePool, "draw", lambda self, k: self.low + torch.zeros(k, *SHAPE)
    )
    waits = []
    for steps in (2, 7):
        net = make_small(head)
        inversion = Inversion(net, InversionSettings(steps=steps, width=4, batch_size=4))
        config = replace(TINY, adversarial_steps=search)
        trainer = TIETrainer(net, config, [inversion], [Noise(net)])
        trainer.counts, trainer._counted = torch.tensor([8, 8, 8]), True
        stages = (
            lambda: inversion.fit(net, [], 0.0),  # noqa: B023
            lambda: trainer._train(make_batches(sizes=(8,) * steps)),  # noqa: B023
            lambda: fit_head(
                GarbageHead({}, 80),
                torch.rand(9, 80),
                torch.rand(9, 80),
                HeadConfig(steps=steps),  # noqa: B023
            ),
        )
        counts = []
        for stage in stages:
            with Waits() as mode:
                stage()
            counts.append(mode.count)
        waits.append(counts)
    assert waits[0] == waits[1]


def test_size_of_the_sample_after_training():
    net = make_small()
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


@pytest.mark.parametrize("steps", [0, 2])
def test_frozen_and_other_layers_of_batchnorm(steps):
    net = make_small().eval()  # of which .train() means all parts, but for those frozen later
    other, frozen = (part for part in net.modules() if isinstance(part, nn.BatchNorm2d))
    net.train()
    frozen.eval()
    before = states(frozen)
    trainer = TIETrainer(net, replace(TINY, adversarial_steps=steps), [], None)
    for _ in range(2):
        trainer.epoch(make_batches())
        assert (net.training, other.training, frozen.training) == (True, True, False)
        net.eval()  # as one who looks at the network between epochs leaves it
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(frozen, name), before[name])
    assert not torch.equal(other.running_mean, torch.zeros(8))
    assert other.momentum == 0.1


def test_batchnorm_statistics_over_the_mixture():
    net = make_small()
    trainer = TIETrainer(net, TINY, [], None, sample_config=SampleConfig(batch_size=9))
    seen, first = seen_by(net), net.backbone.conv[0]
    trainer.epoch(make_batches())
    inputs = [x for mode, x in seen if mode][2:]  # the first two were trained on
    with torch.no_grad():
        mean = torch.stack([first(x).mean((0, 2, 3)) for x in inputs]).mean(0)
    close(net.backbone.conv[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    assert net.backbone.conv[1].num_batches_tracked == len(inputs) == 2
