"""The monitor: its false alarms, over many streams at once, and what it says of a change."""

import json
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from conftest import make_net, refused
from hypothesis import given
from hypothesis import strategies as st

from tie_ext.scores import monitor as m

pytest.importorskip("pytorch_ood")
from tie_ext.pytorch_ood import Monitor, TIEDetector
from tie_ext.pytorch_ood.monitor import rate_interval
from tie_ext.scores.decision import Decision

STREAMS, LENGTH = 2500, 200
EVEN = (np.arange(1_000_000) + 0.5) / 1_000_000
"""p-values of every size."""


def fitted(scores, labels=None, **promise) -> TIEDetector:
    given = torch.from_numpy(np.asarray(scores, dtype=np.float32))
    return TIEDetector(make_net()).recalibrate(0.05, given, labels, **promise)


def wealth(z: np.ndarray, held_out: int, u) -> np.ndarray:
    """The martingale ``(S, T)`` of streams ``z (S, held_out + T)`` of scores; ``u(i)`` breaks the
    ties of the i-th.
    """
    z, capital, out = m.bins(z), 0, []
    for t, i in enumerate(range(held_out, z.shape[1]), 1):
        earlier, own = z[:, :i], z[:, i : i + 1]
        above, ties = (earlier > own).sum(1), (earlier == own).sum(1)
        capital = m.bet(capital, t, m.gains(m.p_value(above, ties, i, u(t - 1))))
        out.append(capital.sum(1) + m.kept(t))
    return np.stack(out, axis=1)


@pytest.mark.parametrize(
    ("held_out", "shape"),
    [(40, np.rint), (40, lambda z: np.sinh(3 * z)), (10, np.positive)],
    ids=["few values", "heavy tails", "few images"],
)
def test_false_alarms_of_exchangeable_streams(held_out, shape):
    rng = np.random.default_rng(held_out)
    z = rng.standard_normal((STREAMS, held_out + LENGTH))
    # Exchangeable, and not independent: each stream has a level and a width of its own.
    z = shape(z * rng.uniform(0.2, 3, (STREAMS, 1)) + rng.standard_normal((STREAMS, 1)))
    largest = wealth(z, held_out, lambda i: 1 - rng.random(STREAMS)).max(axis=1)
    for alarm in (0.05, 0.01):
        deviation = math.sqrt(alarm * (1 - alarm) / STREAMS)
        assert (largest >= 1 / alarm).mean() <= alarm + 3 * deviation
    assert (largest >= 20).mean() > 0.002  # the bets are not idle


def test_fairness_and_direction_of_the_bets():
    assert m.gains(EVEN).mean(axis=0) == pytest.approx(np.ones(m.BETS), abs=0.03)
    assert m.gains(EVEN[1000:-1000]).min() >= 0
    half = m.BETS // 2
    assert (m.gains(0.01)[:half] > 1).all()  # a high score
    assert (m.gains(0.01)[half:] < 1).all()
    assert m.gains([0.3, 0.7])[0, :half] == pytest.approx(m.gains([0.3, 0.7])[1, half:])
    assert np.isfinite(m.gains([1.0, 1e-9])).all()


@pytest.mark.parametrize("t", [1, 2, 50])
def test_money_on_average_after_an_input(t):
    capital = np.linspace(0.1, 2, m.BETS)
    after = m.bet(capital, t, m.gains(EVEN)).sum(axis=1).mean() + m.kept(t)
    assert after == pytest.approx(capital.sum() + m.kept(t - 1), rel=0.01)
    assert m.kept(0) == 1


def test_uniform_p_values_of_exchangeable_scores():
    # All orders of four scores, of which two are equal: each p-value is uniform given the others.
    found, u = [], (np.arange(50) + 0.5) / 50
    for order in permutations([1.0, 2.0, 2.0, 3.0]):
        z = np.array(order)
        pair = [m.p_value((z[:i] > z[i]).sum(), (z[:i] == z[i]).sum(), i, u) for i in (2, 3)]
        found.append(np.stack(np.meshgrid(*pair), -1).reshape(-1, 2))
    p = np.concatenate(found)
    counts = np.histogram2d(*p.T, bins=(np.linspace(0, 1, 4), np.linspace(0, 1, 5)))[0]
    assert counts == pytest.approx(np.full((3, 4), len(p) / 12), rel=0.05)


