"""Architectures by name, and their weights from a file. Only names of the registries are built,
and no code in a file is run.

Symbols: ``n`` classes, ``C`` channels of the images. All models give logits ``(B, n)`` of images
``(B, C, H, W)``.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.utils.checks import describe
from tie_ext.utils.files import FORMAT, check_state

Weights = Mapping[str, Tensor]
"""A state_dict."""
WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")
"""Entries of a checkpoint in which programs keep the weights, besides epoch and optimiser."""
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
"""Prefixes that torch.compile and DataParallel give every weight, in either order."""


def check_name(name: str) -> None:
    """Refuse a name that no registry has.

    Raises:
        ValueError: With the registries, or the nearest names.
        ImportError: If timm is asked for, and is not installed.
    """
    _maker(name)


def build(name: str, channels: int, num_classes: int) -> nn.Module:
    """An architecture without trained weights.

    Arguments:
        name: One of :data:`tie_ext.models.backbones.BACKBONES`, ``torchvision:NAME`` or
            ``timm:NAME``.
        channels: C; torchvision's models get another first convolution where it is not 3.
        num_classes: n.

    Raises:
        ValueError: If no registry has the name.
        ImportError: If timm is asked for, and is not installed.
    """
    make = _maker(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initial weights, which are not kept
        return make(channels, num_classes)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A ``state_dict`` in safetensors, or as ``torch.save`` writes it; also inside a checkpoint,
    or with DataParallel's prefix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, foreign, would run code, or holds something else.
    """
    path, wanted = Path(path), f"Expected weights as a state_dict at {path}, "
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(f"{wanted}but got no file")
    try:
        with open(path, "rb") as f:
            read = _read_safetensors if f.read(9)[8:] == b"{" else _read_torch
        state = read(path, wanted)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{wanted}but got a truncated or foreign one: {error}") from error
    for key in WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        found = "an empty one" if isinstance(state, Mapping) else describe(state)
        raise ValueError(f"{wanted}but got {found}")
    for key, value in state.items():
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not dense:
            found = f"{describe(value)} at {shorten(repr(key), 80)}"
            raise ValueError(f"{wanted}tensors by name, but got {found}")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def channels_of(name: str, weights: Weights, path: str | Path) -> int:
    """C of the images that weights are for, which their first convolution shows.

    Raises:
        ValueError: If they are of another architecture, or for neither 1 nor 3 channels.
    """
    convolutions = _layers(build_plan(name, 3, 2), nn.Conv2d)
    if not convolutions:
        return 3
    first = f"{convolutions[0]}.weight"
    w = weights.get(first)
    if w is None or w.ndim != 4:
        raise ValueError(
            f"Expected weights of {name} in {path}, but got those of another architecture: "
            f"{_difference(first, w)}"
        )
    if w.shape[1] not in (1, 3):
        raise ValueError(
            f"Expected weights for images of 1 or 3 channels in {path}, but got {first} of "
            f"{tuple(w.shape)}"
        )
    return w.shape[1]


def outputs_of(name: str, channels: int, weights: Weights, default: int) -> int:
    """Number of classes that weights are for, which their last linear layer shows."""
    linear = _layers(build_plan(name, channels, 2), nn.Linear)
    last = "fc" if "fc" in linear else (linear or [""])[-1]
    w = weights.get(f"{last}.weight")
    return default if w is None or w.ndim != 2 else len(w)


def _layers(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, kind)]


