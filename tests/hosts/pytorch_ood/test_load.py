"""Folders of detectors and of runs."""

import shutil

import pytest

from hosts.pytorch_ood.conftest import edit, trained
from tie_ext import Combined, TIEDetector, TIENet
from tie_ext.pytorch_ood import load_detector


def test_detectors_in_folders_of_every_kind(saved, tmp_path):
    single = load_detector(saved / "TIEDetector")
    assert single.calibration_scores.shape == (24,)
    assert single.recalibrate(0.2).threshold < load_detector(saved / "TIEDetector").threshold
    assert isinstance(load_detector(saved / "Combined"), Combined)
    trained().save(tmp_path / "run" / "network.safetensors")
    assert isinstance(load_detector(tmp_path / "run"), TIEDetector)
    shutil.copytree(saved / "Combined", tmp_path / "run" / "combined")  # as 0.2.0 has it
    assert isinstance(load_detector(tmp_path / "run"), Combined)
    assert load_detector(tmp_path / "run", device="meta").device.type == "meta"
    edit(saved / "Combined", format="other")
    with pytest.raises(ValueError, match="format 'other'"):
        load_detector(saved / "Combined")
    with pytest.raises(FileNotFoundError, match="network"):
        load_detector(tmp_path)


def test_weights_of_a_detector_are_read_once(saved, monkeypatch):
    read, load = [], TIENet.load
    monkeypatch.setattr(TIENet, "load", lambda *a, **k: read.append(a) or load(*a, **k))
    detector = load_detector(saved / "Combined")
    assert len(read) == 1
    assert detector.network is detector.detectors[0].network
