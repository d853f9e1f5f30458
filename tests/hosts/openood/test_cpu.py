"""OpenOOD on a machine without a GPU."""

import pytest
import torch
from torch import nn

from tie_ext.openood.cpu import without_cuda


def patched() -> tuple:
    modes = len(torch.overrides._get_current_function_mode_stack())
    return torch.Tensor.cuda, nn.Module.cuda, torch.load, torch.cuda.FloatTensor, modes


def test_changes_are_undone_and_leave_a_gpu_alone(monkeypatch):
    before = patched()
    with without_cuda(wanted=False):
        assert patched() != before
    assert patched() == before
    with pytest.raises(KeyError), without_cuda(wanted=False):
        raise KeyError
    assert patched() == before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with without_cuda(wanted=True):
        assert patched() == before


def test_files_are_read_onto_the_cpu_without_code(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "load", lambda path, **how: asked.append(how))
    own = {"map_location": "meta", "weights_only": False}
    with without_cuda(wanted=False):
        torch.load("network.ckpt")
        torch.load("network.ckpt", **own)
    assert asked == [{"map_location": "cpu", "weights_only": True}, own]


def test_devices_named_cuda_are_the_cpu():
    with without_cuda(wanted=False):
        for found in (
            torch.zeros(2).cuda(),
            nn.Linear(1, 1).cuda().weight,
            torch.eye(2, device="cuda"),
            torch.ones(2).to("cuda:0"),
            torch.arange(3).to(torch.device("cuda")),
            nn.Linear(1, 1).to(device="cuda").weight,
            torch.cuda.FloatTensor([1.0]),
        ):
            assert found.device.type == "cpu"
        assert torch.ones(1, device="meta").device.type == "meta"
        assert torch.device("cuda").type == "cuda"
        with torch.random.fork_rng():
            torch.rand(1)
