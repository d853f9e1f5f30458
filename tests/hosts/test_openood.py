"""TIE in a real OpenOOD: names, training, scoring, configs, and what surrounds them.

A checkout is looked for as an importable ``openood``, else at $OPENOOD_ROOT (default ~/OpenOOD);
without one, or without the packages it imports, these tests are skipped and say so.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import set_head_defaults
from torch import nn

from tie_ext.models.head import GarbageHead
from tie_ext.scores.decision import ood_score, uncertainty

pytestmark = pytest.mark.filterwarnings("ignore")
CONFIGS = Path(__file__).parents[2] / "openood_configs"


@pytest.fixture(scope="session")
def root(openood_root) -> Path:
    return openood_root


@pytest.fixture
def openood(root, monkeypatch):
    """OpenOOD imported, with TIE registered, without CUDA; all undone afterwards."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import openood
        import openood.evaluation_api
        import openood.pipelines

        import tie_ext.openood as ours
    with ours.without_cuda(wanted=False):
        ours.register()
        yield openood
        ours.unregister()


def network_config(**changes):
    from openood.utils.config import Config

    count = changes.get("num_classes", 10)
    inner = {"name": "lenet", "num_classes": count, "num_gpus": 1, "pretrained": False}
    whole = {
        "name": "tie_net",
        "num_classes": 10,
        "image_size": 28,
        "normalization_type": "mnist",
        "num_gpus": 1,
        "pretrained": False,
    }
    return Config(
        {**whole, **changes, "backbone": {**inner, "name": changes.get("backbone", "lenet")}}
    )


def build(**changes):
    from openood.networks import get_network

    torch.manual_seed(0)
    return get_network(network_config(**changes))


# Without an OpenOOD.


def test_the_launcher_says_what_it_wants():
    for arguments in ([], ["no_such_script.py"]):
        run = subprocess.run(
            [sys.executable, "-m", "tie_ext.openood", *arguments], capture_output=True, text=True
        )
        assert run.returncode
        assert "Expected attach or one of OpenOOD's scripts" in run.stderr


def test_without_cuda_is_undone_and_leaves_a_gpu_alone(monkeypatch):
    from tie_ext.openood.cpu import without_cuda

    def patched():
        return (
            torch.Tensor.cuda,
            nn.Module.cuda,
            torch.load,
            torch.cuda.FloatTensor,
            len(torch.overrides._get_current_function_mode_stack()),
        )

    before = patched()
    with without_cuda(wanted=False):
        assert (
            torch.zeros(2).cuda().device.type == nn.Linear(1, 1).cuda().weight.device.type == "cpu"
        )
    assert patched() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with without_cuda(wanted=True):
        assert patched() == before
    with pytest.raises(KeyError), without_cuda(wanted=False):
        raise KeyError
    assert patched() == before


def test_without_cuda_reads_onto_the_cpu_what_runs_no_code_unless_a_caller_says_otherwise(
    monkeypatch,
):
    from tie_ext.openood.cpu import without_cuda

    asked = []
    monkeypatch.setattr(torch, "load", lambda path, **how: asked.append(how))
    own = {"map_location": "meta", "weights_only": False}
    with without_cuda(wanted=False):
        torch.load("network.ckpt")
        torch.load("network.ckpt", **own)
    assert asked == [{"map_location": "cpu", "weights_only": True}, own]


# Registration.


def test_registering_reaches_every_place_that_holds_a_name(openood):
    import openood.evaluation_api.evaluator
    import openood.networks.utils
    import openood.pipelines.test_ood_pipeline
    import openood.pipelines.train_pipeline as pipeline
    import openood.postprocessors.utils
    import openood.trainers.utils

    assert (
        pipeline.get_trainer is openood.trainers.get_trainer is openood.trainers.utils.get_trainer
    )
    assert (
        pipeline.get_network is openood.networks.get_network is openood.networks.utils.get_network
    )
    assert (
        openood.pipelines.test_ood_pipeline.get_postprocessor
        is openood.postprocessors.utils.get_postprocessor
    )
    assert (
        openood.evaluation_api.evaluator.get_postprocessor
        is openood.evaluation_api.postprocessor.get_postprocessor
    )
    for function in (
        pipeline.get_trainer,
        pipeline.get_network,
        openood.postprocessors.get_postprocessor,
    ):
        assert function.__wrapped__.__module__ == function.__module__
    assert {"tie", "tie_ue", "tie_combined", "dmr"} <= set(
        openood.evaluation_api.postprocessor.postprocessors
    )


def test_registering_twice_is_registering_once_and_can_be_undone(openood):
    import openood.postprocessors.info as info
    import openood.trainers as trainers

    import tie_ext.openood as ours

    once = trainers.get_trainer
    ours.register()
    assert trainers.get_trainer is once
    ours.unregister()
    assert not ours.registered()
    assert not hasattr(trainers.get_trainer, "__wrapped__")
    assert "tie" not in openood.evaluation_api.postprocessor.postprocessors
    assert set(info.num_classes_dict) == {"cifar10", "cifar100", "imagenet200", "imagenet"}
    ours.unregister()


def test_built_ins_stay_what_they_were(openood):
    from openood.networks import get_network
    from openood.networks.lenet import LeNet
    from openood.postprocessors import BasePostprocessor, get_postprocessor
    from openood.utils.config import Config

    assert type(get_network(Config(name="lenet", num_classes=10, num_gpus=1))) is LeNet
    assert type(get_postprocessor(Config({"postprocessor": {"name": "msp"}}))) is BasePostprocessor
    with pytest.raises(KeyError):
        get_postprocessor(Config({"postprocessor": {"name": "no_such_method"}}))
    with pytest.raises(Exception, match="Unexpected Network"):
        get_network(Config(name="no_such_net", num_classes=10))


