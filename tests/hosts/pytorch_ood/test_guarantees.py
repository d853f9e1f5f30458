"""What a saved detector promises."""

import pytest
import torch
from conftest import make_net

pytest.importorskip("pytorch_ood")
from pytorch_ood.detector import EnergyBased

from tie_ext.pytorch_ood import Combined, TIEDetector, load_detector

PROMISE = {"false_alarm": 0.2, "guarantee": "pac", "confidence": 0.6, "per_class": True}


def single(net, x):
    return TIEDetector(net, **PROMISE).fit_logits(net(x, garbage=True).detach())


def several(net, x):
    return Combined([TIEDetector(net), EnergyBased(net)], **PROMISE).fit([x])


@pytest.mark.parametrize("make", [single, several])
def test_guarantee_of_a_saved_detector(make, tmp_path):
    x = torch.rand(120, 1, 28, 28)
    detector = make(make_net().eval(), x)
    detector.save(tmp_path)
    again = load_detector(tmp_path)
    assert {key: getattr(again, key) for key in PROMISE} == PROMISE
    assert again.threshold.tolist() == detector.threshold.tolist()
    assert again.threshold.ndim == 1
    for of in (detector.decide(x), detector.export_module()(x)):
        assert torch.equal(of.level, again.decide(x).level)
    assert torch.equal(again.recalibrate(0.2).threshold, detector.threshold)
    assert again.recalibrate(0.2, per_class=False).threshold.ndim == 0
    assert again.recalibrate(0.2, guarantee="average").threshold < detector.threshold.max()
