"""The layers of a backbone that a garbage head reads, and its classifier."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tie_ext.utils.views import add_hook, eval_view

MAX_LAYERS = 8
"""Layers read at most, evenly spaced from the first to the last. Sixteen cost twice as much and
rank no better (docs/research/cost.md)."""
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
"""What may stand between a convolution and its ReLU."""


def find_layers(backbone: nn.Module, x: Tensor) -> dict[str, int]:
    """The layers to read: convolutions, each after the normalisation that follows it, or the
    blocks of a transformer.

    Arguments:
        backbone: The network; left as it was.
        x: An image ``(1, C, H, W)`` for a trial run.

    Returns:
        The channels of at most :data:`MAX_LAYERS` of them by name, in the order of their calls.

    Raises:
        ValueError: If there are neither convolutions nor blocks.
    """
    convolutions: dict[str, Tensor] = {}  # maps, by the layer that gave them: convolution or norm
    blocks: dict[str, int] = {}
    view = eval_view(backbone)

    def look(name: str, module: nn.Module, args: tuple, output: object) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if output.ndim == 4 and isinstance(module, nn.Conv2d) and output[0, 0].numel() > 1:
            convolutions[name] = output
        elif output.ndim == 4 and isinstance(module, NORMS) and convolutions:
            if args and args[0] is list(convolutions.values())[-1]:
                convolutions.popitem()
                convolutions[name] = output
        elif output.ndim == 3 and isinstance(_parent(view, name), nn.Sequential | nn.ModuleList):
            blocks[name] = output.shape[2]

    for name, module in list(view.named_modules()):
        if name and not isinstance(module, torch.jit.ScriptModule):  # which calls no hooks
            add_hook(view, name, partial(look, name))
    with torch.no_grad():
        view(x)
    found = {
        name: channels
        for name, channels in blocks.items()
        if not any(name.startswith(f"{other}.") for other in blocks)
    }
    if len(found) < len(convolutions):  # a transformer has one, which makes patches
        found = {name: maps.shape[1] for name, maps in convolutions.items()}
    if not found:
        raise ValueError(
            "Expected a backbone with convolutions or transformer blocks for the head to read, "
            f"but got {type(backbone).__name__}"
        )
    return _spread(found)


def _parent(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _spread(layers: dict[str, int]) -> dict[str, int]:
    """At most :data:`MAX_LAYERS` of them, evenly spaced."""
    names, count = list(layers), min(MAX_LAYERS, len(layers))
    places = torch.linspace(0, len(names) - 1, count).tolist()
    return {names[round(place)]: layers[names[round(place)]] for place in places}


def classifier_name(backbone: nn.Module) -> str:
    """Name of the last linear layer, ``fc`` where there is one.

    Raises:
        ValueError: If there is none.
    """
    linear = [name for name, part in backbone.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise ValueError(
            f"Expected a backbone that ends in a linear layer, but got {type(backbone).__name__} "
            "without any"
        )
    return "fc" if "fc" in linear else linear[-1]


def cut_classifier(backbone: nn.Module) -> nn.Linear:
    """Replace the last linear layer of a network by the identity, and give it back.

    Raises:
        ValueError: If there is none.
    """
    name = classifier_name(backbone)
    classifier = backbone.get_submodule(name)
    identity = nn.Identity().train(classifier.training)
    setattr(_parent(backbone, name), name.rpartition(".")[2], identity)
    return classifier  # type: ignore[return-value]


def check_backbone(backbone: nn.Module, x: Tensor) -> None:
    """Run a backbone once, since a layer after its last linear layer would silently become part of
    the features, and a wrong shape would be found late.

    Arguments:
        backbone: The network; left as it was.
        x: An image ``(1, C, H, W)``.

    Raises:
        ValueError: If it fails, or does not return the output of its last linear layer.
    """
    kind, name = type(backbone).__name__, classifier_name(backbone)
    view, outputs = eval_view(backbone), []
    add_hook(view, name, lambda part, args, output: outputs.append(output.clone()))
    try:
        with torch.no_grad():
            y = view(x.to(next(backbone.parameters())))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"Expected a backbone for images {tuple(x.shape[1:])}, "
            f"but {kind} fails on one: {error}"
        ) from error
    if isinstance(y, Tensor) and outputs and _equal(y, outputs[-1]):
        return
    if isinstance(y, Tensor) and _are_probabilities(y):
        raise ValueError(
            f"Expected a backbone that returns the logits that its last linear layer `{name}` "
            f"gives, but {kind} returns probabilities; leave the softmax out"
        )
    got = (
        "something else than"
        if isinstance(y, Tensor)
        else f"a {type(y).__name__} and no tensor as"
    )
    raise ValueError(
        f"Expected a backbone that returns what its last linear layer gives, but {kind} returns "
        f"{got} `{name}` does; return the logits as they are, and call the last linear layer `fc`"
    )


def _equal(y: Tensor, output: Tensor) -> bool:
    return y.shape == output.shape and torch.allclose(y, output, 0, 0, equal_nan=True)


def _are_probabilities(y: Tensor) -> bool:
    if y.ndim != 2 or bool((y < 0).any()):
        return False
    return torch.allclose(y.sum(1), y.new_ones(len(y)), atol=1e-2)