# Network.


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("lenet", 28), ("resnet18_32x32", 32), ("resnet18_64x64", 64), ("wrn", 32), ("conv3", 28)],
)
def test_a_network_answers_all_that_postprocessors_ask_of_it(openood, backbone, size):
    net, x = build(backbone=backbone, image_size=size).eval(), torch.rand(2, 3, size, size)
    logits, h = net(x, return_feature=True)
    assert net(x).shape == logits.shape == (2, 10)
    assert net(x, garbage=True).shape == (2, 11)
    assert h.shape == (2, net.feature_size)
    weight, bias = net.get_fc()
    torch.testing.assert_close(
        h @ torch.tensor(weight).T + torch.tensor(bias), logits, rtol=1e-4, atol=1e-5
    )
    assert net.get_fc_layer() is net.fc
    torch.testing.assert_close(net.forward_threshold(x, 1e9), logits)
    if backbone not in ("conv3", "wrn"):  # whose own forward has no return_feature_list
        again, maps = net(x, return_feature_list=True)
        torch.testing.assert_close(again, logits)
        torch.testing.assert_close(maps[-1].flatten(1), h)
    if backbone.startswith("resnet18_32"):
        assert net.intermediate_forward(x, 4).shape[:2] == (2, 512)
        assert isinstance(net.avgpool, nn.AdaptiveAvgPool2d)
    with pytest.raises(AttributeError):
        net.no_such_layer  # noqa: B018


@pytest.mark.parametrize(
    ("backbone", "size", "layers"), [("lenet", 28, 2), ("resnet18_32x32", 32, 8)]
)
def test_a_config_asks_for_a_head_on_every_layer(openood, backbone, size, layers):
    net = build(backbone=backbone, image_size=size, head="multilayer").eval()
    assert isinstance(net.garbage, GarbageHead)
    assert len(net.garbage.layers) == layers
    x = torch.rand(2, 3, size, size)
    every, _ = net(x, return_feature_list=True, garbage=True)
    torch.testing.assert_close(every, net(x, garbage=True))
    assert torch.equal(every[:, :-1], net(x))
    assert isinstance(build(backbone=backbone, image_size=size).garbage, torch.nn.Linear)


def test_a_networks_value_range_is_that_of_the_normalised_images(openood):
    net = build(backbone="resnet18_32x32", image_size=32, normalization_type="cifar10")
    torch.testing.assert_close(
        net.low.flatten(), torch.tensor([-0.4914 / 0.2470, -0.4822 / 0.2435, -0.4465 / 0.2616])
    )
    torch.testing.assert_close(
        net.high.flatten(),
        torch.tensor([(1 - 0.4914) / 0.2470, (1 - 0.4822) / 0.2435, (1 - 0.4465) / 0.2616]),
    )
    assert build().low.flatten().tolist() == [-1, -1, -1]


def test_a_checkpoint_is_read_without_running_code(openood, tmp_path):
    import pickle

    net = build()
    net.tau.fill_(0.25)
    torch.save(net.state_dict(), tmp_path / "best.ckpt")
    again = build(pretrained=True, checkpoint=str(tmp_path / "best.ckpt"))
    assert again.tau == 0.25
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    (tmp_path / "hostile.ckpt").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(pickle.UnpicklingError):
        build(pretrained=True, checkpoint=str(tmp_path / "hostile.ckpt"))


@pytest.mark.parametrize(("version", "head"), [("0.1.0", "linear"), ("0.2.0", "multilayer")])
def test_a_checkpoint_of_before_scores_the_same(openood, version, head):
    data = Path(__file__).parents[1] / "data"
    saved = data / f"saved_by_{version}" / "openood_tie_net.ckpt"
    net = build(num_classes=3, head=head, pretrained=True, checkpoint=str(saved))
    logits = torch.tensor(json.loads(saved.with_suffix(".json").read_text())["logits"])
    x = torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28).sin()
    torch.testing.assert_close(net.eval()(x, garbage=True), logits, rtol=1e-5, atol=2e-6)
    assert (net.tau, net.autocast_dtype) == (0.25, "float32")


def test_rules_of_0_2_0_in_configs(openood):
    from openood.utils.config import Config

    from tie_ext.openood import CombinedPostprocessor

    for old, new in (("stouffer", "zsum"), ("fisher", "fisher")):
        named = {"name": "tie_combined", "postprocessor_args": {"rule": old}}
        post = CombinedPostprocessor(Config({"postprocessor": named}))
        post.setup(build(num_classes=3), id_loaders(), Unread())
        assert post.combined.rule == new


def test_features_are_clipped_at_the_threshold_of_react(openood):
    net, x = build().eval(), torch.rand(2, 3, 28, 28)
    clipped = net.fc(net.features(x).clamp(max=0.01))
    torch.testing.assert_close(net.forward_threshold(x, 0.01), clipped)
    assert not torch.equal(clipped, net(x))


def test_a_classifier_without_bias_has_a_bias_of_zeros(openood):
    from openood.networks.lenet import LeNet

    from tie_ext.openood import OpenOODTIENet

    backbone = LeNet(3)
    backbone.fc = nn.Linear(84, 3, bias=False)
    weight, bias = OpenOODTIENet(backbone, 3, (3, 28, 28)).get_fc()
    assert (weight.tolist(), bias.tolist()) == (backbone.fc.weight.tolist(), [0, 0, 0])


# Postprocessors.


def test_conf_is_the_negative_score(openood):
    from openood.postprocessors import get_postprocessor
    from openood.utils.config import Config

    net, x = build().eval(), torch.rand(5, 3, 28, 28)
    logits = net(x, garbage=True)
    for t in (0.5, 1.0):
        settings = {
            "name": "tie",
            "APS_mode": False,
            "postprocessor_args": {"t": t},
            "postprocessor_sweep": {"t": [1.0]},
        }
        pred, conf = get_postprocessor(Config({"postprocessor": settings})).postprocess(net, x)
        torch.testing.assert_close(conf, -ood_score(logits, t))
        assert torch.equal(pred, net(x).argmax(1))
    pred, conf = get_postprocessor(
        Config({"postprocessor": {"name": "tie_ue", "APS_mode": False}})
    ).postprocess(net, x)
    torch.testing.assert_close(conf, -uncertainty(net(x).softmax(1)))


