"""Architectures by name, and their weights from a file. Only names of the registries are built, and nothing in a file is run.

Symbols: ``n`` classes, ``C`` channels of the images. All models give logits ``(B, n)`` of images ``(B, C, H, W)``.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.utils.checks import describe
from tie_ext.utils.files import FORMAT
from tie_ext.utils.modules import check_state

WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")
"""Entries of a checkpoint in which programs keep the weights, beside epoch and optimiser."""
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")
"""What torch.compile and DataParallel put before the name of every weight, in either order."""


def check_name(name: str) -> None:
    """Refuse a name that no registry has.

    Raises:
        ValueError: With the registries, or the nearest names of the one that was asked.
        ImportError: If timm is asked for, and is not installed.
    """
    _maker(name)


def build(name: str, channels: int, num_classes: int) -> nn.Module:
    """An architecture without trained weights.

    Arguments:
        name: One of :data:`tie_ext.models.backbones.BACKBONES`, ``torchvision:NAME`` or ``timm:NAME``.
        channels: C; another number than torchvision's 3 changes the first convolution, as people do for grey images.
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
    """A ``state_dict`` in safetensors, or as ``torch.save`` writes it; also inside a checkpoint, or with DataParallel's prefix.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, foreign, would run code, or holds something else.
    """
    path, wanted = Path(path), f"weights as a state_dict at {path}"
    if not path.is_file():  # reading a pipe would wait for ever
        raise FileNotFoundError(f"Expected {wanted}, but got no file")
    try:
        with open(path, "rb") as f:
            start = f.read(9)
        state = _of_safetensors(path, wanted) if start[8:] == b"{" else _of_torch(path, wanted)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected {wanted}, but got a truncated or foreign one: {error}"
        ) from error
    for key in WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ValueError(
            f"Expected {wanted}, but got {'an empty one' if isinstance(state, Mapping) else describe(state)}"
        )
    for key, value in state.items():
        if (
            not isinstance(key, str)
            or not isinstance(value, Tensor)
            or value.layout != torch.strided
        ):
            raise ValueError(
                f"Expected {wanted}, tensors by name, but got {describe(value)} at {shorten(repr(key), 80)}"
            )
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def channels_of(name: str, weights: Mapping[str, Tensor], path: str | Path) -> int:
    """C of the images that weights are for, which their first convolution says.

    Raises:
        ValueError: If they are of another architecture, or for neither grey images nor ones of three colours.
    """
    first = next(
        (
            key
            for key, part in build_plan(name, 3, 2).named_modules()
            if isinstance(part, nn.Conv2d)
        ),
        None,
    )
    if first is None:
        return 3
    w = weights.get(f"{first}.weight")
    if w is None or w.ndim != 4:
        raise ValueError(
            f"Expected weights of {name} in {path}, but got those of another architecture: {_said(f'{first}.weight', w)}"
        )
    if w.shape[1] not in (1, 3):
        raise ValueError(
            f"Expected weights for images of 1 or 3 channels in {path}, but got {first}.weight of {tuple(w.shape)}"
        )
    return w.shape[1]


def outputs_of(name: str, channels: int, weights: Mapping[str, Tensor], otherwise: int) -> int:
    """How many classes weights are for, which their last linear layer says; ``otherwise`` where they have none."""
    linear = [
        key
        for key, part in build_plan(name, channels, 2).named_modules()
        if isinstance(part, nn.Linear)
    ]
    w = weights.get(f"{'fc' if 'fc' in linear else linear[-1]}.weight") if linear else None
    return otherwise if w is None or w.ndim != 2 else len(w)


def load(
    name: str, channels: int, num_classes: int, weights: Mapping[str, Tensor], path: str | Path
) -> nn.Module:
    """A trained model, in evaluation mode, on the CPU.

    Arguments:
        name: Of :func:`build`.
        channels: C.
        num_classes: n.
        weights: What :func:`read_weights` gave.
        path: Where that lies, for the error.

    Raises:
        ValueError: If the weights are of another architecture or another number of classes, or not finite real numbers.
    """
    model = build(name, channels, num_classes)
    state = model.state_dict()
    other = [
        key for key in {**state, **weights} if not _fits(key, state.get(key), weights.get(key))
    ]
    if other:
        said = ", ".join(_said(key, weights.get(key), state.get(key)) for key in other[:3])
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ValueError(
            f"Expected weights of {name} for the {num_classes} classes of the data in {path}, but got others: {said}{more}"
        )
    check_state(model, weights)
    for key, w in weights.items():
        if w.is_floating_point() and not bool(w.isfinite().all()):
            raise ValueError(f"Expected finite weights in {path}, but got infinite ones in {key}")
    # Over the model's own state, as that says of which version its layout is, and old files lack BatchNorm's counts.
    state.update(weights)
    model.load_state_dict(state)
    return model.eval()


