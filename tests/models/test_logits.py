"""Networks and calls as people bring them: each works with equal scores, or is refused with what
helps. ``python tests/models/test_logits.py`` writes the table of docs/networks.md.
"""

import os
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import refused
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.append(str(Path(__file__).parents[1]))
from networks import REFUSED, SHAPE, TAKEN, Case

import tie_ext
from tie_ext import TIENet
from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import MAX_LAYERS
from tie_ext.models.readout import LastLayers, OwnLogits, Selected
from tie_ext.training.config import HeadConfig

PAGE = Path(__file__).parents[2] / "docs" / "networks.md"
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
AVERAGED, SOFTMAX = "two heads that are averaged", "a softmax behind"


def attach(case: Case, data, model=None, steps: int = 3) -> TIENet:
    model = case.make().eval() if model is None else model
    head = HeadConfig(steps=steps)
    return tie_ext.attach(model, data, case.num_classes, logits=case.logits, head_config=head)


def images(count: int = 24, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(count) % classes
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(2)) / 2
    return x + y[:, None, None, None] / 6, y


def own(y, case: Case) -> torch.Tensor:
    """What a model returns as logits."""
    if case.logits is not None:
        return case.logits(y)
    if isinstance(y, tuple | dict):
        return y["logits"] if isinstance(y, dict) else y[0]
    return getattr(y, "logits", y)


def backbone(case: Case) -> nn.Module:
    """The architecture to load a file with."""
    return case.make() if case.logits is None else Selected(case.make(), case.logits)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TAKEN)
def test_logits_of_a_network_that_is_taken(name, tmp_path):
    case = TAKEN[name]
    model, (x, y) = case.make().eval(), images(classes=case.num_classes)
    net = attach(case, [(x, y)], model)
    with torch.no_grad():
        before, h, every = own(model(x), case), net.features(x), net(x, garbage=True)
        if case.num_classes == 2:  # of one logit
            assert (net(x)[:, 0] == 0).all()
            before = torch.logit(before) if "`(B,)`" in name else before
            close(net(x)[:, 1], before.flatten())
        else:
            assert torch.equal(net(x), before)
        assert torch.equal(every[:, :-1], net.fc(h))
        close(h @ net.fc.weight.T + (0 if net.fc.bias is None else net.fc.bias), net.fc(h))
        if "behind" in name:
            follows = every[:, :-1].log_softmax(1) if "soft" in name else every[:, :-1] / 2.5
            close(follows, before.log() if name == SOFTMAX else before)
    net.save(tmp_path / "net")
    again = TIENet.load(tmp_path / "net", backbone(case))
    assert torch.equal(again(x, garbage=True), every)
    assert torch.equal(again(x), net(x))
    if case.logits is not None:
        with refused(r"the backbone as Selected\(model, logits\)"):
            TIENet.load(tmp_path / "net", case.make())


@pytest.mark.parametrize("name", REFUSED)
def test_advice_for_a_network_that_is_refused(name):
    make, advice = REFUSED[name]
    model = make() if name.startswith(("a ", "Torch")) else make().eval()
    with pytest.raises((TypeError, ValueError), match=advice):
        attach(Case(make), [images()], model)


@pytest.mark.parametrize(
    ("classes", "message"), [(1, "one logit has two classes"), (3, "with 3 outputs, .* with 2")]
)
def test_number_of_classes_of_one_logit(classes, message):
    case = TAKEN["one logit for two classes"]._replace(num_classes=classes)
    with refused(message):
        attach(case, [images(classes=classes)])


def table() -> str:
    """The rows of docs/networks.md."""
    rows = ["| the network is, or returns | attach |", "|---|---|"]
    for name, case in TAKEN.items():
        rows.append(f"| {name} | taken{'; ' * bool(case.about)}{case.about} |")
    for name, (_, advice) in REFUSED.items():
        rows.append(f"| {name} | refused: {advice.removeprefix('or ')} |")
    return "\n".join(rows) + "\n"


def test_table_of_networks_in_the_documentation():
    assert table() in PAGE.read_text(), "python tests/models/test_logits.py writes it"


TINY = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
FAMILIES = {
    "swin_t": 32,
    "convnext_tiny": 32,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "mobilenet_v3_small": 64,
    "squeezenet1_1": 64,
    "timm/swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "timm/xcit_nano_12_p16_224": 64,
    "timm/maxvit_nano_rw_256": {"img_size": 64},
    "timm/convnext_atto": 64,
    "timm/vit_tiny_patch16_224": {"img_size": 32},
    "timm/deit_tiny_distilled_patch16_224": {"img_size": 32},
    "timm/mobilenetv3_small_050": 64,
    "hf/ViT": {**TINY, "num_hidden_layers": 9, "image_size": 32, "patch_size": 8},
    "hf/ResNet": {"hidden_sizes": [8, 16, 24, 32], "embedding_size": 8, "layer_type": "basic"},
}
"""Sizes of images, or settings, of networks without weights."""


