"""Architectures by name, and their weights from a file. Only names of the registries are built,
and no code in a file is run.

Symbols: ``n`` classes, ``C`` channels of the images. All models give logits ``(B, n)`` of images
``(B, C, H, W)``.
"""

import warnings
from collections.abc import Callable
from difflib import get_close_matches

import torch
from torch import nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.utils.weight_files import Checkpoint
from tie_ext.utils.weights import check_fitting, find_weights, left_out, load_fitting


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


def sizes_of(name: str, checkpoint: Checkpoint) -> tuple[int, int | None]:
    """C of the images that weights are for, which their first convolution shows, and the number of
    classes, which their last linear layer does; None where it does not.

    Raises:
        ValueError: If they are of another architecture, or for neither 1 nor 3 channels.
    """
    plan = build_plan(name, 3, 2)
    weights, linear = find_weights(checkpoint, plan).state, _layers(plan, nn.Linear)
    last = weights.get(f"{'fc' if 'fc' in linear else linear[-1]}.weight") if linear else None
    classes = None if last is None or last.ndim != 2 else len(last)
    for first in _layers(plan, nn.Conv2d)[:1]:
        w = weights.get(f"{first}.weight")
        if w is None or w.ndim != 4 or w.shape[1] not in (1, 3):
            raise ValueError(
                f"Expected weights of {name} for images of 1 or 3 channels in {checkpoint.path}, "
                f"but got {'none' if w is None else tuple(w.shape)} at {first}.weight"
            )
        return w.shape[1], classes
    return 3, classes


def _layers(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, kind)]


def load(
    name: str, channels: int, num_classes: int, checkpoint: Checkpoint
) -> tuple[nn.Module, str]:
    """A trained model, in evaluation mode, on the CPU.

    Arguments:
        name: As for :func:`build`.
        channels: C.
        num_classes: n.
        checkpoint: What has its weights.

    Returns:
        The model, and what was left out of the checkpoint, or nothing.

    Raises:
        ValueError: If the weights are of another architecture or another number of classes, or not
            finite real numbers.
    """
    model = build(name, channels, num_classes)
    found = find_weights(checkpoint, model)
    what = f"{name} for the {num_classes} classes of the data"
    check_fitting(model, found, what, checkpoint.path)
    load_fitting(model, found)
    return model.eval(), left_out(found.left, checkpoint.path)


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
