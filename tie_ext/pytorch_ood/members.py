"""The registry of members: the detectors that a combination can save and export.

To add a score, write it as a pytorch-ood detector with ``predict_logits`` or
``predict_features`` (larger = more OOD), and pass it to :class:`tie_ext.Combined` among others.
One entry in :data:`MEMBERS` makes it savable and exportable, and gives its weight. What
:func:`tie_ext.combine` combines is listed in ``chosen_members`` of
:mod:`tie_ext.pytorch_ood.recommended`.

One forward pass of the network serves all members that read its logits or features. Members that
read something else, such as ODIN, make their own forward pass.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_ood.api import (
    Detector,
    FeaturesDetector,
    LogitsDetector,
    RequiresFittingException,
)
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
from tie_ext.pytorch_ood.fdbd import BoundaryDistance
from tie_ext.pytorch_ood.knn import SampledKNN
from tie_ext.pytorch_ood.mahalanobis import MahalanobisPlusPlus
from tie_ext.pytorch_ood.uncertainty import UncertaintyEstimate
from tie_ext.scores.combination import Weights
from tie_ext.scores.decision import upcast
from tie_ext.scores.knn import knn_score
from tie_ext.scores.mahalanobis import Gaussians
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.views import holder_view, hook_view

# The registry.


def predictor(member: Any) -> Callable[[Tensor], Tensor]:
    """Scores ``(B,)`` of what a member reads, larger = more OOD."""
    if isinstance(member, FeaturesDetector):
        return member.predict_features
    return member.predict_logits


class MemberSpec(NamedTuple):
    """How a detector is weighted, saved, loaded and exported. Files hold numbers and tensors, no
    code.
    """

    weight: float = 1.0
    """In the body of a combination (:func:`tie_ext.scores.combination.body_and_tail`)."""
    distance: bool = False
    """Whether it tells how far an image is from training images, and not between which classes.
    Then it has its weight only as far as distances are trusted (:mod:`tie_ext.scores.trust`).
    """
    tail: float = 0.0
    """Weight in the tail of a combination: of scores that find far images on every network."""
    settings: tuple[str, ...] = ()
    """Attributes that are numbers or None."""
    tensors: tuple[str, ...] = ()
    """Attributes that are tensors or None."""
    make: Callable[[TIENet, dict[str, Any]], Detector] | None = None
    """The detector on a network, from its saved attributes, which are set on it afterwards; None
    for ``cls(net)``, or ``cls(net.features)`` of a detector on features.
    """
    exported: Callable[[Any], Callable[[Tensor], Tensor]] | None = predictor
    """The score as a function that ``torch.export`` can trace; None where there is none."""
    read: Callable[[Any, str], Any] = getattr
    """Reads a setting or tensor of the detector by name."""


def _entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(dim=1).clamp_min(1e-7)
    return -(p.log() * p).sum(dim=1)


def _mahalanobis_plus_plus(member: MahalanobisPlusPlus) -> Callable[[Tensor], Tensor]:
    gaussians = member.gaussians()  # before anything is traced
    return lambda z: gaussians.distance(F.normalize(z))


def _sampled_knn(member: SampledKNN) -> Callable[[Tensor], Tensor]:
    sample = member.prepared()  # before anything is traced
    return lambda z: knn_score(z, sample, min(member.k, len(sample.rows)))


def _make_knn(net: TIENet, saved: dict[str, Any]) -> KNN:
    member = KNN(net.features, saved["k"], saved["normalize"])
    member.knn.fit(saved["images"].numpy())  # of length 1 already, where they are to be
    member._is_fitted = True
    return member


def _read_knn(member: KNN, name: str) -> Any:
    return torch.from_numpy(member.knn._fit_X) if name == "images" else getattr(member, name)


MEMBERS: dict[type[Detector], MemberSpec] = {
    TIEDetector: MemberSpec(
        weight=0.5,
        distance=True,
        tail=1,
        settings=("false_alarm", "lam", "t"),
        tensors=("tau", "threshold"),
        make=lambda net, saved: TIEDetector(net, saved["false_alarm"], saved["lam"], saved["t"]),
    ),
    UncertaintyEstimate: MemberSpec(),
    EnergyBased: MemberSpec(settings=("t",)),
    MaxSoftmax: MemberSpec(settings=("t",)),
    MaxLogit: MemberSpec(),
    # Its own clamps between a float and an int, which ONNX does not follow.
    Entropy: MemberSpec(exported=lambda member: _entropy),
    GEN: MemberSpec(settings=("gamma", "M")),
    Mahalanobis: MemberSpec(
        distance=True,
        tail=1,
        tensors=("mu", "cov", "precision"),
        # Its own reads `.data`, which torch.export does not follow.
        exported=lambda member: Gaussians(member.mu, member.precision).distance,
    ),
    MahalanobisPlusPlus: MemberSpec(
        distance=True,
        tail=1,
        tensors=("mu", "precision"),
        exported=_mahalanobis_plus_plus,
    ),
    BoundaryDistance: MemberSpec(
        tensors=("w", "b", "train_mean"),
        make=lambda net, saved: BoundaryDistance(net.features, saved["w"], saved["b"]),
    ),
    ViM: MemberSpec(
        settings=("d", "alpha"),
        tensors=("w", "b", "u", "principal_subspace"),
        make=lambda net, saved: ViM(net.features, saved["d"], saved["w"], saved["b"]),
    ),
    SampledKNN: MemberSpec(
        distance=True,
        settings=("k", "max_samples"),
        tensors=("sample",),
        exported=_sampled_knn,
        make=lambda net, saved: SampledKNN(net.features, saved["k"], saved["max_samples"]),
    ),
    KNN: MemberSpec(
        distance=True,
        settings=("k", "normalize"),
        tensors=("images",),
        make=_make_knn,
        exported=None,
        read=_read_knn,
    ),
}
"""One entry a detector."""
_NAMES = {cls.__name__: cls for cls in MEMBERS}
_RENAMED = {"most": "max_samples"}
"""Attributes that 0.2.0 and its snapshots called otherwise."""


def check_spec(member: Detector, net: nn.Module | None) -> MemberSpec:
    """How a member is saved and exported.

    Raises:
        TypeError: If it has no entry, or reads another network than the combination.
    """
    name, spec = type(member).__name__, MEMBERS.get(type(member))
    # scikit-learn's settings are not saved.
    other = type(member) is KNN and member.knn.get_params() != KNN(None).knn.get_params()
    if spec is None or other:
        raise TypeError(
            f"Expected members out of {', '.join(_NAMES)}, with their default settings inside, "
            f"but got {name}"
        )
    if reads(member, net) is None:
        raise TypeError(
            "Expected members that read the network of the combination or its `features`, "
            f"but got {name} on something else"
        )
    return spec


def weights_of(members: Sequence[Detector], trust: float) -> Weights:
    """How much each member counts in a combination.

    Arguments:
        members: The members.
        trust: The share, in [0, 1], of its weight that a distance has in the body.
    """
    specs = [MEMBERS.get(type(member), MemberSpec()) for member in members]
    body = [of.weight * (trust if of.distance else 1.0) for of in specs]
    return Weights(torch.tensor(body), torch.tensor([float(of.tail) for of in specs]))


def state_of(member: Detector, net: nn.Module | None) -> dict[str, Any]:
    """Name and state of a member, as :func:`member_of` reads it.

    Raises:
        TypeError: If it cannot be saved.
    """
    spec = check_spec(member, net)
    values = {name: spec.read(member, name) for name in (*spec.settings, *spec.tensors)}
    return {"name": type(member).__name__, **values}


def member_of(net: TIENet, state: dict[str, Any]) -> Detector:
    """The member that :func:`state_of` gave the state of, on a network.

    Raises:
        LookupError: If its name is not in :data:`MEMBERS`, or a part is missing.
        ValueError: If a part is of another type.
    """
    saved = {_RENAMED.get(name, name): value for name, value in state.items()}
    cls = _NAMES[saved["name"]]
    spec = MEMBERS[cls]
    for name in spec.settings:
        if not isinstance(saved[name], int | float | None):
            raise ValueError(
                f"Expected {name} of {cls.__name__} to be a number, but got {saved[name]!r}"
            )
    for name in spec.tensors:
        if not _finite(saved[name]):
            raise ValueError(
                f"Expected {name} of {cls.__name__} to be finite numbers, "
                f"but got {saved[name]!r:.100}"
            )
    own = net.features if issubclass(cls, FeaturesDetector) else net
    member = cls(own) if spec.make is None else spec.make(net, saved)  # type: ignore[call-arg]
    for name in (*spec.settings, *spec.tensors):
        if hasattr(member, name):
            setattr(member, name, saved[name])
    return member


def _finite(value: Any) -> bool:
    if value is None:
        return True
    good = isinstance(value, Tensor) and value.is_floating_point()
    return good and bool(value.isfinite().all())


# One forward pass for all.


class Outputs(NamedTuple):
    """What one forward pass gives the members."""

    logits: Tensor
    """``(B, n)``."""
    features: Tensor | None = None
    """``(B, F)``; None where no member reads them."""
    all_logits: Tensor | None = None
    """``(B, n+1)`` of a TIENet, garbage last; None where no member reads them."""


def confidence_of(outputs: Outputs) -> Tensor:
    """Largest probabilities ``(B,)`` of the network's classes."""
    return outputs.logits.softmax(dim=1).amax(dim=1)


