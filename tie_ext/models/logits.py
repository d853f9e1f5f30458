"""Where the logits of a classifier are: the layers that give them, and what stands behind these.

A classifier is run once, and its output compared with those of the layers that it called: the
order in which layers are registered says nothing.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tie_ext.utils.views import add_hook, eval_view, hook_view

LAST_CALLS = 16
"""Linear layers and convolutions that are compared with the output, the last that are called."""
ADVICE = (
    "return the logits as they are, or give `logits`, a function that takes what the network "
    "returns and gives the logits (B, n) of its last linear layer"
)


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


class _Call(NamedTuple):
    names: tuple[str, ...]
    part: Any
    output: Tensor


def unwrapped(model: Any) -> nn.Module:
    """The network in what ``torch.compile`` and parallel training wrap around it.

    Raises:
        TypeError: If it is no ``nn.Module``.
        ValueError: If it is one that cannot be looked into.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Expected a network, an nn.Module, but got a {type(model).__name__}; give the module "
            "that it calls"
        )
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    while "_orig_mod" in model._modules or isinstance(model, parallel):
        model = model._modules["module" if isinstance(model, parallel) else "_orig_mod"]  # type: ignore[assignment]
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "Expected a network in Python, but got a torch.jit.ScriptModule, whose layers cannot "
            "be read; give the module that it was made of, with its weights"
        )
    if any("quantized" in type(part).__module__ for part in model.modules()):
        raise ValueError(
            f"Expected a network in floating point, but got a quantised {type(model).__name__}; "
            "attach to the network before it is quantised"
        )
    return model


def bare_copy(model: Any) -> nn.Module:
    """A copy of a network, as :func:`unwrapped` gives it, without compiled parts."""
    model = copy.deepcopy(unwrapped(model))
    for part in list(model.modules()):
        for name, child in part._modules.items():
            if child is not None and "_orig_mod" in child._modules:
                part._modules[name] = child._modules["_orig_mod"]
    return model


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


@torch.no_grad()
def locate(
    backbone: nn.Module, x: Tensor, num_classes: int, readout: Readout | None = None
) -> tuple[Readout, Tensor]:
    """Find the logits of a classifier by running it once.

    Arguments:
        backbone: The classifier; left as it was.
        x: A few different images ``(B, C, H, W)``.
        num_classes: n; of several tensors that are returned, one ``(B, n)`` comes first.
        readout: Where they are, if that is known.

    Returns:
        Where the logits are, and what the classifier returns there ``(B, m)``.

    Raises:
        ValueError: If it has no weights, fails, or returns no logits of linear layers.
    """
    y, calls = _run(backbone, x)
    if readout is not None:
        return readout, at(y, readout.path).reshape(len(x), -1)
    wanted = (num_classes, 1) if num_classes == 2 else (num_classes,)
    found = sorted(_tensors(y), key=lambda pair: pair[1].shape[1] not in wanted)
    if found and not found[0][1].isfinite().all():
        raise ValueError(
            f"Expected finite logits, but {type(backbone).__name__} gives NaN or infinity; give a "
            "float16 network in float32 or bfloat16"
        )
    for matches in (_equals, _follows):
        for path, t in found:
            for layers, maps, logits in _sources(calls):
                if logits.shape == t.shape and matches(t, logits, maps):
                    behind = bool(maps) or matches is _follows
                    return Readout(layers, path, maps, behind), t
    raise ValueError(_refusal(type(backbone).__name__, y, [t for _, t in found], calls))


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


@torch.no_grad()
def check_same(net: nn.Module, x: Tensor, own: Tensor) -> None:
    """Refuse a network that does not return what its backbone did.

    Arguments:
        net: The network, which is left as it is.
        x: Images ``(B, C, H, W)``.
        own: What the backbone returned of them ``(B, m)``; one logit is the last of two.

    Raises:
        ValueError: If they differ.
    """
    given = eval_view(net)(x.to(own.device))
    if not torch.equal(given[:, -own.shape[1] :], own) and own.isfinite().all():
        raise ValueError(
            "Expected a backbone that gives the same logits each time, but got other ones in the "
            "second run; leave out what is random in evaluation mode"
        )


def at(y: Any, path: Sequence[str | int]) -> Any:
    """The part of a classifier's output that a path leads to."""
    for key in path:
        y = y[key] if isinstance(key, int) or isinstance(y, Mapping) else getattr(y, key)
    return y


def _note(notes: dict, i: int, maps: str, part: nn.Module, args: tuple, output: Tensor) -> None:
    if maps:
        notes[i] = torch.cat([args[0].mean((2, 3)), _pooled(output, maps)], dim=1)
    else:
        notes[i] = args[0].flatten(1)


def _put(root: nn.Module, names: Sequence[str], part: nn.Module) -> None:
    for name in names:
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent)._modules[leaf] = part