def test_tie_asks_for_a_tie_net_and_tie_ue_does_not(openood):
    from openood.networks.lenet import LeNet

    from tie_ext.openood import TIEPostprocessor, TIEUEPostprocessor

    with pytest.raises(TypeError, match="Expected network tie_net"):
        TIEPostprocessor().postprocess(LeNet(10), torch.rand(1, 3, 28, 28))
    assert TIEUEPostprocessor().postprocess(LeNet(10), torch.rand(2, 3, 28, 28))[1].shape == (2,)


def test_dmr_learns_a_rejection_network_and_leaves_the_classifier_as_it_is(openood):
    from openood.networks.lenet import LeNet

    from tie_ext.openood import DMRPostprocessor

    torch.manual_seed(0)
    net = LeNet(3).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = torch.rand(24, 3, 28, 28), torch.arange(24) % 3
    post = DMRPostprocessor()
    with pytest.raises(RuntimeError, match="set up"):
        post.postprocess(net, x)
    post.setup(
        net, {"train": [{"data": x[:12], "label": y[:12]}, {"data": x[12:], "label": y[12:]}]}, {}
    )
    pred, conf = post.postprocess(net, x)
    assert torch.equal(pred, net(x).argmax(1))
    assert conf.shape == (24,)
    assert conf.isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


class Unread(dict):
    """OOD loaders that nobody may look at."""

    def __getitem__(self, key):
        raise AssertionError(f"OOD loader {key} was read")

    __iter__ = items = values = keys = get = __getitem__


def id_loaders(classes: int = 3) -> dict:
    def batches(count, seed):
        rng = torch.Generator().manual_seed(seed)
        y = torch.arange(count) % classes
        x = torch.rand(count, 3, 28, 28, generator=rng) * (1 + y.view(-1, 1, 1, 1)) / classes
        return [{"data": a, "label": b} for a, b in zip(x.split(16), y.split(16), strict=True)]

    return {"train": batches(150, 0), "val": batches(40, 1)}


@pytest.mark.parametrize("rule", ["tails", "zsum", "max"])
@pytest.mark.parametrize("network", ["tie_net", "lenet"])
def test_combined_is_the_rule_on_scores_that_id_images_scale(openood, network, rule):
    from openood.networks.lenet import LeNet
    from openood.postprocessors import get_postprocessor
    from openood.utils.config import Config

    from tie_ext.scores.combination import RULES, reference
    from tie_ext.scores.mahalanobis import fit_gaussians

    torch.manual_seed(0)
    net = build() if network == "tie_net" else LeNet(3)
    loaders, x = id_loaders(), torch.rand(9, 3, 28, 28)
    settings = {"name": "tie_combined", "APS_mode": False, "postprocessor_args": {"rule": rule}}
    post = get_postprocessor(Config({"postprocessor": settings}))
    with pytest.raises(RuntimeError, match="set up"):
        post.postprocess(net, x)
    post.setup(net, loaders, Unread())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    passes = []
    (net.backbone if network == "tie_net" else net).register_forward_hook(
        lambda *_: passes.append(1)
    )
    pred, conf = post.postprocess(net, x)
    assert len(passes) == 1
    assert torch.equal(pred, net(x).argmax(1))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())

    unit = torch.nn.functional.normalize
    (z, y), (val, labels) = [
        (torch.cat([of["data"] for of in batches]), torch.cat([of["label"] for of in batches]))
        for batches in (loaders["train"], loaders["val"])
    ]
    train = net(z, return_feature=True)[1].detach()
    gaussians = fit_gaussians(unit(train), y, shrinkage=True)

    def distances(h):
        return torch.cdist(unit(h).double(), unit(train).double()).float()

    def fdbd(logits, h):
        gaps = torch.cdist(net.fc.weight, net.fc.weight) + torch.eye(len(net.fc.weight))
        margin, label = logits.max(1, keepdim=True)
        far = ((margin - logits) / gaps[label[:, 0]]).sum(1) / (len(gaps) - 1)
        return -far / (h - train.mean(0)).norm(dim=1)

    def scores(x):
        logits, h = net(x, return_feature=True)
        own = [ood_score(net(x, garbage=True))] if network == "tie_net" else []
        knn = [distances(h).amin(dim=1)] if trusted else []  # the nearest of 150
        plus, energy = gaussians.distance(unit(h)), -logits.logsumexp(1)
        return torch.stack([*own, *knn, energy, plus, fdbd(logits, h)], 1).detach()

    logits, h = net(val, return_feature=True)
    votes = y[distances(h).argsort(1)[:, :5]].mode(1).values
    trusted = (votes == labels).sum() >= 0.95 * (logits.argmax(1) == labels).sum() > 0
    weights = torch.tensor([0.0] * (network == "tie_net") + [2.0] * trusted + [1, 0, 1])
    expected = -RULES[rule](reference(scores(val), weights), scores(x))
    torch.testing.assert_close(conf, expected, rtol=1e-2, atol=5e-2)  # of small deviations


def test_combined_says_that_it_finds_no_last_layer(openood, capsys):
    from tie_ext.openood import CombinedPostprocessor

    class Otherwise(nn.Module):
        """Its last layer has a name of its own."""

        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(147, 12), nn.ReLU())
            self.head = nn.Linear(12, 3)

        def forward(self, x, return_feature=False):
            h = self.body(x)
            return (self.head(h), h) if return_feature else self.head(h)

    torch.manual_seed(0)
    post = CombinedPostprocessor()
    post.setup(Otherwise(), id_loaders(), Unread())
    _, line = capsys.readouterr().out.splitlines()
    assert re.search("Otherwise has no linear last layer.*without fDBD", line)
    assert "BoundaryDistance" not in [type(m).__name__ for m in post.combined.detectors]
    assert post.postprocess(Otherwise(), torch.rand(4, 3, 28, 28))[1].isfinite().all()


