"""The paper's uncertainty estimate as a pytorch-ood detector for any n-class network."""

from typing import ClassVar

from pytorch_ood.api import DetectorInfo, LogitsDetector, ModelNotSetException, Task
from torch import Tensor, nn

from tie_ext.pytorch_ood.detector import PAPER
from tie_ext.scores.decision import uncertainty, upcast
from tie_ext.utils.checks import describe
from tie_ext.utils.views import eval_view


class UncertaintyEstimate(LogitsDetector):
    """The paper's uncertainty estimate (UE) of any n-class network: the distance of its softmax
    from one-hot, in [0, 1].

    On a :class:`tie_ext.TIENet` this is UE over the n ID outputs, the garbage logit left out, as
    in the paper's Table 2.

    Arguments:
        model: A classifier ``(B, ...) -> (B, n)``; None to use :meth:`predict_logits` alone.

    References:
        TIE, section 4.4 (P. Suhail, R. Afroz, A. Sethi, arXiv:2512.00229).
    """

    info: ClassVar = DetectorInfo(paper=PAPER, tasks={Task.CLASSIFICATION}, ai_coded=True)

    def __init__(self, model: nn.Module | None):
        super().__init__()
        self.model = model

    def predict(self, x: Tensor) -> Tensor:
        """UE ``(B,)`` of images ``(B, ...)``, by a view of the model in evaluation mode.

        Raises:
            ModelNotSetException: If there is no model.
        """
        if self.model is None:
            raise ModelNotSetException
        return self.predict_logits(eval_view(self.model)(x.to(self.device)))

    def predict_logits(self, logits: Tensor) -> Tensor:
        """UE ``(B,)`` in [0, 1] of logits ``(B, n)``, n >= 2; larger = more OOD.

        Raises:
            ValueError: If the logits are not a floating-point matrix of two or more columns.
        """
        if (
            not isinstance(logits, Tensor)
            or logits.ndim != 2
            or logits.shape[1] < 2
            or not logits.is_floating_point()
        ):
            raise ValueError(
                "Expected floating-point logits of shape (B, n) with n >= 2, "
                f"but got {describe(logits)}"
            )
        return uncertainty(upcast(logits).softmax(dim=1))
