"""OpenOOD's postprocessors of ours: scores, what is fitted to ID images, configs."""

import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import set_head_defaults
from torch import nn
from torch.utils.data import DataLoader

from hosts.openood.conftest import (
    Images,
    Unread,
    build,
    config,
    id_loaders,
    lenet,
    postprocessor,
)
from tie_ext import Combined, TIEDetector
from tie_ext.pytorch_ood import MahalanobisPlusPlus
from tie_ext.scores.combination import RULES
from tie_ext.scores.decision import ood_score, uncertainty

pytestmark = pytest.mark.filterwarnings("ignore")
SHORT = {"dmr": {"vae_epochs": 1, "epochs": 1}}


def test_conf_is_the_negative_score(openood):
    net, x = build().eval(), torch.rand(5, 3, 28, 28)
    for t in (0.5, 1.0):
        pred, conf = postprocessor("tie", t=t).postprocess(net, x)
        torch.testing.assert_close(conf, -ood_score(net(x, garbage=True), t))
        assert torch.equal(pred, net(x).argmax(1))
    for of in (net, lenet(10)):
        conf = postprocessor("tie_ue").postprocess(of, x)[1]
        torch.testing.assert_close(conf, -uncertainty(of(x).softmax(1)))
    with pytest.raises(TypeError, match="Expected network tie_net"):
        openood.TIEPostprocessor().postprocess(lenet(), x)


def test_ue_ranks_as_gen_of_all_classes(openood):
    from openood.postprocessors import GENPostprocessor

    settings = {"postprocessor_args": {"gamma": 1, "M": 10}, "postprocessor_sweep": {}}
    logits, net = 5 * torch.randn(50, 10), nn.Identity()
    ue = openood.TIEUEPostprocessor().postprocess(net, logits)[1]
    gen = GENPostprocessor(config({"postprocessor": settings})).postprocess(net, logits)[1]
    torch.testing.assert_close(ue, gen * 10 / 9)


def features_of(net, x):
    return net(x, return_feature=True)[1]


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("network", ["tie_net", "lenet"])
def test_combination_of_scores_of_pytorch_ood(openood, network, rule):
    net = build(num_classes=3) if network == "tie_net" else lenet().train()
    loaders, passes, x = (
        id_loaders(),
        [],
        next(iter(DataLoader(Images(9, 3, seed=500), 9)))["data"],
    )
    post = postprocessor("tie_combined", rule=rule)
    post.setup(net, loaders, Unread())
    assert net.training  # its mode is the caller's
    net.eval()
    inner = net.backbone if network == "tie_net" else net
    handle = inner.register_forward_hook(lambda *_: passes.append(1))
    pred, conf = post.postprocess(net, x)
    handle.remove()
    assert len(passes) == 1
    assert torch.equal(pred, net(x).argmax(1))
    post.setup(net, {}, {})  # once
    assert torch.equal(post.postprocess(net, x)[1], conf)

    features = partial(features_of, net)
    knn = [theirs.KNN(features, k=1)]  # the nearest of 150
    trusted = "SampledKNN" in [type(member).__name__ for member in post.combined.detectors]
    others = [MahalanobisPlusPlus(features), theirs.fDBD(features, net.fc)]
    train, val = ([(b["data"], b["label"]) for b in loaders[of]] for of in ("train", "val"))
    for member in (*knn, *others):
        member.fit(train)
    members = [*([TIEDetector(net)] if network == "tie_net" else []), *(knn if trusted else [])]
    expected = Combined([*members, theirs.EnergyBased(net), *others], None, rule)
    expected.fit(val)
    torch.testing.assert_close(conf, -expected(x), rtol=1e-2, atol=5e-2)  # of small deviations


@pytest.mark.parametrize(("old", "new"), [("stouffer", "zsum"), ("fisher", "fisher")])
def test_rules_in_configs_of_earlier_versions(openood, old, new):
    assert postprocessor("tie_combined", rule=old).rule == new
    with pytest.raises(ValueError, match="one of tail, "):
        postprocessor("tie_combined", rule="mean")