def build_for(name: str, channels: int, num_classes: int, size: int) -> nn.Module:
    """An architecture whose weights come from a file; nothing that is larger than the file is built.

    Arguments:
        name: Of :func:`build`.
        channels: C.
        num_classes: n.
        size: Bytes of the file.

    Raises:
        ValueError: If no registry has the name, or it has more weights than the file can hold.
    """
    least = 2 * sum(
        p.numel() for p in build_plan(name, channels, num_classes).parameters()
    )  # of the smallest type, two bytes
    if least > size:
        raise ValueError(
            f"Expected a network of {name}, {least} bytes or more, but got a file of {size}"
        )
    return build(name, channels, num_classes)


def build_plan(name: str, channels: int, num_classes: int) -> nn.Module:
    """An architecture of shapes alone, which takes no memory; torchvision's regnets, which compute with values, are built as they are."""
    try:
        with torch.device("meta"):
            return build(name, channels, num_classes)
    except NotImplementedError:
        return build(name, channels, num_classes)


def _maker(name: str) -> Callable[[int, int], nn.Module]:
    """What makes an architecture of C and n."""
    registry, _, arch = name.partition(":")
    if name in BACKBONES:
        return BACKBONES[name]
    if registry == "torchvision":
        from torchvision import models

        _check_in(arch, _torchvisions(), registry)
        return lambda channels, n: _for_channels(
            models.get_model(arch, weights=None, num_classes=n), channels
        )
    if registry == "timm":
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"Expected timm to be installed for {name}, but got: {error}; pip install 'tie_ext[timm]'"
            ) from error
        _check_in(arch, timm.list_models(), registry)
        return lambda channels, n: timm.create_model(
            arch, pretrained=False, num_classes=n, in_chans=channels
        )
    hint = f"; did you mean torchvision:{name}?" if name in _torchvisions() else ""
    raise ValueError(
        f"Expected a backbone, one of {', '.join(BACKBONES)}, torchvision:NAME or timm:NAME, but got {name!r}{hint}"
    )


def _torchvisions() -> Sequence[str]:
    """Names of torchvision's classifiers."""
    from torchvision import models

    return models.list_models(module=models)


def _check_in(arch: str, known: Sequence[str], registry: str) -> None:
    if arch not in known:
        near = ", ".join(get_close_matches(arch, known)) or "resnet18"
        raise ValueError(
            f"Expected a classifier of {registry} by its name there, such as {near}, but got {arch!r}"
        )


def _for_channels(model: nn.Module, channels: int) -> nn.Module:
    """A model of three channels made one of C, by another first convolution."""
    name, old = next(
        (name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d)
    )
    if channels != old.in_channels:
        parent, _, leaf = name.rpartition(".")
        sizes = (old.kernel_size, old.stride, old.padding, old.dilation)
        new = nn.Conv2d(
            channels, old.out_channels, *sizes, groups=old.groups, bias=old.bias is not None
        )  # type: ignore[arg-type]
        setattr(model.get_submodule(parent), leaf, new)
    return model


def _of_safetensors(path: Path, wanted: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as f:
        if FORMAT in (f.metadata() or {}):
            raise ValueError(
                f"Expected {wanted}, but got a file of {FORMAT}'s own; a network that it wrote has its garbage class: `tie-ext score {path} IMAGE`"
            )
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - it is no dict


def _of_torch(path: Path, wanted: str) -> object:
    """What ``torch.save`` wrote, by a reader that runs no code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # which depends on the byte that it trips over: RuntimeError, EOFError, KeyError, UnpicklingError, ...
        said = (
            str(error).rpartition("WeightsUnpickler error:")[2].strip()
        )  # what stands before it advises to run the code
        if code := re.search(r"(?:GLOBAL|class) ([\w.]+)", said):
            raise ValueError(
                f"Expected {wanted}, but got a file that runs code when it is read ({code[1]}), which was not run; save model.state_dict() alone"
            ) from error
        said = shorten(said.partition("\n")[0], 200, placeholder=" ...")
        raise ValueError(
            f"Expected {wanted}, but got a truncated or foreign one: {type(error).__name__}: {said}"
        ) from error


def _fits(key: str, mine: Tensor | None, found: Tensor | None) -> bool:
    if found is None:
        return key.endswith("num_batches_tracked")
    return mine is not None and mine.shape == found.shape


def _said(key: str, found: Tensor | None, mine: Tensor | None = None) -> str:
    """What is wrong with one weight."""
    if found is None:
        return f"none at {key}"
    return f"{key} of {tuple(found.shape)}" + (
        f" instead of {tuple(mine.shape)}" if mine is not None else ""
    )
