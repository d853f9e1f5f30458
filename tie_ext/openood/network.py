"""TIE's network around any of OpenOOD's backbones, with the calls that its postprocessors make."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from openood.preprocessors.transform import normalization_dict
from openood.utils.config import Config
from torch import Tensor, nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet

OTHERS = (*BACKBONES, "wrn", "densenet")
"""Backbones that a checkpoint may be of where it does not fit the network of OpenOOD's script."""


class OpenOODTIENet(TIENet):
    """A :class:`tie_ext.TIENet` that answers OpenOOD's calls; each of them sees n classes.

    The layers and methods of the backbone are attributes of the network too (``net.layer4``,
    ``net.avgpool``).
    """

    def forward(
        self,
        x: Tensor,
        return_feature: bool = False,
        return_feature_list: bool = False,
        *,
        garbage: bool = False,
    ):
        """Logits, and features where asked for.

        Arguments:
            x: Images ``(B, 3, S, S)``, normalised.
            return_feature: Give ``(logits, features (B, F))``.
            return_feature_list: Give ``(logits, [maps of the backbone, penultimate last])``.
            garbage: Give n+1 logits, the garbage class last, instead of n.
        """
        if return_feature_list:
            return self._with_maps(x, garbage)
        if not return_feature:
            return super().forward(x, garbage=garbage)
        if garbage:
            return tuple(self.outputs(x))
        h = self.features(x)
        return self.fc(h), h

    def _with_maps(self, x: Tensor, garbage: bool) -> tuple[Tensor, list[Tensor]]:
        head = self.garbage if garbage and isinstance(self.garbage, GarbageHead) else None
        view, found = head.watch(self.backbone) if head else (self.backbone, {})
        _, maps = self.compute(view, x, return_feature_list=True)
        h = maps[-1].flatten(1).to(self.fc.weight.dtype)
        if not garbage:
            return self.fc(h), maps
        return self.all_logits(h, head.statistics(found, h) if head else h), maps

    def forward_threshold(self, x: Tensor, threshold: float) -> Tensor:
        """ID logits ``(B, n)`` of features clipped at ``threshold``, as ReAct asks for."""
        return self.fc(self.features(x).clip(max=threshold))

    def get_fc(self) -> tuple:
        """Weight ``(n, F)`` and bias ``(n,)`` (zeros, where it has none) of ``fc`` in numpy."""
        weight, bias = self.fc.weight, self.fc.bias
        bias = weight.new_zeros(self.num_classes) if bias is None else bias
        return tuple(part.detach().cpu().float().numpy() for part in (weight, bias))

    def get_fc_layer(self) -> nn.Linear:
        """The ID classifier itself."""
        return self.fc

    def intermediate_forward(self, x: Tensor, layer_index: int) -> Tensor:
        """The backbone's feature maps after one of its layers, as OpenOOD counts them."""
        return self.compute(self.backbone.intermediate_forward, x, layer_index)  # type: ignore[arg-type]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("_"):
                raise
            return getattr(super().__getattr__("backbone"), name)


def tie_net(config: Config) -> OpenOODTIENet:
    """The network of a config, without weights.

    Images have three channels and are normalised: ``-mean / std`` stands for 0, and
    ``(1 - mean) / std`` for 1.

    Arguments:
        config: OpenOOD's config of the network: ``num_classes``, ``image_size``,
            ``normalization_type``, ``backbone`` and, where it is given, ``head`` (``linear`` or
            ``multilayer``).
    """
    low, high = value_range(*normalization(config.normalization_type))
    shape = (3, config.image_size, config.image_size)
    backbone = backbone_of(config.backbone)
    return OpenOODTIENet(
        backbone, config.num_classes, shape, low, high, head=config.head or "linear"
    )


def normalization(name: str | None) -> Sequence[Sequence[float]]:
    """Mean and standard deviation by channel, as OpenOOD normalises a data set."""
    return normalization_dict.get(name, ([0.5] * 3, [0.5] * 3))


def value_range(mean: Iterable[float], std: Iterable[float]) -> tuple[list[float], list[float]]:
    """What normalisation makes of 0 and of 1, one number a channel."""
    pairs = list(zip(mean, std, strict=True))
    return [-m / s for m, s in pairs], [(1 - m) / s for m, s in pairs]


def backbone_of(config: Config) -> nn.Module:
    """The classifier of a config, on the CPU.

    It is one of OpenOOD's networks, or of :data:`tie_ext.models.backbones.BACKBONES` for images of
    three channels.
    """
    # At the time of the call, as it may have been replaced by one that knows more networks.
    from openood.networks.utils import get_network

    if config.name in BACKBONES:
        return BACKBONES[config.name](3, config.num_classes)
    config.num_gpus = 0  # moved to its device as a part of the whole
    return get_network(config)


def tie_net_of(checkpoint: Mapping[str, Tensor], network: nn.Module, size: int) -> OpenOODTIENet:
    """The ``tie_net`` that a checkpoint is of, with its weights, tau and value range.

    Arguments:
        checkpoint: The ``state_dict`` of a ``tie_net``, or of what :func:`tie_ext.attach` gives.
        network: The classifier that it is expected to be around, which is copied. Where it is
            around one of :data:`OTHERS` instead, that is found.
        size: S of its images ``(3, S, S)``.

    Raises:
        ValueError: If it is around another network, or its head is for images of another size.
    """
    num_classes = len(checkpoint["fc.weight"])
    backbone = _backbone_in(checkpoint, network, num_classes)
    low, high = (checkpoint[name].flatten().tolist() for name in ("low", "high"))
    head = "multilayer" if "garbage.mean" in checkpoint else "linear"
    net = OpenOODTIENet(backbone, num_classes, (3, size, size), low, high, head=head)
    try:
        net.load_state_dict(dict(checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f"Expected a checkpoint of a tie_net around {type(backbone).__name__} for {size} "
            f"pixels, but got another: {error}"
        ) from None
    return net


def _backbone_in(
    checkpoint: Mapping[str, Tensor], network: nn.Module, num_classes: int
) -> nn.Module:
    """The first candidate that has all weights of the checkpoint's backbone."""
    prefix = "backbone."
    shapes = {
        name.removeprefix(prefix): value.shape
        for name, value in checkpoint.items()
        if name.startswith(prefix)
    }
    settings = {"num_classes": num_classes, "pretrained": False}
    others = (backbone_of(Config(name=name, **settings)) for name in OTHERS)
    for candidate in chain([network], others):
        state = candidate.state_dict()
        if shapes.items() <= {name: value.shape for name, value in state.items()}.items():
            return candidate
    raise ValueError(
        "Expected a checkpoint of a tie_net around one of "
        f"{', '.join([type(network).__name__, *OTHERS])}, but got one around another network; "
        "score it by main.py"
    )
