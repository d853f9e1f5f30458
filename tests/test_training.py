"""The loop: what an epoch does, what it refuses, and that stopping changes nothing."""

import math
from dataclasses import asdict, replace

import pytest
import torch
from conftest import FEW, SHAPE, TINY, make_batches, make_net, make_trainer
from torch import nn

from tie_ext import Conv3, Inversion, TIEConfig, TIENet, TIETrainer
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.outliers.saliency import uniform_objective
from tie_ext.recipe import Recipe
from tie_ext.support.files import load_state, save_state
from tie_ext.training import GARBAGE_SHARE


def test_an_epoch_trains_inverts_and_excludes():
    trainer = make_trainer(lam=-math.inf)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    pool = len(trainer.pool)
    log = trainer.epoch(make_batches())
    assert any(not torch.equal(v, before[k]) for k, v in trainer.net.state_dict().items())
    assert {"classifier", "kl", "ce", "cosine"} <= set(log.losses)
    assert sum(log.proposed) == 4 * TINY.candidates_per_class
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
    trainer = make_trainer()
    trainer.counts = torch.tensor([10, 20, 30])
    weights = trainer._class_weights()
    sizes = torch.tensor([10, 20, 30, 60 * GARBAGE_SHARE])
    torch.testing.assert_close(weights * sizes, torch.full((4,), sizes.sum().item() / 4))


