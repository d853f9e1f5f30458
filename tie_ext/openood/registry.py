"""Putting TIE's names where OpenOOD looks names up, and taking them away again.

OpenOOD keeps its tables inside functions, and modules hold references to those functions. So each
function is wrapped once, and the wrapper is put wherever the original has been copied to; modules
imported later copy the wrapper themselves.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
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
from tie_ext.openood.attached import AttachPostprocessor
from tie_ext.openood.combined import CombinedPostprocessor
from tie_ext.openood.cpu import replaced
from tie_ext.openood.network import tie_net, tie_net_of
from tie_ext.openood.postprocessors import Postprocessor, TIEPostprocessor, TIEUEPostprocessor
from tie_ext.openood.recorder import LastRecorder
from tie_ext.openood.rejection import DMRPostprocessor
from tie_ext.openood.trainers import OpenOODAttachTrainer, OpenOODTIETrainer

_OURS = (
    TIEPostprocessor,
    TIEUEPostprocessor,
    CombinedPostprocessor,
    AttachPostprocessor,
    DMRPostprocessor,
)
POSTPROCESSORS: dict[str, type[Postprocessor]] = {cls.name: cls for cls in _OURS}
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
SIZES |= {"Swin_T": 224, "ViT_B_16": 224, "RegNet_Y_16GF": 384}
"""Networks that OpenOOD's ``scripts/eval_ood*.py`` build, and the side of their images in pixels.
"""


# Ours of OpenOOD's functions. Each takes the original, and then what the original takes.


def _get_trainer(original, net, train_loader, val_loader, config):
    if config.trainer.name in TRAINERS:
        return TRAINERS[config.trainer.name](net, train_loader, config)
    return original(net, train_loader, val_loader, config)


def _get_recorder(original, config):
    return LastRecorder(config) if config.trainer.name in TRAINERS else original(config)


def _get_network(original, config):
    if config.name != "tie_net":
        return original(config)
    net = tie_net(config)
    if config.pretrained:
        net.load_state_dict(torch.load(config.checkpoint, map_location="cpu", weights_only=True))
    # Not wrapped in DistributedDataParallel: TIE's trainer synchronises the processes itself.
    return net.to("cuda" if config.num_gpus > 0 and torch.cuda.is_available() else "cpu")


def _get_postprocessor(original, config):
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


def _get_postprocessor_of_api(original, config_root, name, id_data_name):
    # Where the user has no such file, OpenOOD would try to download one that it does not have.
    if name in POSTPROCESSORS and not Path(config_root, "postprocessors", f"{name}.yml").exists():
        config_root = str(configs())
    return original(config_root, name, id_data_name)


def _launch(original, main_func, *args, **kwargs):
    return original(partial(_registered, main_func), *args, **kwargs)


def _registered(function: Callable, *args):
    """Call a function in a new process, where nothing is registered yet."""
    register()
    return function(*args)


def _with_checkpoints(original: type[nn.Module], size: int) -> type[nn.Module]:
    """A network's class whose ``load_state_dict`` also takes the checkpoint of a ``tie_net``."""

    @wraps(original, updated=())
    class Network(original):  # type: ignore[misc, valid-type]
        def load_state_dict(self, state_dict, *args, **kwargs):
            if not {"tau", "low", "high"} <= set(state_dict):
                return super().load_state_dict(state_dict, *args, **kwargs)
            net = tie_net_of(state_dict, self, size)
            # OpenOOD's script holds this very object, so it becomes the other one.
            self.__class__, self.__dict__ = type(net), vars(net)  # type: ignore[assignment, misc]
            return self.load_state_dict(state_dict)

    Network.__module__ = openood.networks.__name__  # where it can be found again by name
    return Network


_REPLACEMENTS: dict[Callable, Callable] = {
    openood.trainers.utils.get_trainer: _get_trainer,
    openood.recorders.utils.get_recorder: _get_recorder,
    openood.networks.utils.get_network: _get_network,
    openood.postprocessors.utils.get_postprocessor: _get_postprocessor,
    api.get_postprocessor: _get_postprocessor_of_api,
    openood.utils.launch: _launch,
}
_undo = ExitStack()
_wrapped: dict[Callable, Callable] = {}  # wrapper by original, while registered


def register() -> None:
    """Make TIE's trainers, network, postprocessors and recorder known to OpenOOD.

    The networks that its scripts build, :data:`SIZES`, become a ``tie_net`` when they load a
    checkpoint of one. Calling it again changes nothing.
    """
    if _wrapped:
        return
    for original, ours in _REPLACEMENTS.items():
        _wrapped[original] = wraps(original)(partial(ours, original))
    _undo.callback(_wrapped.clear)
    _swap(_wrapped)
    _undo.callback(_swap, {wrapper: original for original, wrapper in _wrapped.items()})
    networks = openood.networks
    changed = {name: _with_checkpoints(getattr(networks, name), SIZES[name]) for name in SIZES}
    _undo.enter_context(replaced(networks, **changed))
    tables: list[tuple[dict, dict]] = [
        (info.num_classes_dict, CLASSES),
        (api.postprocessors, POSTPROCESSORS),
    ]
    for table, entries in tables:
        for name in entries.keys() - table.keys():
            table[name] = entries[name]
            _undo.callback(table.pop, name)


def unregister() -> None:
    """Leave OpenOOD as it was before :func:`register`."""
    _undo.close()


def registered() -> bool:
    """Whether OpenOOD knows TIE."""
    return bool(_wrapped)


def _swap(functions: dict[Callable, Callable]) -> None:
    """Put each function's replacement wherever a module holds the function, a user's too."""
    by_id = {id(function): other for function, other in functions.items()}
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in by_id:
                setattr(module, name, by_id[id(value)])
