"""TIENet on disk. Files may be hostile: their claims are checked before anything is built."""

import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.models.classifier import AUTOCAST_DTYPES, EXTRA
from tie_ext.models.head import GarbageHead
from tie_ext.models.readout import Readout, Selected, classifier_name, sizes
from tie_ext.models.statistics import EVERY, STATISTICS
from tie_ext.utils.checks import check_choice, check_shape
from tie_ext.utils.files import FLOATS, check_state, load_state, reading, save_state
from tie_ext.utils.unwrap import bare_copy

if TYPE_CHECKING:
    from tie_ext.models.network import TIENet

KEPT = ("train_features", "train_labels")
"""Buffers that :func:`tie_ext.attach` fills, and :func:`tie_ext.combine` reads."""
LARGEST_TRIED = 3 * 224 * 224
"""Values of the largest image for a trial run of a network from a file; one that claims larger
images must not take memory for them when it is read."""


def save_network(net: "TIENet", path: str | os.PathLike) -> None:
    """Write a network; see :meth:`TIENet.save`."""
    names = [name for name, kind in BACKBONES.items() if type(net.backbone) is kind]
    head = {"layers": net.garbage.layers} if isinstance(net.garbage, GarbageHead) else None
    state = {
        "num_classes": net.num_classes,
        "image_shape": net.image_shape,
        "classes": net.class_names,
        "precision": net.autocast_dtype,
        "backbone": names[0] if names else None,
        "head": head,
        "readout": {**net.readout._asdict(), "selected": isinstance(net.backbone, Selected)},
        "weights": {name: value for name, value in net.state_dict().items() if name != EXTRA},
    }
    save_state(path, "network", state)


def load_network(
    path: str | os.PathLike, backbone: nn.Module | None, kind: "type[TIENet]"
) -> "TIENet":
    """Read a network; see :meth:`TIENet.load`."""
    state = load_state(path, "network")
    with reading(f"a network of this architecture in {path}"):
        weights, names = state["weights"], state["classes"]
        # From the weights, not from the header: a network is no larger than its file.
        n = len(weights["fc.weight"]) if "fc.weight" in weights else state["num_classes"]
        good = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if state["num_classes"] != n or not good:
            raise ValueError(
                f"weights of {n} classes instead of {state['num_classes']!r}, named {names!r}"
            )
        backbone = (
            _own_backbone(path, state["backbone"], weights)
            if backbone is None
            else bare_copy(backbone)
        )
        readout = _readout(state.get("readout"), backbone)
        net = _build(kind, backbone, n, state, readout)
        dtype = state.get("precision", "float32")  # earlier files have no other
        check_choice(f"autocast_dtype in {path} to be", dtype, AUTOCAST_DTYPES)
        net.autocast_dtype = dtype
    return net.eval()


def _own_backbone(path: str | os.PathLike, name: object, weights: dict[str, Tensor]) -> nn.Module:
    """The backbone of :data:`BACKBONES` for some weights, built only if it has their shapes."""
    if name not in BACKBONES:
        raise ValueError(
            f"Expected a `backbone` for {path}, whose architecture is not one of "
            f"{', '.join(BACKBONES)}, but got None"
        )
    convolutions = (w for key, w in weights.items() if key.startswith("backbone.") and w.ndim == 4)
    channels = next((w.shape[1] for w in convolutions), 0)
    with torch.device("meta"):  # shapes without memory
        plan = BACKBONES[str(name)](channels, len(weights["fc.weight"])).state_dict()
    for key, w in plan.items():
        found = weights[key if key.startswith("fc.") else f"backbone.{key}"]
        if found.shape != w.shape:
            raise ValueError(f"{key} of {tuple(found.shape)} instead of {tuple(w.shape)}")
    return BACKBONES[str(name)](channels, len(weights["fc.weight"]))


