"""The members of a combination: what of their network they read, so that it is run once for all, and how they are written down."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pytorch_ood.api import Detector, FeaturesDetector, LogitsDetector
from pytorch_ood.detector import (
    GEN,
    KNN,
    EnergyBased,
    Entropy,
    Mahalanobis,
    MaxLogit,
    MaxSoftmax,
    ViM,
)
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.detector import TIEDetector
from tie_ext.pytorch_ood.knn import SampledKNN
from tie_ext.pytorch_ood.mahalanobis import MahalanobisPlusPlus
from tie_ext.pytorch_ood.uncertainty import UncertaintyEstimate
from tie_ext.scores.mahalanobis import Gaussians

ALL, LOGITS, FEATURES, ITSELF = "n+1 logits", "n logits", "penultimate features", "images"
"""What a member reads of the network; ``ITSELF``, if it runs by itself."""


def network_of(members: Sequence[Detector]) -> nn.Module | None:
    """The network of the first member that has one, TIE's before others; None if none has."""
    found: list[Any] = [
        member.model.net
        for member in members
        if isinstance(member, TIEDetector) and member.model is not None
    ]
    found += [
        getattr(member, "model", None) for member in members if not isinstance(member, TIEDetector)
    ]
    found += [getattr(getattr(member, "encoder", None), "__self__", None) for member in members]
    return next((net for net in found if isinstance(net, nn.Module)), None)


def reads(member: Detector, net: nn.Module | None) -> str:
    """What a member reads of a network, :data:`ITSELF` where its score is no function of one forward pass's logits or features."""
    model, encoder = getattr(member, "model", None), getattr(member, "encoder", None)
    if isinstance(member, TIEDetector):
        return ALL if model is not None and model.net is net else ITSELF
    if isinstance(member, LogitsDetector) and net is not None and model is net:
        return LOGITS
    features = (
        inspect.ismethod(encoder)
        and encoder.__self__ is net
        and encoder.__func__ is getattr(type(net), "features", None)
    )
    return FEATURES if isinstance(member, FeaturesDetector) and features else ITSELF


