"""Networks and calls as people bring them: each works with equal scores, or is refused with what
helps. ``python tests/test_networks.py`` writes the table of docs/networks.md.
"""

import os
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from networks import REFUSED, SHAPE, TAKEN, Case
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tie_ext
from tie_ext import TIENet
from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import MAX_LAYERS
from tie_ext.models.readout import LastLayers, OwnLogits, Selected
from tie_ext.models.statistics import pool_statistics
from tie_ext.training.config import HeadConfig

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"
attach = partial(tie_ext.attach, head_config=HeadConfig(steps=3))
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16}
DTYPES["bfloat16"] = torch.bfloat16


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


@pytest.mark.parametrize("name", TAKEN)
def test_a_network_that_is_taken_keeps_its_logits(name, tmp_path):
    case = TAKEN[name]
    torch.manual_seed(0)
    model, (x, y) = case.make().eval(), images(classes=case.num_classes)
    net = attach(model, [(x, y)], case.num_classes, logits=case.logits)
    with torch.no_grad():
        before, h = own(model(x), case), net.features(x)
        if case.num_classes == 2:  # of one logit
            assert (net(x)[:, 0] == 0).all()
            before = torch.logit(before) if "`(B,)`" in name else before
            torch.testing.assert_close(net(x)[:, 1], before.flatten(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(net(x), before)
        every = net(x, garbage=True)
        assert torch.equal(every[:, :-1], net.fc(h))
        linear = h @ net.fc.weight.T + (0 if net.fc.bias is None else net.fc.bias)
        torch.testing.assert_close(linear, net.fc(h), rtol=1e-4, atol=1e-5)
        if "behind" in name:
            follows = every[:, :-1].log_softmax(1) if "soft" in name else every[:, :-1] / 2.5
            before = before.log() if name.startswith("a softmax") else before
            torch.testing.assert_close(follows, before, rtol=1e-4, atol=1e-5)
    net.save(tmp_path / "net")
    backbone = case.make() if case.logits is None else Selected(case.make(), case.logits)
    again = TIENet.load(tmp_path / "net", backbone)
    assert torch.equal(again(x, garbage=True), every)
    assert torch.equal(again(x), net(x))
    if case.logits is not None:
        with pytest.raises(
            ValueError, match=r"Expected the backbone as Selected\(model, logits\)"
        ):
            TIENet.load(tmp_path / "net", case.make())


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_is_refused_is_told_what_helps(name):
    make, advice = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=advice):
        attach(make() if name.startswith(("a ", "Torch")) else make().eval(), [images()], 3)


def test_one_logit_has_two_classes_and_they_are_no_single_one():
    model = TAKEN["one logit for two classes"].make().eval()
    with pytest.raises(ValueError, match="a network with one logit has two classes"):
        attach(model, [images(classes=1)], 1)
    with pytest.raises(
        ValueError, match=r"Expected a model with 3 outputs, .* but got one with 2"
    ):
        attach(model, [images()], 3)


def test_the_page_of_networks_is_what_the_tests_run():
    assert table() in PAGE.read_text(), "python tests/test_networks.py writes it"


def table() -> str:
    """The rows of docs/networks.md."""
    rows = ["| the network is, or returns | attach |", "|---|---|"]
    rows += [
        f"| {name} | taken{'; ' * bool(case.about)}{case.about} |" for name, case in TAKEN.items()
    ]
    rows += [
        f"| {name} | refused: {advice.removeprefix('or ')} |"
        for name, (_, advice) in REFUSED.items()
    ]
    return "\n".join(rows) + "\n"


# Networks of torchvision, timm and Hugging Face, without weights.


def hugging_face(kind: str, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{kind}Config")(num_labels=5, **config)
    return getattr(transformers, f"{kind}ForImageClassification")(made)


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


def family(name: str) -> tuple[nn.Module, int]:
    """A network of a family, for five classes, and the size of its images."""
    package, _, kind = name.rpartition("/")
    about = FAMILIES[name]
    config = about if isinstance(about, dict) else {}
    size = config.get("img_size", config.get("image_size", 32)) if config else about
    torch.manual_seed(0)
    if package == "hf":
        return hugging_face(kind, **config).eval(), size
    if package == "timm":
        timm = pytest.importorskip("timm")
        return timm.create_model(kind, pretrained=False, num_classes=5, **config).eval(), size
    models = pytest.importorskip("torchvision").models
    return getattr(models, kind)(weights=None, num_classes=5).eval(), size


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_a_head_reads_layers_over_the_whole_depth_of_a_family(name):
    model, size = family(name)
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        y = model(x)
        net = TIENet(model, 5, (3, size, size), head="multilayer").eval()
        assert torch.equal(net(x), getattr(y, "logits", y))
        every = net(x, garbage=True)
    assert every.isfinite().all()
    read, called = list(net.garbage.layers), []
    assert len(read) == MAX_LAYERS
    for part_name, part in model.named_modules():
        if part_name in read or isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(lambda *_, of=part_name: called.append(of))
    with torch.no_grad():
        model(x)
    places = [called.index(of) / len(called) for of in read]
    assert places[0] < 0.25
    assert places[-1] > 0.65
    assert max(b - a for a, b in pairwise(places)) < 0.3


@pytest.mark.parametrize("maps", [False, True])
def test_blocks_are_pooled_over_tokens_and_over_maps_with_channels_last(maps):
    model = TAKEN[
        "blocks on maps `(B, H, W, C)`" if maps else "blocks on tokens `(B, T, C)`"
    ].make()
    net = TIENet(model, 3, SHAPE, head="multilayer").eval()
    assert net.garbage.layers == {f"blocks.{i}": 12 for i in (0, 1, 2, 3, 5, 6, 7, 8)}
    x, found = images(4)[0], []
    model.blocks[5].register_forward_hook(lambda *args: found.append(args[2].flatten(1, -2)))
    model.eval()(x)
    s = net.statistics(x)[1][:, 12 + 4 * 48 : 12 + 5 * 48]
    torch.testing.assert_close(s[:, :12], found[0].relu().mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(s, pool_statistics(found[0]), rtol=1e-4, atol=1e-5)


# Precision and calling.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_head_of_a_network_in_half_precision_is_in_float32(dtype, tmp_path):
    torch.manual_seed(0)
    model, (x, y) = TAKEN["a tuple"].make().to(DTYPES[dtype]).eval(), images()
    net = attach(model, [(x, y)], 3)
    assert {p.dtype for p in net.garbage.parameters()} == {net.tau.dtype} == {torch.float32}
    assert torch.equal(net(x), model(x.to(DTYPES[dtype]))[0])
    every = net(x, garbage=True)
    assert every.dtype == torch.float32
    assert torch.equal(every[:, :-1], net(x).float())
    assert net.half().garbage.mean.dtype == torch.float32
    net.to(DTYPES[dtype]).save(tmp_path / "net")
    assert torch.equal(
        TIENet.load(tmp_path / "net", TAKEN["a tuple"].make())(x, garbage=True), every
    )


def test_statistics_that_overflow_are_named():
    model, (x, y) = TAKEN["a tuple"].make().eval(), images()
    with torch.no_grad():
        model.conv[4].weight.mul_(1e6)
    with pytest.raises(ValueError, match="Expected finite logits, but Net gives NaN or infinity"):
        attach(model.half(), [(x, y)], 3)
    head = GarbageHead({"conv.1": 8, "conv.4": 12}, 48)
    statistics = torch.rand(4, 48 + 4 * 20)
    statistics[1, -1] = torch.inf
    with pytest.raises(ValueError, match=r"NaN or infinite ones of conv\.4; give a float16"):
        head.standardise(statistics)


@pytest.mark.slow
def test_what_attach_gives_can_be_compiled():
    for name in ("a tuple", "two heads that are averaged", "a softmax behind"):
        case, (x, y) = TAKEN[name], images()
        net = attach(case.make().eval(), [(x, y)], 3)
        compiled = torch.compile(net, backend="eager")
        torch.testing.assert_close(compiled(x, garbage=True), net(x, garbage=True))
        torch.testing.assert_close(compiled(x), net(x))
        assert torch.equal(net.decide(x).level, net.decide(x).level)


@pytest.mark.parametrize("name", ["two heads that are averaged", "a softmax behind"])
@pytest.mark.parametrize("head", ["multilayer", "linear"])
def test_explain_inverts_such_a_network(name, head):
    case, (x, y) = TAKEN[name], images()
    x = nn.functional.interpolate(x, size=28)
    net = TIENet(case.make().half().eval(), 3, x.shape[1:], head=head).eval()
    found = tie_ext.explain(net, [(x, y)], steps=1, per_class=1)
    assert found.inversions.shape == (3, 1, 1, 28, 28)
    assert found.layers.distance(x).isfinite().all()


def combined(model: nn.Module, case: Case, batches: list, held: list, steps: int = 3):
    pytest.importorskip("pytorch_ood")
    net = tie_ext.attach(
        model, batches, case.num_classes, logits=case.logits, head_config=HeadConfig(steps=steps)
    )
    return tie_ext.combine(net, train_loader=batches, calibration_loader=held, false_alarm=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two heads that are averaged", "a softmax behind"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_decides_as_a_detector_of_such_a_network(name, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    x, y = images(32)
    detector = combined(
        TAKEN[name].make().eval(), TAKEN[name], [(x[:16], y[:16])], [(x[16:], y[16:])]
    )
    module = detector.export_module().eval()
    torch.onnx.export(
        module,
        (x[:2],),
        tmp_path / "d.onnx",
        input_names=["x"],
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
    )
    _, _, score, _ = onnxruntime.InferenceSession(tmp_path / "d.onnx").run(None, {"x": x.numpy()})
    deviation = detector.calibration_scores.std()
    assert (torch.from_numpy(score) - detector.predict(x)).abs().max() < 1e-4 * deviation


def test_a_constant_score_is_named():
    pytest.importorskip("pytorch_ood")
    case, (x, y) = TAKEN["a tuple"], images()
    model = case.make().eval()
    nn.init.zeros_(model.fc.weight)
    with pytest.raises(ValueError, match=r"but got .* for all from EnergyBased; leave it out"):
        combined(model, case, [(x, y)], [(x + 0.01, y)])


def test_what_is_no_linear_function_of_features_has_no_fdbd(caplog):
    case, (x, y) = TAKEN["a 1x1 convolution whose maps are averaged"], images()
    detector = combined(case.make().eval(), case, [(x, y)], [(x + 0.01, y)])
    assert isinstance(detector.network.fc, OwnLogits)
    assert "BoundaryDistance" not in {type(member).__name__ for member in detector.detectors}
    assert "left out fDBD" in caplog.text
    case = TAKEN["two heads that are averaged"]
    detector = combined(case.make().eval(), case, [(x, y)], [(x + 0.01, y)])
    assert isinstance(detector.network.fc, LastLayers)
    assert "BoundaryDistance" in {type(member).__name__ for member in detector.detectors}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scores_of_features_of_any_scale(scale):
    """Dead units among them."""
    case, (x, y) = TAKEN["a tuple"], images(40)
    torch.manual_seed(0)
    model = case.make().eval()
    with torch.no_grad():
        for part in (model.conv[4].weight, model.conv[4].bias):
            part.mul_(scale)
            part[:3] = 0
        model.fc.weight.div_(scale)
    detector = combined(model, case, [(x[:20], y[:20])], [(x[20:], y[20:])], steps=100)
    noise = torch.randn(20, *SHAPE).mul(0.3).add(0.5).clamp(0, 1)
    scores = detector.scores(torch.cat([x, noise]))
    assert scores.isfinite().all()
    names = [type(member).__name__ for member in detector.detectors]
    z = detector.reference.standardise(scores)
    SCORES.setdefault("scores", {})[scale] = (names, z[:, 1:])
    if len(SCORES["scores"]) > 1:
        first = next(iter(SCORES["scores"].values()))
        assert names == first[0]
        torch.testing.assert_close(z[:, 1:], first[1], rtol=1e-2, atol=1e-2)
    assert (z[-20:, 0] > z[:40, 0].median()).float().mean() > 0.9  # the head finds noise


SCORES: dict = {}


# All of it together.

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
    "list": lambda x, y, form: [
        form(*part) for part in zip(x.split(10), y.split(10), strict=True)
    ],
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
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.slow
@settings(
    max_examples=COMPOSITIONS,
    deadline=None,
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
def test_a_composition_works_with_equal_scores_or_is_refused(
    tmp_path_factory, name, dtype, form, loader, around, later, seed
):
    from tie_ext.pytorch_ood import load_detector

    torch.manual_seed(seed)
    case = TAKEN.get(name) or Case(REFUSED[name][0])
    x, y = images(48, case.num_classes)
    model = case.make()
    if isinstance(model, nn.Module) and name not in REFUSED:
        model = model.eval().to(DTYPES[dtype])
    batches, held = (
        LOADERS[loader](*part, FORMS[form]) for part in ((x[:24], y[:24]), (x[24:], y[24:]))
    )
    said = ""
    try:
        with CONTEXTS[around]():
            detector = combined(model, case, batches, held)
    except (TypeError, ValueError) as error:
        said = str(error)
    works = name in TAKEN and form != "flat images" and loader in ("list", "DataLoader")
    assert (said == "") == works, said
    if said:
        assert said.startswith("Expected"), said
        return
    want = detector(x)
    assert want.isfinite().all()
    unit = detector.calibration_scores.std()
    folder = tmp_path_factory.mktemp("detector")
    detector.save(folder)
    backbone = case.make() if case.logits is None else Selected(case.make(), case.logits)
    again = load_detector(folder, backbone)
    assert torch.equal(again(x), want)
    if later == "training mode":
        detector.network.train()
    with CONTEXTS.get(later, torch.enable_grad)():
        found = detector(x)
        alone = torch.cat([detector(part) for part in x.split([1, 2, 45])])
        decision = detector.decide(x)
    assert (found - want).abs().max() <= 1e-4 * unit
    assert torch.equal(decision.score, found)
    if dtype in ("float32", "float64"):
        assert (alone - want).abs().max() <= 1e-4 * unit


if __name__ == "__main__":
    page = PAGE.read_text()
    start, end = page.index("| the network is"), page.rindex("|\n") + 2
    PAGE.write_text(page[:start] + table() + page[end:])