def _readout(saved: Any, backbone: nn.Module) -> Readout:
    """Where the logits of a backbone are, as a file says; earlier files do not."""
    if saved is None:
        return Readout(((classifier_name(backbone),),))
    if saved["selected"] and not isinstance(backbone, Selected):
        raise ValueError(
            "Expected the backbone as Selected(model, logits) of tie_ext.models.readout, with the "
            "function `logits` of attach, which no file holds"
        )
    parts, maps, path = saved["layers"], saved["maps"], saved["path"]
    good = isinstance(parts, list) and 1 <= len(parts) <= 2 and maps in ("", "mean", "relu")
    if not good or not all(isinstance(key, str | int) for key in path):
        raise ValueError(f"logits {saved!r:.100}")
    layers = tuple(tuple(map(str, names)) for names in parts)
    for name in (name for names in layers for name in names):
        if not isinstance(backbone.get_submodule(name), nn.Linear | nn.Conv2d):
            raise ValueError(f"logits of {name!r}, which is no linear layer")
    return Readout(layers, tuple(path), maps, bool(saved["behind"]))


def _head(saved: Any, features: int, weights: dict[str, Tensor]) -> str | GarbageHead:
    """The garbage head for some weights."""
    if saved is None:
        return "linear"
    layers, hidden = saved["layers"], len(weights["garbage.network.0.bias"])
    if not isinstance(layers, dict) or not all(
        isinstance(name, str) and isinstance(count, int) and count > 0
        for name, count in layers.items()
    ):
        raise ValueError(f"layers {layers!r} of a garbage head")
    found = weights["garbage.mean"].numel()
    for count in (EVERY, STATISTICS):  # before 0.3 a head had all four
        head = GarbageHead(layers, features, hidden, count)
        if head.mean.numel() == found:
            return head
    raise ValueError(f"{found} statistics instead of {head.mean.numel()}")


def _build(
    kind: "type[TIENet]", backbone: nn.Module, n: int, state: dict[str, Any], readout: Readout
) -> "TIENet":
    """A network with the weights of a file."""
    weights = state["weights"]
    layers = [backbone.get_submodule(names[0]) for names in readout.layers]
    outputs, features = sizes(layers, readout)
    weight = weights.get("fc.weight")
    if weight is None:  # of other last layers, which the backbone has to fit
        weight = next(w for name, w in weights.items() if name.startswith("backbone."))
        wanted: Any = (outputs, weight.shape)
    else:
        wanted = (n, (n, features))
    if weight.dtype not in FLOATS or (n, weight.shape) != wanted:
        found = tuple(weight.shape)
        raise ValueError(f"fc of {weight.dtype} {found} instead of floating-point {wanted[1]}")
    low, high = (weights[name] for name in ("low", "high"))
    channels = max(low.numel(), high.numel())
    if channels > 1000 or not bool(low.isfinite().all() and high.isfinite().all()):
        raise ValueError(f"a value range that is not finite, or of {channels} channels")
    shape = None if state["image_shape"] is None else check_shape(state["image_shape"])
    tried = shape if shape is None or math.prod(shape) <= LARGEST_TRIED else None
    bounds = (low.flatten().tolist(), high.flatten().tolist())
    head = _head(state.get("head"), features, weights)
    net = kind(backbone, n, tried, *bounds, state["classes"], head, readout)
    net.image_shape = shape
    net.to(weight.dtype)
    _check_kept(weights, n, features)
    check_state(net, weights)
    net.load_state_dict(weights)
    return net


def _check_kept(weights: dict[str, Tensor], n: int, features: int) -> None:
    """Refuse features and labels of training images that do not fit a network."""
    h, y = (weights.get(name) for name in KEPT)
    if h is None and y is None:
        return
    good = h is not None and h.dtype in FLOATS and h.shape[1:] == (features,)
    if good and y is not None:
        good = y.dtype == torch.int64 and y.shape == h.shape[:1]  # type: ignore[union-attr]
        good = good and bool(((y >= 0) & (y < n)).all())
    if not good or not bool(h.isfinite().all()):  # type: ignore[union-attr]
        raise ValueError("features or labels of training images that do not fit the network")