def load(
    name: str, channels: int, num_classes: int, weights: Weights, path: str | Path
) -> nn.Module:
    """A trained model, in evaluation mode, on the CPU.

    Arguments:
        name: As for :func:`build`.
        channels: C.
        num_classes: n.
        weights: What :func:`read_weights` gave.
        path: Their file, for the error.

    Raises:
        ValueError: If the weights are of another architecture or another number of classes, or not
            finite real numbers.
    """
    model = build(name, channels, num_classes)
    state = model.state_dict()
    other = [k for k in {**state, **weights} if not _fits(k, state.get(k), weights.get(k))]
    if other:
        first = ", ".join(_difference(k, weights.get(k), state.get(k)) for k in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ValueError(
            f"Expected weights of {name} for the {num_classes} classes of the data in {path}, but "
            f"got others: {first}{more}"
        )
    check_state(model, weights)
    for key, w in weights.items():
        if w.is_floating_point() and not bool(w.isfinite().all()):
            raise ValueError(f"Expected finite weights in {path}, but got infinite ones in {key}")
    # Over the model's own state: it knows the version of its layout, and old files lack
    # BatchNorm's counts.
    state.update(weights)
    model.load_state_dict(state)
    return model.eval()


def build_for(name: str, channels: int, num_classes: int, size: int) -> nn.Module:
    """An architecture whose weights come from a file; nothing larger than the file is built.

    Arguments:
        name: As for :func:`build`.
        channels: C.
        num_classes: n.
        size: Bytes of the file.

    Raises:
        ValueError: If no registry has the name, or it has more weights than the file can hold.
    """
    plan = build_plan(name, channels, num_classes)
    smallest = 2 * sum(p.numel() for p in plan.parameters())  # of two bytes each
    if smallest > size:
        raise ValueError(
            f"Expected a network of {name}, {smallest} bytes or more, but got a file of {size}"
        )
    return build(name, channels, num_classes)


def build_plan(name: str, channels: int, num_classes: int) -> nn.Module:
    """An architecture of shapes alone, which takes no memory; torchvision's regnets, which compute
    with values, are built as they are.
    """
    try:
        with torch.device("meta"):
            return build(name, channels, num_classes)
    except NotImplementedError:
        return build(name, channels, num_classes)


def _maker(name: str) -> Callable[[int, int], nn.Module]:
    """What makes an architecture of C and n."""
    if name in BACKBONES:
        return BACKBONES[name]
    registry, _, arch = name.partition(":")
    if registry == "timm":
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"Expected timm to be installed for {name}, but got: {error}; "
                "pip install 'tie_ext[timm]'"
            ) from error
        known = timm.list_models()

        def make(channels: int, n: int) -> nn.Module:
            return timm.create_model(arch, pretrained=False, num_classes=n, in_chans=channels)
    else:
        from torchvision import models

        known = models.list_models(module=models)  # the classifiers
        if registry != "torchvision":
            hint = f"; did you mean torchvision:{name}?" if name in known else ""
            raise ValueError(
                f"Expected a backbone, one of {', '.join(BACKBONES)}, torchvision:NAME or "
                f"timm:NAME, but got {name!r}{hint}"
            )

        def make(channels: int, n: int) -> nn.Module:
            return _for_channels(models.get_model(arch, weights=None, num_classes=n), channels)

    if arch not in known:
        near = ", ".join(get_close_matches(arch, known)) or "resnet18"
        raise ValueError(
            f"Expected a classifier of {registry} by its name there, such as {near}, but got "
            f"{arch!r}"
        )
    return make


def _for_channels(model: nn.Module, channels: int) -> nn.Module:
    """A model of three channels with another first convolution, of C."""
    name = _layers(model, nn.Conv2d)[0]
    old = model.get_submodule(name)
    if channels != old.in_channels:
        parent, _, leaf = name.rpartition(".")
        sizes = (old.kernel_size, old.stride, old.padding, old.dilation)
        how = {"groups": old.groups, "bias": old.bias is not None}
        new = nn.Conv2d(channels, old.out_channels, *sizes, **how)  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, new)
    return model


def _read_safetensors(path: Path, wanted: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as f:
        if FORMAT in (f.metadata() or {}):
            raise ValueError(
                f"{wanted}but got a file of {FORMAT}'s own; a network that it wrote has its "
                f"garbage class: `tie-ext score {path} IMAGE`"
            )
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - it is no dict


def _read_torch(path: Path, wanted: str) -> object:
    """What ``torch.save`` wrote, by a reader that runs no code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by the byte that it fails at
        # What stands before this word advises to run the code.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        if code := re.search(r"(?:GLOBAL|class) ([\w.]+)", reason):
            raise ValueError(
                f"{wanted}but got a file that runs code when it is read ({code[1]}), which was "
                "not run; save model.state_dict() alone"
            ) from error
        reason = shorten(reason.partition("\n")[0], 200, placeholder=" ...")
        raise ValueError(
            f"{wanted}but got a truncated or foreign one: {type(error).__name__}: {reason}"
        ) from error


def _fits(key: str, mine: Tensor | None, found: Tensor | None) -> bool:
    if found is None:
        return key.endswith("num_batches_tracked")
    return mine is not None and mine.shape == found.shape


def _difference(key: str, found: Tensor | None, mine: Tensor | None = None) -> str:
    """What is wrong with one weight."""
    if found is None:
        return f"none at {key}"
    instead = "" if mine is None else f" instead of {tuple(mine.shape)}"
    return f"{key} of {tuple(found.shape)}{instead}"