def family(name: str) -> tuple[nn.Module, int]:
    """A network of a family, for five classes, and the size of its images."""
    package, _, kind = name.rpartition("/")
    about = FAMILIES[name]
    config = about if isinstance(about, dict) else {}
    size = config.get("img_size", config.get("image_size", 32)) if config else about
    if package == "hf":
        transformers = pytest.importorskip("transformers")
        made = getattr(transformers, f"{kind}Config")(num_labels=5, **config)
        return getattr(transformers, f"{kind}ForImageClassification")(made).eval(), size
    if package == "timm":
        create = pytest.importorskip("timm").create_model
        return create(kind, pretrained=False, num_classes=5, **config).eval(), size
    models = pytest.importorskip("torchvision").models
    return getattr(models, kind)(weights=None, num_classes=5).eval(), size


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_depth_of_the_layers_that_a_head_reads(name):
    model, size = family(name)
    x, called = torch.rand(2, 3, size, size), []
    y, net = model(x), TIENet(model, 5, (3, size, size), head="multilayer").eval()
    assert torch.equal(net(x), getattr(y, "logits", y))
    assert net(x, garbage=True).isfinite().all()
    read = list(net.garbage.layers)
    assert len(read) == MAX_LAYERS
    for part_name, part in model.named_modules():
        if part_name in read or isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(lambda *_, of=part_name: called.append(of))
    model(x)
    places = [called.index(of) / len(called) for of in read]
    assert places[0] < 0.25
    assert places[-1] > 0.65
    assert max(b - a for a, b in pairwise(places)) < 0.3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_in_float32_beside_half_precision(dtype, tmp_path):
    case, (x, y) = TAKEN["a tuple"], images()
    model = case.make().to(dtype).eval()
    net = attach(case, [(x, y)], model)
    every = net(x, garbage=True)
    kept = {p.dtype for p in net.garbage.parameters()} | {net.tau.dtype, every.dtype}
    assert kept == {torch.float32}
    assert torch.equal(net(x), model(x.to(dtype))[0])
    assert torch.equal(every[:, :-1], net(x).float())
    assert net.half().garbage.mean.dtype == torch.float32
    net.to(dtype).save(tmp_path / "net")
    assert torch.equal(TIENet.load(tmp_path / "net", case.make())(x, garbage=True), every)


def test_statistics_and_logits_that_overflow():
    case = TAKEN["a tuple"]
    model = case.make().eval()
    with torch.no_grad():
        model.conv[4].weight.mul_(1e6)
    with refused("Expected finite logits, but Net gives NaN or infinity"):
        attach(case, [images()], model.half())
    head = GarbageHead({"conv.1": 8, "conv.4": 12}, 48)
    statistics = torch.rand(4, 48 + 2 * 20)
    statistics[1, -1] = torch.inf
    with refused(r"NaN or infinite ones of conv\.4; give a float16"):
        head.standardise(statistics)


@pytest.mark.parametrize("name", [AVERAGED, SOFTMAX])
@pytest.mark.parametrize("head", ["multilayer", "linear"])
def test_inversions_of_networks_of_other_outputs(name, head):
    x, y = images()
    x = nn.functional.interpolate(x, size=28)
    net = TIENet(TAKEN[name].make().half().eval(), 3, x.shape[1:], head=head).eval()
    found = tie_ext.explain(net, [(x, y)], steps=1, per_class=1)
    assert found.inversions.shape == (3, 1, 1, 28, 28)
    assert found.layers.distance(x).isfinite().all()


def combined(case: Case, batches, held, model=None, steps: int = 3):
    pytest.importorskip("pytorch_ood")
    net = attach(case, batches, model, steps)
    return tie_ext.combine(net, train_loader=batches, calibration_loader=held, false_alarm=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [AVERAGED, SOFTMAX])
