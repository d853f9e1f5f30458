"""Two processes (gloo, CPU) train as one: the same networks, generators and tau in both."""

import os
import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SHAPE, TINY, Small, make_net, make_small
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tie_ext import TIENet, TIETrainer, attach, combine
from tie_ext.outliers import (
    BoundarySettings,
    Inversion,
    InversionSettings,
    ManifoldBoundary,
    MarginalRepresentations,
    MarginalSettings,
    Noise,
    Synthesizer,
)
from tie_ext.scores.decision import uncertainty
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.config import HeadConfig
from tie_ext.utils.distributed import (
    average_gradients,
    average_statistics,
    gathered,
    total,
)

no_gloo = not dist.is_available() or not dist.is_gloo_available()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(no_gloo, reason="torch has no gloo")]
WORLD = 2
EPOCHS = 5


def batches(rank: int | None) -> list:
    """Three easy classes; each process gets every other image, a single one gets all."""
    rng = torch.Generator().manual_seed(2)
    y = torch.arange(96) % 3
    x = torch.rand(96, *SHAPE, generator=rng) * 0.2
    for i, label in enumerate(y.tolist()):
        x[i, :, 9 * label : 9 * label + 9] += 0.7
    if rank is not None:
        x, y = x[rank::WORLD], y[rank::WORLD]
    size = 8 if rank is not None else 8 * WORLD
    return list(zip(x.split(size), y.split(size), strict=True))


def train(rank: int | None, epochs: int):
    net = make_net()
    config = replace(TINY, epochs=epochs, pool_size=60, candidates=48)
    trainer = TIETrainer(net, config, [Inversion(net, InversionSettings(steps=4, width=4))])
    return trainer, [trainer.epoch(batches(rank)) for _ in range(epochs)]


def lacking(rank: int) -> list:
    """Shares of which the second has no image of class 0."""
    x, y = (torch.cat(part) for part in zip(*batches(None), strict=True))
    order = y.argsort(stable=True)
    half = order[rank * 48 : rank * 48 + 48]
    half = half[torch.randperm(48, generator=torch.Generator().manual_seed(rank))]
    return list(zip(x[half].split(16), y[half].split(16), strict=True))


def fresh() -> TIETrainer:
    return TIETrainer(make_small(), replace(TINY, epochs=1), [], [])


def attached(rank: int) -> dict:
    """A head and a combination of images that all processes have, and of images in shares."""
    images = TensorDataset(*(torch.cat(part) for part in zip(*batches(None), strict=True)))
    model, config = make_small().backbone, HeadConfig(steps=20)
    model.fc = torch.nn.Linear(48, 3)
    torch.nn.init.normal_(model.fc.weight, generator=torch.Generator().manual_seed(0))
    model.eval()
    every = DataLoader(images, 8, shuffle=True)
    shares = DataLoader(images, 8, sampler=DistributedSampler(images, WORLD, rank))
    net, other = (attach(model, of, 3, head_config=config) for of in (every, shares))
    detector = combine(net, calibration_loader=every, false_alarm=0.1)
    scores = detector.calibration_scores
    return {"net": net.state_dict(), "shares": other.train_features, "scores": scores}


class Seeds(Synthesizer):
    """Proposes nothing of use, and keeps what it drew."""

    def __init__(self, net):
        super().__init__(net)
        self.drawn = []

    def sample(self, classifier, x, y):
        self.drawn.append(torch.rand(()).item())
        return self._garbage(x)


