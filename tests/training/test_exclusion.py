"""Which candidates join the pool, and what is logged of them."""

import pytest
import torch
from conftest import SHAPE, make_batches, make_net

from tie_ext.outliers import Candidates, Synthesizer
from tie_ext.scores.decision import uncertainty
from tie_ext.training.config import TIEConfig
from tie_ext.training.exclusion import exclude
from tie_ext.training.pool import GarbagePool


class Fixed(Synthesizer):
    """Proposes given images, one after the other, and records the batches it is given."""

    def __init__(self, net, images):
        super().__init__(net)
        self.images, self.asked, self.given = images, [], 0

    def sample(self, classifier, x, y):
        first, self.given = self.given, self.given + len(x)
        self.asked.append((x, y))
        aims = torch.arange(first, self.given) % (self.num_classes + 1)
        return Candidates(self.images[first : self.given], aims)


@pytest.fixture(scope="module")
@torch.no_grad()
def net():
    """A network that is sure of some images and not of others, and takes some for garbage."""
    found = make_net().eval()
    found.fc.weight.mul_(20)
    logits = found(make_batches()[0][0], garbage=True)
    found.garbage.bias += (logits[:, :3].amax(1) - logits[:, 3]).median()
    return found


def run(net, lam, count=240, sample=None):
    x = torch.rand(count, *SHAPE) * torch.rand(count, 1, 1, 1)
    proposals, pool = Fixed(net, x), GarbagePool(300, SHAPE)
    sample = make_batches(sizes=(12, 7)) if sample is None else sample
    found = exclude(
        net, sample, [proposals], pool, TIEConfig(lam=lam), count, lambda batches, name: batches
    )
    return proposals, pool, sample, found


@torch.no_grad()
def probabilities(net, x):
    return net(x, garbage=True).softmax(1)


@pytest.mark.parametrize("lam", [-1.0, 0.0, 0.5])
def test_tau_and_the_candidates_above_it(net, lam):
    proposals, pool, sample, found = run(net, lam)
    x, y = map(torch.cat, zip(*sample, strict=True))
    p, inside = probabilities(net, proposals.images), probabilities(net, x)
    u = uncertainty(inside).double()
    tau = (u.mean() + lam * u.std(correction=0)).item()
    assert [found["tau"], net.tau.item()] == pytest.approx([tau, tau], rel=1e-5)
    assert found["accuracy"] == pytest.approx((inside.argmax(1) == y).float().mean().item())
    out = uncertainty(p) > found["tau"]
    assert 0 < out.sum() < 240, "the test wants some of both"
    aim = torch.arange(240) % 4
    assert found["proposed"] == [60] * 4
    assert found["excluded"] == aim[out].bincount(minlength=4).tolist()
    expelled = (proposals.images[out] * 255).round().byte()
    assert torch.equal(pool.state_dict()["images"], expelled)


def test_answers_to_candidates_by_output(net):
    proposals, _, _, found = run(net, 0.5, 40)
    p, aim = probabilities(net, proposals.images), torch.arange(40) % 4
    for c in range(4):
        of, top = p[aim == c], p[aim == c].topk(2, dim=1).values
        expected = {
            "agreement": (of.argmax(1) == c).float(),
            "entropy": -(of * of.log()).sum(1),
            "confidence": top[:, 0],
            "margin": top[:, 0] - top[:, 1],
            "uncertainty": uncertainty(of),
        }
        for name, values in expected.items():
            assert found[name][c] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("sizes", "asked"), [((8, 5), [8, 5, 8, 5, 6]), ((31,), [31, 1])])
def test_batches_that_candidates_are_proposed_from(net, sizes, asked):
    proposals, *_ = run(net, 0.0, 32, make_batches(sizes=sizes))
    assert [len(x) for x, _ in proposals.asked] == asked
    for i, (x, y) in enumerate(proposals.asked):
        images, labels = make_batches(sizes=sizes)[i % len(sizes)]
        assert torch.equal(x, images[: len(x)])
        assert torch.equal(y, labels[: len(y)])


def test_all_excluded_by_a_lambda_of_minus_infinity(net):
    _, pool, _, found = run(net, -float("inf"), 16)
    assert (found["tau"], net.tau, len(pool)) == (None, 1, 16)
