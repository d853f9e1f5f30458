"""TIE as a pytorch-ood detector.

Contract (pytorch-ood 0.4.0, the oldest whose detectors carry ``info`` records): larger score =
more OOD; labels < 0 are OOD.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from pytorch_ood.api import (
    DetectorInfo,
    LogitsDetector,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.base import Thresholded, id_reader, warn_if_seen
from tie_ext.pytorch_ood.files import read_folder, saved_number, write_folder
from tie_ext.scores.decision import (
    Decision,
    decide,
    decide_by_score,
    ood_score,
    uncertainty,
    upcast,
)
from tie_ext.scores.threshold import exclusion_threshold
from tie_ext.training.config import TIEConfig
from tie_ext.utils.checks import check_logits, check_number
from tie_ext.utils.files import reading
from tie_ext.utils.views import eval_view

PAPER = Paper(
    title="TIE: A Training-Inversion-Exclusion Framework for Visually Interpretable and "
    "Uncertainty-Guided Out-of-Distribution Detection",
    venue="arXiv",
    year=2025,
    url="https://arxiv.org/abs/2512.00229",
)
FORMAT = "tie_ext detector"


class TIEDetector(Thresholded, LogitsDetector):
    """Garbage class and uncertainty of a network trained by TIE, as a detector.

    The score is :func:`tie_ext.scores.decision.ood_score`, the log-odds of the garbage class. It
    needs no fitting: ``fit`` sets the threshold of :meth:`decide`. A network trained by
    :class:`tie_ext.TIETrainer` has a threshold of its own, the paper's tau of its last epoch.

    ``detector.model`` gives the n+1 logits of the network, always in evaluation mode, so that
    ``Benchmark.evaluate(..., cache=True)`` keeps them apart from the n logits that detectors made
    for n classes read of the same network.

    Arguments:
        model: A trained network; None to use :meth:`predict_logits` and :meth:`fit_logits` alone.
        false_alarm: Let ``fit`` find the threshold at which new ID inputs are rejected with at
            most this probability, in (0, 1]
            (:func:`tie_ext.scores.threshold.conformal_threshold`). None for the paper's rule,
            ``tau = mean + lam * std`` of the ID data's UE.
        lam: lambda of the paper's rule.
        t: Temperature > 0 of the score.
        guarantee: What ``false_alarm`` bounds, ``average`` or ``pac``; as for the next two,
            :class:`tie_ext.scores.threshold.Guarantee` says more.
        confidence: Of ``pac``, in (0, 1).
        per_class: Give each predicted class that has enough held-out images a threshold of its
            own.

    Raises:
        TypeError: If the model is not a :class:`tie_ext.TIENet`.
        ValueError: If a number is out of range.

    Example:
        >>> detector = TIEDetector(net, false_alarm=0.05).fit(calibration_loader)  # doctest: +SKIP
        >>> label, uncertainty, score, level = detector.decide(x)               # doctest: +SKIP

    References:
        TIE, sections 4.4 and 5, algorithm 1 (P. Suhail, R. Afroz, A. Sethi, arXiv:2512.00229).
    """

    info: ClassVar = DetectorInfo(paper=PAPER, tasks={Task.CLASSIFICATION}, ai_coded=True)
    requires_fit: ClassVar = False
    hyperparameter_space: ClassVar = {"t": [0.1, 0.5, 1.0, 2.0]}

    def __init__(
        self,
        model: TIENet | None,
        false_alarm: float | None = None,
        lam: float = TIEConfig.lam,
        t: float = 1.0,
        guarantee: str = "average",
        confidence: float = 0.95,
        per_class: bool = False,
    ):
        super().__init__()
        if model is not None and not isinstance(model, TIENet):
            raise TypeError(
                f"Expected a TIENet trained by TIE, but got {type(model).__name__}; wrap it as "
                "TIENet(model, num_classes, image_shape) and train it with TIETrainer, or use "
                "UncertaintyEstimate for an n-class network"
            )
        self._promise(false_alarm, guarantee, confidence, per_class)
        check_number("lam", lam, -1e6, 1e6)
        check_number("t", t, 0, 1e6, above=True)
        self.model = None if model is None else _AllLogits(model)
        self.lam, self.t = lam, t
        self.tau: Tensor | None = None  #: largest UE of an accepted input, by the paper's rule
        self._forget_threshold()

    @property
    def network(self) -> TIENet | None:
        """The network."""
        return None if self.model is None else self.model.net

    def set_hyperparameters(self, **kwargs: float) -> "TIEDetector":
        """Set ``t``. A fitted threshold is forgotten, as it was one on the scores of the old
        ``t``.

        Raises:
            ValueError: If a name is unknown or a value out of range.
        """
        check_number("t", kwargs.get("t", 1.0), 0, 1e6, above=True)
        super().set_hyperparameters(**kwargs)
        self._forget_threshold()
        return self

    @torch.no_grad()
    def fit(self, data_loader: Iterable) -> "TIEDetector":
        """Set the threshold of :meth:`decide`.

        Arguments:
            data_loader: Batches of ID images, with or without labels; those with labels < 0 are
                left out. For ``false_alarm``, images that the network was not trained on; for the
                paper's rule, the training images.

        Returns:
            The detector.

        Raises:
            ModelNotSetException: If there is no model.
            ValueError: If the loader has no ID images, they are not of the shape and value range
                of training, a label is not of the n classes, or there are too few for
                ``false_alarm``.
        """
        net = self._net()
        view, batches = eval_view(net), id_reader(net, data_loader, "data_loader")
        logits, h = zip(*(view.outputs(x.to(self.device)) for x, _ in batches), strict=True)
        if self.false_alarm is not None:
            warn_if_seen(net.train_features, torch.cat(h))
        return self.fit_logits(torch.cat(logits))

    def fit_logits(self, logits: Tensor, y: Tensor | None = None) -> "TIEDetector":
        """As :meth:`fit`, from n+1 logits ``(N, n+1)``; rows with labels ``y (N,)`` < 0 are left
        out.
        """
        if y is not None:
            logits = logits[y.to(logits.device) >= 0]
        if not len(logits):
            raise ValueError("Expected logits of ID images (labels >= 0) to fit on, but got none")
        self._check(logits)
        if self.false_alarm is not None:
            labels = logits[:, :-1].argmax(dim=1)
            self.recalibrate(self.false_alarm, self.predict_logits(logits), labels)
            self.tau = None
            return self
        tau = exclusion_threshold(uncertainty(upcast(logits).softmax(dim=1)), self.lam)
        self._forget_threshold()
        self.tau = torch.as_tensor(tau, device=self.device or logits.device)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Scores ``(B,)`` of images ``(B, C, H, W)``, larger = more OOD.

        Raises:
            ModelNotSetException: If there is no model.
            ValueError: If the images are not finite, or not of the shape and value range of
                training.
        """
        x = x.to(self.device)
        self._net().check(x)
        return super().predict(x)

    def predict_logits(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of n+1 logits ``(B, n+1)``, garbage last; larger = more OOD.

        Raises:
            ValueError: If the logits are not finite, or there are not n+1 columns.
        """
        self._check(logits)
        return ood_score(upcast(logits), self.t)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level (0 accepted, 1 garbage, 2 uncertain) of images
        ``(B, C, H, W)``, by one forward pass.

        Raises:
            ModelNotSetException: If there is no model.
            RequiresFittingException: If there is no threshold, neither of training nor of ``fit``.
            ValueError: If the images are not finite, or not of the shape and value range of
                training.
        """
        x = x.to(self.device)
        self._net().check(x)
        return self.export_module()(x)

    def export_module(self) -> nn.Module:
        """Network and decision as one module, images ``(B, C, H, W)`` to
        :class:`tie_ext.Decision`, for ``torch.export`` and ONNX.

        Torch 2.2 exports it for a fixed batch size only.

        Raises:
            ModelNotSetException: If there is no model.
            RequiresFittingException: If there is no threshold, neither of training nor of ``fit``.
        """
        net = self._net()
        tau = net.tau if self.tau is None else self.tau
        missing = self.false_alarm is not None or (self.tau is None and not net.tau.isfinite())
        if self.threshold is None and missing:
            raise RequiresFittingException(
                "Expected a threshold to decide by, but got none yet: "
                "train the network with TIETrainer, or call fit(loader)"
            )
        return ExportModule(net, self.threshold, tau, self.t)

    def save(self, folder: str | os.PathLike) -> None:
        """Write network and threshold to a folder; docs/file-format.md says what is in it.

        Raises:
            ModelNotSetException: If there is no model.
            OSError: If a file cannot be written.
        """
        settings, state = self._saved_threshold()
        tau = None if self.tau is None else float(self.tau)
        own = {"tau": tau, "lam": self.lam, "t": self.t}
        write_folder(folder, FORMAT, self._net(), settings | own, state)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        backbone: nn.Module | None = None,
        device: str | torch.device = "cpu",
    ) -> "TIEDetector":
        """Read what :meth:`save` wrote, or the folder of a network alone.

        Arguments:
            folder: The folder.
            backbone: The architecture, where it is not one of the paper's CNNs; its weights come
                from the file.
            device: Where the detector is to be.

        Raises:
            FileNotFoundError: If there is no network in the folder.
            ValueError: If a file is truncated, foreign or of a newer major version, or the
                threshold was fitted to another network.
        """
        path = Path(folder) / "detector.json"
        net = TIENet.load(path.with_name("network.safetensors"), backbone)
        if not os.path.lexists(path):
            return cls(net).to(device)
        saved, state = read_folder(folder, FORMAT)
        with reading(f"a whole detector.json at {path}"):
            detector = cls(net, saved["false_alarm"], saved["lam"], saved["t"])
            detector.tau = saved_number(saved, "tau")
            detector._restore_threshold(saved, state)
        return detector.to(device)

    def _net(self) -> TIENet:
        if self.model is None:
            raise ModelNotSetException
        return self.model.net

    def _check(self, logits: Tensor) -> None:
        check_logits(logits)
        if self.model is not None and logits.shape[1] != (n := self._net().num_classes) + 1:
            raise ValueError(
                f"Expected n+1 = {n + 1} logits, as net(x, garbage=True) gives them, "
                f"but got {logits.shape[1]}"
            )


class _AllLogits(nn.Module):
    """All n+1 logits of a TIENet, in evaluation mode whatever the mode of the network."""

    def __init__(self, net: TIENet):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return eval_view(self.net)(x, garbage=True)


class ExportModule(nn.Module):
    """Network and decision in one forward pass.

    Arguments:
        net: The network, which is left as it is.
        threshold: Largest score of an accepted input; None to decide by ``tau``.
        tau: Largest UE of an accepted input.
        t: Temperature of the score.
    """

    threshold: Tensor | None
    tau: Tensor

    def __init__(self, net: TIENet, threshold: Tensor | None, tau: Tensor, t: float):
        super().__init__()
        self.net, self.t = eval_view(net), t
        self.net.keep_training(None, None)  # no part of what is exported
        self.register_buffer("threshold", threshold)
        self.register_buffer("tau", tau)
        self.eval()  # exporters warn of a module in training mode

    def forward(self, x: Tensor) -> Decision:
        """The :class:`tie_ext.Decision` of images ``(B, C, H, W)``."""
        logits = self.net(x, garbage=True)
        if self.threshold is None:
            return decide(logits, self.tau, self.t)
        return decide_by_score(logits, ood_score(upcast(logits), self.t), self.threshold)