def test_combined_sets_up_once_and_says_what_it_cannot_use(openood):
    from openood.networks.lenet import LeNet
    from openood.utils.config import Config

    from tie_ext.openood import CombinedPostprocessor

    torch.manual_seed(0)
    net, x = LeNet(3), torch.rand(4, 3, 28, 28)
    post = CombinedPostprocessor()
    post.setup(net, id_loaders(), Unread())
    assert net.training  # its mode is the caller's
    net.eval()
    conf = post.postprocess(net, x)[1]
    post.setup(net, {}, {})
    assert torch.equal(post.postprocess(net, x)[1], conf)
    with pytest.raises(ValueError, match="one of tails"):
        CombinedPostprocessor(
            Config(
                {"postprocessor": {"name": "tie_combined", "postprocessor_args": {"rule": "mean"}}}
            )
        )
    without = {
        **id_loaders(),
        "train": [{"data": torch.rand(1, 3, 28, 28), "label": torch.tensor([0])}],
    }
    with pytest.raises(ValueError, match="at least two training images for KNN, but got 1"):
        CombinedPostprocessor().setup(net, without, Unread())


class Prepared(torch.utils.data.Dataset):
    """150 images; ``data`` is augmented at random where the transform of the data set says so."""

    def __init__(self, augmented: bool, transform: object):
        self.augmented, self.preprocessor = augmented, transform

    def __len__(self):
        return 150

    def __getitem__(self, i):
        x = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(i))
        x = x * (1 + i % 3) / 3
        noise = torch.rand(()) if self.augmented else torch.zeros(())
        return {"data": (x + noise).clamp(0, 1), "data_aux": x, "label": i // 50}


def prepared(augmented: bool) -> dict:
    """ID loaders as ``main.py`` has them, or as the evaluation API has them."""
    train, val = (object(), object()) if augmented else (None, None)
    data = Prepared(augmented, train), Prepared(False, val)
    sizes = [{"batch_size": 40, "shuffle": True}, {"batch_size": 40}]
    if not augmented:
        sizes = [{"batch_size": 50}, {"batch_size": 50}]
    loaders = [torch.utils.data.DataLoader(of, **how) for of, how in zip(data, sizes, strict=True)]
    return dict(zip(("train", "val"), loaders, strict=True))


def test_images_are_read_alike_from_every_loader(openood):
    from tie_ext.openood.loaders import PlainImages

    read = []
    for augmented in (True, False):
        loaders = prepared(augmented)
        batches = list(PlainImages(loaders["train"], loaders["val"]))
        read.append([torch.cat(parts) for parts in zip(*batches, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*read, strict=True))
    x, y = read[0]
    assert y.bincount().tolist() == [50, 50, 50]
    assert (y[1:] != y[:-1]).sum() > 50  # not sorted by class
    inside = {tuple(image.flatten()[:3].tolist()) for image in x}
    expected = (Prepared(False, None)[i]["data"] for i in range(150))
    assert inside == {tuple(image.flatten()[:3].tolist()) for image in expected}


@pytest.mark.parametrize("name", ["tie_combined", "attach", "dmr"])
def test_a_postprocessor_is_fitted_alike_in_every_script(openood, monkeypatch, name):
    from openood.networks.lenet import LeNet

    import tie_ext.openood.combined as combined
    from tie_ext.openood.registry import POSTPROCESSORS

    few = partial(combined.sample_features, max_samples=40)  # fewer than the images
    monkeypatch.setattr(combined, "sample_features", few)
    set_head_defaults(monkeypatch, steps=20)
    x = torch.rand(9, 3, 28, 28)
    net = (LeNet(3) if name == "attach" else build(num_classes=3)).eval()
    found = []
    for seed, augmented in enumerate((True, True, False)):
        torch.manual_seed(seed)
        post = POSTPROCESSORS[name]()
        post.setup(net, prepared(augmented), Unread())
        found.append(post.postprocess(net, x)[1])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_combined_says_that_a_network_has_no_garbage_class(openood, capsys):
    from openood.networks.lenet import LeNet

    from tie_ext.openood import CombinedPostprocessor

    CombinedPostprocessor().setup(build(), id_loaders(), Unread())
    assert capsys.readouterr().out == ""
    CombinedPostprocessor().setup(LeNet(3), id_loaders(), Unread())
    (line,) = capsys.readouterr().out.splitlines()
    assert re.search("LeNet has no garbage class.*combines without one.*openood attach", line)


@pytest.mark.parametrize("name", ["tie_combined", "tie_ue", "dmr"])
def test_nothing_is_searched_for_and_a_line_says_so(openood, capsys, name):
    import pickle

    from openood.evaluators.ood_evaluator import OODEvaluator
    from openood.utils.config import Config

    from tie_ext.openood.registry import POSTPROCESSORS

    net, loaders, x = build(num_classes=3).eval(), id_loaders(), torch.rand(4, 3, 28, 28)
    ood = [{"data": torch.rand(20, 3, 28, 28), "label": -torch.ones(20).long()}]
    post = POSTPROCESSORS[name](Config({"postprocessor": {"name": name, "APS_mode": True}}))
    post.setup(net, loaders, Unread())
    before = post.postprocess(net, x)[1]
    OODEvaluator(Config({})).hyperparam_search(net, loaders["val"], ood, post)
    assert capsys.readouterr().out.count(f"{name} has nothing to search for") == 2
    again = pickle.loads(pickle.dumps(post))  # OpenOOD keeps what it has searched
    for of in (post, again):
        assert torch.equal(of.postprocess(net, x)[1], before)


def test_both_hosts_measure_the_same_on_the_same_scores(openood):
    from openood.evaluators.metrics import compute_all_metrics
    from pytorch_ood.metrics import OODMetrics

    score = torch.randn(400) + torch.arange(400).ge(300) * 1.5
    label = torch.where(torch.arange(400) < 300, 1, -1)
    fpr, auroc, aupr_in, aupr_out, _ = compute_all_metrics(
        -score.numpy(), label.numpy(), label.numpy()
    )
    theirs = OODMetrics()
    theirs.update(score, label)
    found = theirs.compute()
    assert found["AUROC"] == pytest.approx(auroc, abs=1e-5)
    assert found["AUPR-IN"] == pytest.approx(aupr_in, abs=1e-5)
    assert found["AUPR-OUT"] == pytest.approx(aupr_out, abs=1e-5)
    assert found["FPR95TPR"] == pytest.approx(fpr, abs=1e-5)


def test_the_evaluation_api_takes_the_postprocessor_by_name_and_by_instance(openood, monkeypatch):
    import openood.evaluation_api.evaluator as evaluator

    from tie_ext.openood import TIEPostprocessor

    def loader(offset, label):
        rng = torch.Generator().manual_seed(offset)
        return [
            {
                "data": torch.rand(20, 3, 32, 32, generator=rng) * (1 - offset / 9),
                "label": torch.full((20,), label),
            }
            for _ in range(2)
        ]

    loaders = {
        "id": {split: loader(0, 3) for split in ("train", "val", "test")},
        "csid": {},
        "ood": {"val": loader(1, -1), "near": {"a": loader(2, -1)}, "far": {"b": loader(3, -1)}},
    }
    monkeypatch.setattr(evaluator, "data_setup", lambda *_: None)
    monkeypatch.setattr(evaluator, "get_id_ood_dataloader", lambda *_, **__: loaders)
    net = build(backbone="resnet18_32x32", image_size=32, normalization_type="cifar10")
    by_name = evaluator.Evaluator(
        net, "cifar10", config_root="nowhere", postprocessor_name="tie"
    ).eval_ood(progress=False)
    by_instance = evaluator.Evaluator(net, "cifar10", postprocessor=TIEPostprocessor()).eval_ood(
        progress=False
    )
    assert by_name.equals(by_instance)
    assert list(by_name.index) == ["a", "nearood", "b", "farood"]
    assert by_name.AUROC.between(0, 100).all()


# Trainer.


def test_a_networks_precision_holds_in_every_way_through_it(openood):
    net, x = build(backbone="resnet18_32x32").eval(), torch.rand(2, 3, 28, 28)
    full = net(x)
    net.autocast_dtype = "bfloat16"
    assert torch.equal(net(x, return_feature_list=True)[0], net(x))
    assert not torch.equal(net(x), full)
    net.double()
    assert net(x, return_feature_list=True)[0].dtype == torch.float64


def trainer_config(**changes):
    from openood.utils.config import Config

    args = {
        "synthesizers": {"inversion": {"steps": 1}},
        "candidates": 20,
        "pool_size": 30,
        **changes,
    }
    return Config(
        {
            "trainer": {"name": "tie", "trainer_args": args},
            "optimizer": {"name": "adam", "lr": 1e-3, "num_epochs": 2},
            "seed": 5,
        }
    )


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {
            "data": torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(i)) * 2 - 1,
            "label": i % 10,
            "index": i,
        }


class Pairs(list):
    """A loader's dictionaries as pairs, read anew each time: a start draws a random number."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return ((batch["data"], batch["label"]) for batch in self.loader)


def test_an_epoch_is_the_cores(openood):
    from openood.trainers import get_trainer

    from tie_ext import TIEConfig
    from tie_ext.training.recipe import Recipe

    loader = torch.utils.data.DataLoader(Images(), batch_size=20)
    theirs = get_trainer(build(), loader, None, trainer_config(lam="-inf"))
    net, metrics = theirs.train_epoch(1)
    settings = TIEConfig(epochs=2, lr=1e-3, seed=5, candidates=20, pool_size=30, lam=-float("inf"))
    core = Recipe(settings, {"inversion": {"steps": 1}}).trainer(build())
    log = core.epoch(Pairs(loader))
    assert metrics["loss"] == log.losses["classifier"]
    assert metrics["epoch_idx"] == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), core.net.state_dict().values(), strict=True)
    )


def test_an_epoch_reads_each_image_once(openood):
    from openood.trainers import get_trainer

    read = []

    class Counted(Images):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    trainer = get_trainer(
        build(), torch.utils.data.DataLoader(Counted(), batch_size=20), None, trainer_config()
    )
    for epoch in (1, 2):
        read.clear()
        trainer.train_epoch(epoch)
        assert sorted(read) == list(range(40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator_step": 3}, "generator_step"),
        ({"lr": 1.0}, "got lr"),
        ({"pool_size": 0}, "pool_size"),
    ],
)
def test_wrong_settings_are_refused(openood, changes, message):
    from openood.trainers import get_trainer

    with pytest.raises(ValueError, match=message):
        get_trainer(
            build(), torch.utils.data.DataLoader(Images()), None, trainer_config(**changes)
        )


def with_sgd(**changes):
    config = trainer_config()
    config.optimizer.update(
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, **changes}
    )
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"name": "lbfgs"}, "sgd or adam .* got lbfgs"), ({"momentum": None}, "momentum")],
)
def test_another_optimiser_is_refused(openood, changes, message):
    from openood.trainers import get_trainer

    with pytest.raises(ValueError, match=message):
        get_trainer(build(), torch.utils.data.DataLoader(Images()), None, with_sgd(**changes))


def test_sgd_is_that_of_the_baseline_trainer(openood, root):
    import yaml
    from openood.trainers import get_trainer
    from openood.trainers.base_trainer import BaseTrainer

    theirs = yaml.safe_load((root / "configs/pipelines/train/baseline.yml").read_text())[
        "optimizer"
    ]
    ours = yaml.safe_load((CONFIGS / "pipelines/train/train_tie.yml").read_text())["optimizer"]
    assert {**ours, "num_epochs": theirs["num_epochs"], "lr": 2 * ours["lr"]} == theirs
    loader, config = torch.utils.data.DataLoader(Images(), batch_size=20), with_sgd(momentum=0.8)
    baseline = BaseTrainer(build(), loader, config).optimizer
    trainer = get_trainer(build(), loader, None, config).trainer
    trainer.epoch(Pairs(loader))
    assert type(trainer.optimizer) is type(baseline)
    assert trainer.optimizer.defaults == baseline.defaults
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1


# Attach.


class WithAux(Images):
    """With ``data_aux``, the images without augmentation, beside those to train on."""

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {**item, "data": -item["data"], "data_aux": item["data"]}


def attach_config(checkpoint) -> object:
    from openood.utils.config import Config

    network = {
        **network_config(head="multilayer"),
        "backbone": {**network_config().backbone, "checkpoint": str(checkpoint)},
    }
    return Config({"trainer": {"name": "attach"}, "network": network, "seed": 5})


def test_trainer_attach_is_the_cores(openood, tmp_path):
    from openood.networks.lenet import LeNet
    from openood.trainers import get_trainer

    from tie_ext import attach
    from tie_ext.openood.loaders import PlainImages

    plain = LeNet(10).eval()
    torch.save(plain.state_dict(), tmp_path / "lenet.ckpt")
    loader = torch.utils.data.DataLoader(WithAux(), batch_size=20)
    net, metrics = get_trainer(
        build(head="multilayer"), loader, None, attach_config(tmp_path / "lenet.ckpt")
    ).train_epoch(1)
    assert metrics["epoch_idx"] == 1
    expected = attach(plain, PlainImages(loader), 10, [-1.0] * 3, [1.0] * 3, seed=5)
    expected = expected.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("head", "checkpoint", "message"),
    [
        ("linear", "lenet.ckpt", "network.head multilayer"),
        ("multilayer", "none", r"best\.ckpt"),
        ("multilayer", "other.ckpt", "network lenet, but got"),
    ],
)
def test_trainer_attach_says_what_it_wants(openood, tmp_path, head, checkpoint, message):
    from openood.networks.lenet import LeNet
    from openood.trainers import get_trainer

    torch.save(LeNet(10).state_dict(), tmp_path / "lenet.ckpt")
    torch.save(
        {}, tmp_path / "other.ckpt"
    )  # OpenOOD itself would say nothing, and go on with random weights
    config = attach_config("none" if checkpoint == "none" else tmp_path / checkpoint)
    with pytest.raises(ValueError, match=message):
        get_trainer(build(head=head), torch.utils.data.DataLoader(WithAux()), None, config)


# Configs.


def test_a_postprocessor_without_a_config_has_that_of_its_file(openood, tmp_path, monkeypatch):
    from tie_ext.openood import DMRPostprocessor, TIEPostprocessor, TIEUEPostprocessor

    assert TIEPostprocessor().t == 1.0
    assert DMRPostprocessor().parameters == {"k": 5, "vae_epochs": 10, "epochs": 10}
    assert not TIEUEPostprocessor().APS_mode
    file = tmp_path / "tie.yml"
    file.write_text(Path(TIEPostprocessor.config_path).read_text().replace("t: 1.0", "t: 0.5"))
    monkeypatch.setattr(TIEPostprocessor, "config_path", str(file))
    assert TIEPostprocessor().t == 0.5


def test_the_training_file_holds_the_defaults_but_for_sgd_and_what_a_head_is_taught_by(openood):
    from openood.utils.config import Config

    from tie_ext import TIEConfig
    from tie_ext.openood.trainers import recipe_of_config
    from tie_ext.training.recipe import Recipe

    defaults = Recipe(TIEConfig(lr=0.05), prior=("procedural",))
    assert (
        recipe_of_config(Config(str(CONFIGS / "pipelines/train/train_tie.yml"))).record()
        == defaults.record()
    )


IDS = sorted(path.name for path in (CONFIGS / "datasets").iterdir())


def test_the_papers_six_sets_are_there():
    assert IDS == ["cifar10", "cifar100", "fashionmnist", "mnist", "svhn", "tinyimagenet"]


@pytest.mark.parametrize("name", IDS)
def test_every_config_builds(openood, root, tmp_path, monkeypatch, name):
    from openood.datasets import get_dataloader, get_ood_dataloader
    from openood.networks import get_network
    from openood.postprocessors import get_postprocessor
    from openood.trainers import get_trainer
    from openood.utils.config import Config, merge_configs

    def first(*relative):
        return next(
            str(base / "/".join(relative))
            for base in (CONFIGS, root / "configs")
            if (base / "/".join(relative)).exists()
        )

    files = [
        first("datasets", name, f"{name}.yml"),
        first("datasets", name, f"{name}_tie_ood.yml"),
        first("networks", "tie_net.yml"),
        first("pipelines", "train", "train_tie.yml"),
        first("preprocessors", "base_preprocessor.yml"),
        first("postprocessors", "tie.yml"),
    ]
    config = merge_configs(*map(Config, files))
    config.num_workers, config.trainer.trainer_args.pool_size = 0, 100
    config.network.backbone.name = {28: "lenet", 32: "resnet18_32x32", 64: "resnet18_64x64"}[
        config.dataset.image_size
    ]
    config.parse_refs()
    lists = [config.dataset[split].imglist_pth for split in config.dataset.split_names]
    assert ("val" in config.ood_dataset.split_names) == (
        name != "tinyimagenet"
    )  # whose validation images the others are chosen by
    for split in config.ood_dataset.split_names:
        of = config.ood_dataset[split]
        lists += (
            [of.imglist_pth] if split == "val" else [of[ood].imglist_pth for ood in of.datasets]
        )
    assert len(lists) == 3 + 5 + (name != "tinyimagenet")
    monkeypatch.chdir(tmp_path)
    for path in lists:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("a.png 0\n")
    loaders = get_dataloader(config)
    ood = get_ood_dataloader(config)
    assert len(ood.pop("val", "a")) == 1
    assert {len(loader) for split in ood.values() for loader in split.values()} == {1}
    net = get_network(config.network)
    assert net.num_classes == config.dataset.num_classes
    assert net.image_shape == (3, config.dataset.image_size, config.dataset.image_size)
    assert get_trainer(net, loaders["train"], loaders["val"], config).trainer.config.epochs == 20
    assert get_postprocessor(config).t == 1.0


# Its own main.py, as a user runs it.

METHODS = [
    *(
        "tie",
        "tie_ue",
        "tie_combined",
        "dmr",
        "msp",
        "ebo",
        "odin",
        "mls",
        "klm",
        "gen",
        "react",
        "dice",
        "ash",
        "scale",
        "mds",
        "rmds",
        "knn",
        "vim",
    ),
    *("she", "nnguide", "fdbd", "gradnorm", "relation", "nci", "iodin", "gram", "vra"),
]
ARGUMENTS = {
    "vim": ["--postprocessor.postprocessor_args.dim", "20"],
    "knn": ["--postprocessor.postprocessor_args.K", "5"],
}
OURS = ("tie", "tie_ue", "tie_combined", "dmr")


def training_configs(root: Path) -> list[Path]:
    theirs = root / "configs"
    ours = [CONFIGS / "networks/tie_net.yml", CONFIGS / "pipelines/train/train_tie.yml"]
    return [
        theirs / "datasets/mnist/mnist.yml",
        *ours,
        theirs / "preprocessors/base_preprocessor.yml",
    ]


def run_openood(root: Path, place: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tie_ext.openood", *arguments]
    run = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


@pytest.fixture(scope="module")
def checkpoint(root, workplace) -> Path:
    """A tie_net around OpenOOD's LeNet, trained by its own main.py."""
    configs = training_configs(root)
    # Enough for every class to be right sometimes: SHE averages over the correct images of each.
    small = [
        "--optimizer.num_epochs",
        "25",
        "--optimizer.lr",
        "0.1",
        "--num_workers",
        "0",
        "--network.backbone.name",
        "lenet",
    ]
    less = [
        "--trainer.trainer_args.synthesizers.inversion.steps",
        "3",
        "--trainer.trainer_args.candidates",
        "100",
    ]
    said = run_openood(
        root, workplace, str(root / "main.py"), "--config", *map(str, configs), *small, *less
    )
    assert "Training Completed!" in said
    assert said.count("excluded") == 25
    return workplace / "results" / "mnist_tie_net_tie_e25_lr0.1_default" / "s0" / "best.ckpt"


def test_training_leaves_a_checkpoint_with_tau(checkpoint):
    assert torch.load(checkpoint, weights_only=True)["tau"].isfinite()


def test_its_postprocessors_score_the_checkpoint(root, workplace, checkpoint):
    theirs, ours = root / "configs", CONFIGS

    def arguments(name):
        post = (ours if name in OURS else theirs) / "postprocessors" / f"{name}.yml"
        configs = [
            theirs / "datasets/mnist/mnist.yml",
            ours / "datasets/mnist/mnist_tie_ood.yml",
            workplace / "two.yml",
            ours / "networks/tie_net.yml",
            theirs / "pipelines/test/test_ood.yml",
            theirs / "preprocessors/base_preprocessor.yml",
            post,
        ]
        options = [
            "--network.backbone.name",
            "lenet",
            "--network.checkpoint",
            str(checkpoint),
            "--num_workers",
            "0",
            "--merge_option",
            "merge",
        ]
        return [
            "--config",
            *map(str, configs),
            *options,
            "--postprocessor.APS_mode",
            "False",
            *ARGUMENTS.get(name, []),
        ]

    (workplace / "many.json").write_text(
        json.dumps([str(root / "main.py"), *map(arguments, METHODS)])
    )
    run_openood(root, workplace, "many.py")
    for name in METHODS:
        rows = (
            (workplace / f"results/mnist_tie_net_test_ood_ood_{name}_default/s0/ood/ood.csv")
            .read_text()
            .split()
        )
        assert [row.split(",")[0] for row in rows] == [
            "dataset",
            "fashionmnist",
            "nearood",
            "cifar10",
            "farood",
        ], name
        assert all(0 <= float(value) <= 100 for row in rows[1:] for value in row.split(",")[1:]), (
            name
        )


def test_parameters_are_searched_on_the_validation_set(root, workplace, checkpoint):
    files = [
        root / "configs/datasets/mnist/mnist.yml",
        CONFIGS / "datasets/mnist/mnist_tie_ood.yml",
        workplace / "two.yml",
    ]
    files += [
        CONFIGS / "networks/tie_net.yml",
        root / "configs/pipelines/test/test_ood.yml",
        root / "configs/preprocessors/base_preprocessor.yml",
    ]
    files += [root / "configs/postprocessors/ash.yml"]
    options = [
        "--network.backbone.name",
        "lenet",
        "--network.checkpoint",
        str(checkpoint),
        "--num_workers",
        "0",
        "--merge_option",
        "merge",
    ]
    said = run_openood(
        root,
        workplace,
        str(root / "main.py"),
        "--config",
        *map(str, files),
        *options,
        "--postprocessor.APS_mode",
        "True",
    )
    assert "Starting automatic parameter search" in said
    assert (workplace / "results/mnist_tie_net_test_ood_ood_ash_default/s0/ood/ood.csv").exists()


def test_scores_it_saved_are_the_cores(root, openood, workplace, checkpoint):
    import numpy as np
    from PIL import Image

    scores = (
        workplace / "results/mnist_tie_net_test_ood_ood_tie_default/s0/ood/scores/fashionmnist.npz"
    )
    if not scores.exists():
        pytest.skip("the run before did not get so far")
    net = build(pretrained=True, checkpoint=str(checkpoint), head="multilayer").eval()
    folder = workplace / "data/images_classic/test_fashionmnist"
    x = torch.stack(
        [
            torch.tensor(np.asarray(Image.open(folder / f"{i}.png"))).float() / 255
            for i in range(40)
        ]
    )
    x = (x[:, None].expand(-1, 3, -1, -1) - 0.5) / 0.5
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(np.load(scores)["conf"]),
            -ood_score(net(x, garbage=True)),
            rtol=1e-4,
            atol=1e-4,
        )
        assert F.cross_entropy(net(x), torch.zeros(40).long()).isfinite()


