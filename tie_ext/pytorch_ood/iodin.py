"""i-ODIN (ASCOOD) as a pytorch-ood detector. Larger score = more OOD."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pytorch_ood.api import DetectorInfo, GradientDetector, ModelNotSetException, Paper, Task
from torch import Tensor, nn

from tie_ext.outliers.saliency import perturb
from tie_ext.utils.checks import check_number
from tie_ext.utils.views import frozen_view


class IODIN(GradientDetector):
    """ODIN that perturbs only the most significant values of an image.

    Arguments:
        model: A classifier ``(B, C, H, W) -> (B, n)``.
        eps: Step (OpenOOD's default).
        temperature: T of the softmax.
        norm_std: Standard deviation of each channel that the images were normalised by; the step
            is divided by it.
        values: Values of the C*H*W that change, those of the largest gradients (OpenOOD's
            implementation: 1).

    Raises:
        ValueError: If a number is out of range.

    References:
        S. Regmi. *Image-based Outlier Synthesis With Training Data* (ASCOOD), section B; score as
        in ODIN (S. Liang et al., ICLR 2018).
    """

    info: ClassVar = DetectorInfo(
        paper=Paper(
            title="Image-based Outlier Synthesis With Training Data",
            venue="CVPR",
            year=2026,
            url="https://arxiv.org/abs/2411.10794",
            code="https://github.com/sudarshanregmi/ASCOOD",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    hyperparameter_space: ClassVar = {"temperature": [1, 10, 100, 1000], "eps": [0.0014, 0.0028]}

    def __init__(
        self,
        model: nn.Module | None,
        eps: float = 0.0014,
        temperature: float = 1000.0,
        norm_std: list[float] | None = None,
        values: int = 1,
    ):
        super().__init__()
        check_number("eps", eps, 0, 1e6)
        check_number("temperature", temperature, 0, 1e6, above=True)
        check_number("values", values, 1, 10**9, integer=True)
        self.model, self.eps, self.temperature = model, eps, temperature
        self.norm_std, self.values = norm_std, values

    def predict(self, x: Tensor) -> Tensor:
        """Negative largest softmax probability ``(B,)`` in [-1, -1/n] of the perturbed images;
        larger = more OOD.

        Raises:
            ModelNotSetException: If there is no model.
        """
        if self.model is None:
            raise ModelNotSetException
        net = frozen_view(self.model)
        if self.device is not None:
            x = x.to(self.device)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = net(x) / self.temperature
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), x)
        std = x.new_tensor(self.norm_std or [1.0]).view(1, -1, 1, 1)
        with torch.no_grad():
            logits = net(perturb(x.detach(), gradient, self.eps / std, self.values))
        return -(logits / self.temperature).softmax(1).amax(1)
