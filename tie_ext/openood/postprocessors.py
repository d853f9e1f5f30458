"""TIE's scores as OpenOOD postprocessors: larger conf = more ID, the negative of the score."""

from openood.postprocessors import BasePostprocessor
from openood.utils.config import Config
from torch import Tensor, nn, no_grad

from tie_ext.models.network import TIENet
from tie_ext.openood import configs
from tie_ext.scores.decision import ood_score, uncertainty


def shipped(name: str) -> Config:
    """The config of one of these postprocessors, as :func:`tie_ext.openood.configs` has it."""
    return Config(str(configs() / "postprocessors" / f"{name}.yml"))


def arguments(name: str, config: Config) -> dict:
    """``postprocessor_args`` of a config for one of these postprocessors; what it does not say is as shipped."""
    return {
        **shipped(name).postprocessor.postprocessor_args,
        **(config.postprocessor.postprocessor_args or {}),
    }


class TIEPostprocessor(BasePostprocessor):
    """Postprocessor ``tie``: the two levels in one score, :func:`tie_ext.ood_score`. Its parameter is the temperature ``t``."""

    def __init__(self, config: Config | None = None):
        super().__init__(config or shipped("tie"))
        settings = self.config.postprocessor
        self.APS_mode, self.hyperparam_search_done = bool(settings.APS_mode), False
        self.args_dict = settings.postprocessor_sweep
        self.t = float(arguments("tie", self.config)["t"])

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)`` of images ``(B, 3, S, S)``.

        Raises:
            TypeError: If the network has no garbage class.
        """
        if not isinstance(getattr(net, "module", net), TIENet):
            raise TypeError(
                f"Expected network tie_net for postprocessor tie, but got {type(net).__name__}; postprocessor tie_ue takes any network"
            )
        logits = net(data, garbage=True)
        return logits[:, :-1].argmax(dim=1), -ood_score(logits, self.t)

    def set_hyperparam(self, hyperparam: list) -> None:
        """Set the temperature, the one value of the list."""
        self.t = float(hyperparam[0])

    def get_hyperparam(self) -> float:
        """The temperature."""
        return self.t


class TIEUEPostprocessor(BasePostprocessor):
    """Postprocessor ``tie_ue``: the paper's uncertainty estimate UE over the n ID outputs (Table 2), of any network.

    It ranks as OpenOOD's ``gen`` with gamma 1 and M = n: UE is n / (n - 1) times that generalised entropy.
    """

    def __init__(self, config: Config | None = None):
        super().__init__(config or shipped("tie_ue"))
        self.APS_mode, self.hyperparam_search_done = False, False

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``-UE (B,)`` of images ``(B, 3, S, S)``."""
        logits = net(data)
        return logits.argmax(dim=1), -uncertainty(logits.softmax(dim=1))
