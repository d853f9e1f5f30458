"""ASCOOD: its outliers, its criterion and its features."""

import warnings

import pytest
import torch
from conftest import SHAPE, close, make_small, stripes
from torch.nn import functional as F

from tie_ext import TIENet
from tie_ext.models.backbones import Conv3
from tie_ext.outliers.saliency import Standardized, push, saliency, shuffle, uniform_criterion


@pytest.fixture(scope="module")
def openood(openood_root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openood.networks import ascood_net, lenet
        from openood.trainers import ascood_trainer
    return ascood_net.ASCOODNet, lenet.LeNet, ascood_trainer.ASCOODTrainer


def test_gradient_of_the_true_classs_logit():
    net, x, y = make_small().eval(), torch.rand(4, *SHAPE), torch.arange(4) % 3
    G = saliency(net, x, y)
    step = 1e-2 * F.normalize(G.flatten(1), dim=1).view_as(G)
    with torch.no_grad():
        rise = (net(x + step) - net(x - step)).gather(1, y[:, None]).squeeze(1) / 2e-2
    close(rise, G.flatten(1).norm(dim=1), rtol=0.05, atol=1e-3)


def test_values_that_are_pushed_and_pixels_shuffled():
    x, G = torch.rand(3, 3, 8, 8), torch.randn(3, 3, 8, 8)
    moved = push(x, G, 10.0, 0.1) != x
    assert (moved.flatten(1).sum(1) == int(0.1 * 192)).all()
    assert G.abs()[moved].min() >= G.abs()[~moved].quantile(0.85)
    out = shuffle(x, G, 0.25)
    assert ((out != x).any(1).flatten(1).sum(1) <= 16).all()
    # The same pixels, elsewhere.
    assert torch.equal(out.flatten(2).sort(2).values, x.flatten(2).sort(2).values)


def test_outliers_as_in_openoods_trainer(openood):
    *_, trainer = openood
    theirs = trainer.__new__(trainer)
    theirs.p_inv, theirs.alpha, theirs.net = 0.1, 10.0, make_small().eval()
    x, G = torch.rand(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    close(push(x, G, 10.0, 0.1), theirs.gradient_ood(x, G))
    torch.manual_seed(1)
    ours = shuffle(x, G, 0.1)
    torch.manual_seed(1)
    close(ours, theirs.shuffle_ood(x, G))
    x, y = stripes(4)
    close(saliency(theirs.net, x, y), theirs.get_grad(x.clone(), y))


def test_uniform_criterion_by_its_formula():
    logits, weights = torch.randn(5, 4), torch.tensor([1.0, 2.0, 3.0, 0.5])
    y = torch.tensor([0, 3, 1, 3, 2])
    ids, out = logits[[0, 2, 4]], logits[[1, 3]]
    expected = F.cross_entropy(ids, torch.tensor([0, 1, 2]), weights)
    close(uniform_criterion(logits[[0, 2, 4]], y[[0, 2, 4]], weights), expected)
    expected = expected - 0.5 * out.log_softmax(1).mean()
    close(uniform_criterion(logits, y, weights), expected)


def test_mean_and_norm_of_standardized_features():
    net = TIENet(Standardized(Conv3(1, 10), sigma=0.5), 10, SHAPE).eval()
    logits, h = net.outputs(torch.rand(4, *SHAPE))
    assert logits.shape == (4, 11)
    close(h.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    norm = torch.full((4,), 0.5 * (128 - 1) ** 0.5)  # of proposition 2
    close(h.norm(dim=1), norm, rtol=1e-4, atol=0)


def test_standardized_features_as_in_openood(openood):
    network, lenet, _ = openood
    theirs = network(lenet(10)).eval()
    theirs.set_params(0.5)
    ours = TIENet(Standardized(theirs.backbone, sigma=0.5), 10).eval()
    x = torch.rand(3, 3, 28, 28)
    close(ours(x), theirs(x))