def _run(backbone: nn.Module, x: Tensor) -> tuple[Any, list[_Call]]:
    """What a classifier returns, and the last calls of its linear layers and convolutions."""
    kind, first = type(backbone).__name__, next(backbone.parameters(), None)
    if first is None or first.is_meta:
        raise ValueError(f"Expected a network with its weights, but got {kind} without any")
    view, calls = eval_view(backbone), deque[_Call](maxlen=LAST_CALLS)
    names: dict[nn.Module, list[str]] = {}
    for name, part in view.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Linear) or _is_linear(part):
            names.setdefault(part, []).append(name)
    for of in names.values():
        add_hook(view, of[0], partial(_remember, calls, tuple(of)))
    try:
        return view(x.to(first)), list(calls)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"Expected a backbone for images {tuple(x.shape[1:])}, "
            f"but {kind} fails on one: {error}"
        ) from error


def _is_linear(part: nn.Module) -> bool:
    """Whether it is a 1x1 convolution: a linear layer at each place."""
    return isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.groups == 1


def _remember(
    calls: deque[_Call], names: tuple[str, ...], part: nn.Module, args: tuple, output: Tensor
) -> None:
    calls.append(_Call(names, part, output.clone()))  # a ReLU in place may come next


def _tensors(y: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors ``(B, m)`` in what a classifier returns, ``logits`` first, and their paths."""
    if isinstance(y, Tensor):
        if y.is_floating_point() and y.ndim and y.numel() and len(path) < 4:
            yield path, y.reshape(len(y), -1)
    elif isinstance(y, Mapping):
        for key in sorted(y, key=lambda key: key != "logits"):
            yield from _tensors(y[key], (*path, key))
    elif isinstance(y, list | tuple):
        for i, part in enumerate(y):
            yield from _tensors(part, (*path, i))
    elif isinstance(getattr(y, "logits", None), Tensor):
        yield from _tensors(y.logits, (*path, "logits"))


def _sources(
    calls: Sequence[_Call],
) -> Iterator[tuple[tuple[tuple[str, ...], ...], str, Tensor]]:
    """Layers that may give logits ``(B, m)``, what pools their maps, and these logits."""
    flat = [
        call for call in reversed(calls) if call.output[0].numel() == call.part.weight.shape[0]
    ]
    for call in flat:
        yield (call.names,), "", call.output.flatten(1)
    for b, a in combinations(flat, 2):
        if a.output.shape == b.output.shape and a.names != b.names:
            yield (a.names, b.names), "", (a.output.flatten(1) + b.output.flatten(1)) / 2
    for call in reversed(calls):
        if isinstance(call.part, nn.Conv2d) and call not in flat:
            for maps in ("relu", "mean"):
                yield (call.names,), maps, _pooled(call.output, maps)


def _pooled(output: Tensor, maps: str) -> Tensor:
    return (output.relu() if maps == "relu" else output).mean((2, 3))


def _equals(t: Tensor, logits: Tensor, maps: str) -> bool:
    """Whether an output is the logits: to the last bit, up to how maps are averaged."""
    if maps:
        return torch.allclose(t.float(), logits.float(), 1e-3, 1e-6)
    return torch.equal(t, logits)


def _follows(t: Tensor, logits: Tensor, maps: str) -> bool:
    """Whether an output is a softmax, log-softmax, sigmoid, or multiple of the logits."""
    tolerance = 2e-2 if t.dtype in (torch.float16, torch.bfloat16) else 1e-4
    t, z = t.float(), logits.float()
    if z.shape[1] == 1:
        return torch.allclose(t, z.sigmoid(), tolerance, 1e-6)
    if torch.allclose(t, z.softmax(1), tolerance, 1e-6) and t.std() > 0:
        return True
    return any(_proportional(of, z, tolerance) for of in (t, t.log()) if of.isfinite().all())


def _proportional(t: Tensor, z: Tensor, tolerance: float) -> bool:
    """Whether rows are a positive multiple of others, up to a constant for each."""
    t, z = (part - part.mean(1, keepdim=True) for part in (t, z))
    scale = (t * z).sum() / z.square().sum()
    return bool(scale > 0) and bool((t - scale * z).norm() < tolerance * t.norm())


def _refusal(kind: str, y: Any, found: Sequence[Tensor], calls: Sequence[_Call]) -> str:
    """Why no logits were found, and what helps."""
    if not calls:
        return f"Expected a backbone that ends in a linear layer, but {kind} called none; {ADVICE}"
    name = calls[-1].names[0]
    expected = "Expected a backbone that returns what its last linear layer gives"
    if not found:
        return f"{expected}, but {kind} returns a {type(y).__name__} without logits; {ADVICE}"
    p = found[0]
    if bool((p >= 0).all()) and torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-2):
        return f"{expected}, but {kind} returns probabilities of something else; {ADVICE}"
    return f"{expected}, but {kind} returns something else than `{name}` does; {ADVICE}"
