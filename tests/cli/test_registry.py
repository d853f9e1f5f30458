"""Architectures by name, and their weights from a file."""

import pytest
import safetensors.torch
import torch

from cli.conftest import make
from tie_ext.cli import registry
from tie_ext.utils.weight_files import read_checkpoint


@pytest.mark.parametrize("name", ["conv3", "torchvision:mnasnet0_5", "torchvision:regnet_y_400mf"])
@pytest.mark.parametrize("channels", [1, 3])
def test_weights_from_a_file(name, channels, tmp_path):
    model, x = make(name, channels, 7), torch.rand(2, channels, 32, 32)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w")
    checkpoint = read_checkpoint(tmp_path / "w")
    assert registry.sizes_of(name, checkpoint) == (channels, 7)
    loaded, left = registry.load(name, channels, 7, checkpoint)
    assert torch.equal(loaded(x), model(x))
    assert left == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "or timm:NAME, but got 'os:system'$"),
        ("resnet18", "did you mean torchvision:resnet18"),
        ("torchvision:fcn_resnet50", "Expected a classifier of torchvision by its name there"),
    ],
)
def test_names_that_no_registry_has(name, message):
    with pytest.raises(ValueError, match=message):
        registry.check_name(name)
