"""Combined: one forward pass, halves that share no image, the guarantee, files and export; and
Mahalanobis++ beside pytorch-ood's Mahalanobis.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, TINY, Small, make_net
from test_combination import draw
from test_pytorch_ood import N, TwoSets, drop, edit, images, loader, trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tie_ext import TIENet, TIETrainer, attach
from tie_ext.models.backbones import Conv3, Conv5
from tie_ext.outliers import Noise
from tie_ext.scores.combination import RULES, reference
from tie_ext.scores.decision import uncertainty
from tie_ext.scores.knn import knn_labels, knn_score, pairwise_distances
from tie_ext.scores.mahalanobis import fit_gaussians
from tie_ext.scores.threshold import conformal_threshold, split
from tie_ext.training.config import HeadConfig

pytest.importorskip("pytorch_ood")
import pytorch_ood.detector as theirs
from pytorch_ood.api import LogitsDetector, ModelNotSetException, RequiresFittingException

from tie_ext import Combined, TIEDetector, combine
from tie_ext.pytorch_ood import (
    BoundaryDistance,
    MahalanobisPlusPlus,
    SampledKNN,
    UncertaintyEstimate,
    load_detector,
)
from tie_ext.pytorch_ood.members import MEMBERS, Outputs
from tie_ext.pytorch_ood.recommended import Sample, chosen_members, fit_chosen

rules = pytest.mark.parametrize("rule", list(RULES))


class Plain(nn.Module):
    """A network as pytorch-ood's are: ``forward`` is a layer on ``features``, or where it is not,
    says nothing of them.
    """

    def __init__(self, asks: bool = True):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, 6), nn.Dropout())
        self.fc, self.asks = nn.Linear(6, N), asks
        self.passes: list[int] = []  # images of each

    def features(self, x):
        self.passes.append(len(x))
        return self.body(x).relu()

    def forward(self, x):
        if self.asks:
            return self.fc(self.features(x))
        self.passes.append(len(x))
        return self.fc(self.body(x).relu())


def every_member(net: TIENet) -> list:
    """One of each kind that can be saved, fitted."""
    made = {
        theirs.GEN: lambda: theirs.GEN(net, gamma=0.2, M=2),
        theirs.EnergyBased: lambda: theirs.EnergyBased(net, t=2.0),
        theirs.MaxSoftmax: lambda: theirs.MaxSoftmax(net, t=3.0),
        theirs.ViM: lambda: theirs.ViM(net.features, 4, net.fc.weight, net.fc.bias),
        theirs.KNN: lambda: theirs.KNN(net.features, k=3),
        BoundaryDistance: lambda: BoundaryDistance(net.features, net.fc.weight, net.fc.bias),
        SampledKNN: lambda: SampledKNN(net.features, k=3, max_samples=10),
        TIEDetector: lambda: TIEDetector(net, t=0.5),
    }
    members = [
        made[cls]()
        if cls in made
        else cls(net if issubclass(cls, LogitsDetector) else net.features)
        for cls in MEMBERS
    ]
    return [m.fit(loader(80, seed=7)) if m.requires_fit else m for m in members]


def three(net: TIENet | None = None, **settings) -> Combined:
    net = trained().eval() if net is None else net
    members = [
        TIEDetector(net),
        MahalanobisPlusPlus(net.features).fit(loader(60, seed=1)),
        theirs.EnergyBased(net),
    ]
    return Combined(members, **{"false_alarm": 0.1, **settings})


# The members that are recommended.


def trusts(net: TIENet, training, held) -> bool:
    """Whether the nearest neighbours are right about as often as the network, on the images that
    set the scale.
    """
    (z, y), (x, labels) = [
        (torch.cat([a for a, _ in of]), torch.cat([b for _, b in of])) for of in (training, held)
    ]
    unit, rows = torch.nn.functional.normalize, split(len(x), 0.1)[0]
    distances = torch.cdist(unit(net.features(x)), unit(net.features(z)))
    votes = y[distances.argsort(1)[:, :5]].mode(1).values
    right = [(of == labels)[rows].sum() for of in (votes, net(x).argmax(1))]
    return bool(right[0] >= 0.95 * right[1] > 0)


@rules
@pytest.mark.parametrize("seed", [2, 3, 4, 5])
def test_combine_is_body_and_tails_of_scores_of_the_hosts(rule, seed):
    net = trained().eval()
    training, held, x = loader(300, seed=1), loader(40, seed=seed), images()[0]
    found = combine(
        net, train_loader=training, calibration_loader=held, false_alarm=0.1, rule=rule
    )
    plus = MahalanobisPlusPlus(net.features).fit(training)
    fdbd = theirs.fDBD(net.features, net.fc).fit(training)
    body = [theirs.KNN(net.features, k=3).fit(training)] if trusts(net, training, held) else []
    members = [TIEDetector(net), *body, theirs.EnergyBased(net), plus, fdbd]
    expected = Combined(members, 0.1, rule).fit(held)
    torch.testing.assert_close(found(x), expected(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.threshold, expected.threshold, rtol=1e-3, atol=1e-3)
    weights = [0.0, *[2.0] * len(body), 1.0, 0.0, 1.0]
    assert found.reference.weights.tolist() == weights
    without = combine(
        net, train_loader=training, calibration_loader=held, false_alarm=None, rule=rule
    )
    assert without.threshold is None


@pytest.mark.parametrize("how", ["combine", "kept", "TIEDetector", "Combined"])
def test_training_images_in_another_loader_are_told_from_held_out_ones(how):
    net, x = trained().eval(), images(100)[0]
    net.keep_training(net.features(x).detach(), None)
    fit = {
        "combine": lambda of: combine(net, train_loader=[x], calibration_loader=of),
        "kept": lambda of: combine(net, calibration_loader=of),
        "TIEDetector": TIEDetector(net, false_alarm=0.1).fit,
        "Combined": Combined(
            [TIEDetector(net), MahalanobisPlusPlus(net.features).fit([(x, torch.arange(100) % 3)])]
        ).fit,
    }[how]
    with pytest.warns(UserWarning, match="100% or more of the held-out images are training"):
        fit(list(x[:40].split(7)))
    fit(list(images(140)[0][100:].split(7)))  # others: not a word


@pytest.mark.parametrize("which", ["train_loader", "calibration_loader"])
def test_knn_is_not_trusted_where_a_loader_has_no_labels(which):
    net = trained().eval()
    loaders = {"train_loader": list(loader(100, seed=1)), "calibration_loader": list(loader(40))}
    y = net.outputs(images(40)[0]).logits[:, :-1].argmax(1)  # so that the network is right
    loaders["calibration_loader"] = [(images(40)[0], y)]
    loaders[which] = [x for x, _ in loaders[which]]
    found = combine(net, **loaders)
    assert SampledKNN not in map(type, found.detectors)
    assert found.decide(images()[0]).score.isfinite().all()


def world(classes: int, images: int, spread: float, seed: int = 0, labelled: bool = True):
    """Features of classes that lie apart, their labels, and a layer that knows their means."""
    rng = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 12, generator=torch.Generator().manual_seed(1))
    y = torch.arange(images) % classes
    z = means[y] + spread * torch.randn(images, 12, generator=rng)
    return z, y if labelled else None, (means, -means.square().sum(1) / 2)


def given(z, layer) -> Outputs:
    """What a network of this layer gives, whose garbage logit is a length."""
    logits = z @ layer[0].T + layer[1]
    return Outputs(logits, z, torch.cat([logits, z.norm(dim=1, keepdim=True)], dim=1))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("classes", "count"), [(2, 100), (2, 2), (100, 100), (1000, 100)])
def test_few_images_many_classes_and_no_labels(classes, count, labelled):
    z, y, layer = world(classes, count, 0.3, labelled=labelled)
    sample = Sample(z, y)
    held, labels, _ = world(classes, 40, 0.3, seed=1)
    combined = Combined(chosen_members(sample, None, layer), 0.05)
    fit_chosen(combined, sample, [(given(part, layer), labels[:20]) for part in held.split(20)])
    new = torch.cat([9 * torch.randn(30, 12), torch.zeros(1, 12), z])
    assert combined.predict_scores(combined.score_outputs(given(new, layer))).isfinite().all()
    # Neighbours cannot share a class of one image, nor of images that nobody has labelled.
    trusted = SampledKNN in map(type, combined.detectors)
    assert trusted == (labelled and classes == 2 and count == 100)


def chosen_by(sample, layer, z, labels) -> Combined:
    combined = Combined(chosen_members(sample, None, layer), 0.1)
    return fit_chosen(combined, sample, [(given(z, layer), labels)])


def test_trust_asks_no_image_that_sets_the_threshold():
    sample = Sample(*(parts := world(3, 200, 0.5))[:2])
    layer = parts[2]
    z, y, _ = world(3, 60, 0.5, seed=1)
    calibrating = split(60, 0.1)[1]
    trusted = chosen_by(sample, layer, z, y)
    assert SampledKNN in map(type, trusted.detectors)
    otherwise, wrong = z.clone(), y.clone()
    otherwise[calibrating] = torch.randn(30, 12)
    wrong[calibrating] = (y[calibrating] + 1) % 3
    for features, labels in ((otherwise, y), (z, wrong), (otherwise, wrong)):
        same = chosen_by(sample, layer, features, labels)
        assert [type(m) for m in same.detectors] == [type(m) for m in trusted.detectors]
        assert all(map(torch.equal, same.reference, trusted.reference))
    # The same labels are wrong of a sample whose classes have other names, and the network's right.
    renamed = Sample(sample.features, (sample.labels + 1) % 3)
    for labels in (y, wrong):
        assert SampledKNN not in map(type, chosen_by(renamed, layer, z, labels).detectors)


@pytest.mark.slow
def test_the_false_alarm_rate_holds_where_trust_is_estimated():
    alpha, count, rates, trusted = 0.1, 40, [], []
    z, y, layer = world(6, 90, 1.6)
    sample = Sample(z, y)
    members = chosen_members(sample, None, layer)
    for seed in range(300):
        z, y, _ = world(6, count + 200, 1.6, seed=seed + 1)
        order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))
        held, new = z[order[:count]], z[order[count:]]
        combined = fit_chosen(
            Combined(members, alpha), sample, [(given(held, layer), y[order[:count]])]
        )
        scores = combined.predict_scores(combined.score_outputs(given(new, layer)))
        rates.append((scores > combined.threshold).float().mean())
        trusted.append(SampledKNN in map(type, combined.detectors))
    rates = torch.stack(rates)
    assert 0.1 < sum(trusted) / len(trusted) < 0.9
    margin = 3 * rates.std() / len(rates) ** 0.5
    # 20 + 1 images reject 2 of them.
    assert 2 / 21 - margin <= rates.mean() <= alpha + margin


def test_few_training_images_give_finite_scores_and_one_is_refused():
    net = trained().eval()
    few = [(x.flip(3), y) for x, y in loader(4)]
    found = combine(net, train_loader=few, calibration_loader=loader(40))
    assert found(images()[0]).isfinite().all()
    with pytest.raises(
        ValueError, match="Expected at least two training images for KNN, but got 1"
    ):
        combine(net, train_loader=loader(1), calibration_loader=loader(40))
    with pytest.raises(
        ValueError,
        match=r"Expected calibration images .*, but got the training images again",
    ):
        combine(net, train_loader=(both := loader(40)), calibration_loader=both)
    with pytest.raises(ValueError, match="Expected a rule"):
        combine(net, calibration_loader=loader(40), rule="sum")
    with pytest.raises(ValueError, match=r"kept features .*; give train_loader=\.\.\."):
        combine(net, calibration_loader=loader(40))
    with pytest.raises(TypeError):
        combine(net, loader(40))  # type: ignore[misc]


@pytest.mark.parametrize("labelled", [True, False])
def test_combine_reads_what_attach_kept_and_saved(labelled, tmp_path):
    model, data = Small(N).eval(), list(loader(100, seed=1))
    data = data if labelled else [x for x, _ in data]
    net = attach(model, data, N, head_config=HeadConfig(steps=5, max_images=40))
    assert (net.train_features.shape, net.train_labels is None) == ((100, 48), not labelled)
    given = combine(net, calibration_loader=loader(40), train_loader=data)
    kept, x = combine(net, calibration_loader=loader(40)), images()[0]
    torch.testing.assert_close(kept(x), given(x), rtol=1e-3, atol=1e-3)
    net.save(tmp_path / "net")
    again = TIENet.load(tmp_path / "net", model)
    assert torch.equal(combine(again, calibration_loader=loader(40))(x), kept(x))
    assert not any("train_" in name for name in kept.export_module().state_dict())
    weights = net.state_dict()
    bare = TIENet(model, N, SHAPE, head=net.garbage)
    bare.load_state_dict(weights)
    assert torch.equal(bare.train_features, net.train_features)
    bare.load_state_dict({name: of for name, of in weights.items() if "train_" not in name})
    assert bare.train_features is bare.train_labels is None
    TIETrainer(again, TINY, [], [Noise(again)]).epoch([(x, images()[1])])
    assert again.train_features is None  # of weights that are no more


@pytest.mark.parametrize("change", ["nan", "size", "labels", "alone"])
def test_damaged_features_of_training_images_are_refused(change, tmp_path):
    net = trained().eval()
    features, labels = torch.rand(6, net.feature_size), torch.arange(6) % N
    if change == "nan":
        features[0] = torch.nan
    net.keep_training(
        None if change == "alone" else features[:, int(change == "size") :],
        labels + N * (change == "labels"),
    )
    net.save(tmp_path / "net")
    with pytest.raises(ValueError, match="features or labels of training images"):
        TIENet.load(tmp_path / "net")


# One network, run once.


def test_members_that_read_the_network_share_one_forward_pass_and_score_as_they_do_alone():
    net = trained().eval()
    detector, x = Combined(every_member(net), 0.1).fit(loader(60)), images()[0]
    passes = []
    net.backbone.register_forward_hook(lambda *_: passes.append(1))
    scores = detector.scores(x)
    assert len(passes) == 1
    detector(x)
    detector.decide(x)
    assert len(passes) == 3
    for member, column in zip(detector.detectors, scores.T, strict=True):
        assert torch.equal(member(x).float(), column), type(member).__name__
    assert len(passes) == 3 + len(detector.detectors)


@pytest.mark.parametrize(("asks", "passes"), [(True, 1), (False, 2)])
def test_so_do_those_of_a_network_that_is_no_tienet_where_its_logits_come_of_its_features(
    asks, passes
):
    net = Plain(asks).eval()
    detector, x = (
        Combined(
            [
                theirs.Mahalanobis(net.features).fit(loader(60)),
                theirs.EnergyBased(net),
                UncertaintyEstimate(net),
            ],
            0.1,
        ).fit(loader(60)),
        images()[0],
    )
    net.passes.clear()
    scores = detector.scores(x)
    assert len(net.passes) == passes
    assert "features" not in vars(net)
    assert torch.equal(scores, torch.stack([member(x) for member in detector.detectors], 1))


def test_features_of_other_images_than_those_that_are_scored_are_not_taken_for_theirs():
    class Normalising(Plain):
        def forward(self, x):
            return super().forward(2 * x - 1)

    net, x = Normalising().eval(), images()[0]
    detector = Combined(
        [theirs.Mahalanobis(net.features).fit(loader()), theirs.EnergyBased(net)], None
    ).fit(loader())
    assert torch.equal(detector.scores(x)[:, 0], detector.detectors[0](x))


def test_a_head_on_every_layer_is_read_in_the_same_pass():
    torch.manual_seed(0)
    net = attach(Conv3(1, N).eval(), loader(seed=1), num_classes=N)
    detector, x = three(net).fit(loader(60)), images()[0]
    passes = []
    net.backbone.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(detector.scores(x)[:, 0], TIEDetector(net)(x).detach())
    assert len(passes) == 2


def test_members_that_read_something_else_run_by_themselves():
    net = trained().eval()
    other = make_net().eval()
    members = [
        theirs.ODIN(net),
        theirs.EnergyBased(net),
        theirs.EnergyBased(other),
        theirs.RMD(lambda x: net.features(x)).fit(loader(60)),
    ]
    detector, x = Combined(members, 0.1).fit(loader(60)), images()[0]
    torch.testing.assert_close(
        detector.scores(x), torch.stack([member(x).detach().float() for member in members], 1)
    )
    alone = Combined([theirs.ODIN(net)], 0.1).fit(loader(60))
    assert torch.equal(alone.decide(x).label, net(x).argmax(1))


@pytest.mark.parametrize("make", [lambda: trained(), lambda: Plain().train()])
def test_a_network_in_training_mode_is_scored_in_evaluation_mode_and_left_as_it_was(make):
    net, x = make(), images()[0]
    detector = Combined([theirs.EnergyBased(net), UncertaintyEstimate(net)], 0.1).fit(loader(60))
    scores = detector(x)
    assert net.training
    net.eval()
    assert torch.equal(detector(x), scores)
    assert torch.equal(
        Combined([theirs.EnergyBased(net), UncertaintyEstimate(net)], 0.1).fit(loader(60))(x),
        scores,
    )


# Fit.


def test_the_halves_share_no_image_and_each_does_its_work():
    detector = three().fit(loader(61))
    scores = detector.scores(images(61)[0])
    scaling, calibrating = split(61, 0.1)
    assert (len(scaling), len(calibrating)) == (30, 31)
    assert sorted(torch.cat([scaling, calibrating]).tolist()) == list(range(61))
    assert scaling.tolist() != sorted(
        scaling.tolist()
    )  # as a loader may have its classes in order
    learned = reference(scores[scaling], torch.tensor([0.0, 0, 1]))  # energy is the body
    torch.testing.assert_close(
        detector.reference, learned, rtol=1e-4, atol=1e-4
    )  # sums of batches of other sizes
    torch.testing.assert_close(
        detector.threshold,
        conformal_threshold(RULES["tails"](learned, scores[calibrating]), 0.1),
    )
    torch.testing.assert_close(
        detector(images()[0]), RULES["tails"](learned, detector.scores(images()[0]))
    )


def test_scores_alone_are_fitted_and_combined_as_images_are():
    detector, again, x = three().fit(loader(61)), three(), images()[0]
    again.fit_scores(detector.scores(images(61)[0]).double())
    torch.testing.assert_close(again.threshold, detector.threshold)
    torch.testing.assert_close(again.predict_scores(detector.scores(x)), detector(x))


@pytest.mark.parametrize(
    "encoder", [lambda net: net.features, lambda net: lambda x: net.features(x)]
)
def test_an_unfitted_member_is_refused(encoder):
    net = trained().eval()
    detector = Combined([theirs.Mahalanobis(encoder(net)), theirs.EnergyBased(net)], 0.1)
    with pytest.raises(
        RequiresFittingException,
        match="got Mahalanobis, which is not; fit it on training images first",
    ):
        detector.fit(loader(80))
    detector.detectors[0].fit(loader(80))
    assert detector.fit(loader(80)).threshold.isfinite()


def test_another_false_alarm_rate_by_the_calibration_scores():
    detector, again = three().fit(loader(60)), three(false_alarm=0.3).fit(loader(60))
    assert detector.calibration_scores.shape == (30,)
    assert torch.equal(detector.recalibrate(0.3).threshold, again.threshold)
    assert detector.false_alarm == 0.3
    with pytest.raises(ValueError, match="at least 99 ID images"):
        detector.recalibrate(0.01)
    with pytest.raises(RequiresFittingException, match="calibration scores"):
        three().recalibrate(0.3)


def test_without_a_rate_all_images_set_the_scale():
    detector = three(false_alarm=None).fit(loader(24))
    assert len(detector.reference.ordered) == 24
    assert detector(images()[0]).isfinite().all()
    for use in (lambda: detector.decide(images()[0]), detector.export_module):
        with pytest.raises(RequiresFittingException, match="false_alarm"):
            use()


def test_images_without_id_labels_are_left_out():
    x, y = images(80)
    y[40:] = -1
    mixed = three().fit(DataLoader(TensorDataset(x, y), batch_size=50))
    assert torch.equal(mixed.threshold, three().fit([(x[:40], y[:40])]).threshold)


def test_another_rule_forgets_the_line_and_ranks_by_itself():
    detector, x = three().fit(loader(60)), images()[0]
    for rule in RULES:
        detector.set_hyperparameters(rule=rule)
        with pytest.raises(RequiresFittingException):
            detector.decide(x)
        assert torch.equal(detector(x), RULES[rule](detector.reference, detector.scores(x)))
    assert len(
        {tuple(three(rule=rule).fit(loader(60)).decide(x).score.tolist()) for rule in RULES}
    ) == len(RULES)
    with pytest.raises(ValueError, match="one of tails"):
        detector.set_hyperparameters(rule="mean")


def test_their_benchmark_takes_it_beside_its_members():
    detector = three().fit(loader(60))
    rows = TwoSets().evaluate(
        [detector, *detector.detectors], loader_kwargs={"batch_size": 16}, cache=True
    )
    assert {row["Detector"] for row in rows} == {
        "Combined",
        "TIEDetector",
        "MahalanobisPlusPlus",
        "EnergyBased",
    }


def test_to_moves_members_and_scale():
    detector = three().fit(loader(60)).to("meta")
    assert (
        detector.device.type
        == detector.threshold.device.type
        == detector.reference.mean.device.type
        == "meta"
    )
    assert detector.detectors[1].mu.is_meta
    assert detector.network.fc.weight.is_meta


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Combined([]), "at least one detector"),
        (lambda: three(false_alarm=0), "false_alarm"),
        (lambda: three(rule="mean"), "one of tails"),
        (lambda: three().fit([]), "Expected ID images in calibration_loader, but got"),
        (
            lambda: three().fit([(images()[0], torch.full((24,), -1))]),
            "Expected ID images in calibration_loader, but got",
        ),
        (
            lambda: three(false_alarm=0.05).fit(loader(36)),
            "at least 37 ID images for a false-alarm rate of 0.05, half of them .* got 36",
        ),
        (lambda: three(false_alarm=1.0).fit(loader(3)), "at least 4 ID images"),
        (
            lambda: three(false_alarm=None).fit(loader(1)),
            "at least 2 ID images to set the scale of the scores, but got 1",
        ),
        (lambda: three().fit([(images()[0], torch.full((24,), N))]), r"labels in \[0, 3\)"),
        (
            lambda: Combined([theirs.EnergyBased(Plain().eval())], 0.1).fit(
                [(images()[0], torch.full((24,), N))]
            ),
            r"labels in \[0, 3\)",
        ),
        (
            lambda: three().fit([(torch.rand(4, 3, 28, 28), torch.zeros(4).long())]),
            r"shape \(B, 1, 28, 28\)",
        ),
        (lambda: three().fit(loader(60)).predict(torch.full((2, *SHAPE), float("nan"))), "NaN"),
        (lambda: three().fit(loader(60)).decide(torch.rand(2, *SHAPE) * 255), "value range"),
        (
            lambda: three().fit(loader(60)).predict_scores(torch.zeros(2, 4)),
            r"shape \(B, 3\), but got",
        ),
        (
            lambda: three().fit(loader(60)).predict_scores(torch.full((2, 3), float("nan"))),
            "finite scores",
        ),
        (lambda: three().fit_scores(torch.zeros(60, 2)), r"shape \(B, 3\)"),
        (
            lambda: Combined([Constant(make_net())], 0.1).fit(loader(60)),
            "differ between ID images",
        ),
        (
            lambda: Combined([Endless(make_net())], 0.1).fit(loader(60)),
            "finite scores from Endless",
        ),
        (
            lambda: Combined([Pixels(make_net())], 0.1).fit(loader(60)),
            r"one score per image from Pixels, but got .*\(7, 3\)",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Constant(UncertaintyEstimate):
    def predict_logits(self, logits):
        return logits[:, 0] * 0 + 3


class Endless(UncertaintyEstimate):
    def predict_logits(self, logits):
        return logits[:, 0] / 0


class Pixels(UncertaintyEstimate):
    def predict_logits(self, logits):
        return logits


@pytest.mark.parametrize("bad", [None, 3, [nn.Linear(1, 1)], "TIE"])
def test_what_is_no_list_of_detectors_is_refused(bad):
    with pytest.raises(TypeError, match="Expected a list of pytorch-ood detectors, but got"):
        Combined(bad)


def test_without_a_network_or_before_fit_it_says_so():
    nobody, x = Combined([TIEDetector(None), theirs.Mahalanobis(None)], 0.1), images()[0]
    for use in (nobody.predict, nobody.decide, nobody.scores, lambda x: nobody.fit(loader())):
        with pytest.raises(ModelNotSetException):
            use(x)
    with pytest.raises(RequiresFittingException):
        nobody.predict_scores(torch.zeros(1, 2))
    for use in (three().predict, three().decide):
        with pytest.raises(RequiresFittingException):
            use(x)


# The guarantee, and the decision.


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize(("step", "correlation"), [(0.0, 0.0), (0.5, 0.9)])
def test_the_false_alarm_rate_holds_whatever_the_dependence_with_many_members_and_few_images(
    rule, step, correlation
):
    alpha, k, held_out = 0.05, 20, 38
    rates = []
    for seed in range(400):
        scores = draw(seed, held_out + 200, k, correlation, step)
        detector = Combined([theirs.EnergyBased(None)] * k, alpha, rule).fit_scores(
            scores[:held_out]
        )
        rates.append(
            (detector.predict_scores(scores[held_out:]) > detector.threshold).float().mean()
        )
    rates = torch.stack(rates)
    assert (
        rates.mean() <= alpha + 3 * rates.std() / 20
    )  # standard errors of the mean over 400 draws: passed by chance once in 740


def test_what_scores_above_the_threshold_is_rejected_as_garbage_or_as_uncertain():
    detector, x = (
        three().fit(loader(60)),
        torch.cat([images(200)[0], torch.zeros(2, *SHAPE), torch.ones(2, *SHAPE)]),
    )
    net = detector.network
    net.garbage.bias.data += (
        net(x, garbage=True)[:, :-1].amax(1).median() - net(x, garbage=True)[:, -1].median()
    )  # half of all images
    detector.fit(loader(60))
    decision, logits = detector.decide(x), net(x, garbage=True)
    rejected, garbage = detector(x) > detector.threshold, logits.argmax(1) == N
    assert torch.equal(decision.score, detector(x))
    assert torch.equal(decision.level == 1, rejected & garbage)
    assert torch.equal(decision.level == 2, rejected & ~garbage)
    assert set(decision.level.tolist()) == {0, 1, 2}
    assert (garbage & ~rejected).any()  # the score alone rejects
    assert torch.equal(decision.label, logits[:, :-1].argmax(1))
    torch.testing.assert_close(decision.uncertainty, uncertainty(logits.softmax(1)))


def test_a_network_without_a_garbage_class_decides_over_its_n_classes():
    net, x = Plain().eval(), images(80)[0]
    members = [theirs.Mahalanobis(net.features).fit(loader(60)), theirs.EnergyBased(net)]
    detector = Combined(members, 0.2).fit(loader(60))
    decision = detector.decide(x)
    assert set(decision.level.tolist()) == {0, 2}
    assert torch.equal(decision.level == 2, detector(x) > detector.threshold)
    assert torch.equal(decision.label, net(x).argmax(1))
    torch.testing.assert_close(decision.uncertainty, uncertainty(net(x).softmax(1)))


# Files.


@pytest.mark.parametrize("false_alarm", [0.1, None])
def test_all_kinds_of_members_come_back(tmp_path, false_alarm):
    detector, x = (
        Combined(every_member(trained()), false_alarm, "max").fit(loader(80)),
        images()[0],
    )
    detector.save(tmp_path)
    again = Combined.load(tmp_path)
    assert torch.equal(again.scores(x), detector.scores(x))
    assert torch.equal(again(x), detector(x))
    assert (again.rule, again.false_alarm, again.threshold) == (
        "max",
        false_alarm,
        detector.threshold,
    )
    assert again._fields() == detector._fields() == {"all_logits", "logits", "features"}
    if false_alarm is not None:
        assert all(
            torch.equal(a, b) for a, b in zip(detector.decide(x), again.decide(x), strict=True)
        )
    assert {path.name for path in tmp_path.iterdir()} == {
        "network.safetensors",
        "detector.safetensors",
        "detector.json",
    }
    assert Combined.load(tmp_path, device="meta").device.type == "meta"
    kept = (again.calibration_scores, detector.calibration_scores)
    assert kept == (None, None) if false_alarm is None else torch.equal(*kept)
    torch.testing.assert_close(
        again.fit(loader(80, seed=9))(x), detector.fit(loader(80, seed=9))(x)
    )


def test_another_architecture_comes_back_when_it_is_named(tmp_path):
    body = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, N))
    detector = three(TIENet(body, N, SHAPE)).fit(loader(60))
    detector.save(tmp_path)
    with pytest.raises(ValueError, match="backbone"):
        Combined.load(tmp_path)
    assert torch.equal(Combined.load(tmp_path, body)(images()[0]), detector(images()[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda net: [theirs.EnergyBased(net), theirs.ODIN(net)],
            "members out of TIEDetector, .* but got ODIN",
        ),
        (
            lambda net: [theirs.EnergyBased(net), theirs.EnergyBased(make_net())],
            "but got EnergyBased on something else",
        ),
        (
            lambda net: [theirs.EnergyBased(net), theirs.KNN(net.features, metric="manhattan")],
            "default settings inside, but got KNN",
        ),
        (lambda net: [theirs.EnergyBased(net), Odd(net)], "but got Odd"),
        (
            lambda net: [theirs.EnergyBased(Plain())],
            "detectors on a TIENet to save, but got Plain",
        ),
    ],
)
def test_what_cannot_be_written_down_is_refused_before_anything_is(tmp_path, make, message):
    detector = Combined(make(trained()), 0.1)
    detector.fit_scores(torch.randn(60, len(detector.detectors)))
    with pytest.raises(TypeError, match=message):
        detector.save(tmp_path)
    assert not list(tmp_path.iterdir())


class Odd(theirs.EnergyBased):
    """One whose state nobody knows."""


def test_an_unfitted_one_is_not_saved(tmp_path):
    with pytest.raises(RequiresFittingException):
        three().save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    net = trained().eval()
    members = [
        TIEDetector(net),
        MahalanobisPlusPlus(net.features),
        theirs.ViM(net.features, 4, net.fc.weight, net.fc.bias),
        theirs.EnergyBased(net),
    ]
    members.append(theirs.KNN(net.features, k=3))
    for member in members:
        member.fit(loader(80, seed=7))
    Combined(members, 0.1).fit(loader(80)).save(folder)
    return folder


@pytest.fixture
def saved(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "d"))


def rewrite(folder: Path, change) -> None:
    """Members changed by somebody who also changes the fingerprint."""
    from tie_ext.utils.files import load_state, save_state, sha256

    state = load_state(folder / "detector.safetensors", "detector")
    change(state)
    save_state(folder / "detector.safetensors", "detector", state)
    edit(folder, detector_sha256=sha256(folder / "detector.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "detector.json").write_text("{"), "truncated or foreign"),
        (lambda f: (f / "detector.json").write_text("[1]"), "truncated or foreign"),
        (lambda f: edit(f, format="tie_ext detector"), "truncated or foreign"),
        (lambda f: edit(f, version=4), "newer tie_ext"),
        (lambda f: edit(f, rule="mean"), "one of tails"),
        (lambda f: edit(f, false_alarm=7), "Expected false_alarm"),
        (lambda f: edit(f, threshold="hostile"), "Expected threshold"),
        (lambda f: drop(f, "threshold"), "without 'threshold'"),
        (lambda f: drop(f, "detector_sha256"), "without 'detector_sha256'"),
        (lambda f: TIENet(Conv5(1, N), N, SHAPE).save(f / "network.safetensors"), "got another"),
        (lambda f: (f / "network.safetensors").write_bytes(b"truncated"), "truncated or foreign"),
        (lambda f: (f / "detector.safetensors").write_bytes(b"truncated"), "truncated or foreign"),
        (
            lambda f: (f / "detector.safetensors").write_bytes(
                (f / "detector.safetensors").read_bytes()[:-4]
            ),
            "truncated or foreign",
        ),
        (
            lambda f: shutil.copy(f / "network.safetensors", f / "detector.safetensors"),
            "got a 'network' file",
        ),
        (
            lambda f: (
                three().fit(loader(60)).save(f / "other")
                or shutil.copy(f / "other/detector.safetensors", f)
            ),
            "got another",
        ),
        (lambda f: rewrite(f, lambda s: s.pop("reference")), "without 'reference'"),
        (lambda f: rewrite(f, lambda s: s["members"].pop()), "for 4 members"),
        (lambda f: rewrite(f, lambda s: s["members"][0].update(name="eval")), "'eval'"),
        (
            lambda f: rewrite(f, lambda s: s["members"][0].update(name=["x"])),
            "truncated or foreign",
        ),
        (
            lambda f: rewrite(f, lambda s: s["members"][0].update(t="x")),
            "Expected t of TIEDetector to be a number",
        ),
        (lambda f: rewrite(f, lambda s: s["members"][3].update(t=0)), "finite scores"),
        (
            lambda f: rewrite(f, lambda s: s["members"][1].update(mu=torch.zeros(3, 2))),
            "truncated or foreign",
        ),
        (lambda f: rewrite(f, lambda s: s["members"][1].update(mu=None)), "truncated or foreign"),
        (
            lambda f: rewrite(f, lambda s: s["members"][1].update(mu="x")),
            "Expected mu of MahalanobisPlusPlus to be finite numbers",
        ),
        (
            lambda f: rewrite(f, lambda s: s["members"][1]["mu"].fill_(float("nan"))),
            "Expected mu of MahalanobisPlusPlus to be finite numbers",
        ),
        (
            lambda f: rewrite(f, lambda s: s["members"][2].update(w=torch.zeros(3, 2))),
            "truncated or foreign",
        ),
        (lambda f: rewrite(f, lambda s: s["members"][4].update(k=10**9)), "Expected n_neighbors"),
        (
            lambda f: rewrite(f, lambda s: s["members"][4].update(images=torch.zeros(9, 2))),
            "truncated or foreign",
        ),
        (
            lambda f: rewrite(f, lambda s: s["reference"]["deviation"].zero_()),
            "deviations <= 0",
        ),
        (
            lambda f: rewrite(f, lambda s: s["reference"]["mean"].fill_(float("inf"))),
            "finite mean",
        ),
        (
            lambda f: rewrite(
                f, lambda s: s["reference"].update(ordered=s["reference"]["ordered"].flip(0))
            ),
            "do not ascend",
        ),
        (
            lambda f: rewrite(f, lambda s: s["reference"].update(mean=torch.zeros(2))),
            "for 5 members",
        ),
        (
            lambda f: rewrite(f, lambda s: s["reference"].update(weights=torch.ones(2))),
            "for 5 members",
        ),
        (lambda f: rewrite(f, lambda s: s["reference"]["weights"].zero_()), "or all 0"),
        (lambda f: rewrite(f, lambda s: s["reference"]["weights"].sub_(1)), "weights below 0"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused(saved, change, message):
    change(saved)
    with pytest.raises(ValueError, match=message) as error:
        Combined.load(saved)
    assert str(error.value).startswith("Expected ")


def test_a_saved_detector_has_room_for_what_comes_later(saved):
    from tie_ext.utils.files import load_state

    about = json.loads((saved / "detector.json").read_text())
    assert (about["version"], about["guarantee"], about["transform"]) == (3, "average", None)
    state = load_state(saved / "detector.safetensors", "detector")
    assert state["training_features"] is None
    assert state["calibration_scores"].shape == (40,)


def test_weights_are_kept_and_a_file_of_before_has_none(saved):
    x, whole = images()[0], Combined.load(saved)
    assert whole.reference.weights.tolist() == [0, 0, 1, 1, 2]
    rewrite(saved, lambda s: s["reference"].pop("weights"))
    before = Combined.load(saved)
    assert before.reference.weights is None
    mean = before.reference.standardise(before.scores(x)).mean(1)
    torch.testing.assert_close(before(x), mean, rtol=1e-4, atol=1e-4)
    edit(saved, rule="stouffer")
    torch.testing.assert_close(Combined.load(saved)(x), mean * 5**0.5, rtol=1e-4, atol=1e-4)


def test_calibration_scores_that_are_none_are_refused(saved):
    for bad in (torch.full((3,), float("nan")), torch.zeros(2, 2), torch.zeros(3).long()):
        rewrite(saved, lambda s, bad=bad: s.update(calibration_scores=bad))
        with pytest.raises(ValueError, match="calibration scores"):
            Combined.load(saved)


def test_the_reader_of_every_folder(saved, tmp_path):
    assert isinstance(load_detector(saved), Combined)
    TIEDetector(trained(), 0.1).fit(loader()).save(tmp_path / "tie")
    single = load_detector(tmp_path / "tie")
    assert single.calibration_scores.shape == (24,)
    assert single.recalibrate(0.2).threshold < load_detector(tmp_path / "tie").threshold
    trained().save(tmp_path / "run" / "network.safetensors")
    assert isinstance(load_detector(tmp_path / "run"), TIEDetector)
    shutil.copytree(saved, tmp_path / "run" / "combined")  # as runs of 0.2.0 have it
    assert isinstance(load_detector(tmp_path / "run"), Combined)
    assert load_detector(tmp_path / "run", device="meta").device.type == "meta"
    with pytest.raises(FileNotFoundError, match="network"):
        load_detector(tmp_path)
    edit(saved, format="other")
    with pytest.raises(ValueError, match="format 'other'"):
        load_detector(saved)


def test_weights_are_read_once(saved, monkeypatch):
    read, load = [], TIENet.load
    monkeypatch.setattr(TIENet, "load", lambda *a, **k: read.append(a) or load(*a, **k))
    detector = load_detector(saved)
    assert len(read) == 1
    assert detector.network is detector.detectors[0].network


def test_saving_over_an_earlier_detector_leaves_none_of_its_files(saved):
    (saved / "members.safetensors").write_bytes(b"features of other images")
    Combined.load(saved).save(saved)
    assert not (saved / "members.safetensors").exists()


@pytest.mark.parametrize("name", ["network.safetensors", "detector.safetensors", "detector.json"])
def test_a_file_that_is_missing_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Combined.load(saved)


def test_a_file_of_a_later_minor_version_is_read_and_each_loader_refuses_the_others(
    saved, tmp_path
):
    edit(saved, something_new=[1, 2])
    assert Combined.load(saved).threshold is not None
    assert json.loads((saved / "detector.json").read_text())["members"][-1] == "KNN"
    with pytest.raises(ValueError, match="tie_ext combined detector"):
        TIEDetector.load(saved)
    TIEDetector(trained()).save(tmp_path / "tie")
    with pytest.raises(ValueError, match="format 'tie_ext detector'"):
        Combined.load(tmp_path / "tie")


# Export.


def exportable(rule: str, *without: type) -> Combined:
    net = trained().eval()
    return Combined(
        [member for member in every_member(net) if type(member) not in without], 0.2, rule
    ).fit(loader(60))


@pytest.mark.slow
@rules
@pytest.mark.skipif(
    torch.__version__.startswith("2.2."),
    reason="torch 2.2 exports convolutions for a fixed batch size only",
)
@pytest.mark.filterwarnings("ignore")
def test_the_exported_program_decides_as_the_detector(rule):
    detector = exportable(rule, theirs.KNN)
    program = torch.export.export(
        detector.export_module(),
        (images(4)[0],),
        dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}},
    )
    x = images(24, seed=8)[0]
    want, got = detector.decide(x), program.module()(x)
    assert torch.equal(want.label, got[0])
    assert torch.equal(want.level, got[3])
    assert set(want.level.tolist()) > {0}
    torch.testing.assert_close(got[2], want.score, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@rules
@pytest.mark.filterwarnings("ignore")
def test_onnx_decides_as_the_detector(rule, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    detector, x = exportable(rule, theirs.KNN), images(24, seed=8)[0]
    torch.onnx.export(
        detector.export_module(),
        (images(4)[0],),
        tmp_path / "d.onnx",
        dynamo=True,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )
    label, _, score, level = onnxruntime.InferenceSession(tmp_path / "d.onnx").run(
        None, {"x": x.numpy()}
    )
    want = detector.decide(x)
    assert (label == want.label.numpy()).all()
    assert (level == want.level.numpy()).all()
    torch.testing.assert_close(torch.from_numpy(score), want.score, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda net: [theirs.KNN(net.features, k=3).fit(loader())],
            "that torch can export, but got KNN",
        ),
        (lambda net: [theirs.EnergyBased(net), theirs.ODIN(net)], "but got ODIN"),
        (lambda net: [theirs.EnergyBased(Plain())], "on a TIENet to export, but got Plain"),
    ],
)
def test_what_cannot_be_exported_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        Combined(make(trained().eval()), 0.1).fit(loader(60)).export_module()


# KNN on a sample.


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4])
def test_distances_of_features_that_lie_close_together(spread):
    z = torch.nn.functional.normalize(
        torch.randn(3, 64)[torch.arange(200) % 3] + spread * torch.randn(200, 64)
    )
    a, b = z[:40], z[40:]
    expected = (a.double()[:, None] - b.double()).norm(dim=2)
    torch.testing.assert_close(pairwise_distances(a, b).double(), expected, rtol=1e-5, atol=0)
    expected = expected.sort(dim=1).values[:, 4]
    torch.testing.assert_close(knn_score(3 * a, b, 5).double(), expected, rtol=1e-3, atol=1e-7)


def test_sampled_knn_is_their_knn_on_the_features_it_keeps():
    torch.manual_seed(0)
    z, y, new = (
        torch.randn(300, 6) * torch.rand(300, 1) * 5,
        torch.arange(300) % N,
        torch.cat([torch.randn(50, 6), torch.zeros(1, 6)]),
    )
    every = SampledKNN(None, k=7, max_samples=400).fit_features(z, y)
    torch.testing.assert_close(
        every.predict_features(new).double(),
        theirs.KNN(None, k=7).fit_features(z, y).predict_features(new),
        rtol=1e-4,
        atol=1e-4,
    )
    some = SampledKNN(None, k=7, max_samples=100).fit_features(z, y)
    assert some.sample.shape == (100, 6)
    again = theirs.KNN(None, k=7).fit_features(some.sample, torch.zeros(100)).predict_features(new)
    torch.testing.assert_close(some.predict_features(new).double(), again, rtol=1e-4, atol=1e-4)
    assert (
        len(
            {tuple(row) for row in some.sample.tolist()}
            & {tuple(row) for row in every.sample.tolist()}
        )
        == 100
    )
    assert torch.equal(
        SampledKNN(None, k=7, max_samples=100).fit_features(z, y).sample, some.sample
    )
    known = SampledKNN(None, k=7, max_samples=400).fit_features(
        z, torch.where(torch.arange(300) < 200, 1, -1)
    )
    assert torch.equal(
        known.predict_features(new),
        SampledKNN(None, k=7, max_samples=400)
        .fit_features(z[:200], y[:200])
        .predict_features(new),
    )


def test_sampled_knn_says_what_it_cannot_use():
    z, y = torch.randn(20, 4), torch.zeros(20)
    with pytest.raises(RequiresFittingException):
        SampledKNN(None).predict_features(z)
    with pytest.raises(ModelNotSetException):
        SampledKNN(None).predict(images()[0])
    with pytest.raises(ValueError, match="Expected ID samples, but got none"):
        SampledKNN(None).fit_features(z, y - 1)
    with pytest.raises(
        ValueError, match=r"Expected finite floating-point features of shape \(N, F\)"
    ):
        SampledKNN(None, 2).fit_features(z * float("nan"), y)
    with pytest.raises(ValueError, match="Expected max_samples"):
        SampledKNN(None, 50, 20)


def test_sampled_knn_takes_the_farthest_where_fewer_than_k_are_kept():
    z = torch.randn(20, 4)
    fitted = SampledKNN(None, 20, 20).fit_features(z)
    farthest = fitted.predict_features(z)
    for k in SampledKNN.hyperparameter_space["k"]:
        assert torch.equal(fitted.set_hyperparameters(k=k).predict_features(z), farthest)


def test_the_nearest_vote_for_a_label():
    sample = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]))
    labels, z = torch.tensor([5, 5, 2, 2]), torch.tensor([[3.0, 0.2], [0.2, 3], [1, 1]])
    assert knn_labels(z, sample, labels, 3).tolist()[:2] == [5, 2]
    assert knn_labels(z, sample, labels, 1).tolist()[:2] == [5, 2]
    assert knn_labels(z, sample, torch.tensor([5, 7, 7, 7]), 4).tolist() == [7, 7, 7]


# fDBD.


@pytest.mark.parametrize("classes", [2, 7, 300])
def test_boundary_distance_is_their_fdbd(classes):
    head, z = nn.Linear(12, classes), torch.randn(60, 12)
    ours = BoundaryDistance(None, head.weight, head.bias).fit_features(z)
    new = 3 * torch.randn(40, 12)
    expected = theirs.fDBD(None, head).fit_features(z).predict_features(new)
    torch.testing.assert_close(ours.predict_features(new), expected, rtol=1e-4, atol=1e-5)
    plain = BoundaryDistance(None, head.weight).fit_features(z)
    head.bias.data.zero_()
    expected = theirs.fDBD(None, head).fit_features(z).predict_features(new)
    torch.testing.assert_close(plain.predict_features(new), expected, rtol=1e-4, atol=1e-5)


def test_boundary_distance_of_classes_with_the_same_weights_and_of_the_mean_itself():
    w = torch.randn(3, 4)[[0, 1, 2, 0]]
    ours = BoundaryDistance(None, w, torch.randn(4)).fit_features(z := torch.randn(20, 4))
    assert ours.predict_features(torch.cat([z, z.mean(0, keepdim=True)])).isfinite().all()
    with pytest.raises(RequiresFittingException):
        BoundaryDistance(None, w).predict_features(z)
    with pytest.raises(ModelNotSetException):
        BoundaryDistance(None, w).predict(images()[0])


# Mahalanobis++.


def test_mahalanobis_plus_plus_is_mahalanobis_on_features_of_length_1_with_shrinkage():
    z, y, new = (
        torch.randn(600, 6) * torch.rand(600, 1) * 5,
        torch.arange(600) % N,
        torch.randn(50, 6),
    )
    z[:, 0] += 2 * y
    unit, ours = torch.nn.functional.normalize, MahalanobisPlusPlus(None).fit_features(z, y)
    want = fit_gaussians(unit(z), y, shrinkage=True).distance(unit(new))
    torch.testing.assert_close(ours.predict_features(new), want)
    torch.testing.assert_close(ours.predict_features(100 * new), want, rtol=1e-3, atol=1e-3)
    # Of many images little is shrunk; their covariance is a sum over the images.
    z, y = z.repeat(50, 1) + 0.1 * torch.randn(30000, 6), y.repeat(50)
    ours = MahalanobisPlusPlus(None).fit_features(z, y).predict_features(new)
    by_hand = theirs.Mahalanobis(None).fit_features(unit(z), y).predict_features(unit(new))
    torch.testing.assert_close(ours, 30000 * by_hand, rtol=1e-2, atol=1e-2)


def test_mahalanobis_plus_plus_scores_what_it_was_fitted_to_last():
    z, y, new = torch.randn(60, 6), torch.arange(60) % N, torch.randn(50, 6)
    ours = MahalanobisPlusPlus(None).fit_features(z, y)
    first = ours.predict_features(new)
    second = ours.fit_features(z[:30], y[:30]).predict_features(new)
    assert not torch.equal(first, second)
    assert ours.to("meta").predict_features(new.to("meta")).is_meta


def test_mahalanobis_plus_plus_before_fit_and_on_labels_that_are_none():
    with pytest.raises(RequiresFittingException):
        MahalanobisPlusPlus(None).predict_features(torch.zeros(1, 2))
    with pytest.raises(ModelNotSetException):
        MahalanobisPlusPlus(None).predict(images()[0])
    with pytest.raises(ValueError, match="labels in"):
        MahalanobisPlusPlus(None).fit_features(torch.zeros(2, 2), torch.tensor([0, -1]))


def test_the_sample_of_training_features_is_the_same_for_the_same_images():
    from tie_ext.pytorch_ood.members import Outputs
    from tie_ext.pytorch_ood.recommended import sample_features

    h = torch.randn(60, 4)
    given = [(Outputs(torch.zeros(60, 2), h), torch.arange(60) % 2)]
    state = torch.get_rng_state()
    one, again = (sample_features(given, 20).features for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(torch.get_rng_state(), state)
