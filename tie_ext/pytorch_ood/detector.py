"""TIE as a pytorch-ood detector.

Contract (pytorch-ood 0.4.0, the oldest whose detectors carry ``info`` records): larger score = more OOD; labels < 0 are OOD.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from pytorch_ood.api import (
    DetectorInfo,
    LogitsDetector,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from pytorch_ood.utils import extract_features
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Batches
from tie_ext.scores.decision import Decision, decide, decide_at, ood_score, uncertainty
from tie_ext.scores.threshold import conformal_threshold, exclusion_threshold
from tie_ext.training.config import TIEConfig
from tie_ext.utils.checks import check_labels, check_logits, check_number
from tie_ext.utils.files import read_json, reading, sha256, write_json
from tie_ext.utils.modules import evaluating

PAPER = Paper(
    title="TIE: A Training-Inversion-Exclusion Framework for Visually Interpretable and Uncertainty-Guided Out-of-Distribution Detection",
    venue="arXiv",
    year=2025,
    url="https://arxiv.org/abs/2512.00229",
)
FORMAT, VERSION = "tie_ext detector", 1


class TIEDetector(LogitsDetector):
    """Garbage class and uncertainty of a network trained by TIE, as a detector.

    The score is :func:`tie_ext.ood_score`, the log-odds of the garbage class. It needs no fitting: ``fit`` sets where :meth:`decide` draws the
    line. A network trained by :class:`tie_ext.TIETrainer` brings its own line, the paper's tau of its last epoch.

    ``detector.model`` gives the n+1 logits of the network, always in evaluation mode, so that ``Benchmark.evaluate(..., cache=True)`` keeps
    them apart from the n logits that detectors made for n classes read of the same network.

    Arguments:
        model: A trained network; None to use :meth:`predict_logits` and :meth:`fit_logits` alone.
        false_alarm: Let ``fit`` find the line at which ID inputs are rejected with at most this probability, in (0, 1], guaranteed for held-out
            ID data (:func:`tie_ext.scores.threshold.conformal_threshold`). None for the paper's rule, ``tau = mean + lam * std`` of the ID data's UE.
        lam: lambda of the paper's rule.
        t: Temperature > 0 of the score.

    Raises:
        TypeError: If the model is not a :class:`tie_ext.TIENet`.
        ValueError: If a number is out of range.

    Example:
        >>> detector = TIEDetector(net, false_alarm=0.05).fit(held_out_loader)  # doctest: +SKIP
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
    ):
        super().__init__()
        if model is not None and not isinstance(model, TIENet):
            raise TypeError(
                f"Expected a TIENet trained by TIE, but got {type(model).__name__}; wrap it as TIENet(model, num_classes, image_shape) and "
                "train it with TIETrainer, or use UncertaintyEstimate for an n-class network"
            )
        if false_alarm is not None:
            check_number("false_alarm", false_alarm, 0, 1, above=True)
        check_number("lam", lam, -1e6, 1e6)
        self.model = None if model is None else _AllLogits(model)
        check_number("t", t, 0, 1e6, above=True)
        self.false_alarm, self.lam, self.t = false_alarm, lam, t
        self.tau: Tensor | None = (
            None  #: largest UE of an accepted input, once fitted by the paper's rule
        )
        self.calibration_scores: Tensor | None = None  #: ``(M,)``, those that set the threshold
        self.threshold: Tensor | None = (
            None  #: largest score of an accepted input, once fitted to a false-alarm rate
        )

    def set_hyperparameters(self, **kwargs: float) -> "TIEDetector":
        """Set ``t``; a threshold that was fitted is forgotten, as it was one on the scores of the old ``t``.

        Raises:
            ValueError: If a name is unknown or a value out of range.
        """
        check_number("t", kwargs.get("t", 1.0), 0, 1e6, above=True)
        self.threshold = None
        return super().set_hyperparameters(**kwargs)

    def fit(self, data_loader: Batches) -> "TIEDetector":
        """Draw the line of :meth:`decide`.

        Arguments:
            data_loader: Batches ``(x, y)`` of ID images; those with y < 0 are left out. For ``false_alarm``, images that the network was not
                trained on; for the paper's rule, the training images.

        Returns:
            The detector.

        Raises:
            ModelNotSetException: If there is no model.
            ValueError: If the loader has no ID images, they are not what the network was trained for, a label is not of its n classes, or
                there are too few for ``false_alarm``.
        """
        try:
            logits, y = extract_features(data_loader, self._logits, self.device)
        except ValueError as error:
            if "No ID instances" not in str(error):
                raise
            raise ValueError(
                "Expected ID images (labels >= 0) to fit on, but got none from the loader"
            ) from error
        check_labels(y, len(y), self._net().num_classes)
        return self.fit_logits(logits, y)

    def fit_logits(self, logits: Tensor, y: Tensor) -> "TIEDetector":
        """As :meth:`fit`, from n+1 logits ``(N, n+1)`` and labels ``(N,)``; those with y < 0 are left out."""
        logits = logits[y.to(logits.device) >= 0]
        if not len(logits):
            raise ValueError("Expected logits of ID images (labels >= 0) to fit on, but got none")
        self._check(logits)
        self.tau = self.threshold = None
        device = self.device or logits.device
        if self.false_alarm is None:
            self.tau = torch.as_tensor(
                exclusion_threshold(uncertainty(logits.softmax(dim=1)), self.lam), device=device
            )
        else:
            self.calibration_scores = self.predict_logits(logits).to(device)
            self.threshold = conformal_threshold(self.calibration_scores, self.false_alarm)
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Scores ``(B,)`` of images ``(B, C, H, W)``, larger = more OOD.

        Raises:
            ModelNotSetException: If there is no model.
            ValueError: If the images are not finite, or not of the shape and value range of training.
        """
        return self.predict_logits(self._logits(x.to(self.device)))

    def predict_logits(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` of n+1 logits ``(B, n+1)``, garbage last; larger = more OOD.

        Raises:
            ValueError: If the logits are not finite, or there are not n+1 columns.
        """
        self._check(logits)
        return ood_score(logits, self.t)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level (0 accepted, 1 garbage, 2 uncertain) of images ``(B, C, H, W)``, by one forward pass.

        Raises:
            ModelNotSetException: If there is no model.
            RequiresFittingException: If there is no line yet: neither training nor ``fit`` has drawn one.
            ValueError: If the images are not finite, or not of the shape and value range of training.
        """
        net, x = self._net(), x.to(self.device)
        net.check(x)
        with evaluating(net):
            return self.export_module()(x)

    def recalibrate(self, false_alarm: float, scores: Tensor | None = None) -> "TIEDetector":
        """Set the threshold for another false-alarm rate.

        Arguments:
            false_alarm: Reject ID inputs with at most this probability, in (0, 1].
            scores: Scores ``(M,)`` of held-out ID images; None for :attr:`calibration_scores`.

        Raises:
            RequiresFittingException: If there are no calibration scores.
            ValueError: If there are too few for such a rate.
        """
        scores = self.calibration_scores if scores is None else scores
        if scores is None:
            raise RequiresFittingException("Expected calibration scores, but got none; call fit")
        self.threshold = conformal_threshold(scores, false_alarm).to(self.device)
        self.calibration_scores, self.false_alarm = scores, false_alarm
        return self

    def export_module(self) -> nn.Module:
        """Network and decision as one module, images ``(B, C, H, W)`` to :class:`tie_ext.Decision`, for ``torch.export`` and ONNX.

        Torch 2.2 exports it for a fixed batch size only.

        Raises:
            ModelNotSetException: If there is no model.
            RequiresFittingException: If there is no line yet: neither training nor ``fit`` has drawn one.
        """
        net = self._net()
        if self.threshold is None and (
            self.false_alarm is not None or (self.tau is None and not net.tau.isfinite())
        ):
            raise RequiresFittingException(
                "Expected a line to decide by, but got none yet: train the network with TIETrainer, or call fit(loader)"
            )
        return ExportModule(net, self.threshold, net.tau if self.tau is None else self.tau, self.t)

    def save(self, folder: str | os.PathLike) -> None:
        """Write network and line to a folder: ``network.safetensors`` and ``detector.json``, each atomically.

        Raises:
            ModelNotSetException: If there is no model.
            OSError: If a file cannot be written.
        """
        folder = Path(folder)
        self._net().save(folder / "network.safetensors")
        line = {
            name: None if value is None else float(value)
            for name, value in (("tau", self.tau), ("threshold", self.threshold))
        }
        settings = {"false_alarm": self.false_alarm, "lam": self.lam, "t": self.t}
        header = {"format": FORMAT, "version": VERSION}
        write_json(
            folder / "detector.json",
            {
                **header,
                "network_sha256": sha256(folder / "network.safetensors"),
                **settings,
                **line,
            },
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        backbone: nn.Module | None = None,
        device: str | torch.device = "cpu",
    ) -> "TIEDetector":
        """Read what :meth:`save` wrote, or the folder of a run of ``tie-ext train``.

        Arguments:
            folder: The folder.
            backbone: The architecture, where it is not one of the paper's CNNs; its weights come from the file.
            device: Where the detector is to be.

        Raises:
            FileNotFoundError: If there is no network in the folder.
            ValueError: If a file is truncated, foreign or of a newer major version, or the line was drawn for another network.
        """
        folder = Path(folder)
        detector = cls(TIENet.load(folder / "network.safetensors", backbone))
        path = folder / "detector.json"
        if os.path.lexists(path):
            detector._read(path)
        return detector.to(device)

    def _read(self, path: Path) -> None:
        saved = read_detector_json(path, FORMAT, VERSION)
        with reading(f"a whole detector.json at {path}"):
            TIEDetector.__init__(self, self._net(), saved["false_alarm"], saved["lam"], saved["t"])
            for name in ("tau", "threshold"):
                if saved[name] is not None:
                    check_number(name, saved[name], -3e38, 3e38)
                    setattr(self, name, torch.tensor(float(saved[name])))

    def _net(self) -> TIENet:
        if self.model is None:
            raise ModelNotSetException
        return self.model.net

    def _logits(self, x: Tensor) -> Tensor:
        net = self._net()
        net.check(x)
        return _AllLogits(net)(x)

    def _check(self, logits: Tensor) -> None:
        check_logits(logits)
        if self.model is not None and logits.shape[1] != self._net().num_classes + 1:
            n = self._net().num_classes
            raise ValueError(
                f"Expected n+1 = {n + 1} logits, as net(x, garbage=True) gives them, but got {logits.shape[1]}"
            )


class _AllLogits(nn.Module):
    """All n+1 logits of a TIENet, in evaluation mode whatever the mode of the network."""

    def __init__(self, net: TIENet):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with evaluating(self.net):
            return self.net(x, garbage=True)


class ExportModule(nn.Module):
    """Network and decision in one forward pass.

    Arguments:
        net: The network; it is put into evaluation mode.
        threshold: Largest score of an accepted input; None to decide by ``tau``.
        tau: Largest UE of an accepted input.
        t: Temperature of the score.
    """

    threshold: Tensor | None
    tau: Tensor

    def __init__(self, net: TIENet, threshold: Tensor | None, tau: Tensor, t: float):
        super().__init__()
        self.net, self.t = net.eval(), t
        self.register_buffer("threshold", threshold)
        self.register_buffer("tau", tau)

    def forward(self, x: Tensor) -> Decision:
        """The :class:`tie_ext.Decision` of images ``(B, C, H, W)``."""
        logits = self.net(x, garbage=True)
        return (
            decide(logits, self.tau, self.t)
            if self.threshold is None
            else decide_at(logits, self.threshold, self.t)
        )


def read_detector_json(path: Path, form: str, version: int) -> dict[str, Any]:
    """A ``detector.json`` of one form and version, drawn for the network beside it.

    Raises:
        ValueError: If it is truncated, foreign or of a newer major version, or the network beside it is another.
    """
    saved = read_json(path, f"a detector.json of {form}")
    with reading(f"a detector.json of {form} at {path}"):
        if saved["format"] != form:
            raise ValueError(f"format {saved['format']!r}")
        found, fingerprint = saved["version"], saved["network_sha256"]
    if found != version:
        raise ValueError(
            f"Expected a detector of version {version} at {path}, but got version {found!r}; a newer tie_ext reads it"
        )
    if fingerprint != sha256(path.with_name("network.safetensors")):
        raise ValueError(
            f"Expected beside {path} the network it was saved with, but got another; fit the detector again and save it"
        )
    return saved
