"""``combine``: its members, how far distances are trusted, and the features that a network has kept."""

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE, TINY, Small
from torch import Tensor
from torch.nn.functional import normalize

from hosts.pytorch_ood.conftest import N, images, loader, trained
from tie_ext import Combined, TIEDetector, TIENet, TIETrainer, attach, combine
from tie_ext.outliers import Noise
from tie_ext.pytorch_ood import MahalanobisPlusPlus, SampledKNN
from tie_ext.pytorch_ood.members import Outputs, confidence_of
from tie_ext.pytorch_ood.recommended import chosen_members, fit_chosen, fit_knn
from tie_ext.pytorch_ood.sample import Sample, sample_features
from tie_ext.scores.combination import RULES
from tie_ext.scores.threshold import split
from tie_ext.scores.trust import trust
from tie_ext.training.config import HeadConfig

X = images()[0]


@pytest.mark.parametrize("rule", list(RULES))
def test_combination_of_scores_of_the_host(rule):
    net, training, held = trained().eval(), loader(300, seed=1), loader(40, seed=2)
    loaders = {"train_loader": training, "calibration_loader": held}
    found = combine(net, **loaders, false_alarm=0.1, rule=rule)
    layer = theirs.fDBD(net.features, net.fc)
    others = [theirs.KNN(net.features, k=3), theirs.EnergyBased(net)]
    others += [MahalanobisPlusPlus(net.features), layer]
    members = [TIEDetector(net), *(of.fit(training) for of in others)]
    x, _ = map(torch.cat, zip(*training, strict=True))
    net.keep_training(net.features(x).detach(), None)  # of these Combined learns how far to trust
    expected = Combined(members, 0.1, rule).fit(held)
    torch.testing.assert_close(found(X), expected(X), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.threshold, expected.threshold, rtol=1e-3, atol=1e-3)
    distances = torch.cdist(*[normalize(net.features(x))] * 2).sort(1).values[:, 3]
    share = trust(distances, net(x).softmax(1).amax(1))
    weights = torch.tensor([0.5 * share, share, 1, share, 1])
    torch.testing.assert_close(found.reference.weights, weights)
    tail = found.reference.tail
    assert (tail / tail.max()).tolist() == [1, 0, 0, 1, 0]
    assert combine(net, **loaders, false_alarm=None, rule=rule).threshold is None


@pytest.mark.parametrize("how", ["combine", "kept", "TIEDetector", "Combined"])
def test_warning_of_training_images_held_out(how):
    net, x = trained().eval(), images(100)[0]
    net.keep_training(net.features(x).detach(), None)
    several = Combined([TIEDetector(net), theirs.EnergyBased(net)])
    fit = {
        "combine": lambda of: combine(net, train_loader=[x], calibration_loader=of),
        "kept": lambda of: combine(net, calibration_loader=of),
        "TIEDetector": TIEDetector(net, false_alarm=0.1).fit,
        "Combined": several.fit,
    }[how]
    if how == "Combined":
        several.detectors.append(MahalanobisPlusPlus(net.features).fit([(x, images(100)[1])]))
    with pytest.warns(UserWarning, match="100% or more of the held-out images are training"):
        fit(list(x[:40].split(7)))
    fit(list(images(140)[0][100:].split(7)))  # others: not a word


Layer = tuple[Tensor, Tensor]


def world(classes: int, count: int, spread: float, seed: int = 0) -> tuple[Sample, Layer]:
    """Features of classes that lie apart, their labels, and a layer that knows their means."""
    rng = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 12, generator=torch.Generator().manual_seed(1))
    y = torch.arange(count) % classes
    z = means[y] + spread * torch.randn(count, 12, generator=rng)
    layer = means, -means.square().sum(1) / 2
    return Sample(z, y, confidence_of(given(z, layer))), layer


def given(z: Tensor, layer: Layer) -> Outputs:
    """What a network of this layer gives, whose garbage logit is a length."""
    logits = z @ layer[0].T + layer[1]
    return Outputs(logits, z, torch.cat([logits, z.norm(dim=1, keepdim=True)], dim=1))