class Outputs(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor
    """``(B, n+1)`` of a TIENet that was asked for all, ``(B, n)`` else."""
    features: Tensor
    """``(B, F)``; ``(B, 0)`` where nobody asked for them."""

    def read(self, kind: str, net: nn.Module) -> Tensor:
        """What a member reads."""
        if kind == FEATURES:
            return self.features
        return (
            self.logits[:, : net.num_classes]
            if kind == LOGITS and isinstance(net, TIENet)
            else self.logits
        )


def outputs(net: nn.Module, x: Tensor, kinds: Sequence[str]) -> Outputs:
    """What members read of images ``(B, C, H, W)``, by one forward pass.

    Of a network that is no TIENet the features are noted where its ``forward`` asks its ``features`` for them; where it does not, they take a
    second pass.
    """
    if isinstance(net, TIENet):
        if ALL in kinds:
            return Outputs(*net.outputs(x))
        h = net.features(x)
        return Outputs(net.fc(h), h)
    if FEATURES not in kinds:
        logits = net(x)
        return Outputs(logits, logits[:, :0])
    with _noted(net, x) as features:
        logits = net(x)
    return Outputs(logits, features[0] if features else net.features(x))  # type: ignore[operator]


@contextmanager
def _noted(net: nn.Module, x: Tensor) -> Iterator[list[Tensor]]:
    """Inside, what ``net.features`` gives for these images is put in a list."""
    found, own = [], net.features

    def features(y: Tensor, *args, **kwargs):
        z = own(y, *args, **kwargs)  # type: ignore[operator]
        if y is x:  # else it is one of other images, such as normalised ones
            found.append(z)
        return z

    net.features = features  # type: ignore[assignment]
    try:
        yield found
    finally:
        del net.features


def predictor(member: Detector) -> Callable[[Tensor], Tensor]:
    """Scores ``(B,)`` of what a member reads, larger = more OOD."""
    return (
        member.predict_features if isinstance(member, FeaturesDetector) else member.predict_logits
    )  # type: ignore[attr-defined]


class MemberSpec(NamedTuple):
    """How a detector is written down and read again; nothing of it runs code."""

    make: Callable[[TIENet, dict[str, Any]], Detector]
    """The detector on a network, from its state."""
    settings: tuple[str, ...] = ()
    """Attributes that are numbers or None."""
    tensors: tuple[str, ...] = ()
    """Attributes that are tensors or None."""
    traced: Callable[[Any], Callable[[Tensor], Tensor]] | None = predictor
    """As :func:`predictor`, for ``torch.export``; None if it cannot be traced."""


def _knn(net: TIENet, state: dict[str, Any]) -> KNN:
    member = KNN(net.features, state["k"], state["normalize"])
    member.knn.fit(state["images"].numpy())  # normalised already, where they are to be
    member._is_fitted = True
    return member


def _entropy(logits: Tensor) -> Tensor:
    """What pytorch-ood's Entropy gives."""
    p = logits.softmax(dim=1).clamp_min(1e-7)
    return -(p.log() * p).sum(dim=1)


MEMBERS: dict[type[Detector], MemberSpec] = {
    TIEDetector: MemberSpec(
        lambda net, s: TIEDetector(net, s["false_alarm"], s["lam"], s["t"]),
        ("false_alarm", "lam", "t"),
        ("tau", "threshold"),
    ),
    UncertaintyEstimate: MemberSpec(lambda net, s: UncertaintyEstimate(net)),
    EnergyBased: MemberSpec(lambda net, s: EnergyBased(net), ("t",)),
    MaxSoftmax: MemberSpec(lambda net, s: MaxSoftmax(net), ("t",)),
    MaxLogit: MemberSpec(lambda net, s: MaxLogit(net)),
    # Its own clamps between a float and an int, which ONNX does not follow.
    Entropy: MemberSpec(lambda net, s: Entropy(net), traced=lambda member: _entropy),
    GEN: MemberSpec(lambda net, s: GEN(net), ("gamma", "M")),
    # Its own reads `.data`, which torch.export does not follow.
    Mahalanobis: MemberSpec(
        lambda net, s: Mahalanobis(net.features),
        (),
        ("mu", "cov", "precision"),
        lambda member: Gaussians(member.mu, member.precision).distance,
    ),
    MahalanobisPlusPlus: MemberSpec(
        lambda net, s: MahalanobisPlusPlus(net.features), (), ("mu", "precision")
    ),
    ViM: MemberSpec(
        lambda net, s: ViM(net.features, s["d"], s["w"], s["b"]),
        ("d", "alpha"),
        ("w", "b", "u", "principal_subspace"),
    ),
    SampledKNN: MemberSpec(
        lambda net, s: SampledKNN(net.features, s["k"], s["most"]), ("k", "most"), ("sample",)
    ),
    KNN: MemberSpec(_knn, ("k", "normalize"), ("images",), traced=None),
}
"""Detectors whose state is plain numbers and tensors."""
_NAMES = {cls.__name__: cls for cls in MEMBERS}


def check_spec(member: Detector, kind: str) -> MemberSpec:
    """How a member is written down.

    Raises:
        TypeError: If there is no telling, or it stands on another network than the combination.
    """
    name = type(member).__name__
    if type(member) not in MEMBERS or (
        type(member) is KNN and member.knn.get_params() != KNN(None).knn.get_params()
    ):
        raise TypeError(
            f"Expected members out of {', '.join(_NAMES)}, with their default settings inside, but got {name}"
        )
    if kind == ITSELF:
        raise TypeError(
            f"Expected members that read the network of the combination or its `features`, but got {name} on something else"
        )
    return MEMBERS[type(member)]


def state_of(member: Detector, kind: str) -> dict[str, Any]:
    """Name and state of a member, as :func:`member_of` reads it.

    Raises:
        TypeError: If it cannot be written down.
    """
    kept = check_spec(member, kind)
    state = {
        name: getattr(member, name) for name in (*kept.settings, *kept.tensors) if name != "images"
    }
    if type(member) is KNN:
        state["images"] = torch.from_numpy(member.knn._fit_X)
    return {"name": type(member).__name__, **state}


def member_of(net: TIENet, state: dict[str, Any]) -> Detector:
    """The member that :func:`state_of` wrote down, on a network.

    Raises:
        LookupError: If its name is not one of :data:`MEMBERS`, or a part is missing.
        ValueError: If a part is of another type.
    """
    kept = MEMBERS[_NAMES[state["name"]]]
    for name in kept.settings:
        if not isinstance(state[name], int | float | None):
            raise ValueError(
                f"Expected {name} of {state['name']} to be a number, but got {state[name]!r}"
            )
    for name in kept.tensors:
        value = state[name]
        if not (
            value is None
            or (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and bool(value.isfinite().all())
            )
        ):
            raise ValueError(
                f"Expected {name} of {state['name']} to be finite numbers, but got {value!r:.100}"
            )
    member = kept.make(net, state)
    for name in (*kept.settings, *kept.tensors):
        if name != "images":
            setattr(member, name, state[name])
    return member
