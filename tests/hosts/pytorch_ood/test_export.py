"""Detectors as programs of ``torch.export`` and ONNX."""

import pytest
import pytorch_ood.detector as theirs
import torch

from hosts.pytorch_ood.conftest import Plain, every_member, images, loader, trained, with_head
from tie_ext import Combined, TIEDetector
from tie_ext.scores.combination import RULES

MAKERS = {
    f"TIEDetector, {head}, {rate}": lambda make=make, rate=rate: TIEDetector(make(), rate, t=0.5)
    for head, make in (("linear", trained), ("layers", with_head))
    for rate in (None, 0.1)
}
MAKERS |= {
    rule: lambda rule=rule: Combined(every_member(trained().eval(), theirs.KNN), 0.2, rule)
    for rule in RULES
}
EXAMPLE, X = (images(4)[0],), images(24, seed=8)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["export", "onnx"])
@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.filterwarnings("ignore")
def test_exported_programs_decide_as_the_detector(name, kind, tmp_path):
    detector = MAKERS[name]().fit(loader(60))
    module, want = detector.export_module(), detector.decide(X)
    assert name not in RULES or len(want.level.unique()) > 1
    if kind == "export":
        if torch.__version__.startswith("2.2."):
            pytest.skip("torch 2.2 exports convolutions for a fixed batch size only")
        sizes = {"x": {0: torch.export.Dim("batch", min=2)}}
        program = torch.export.export(module, EXAMPLE, dynamic_shapes=sizes)
        label, _, score, level = program.module()(X)
    else:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
        import onnxruntime

        sizes = {"x": {0: torch.export.Dim("batch")}}
        path = tmp_path / "detector.onnx"
        torch.onnx.export(module, EXAMPLE, path, dynamo=True, dynamic_shapes=sizes)
        found = onnxruntime.InferenceSession(path).run(None, {"x": X.numpy()})
        label, _, score, level = map(torch.from_numpy, found)
    assert torch.equal(want.label, label)
    assert torch.equal(want.level, level)
    torch.testing.assert_close(score, want.score, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: [theirs.KNN(net.features, k=3).fit(loader())], "can export, but got KNN"),
        (lambda net: [theirs.EnergyBased(net), theirs.ODIN(net)], "but got ODIN"),
        (lambda net: [theirs.EnergyBased(Plain())], "on a TIENet to export, but got Plain"),
    ],
)
def test_error_of_members_without_an_export(make, message):
    with pytest.raises(TypeError, match=message):
        Combined(make(trained().eval()), 0.1).fit(loader(60)).export_module()