@pytest.mark.filterwarnings("ignore")
def test_scores_of_an_exported_onnx_program(name, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    x, y = images(32)
    detector = combined(TAKEN[name], [(x[:16], y[:16])], [(x[16:], y[16:])])
    path, batch = tmp_path / "d.onnx", {0: torch.export.Dim("batch", min=1, max=64)}
    how = {"input_names": ["x"], "dynamo": True, "dynamic_shapes": (batch,)}
    torch.onnx.export(detector.export_module().eval(), (x[:2],), path, **how)
    _, _, score, _ = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    deviation = detector.calibration_scores.std()
    assert (torch.from_numpy(score) - detector.predict(x)).abs().max() < 1e-4 * deviation


def test_score_that_is_the_same_for_all_images():
    case, (x, y) = TAKEN["a tuple"], images()
    model = case.make().eval()
    nn.init.zeros_(model.fc.weight)
    with refused(r"but got .* for all from EnergyBased; leave it out"):
        combined(case, [(x, y)], [(x + 0.01, y)], model)


@pytest.mark.parametrize(
    ("name", "layer", "has"),
    [
        ("a 1x1 convolution whose maps are averaged", OwnLogits, False),
        (AVERAGED, LastLayers, True),
    ],
)
def test_fdbd_of_layers_that_are_linear_or_not(name, layer, has, caplog):
    x, y = images()
    detector = combined(TAKEN[name], [(x, y)], [(x + 0.01, y)])
    assert isinstance(detector.network.fc, layer)
    members = {type(member).__name__ for member in detector.detectors}
    assert ("BoundaryDistance" in members) == has
    assert ("left out fDBD" in caplog.text) != has


def test_scores_of_features_of_any_scale():
    """Dead units among them."""
    case, (x, y), found = TAKEN["a tuple"], images(40), []
    noise = torch.randn(20, *SHAPE).mul(0.3).add(0.5).clamp(0, 1)
    for scale in (1e-6, 1.0, 1e6):
        torch.manual_seed(0)
        model = case.make().eval()
        with torch.no_grad():
            for part in (model.conv[4].weight, model.conv[4].bias):
                part.mul_(scale)
                part[:3] = 0
            model.fc.weight.div_(scale)
        detector = combined(case, [(x[:20], y[:20])], [(x[20:], y[20:])], model, steps=100)
        z = detector.reference.standardise(detector.scores(torch.cat([x, noise])))
        assert (z[-20:, 0] > z[:40, 0].median()).float().mean() > 0.9  # the head finds noise
        found.append(z[:, 1:])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-2, atol=1e-2)


COMPOSITIONS = int(os.environ.get("TIE_COMPOSITIONS", "25"))
FORMS = {
    "pairs": lambda x, y: (x, y),
    "triples": lambda x, y: (x, y, "of the third"),
    "dicts": lambda x, y: {"image": x, "label": y},
    "numpy": lambda x, y: (x.numpy(), y.numpy()),
    "one-hot": lambda x, y: (x, nn.functional.one_hot(y)),
    "images alone": lambda x, y: x,
    "flat images": lambda x, y: (x.flatten(1), y),
}
LOADERS = {
    "list": lambda x, y, form: list(map(form, x.split(10), y.split(10))),
    "DataLoader": lambda x, y, form: DataLoader(
        TensorDataset(x, y),
        10,
        collate_fn=lambda rows: form(*map(torch.stack, zip(*rows, strict=True))),
    ),
    "Dataset": lambda x, y, form: TensorDataset(x, y),
    "iterator": lambda x, y, form: iter([form(x, y)]),
}
CONTEXTS = {
    "plain": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.slow
@settings(
    max_examples=COMPOSITIONS,
    derandomize=COMPOSITIONS < 100,
    phases=[Phase.generate],  # an example is small enough
    suppress_health_check=list(HealthCheck),
)
@given(
    name=st.sampled_from([*TAKEN, *REFUSED]),
    dtype=st.sampled_from(list(DTYPES)),
    form=st.sampled_from(list(FORMS)),
    loader=st.sampled_from(list(LOADERS)),
    around=st.sampled_from(list(CONTEXTS)),
    later=st.sampled_from([*CONTEXTS, "training mode"]),
    seed=st.integers(0, 3),
)
def test_equal_scores_or_advice_of_any_composition(
    tmp_path_factory, name, dtype, form, loader, around, later, seed
):
    from tie_ext.pytorch_ood import load_detector

    torch.manual_seed(seed)
    case = TAKEN.get(name) or Case(REFUSED[name][0])
    x, y = images(48, case.num_classes)
    model = case.make()
    if isinstance(model, nn.Module) and name not in REFUSED:
        model = model.eval().to(DTYPES[dtype])
    halves = (x[:24], y[:24]), (x[24:], y[24:])
    batches, held = (LOADERS[loader](*half, FORMS[form]) for half in halves)
    said = ""
    try:
        with CONTEXTS[around]():
            detector = combined(case, batches, held, model)
    except (TypeError, ValueError) as error:
        said = str(error)
    works = name in TAKEN and form != "flat images" and loader in ("list", "DataLoader")
    assert (said == "") == works, said
    if said:
        assert said.startswith("Expected"), said
        return
    want, unit = detector(x), detector.calibration_scores.std()
    assert want.isfinite().all()
    folder = tmp_path_factory.mktemp("detector")
    detector.save(folder)
    assert torch.equal(load_detector(folder, backbone(case))(x), want)
    if later == "training mode":
        detector.network.train()
    with CONTEXTS.get(later, torch.enable_grad)():
        found, decision = detector(x), detector.decide(x)
        alone = torch.cat([detector(part) for part in x.split([1, 2, 45])])
    assert (found - want).abs().max() <= 1e-4 * unit
    assert torch.equal(decision.score, found)
    if dtype in ("float32", "float64"):
        assert (alone - want).abs().max() <= 1e-4 * unit


if __name__ == "__main__":
    page = PAGE.read_text()
    start, end = page.index("| the network is"), page.rindex("|\n") + 2
    PAGE.write_text(page[:start] + table() + page[end:])