@pytest.fixture(scope="module")
def attached(root, workplace) -> Path:
    """A head for a LeNet that OpenOOD left, attached by its main.py."""
    from openood.networks.lenet import LeNet

    torch.manual_seed(0)
    torch.save(LeNet(10).state_dict(), workplace / "lenet.ckpt")
    configs = [
        *training_configs(root)[:2],
        CONFIGS / "pipelines/train/attach_tie.yml",
        root / "configs/preprocessors/base_preprocessor.yml",
    ]
    options = [
        "--network.backbone.name",
        "lenet",
        "--network.backbone.checkpoint",
        "lenet.ckpt",
        "--num_workers",
        "0",
        "--seed",
        "1",
    ]
    run_openood(root, workplace, str(root / "main.py"), "--config", *map(str, configs), *options)
    return workplace / "results" / "mnist_tie_net_attach_lenet_default" / "s1" / "best.ckpt"


def test_attach_leaves_the_network_as_it_was(openood, workplace, attached):
    from openood.networks.lenet import LeNet

    plain = LeNet(10).eval()
    plain.load_state_dict(torch.load(workplace / "lenet.ckpt", weights_only=True))
    net = build(pretrained=True, checkpoint=str(attached), head="multilayer").eval()
    x = torch.rand(5, 3, 28, 28)
    assert torch.equal(net(x), plain(x))
    assert net.tau.isfinite()


