"""Finds where the logits of a classifier are.

It is run once, and its output compared with those of the layers that it called: the order in which
layers are registered says nothing.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tie_ext.models.readout import Readout, at, pooled
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.views import add_hook, eval_view

LAST_CALLS = 16
"""Linear layers and convolutions that are compared with the output, the last that are called."""
ADVICE = (
    "return the logits as they are, or give `logits`, a function that takes what the network "
    "returns and gives the logits (B, n) of its last linear layer"
)


class _Call(NamedTuple):
    names: tuple[str, ...]
    part: Any
    output: Tensor


@torch.no_grad()
@without_autocast
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
                yield (call.names,), maps, pooled(call.output, maps)


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
    softmaxes = z.softmax(1), z.log_softmax(1)
    if t.std() > 0 and any(torch.allclose(t, of, tolerance, 1e-6) for of in softmaxes):
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