def parts(rank: int, again: TIETrainer) -> dict:
    """What the processes do together, piece by piece."""
    found = {}
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[1.0, 2.0]]) * (rank + 1)
    average_gradients(layer)
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(rank)
    average_statistics(norm)
    device = torch.device("cpu")
    found |= {
        "gradient": layer.weight.grad[0],
        "statistics": norm.running_mean,
        "total": int(total(torch.tensor(rank + 1), device)),
    }
    found["gathered"] = gathered(torch.full((rank + 1, 2), float(rank)), device)
    torch.manual_seed(rank)
    boundary = ManifoldBoundary(make_small(), BoundarySettings(latent_size=3, vae_epochs=1))
    marginal = MarginalRepresentations(make_small(), MarginalSettings(vae_epochs=1))
    torch.manual_seed(rank)
    for name, synthesizer in (("boundary", boundary), ("marginal", marginal)):
        synthesizer.fit(None, lacking(rank), 0.0)
        found[name] = synthesizer.state_dict()
    seeds = Seeds(make_small())
    seeding = TIETrainer(make_small(), replace(TINY, epochs=2), [seeds], [])
    for _ in range(2):
        seeding.epoch(batches(rank))
    found["seeds"] = seeds.drawn
    # A last batch of one, and garbage in one of the processes alone.
    alone = TIETrainer(make_small(), replace(TINY, lam=1000.0), [], [])
    if rank:
        alone.pool.add(torch.rand(3, *SHAPE))
    last = [
        (x[: 8 - 7 * (i == 2)], y[: 8 - 7 * (i == 2)])
        for i, (x, y) in enumerate(batches(rank)[:3])
    ]
    losses = {"alone": alone.epoch(last).losses["classifier"]}
    headed = TIENet(Small(3), 3, SHAPE, head="multilayer")
    with patch(
        "tie_ext.training.fit_head.corrupt", lambda x, *_: x
    ):  # so that the head's mean is that of the images
        fitting = TIETrainer(headed, replace(TINY, epochs=1), [], [Noise(headed)])
        losses["head"] = fitting.epoch(batches(rank)).losses["head"]
    found["head"] = headed.state_dict()
    found["attached"] = attached(rank)
    for head in ("linear", "multilayer"):
        torch.manual_seed(0)
        net = TIENet(Small(3), 3, SHAPE, head=head)
        adversarial = replace(TINY, epochs=1, adversarial_steps=2)
        trainer = TIETrainer(net, adversarial, [], [Noise(net)])
        losses[head] = trainer.epoch(last).losses["classifier"]
        found[head] = net.state_dict()
    found["losses"] = losses
    uneven = batches(rank)[: 3 + rank]
    labels = [(x, torch.full_like(y, 7) if rank else y) for x, y in batches(rank)]
    for name, trainer, data in (
        ("uneven", fresh(), uneven),
        ("uneven after load", again, uneven),
        ("bad labels", fresh(), labels),
    ):
        with pytest.raises(ValueError, match="Expected") as error:
            trainer.epoch(data)
        found[name] = str(error.value)
    return found