@given(st.lists(st.floats(-1e38, 1e38), min_size=2, max_size=2))
def test_order_of_scores_in_their_bins(pair):
    low, high = m.bins(sorted(pair))
    assert -m.LIMIT <= low <= high <= m.LIMIT


@pytest.mark.parametrize(("shift", "direction"), [(3.0, "higher"), (-3.0, "lower")])
def test_time_and_direction_of_a_change(shift, direction):
    rng = np.random.default_rng(0)
    monitor = Monitor(fitted(rng.standard_normal(200)))
    before, during, after = (torch.from_numpy(rng.standard_normal(n)) for n in (500, 100, 500))
    assert monitor.update(before).alarm is None
    drift = monitor.update(during + shift)
    assert 500 < drift.alarm < 530
    assert 490 < drift.since <= 505
    assert drift.direction == direction
    assert monitor.update(after)[2:5] == drift[2:5]  # an alarm stays as it was


def test_one_by_one_or_many_across_files(tmp_path):
    rng = np.random.default_rng(1)
    detector, z = fitted(rng.standard_normal(60)), torch.from_numpy(rng.standard_normal(130))
    whole, path = Monitor(detector, 0.01), tmp_path / "state.json"
    whole.update(z)
    Monitor(detector, 0.01).save(path)
    for part in (*z[:10], *z[10:].split(40)):
        single = Monitor.load(path, detector)
        single.update(part)
        single.save(path)
    assert single.drift == whole.drift
    state = json.loads(path.read_text())
    assert (state["images"], len(path.read_text()) < 10_000) == (130, True)
    # It agrees with the formulas over many streams.
    held = detector.calibration_scores.double().numpy()
    u = np.random.Generator(np.random.PCG64(0)).random(130)
    expected = wealth(np.concatenate([held, z.numpy()])[None], 60, lambda i: u[i])
    assert whole.evidence == pytest.approx(max(1, expected.max()))


def test_rejections_as_the_detector_decides():
    scores = np.arange(99) / 100
    drift = Monitor(fitted(scores)).update(torch.tensor([0.5] * 180 + [2.0] * 120))
    assert (drift.rejected, drift.interval) == (120, rate_interval(120, 200))
    each = Monitor(fitted(scores, torch.arange(99) % 2, per_class=True))
    with refused("a threshold for each class, but got scores"):
        each.update(torch.tensor([2.0]))
    level = torch.tensor([0, 1, 2])
    assert each.update(Decision(level, level, level.double(), level)).rejected == 2


@pytest.mark.parametrize(("count", "of"), [(0, 20), (3, 20), (20, 20)])
def test_interval_of_clopper_and_pearson(count, of):
    stats = pytest.importorskip("scipy.stats")
    found = stats.binomtest(count, of).proportion_ci(method="exact")
    assert rate_interval(count, of) == pytest.approx((found.low, found.high))
    assert rate_interval(0, 0) == (0, 1)


def test_states_and_scores_that_are_refused(tmp_path):
    detector, path = fitted(np.arange(40.0)), tmp_path / "state.json"
    monitor = Monitor(detector)
    monitor.save(path)
    for message, act in (
        ("of another, or from before", lambda: Monitor.load(path, fitted(np.arange(40.0) / 2))),
        ("tie-ext calibrate", lambda: Monitor(TIEDetector(make_net()))),
        ("1 NaN or infinite", lambda: monitor.update(torch.tensor([math.nan]))),
        (r"scores of shape \(N,\)", lambda: monitor.update(torch.arange(3))),
        ("Expected alarm", lambda: Monitor(detector, 0)),
    ):
        with refused(message):
            act()
    state = json.loads(path.read_text())
    for damage in ({"bins": {"0": 41}}, {"capital": [1]}, {"version": 2}, {"evidence": "x"}):
        path.write_text(json.dumps(state | damage))
        with refused("Expected the state of a monitor"):
            Monitor.load(path, detector)
