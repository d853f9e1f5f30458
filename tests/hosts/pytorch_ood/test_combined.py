"""Combined: one forward pass, halves that share no image, the decision."""

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE, make_net
from pytorch_ood.api import ModelNotSetException, RequiresFittingException
from torch import nn

from hosts.pytorch_ood.conftest import (
    N,
    Plain,
    every_member,
    images,
    loader,
    three,
    trained,
    with_head,
)
from tie_ext import Combined, TIEDetector
from tie_ext.pytorch_ood import UncertaintyEstimate
from tie_ext.scores.combination import RULES, Weights, reference
from tie_ext.scores.decision import uncertainty
from tie_ext.scores.threshold import conformal_threshold, split

X = images()[0]


def stacked(detector: Combined, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([member(x).detach().float() for member in detector.detectors], 1)


# One network, run once.


@pytest.mark.parametrize("make", [lambda: trained().eval(), with_head], ids=["linear", "layers"])
def test_one_forward_pass_for_all_members(make):
    net, passes = make(), []
    members = every_member(net) if net.feature_size > 48 else three(net).detectors
    detector = Combined(members, 0.1).fit(loader(60))
    net.backbone.register_forward_hook(lambda *_: passes.append(1))
    for score in (detector.scores, detector, detector.decide):
        passes.clear()
        score(X)
        assert len(passes) == 1
    assert torch.equal(detector.scores(X), stacked(detector, X))


@pytest.mark.parametrize(("asks", "passes"), [(True, 1), (False, 2)])
def test_passes_of_a_network_that_is_no_tienet(asks, passes):
    net = Plain(asks).eval()
    members = [theirs.Mahalanobis(net.features), theirs.EnergyBased(net), UncertaintyEstimate(net)]
    members[0].fit(loader(60))
    detector = Combined(members, 0.1).fit(loader(60))
    net.passes.clear()
    scores = detector.scores(X)
    assert len(net.passes) == passes
    assert "features" not in vars(net)
    assert torch.equal(scores, stacked(detector, X))


def test_features_of_other_images_are_not_taken():
    class Normalising(Plain):
        def forward(self, x):
            return super().forward(2 * x - 1)

    net = Normalising().eval()
    gaussians = theirs.Mahalanobis(net.features).fit(loader())
    detector = Combined([gaussians, theirs.EnergyBased(net)], None).fit(loader())
    assert torch.equal(detector.scores(X)[:, 0], gaussians(X))


def test_members_that_read_something_else():
    net, other = trained().eval(), make_net().eval()
    other.fc.weight.data.neg_()
    own = theirs.RMD(lambda x: net.features(x)).fit(loader(60))
    members = [theirs.ODIN(net), theirs.EnergyBased(net), theirs.EnergyBased(other), own]
    detector = Combined(members, 0.1).fit(loader(60))
    torch.testing.assert_close(detector.scores(X), stacked(detector, X))
    alone = Combined([theirs.ODIN(net)], 0.1).fit(loader(60))
    assert torch.equal(alone.decide(X).label, net(X).argmax(1))


# Fit.


def test_scale_and_threshold_on_disjoint_halves(fitted):
    scores = fitted.scores(images(61)[0])
    scaling, calibrating = split(61, 0.1)
    assert (len(scaling), len(calibrating)) == (30, 31)
    assert sorted([*scaling.tolist(), *calibrating.tolist()]) == list(range(61))
    assert scaling.tolist() != sorted(scaling.tolist())  # a loader may have classes in order
    # Energy is the body; the others are distances, and there is no KNN to say how far to trust.
    weights = Weights(torch.tensor([0.0, 0, 1]), torch.tensor([1.0, 1, 0]))
    learned = reference(scores[scaling], weights)
    # Sums of batches of other sizes.
    torch.testing.assert_close(fitted.reference, learned, rtol=1e-4, atol=1e-4)
    rule, again = RULES["tail"], three().fit_scores(scores.double())
    want = conformal_threshold(rule(learned, scores[calibrating]), 0.1)
    for detector in (fitted, again):
        torch.testing.assert_close(detector.threshold, want)
        found = detector.predict_scores(fitted.scores(X))
        torch.testing.assert_close(found, rule(learned, fitted.scores(X)))
    assert torch.equal(fitted(X), fitted.predict_scores(fitted.scores(X)))


@pytest.mark.parametrize("own", [True, False])
def test_error_of_a_member_that_is_not_fitted(own):
    net = trained().eval()
    gaussians = theirs.Mahalanobis(net.features if own else lambda x: net.features(x))
    detector = Combined([gaussians, theirs.EnergyBased(net)], 0.1)
    message = "got Mahalanobis, which is not; fit it on training images first"
    with pytest.raises(RequiresFittingException, match=message):
        detector.fit(loader(80))
    gaussians.fit(loader(80))
    assert detector.fit(loader(80)).threshold.isfinite()


def test_recalibration_to_another_false_alarm_rate():
    detector, again = three().fit(loader(60)), three(false_alarm=0.3).fit(loader(60))
    assert detector.calibration_scores.shape == (30,)
    assert torch.equal(detector.recalibrate(0.3).threshold, again.threshold)
    assert detector.false_alarm == 0.3
    with pytest.raises(ValueError, match="at least 99 ID images"):
        detector.recalibrate(0.01)
    with pytest.raises(RequiresFittingException, match="calibration scores"):
        three().recalibrate(0.3)


def test_all_images_set_the_scale_without_a_rate():
    detector = three(false_alarm=None).fit(loader(24))
    assert len(detector.reference.ordered) == 24
    assert detector(X).isfinite().all()
    for use in (lambda: detector.decide(X), detector.export_module):
        with pytest.raises(RequiresFittingException, match="false_alarm"):
            use()


def test_another_rule_forgets_the_threshold():
    detector, found = three().fit(loader(60)), set()
    for rule in RULES:
        detector.set_hyperparameters(rule=rule)
        with pytest.raises(RequiresFittingException):
            detector.decide(X)
        assert torch.equal(detector(X), RULES[rule](detector.reference, detector.scores(X)))
        found.add(tuple(detector(X).tolist()))
    assert len(found) == len(RULES)
    with pytest.raises(ValueError, match="one of tail, "):
        detector.set_hyperparameters(rule="mean")


def test_devices_of_members_and_scale():
    detector = three().fit(loader(60)).to("meta")
    parts = [detector.threshold, detector.reference.mean, detector.detectors[1].mu]
    assert all(part.is_meta for part in (*parts, detector.network.fc.weight))


class Odd(UncertaintyEstimate):
    """Scores that a function gives."""

    score = staticmethod(lambda logits: logits)

    def predict_logits(self, logits):
        return self.score(logits)


def odd(score) -> Combined:
    member = Odd(make_net())
    member.score = score
    return Combined([member], 0.1).fit(loader(60))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda of: Combined([]), "at least one detector"),
        (lambda of: three(false_alarm=0), "false_alarm"),
        (lambda of: three(rule="mean"), "one of tail, "),
        (lambda of: three(false_alarm=0.05).fit(loader(36)), "at least 37 ID images .* got 36"),
        (lambda of: three(false_alarm=1.0).fit(loader(3)), "at least 4 ID images"),
        (lambda of: three(false_alarm=None).fit(loader(1)), "at least 2 ID images .* got 1"),
        (
            lambda of: Combined([theirs.EnergyBased(Plain().eval())]).fit([(X, images()[1] + N)]),
            r"labels in \[0, 3\)",
        ),
        (lambda of: of.predict(X * torch.nan), "NaN"),
        (lambda of: of.decide(X * 255), "value range"),
        (lambda of: of.predict_scores(torch.zeros(2, 4)), r"shape \(B, 3\), but got"),
        (lambda of: of.predict_scores(torch.full((2, 3), torch.nan)), "finite scores"),
        (lambda of: of.fit_scores(torch.zeros(60, 2)), r"shape \(B, 3\)"),
        (lambda of: odd(lambda logits: logits[:, 0] * 0 + 3), "differ between ID images"),
        (lambda of: odd(lambda logits: logits[:, 0] / 0), "finite scores from Odd"),
        (lambda of: odd(lambda logits: logits), r"one score per image from Odd.*\(7, 3\)"),
    ],
)
def test_errors_of_bad_input(make, message, fitted):
    with pytest.raises(ValueError, match=message):
        make(fitted)