def work(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    torch.manual_seed(rank)
    trainer, log = train(rank, EPOCHS)
    with torch.no_grad():
        u = torch.cat(
            [uncertainty(trainer.net.eval()(x, garbage=True).softmax(1)) for x, _ in batches(rank)]
        )
    [inversion] = trainer.synthesizers
    mine = {
        "net": trainer.net.state_dict(),
        "generator": inversion.generator.state_dict(),
        "log": log,
        "u": u,
        "pool": trainer.pool.state_dict(),
    }
    trainer.save(f"{folder}/training{rank}.safetensors")
    net = make_net()
    again = TIETrainer(net, trainer.config, [Inversion(net, InversionSettings(steps=4, width=4))])
    again.load(f"{folder}/training{rank}.safetensors")
    assert torch.equal(again.pool.state_dict()["images"], trainer.pool.state_dict()["images"])
    mine |= parts(rank, again)
    torch.save(mine, f"{folder}/{rank}")
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None, (
        "something still holds the process group, whose threads can abort Python at exit"
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [
        torch.load(folder / str(rank), weights_only=False) for rank in range(WORLD)
    ]  # our own, written a moment ago


ONE = ("net", "generator", "head", "boundary", "marginal", "linear", "multilayer")


@pytest.mark.parametrize("part", ONE)
def test_one_state_in_all_processes(two, part):
    a, b = (each[part] for each in two)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(*map(torch.as_tensor, (value, b[name]))), name
        assert torch.as_tensor(value).isfinite().all()


def test_one_loss_in_all_processes(two):
    assert two[0]["losses"] == two[1]["losses"]
    assert two[0]["losses"]["head"] > 0


def test_a_head_is_fitted_to_the_images_of_all(two):
    net = TIENet(Small(3), 3, SHAPE, head="multilayer")
    net.load_state_dict(two[0]["head"])
    with torch.no_grad():
        statistics = torch.cat([net.eval().statistics(x)[1] for x, _ in batches(None)])
    torch.testing.assert_close(net.garbage.mean, statistics.mean(0), rtol=1e-3, atol=1e-4)


def test_attach_and_combine_in_two_processes(two):
    a, b = (each["attached"] for each in two)
    assert a["net"].keys() == b["net"].keys()
    assert all(torch.equal(a["net"][name], b["net"][name]) for name in a["net"])
    assert torch.equal(a["scores"], b["scores"])
    assert len(a["scores"]) == 48  # half of the images, each scored by one process
    features, shares = a["net"]["train_features"], a["shares"]
    assert len(features.unique(dim=0)) == 96
    assert torch.equal(features.sort(0).values, shares.sort(0).values)
    assert a["net"]["train_labels"].bincount().tolist() == [32, 32, 32]


def test_tau_is_computed_over_all_processes(two):
    for each in two:
        assert each["log"][-1].tau == two[0]["log"][-1].tau
        torch.testing.assert_close(
            each["net"]["tau"].item(),
            exclusion_threshold(torch.cat([e["u"] for e in two]), 0.5),
            rtol=1e-5,
            atol=1e-7,
        )


def test_each_process_keeps_its_own_share_of_the_pool(two):
    a, b = (each["pool"] for each in two)
    assert len(a["images"]) <= 30
    assert len(b["images"]) <= 30
    assert not torch.equal(a["images"][:10], b["images"][:10])
    assert two[0]["log"][-1].pool == len(a["images"]) + len(b["images"])


def test_logs_of_processes_but_for_time(two):
    from dataclasses import asdict

    logs = [
        [
            {k: v for k, v in asdict(entry).items() if k not in ("seconds", "losses")}
            for entry in each["log"]
        ]
        for each in two
    ]
    assert logs[0] == logs[1]
    assert sum(logs[0][0]["proposed"]) == 12 * 4
    assert [entry.losses["classifier"] for entry in two[0]["log"]] == [
        entry.losses["classifier"] for entry in two[1]["log"]
    ]


def test_averages_totals_and_gathered_tensors(two):
    for each in two:
        assert torch.equal(each["gradient"], torch.tensor([1.5, 3.0]))
        assert torch.equal(each["statistics"], torch.tensor([0.5, 0.5, 0.5]))
        assert torch.equal(each["gathered"], torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
        assert each["total"] == 3


def test_means_are_those_of_all_images(two):
    """The mean codes of DMR are over the images of all processes, not over each one's own."""
    vae, x, y = (
        two[0]["marginal"],
        *(torch.cat(part) for part in zip(*lacking(0), *lacking(1), strict=True)),
    )
    synthesizer = MarginalRepresentations(make_small(), MarginalSettings(vae_epochs=1))
    synthesizer.load_state_dict(vae)
    with torch.no_grad():
        codes = synthesizer.codec.eval().encode(x, y)
    torch.testing.assert_close(
        synthesizer.mean,
        torch.stack([codes[y == c].mean(0) for c in range(3)]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_errors_of_one_process_in_all(two):
    assert "as many batches in every process" in two[0]["uneven"]
    assert len({each[name] for each in two for name in ("uneven", "uneven after load")}) == 1
    assert "got labels in [7, 7]" in two[1]["bad labels"]
    assert "an error in 1 of them" in two[0]["bad labels"]


def test_processes_and_epochs_draw_apart(two):
    drawn = [value for each in two for value in each["seeds"]]
    assert len(drawn) >= 4
    assert len(set(drawn)) == len(drawn)


def test_decisions_are_those_of_one_process(two):
    # BatchNorm sees shares of a batch, so the networks differ; their decisions do not.
    trainer, _ = train(None, EPOCHS)
    x, y = (torch.cat(part) for part in zip(*batches(None), strict=True))
    net = make_net()
    net.load_state_dict(two[0]["net"])
    for each in (trainer.net, net):
        decision = each.decide(x)
        assert torch.equal(decision.label, y)
        assert (decision.level != 1).all()
