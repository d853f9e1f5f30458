"""The wrapper that gives any classifier one more output, the garbage class.

Symbols: ``x (B, C, H, W)`` images, ``h (B, F)`` penultimate features, ``s (B, S)`` input of the
garbage logit, ``n`` ID classes, ``logits (B, n)`` or ``(B, n+1)`` with garbage last.
"""

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import find_layers
from tie_ext.models.logits import check_same, locate
from tie_ext.models.readout import (
    Readout,
    Selected,
    at,
    classifier_name,
    cut,
    last_layer,
    plug,
    sizes,
)
from tie_ext.models.serialization import AUTOCAST_DTYPES, EXTRA, KEPT, load_network, save_network
from tie_ext.scores.decision import Decision, decide, upcast
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.checks import check_images, check_number, check_shape
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.unwrap import bare_copy
from tie_ext.utils.views import eval_view, hook_view

HEADS = ("linear", "multilayer")
"""The garbage logit: the paper's linear function of the penultimate features, or a
:class:`~tie_ext.models.head.GarbageHead` on every layer."""


class Outputs(NamedTuple):
    """The results of one forward pass."""

    logits: Tensor
    """``(B, n+1)``, garbage last."""
    features: Tensor
    """``(B, F)``, penultimate."""


class TIENet(Bounded):
    """An n-class network with one more output, the garbage class.

    ``forward(x)`` gives the n ID logits, so that every OOD score for n-class networks works
    unchanged; ``forward(x, garbage=True)`` gives all n+1. The last layer is split into ``fc`` (n
    outputs) and ``garbage`` (one), so that hosts find the ID classifier as ``fc``.

    Arguments:
        backbone: A classifier ``(B, C, H, W) -> (B, m)``, such as a torchvision or timm model, or
            one of :data:`~tie_ext.models.backbones.BACKBONES`; docs/networks.md says which. It is
            copied. Where its logits are is found by running it once on images of ``image_shape``;
            without one, they are those of its linear layer ``fc``, or the last that is
            registered. That layer becomes ``fc`` if it has n outputs (trained weights are kept),
            and is replaced if not.
        num_classes: n >= 2.
        image_shape: ``(C, S, S)`` of the images; None to take any (TIE cannot train it then).
        low: Smallest value of the images, a number or one per channel (``Normalize`` of 0).
        high: Largest value of the images (``Normalize`` of 1).
        class_names: Name of each ID class, by label.
        head: One of :data:`HEADS`; ``multilayer`` needs an ``image_shape``. Or a
            :class:`~tie_ext.models.head.GarbageHead`, which is copied.
        logits: Gives the logits ``(B, m)`` of what the backbone returns, where they are not found
            in it; or the :class:`~tie_ext.models.readout.Readout` that says where they are.

    Raises:
        TypeError: If the backbone is no ``nn.Module``.
        ValueError: If the backbone has no linear layer, its logits are not found, or it fails on
            images of ``image_shape`` (the latter two are checked if it is given); if a number or a
            shape is out of range, low is not below high, or the backbone has no layers for a head
            to read.

    Example:
        >>> net = TIENet(Conv3(in_channels=1, num_classes=10), 10, image_shape=(1, 28, 28))
        >>> x = torch.rand(2, 1, 28, 28)
        >>> net(x).shape, net(x, garbage=True).shape
        (torch.Size([2, 10]), torch.Size([2, 11]))
    """

    tau: Tensor
    fc: Any
    train_features: Tensor | None
    """``(M, F)`` of a random sample of the images that the head was fitted on; None where none
    were kept."""
    train_labels: Tensor | None
    """``(M,)``; None where there are none."""
    exact: ClassVar[tuple[str, ...]] = ("low", "high", "tau")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        image_shape: Sequence[int] | None = None,
        low: float | Sequence[float] = 0.0,
        high: float | Sequence[float] = 1.0,
        class_names: Sequence[str] = (),
        head: str | GarbageHead = "linear",
        logits: Readout | Callable[[Any], Tensor] | None = None,
    ):
        super().__init__(low, high)
        _check(backbone, num_classes, image_shape, class_names, head)
        self.num_classes, self.class_names = num_classes, tuple(class_names)
        self.image_shape = None if image_shape is None else check_shape(image_shape)
        if self.image_shape is not None and len(self.low) not in (1, self.image_shape[0]):
            raise ValueError(
                f"Expected low and high to be numbers or {self.image_shape[0]}, one per channel, "
                f"but got {len(self.low)}"
            )
        # Copied, since the caller's network keeps its last layer; and without torch.compile's
        # wrapper, whose program is of a network that has it.
        self.backbone = bare_copy(backbone)
        own: Tensor | None = None
        readout = logits if isinstance(logits, Readout) else None
        if logits is not None and readout is None:
            self.backbone = Selected(self.backbone, logits)  # type: ignore[arg-type]
        if self.image_shape is not None:
            ramp = torch.linspace(0, 1, math.prod(self.image_shape)).view(1, *self.image_shape)
            x = self.from_unit(torch.cat([ramp, 1 - ramp, ramp.square()]))
            x = x.to(next(self.backbone.parameters(), x))
            found, own = locate(self.backbone, x, num_classes, readout)
        else:
            found = readout or Readout(((classifier_name(self.backbone),),))
        layers = find_layers(self.backbone, x[:2]) if head == "multilayer" else {}
        self.readout = found
        last = cut(self.backbone, found)
        self.backbone_classes, self.feature_size = sizes(last, found)
        self.fc = last_layer(last, found, num_classes)
        like: dict[str, Any] = {"device": self.fc.weight.device, "dtype": self.fc.weight.dtype}
        if head == "multilayer":
            head = GarbageHead(layers, self.feature_size)
        own_head = copy.deepcopy(head) if isinstance(head, GarbageHead) else None
        self.garbage = (
            nn.Linear(self.feature_size, 1, **like) if own_head is None else own_head.to(**like)
        )
        # Infinite until training sets it, so that level 2 rejects nothing.
        self.register_buffer("tau", torch.tensor(math.inf))
        for name in KEPT:
            self.register_buffer(name, None)
        self._autocast_dtype = "float32"
        for name in self.exact:
            setattr(self, name, getattr(self, name).to(like["device"]))
        # Of a network in evaluation mode no part is frozen: .train() means all of it.
        self.training = self.backbone.training
        self.garbage.train(self.training)
        self.fc.train(self.training)
        same = own is not None and self.backbone_classes == num_classes
        if own is not None and same and not (found.behind and own.shape[1] == 1):
            check_same(self, x, own)

    @property
    def autocast_dtype(self) -> str:
        """The type that the backbone computes in, one of :data:`AUTOCAST_DTYPES`. Training and
        attach set it, and it is saved, since a threshold is valid for scores of the same type.
        """
        return self._autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, value: str) -> None:
        if value not in AUTOCAST_DTYPES:
            raise ValueError(
                f"Expected autocast_dtype to be one of {', '.join(AUTOCAST_DTYPES)}, "
                f"but got {value!r}"
            )
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

    @without_autocast
    def forward(self, x: Tensor, *, garbage: bool = False) -> Tensor:
        """Logits of images.

        Arguments:
            x: Images ``(B, C, H, W)``.
            garbage: Give n+1 logits, the garbage class last, instead of n.

        Returns:
            Logits ``(B, n)`` or ``(B, n+1)``. Where something stands behind the logits, such as a
            softmax, ``(B, n)`` is what the backbone itself returns; ``(B, n+1)`` never is.
        """
        if garbage:
            return self.outputs(x).logits
        y, h = self._run(x)
        logits = self.fc(h)
        if not self.readout.behind:
            return logits
        own = at(y, self.readout.path)
        return own.reshape(logits.shape) if own.numel() == logits.numel() else logits

    def classifier_view(self) -> nn.Module:
        """A view of the backbone with its last layers."""
        view = hook_view(self.backbone)
        plug(view, self.readout, self.fc)
        return view

    def outputs(self, x: Tensor) -> Outputs:
        """All n+1 logits, and the features, of images ``(B, C, H, W)``, by one forward pass."""
        h, s = self.statistics(x)
        return Outputs(self.all_logits(h, s), h)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, F)``, and the input of the garbage logit: the statistics ``(B, S)`` of
        every layer that the head reads, or the features themselves.
        """
        if not isinstance(self.garbage, GarbageHead):
            h = self.features(x)
            return h, h
        view, found = self.garbage.watch(self.backbone)
        h = self._run(x, view)[1]
        return h, self.garbage.statistics(found, h)

    @without_autocast
    def all_logits(self, h: Tensor, s: Tensor) -> Tensor:
        """All n+1 logits ``(B, n+1)`` of features ``(B, F)`` and statistics ``(B, S)``; beside a
        head on every layer those of a network in half precision are float32.
        """
        logits, garbage = self.fc(h), self.garbage(s)
        if isinstance(self.garbage, GarbageHead):
            # So the softmax over n+1 outputs has the head's odds, whatever the ID logits are.
            logits = upcast(logits)
            garbage = logits.logsumexp(1, keepdim=True) + garbage
        return torch.cat([logits, garbage], dim=1)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level of images, by one forward pass in evaluation mode.

        Arguments:
            x: Images ``(B, C, H, W)`` in the value range of training; B = 1 is fine.

        Returns:
            The :class:`~tie_ext.scores.decision.Decision`. The network is left as it was.

        Raises:
            ValueError: If ``x`` is not a finite floating-point batch of images of the shape and
                value range of training.
        """
        self.check(x)
        return decide(eval_view(self)(x, garbage=True), self.tau)

    def check(self, x: Tensor) -> None:
        """Check images as :meth:`decide` does.

        Raises:
            ValueError: If ``x`` is not a finite floating-point batch of images of the shape and
                value range of training.
        """
        check_images(x, self.image_shape, self.low.to(x.device), self.high.to(x.device))

    def keep_training(self, features: Tensor | None, labels: Tensor | None) -> None:
        """Keep features ``(M, F)`` and labels ``(M,)`` of training images, or none."""
        for name, value in zip(KEPT, (features, labels), strict=True):
            setattr(self, name, None if value is None else value.detach().to(self.low.device))

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
        saved = (state_dict.get(prefix + name) for name in KEPT)
        self.keep_training(*(of if of is None else torch.empty_like(of) for of in saved))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, path: str | os.PathLike) -> None:
        """Write the network with its tau, image shape, value range and class names; atomically, as
        safetensors + JSON (:mod:`tie_ext.models.serialization`).

        Raises:
            OSError: If it cannot be written; an earlier file is intact.
        """
        save_network(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike, backbone: nn.Module | None = None) -> "TIENet":
        """Read what :meth:`save` wrote, on the CPU, in evaluation mode.

        Arguments:
            path: The file.
            backbone: The architecture, where it is not one of
                :data:`~tie_ext.models.backbones.BACKBONES`; its weights come from the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, foreign, of another architecture, or needs a backbone.
        """
        return load_network(path, backbone, cls)


def _check(
    backbone: nn.Module,
    num_classes: int,
    image_shape: Sequence[int] | None,
    class_names: Sequence[str],
    head: str | GarbageHead,
) -> None:
    """Refuse arguments that contradict each other or are out of range."""
    if isinstance(backbone, TIENet):
        raise ValueError(
            "Expected a classifier without a garbage class, but got a TIENet, which has one"
        )
    if not isinstance(head, GarbageHead) and head not in HEADS:
        raise ValueError(
            f"Expected head to be one of {', '.join(HEADS)} or a GarbageHead, but got {head!r}"
        )
    if head == "multilayer" and image_shape is None:
        raise ValueError(
            "Expected an image_shape to find the layers that the head reads, but got None"
        )
    if num_classes == 1:
        raise ValueError(
            "Expected num_classes to be an integer in [2, inf], but got 1; a network with one "
            "logit has two classes"
        )
    check_number("num_classes", num_classes, 2, math.inf, integer=True)
    if class_names and len(class_names) != num_classes:
        raise ValueError(f"Expected {num_classes} class names, but got {len(class_names)}")