def test_an_attached_network_is_scored_and_its_accuracy_taken(root, workplace, attached):
    theirs = root / "configs"
    data, preprocessor, net = (
        theirs / "datasets/mnist/mnist.yml",
        theirs / "preprocessors/base_preprocessor.yml",
        CONFIGS / "networks/tie_net.yml",
    )
    ood = [CONFIGS / "datasets/mnist/mnist_tie_ood.yml", workplace / "two.yml"]
    scored = [
        data,
        *ood,
        net,
        theirs / "pipelines/test/test_ood.yml",
        preprocessor,
        CONFIGS / "postprocessors/tie.yml",
    ]
    options = [
        "--network.backbone.name",
        "lenet",
        "--network.head",
        "multilayer",
        "--network.checkpoint",
        str(attached),
        "--num_workers",
        "0",
    ]
    run_openood(
        root,
        workplace,
        str(root / "main.py"),
        "--config",
        *map(str, scored),
        *options,
        "--mark",
        "attached",
    )
    rows = (
        (workplace / "results/mnist_tie_net_test_ood_ood_tie_attached/s0/ood/ood.csv")
        .read_text()
        .split()
    )
    assert rows[1].startswith("fashionmnist")
    assert (
        float(rows[1].split(",")[2]) > 90
    )  # noise, told by a head on a network that has learned nothing
    counted = [data, net, theirs / "pipelines/test/test_acc.yml", preprocessor]
    assert "Complete Evaluation, accuracy" in run_openood(
        root, workplace, str(root / "main.py"), "--config", *map(str, counted), *options
    )


