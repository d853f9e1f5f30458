"""Two processes (gloo, CPU) train as one: same networks, generators and tau in both, and results close to a single process's."""

import os
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import SHAPE, TINY, make_net

from tie_ext import Inversion, InversionSettings, TIETrainer, uncertainty
from tie_ext.exclusion import cutoff

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
WORLD = 2


def batches(rank: int | None, size: int = 8) -> list:
    """Three easy classes; each process gets every other image, a single one gets all."""
    rng = torch.Generator().manual_seed(2)
    y = torch.arange(96) % 3
    x = torch.rand(96, *SHAPE, generator=rng) * 0.2
    for i, label in enumerate(y.tolist()):
        x[i, :, 9 * label : 9 * label + 9] += 0.7
    if rank is not None:
        x, y = x[rank::WORLD], y[rank::WORLD]
    size = size if rank is not None else size * WORLD
    return list(zip(x.split(size), y.split(size), strict=True))


def train(rank: int | None, epochs: int = 3):
    from dataclasses import replace

    net = make_net()
    config = replace(TINY, epochs=epochs, pool_size=60, candidates_per_class=12)
    trainer = TIETrainer(net, config, [Inversion(net, InversionSettings(steps=4, width=4))])
    return trainer, [trainer.epoch(batches(rank)) for _ in range(epochs)]


def work(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)
    trainer, log = train(rank)
    with torch.no_grad():
        u = torch.cat([uncertainty(trainer.net.eval()(x, garbage=True).softmax(1)) for x, _ in batches(rank)])
    [inversion] = trainer.synthesizers
    mine = {"net": trainer.net.state_dict(), "generator": inversion.generator.state_dict(), "log": log, "u": u, "pool": trainer.pool.state_dict()}
    torch.save(mine, f"{folder}/{rank}")
    trainer.save(f"{folder}/training{rank}.safetensors")
    net = make_net()
    again = TIETrainer(net, trainer.config, [Inversion(net, InversionSettings(steps=4, width=4))])
    again.load(f"{folder}/training{rank}.safetensors")
    assert torch.equal(again.pool.state_dict()["images"], trainer.pool.state_dict()["images"])
    with pytest.raises(ValueError, match="as many batches in every process"):
        TIETrainer(make_net(), trainer.config).epoch(batches(rank)[: 3 + rank])
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    assert group() is None, "something still holds the process group: its threads live on and can abort the process at exit"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(WORLD)]  # our own, written a moment ago


def test_network_and_generator_are_the_same_in_all_processes(two):
    for part in ("net", "generator"):
        a, b = (each[part] for each in two)
        assert all(torch.equal(a[name], b[name]) for name in a), part


def test_tau_is_computed_over_all_processes(two):
    for each in two:
        assert each["log"][-1].tau == two[0]["log"][-1].tau
        torch.testing.assert_close(each["net"]["tau"].item(), cutoff(torch.cat([e["u"] for e in two]), 0.5), rtol=1e-5, atol=1e-7)


def test_each_process_keeps_its_own_share_of_the_pool(two):
    a, b = (each["pool"] for each in two)
    assert len(a["images"]) <= 30
    assert len(b["images"]) <= 30
    assert not torch.equal(a["images"][:10], b["images"][:10])
    assert two[0]["log"][-1].pool == len(a["images"]) + len(b["images"])


def test_logs_agree_but_for_time(two):
    from dataclasses import asdict

    logs = [[{k: v for k, v in asdict(entry).items() if k not in ("seconds", "losses")} for entry in each["log"]] for each in two]
    assert logs[0] == logs[1]
    assert sum(logs[0][0]["proposed"]) == 12 * 4
    assert [entry.losses["classifier"] for entry in two[0]["log"]] == [entry.losses["classifier"] for entry in two[1]["log"]]


def test_the_result_is_close_to_one_processs(two):
    # Shares of a batch see their own BatchNorm statistics and garbage, so equal only within this tolerance.
    trainer, log = train(None)
    for one, many in zip(log, two[0]["log"], strict=True):
        assert many.losses["classifier"] == pytest.approx(one.losses["classifier"], rel=0.25)
        assert many.tau == pytest.approx(one.tau, abs=0.15)
    assert many.accuracy == pytest.approx(one.accuracy, abs=0.1)
    x = torch.cat([x for x, _ in batches(None)])
    net = make_net()
    net.load_state_dict(two[0]["net"])
    with torch.no_grad():
        ours, theirs = (n.eval()(x, garbage=True).argmax(1) for n in (trainer.net, net))
    assert (ours == theirs).float().mean() > 0.9