def network_of(members: Sequence[Detector]) -> nn.Module | None:
    """The network of the first member that has one, TIE's before others; None if none has."""
    found: list[Any] = [m.network for m in members if isinstance(m, TIEDetector)]
    found += [getattr(m, "model", None) for m in members if not isinstance(m, TIEDetector)]
    found += [getattr(getattr(m, "encoder", None), "__self__", None) for m in members]
    return next((net for net in found if isinstance(net, nn.Module)), None)


def reads(member: Detector, net: nn.Module | None) -> str | None:
    """The field of :class:`Outputs` that a member scores; None where its score is no function of
    the logits or features of this network. A member without a network reads this one.
    """
    if isinstance(member, TIEDetector):
        field, own = "all_logits", member.network
    elif isinstance(member, LogitsDetector):
        field, own = "logits", getattr(member, "model", None)
    elif isinstance(member, FeaturesDetector):
        field, own = "features", _owner(getattr(member, "encoder", None))
    else:
        return None
    return field if own is None or own is net else None


def _owner(encoder: Any) -> Any:
    """The network whose ``features`` an encoder is; any other encoder itself."""
    if inspect.ismethod(encoder) and encoder.__name__ == "features":
        return encoder.__self__
    return encoder


@without_autocast
def forward(net: nn.Module, x: Tensor, fields: Collection[str | None]) -> Outputs:
    """What members read of images ``(B, C, H, W)``, by one forward pass; of a network in half
    precision as float32.

    Of a network that is no TIENet, the features are noted where ``forward`` calls ``features`` on
    the images; where it does not, they take a second pass.

    Arguments:
        net: The network, in evaluation mode; it is left as it is.
        x: Images.
        fields: Fields of :class:`Outputs` that are needed beside the logits.
    """
    found = _forward(net, x, fields)
    return Outputs(*(of if of is None else upcast(of) for of in found))  # type: ignore[arg-type]