def test_the_learning_rate_falls_along_half_a_cosine():
    trainer, used = make_trainer(epochs=3, lr=0.01), []
    for _ in range(4):
        trainer.epoch(make_batches())
        used.append(trainer.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([0.01, 0.0075, 0.0025, 0.0025])  # past the run's length it stays


def test_the_plain_network_trains_at_the_same_rates(monkeypatch):
    from tie_ext.bench.comparison import train_plain

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


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stop_and_resume_equals_uninterrupted(precision, tmp_path):
    batches = make_batches()
    whole = make_trainer(precision=precision)
    for _ in range(3):
        whole.epoch(batches)
    first = make_trainer(precision=precision)
    first.epoch(batches)
    first.save(tmp_path / "run.safetensors")
    torch.rand(7)  # a resumed process has another random state
    second = make_trainer(precision=precision)
    second.load(tmp_path / "run.safetensors")
    for _ in range(2):
        second.epoch(batches)
    for a, b in ((whole.net, second.net), (whole.synthesizers[0], second.synthesizers[0])):
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(x, y), name
    assert torch.equal(whole.pool.state_dict()["images"], second.pool.state_dict()["images"])
    logs = [[{**asdict(entry), "seconds": None} for entry in trainer.log] for trainer in (whole, second)]
    assert logs[0] == logs[1]


def test_the_random_state_outside_is_left_alone():
    trainer, state = make_trainer(), torch.get_rng_state()
    trainer.epoch(make_batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_last_batch_of_one_is_fine():
    make_trainer().epoch(make_batches(sizes=(8, 1)))


def test_another_value_range_is_kept():
    net = TIENet(Conv3(3, 3), 3, (3, 28, 28), low=(-1.0, -2.0, 0.0), high=(1.0, 2.0, 3.0))
    x = torch.stack([torch.rand(6, 28, 28) * 2 - 1, torch.rand(6, 28, 28) * 4 - 2, torch.rand(6, 28, 28) * 3], dim=1)
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
        (bad(x=torch.rand(8, 3, 28, 28)), r"Expected images of shape \(B, 1, 28, 28\), but got a torch.float32 tensor of shape \(8, 3, 28, 28\)"),
        (bad(x=torch.rand(8, 1, 32, 32)), "Expected images of shape"),
        (bad(x=torch.zeros(8, *SHAPE, dtype=torch.uint8)), "Expected floating-point images"),
        (bad(x=torch.full((8, *SHAPE), float("nan"))), "Expected finite images, but got 6272 NaN"),
        (bad(x=torch.full((8, *SHAPE), float("inf"))), "Expected finite images"),
        (bad(x=torch.rand(8, *SHAPE) * 255), "Expected images in the value range"),
        (bad(x=torch.rand(0, *SHAPE), y=torch.zeros(0, dtype=torch.long)), "Expected at least one image"),
        (bad(y=torch.full((8,), 3)), r"Expected labels in \[0, 3\), but got labels in \[3, 3\]"),
        (bad(y=torch.full((8,), -1)), "Expected labels in"),
        (bad(y=torch.zeros(8)), "Expected integer labels"),
        (bad(y=torch.zeros(7, dtype=torch.long)), r"Expected integer labels of shape \(8,\)"),
        ([], "Expected at least one batch of training data, but got an empty loader"),
        ([(torch.rand(4, *SHAPE), torch.tensor([0, 0, 1, 1]))], r"Expected samples of all 3 classes, but got none of class \[2\]"),
        ([torch.rand(4, *SHAPE)], r"Expected batches of \(images, labels\)"),
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
        {"candidates_per_class": -1},
        {"candidates_per_class": 1.5},
        {"garbage_weight": 0},
        {"precision": "float16"},
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
    trainer = Recipe(TINY, {synthesizer: settings}).trainer(TIENet(Viewing(channels), 3, (channels, 28, 28)))
    trainer.epoch([(x.repeat(1, channels, 1, 1), y) for x, y in make_batches()])
    assert all(p.is_contiguous() for p in trainer.net.parameters())


def test_in_bfloat16_only_the_backbone_computes_so(tmp_path):
    trainer = make_trainer(precision="bfloat16")
    trainer.epoch(make_batches())
    net, x = trainer.net.eval(), make_batches()[0][0]
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    logits, h = net(x, return_feature=True, garbage=True)
    assert logits.dtype == h.dtype == torch.float32
    net.save(tmp_path / "net.safetensors")
    again = TIENet.load(tmp_path / "net.safetensors")
    assert torch.equal(again(x, garbage=True), logits)  # a threshold fitted before it was saved meets the same scores
    again.precision = "float32"
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
    with pytest.raises(ValueError, match=r"of a run with the settings of this one in .*, but got lam 0.5 instead of 2.0, precision"):
        make_trainer(lam=2.0, precision="bfloat16").load(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match=r"but got synthesizers \['Inversion'\] instead of \[\]"):
        TIETrainer(make_net(), TINY, synthesizers=[]).load(tmp_path / "run.safetensors")


def test_a_run_of_before_a_setting_existed_had_its_default(tmp_path):
    trainer = make_trainer()
    trainer.epoch(make_batches())
    trainer.save(tmp_path / "run.safetensors")
    state = load_state(tmp_path / "run.safetensors", "training")
    del state["config"]["precision"]
    save_state(tmp_path / "run.safetensors", "training", state)
    make_trainer().load(tmp_path / "run.safetensors")
    with pytest.raises(ValueError, match="but got precision 'float32' instead of 'bfloat16'"):
        make_trainer(precision="bfloat16").load(tmp_path / "run.safetensors")


def test_the_uniform_objective_makes_garbage_uncertain_and_leaves_the_labels():
    torch.manual_seed(0)
    x = torch.zeros(24, *SHAPE)
    for i in range(24):
        x[i, :, 8 * (i % 3) : 8 * (i % 3) + 8] = 1
    trainer = TIETrainer(make_net(), replace(TINY, epochs=15), [], objective=uniform_objective)
    for _ in range(15):
        trainer.epoch([(x, torch.arange(24) % 3)])
    inside, outside = trainer.net.decide(x), trainer.net.decide(trainer.pool.draw(24))
    assert torch.equal(inside.label, torch.arange(24) % 3)
    assert outside.uncertainty.mean() > 0.8 > 0.5 > inside.uncertainty.mean()
    assert outside.score.min() > inside.score.max()


def test_batches_have_the_same_share_of_garbage_while_the_pool_fills():
    trainer = make_trainer(lam=-math.inf)
    trainer.counts, seen = torch.tensor([10, 10, 10]), []
    for _ in range(3):
        seen.append([int((y == 3).sum()) for _, y in trainer._with_garbage(make_batches(sizes=(12, 9)), "train")])
        trainer.pool.add(torch.rand(10, *SHAPE))
    assert seen == [[4, 3]] * 3
