"""TIE's network around any of OpenOOD's backbones, with what its postprocessors ask of a network."""

from collections.abc import Iterator, Mapping

from openood.preprocessors.transform import normalization_dict
from openood.utils.config import Config
from torch import Tensor, nn

from tie_ext.models.backbones import BACKBONES
from tie_ext.models.head import GarbageHead
from tie_ext.models.network import TIENet


class OpenOODTIENet(TIENet):
    """A :class:`tie_ext.TIENet` that answers OpenOOD's calls; every one of them sees n classes, as the count in its configs says.

    Beside those of TIENet (``forward(x)``, ``return_feature=True``, ``forward_threshold``, ``get_fc``, ``get_fc_layer``, ``fc``,
    ``feature_size``) these are ``return_feature_list=True``, ``intermediate_forward`` and the backbone's own layers (``net.layer4``, ``avgpool``).
    """

    def forward(
        self,
        x: Tensor,
        return_feature: bool = False,
        return_feature_list: bool = False,
        *,
        garbage: bool = False,
    ):
        """Logits, and features where asked.

        Arguments:
            x: Images ``(B, 3, S, S)``, normalised.
            return_feature: Give ``(logits, features (B, F))``.
            return_feature_list: Give ``(logits, [the backbone's maps, the penultimate ones last])``.
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
        multilayer = isinstance(self.garbage, GarbageHead) and garbage
        view, found = self.garbage.watch(self.backbone) if multilayer else (self.backbone, {})
        _, maps = self.compute(view, x, return_feature_list=True)
        h = maps[-1].flatten(1).to(self.fc.weight.dtype)
        if not garbage:
            return self.fc(h), maps
        return self.all_logits(h, self.garbage.statistics(found, h) if multilayer else h), maps

    def forward_threshold(self, x: Tensor, threshold: float) -> Tensor:
        """ID logits ``(B, n)`` of features cut off above ``threshold``, as ReAct asks for."""
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


def tie_net(network_config) -> OpenOODTIENet:
    """The network of a config: ``num_classes``, ``image_size``, ``normalization_type``, ``backbone`` and, where it is there, ``head`` (``linear``
    or ``multilayer``) are read; no checkpoint is.

    Images have three channels and are normalised, so that 0 becomes ``-mean / std`` and 1 ``(1 - mean) / std``.
    """
    backbone = backbone_of(network_config.backbone)
    mean, std = normalization_dict.get(network_config.normalization_type, ([0.5] * 3, [0.5] * 3))
    low = [-m / s for m, s in zip(mean, std, strict=True)]
    high = [(1 - m) / s for m, s in zip(mean, std, strict=True)]
    size = network_config.image_size
    return OpenOODTIENet(
        backbone,
        network_config.num_classes,
        (3, size, size),
        low,
        high,
        head=network_config.head or "linear",
    )


def backbone_of(backbone_config: Config) -> nn.Module:
    """The classifier of a config, on the CPU: one of OpenOOD's networks, or of :data:`tie_ext.BACKBONES` for images of three channels."""
    from openood.networks.utils import (
        get_network,  # at the time of the call: it may be one that knows more backbones
    )

    if backbone_config.name in BACKBONES:
        return BACKBONES[backbone_config.name](3, backbone_config.num_classes)
    backbone_config.num_gpus = 0  # moved to its device as a part of the whole
    return get_network(backbone_config)


OTHERS = (*BACKBONES, "wrn", "densenet")
"""Backbones that a checkpoint may be of where it is not of the network that a script of OpenOOD's has built."""


def tie_net_of(checkpoint: Mapping[str, Tensor], network: nn.Module, size: int) -> OpenOODTIENet:
    """The ``tie_net`` that a checkpoint is of, with its weights, tau and value range.

    Arguments:
        checkpoint: The ``state_dict`` of a ``tie_net``, or of what :func:`tie_ext.attach` gives.
        network: The classifier that it is taken to be around, which is copied; where it is around another one of :data:`OTHERS`, that is found.
        size: S of its images ``(3, S, S)``.

    Raises:
        ValueError: If it is around no network that is known here, or its garbage head is for images of another size.
    """
    num_classes = len(checkpoint["fc.weight"])
    shapes = {
        name.removeprefix("backbone."): value.shape
        for name, value in checkpoint.items()
        if name.startswith("backbone.")
    }
    backbone = next(
        (
            candidate
            for candidate in _candidates(network, num_classes)
            if shapes.items() <= _shapes(candidate).items()
        ),
        None,
    )
    if backbone is None:
        known = ", ".join([type(network).__name__, *OTHERS])
        raise ValueError(
            f"Expected a checkpoint of a tie_net around one of {known}, but got one around another network; score it by main.py"
        )
    low, high = (checkpoint[name].flatten().tolist() for name in ("low", "high"))
    head = "multilayer" if "garbage.mean" in checkpoint else "linear"
    net = OpenOODTIENet(backbone, num_classes, (3, size, size), low, high, head=head)
    try:
        net.load_state_dict(dict(checkpoint))
    except RuntimeError as error:
        raise ValueError(
            f"Expected a checkpoint of a tie_net around {type(backbone).__name__} for {size} pixels, but got another: {error}"
        ) from None
    return net


def _candidates(network: nn.Module, num_classes: int) -> Iterator[nn.Module]:
    yield network
    for name in OTHERS:
        yield backbone_of(Config(name=name, num_classes=num_classes, pretrained=False))


def _shapes(network: nn.Module) -> dict:
    return {name: value.shape for name, value in network.state_dict().items()}
