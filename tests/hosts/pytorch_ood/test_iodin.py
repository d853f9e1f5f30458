"""i-ODIN, beside pytorch-ood's ODIN and OpenOOD's i-ODIN."""

import warnings

import pytorch_ood.detector as theirs
import torch

from hosts.pytorch_ood.conftest import images, trained
from tie_ext.pytorch_ood import IODIN


def test_iodin_on_all_values_is_their_odin():
    net, x = trained().eval(), images()[0]
    torch.testing.assert_close(IODIN(net, values=28 * 28)(x), theirs.ODIN(net)(x))
    assert not torch.equal(IODIN(net, eps=0.1)(x), theirs.ODIN(net, eps=0.1)(x))


def test_iodin_is_openoods_on_the_same_images(openood_root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openood.networks.lenet import LeNet
        from openood.postprocessors import IODINPostprocessor
        from openood.utils.config import Config
    net, x = LeNet(10).eval(), torch.rand(5, 3, 28, 28)
    post = {"postprocessor_args": {"temperature": 10, "noise": 0.05}, "postprocessor_sweep": {}}
    dataset = {"name": "cifar10", "normalization_type": "cifar10"}
    openoods = IODINPostprocessor(Config({"postprocessor": post, "dataset": dataset}))
    _, conf = openoods.postprocess(net, x.clone())
    ours = IODIN(net, eps=0.05, temperature=10, norm_std=list(openoods.input_std))
    torch.testing.assert_close(ours(x), -conf)
