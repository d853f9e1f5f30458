"""A classifier whose last layers stand apart, so that one pass gives features and logits.

Symbols: ``x (B, C, H, W)`` images, ``h (B, F)`` penultimate features, ``n`` ID classes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tie_ext.models.logits import check_same, locate
from tie_ext.models.readout import (
    Readout,
    Selected,
    classifier_name,
    cut,
    last_layer,
    plug,
    sizes,
)
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.checks import check_choice, check_shape
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.unwrap import bare_copy
from tie_ext.utils.views import hook_view

AUTOCAST_DTYPES = ("float32", "bfloat16")
"""Types that a backbone can compute in; weights, features and logits keep theirs."""
EXTRA = "_extra_state"
"""PyTorch's key for the result of get_extra_state."""


class Classifier(Bounded):
    """A copy of a classifier, in two parts: ``backbone``, and its last layers as ``fc``.

    Arguments and errors are those of :class:`tie_ext.models.network.TIENet`.
    """

    fc: Any

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        image_shape: Sequence[int] | None,
        low: float | Sequence[float],
        high: float | Sequence[float],
        logits: Readout | Callable[[Any], Tensor] | None,
    ):
        super().__init__(low, high)
        self.num_classes = num_classes
        self.image_shape = None if image_shape is None else check_shape(image_shape)
        if self.image_shape is not None and len(self.low) not in (1, self.image_shape[0]):
            raise ValueError(
                f"Expected low and high to be numbers or {self.image_shape[0]}, one per channel, "
                f"but got {len(self.low)}"
            )
        self._autocast_dtype = "float32"
        # Copied, since the caller's network keeps its last layer; and without torch.compile's
        # wrapper, whose program is of a network that has it.
        self.backbone = bare_copy(backbone)
        readout = logits if isinstance(logits, Readout) else None
        if logits is not None and readout is None:
            self.backbone = Selected(self.backbone, logits)  # type: ignore[arg-type]
        own: Tensor | None = None
        if self.image_shape is not None:
            x = self.trial_images(self.image_shape)
            readout, own = locate(self.backbone, x, num_classes, readout)
        self.readout = readout or Readout(((classifier_name(self.backbone),),))
        last = cut(self.backbone, self.readout)
        self.backbone_classes, self.feature_size = sizes(last, self.readout)
        self.fc = last_layer(last, self.readout, num_classes)
        self.low, self.high = (of.to(self.fc.weight.device) for of in (self.low, self.high))
        # Of a network in evaluation mode no part is frozen: .train() means all of it.
        self.training = self.backbone.training
        self.fc.train(self.training)
        same = own is not None and self.backbone_classes == num_classes
        if own is not None and same and not (self.readout.behind and own.shape[1] == 1):
            check_same(self, x, own)

    def trial_images(self, shape: Sequence[int]) -> Tensor:
        """Three different images ``(3, C, H, W)`` of a shape, in the type and on the device of the
        backbone.
        """
        ramp = torch.linspace(0, 1, math.prod(shape), device=self.low.device).view(1, *shape)
        x = self.from_unit(torch.cat([ramp, 1 - ramp, ramp.square()]))
        return x.to(next(self.backbone.parameters(), x))

    @property
    def autocast_dtype(self) -> str:
        """The type that the backbone computes in, one of :data:`AUTOCAST_DTYPES`. Training and
        attach set it, and it is saved, since a threshold is valid for scores of the same type.
        """
        return self._autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, value: str) -> None:
        check_choice("autocast_dtype to be", value, AUTOCAST_DTYPES)
        self._autocast_dtype = value

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features ``(B, F)`` of images ``(B, C, H, W)`` of any float type."""
        return self._run(x)[1]

    @without_autocast
    def compute(self, part: Callable, x: Tensor, *args, **kwargs) -> Any:
        """Call a part of the backbone on images ``(B, C, H, W)`` in the network's type and
        :attr:`autocast_dtype`; a tensor is returned in the type of ``fc``.
        """
        x = x.to(self.fc.weight.dtype)
        if self.autocast_dtype == "float32":
            return part(x, *args, **kwargs)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = part(x, *args, **kwargs)
        return y.to(self.fc.weight.dtype) if isinstance(y, Tensor) else y

    def _run(self, x: Tensor, view: nn.Module | None = None) -> tuple[Any, Tensor]:
        """What the backbone, or a view of it, returns, and penultimate features ``(B, F)``; of a
        plain backbone these are the same.
        """
        if self.readout.plain:
            h = self.compute(self.backbone if view is None else view, x).flatten(1)
            return h, h
        view = hook_view(self.backbone) if view is None else view
        notes = plug(view, self.readout, self.fc)
        y = self.compute(view, x)
        parts = [notes[i].to(self.fc.weight.dtype) for i in range(len(notes))]
        return y, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def classifier_view(self) -> nn.Module:
        """A view of the backbone with its last layers."""
        view = hook_view(self.backbone)
        plug(view, self.readout, self.fc)
        return view

    def get_extra_state(self) -> Tensor:
        """Index in :data:`AUTOCAST_DTYPES`, in the ``state_dict`` so that any checkpoint keeps
        it.
        """
        # A tensor, as programs expect of a state_dict.
        return torch.tensor(AUTOCAST_DTYPES.index(self.autocast_dtype))

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the type."""
        self.autocast_dtype = AUTOCAST_DTYPES[int(state)]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Earlier checkpoints have float32 only.
        state_dict.setdefault(prefix + EXTRA, torch.tensor(0))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
