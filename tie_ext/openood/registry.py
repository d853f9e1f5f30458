"""Putting TIE's names where OpenOOD looks names up, and taking them away again.

OpenOOD keeps its tables inside functions, and its modules hold their own reference to those functions. So each function is wrapped once, and the
wrapper is put wherever the original has been copied to; modules imported later copy the wrapper themselves.
"""

import sys
from collections.abc import Callable
from functools import wraps

import openood.evaluation_api.postprocessor as api
import openood.evaluators
import openood.networks
import openood.networks.utils
import openood.pipelines
import openood.postprocessors.info as info
import openood.postprocessors.utils
import openood.trainers.utils
import openood.utils
import torch
from openood.networks.adascale_net import AdaScaleANet, AdaScaleLNet
from openood.networks.ash_net import ASHNet
from openood.networks.scale_net import ScaleNet
from openood.utils.config import Config

from tie_ext.network import TIENet
from tie_ext.openood.combined import CombinedPostprocessor
from tie_ext.openood.network import tie_net
from tie_ext.openood.postprocessors import TIEPostprocessor, TIEUEPostprocessor
from tie_ext.openood.rejection import DMRPostprocessor
from tie_ext.openood.trainer import OpenOODTIETrainer

POSTPROCESSORS: dict[str, type[TIEPostprocessor] | type[TIEUEPostprocessor] | type[CombinedPostprocessor] | type[DMRPostprocessor]] = {
    "tie": TIEPostprocessor,
    "tie_ue": TIEUEPostprocessor,
    "tie_combined": CombinedPostprocessor,
    "dmr": DMRPostprocessor,
}
CLASSES = {"mnist": 10, "fashionmnist": 10, "svhn": 10, "tinyimagenet": 200}
"""Class counts that MDS, RMDS, KLM, SHE, Gram and OpenMax look up by the data set's name and OpenOOD does not have."""
SHAPED = {"ash": ASHNet, "scale": ScaleNet, "adascale_a": AdaScaleANet, "adascale_l": AdaScaleLNet}
"""Networks that these postprocessors need; OpenOOD's evaluation API puts them around the user's network, its pipelines do not."""

_wrapped: dict[Callable, Callable] = {}  # wrapper by original, while registered


def register() -> None:
    """Make trainer ``tie``, network ``tie_net`` and postprocessors ``tie``, ``tie_ue``, ``tie_combined`` and ``dmr`` known to OpenOOD.

    Calling it again changes nothing.
    """
    if _wrapped:
        return
    for wrap, original in (
        (_with_trainer, openood.trainers.utils.get_trainer),
        (_with_network, openood.networks.utils.get_network),
        (_with_postprocessors, openood.postprocessors.utils.get_postprocessor),
        (_with_configs, api.get_postprocessor),
        (_with_registration, openood.utils.launch),
    ):
        _wrapped[original] = wraps(original)(wrap(original))
    _swap(_wrapped)
    api.postprocessors.update(POSTPROCESSORS)
    _missing.update({name: n for name, n in CLASSES.items() if name not in info.num_classes_dict})
    info.num_classes_dict.update(_missing)


_missing: dict[str, int] = {}


def unregister() -> None:
    """Leave OpenOOD as it was before :func:`register`."""
    _swap({wrapper: original for original, wrapper in _wrapped.items()})
    _wrapped.clear()
    for name in POSTPROCESSORS:
        api.postprocessors.pop(name, None)
    for name in _missing:
        info.num_classes_dict.pop(name, None)
    _missing.clear()


def registered() -> bool:
    """Whether OpenOOD knows TIE."""
    return bool(_wrapped)


def _swap(functions: dict[Callable, Callable]) -> None:
    for name, module in list(sys.modules.items()):
        if name == "__main__" or name.startswith("openood"):
            for key, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in functions:
                    setattr(module, key, functions[value])


class Registered:
    """A function of OpenOOD's that is to run in a process of its own, where nothing is registered yet.

    Arguments:
        function: The function; found by its name there.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        """Register, then call it."""
        register()
        return self.function(*args)


def _with_registration(original: Callable) -> Callable:
    def launch(main_func, *args, **kwargs):
        return original(Registered(main_func), *args, **kwargs)

    return launch


def _with_trainer(original: Callable) -> Callable:
    def get_trainer(net, train_loader, val_loader, config):
        if config.trainer.name == "tie":
            return OpenOODTIETrainer(net, train_loader, config)
        return original(net, train_loader, val_loader, config)

    return get_trainer


def _with_network(original: Callable) -> Callable:
    def get_network(network_config):
        if network_config.name != "tie_net":
            return original(network_config)
        net = tie_net(network_config)
        if network_config.pretrained:
            net.load_state_dict(torch.load(network_config.checkpoint, map_location="cpu", weights_only=True))
        # Not wrapped in DistributedDataParallel: TIE's trainer keeps the processes in step itself (tie_ext.support.distributed).
        return net.to("cuda" if network_config.num_gpus > 0 and torch.cuda.is_available() else "cpu")

    return get_network


def _with_postprocessors(original: Callable) -> Callable:
    def get_postprocessor(config):
        name = config.postprocessor.name
        if name in POSTPROCESSORS:
            return POSTPROCESSORS[name](config)
        try:
            postprocessor = original(config)
        except KeyError:
            if name not in api.postprocessors:
                raise
            postprocessor = api.postprocessors[name](config)  # its pipelines know fewer names than its evaluation API
        if name in SHAPED:
            score = postprocessor.postprocess
            postprocessor.postprocess = lambda net, data: score(SHAPED[name](net) if isinstance(net, TIENet) else net, data)
        return postprocessor

    return get_postprocessor


def _with_configs(original: Callable) -> Callable:
    def get_postprocessor(config_root, postprocessor_name, id_data_name):
        if postprocessor_name not in POSTPROCESSORS:
            return original(config_root, postprocessor_name, id_data_name)
        cls = POSTPROCESSORS[postprocessor_name]  # OpenOOD would look for a file, and download it where there is none
        return cls(Config({"postprocessor": cls.DEFAULTS, "dataset": {"name": id_data_name}}))

    return get_postprocessor
