"""The wrapper that gives any classifier one more output, the garbage class.

Symbols: ``x (B, C, H, W)`` images, ``h (B, F)`` penultimate features, ``n`` ID classes, ``logits (B, n)`` or ``(B, n+1)`` with garbage last.
"""

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.models.head import GarbageHead, find_layers
from tie_ext.scores.decision import Decision, decide
from tie_ext.utils.checks import check_images, check_number, check_shape
from tie_ext.utils.files import load_state, reading, save_state
from tie_ext.utils.modules import FLOATS, Bounded, check_state, evaluating

PRECISIONS = ("float32", "bfloat16")
"""What a backbone can compute in while weights, features and logits stay as they are."""
GARBAGE = ("linear", "layers")
"""What can give the garbage logit: the paper's linear function of the penultimate features, or a head on every layer."""
TRIED = 3 * 224 * 224
"""Largest images, in values, that a network from a file is tried on; those that a generator can make are no larger. A file that claims larger
ones shall not take memory for them when it is read."""
_EXTRA = "_extra_state"  # torch's name for what get_extra_state gives


class TIENet(Bounded):
    """An n-class network with one more output, the garbage class.

    ``forward(x)`` gives the n ID logits, so that every OOD score made for an n-class network reads it unchanged;
    ``forward(x, garbage=True)`` gives all n+1. The head is split in two, ``fc`` (n outputs) and ``garbage`` (one), which together are one
    linear layer of n+1 outputs; so ``fc`` is the ID head wherever a host looks for it.

    Arguments:
        backbone: A classifier ``(B, C, H, W) -> (B, m)`` that returns what its last linear layer gives, logits and no softmax: a
            torchvision model, a network with ``fc``, or one of :data:`BACKBONES`. It is copied. Its last linear layer becomes ``fc`` if
            it has n outputs already (pre-trained weights are kept), and is replaced by a new one if not.
        num_classes: n >= 2.
        image_shape: ``(C, S, S)`` of the images it is for; None to take any (such a network cannot be trained by TIE).
        low: Smallest value of the images, a number or one a channel (what ``Normalize`` makes of 0).
        high: Largest value of the images (what it makes of 1).
        classes: Name of each ID class, by label.
        garbage: What gives the garbage logit: ``linear``, the paper's linear function of the penultimate features; ``layers``, a head on every
            layer, which asks for an ``image_shape``; or such a head, which is copied.

    Raises:
        ValueError: If the backbone has no linear layer to stand on, returns something else than its last one does, does not take images
            of ``image_shape`` (the latter two are tried where it is given), that is no shape of an image, n < 2, low is not below high, or the
            backbone has no layers for a head to read.

    Example:
        >>> net = TIENet(Conv3(in_channels=1, num_classes=10), num_classes=10, image_shape=(1, 28, 28))
        >>> x = torch.rand(2, 1, 28, 28)
        >>> net(x).shape, net(x, garbage=True).shape
        (torch.Size([2, 10]), torch.Size([2, 11]))
    """

    tau: Tensor
    exact: ClassVar[tuple[str, ...]] = ("low", "high", "tau")

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        image_shape: Sequence[int] | None = None,
        low: float | Sequence[float] = 0.0,
        high: float | Sequence[float] = 1.0,
        classes: Sequence[str] = (),
        garbage: str | GarbageHead = "linear",
    ):
        super().__init__(low, high)
        if isinstance(backbone, TIENet):
            raise ValueError(
                "Expected a classifier without a garbage class, but got a TIENet, which has one already"
            )
        if not isinstance(garbage, GarbageHead) and garbage not in GARBAGE:
            raise ValueError(
                f"Expected garbage to be one of {', '.join(GARBAGE)} or a GarbageHead, but got {garbage!r}"
            )
        if garbage == "layers" and image_shape is None:
            raise ValueError(
                "Expected an image_shape to find the layers with that a garbage head reads, but got None"
            )
        check_number("num_classes", num_classes, 2, math.inf, integer=True)
        if classes and len(classes) != num_classes:
            raise ValueError(f"Expected {num_classes} class names, but got {len(classes)}")
        self.num_classes, self.classes = num_classes, tuple(classes)
        self.image_shape = None if image_shape is None else check_shape(image_shape)
        if self.image_shape is not None and len(self.low) not in (1, self.image_shape[0]):
            raise ValueError(
                f"Expected low and high to be numbers or {self.image_shape[0]}, one a channel, but got {len(self.low)}"
            )
        self.backbone = copy.deepcopy(
            backbone
        )  # cutting its head off must not change the caller's network
        if self.image_shape is not None:
            ramp = self.scaled(
                torch.linspace(0, 1, math.prod(self.image_shape)).view(1, *self.image_shape)
            )
            _try(self.backbone, ramp)
        cut = cut_head(self.backbone)
        self.feature_size = cut.in_features
        like: dict[str, Any] = {"device": cut.weight.device, "dtype": cut.weight.dtype}
        self.fc = (
            cut
            if cut.out_features == num_classes
            else nn.Linear(cut.in_features, num_classes, **like)
        )
        if garbage == "layers":
            garbage = GarbageHead(find_layers(self.backbone, ramp.to(**like)), cut.in_features)
        self.garbage = (
            copy.deepcopy(garbage).to(**like)
            if isinstance(garbage, GarbageHead)
            else nn.Linear(cut.in_features, 1, **like)
        )
        # The largest UE of an accepted prediction. Infinite, which leaves level 2 off, until training has set it.
        self.register_buffer("tau", torch.tensor(math.inf))
        self._precision = "float32"
        for name in self.exact:
            setattr(self, name, getattr(self, name).to(cut.weight.device))

    @property
    def precision(self) -> str:
        """What the backbone computes in, one of :data:`PRECISIONS`. Training and attach set it, and it is saved, so that a threshold meets the
        scores it was fitted to.
        """
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in PRECISIONS:
            raise ValueError(
                f"Expected a precision, one of {', '.join(PRECISIONS)}, but got {value!r}"
            )
        self._precision = value

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features ``(B, F)`` of images ``(B, C, H, W)`` of any floating-point type."""
        return self._computed(self.backbone, x).flatten(1)

    def _computed(self, part: Callable, x: Tensor, *args, **kwargs) -> Any:
        """What a part of the backbone gives for images ``(B, C, H, W)``, in the network's type and precision; a tensor in the type of its head."""
        x = x.to(self.fc.weight.dtype)
        if self.precision == "float32":
            return part(x, *args, **kwargs)
        with torch.autocast(x.device.type, torch.bfloat16):
            y = part(x, *args, **kwargs)
        return y.to(self.fc.weight.dtype) if isinstance(y, Tensor) else y

    @overload
    def forward(self, x: Tensor, *, garbage: bool = False) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, return_feature: bool, *, garbage: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def forward(self, x, return_feature=False, *, garbage=False):
        """Logits, and features where asked.

        Arguments:
            x: Images ``(B, C, H, W)``.
            return_feature: Give ``(logits, features)``, as OpenOOD's networks do.
            garbage: Give n+1 logits, the garbage class last, instead of n.

        Returns:
            Logits ``(B, n)`` or ``(B, n+1)``; with ``return_feature`` also features ``(B, F)``.
        """
        if garbage:
            h, statistics = self.statistics(x)
            logits = self.head(h, statistics)
        else:
            h = self.features(x)
            logits = self.fc(h)
        return (logits, h) if return_feature else logits

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, F)``, and what the garbage logit is a function of: the statistics ``(B, S)`` of every layer, or the features themselves."""
        if not isinstance(self.garbage, GarbageHead):
            h = self.features(x)
            return h, h
        with self.garbage.reading(self.backbone) as outputs:
            h = self.features(x)
        return h, self.garbage.statistics(outputs, h)

    def head(self, h: Tensor, statistics: Tensor) -> Tensor:
        """All n+1 logits ``(B, n+1)`` of features ``(B, F)`` and what :meth:`statistics` gives beside them."""
        logits = self.fc(h)
        if not isinstance(self.garbage, GarbageHead):
            return torch.cat([logits, self.garbage(statistics)], dim=1)
        # The softmax over n+1 outputs then gives the head's own odds of garbage, whatever the ID logits are.
        return torch.cat(
            [logits, logits.logsumexp(1, keepdim=True) + self.garbage(statistics)], dim=1
        )

    def forward_threshold(self, x: Tensor, threshold: float) -> Tensor:
        """ID logits ``(B, n)`` of features cut off above ``threshold``, as ReAct asks for."""
        return self.fc(self.features(x).clip(max=threshold))

    def get_fc(self) -> tuple:
        """Weight ``(n, F)`` and bias ``(n,)`` (zeros, where it has none) of the ID head as numpy arrays, as OpenOOD's networks give them."""
        bias = self.fc.weight.new_zeros(self.num_classes) if self.fc.bias is None else self.fc.bias
        return tuple(part.detach().cpu().float().numpy() for part in (self.fc.weight, bias))

    def get_fc_layer(self) -> nn.Linear:
        """The ID head itself."""
        return self.fc

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level of images, by one forward pass in evaluation mode.

        Arguments:
            x: Images ``(B, C, H, W)`` in the value range of training; B = 1 is fine.

        Returns:
            The :class:`tie_ext.scores.decision.Decision`; the mode of the network is left as it was.

        Raises:
            ValueError: If ``x`` is not a finite floating-point batch of images of the shape and value range of training.
        """
        self.check(x)
        with evaluating(self):
            return decide(self(x, garbage=True), self.tau)

    def check(self, x: Tensor) -> None:
        """Refuse what :meth:`decide` refuses.

        Raises:
            ValueError: If ``x`` is not a finite floating-point batch of images of the shape and value range of training.
        """
        check_images(x, self.image_shape, self.low.to(x.device), self.high.to(x.device))

    def get_extra_state(self) -> Tensor:
        """Place of the precision in :data:`PRECISIONS`: with it in the ``state_dict``, a checkpoint of any program keeps it."""
        return torch.tensor(
            PRECISIONS.index(self.precision)
        )  # a tensor, as is all else that people expect of a state_dict

    def set_extra_state(self, state: Tensor) -> None:
        """Put the precision back."""
        self.precision = PRECISIONS[int(state)]

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.setdefault(
            prefix + _EXTRA, torch.tensor(0)
        )  # earlier checkpoints had float32 alone
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, path: str | os.PathLike) -> None:
        """Write the network with its tau, image shape, value range and class names; atomically, as safetensors + JSON.

        Raises:
            OSError: If it cannot be written; an earlier file is intact.
        """
        about = {
            "num_classes": self.num_classes,
            "image_shape": self.image_shape,
            "classes": self.classes,
            "precision": self.precision,
        }
        names = [name for name, backbone in BACKBONES.items() if type(self.backbone) is backbone]
        weights = {
            name: value for name, value in self.state_dict().items() if name != _EXTRA
        }  # the precision, which stands in ``about``
        head = {"layers": self.garbage.layers} if isinstance(self.garbage, GarbageHead) else None
        save_state(
            path,
            "network",
            {**about, "backbone": names[0] if names else None, "head": head, "weights": weights},
        )

    @classmethod
    def load(cls, path: str | os.PathLike, backbone: nn.Module | None = None) -> "TIENet":
        """Read what :meth:`save` wrote, on the CPU, in evaluation mode.

        Arguments:
            path: The file.
            backbone: The architecture, where it is not one of :data:`BACKBONES`; its weights come from the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, foreign, of another architecture, or needs a ``backbone``.
        """
        state = load_state(path, "network")
        with reading(f"a network of this architecture in {path}"):
            weights, classes = state["weights"], state["classes"]
            n = len(
                weights["fc.weight"]
            )  # of the weights, not of what the header claims: a network is no larger than its file
            if (
                state["num_classes"] != n
                or not isinstance(classes, list)
                or not all(isinstance(name, str) for name in classes)
            ):
                raise ValueError(
                    f"weights of {n} classes instead of {state['num_classes']!r}, named {classes!r}"
                )
            if backbone is None:
                backbone = _own(path, state["backbone"], weights)
            net = _filled(
                cls,
                backbone,
                n,
                state["image_shape"],
                weights,
                classes,
                _head_of(state.get("head"), weights),
            )
            precision = state.get("precision", "float32")  # earlier files had none other
            if precision not in PRECISIONS:
                raise ValueError(
                    f"Expected a precision in {path}, one of {', '.join(PRECISIONS)}, but got {precision!r}"
                )
            net.precision = precision
        return net.eval()


def _own(path: str | os.PathLike, name: object, weights: dict[str, Tensor]) -> nn.Module:
    """The one of :data:`BACKBONES` that weights are of; nothing that is larger than they are is made."""
    if name not in BACKBONES:
        raise ValueError(
            f"Expected a `backbone` for {path}, whose architecture is not one of {', '.join(BACKBONES)}, but got None"
        )
    channels = next(
        (w.shape[1] for key, w in weights.items() if key.startswith("backbone.") and w.ndim == 4),
        0,
    )
    with torch.device("meta"):  # which has shapes alone
        plan = BACKBONES[str(name)](channels, len(weights["fc.weight"])).state_dict()
    for key, w in plan.items():
        found = weights[key if key.startswith("fc.") else f"backbone.{key}"]
        if found.shape != w.shape:
            raise ValueError(f"{key} of {tuple(found.shape)} instead of {tuple(w.shape)}")
    return BACKBONES[str(name)](channels, len(weights["fc.weight"]))


def _head_of(read: Any, weights: dict[str, Tensor]) -> str | GarbageHead:
    """The garbage head that weights are of."""
    if read is None:
        return "linear"
    layers, hidden = read["layers"], len(weights["garbage.network.0.bias"])
    if not isinstance(layers, dict) or not all(
        isinstance(name, str) and isinstance(count, int) and count > 0
        for name, count in layers.items()
    ):
        raise ValueError(f"layers {layers!r} of a garbage head")
    head = GarbageHead(layers, weights["fc.weight"].shape[1], hidden)
    if head.mean.shape != weights["garbage.mean"].shape:
        raise ValueError(
            f"{weights['garbage.mean'].numel()} statistics instead of {head.mean.numel()}"
        )
    return head


def _filled(
    cls: type[TIENet],
    backbone: nn.Module,
    n: int,
    image_shape: Any,
    weights: dict[str, Tensor],
    classes: Sequence[str],
    garbage: str | GarbageHead,
) -> TIENet:
    """A network with the weights of a file."""
    kind, features = (
        weights["fc.weight"].dtype,
        int(backbone.get_submodule(_head(backbone)).in_features),
    )  # type: ignore[arg-type]
    if kind not in FLOATS or weights["fc.weight"].shape != (n, features):
        raise ValueError(
            f"fc of {kind} {tuple(weights['fc.weight'].shape)} instead of floating-point {(n, features)}"
        )
    low, high = (weights[name] for name in ("low", "high"))
    if max(low.numel(), high.numel()) > 1000 or not bool(
        low.isfinite().all() and high.isfinite().all()
    ):
        raise ValueError(
            f"a value range that is not finite, or of {max(low.numel(), high.numel())} channels"
        )
    shape = None if image_shape is None else check_shape(image_shape)
    small = shape is None or math.prod(shape) <= TRIED
    net = cls(
        backbone,
        n,
        shape if small else None,
        low.flatten().tolist(),
        high.flatten().tolist(),
        classes,
        garbage,
    )
    net.image_shape = shape
    check_state(net, weights)
    net.to(kind).load_state_dict(weights)
    return net


def _head(backbone: nn.Module) -> str:
    """Name of the last linear layer, ``fc`` where there is one."""
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            f"Expected a backbone that ends in a linear layer, but got {type(backbone).__name__} without any"
        )
    return "fc" if "fc" in linear else linear[-1]


def cut_head(backbone: nn.Module) -> nn.Linear:
    """Replace the last linear layer of a network by the identity, and give it back.

    Raises:
        ValueError: If there is none.
    """
    name = _head(backbone)
    head = backbone.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(backbone.get_submodule(parent), leaf, nn.Identity())
    return head  # type: ignore[return-value]


def _try(backbone: nn.Module, x: Tensor) -> None:
    """Run a backbone once: what follows its head would be taken for features without a word, and a wrong shape found late."""
    name, outputs = _head(backbone), []
    hook = backbone.get_submodule(name).register_forward_hook(
        lambda module, args, output: outputs.append(output.clone())
    )
    try:
        with evaluating(backbone), torch.no_grad():
            y = backbone(x.to(next(backbone.parameters())))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise ValueError(
            f"Expected a backbone for images {tuple(x.shape[1:])}, but {type(backbone).__name__} fails on one: {error}"
        ) from error
    finally:
        hook.remove()
    if not (
        outputs
        and isinstance(y, Tensor)
        and y.shape == outputs[-1].shape
        and torch.allclose(y, outputs[-1], 0, 0, equal_nan=True)
    ):
        if (
            isinstance(y, Tensor)
            and y.ndim == 2
            and (y >= 0).all()
            and torch.allclose(y.sum(1), y.new_ones(len(y)), atol=1e-2)
        ):
            said = f"its last linear layer `{name}` gives, but {type(backbone).__name__} returns probabilities"
            raise ValueError(
                f"Expected a backbone that returns the logits that {said}; leave the softmax out"
            )
        raise ValueError(
            f"Expected a backbone that returns what its last linear layer gives, but {type(backbone).__name__} returns "
            f"{'something else than' if isinstance(y, Tensor) else f'a {type(y).__name__} and no tensor as'} `{name}` does; return the logits "
            "as they are, and call the last linear layer `fc`"
        )