def _forward(net: nn.Module, x: Tensor, fields: Collection[str | None]) -> Outputs:
    if isinstance(net, TIENet):
        if "all_logits" in fields:
            every, h = net.outputs(x)
            return Outputs(every[:, :-1], h, every)
        h = net.features(x)
        return Outputs(net.fc(h), h)
    if "features" not in fields:
        return Outputs(net(x))
    view, noted = hook_view(net), []  # a view of this call, on which `features` can be replaced

    def features(y: Tensor, *args, **kwargs) -> Tensor:
        z = net_features(y, *args, **kwargs)
        if y is x:  # not of other images, such as normalised ones
            noted.append(z)
        return z

    net_features: Any = view.features
    view.features = features  # type: ignore[assignment]
    logits = view(x)
    return Outputs(logits, noted[0] if noted else net_features(x))


@without_autocast
def member_score(member: Detector, net: nn.Module | None, outputs: Outputs, x: Tensor) -> Tensor:
    """Scores ``(B,)`` of one member, larger = more OOD.

    Arguments:
        member: The member.
        net: The network of the combination.
        outputs: What it gave for the images.
        x: The images ``(B, C, H, W)``, which a member that runs by itself scores.

    Raises:
        RequiresFittingException: If the member has not been fitted.
    """
    try:
        if (field := reads(member, net)) is None:
            return holder_view(member).predict(x)
        return predictor(member)(getattr(outputs, field))
    except RequiresFittingException as error:
        name = type(member).__name__
        raise RequiresFittingException(
            f"Expected fitted members, but got {name}, which is not; fit it on training images "
            f"first: {name}(...).fit(train_loader)"
        ) from error
