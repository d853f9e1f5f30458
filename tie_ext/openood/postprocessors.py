"""TIE's scores as OpenOOD postprocessors: larger conf = more ID, the negative of the score."""

from typing import ClassVar

from openood.postprocessors import BasePostprocessor
from openood.utils.config import Config
from torch import Tensor, nn, no_grad
from tqdm import tqdm

from tie_ext.models.network import TIENet
from tie_ext.openood import configs
from tie_ext.scores.decision import ood_score, uncertainty


class Postprocessor(BasePostprocessor):
    """What ours have in common: the config that is shipped, and no search for parameters.

    OpenOOD searches for parameters on OOD images where a config has ``APS_mode: True``. Here it
    finds one candidate, the parameters as they are, and a line says so.

    Arguments:
        config: OpenOOD's config; None for the one that is shipped, which also gives the
            ``postprocessor_args`` that a config leaves out.
    """

    name: ClassVar[str]
    config_path: ClassVar[str]
    """The config that is shipped; an OpenOOD that discovers plug-ins reads it."""
    args_dict: ClassVar[dict[str, list]] = {"none": [None]}

    def __init_subclass__(cls) -> None:
        cls.config_path = str(configs() / "postprocessors" / f"{cls.name}.yml")

    def __init__(self, config: Config | None = None):
        shipped = Config(self.config_path)
        super().__init__(config or shipped)
        given = self.config.postprocessor
        self.APS_mode, self.hyperparam_search_done = bool(given.APS_mode), False
        parts = (shipped.postprocessor.postprocessor_args, given.postprocessor_args)
        self.parameters = {name: value for part in parts for name, value in (part or {}).items()}

    def set_hyperparam(self, hyperparam: list) -> None:
        """Say that there is nothing to search for."""
        tqdm.write(f"Postprocessor {self.name} has nothing to search for (APS_mode)")

    def get_hyperparam(self) -> dict | float:
        """The parameters."""
        return self.parameters

    def needs_setup(self) -> RuntimeError:
        """The error of a postprocessor that has not been set up."""
        return RuntimeError(f"Postprocessor {self.name} is not set up; call its setup first")


class TIEPostprocessor(Postprocessor):
    """Postprocessor ``tie``: both levels in one score, :func:`tie_ext.scores.decision.ood_score`.

    Its parameter is the temperature ``t``, which OpenOOD can search for.
    """

    name = "tie"

    def __init__(self, config: Config | None = None):
        super().__init__(config)
        self.args_dict = self.config.postprocessor.postprocessor_sweep  # type: ignore[misc]
        self.t = float(self.parameters["t"])

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``(B,)`` of images ``(B, 3, S, S)``.

        Raises:
            TypeError: If the network has no garbage class.
        """
        if not isinstance(getattr(net, "module", net), TIENet):
            raise TypeError(
                f"Expected network tie_net for postprocessor tie, but got {type(net).__name__}; "
                "postprocessors tie_ue and tie_combined take any network"
            )
        logits = net(data, garbage=True)
        return logits[:, :-1].argmax(dim=1), -ood_score(logits, self.t)

    def set_hyperparam(self, hyperparam: list) -> None:
        """Set the temperature, the one value of the list."""
        self.t = float(hyperparam[0])

    def get_hyperparam(self) -> float:
        """The temperature."""
        return self.t


class TIEUEPostprocessor(Postprocessor):
    """Postprocessor ``tie_ue``: the paper's uncertainty estimate UE over n outputs (Table 2).

    It takes any network, and ranks as OpenOOD's ``gen`` with gamma 1 and M = n: UE is n / (n - 1)
    times that generalised entropy.
    """

    name = "tie_ue"

    @no_grad()
    def postprocess(self, net: nn.Module, data: Tensor) -> tuple[Tensor, Tensor]:
        """ID label ``(B,)`` and conf ``-UE (B,)`` of images ``(B, 3, S, S)``."""
        logits = net(data)
        return logits.argmax(dim=1), -uncertainty(logits.softmax(dim=1))
