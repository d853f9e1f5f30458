"""The last layers of a classifier, by where its logits are: cut off, as one, and put back."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tie_ext.utils.views import add_hook, hook_view


class Readout(NamedTuple):
    """Where the logits of a classifier are."""

    layers: tuple[tuple[str, ...], ...]
    """Names of each layer that gives logits: several where one layer has several names. Two
    layers are averaged."""
    path: tuple[str | int, ...] = ()
    """Keys, indices or attributes that lead to the logits in what the classifier returns."""
    maps: str = ""
    """What makes logits ``(B, n)`` of the maps of a 1x1 convolution: their mean over space
    (``mean``), or that of what a ReLU lets through (``relu``). Empty for a linear layer."""
    behind: bool = False
    """Whether something, such as a softmax, stands between the logits and what is returned."""

    @property
    def plain(self) -> bool:
        """Whether the classifier returns the logits of one linear layer, and nothing else."""
        return len(self.layers) == 1 and not (self.path or self.maps or self.behind)


class Selected(nn.Module):
    """A network that returns its logits, by a function of what it returned.

    Arguments:
        model: The network.
        logits: Gives logits ``(B, n)`` of the output of the network.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Any], Tensor]):
        super().__init__()
        self.model, self.logits = model, logits
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, n)`` of images ``(B, C, H, W)``."""
        return self.logits(self.model(x))


class LastLayers(nn.Module):
    """Last layers that are not one linear layer of n outputs, as one, by their features side by
    side: 1x1 convolutions, two layers that are averaged, or one logit for two classes.

    Arguments:
        parts: Linear layers, or 1x1 convolutions of features ``(B, F, 1, 1)``.
    """

    def __init__(self, parts: Sequence[Any]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.sizes = [part.weight.shape[1] for part in parts]
        self.in_features = sum(self.sizes)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``(B, n)`` of features ``(B, F)``; ``[0, z]`` of one logit z."""
        found = []
        for part, z in zip(self.parts, h.split(self.sizes, dim=1), strict=True):
            z = z[:, :, None, None] if isinstance(part, nn.Conv2d) else z
            found.append(part(z).flatten(1))
        logits = found[0] if len(found) == 1 else (found[0] + found[1]) / 2
        return nn.functional.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits

    @property
    def weight(self) -> Tensor:
        """Weights ``(n, F)`` of the one linear layer that they are."""
        weights = [part.weight.flatten(1) for part in self.parts]  # type: ignore[operator, union-attr]
        w = torch.cat(weights, dim=1) / len(weights)
        return nn.functional.pad(w, (0, 0, 1, 0)) if len(w) == 1 else w

    @property
    def bias(self) -> Tensor | None:
        """Biases ``(n,)``; None where no layer has any."""
        found = [part.bias for part in self.parts if part.bias is not None]
        if not found:
            return None
        b = torch.stack(found).sum(dim=0) / len(self.parts)  # type: ignore[arg-type]
        return nn.functional.pad(b, (1, 0)) if len(b) == 1 else b


class OwnLogits(nn.Module):
    """The logits of a network whose last layer is no linear function of its features: they are
    the last n of these.

    Arguments:
        in_features: F, logits included.
        num_classes: n.
        like: A tensor whose device and type are those of the network.
    """

    _like: Tensor

    def __init__(self, in_features: int, num_classes: int, like: Tensor):
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        self.register_buffer("_like", like.detach().new_empty(0), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """Logits ``(B, n)`` of features ``(B, F)``."""
        return h[:, -self.num_classes :]

    @property
    def weight(self) -> Tensor:
        """The matrix ``(n, F)`` that chooses the logits."""
        eye = torch.eye(self.num_classes).to(self._like)
        return nn.functional.pad(eye, (self.in_features - self.num_classes, 0))

    @property
    def bias(self) -> None:
        """None."""
        return None


def classifier_name(backbone: nn.Module) -> str:
    """Name of the last linear layer that is registered, ``fc`` where there is one: where there is
    no image to run the network on.

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


def cut(backbone: nn.Module, readout: Readout) -> list[nn.Module]:
    """Replace the last layers of a classifier by the identity, and give them back; one that maps
    are made by stays in the classifier.
    """
    layers = [backbone.get_submodule(names[0]) for names in readout.layers]
    for names, layer in zip(readout.layers, layers, strict=True):
        if not readout.maps:
            _put(backbone, names, nn.Identity().train(layer.training))
    return layers


def sizes(layers: Sequence[Any], readout: Readout) -> tuple[int, int]:
    """How many classes (2 of one logit) and features a classifier has, by its last layers."""
    outputs, inputs = len(layers[0].weight), sum(layer.weight.shape[1] for layer in layers)
    return max(2, outputs), inputs + (outputs if readout.maps else 0)


def last_layer(layers: Sequence[Any], readout: Readout, num_classes: int) -> nn.Module:
    """The layers that :func:`cut` gave as one, ``(B, F) -> (B, n)``; a new one where the
    classifier has one linear layer of another number of outputs.

    Raises:
        ValueError: If they have another number of outputs, and are not one linear layer.
    """
    (outputs, features), first = sizes(layers, readout), layers[0]
    one_logit = outputs == num_classes > len(first.weight)
    if len(layers) == 1 and isinstance(first, nn.Linear) and not one_logit:
        like: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
        kept = len(first.weight) == num_classes
        return first if kept else nn.Linear(features, num_classes, **like)
    if outputs != num_classes:
        raise ValueError(
            f"Expected a classifier of {num_classes} classes, but got one of {outputs}"
        )
    return OwnLogits(features, outputs, first.weight) if readout.maps else LastLayers(layers)


def plug(view: nn.Module, readout: Readout, fc: nn.Module) -> dict[int, Tensor]:
    """Put the last layers back into a view of a classifier that was cut.

    Returns:
        A dict that a forward pass of the view fills with the features of each layer.
    """
    parts = fc.parts if isinstance(fc, LastLayers) else [fc]
    notes: dict[int, Tensor] = {}
    for i, names in enumerate(readout.layers):
        if not readout.maps:
            _put(view, names, hook_view(parts[i]))  # type: ignore[index]
        add_hook(view, names[0], partial(_note, notes, i, readout.maps))
    return notes


def at(y: Any, path: Sequence[str | int]) -> Any:
    """The part of a classifier's output that a path leads to."""
    for key in path:
        y = y[key] if isinstance(key, int) or isinstance(y, Mapping) else getattr(y, key)
    return y


def _note(notes: dict, i: int, maps: str, part: nn.Module, args: tuple, output: Tensor) -> None:
    if maps:
        notes[i] = torch.cat([args[0].mean((2, 3)), pooled(output, maps)], dim=1)
    else:
        notes[i] = args[0].flatten(1)


def _put(root: nn.Module, names: Sequence[str], part: nn.Module) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent)._modules[leaf] = part


def pooled(output: Tensor, maps: str) -> Tensor:
    """Logits ``(B, n)`` of maps ``(B, n, H, W)``; ``maps`` as in :class:`Readout`."""
    return (output.relu() if maps == "relu" else output).mean((2, 3))