def chosen_by(sample: Sample, layer: Layer, z: Tensor) -> tuple[Combined, float]:
    """The combination, and how far it trusts distances."""
    combined = Combined(chosen_members(sample, None, layer), 0.1)
    fit_chosen(combined, sample, [(given(z, layer), None)])
    return combined, combined.reference.weights[1].item()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("classes", "count"), [(2, 100), (2, 2), (100, 100), (1000, 100)])
def test_few_images_many_classes_and_no_labels(classes, count, labelled):
    (z, y, sure), layer = world(classes, count, 0.3)
    held = world(classes, 40, 0.3, seed=1)[0].features
    sample = Sample(z, y if labelled else None, sure)
    combined, share = chosen_by(sample, layer, held)
    new = torch.cat([9 * torch.randn(30, 12), torch.zeros(1, 12), z])
    assert combined.predict_scores(combined.score_outputs(given(new, layer))).isfinite().all()
    assert share == pytest.approx(Sample(z, y, sure).trust())  # of labels no use is made


def test_trust_in_neighbours_that_know_where_classes_meet():
    (z, y, _), layer = world(3, 200, 0.2)
    held = world(3, 60, 0.2, seed=1)[0].features
    between, together = z.clone(), z.clone()
    between[::5] = (z[::5] + z[1::5]) / 2  # the network is unsure of these, which lie apart
    together[::5] = (z[0] + z[1]) / 2 + 0.01 * z[::5]  # and of these, which lie close together
    for features, share in ((between, 1), (together, 0)):
        sample = Sample(features, y, confidence_of(given(features, layer)))
        combined, found = chosen_by(sample, layer, held)
        assert found == share == sample.trust()
        assert combined.reference.weights.tolist() == [0.5 * share, share, 1, share, 1]
    # Whatever is held out.
    assert chosen_by(sample, layer, torch.randn(60, 12))[1] == 0


class Linear(torch.nn.Module):
    """A network of a layer alone."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.fc = torch.nn.Linear(12, len(layer[0]))
        self.fc.weight.data, self.fc.bias.data = layer

    def features(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def own_by(sample: Sample, layer: Layer, held: Tensor) -> tuple[Combined, float]:
    """A user's combination on a network that has kept no training images, and its trust."""
    net = Linear(layer).eval()
    knn = SampledKNN(net.features, 2).fit_features(sample.features)
    combined = Combined([theirs.EnergyBased(net), knn], 0.1).fit(
        list(held[:, :, None, None].split(7))
    )
    return combined, combined.reference.weights[1].item()


def test_trust_from_held_out_images_that_set_the_scale():
    sample, layer = world(3, 200, 1.5)
    held = world(3, 60, 1.5, seed=4)[0].features
    first, share = own_by(sample, layer, held)
    assert 0 < share < 1
    others = held.clone()
    others[split(60, 0.1)[1]] = torch.randn(30, 12)
    same, _ = own_by(sample, layer, others)
    for a, b in zip(same.reference, first.reference, strict=True):
        assert a is b is None or torch.equal(a, b)
    alone = Combined([first.detectors[0]], 0.1).fit([held[:, :, None, None]])
    assert alone.reference.weights.tolist() == [1]


def test_trust_from_training_images_that_a_network_has_kept(monkeypatch):
    monkeypatch.setattr(Sample, "trust", lambda sample: len(sample.features) / 100)
    net, held = trained().eval(), loader(40, seed=2)
    knn = SampledKNN(net.features, 3).fit(loader(100, seed=1))
    net.keep_training(net.features(images(25)[0]).detach(), None)
    found = Combined([theirs.EnergyBased(net), knn, TIEDetector(net)], 0.1).fit(held)
    assert found.reference.weights.tolist() == [1, 0.25, 0.125]


