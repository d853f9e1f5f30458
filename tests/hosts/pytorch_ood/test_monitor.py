"""The monitor: its false alarms, over many streams at once, and what it says of a change."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_net
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores import monitor as m

pytest.importorskip("pytorch_ood")
from tie_ext.pytorch_ood import Monitor, TIEDetector
from tie_ext.pytorch_ood.monitor import rate_interval
from tie_ext.scores.decision import Decision

STREAMS, LENGTH = 2500, 200


def fitted(scores: np.ndarray, false_alarm: float = 0.05, labels=None, **promise) -> TIEDetector:
    given = torch.from_numpy(np.asarray(scores, dtype=np.float32))
    return TIEDetector(make_net()).recalibrate(false_alarm, given, labels, **promise)


def wealth(z: np.ndarray, held_out: int, rng: np.random.Generator) -> np.ndarray:
    """The martingale ``(S, T)`` of streams ``z (S, held_out + T)`` of scores."""
    z, capital, out = m.bins(z), 0, []
    for i in range(held_out, z.shape[1]):
        earlier, own = z[:, :i], z[:, i : i + 1]
        above, ties = (earlier > own).sum(1), (earlier == own).sum(1)
        gain = m.gains(m.p_value(above, ties, i, 1 - rng.random(len(z))))
        capital = m.bet(capital, i - held_out + 1, gain)
        out.append(capital.sum(1) + m.kept(i - held_out + 1))
    return np.stack(out, axis=1)


def few_values(z: np.ndarray) -> np.ndarray:
    return np.rint(z)


def heavy_tails(z: np.ndarray) -> np.ndarray:
    return np.sinh(3 * z)


@pytest.mark.parametrize(
    ("held_out", "shape"), [(40, few_values), (40, heavy_tails), (10, np.positive)]
)
def test_false_alarms_stay_below_their_bound(held_out, shape):
    rng = np.random.default_rng(held_out)
    z = rng.standard_normal((STREAMS, held_out + LENGTH))
    # Exchangeable, and not independent: each stream has a level and a width of its own.
    z = shape(z * rng.uniform(0.2, 3, (STREAMS, 1)) + rng.standard_normal((STREAMS, 1)))
    largest = wealth(z, held_out, rng).max(axis=1)
    for alarm in (0.05, 0.01):
        deviation = math.sqrt(alarm * (1 - alarm) / STREAMS)
        assert (largest >= 1 / alarm).mean() <= alarm + 3 * deviation
    assert (largest >= 20).mean() > 0.002  # the bets are not idle


def test_bets_are_fair():
    p = (np.arange(1_000_000) + 0.5) / 1_000_000
    assert m.gains(p).mean(axis=0) == pytest.approx(np.ones(m.BETS), abs=0.03)
    assert m.gains(p[1000:-1000]).min() >= 0
    half = m.BETS // 2
    assert (m.gains(0.01)[:half] > 1).all()  # a high score
    assert (m.gains(0.01)[half:] < 1).all()
    assert m.gains([0.3, 0.7])[0, :half] == pytest.approx(m.gains([0.3, 0.7])[1, half:])
    assert np.isfinite(m.gains([1.0, 1e-9])).all()


@pytest.mark.parametrize("t", [1, 2, 50])
def test_money_neither_grows_nor_shrinks_on_average(t):
    p = (np.arange(1_000_000) + 0.5) / 1_000_000
    capital = np.linspace(0.1, 2, m.BETS)
    after = m.bet(capital, t, m.gains(p)).sum(axis=1).mean() + m.kept(t)
    assert after == pytest.approx(capital.sum() + m.kept(t - 1), rel=0.01)
    assert m.kept(0) == 1


def test_p_values_of_exchangeable_scores_are_uniform_and_independent():
    # All orders of four scores, of which two are equal: each p-value is uniform given the others.
    from itertools import permutations

    found = []
    u = (np.arange(50) + 0.5) / 50
    for order in permutations([1.0, 2.0, 2.0, 3.0]):
        z = np.array(order)
        third, last = (
            m.p_value((z[:i] > z[i]).sum(), (z[:i] == z[i]).sum(), i, u) for i in (2, 3)
        )
        found.append(np.stack(np.meshgrid(third, last), -1).reshape(-1, 2))
    p = np.concatenate(found)
    edges = np.linspace(0, 1, 4), np.linspace(0, 1, 5)
    counts = np.histogram2d(*p.T, bins=edges)[0]
    assert counts == pytest.approx(np.full((3, 4), len(p) / 12), rel=0.05)


@given(st.lists(st.floats(-1e38, 1e38), min_size=2, max_size=2))
def test_bins_keep_the_order_of_scores(pair):
    low, high = m.bins(sorted(pair))
    assert -m.LIMIT <= low <= high <= m.LIMIT


@pytest.mark.parametrize(("shift", "direction"), [(3.0, "higher"), (-3.0, "lower")])
def test_a_change_is_found_dated_and_has_a_direction(shift, direction):
    rng = np.random.default_rng(0)
    monitor = Monitor(fitted(rng.standard_normal(200)))
    assert monitor.update(torch.from_numpy(rng.standard_normal(500))).alarm is None
    drift = monitor.update(torch.from_numpy(rng.standard_normal(100) + shift))
    assert 500 < drift.alarm < 530
    assert 490 < drift.since <= 505
    assert drift.direction == direction
    later = monitor.update(torch.from_numpy(rng.standard_normal(500)))
    assert later[2:5] == drift[2:5]  # an alarm stays as it was


def test_one_by_one_or_many_across_files(tmp_path):
    rng = np.random.default_rng(1)
    detector, z = fitted(rng.standard_normal(60)), torch.from_numpy(rng.standard_normal(130))
    whole, path = Monitor(detector, 0.01), tmp_path / "state.json"
    whole.update(z)
    single = Monitor(detector, 0.01)
    single.save(path)
    for part in (*z[:10], *z[10:].split(40)):
        single = Monitor.load(path, detector)
        single.update(part)
        single.save(path)
    assert single.drift == whole.drift
    assert json.loads(path.read_text())["images"] == 130
    # It agrees with the formulas over many streams.
    held = detector.calibration_scores.double().numpy()
    u = 1 - np.random.Generator(np.random.PCG64(0)).random(130)

    class Given:
        def random(self, count):
            return 1 - u[i.pop(0)]

    i = list(range(130))
    expected = wealth(np.concatenate([held, z.numpy()])[None], 60, Given())
    assert whole.evidence == pytest.approx(max(1, expected.max()))


def test_the_state_is_flat(tmp_path):
    rng, sizes = np.random.default_rng(0), []
    monitor = Monitor(fitted(rng.standard_normal(100)))
    for _ in range(2):
        monitor.update(torch.from_numpy(rng.standard_normal(3000).clip(-1, 1)))
        monitor.save(tmp_path / "state.json")
        sizes.append((tmp_path / "state.json").stat().st_size)
    assert sizes[1] < 1.05 * sizes[0]


def test_rejections_are_counted_as_the_detector_decides():
    scores = np.arange(99) / 100
    monitor = Monitor(fitted(scores))
    drift = monitor.update(torch.tensor([0.5] * 180 + [2.0] * 120))
    assert (drift.rejected, drift.interval) == (120, rate_interval(120, 200))
    labels = torch.arange(99) % 2
    each = Monitor(fitted(scores, labels=labels, per_class=True))
    with pytest.raises(ValueError, match="a threshold for each class, but got scores"):
        each.update(torch.tensor([2.0]))
    level = torch.tensor([0, 1, 2])
    assert each.update(Decision(level, level, level.double(), level)).rejected == 2


@pytest.mark.parametrize(("count", "of"), [(0, 20), (3, 20), (20, 20), (0, 0)])
def test_the_interval_is_clopper_and_pearsons(count, of):
    stats = pytest.importorskip("scipy.stats")
    if of:
        found = stats.binomtest(count, of).proportion_ci(method="exact")
        assert rate_interval(count, of) == pytest.approx((found.low, found.high))
    else:
        assert rate_interval(0, 0) == (0, 1)


def test_what_a_monitor_refuses(tmp_path):
    detector, path = fitted(np.arange(40.0)), tmp_path / "state.json"
    monitor = Monitor(detector)
    monitor.save(path)
    with pytest.raises(ValueError, match="of another, or from before it was calibrated"):
        Monitor.load(path, fitted(np.arange(40.0) / 2))
    with pytest.raises(ValueError, match="tie-ext calibrate"):
        Monitor(TIEDetector(make_net()))
    with pytest.raises(ValueError, match="1 NaN or infinite"):
        monitor.update(torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"scores of shape \(N,\)"):
        monitor.update(torch.arange(3))
    with pytest.raises(ValueError, match="Expected alarm"):
        Monitor(detector, 0)
    for damage in ({"bins": {"0": 41}}, {"capital": [1]}, {"version": 2}, {"evidence": "x"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
        with pytest.raises(ValueError, match="Expected the state of a monitor"):
            Monitor.load(path, detector)
        monitor.save(path)
