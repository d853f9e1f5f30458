"""Putting TIE's names where OpenOOD looks names up, and taking them away again.

OpenOOD keeps its tables inside functions, and its modules hold their own reference to those functions. So each function is wrapped once, and the
wrapper is put wherever the original has been copied to; modules imported later copy the wrapper themselves.
"""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

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
from tie_ext.openood.attach_trainer import OpenOODAttachTrainer
from tie_ext.openood.combined import CombinedPostprocessor
from tie_ext.openood.network import tie_net, tie_net_of
from tie_ext.openood.postprocessors import TIEPostprocessor, TIEUEPostprocessor
from tie_ext.openood.recorder import LastRecorder
from tie_ext.openood.rejection import DMRPostprocessor
from tie_ext.openood.trainer import OpenOODTIETrainer

POSTPROCESSORS: dict[
    str,
    type[TIEPostprocessor]
    | type[TIEUEPostprocessor]
    | type[CombinedPostprocessor]
    | type[DMRPostprocessor],
] = {
    "tie": TIEPostprocessor,
    "tie_ue": TIEUEPostprocessor,
    "tie_combined": CombinedPostprocessor,
    "dmr": DMRPostprocessor,
}
TRAINERS: dict[str, type[OpenOODTIETrainer] | type[OpenOODAttachTrainer]] = {
    "tie": OpenOODTIETrainer,
    "attach": OpenOODAttachTrainer,
}
CLASSES = {"mnist": 10, "fashionmnist": 10, "svhn": 10, "tinyimagenet": 200}
"""Class counts that MDS, RMDS, KLM, SHE, Gram and OpenMax look up by the data set's name and OpenOOD does not have."""
SHAPED = {"ash": ASHNet, "scale": ScaleNet, "adascale_a": AdaScaleANet, "adascale_l": AdaScaleLNet}
"""Networks that these postprocessors need; OpenOOD's evaluation API puts them around the user's network, its pipelines do not."""

SIZES = {"ResNet18_32x32": 32, "ResNet18_224x224": 224, "ResNet50": 224}
"""The networks that OpenOOD's ``scripts/eval_ood*.py`` build, and the side of their images in pixels."""

_wrapped: dict[Callable, Callable] = {}  # wrapper by original, while registered


def register() -> None:
    """Make trainers ``tie`` and ``attach``, network ``tie_net`` and postprocessors ``tie``, ``tie_ue``, ``tie_combined`` and ``dmr`` known to
    OpenOOD; ``best.ckpt`` of these trainers is the last epoch's.

    The networks that its scripts build, :data:`SIZES`, become a ``tie_net`` when they are given a checkpoint of one. Calling it again changes
    nothing.
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
    _swap(_wrapped)
    for name, size in SIZES.items():
        _networks[name] = getattr(openood.networks, name)
        setattr(openood.networks, name, _with_checkpoints(_networks[name], size))
    api.postprocessors.update(POSTPROCESSORS)
    _missing.update({name: n for name, n in CLASSES.items() if name not in info.num_classes_dict})
    info.num_classes_dict.update(_missing)


_missing: dict[str, int] = {}
_networks: dict[str, type[nn.Module]] = {}  # the originals, while registered


def unregister() -> None:
    """Leave OpenOOD as it was before :func:`register`."""
    _swap({wrapper: original for original, wrapper in _wrapped.items()})
    _wrapped.clear()
    for name, network in _networks.items():
        setattr(openood.networks, name, network)
    _networks.clear()
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
        if config.trainer.name in TRAINERS:
            return TRAINERS[config.trainer.name](net, train_loader, config)
        return original(net, train_loader, val_loader, config)

    return get_trainer


def _with_recorder(original: Callable) -> Callable:
    def get_recorder(config):
        return LastRecorder(config) if config.trainer.name in TRAINERS else original(config)

    return get_recorder


def _with_checkpoints(original: type[nn.Module], size: int) -> type[nn.Module]:
    """A network's class whose ``load_state_dict`` takes the checkpoint of a ``tie_net`` too: its scripts build the network, then fill it."""

    class Network(original):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state_dict, *args, **kwargs):
            if not {"tau", "low", "high"} <= set(state_dict):
                return super().load_state_dict(state_dict, *args, **kwargs)
            net = tie_net_of(state_dict, self, size)
            # The script holds this very object, and asks for no other.
            self.__class__, self.__dict__ = type(net), vars(net)  # type: ignore[assignment, misc]
            return self.load_state_dict(state_dict)

    Network.__name__, Network.__qualname__, Network.__doc__ = (
        original.__name__,
        original.__qualname__,
        original.__doc__,
    )
    Network.__module__ = openood.networks.__name__  # where it can be found again by name
    return Network


def _with_network(original: Callable) -> Callable:
    def get_network(network_config):
        if network_config.name != "tie_net":
            return original(network_config)
        net = tie_net(network_config)
        if network_config.pretrained:
            net.load_state_dict(
                torch.load(network_config.checkpoint, map_location="cpu", weights_only=True)
            )
        # Not wrapped in DistributedDataParallel: TIE's trainer keeps the processes in step itself (tie_ext.utils.distributed).
        return net.to(
            "cuda" if network_config.num_gpus > 0 and torch.cuda.is_available() else "cpu"
        )

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
            postprocessor = api.postprocessors[name](
                config
            )  # its pipelines know fewer names than its evaluation API
        if name in SHAPED:
            score = postprocessor.postprocess
            postprocessor.postprocess = lambda net, data: score(
                SHAPED[name](net) if isinstance(net, TIENet) else net, data
            )
        return postprocessor

    return get_postprocessor


def _with_configs(original: Callable) -> Callable:
    def get_postprocessor(config_root, postprocessor_name, id_data_name):
        # Where the user has no file of his own, OpenOOD would download one, of a name that it does not know.
        own = (
            postprocessor_name not in POSTPROCESSORS
            or Path(config_root, "postprocessors", f"{postprocessor_name}.yml").exists()
        )
        return original(config_root if own else str(configs()), postprocessor_name, id_data_name)

    return get_postprocessor
