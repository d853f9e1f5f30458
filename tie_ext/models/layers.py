"""The layers of a backbone that a garbage head reads."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tie_ext.models.statistics import NORMS, first_tensor
from tie_ext.utils.views import add_hook, eval_view

MAX_LAYERS = 8
"""Layers read, evenly spaced from the first to the last; blocks are looked into where there are
fewer. Each costs a pooling of its maps in every forward pass."""


def find_layers(backbone: nn.Module, x: Tensor, most: int = MAX_LAYERS) -> dict[str, int]:
    """The layers to read: convolutions, each after the normalisation that follows it, or the
    blocks of a transformer.

    Arguments:
        backbone: The network; left as it was.
        x: Images ``(B, C, H, W)`` for a trial run; of two or more, what has not the batch's size
            is told apart, as an encoding of positions.
        most: Layers at most.

    Returns:
        The channels of the layers by name, in the order of their calls.

    Raises:
        ValueError: If there are neither convolutions nor blocks.
    """
    convolutions: dict[str, Tensor] = {}  # maps, by the layer that gave them: convolution or norm
    blocks: dict[str, int] = {}
    last: list[int] = []  # outputs of the last linear layer, normalisation or convolution
    view = eval_view(backbone)

    def look(name: str, module: nn.Module, args: tuple, output: object) -> None:
        output = first_tensor(output)
        if output is None or not output.is_floating_point() or len(output) != len(x):
            return
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d):
            last[:] = [_channels(module)]
        if output.ndim == 4 and isinstance(module, nn.Conv2d) and output[0, 0].numel() > 1:
            convolutions[name] = output
        elif output.ndim == 4 and isinstance(module, NORMS) and convolutions:
            if args and args[0] is list(convolutions.values())[-1]:
                convolutions.popitem()
                convolutions[name] = output
        elif isinstance(_parent(view, name), nn.Sequential | nn.ModuleList) and (
            output.ndim == 3 or _is_channels_last(module, output, last)
        ):
            blocks[name] = output.shape[-1]

    for name, module in list(view.named_modules()):
        if name and not isinstance(module, torch.jit.ScriptModule):  # which calls no hooks
            add_hook(view, name, partial(look, name))
    with torch.no_grad():
        view(x)
    found = _level(blocks, view)
    if len(found) < len(convolutions):  # a transformer has one, which makes patches
        found = {name: maps.shape[1] for name, maps in convolutions.items()}
    if not found:
        raise ValueError(
            "Expected a backbone with convolutions or transformer blocks for the head to read, "
            f"but got {type(backbone).__name__}"
        )
    return _spread(found, most)


def _channels(module: Any) -> int:
    """Outputs of a linear layer, normalisation or convolution."""
    return module.normalized_shape[-1] if module.weight is None else len(module.weight)


def _is_channels_last(block: nn.Module, output: Tensor, last: list[int]) -> bool:
    """Whether maps of a block are ``(B, H, W, C)``: what computed them last has C outputs."""
    if output.ndim != 4 or not _has_parts(block):
        return False
    return last == [output.shape[3]] != [output.shape[1]]


def _has_parts(block: nn.Module) -> bool:
    return type(block) is not nn.Sequential and any(True for _ in block.children())


def _level(blocks: dict[str, int], view: nn.Module) -> dict[str, int]:
    """The outermost blocks; where they are fewer than :data:`MAX_LAYERS`, the blocks inside of
    those that have some, such as a stage.
    """
    found = _outermost(blocks)
    whole = {name: size for name, size in blocks.items() if _has_parts(view.get_submodule(name))}
    while len(found) < MAX_LAYERS:
        inner = _outermost({name: size for name, size in whole.items() if name not in found})
        if not inner:
            break
        whole = {name: size for name, size in whole.items() if name not in found}
        stages = {name for name in found if any(of.startswith(f"{name}.") for of in inner)}
        found = {name: blocks[name] for name in blocks if name in {*found, *inner} - stages}
    return found


def _outermost(blocks: dict[str, int]) -> dict[str, int]:
    return {
        name: channels
        for name, channels in blocks.items()
        if not any(name.startswith(f"{other}.") for other in blocks)
    }


def _parent(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _spread(layers: dict[str, int], most: int) -> dict[str, int]:
    """At most so many of them, evenly spaced."""
    names, count = list(layers), min(most, len(layers))
    places = torch.linspace(0, len(names) - 1, count).tolist()
    return {names[round(place)]: layers[names[round(place)]] for place in places}
