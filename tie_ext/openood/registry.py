"""Putting TIE's names where OpenOOD looks names up, and taking them away again.

OpenOOD keeps its tables inside functions, and its modules hold references to those functions. So
each function is wrapped once, and the wrapper is put wherever the original has been copied to;
modules imported later copy the wrapper themselves.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import openood.evaluation_api.postprocessor as api
import openood.evaluators
import openood.networks
import openood.networks.utils
import openood.pipelines
import openood.postprocessors.info as info
import openood.postprocessors.utils
import openood.recorders.utils
import openood.trainers.utils
import openood.utils
import torch
from openood.networks.adascale_net import AdaScaleANet, AdaScaleLNet
from openood.networks.ash_net import ASHNet
from openood.networks.scale_net import ScaleNet
from torch import nn

from tie_ext.models.network import TIENet
from tie_ext.openood import configs
from tie_ext.openood.combined import CombinedPostprocessor
from tie_ext.openood.network import tie_net, tie_net_of
from tie_ext.openood.postprocessors import Postprocessor, TIEPostprocessor, TIEUEPostprocessor
from tie_ext.openood.recorder import LastRecorder
from tie_ext.openood.rejection import DMRPostprocessor
from tie_ext.openood.trainers import OpenOODAttachTrainer, OpenOODTIETrainer

POSTPROCESSORS: dict[str, type[Postprocessor]] = {
    cls.name: cls
    for cls in (TIEPostprocessor, TIEUEPostprocessor, CombinedPostprocessor, DMRPostprocessor)
}
TRAINERS: dict[str, type[OpenOODTIETrainer] | type[OpenOODAttachTrainer]] = {
    "tie": OpenOODTIETrainer,
    "attach": OpenOODAttachTrainer,
}
CLASSES = {"mnist": 10, "fashionmnist": 10, "svhn": 10, "tinyimagenet": 200}
"""Class counts that MDS, RMDS, KLM, SHE, Gram and OpenMax look up by the name of the data set, and
that OpenOOD does not have."""
SHAPED = {"ash": ASHNet, "scale": ScaleNet, "adascale_a": AdaScaleANet, "adascale_l": AdaScaleLNet}
"""Networks that these postprocessors need around the user's; OpenOOD's evaluation API adds them,
its pipelines do not."""
SIZES = {"ResNet18_32x32": 32, "ResNet18_224x224": 224, "ResNet50": 224}
"""Networks that OpenOOD's ``scripts/eval_ood*.py`` build, and the side of their images in pixels.
"""

_wrapped: dict[Callable, Callable] = {}  # wrapper by original, while registered
_undo = ExitStack()


def register() -> None:
    """Make TIE's trainers, network, postprocessors and recorder known to OpenOOD.

    The networks that its scripts build, :data:`SIZES`, become a ``tie_net`` when they load a
    checkpoint of one. Calling it again changes nothing.
    """
    if _wrapped:
        return
    for wrap, original in (
        (_with_trainer, openood.trainers.utils.get_trainer),
        (_with_network, openood.networks.utils.get_network),
        (_with_postprocessors, openood.postprocessors.utils.get_postprocessor),
        (_with_configs, api.get_postprocessor),
        (_with_recorder, openood.recorders.utils.get_recorder),
        (_with_registration, openood.utils.launch),
    ):
        _wrapped[original] = wraps(original)(wrap(original))
    _undo.callback(_wrapped.clear)
    _swap(_wrapped)
    _undo.callback(_swap, {wrapper: original for original, wrapper in _wrapped.items()})
    for name, size in SIZES.items():
        network = _with_checkpoints(getattr(openood.networks, name), size)
        _undo.enter_context(patch.object(openood.networks, name, network))
    counts = info.num_classes_dict
    _undo.enter_context(patch.dict(counts, {**CLASSES, **counts}))
    _undo.enter_context(patch.dict(api.postprocessors, POSTPROCESSORS))


def unregister() -> None:
    """Leave OpenOOD as it was before :func:`register`."""
    _undo.close()


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
    """A function of OpenOOD's that is called in a new process, where nothing is registered yet.

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
        if config.trainer.name in TRAINERS:
            return TRAINERS[config.trainer.name](net, train_loader, config)
        return original(net, train_loader, val_loader, config)

    return get_trainer


def _with_recorder(original: Callable) -> Callable:
    def get_recorder(config):
        return LastRecorder(config) if config.trainer.name in TRAINERS else original(config)

    return get_recorder


def _with_checkpoints(original: type[nn.Module], size: int) -> type[nn.Module]:
    """A network's class whose ``load_state_dict`` also takes the checkpoint of a ``tie_net``."""

    class Network(original):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state_dict, *args, **kwargs):
            if not {"tau", "low", "high"} <= set(state_dict):
                return super().load_state_dict(state_dict, *args, **kwargs)
            net = tie_net_of(state_dict, self, size)
            # OpenOOD's script holds this very object, so it becomes the other one.
            self.__class__, self.__dict__ = type(net), vars(net)  # type: ignore[assignment, misc]
            return self.load_state_dict(state_dict)

    for name in ("__name__", "__qualname__", "__doc__"):
        setattr(Network, name, getattr(original, name))
    Network.__module__ = openood.networks.__name__  # where it can be found again by name
    return Network


def _with_network(original: Callable) -> Callable:
    def get_network(config):
        if config.name != "tie_net":
            return original(config)
        net = tie_net(config)
        if config.pretrained:
            net.load_state_dict(
                torch.load(config.checkpoint, map_location="cpu", weights_only=True)
            )
        # Not wrapped in DistributedDataParallel: TIE's trainer synchronises the processes itself.
        return net.to("cuda" if config.num_gpus > 0 and torch.cuda.is_available() else "cpu")

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
            # OpenOOD's pipelines know fewer names than its evaluation API.
            postprocessor = api.postprocessors[name](config)
        if name in SHAPED:
            score = postprocessor.postprocess
            postprocessor.postprocess = lambda net, data: score(
                SHAPED[name](net) if isinstance(net, TIENet) else net, data
            )
        return postprocessor

    return get_postprocessor


def _with_configs(original: Callable) -> Callable:
    def get_postprocessor(config_root, postprocessor_name, id_data_name):
        # Where the user has no such file, OpenOOD would try to download one that it does not have.
        own = Path(config_root, "postprocessors", f"{postprocessor_name}.yml").exists()
        if postprocessor_name in POSTPROCESSORS and not own:
            config_root = str(configs())
        return original(config_root, postprocessor_name, id_data_name)

    return get_postprocessor