@pytest.mark.parametrize("bad", [None, 3, [nn.Linear(1, 1)], "TIE"])
def test_error_of_other_things_than_detectors(bad):
    with pytest.raises(TypeError, match="Expected a list of pytorch-ood detectors, but got"):
        Combined(bad)


def test_errors_without_a_network_or_fit():
    nobody = Combined([TIEDetector(None), theirs.Mahalanobis(None)], 0.1)
    for use in (nobody.predict, nobody.decide, nobody.scores, lambda x: nobody.fit(loader())):
        with pytest.raises(ModelNotSetException):
            use(X)
    with pytest.raises(RequiresFittingException):
        nobody.predict_scores(torch.zeros(1, 2))
    with pytest.raises(RequiresFittingException):
        three().decide(X)


# The decision.


def test_levels_of_accepted_garbage_and_uncertain():
    x = torch.cat([images(200)[0], torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE)])
    detector = three()
    net = detector.network
    logits = net(x, garbage=True)
    # Half of all images.
    net.garbage.bias.data += logits[:, :-1].amax(1).median() - logits[:, -1].median()
    decision, logits = detector.fit(loader(60)).decide(x), net(x, garbage=True)
    rejected, garbage = detector(x) > detector.threshold, logits.argmax(1) == N
    assert torch.equal(decision.score, detector(x))
    assert torch.equal(decision.level, torch.where(rejected, 2 - garbage.int(), 0))
    assert set(decision.level.tolist()) == {0, 1, 2}
    assert (garbage & ~rejected).any()  # the score alone rejects
    assert torch.equal(decision.label, logits[:, :-1].argmax(1))
    torch.testing.assert_close(decision.uncertainty, uncertainty(logits.softmax(1)))


def test_levels_without_a_garbage_class():
    net, x = Plain().eval(), images(80)[0]
    net.fc.bias.data -= net(x).median(0).values  # so that each class is predicted
    assert len(net(x).argmax(1).unique()) == N
    members = [theirs.Mahalanobis(net.features).fit(loader(60)), theirs.EnergyBased(net)]
    detector = Combined(members, 0.2).fit(loader(60))
    decision = detector.decide(x)
    assert set(decision.level.tolist()) == {0, 2}
    assert torch.equal(decision.level == 2, detector(x) > detector.threshold)
    assert torch.equal(decision.label, net(x).argmax(1))
    torch.testing.assert_close(decision.uncertainty, uncertainty(net(x).softmax(1)))