MANY = """
import os, sys
import torch.distributed as dist
import torch.multiprocessing as mp

def work(rank, folder, arguments):
    import openood.utils.comm as comm
    from openood.pipelines import get_pipeline
    from openood.utils import setup_config
    import tie_ext.openood as ours

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    comm._LOCAL_PROCESS_GROUP = dist.group.WORLD
    sys.argv = arguments
    with ours.without_cuda(wanted=False):
        ours.register()
        get_pipeline(setup_config()).run()

if __name__ == "__main__":
    mp.spawn(work, args=(os.getcwd(), sys.argv), nprocs=2)
"""


def test_its_train_pipeline_runs_in_two_processes(root, workplace):
    (workplace / "two_processes.py").write_text(MANY)
    configs = training_configs(root)
    options = [
        "--optimizer.num_epochs",
        "1",
        "--num_workers",
        "0",
        "--num_gpus",
        "2",
        "--mark",
        "two",
        "--network.backbone.name",
        "lenet",
    ]
    less = [
        "--trainer.trainer_args.synthesizers.inversion.steps",
        "2",
        "--trainer.trainer_args.candidates",
        "100",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-W",
        "ignore",
        "two_processes.py",
        "--config",
        *map(str, configs),
        *options,
        *less,
    ]
    run = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Training Completed!") == 1  # the first process speaks for both
    assert (workplace / "results/mnist_tie_net_tie_e1_lr0.05_two/s0/best.ckpt").exists()


PROBE = """
import os, sys
from openood.utils import launch

def main(word):
    from openood.pipelines.train_pipeline import get_trainer
    with open(f"{word}{os.getpid()}", "w") as f:
        f.write(str(hasattr(get_trainer, "__wrapped__")))

def worker(local_rank, main_func, world_size, num_gpus, machine_rank, dist_url, args, timeout):
    main_func(*args)

if __name__ == "__main__":
    # The real one asks for two GPUs.
    sys.modules["openood.utils.launch"]._distributed_worker = worker
    launch(main, 2, dist_url="auto", args=("process",))
"""


def test_processes_that_openoods_launcher_starts_know_tie(root, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    run_openood(root, tmp_path, "probe.py")
    assert [path.read_text() for path in tmp_path.glob("process*")] == ["True", "True"]