@pytest.mark.parametrize("by", [chosen_by, own_by])
def test_false_alarm_rate_where_trust_is_estimated(by):
    alarms, shares = [], []
    sample, layer = world(3, 60, 1.5)
    for new in world(3, 40_000, 1.5, seed=1)[0].features.view(100, 400, -1):
        found, share = by(sample, layer, new[:40])
        scores = found.predict_scores(found.score_outputs(given(new[40:], layer)))
        alarms.append((scores > found.threshold).float().mean())
        shares.append(share)
    rates, trusted = torch.stack(alarms), torch.tensor(shares)
    assert (trusted.unique().numel() > 10) == (by is own_by)  # it differs between draws
    # Of the 20 images of the threshold half one is above it: 2 / 21 of new ones are.
    assert abs(rates.mean() - 2 / 21) < 3 * rates.std() / len(rates) ** 0.5


def test_few_training_images_and_bad_arguments():
    net, held = trained().eval(), loader(40)
    few = [(x.flip(3), y) for x, y in loader(4)]
    found = combine(net, train_loader=few, calibration_loader=held)
    assert found(X).isfinite().all()
    for arguments, message in (
        ({"train_loader": loader(1)}, "at least two training images for KNN, but got 1"),
        ({"train_loader": held}, r"Expected calibration images .*, but got the training images"),
        ({"rule": "sum"}, "Expected a rule"),
        ({}, r"kept features .*; give train_loader=\.\.\."),
    ):
        with pytest.raises(ValueError, match=message):
            combine(net, calibration_loader=held, **arguments)
    with pytest.raises(TypeError):
        combine(net, held)  # type: ignore[misc]


@pytest.mark.parametrize("labelled", [True, False])
def test_features_that_attach_kept_and_saved(labelled, tmp_path):
    model, data = Small(N).eval(), list(loader(100, seed=1))
    data = data if labelled else [x for x, _ in data]
    net = attach(model, data, N, head_config=HeadConfig(steps=5, max_images=40))
    assert (net.train_features.shape, net.train_labels is None) == ((100, 48), not labelled)
    kept = combine(net, calibration_loader=loader(40))
    read = combine(net, calibration_loader=loader(40), train_loader=data)
    torch.testing.assert_close(kept(X), read(X), rtol=1e-3, atol=1e-3)
    net.save(tmp_path / "net")
    again = TIENet.load(tmp_path / "net", model)
    assert torch.equal(combine(again, calibration_loader=loader(40))(X), kept(X))
    assert not any("train_" in name for name in kept.export_module().state_dict())
    bare, weights = TIENet(model, N, SHAPE, head=net.garbage), net.state_dict()
    bare.load_state_dict(weights)
    assert torch.equal(bare.train_features, net.train_features)
    bare.load_state_dict({name: of for name, of in weights.items() if "train_" not in name})
    assert bare.train_features is bare.train_labels is None
    TIETrainer(again, TINY, [], [Noise(again)]).epoch([images()])
    assert again.train_features is None  # of weights that are no more


@pytest.mark.parametrize("change", ["nan", "size", "labels", "alone"])
def test_errors_of_damaged_training_features(change, tmp_path):
    net = trained().eval()
    features, labels = torch.rand(6, net.feature_size), torch.arange(6) % N
    if change == "nan":
        features[0] = torch.nan
    features = None if change == "alone" else features[:, int(change == "size") :]
    net.keep_training(features, labels + N * (change == "labels"))
    net.save(tmp_path / "net")
    with pytest.raises(ValueError, match="features or labels of training images"):
        TIENet.load(tmp_path / "net")


def test_sample_of_features_is_the_same_each_time():
    z, y = torch.randn(60, 4), torch.arange(60) % 2
    state = torch.get_rng_state()
    samples = [sample_features([(Outputs(z, z), y)], 20).features for _ in range(2)]
    assert torch.equal(*samples)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("images", "kept", "k"), [(2500, 2000, 20), (300, 300, 3), (20, 20, 1)])
def test_neighbours_by_the_number_of_training_images(images, kept, k):
    fitted = fit_knn(torch.randn(images, 4))
    assert (len(fitted.sample), fitted.k) == (kept, k)