class Otherwise(nn.Module):
    """Its last layer has a name of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(147, 12), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, x, return_feature=False):
        h = self.body(x)
        return (self.head(h), h) if return_feature else self.head(h)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: build(num_classes=3), ""),
        (lenet, "LeNet has no garbage class.*combines without one.*openood attach.*\n$"),
        (Otherwise, "Otherwise has no linear last layer.*without fDBD"),
    ],
)
def test_lines_on_members_that_are_missing(openood, capsys, make, said):
    post, net = openood.CombinedPostprocessor(), make()
    post.setup(net, id_loaders(), Unread())
    out = capsys.readouterr().out
    assert re.search(said, out)
    assert bool(out) == bool(said)
    members = [type(member).__name__ for member in post.combined.detectors]
    assert ("BoundaryDistance" in members) == (make is not Otherwise)
    assert post.postprocess(net, torch.rand(4, 3, 28, 28))[1].isfinite().all()


@pytest.mark.parametrize("name", ["tie_combined", "attach", "dmr"])
def test_errors_before_setup_and_of_few_images(openood, name):
    post = postprocessor(name)
    with pytest.raises(RuntimeError, match="set up"):
        post.postprocess(lenet(), torch.rand(2, 3, 28, 28))
    if name == "tie_combined":
        few = {**id_loaders(), "train": DataLoader(Images(1, 3))}
        with pytest.raises(ValueError, match="at least two training images for KNN, but got 1"):
            post.setup(lenet(), few, Unread())


def moved(x):
    return (x + torch.rand(())).clamp(0, 1)


def prepared(augmented: bool) -> dict:
    """ID loaders as ``main.py`` has them, or as the evaluation API has them."""
    changed, transforms = (moved, (object(), object())) if augmented else (None, (None, None))
    train = Images(150, 3, changed, transforms[0])
    val = DataLoader(Images(150, 3, None, transforms[1], seed=1000), 40)
    return {"train": DataLoader(train, 40 if augmented else 50, shuffle=augmented), "val": val}


def test_images_of_every_loader_in_one_order(openood):
    from tie_ext.openood.loaders import PlainImages

    read = []
    for augmented in (True, False):
        loaders = prepared(augmented)
        batches = list(PlainImages(loaders["train"], loaders["val"]))
        read.append([torch.cat(parts) for parts in zip(*batches, strict=True)])
    assert all(map(torch.equal, *read))
    x, y = read[0]
    assert y.bincount().tolist() == [50, 50, 50]
    assert not torch.equal(y, torch.arange(150) % 3)
    expected = torch.stack([Images(150, 3)[i]["data"] for i in range(150)])
    assert torch.equal(x.flatten(1).sum(1).sort().values, expected.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize("name", ["tie_combined", "attach", "dmr"])
def test_fits_are_alike_in_every_script(openood, monkeypatch, name):
    import tie_ext.openood.combined as combined

    few = partial(combined.sample_features, max_samples=40)  # fewer than the images
    monkeypatch.setattr(combined, "sample_features", few)
    set_head_defaults(monkeypatch, steps=20)
    net = lenet() if name == "attach" else build(num_classes=3).eval()
    before = [v.clone() for v in net.parameters()]
    x, found = torch.rand(9, 3, 28, 28), []
    for seed, augmented in enumerate((True, True, False)):
        torch.manual_seed(seed)
        post = postprocessor(name, **SHORT.get(name, {}))
        post.setup(net, prepared(augmented), Unread())
        pred, conf = post.postprocess(net, x)
        found.append(conf)
        assert torch.equal(pred, net(x).argmax(1))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert all(map(torch.equal, net.parameters(), before))


@pytest.mark.parametrize("name", ["tie_combined", "tie_ue", "dmr"])
def test_postprocessors_search_for_nothing(openood, capsys, name):
    from openood.evaluators.ood_evaluator import OODEvaluator

    net, loaders, x = build(num_classes=3).eval(), id_loaders(), torch.rand(4, 3, 28, 28)
    ood = [{"data": torch.rand(20, 3, 28, 28), "label": -torch.ones(20).long()}]
    post = postprocessor(name, aps=True, **SHORT.get(name, {}))
    post.setup(net, loaders, Unread())
    before = post.postprocess(net, x)[1]
    OODEvaluator(config({})).hyperparam_search(net, loaders["val"], ood, post)
    assert capsys.readouterr().out.count(f"{name} has nothing to search for") == 2
    again = pickle.loads(pickle.dumps(post))  # OpenOOD keeps what it has searched
    for of in (post, again):
        assert torch.equal(of.postprocess(net, x)[1], before)


@pytest.mark.parametrize(
    ("transform", "dataset", "low"),
    [
        ("cifar10", None, -0.4914 / 0.2470),
        (None, {"name": "cifar100"}, -0.5071 / 0.2675),
        (None, {"name": "a", "normalization_type": "b"}, -1.0),
        (None, None, -1.0),
    ],
)
def test_value_range_of_loaders_and_configs(openood, transform, dataset, low):
    from openood.evaluation_api.preprocessor import get_default_preprocessor

    from tie_ext.openood.loaders import value_range_of

    transform = transform and get_default_preprocessor(transform)
    loader = DataLoader(Images(transform=transform))
    found, high = value_range_of(loader, dataset and config(dataset))
    assert len(found) == len(high) == 3
    assert found[0] == pytest.approx(low)


def test_defaults_are_those_of_the_shipped_file(openood, tmp_path, monkeypatch):
    ours = openood.TIEPostprocessor
    assert ours().t == 1.0
    assert openood.DMRPostprocessor().parameters == {"k": 5, "vae_epochs": 10, "epochs": 10}
    assert not openood.TIEUEPostprocessor().APS_mode
    (tmp_path / "tie.yml").write_text(Path(ours.config_path).read_text().replace("1.0", "0.5"))
    monkeypatch.setattr(ours, "config_path", str(tmp_path / "tie.yml"))
    assert ours().t == 0.5
