"""TIE's network around any of OpenOOD's backbones, with what its postprocessors ask of a network."""

from openood.preprocessors.transform import normalization_dict
from torch import Tensor, nn

from tie_ext.backbones import BACKBONES
from tie_ext.head import GarbageHead
from tie_ext.network import TIENet


class OpenOODTIENet(TIENet):
    """A :class:`tie_ext.TIENet` that answers OpenOOD's calls; every one of them sees n classes, as the count in its configs says.

    Beside those of TIENet (``forward(x)``, ``return_feature=True``, ``forward_threshold``, ``get_fc``, ``get_fc_layer``, ``fc``,
    ``feature_size``) these are ``return_feature_list=True``, ``intermediate_forward`` and the backbone's own layers (``net.layer4``, ``avgpool``).
    """

    def forward(self, x: Tensor, return_feature: bool = False, return_feature_list: bool = False, *, garbage: bool = False):
        """Logits, and features where asked.

        Arguments:
            x: Images ``(B, 3, S, S)``, normalised.
            return_feature: Give ``(logits, features (B, F))``.
            return_feature_list: Give ``(logits, [the backbone's feature maps, the last the penultimate ones])``.
            garbage: Give n+1 logits, the garbage class last, instead of n.
        """
        if not return_feature_list:
            return super().forward(x, return_feature, garbage=garbage)
        if isinstance(self.garbage, GarbageHead) and garbage:
            with self.garbage.reading(self.backbone) as outputs:
                _, maps = self._computed(self.backbone, x, return_feature_list=True)
            h = maps[-1].flatten(1).to(self.fc.weight.dtype)
            return self.head(h, self.garbage.statistics(outputs, h)), maps
        _, maps = self._computed(self.backbone, x, return_feature_list=True)
        h = maps[-1].flatten(1).to(self.fc.weight.dtype)
        return (self.head(h, h) if garbage else self.fc(h)), maps

    def intermediate_forward(self, x: Tensor, layer_index: int) -> Tensor:
        """The backbone's feature maps after one of its layers, as OpenOOD counts them."""
        return self._computed(self.backbone.intermediate_forward, x, layer_index)  # type: ignore[arg-type]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "backbone" or name.startswith("_"):
                raise
            return getattr(super().__getattr__("backbone"), name)


def tie_net(network_config) -> OpenOODTIENet:
    """The network of a config: ``num_classes``, ``image_size``, ``normalization_type``, ``backbone`` and, where it is there, ``garbage`` (``linear``
    or ``layers``) are read; no checkpoint is.

    Images have three channels and are normalised, so that 0 becomes ``-mean / std`` and 1 ``(1 - mean) / std``.
    """
    from openood.networks.utils import get_network  # at the time of the call: it may be one that knows more backbones

    inner = network_config.backbone
    if inner.name in BACKBONES:  # the paper's own
        backbone: nn.Module = BACKBONES[inner.name](3, network_config.num_classes)
    else:
        inner.num_gpus = 0  # moved to its device as a part of the whole
        backbone = get_network(inner)
    mean, std = normalization_dict.get(network_config.normalization_type, ([0.5] * 3, [0.5] * 3))
    low = [-m / s for m, s in zip(mean, std, strict=True)]
    high = [(1 - m) / s for m, s in zip(mean, std, strict=True)]
    size = network_config.image_size
    return OpenOODTIENet(backbone, network_config.num_classes, (3, size, size), low, high, garbage=network_config.garbage or "linear")
