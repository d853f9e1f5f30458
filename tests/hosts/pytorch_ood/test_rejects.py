"""How rejected images are grouped, and what a group is called."""

import pytest
import torch
from conftest import SHAPE, close

pytest.importorskip("sklearn")
pytest.importorskip("pytorch_ood")
from tie_ext import TIEDetector, TIENet
from tie_ext.models.backbones import Conv3
from tie_ext.pytorch_ood.rejects import (
    clusters,
    components,
    kind_of,
    layer_distances,
    layer_names,
    rejects,
)


@pytest.mark.parametrize("sizes", [(40,), (30, 20), (30, 20, 25, 10)])
def test_number_and_order_of_the_groups(sizes):
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    truth = truth[torch.randperm(len(truth))]
    points = 12 * torch.eye(30)[truth] + torch.randn(len(truth), 30)
    found = clusters(points)
    assert [len(rows) for rows in found] == sorted(sizes, reverse=True)
    for rows in found:
        assert len(set(truth[rows].tolist())) == 1
        away = (points[rows] - points[rows].mean(0)).norm(dim=1)
        assert (away.diff() >= 0).all()  # the most typical first


def test_equal_weight_of_features_and_statistics():
    h, s = torch.randn(50, 4), torch.randn(50, 400)
    z = components(h, s)
    assert z.square().sum(1).mean() <= 1 + 1e-6
    close(components(1000 * h, s), z)
    assert components(h, torch.ones(50, 9)).isfinite().all()  # what never varies says nothing
    assert components(h[:1], s[:1]).isfinite().all()


@pytest.mark.parametrize(
    ("garbage", "distances", "kind"),
    [
        (0.9, [3, 3, 3], "far"),
        (0.1, [1.2, 0.8, 0.9, 0.7], "preprocessing"),
        (0.1, [0.9, 0.8, 0.9, 0.7], "near"),
        (0.1, [1.2, 1.0, 1.3, 0.7], "near"),
        (0.1, [1.2], "near"),
    ],
)
def test_word_for_a_group_of_rejected_images(garbage, distances, kind):
    assert kind_of(garbage, distances) == kind


@pytest.fixture
def net():
    return TIENet(Conv3(1, 3), 3, SHAPE, head="multilayer").eval()


@torch.no_grad()
def test_distance_of_each_layer_by_itself(net):
    s = net.statistics(torch.rand(40, *SHAPE))[1]
    net.garbage.standardise(s)
    squares = layer_distances(net, s).square().mean(0)
    assert squares.max() <= 1.001
    assert squares[:3].min() > 0.9
    last = s.clone()
    last[:, : net.feature_size] += 10 * net.garbage.deviation[: net.feature_size]
    assert layer_names(net)[-1] == "features"
    more = layer_distances(net, last) / layer_distances(net, s)
    assert more.median(0).values.argmax() == 3
    close(more[:, :3], torch.ones(40, 3))


@torch.no_grad()
def test_each_rejected_image_in_one_group(net):
    x = torch.rand(60, *SHAPE)
    x[30:] *= 0.2
    net.garbage.standardise(net.statistics(x)[1])
    scores = TIEDetector(net).predict(x)
    detector = TIEDetector(net).recalibrate(0.5, scores)
    found = rejects(detector, [(x[:25], -torch.ones(25).long()), (x[25:], torch.zeros(35).long())])
    rows = torch.cat([*(group.rows for group in found.groups), found.others])
    above = (scores > detector.threshold).nonzero().flatten()
    assert sorted(rows.tolist()) == above.tolist()
    assert (found.images, found.rejected) == (60, len(above))
    none = rejects(detector.recalibrate(0.5, scores + 1e3), [x])
    assert (none.rejected, none.groups, len(none.others)) == (0, (), 0)
    with pytest.raises(TypeError, match="Expected a detector on a TIENet"):
        rejects(TIEDetector(None), [x])
