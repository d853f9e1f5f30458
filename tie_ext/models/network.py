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

from tie_ext.models.classifier import Classifier
from tie_ext.models.head import GarbageHead
from tie_ext.models.layers import MAX_LAYERS, find_layers
from tie_ext.models.readout import Readout, at
from tie_ext.models.serialization import KEPT, load_network, save_network
from tie_ext.models.statistics import EVERY, STATISTICS
from tie_ext.scores.decision import Decision, decide, upcast
from tie_ext.utils.checks import check_images, check_number
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.views import eval_view

HEADS = ("linear", "multilayer")
"""The garbage logit: the paper's linear function of the penultimate features, or a
:class:`~tie_ext.models.head.GarbageHead` on every layer."""


BEFORE = 16, EVERY
"""Layers that a head read at most before 0.3, and statistics of a channel."""


class Outputs(NamedTuple):
    """The results of one forward pass."""

    logits: Tensor
    """``(B, n+1)``, garbage last."""
    features: Tensor
    """``(B, F)``, penultimate."""


class TIENet(Classifier):
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
        _check(backbone, num_classes, image_shape, class_names, head)
        super().__init__(backbone, num_classes, image_shape, low, high, logits)
        self.class_names, like = tuple(class_names), self.fc.weight
        if isinstance(head, GarbageHead):
            self.garbage: nn.Module = copy.deepcopy(head).to(like)
        elif head == "multilayer":
            self.garbage = multilayer_head(self, self.image_shape or ())
        else:
            self.garbage = nn.Linear(self.feature_size, 1, device=like.device, dtype=like.dtype)
        self.garbage.train(self.training)
        # Infinite until training sets it, so that level 2 rejects nothing.
        self.register_buffer("tau", torch.tensor(math.inf, device=like.device))
        for name in KEPT:
            self.register_buffer(name, None)

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

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A checkpoint does not say what its head reads: what heads read now, or before.
        saved = (state_dict.get(prefix + name) for name in KEPT)
        self.keep_training(*(of if of is None else torch.empty_like(of) for of in saved))
        mean, head = state_dict.get(prefix + "garbage.mean"), self.garbage
        other = isinstance(head, GarbageHead) and mean is not None and len(mean) != len(head.mean)
        if other and self.image_shape is not None:
            for reads in ((MAX_LAYERS, STATISTICS), BEFORE):
                found = multilayer_head(self, self.image_shape, *reads)
                self.garbage = found if len(found.mean) == len(mean) else self.garbage
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


def multilayer_head(
    net: Classifier,
    shape: Sequence[int],
    most: int = MAX_LAYERS,
    per_channel: int = STATISTICS,
) -> GarbageHead:
    """A new head on every layer of a network for images ``(C, H, W)``, on ``most`` at most.

    Raises:
        ValueError: If the network has no layers for a head to read.
    """
    layers = find_layers(net.classifier_view(), net.trial_images(shape)[:2], most)
    head = GarbageHead(layers, net.feature_size, per_channel=per_channel)
    return head.to(net.fc.weight)


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
