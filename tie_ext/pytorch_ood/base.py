"""What the detectors share: reading loaders, scoring by views, and a threshold on the score."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from pytorch_ood.api import (
    Detector,
    FeaturesDetector,
    ModelNotSetException,
    RequiresFittingException,
)
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.files import saved_scores, saved_threshold
from tie_ext.scores.decision import upcast
from tie_ext.scores.knn import Prepared, knn_score
from tie_ext.scores.threshold import MAX_REPEATED, Guarantee
from tie_ext.utils.checks import check_number
from tie_ext.utils.loader import BatchReader
from tie_ext.utils.precision import without_autocast
from tie_ext.utils.views import holder_view

Fitted = TypeVar("Fitted", bound="Thresholded")


def id_reader(net: Any, loader: Iterable, name: str, labelled: bool = False) -> BatchReader:
    """The ID images of a loader, those with labels < 0 left out; checked where the network, a
    :class:`tie_ext.TIENet`, says what they have to be.
    """
    about = (
        (net.num_classes, net.image_shape, net.low, net.high) if isinstance(net, TIENet) else ()
    )
    return BatchReader(
        loader, *about, labelled=labelled, id_only=True, name=name, rereadable=False
    )


SAME = 1e-5
"""Features of length 1 that are no farther apart are of one image in two batches."""


def warn_if_seen(training: Tensor | None, held_out: Tensor) -> None:
    """Warn where more than :data:`~tie_ext.scores.threshold.MAX_REPEATED` of the held-out images
    are training images, as their features say.

    Arguments:
        training: Features ``(M, F)`` of training images, or of a sample of them; None where none
            are known.
        held_out: Features ``(N, F)``.
    """
    if training is None:
        return
    unit = Prepared(training)
    seen = [knn_score(part.to(unit.rows.device), unit, 1) < SAME for part in held_out.split(500)]
    if (share := float(torch.cat(seen).double().mean())) > MAX_REPEATED:
        warnings.warn(
            f"{share:.0%} or more of the held-out images are training images: a threshold from "
            "them rejects more new images than it says; hold out images that the network has not "
            "seen",
            stacklevel=4,
        )


class FeatureScore(FeaturesDetector):
    """A detector on penultimate features, which it computes by a view of the network in evaluation
    mode; the network is left as it is. Put it before a detector of pytorch-ood.
    """

    encoder: Callable[[Tensor], Tensor] | None
    labelled: ClassVar[bool] = False
    """Whether it needs labels to be fitted."""

    @torch.no_grad()
    @without_autocast
    def fit(self, data_loader: Iterable) -> Any:
        """Fit on the features of ID images.

        Arguments:
            data_loader: Batches of training images ``(x, y)``; those with y < 0 are left out.

        Returns:
            The detector.

        Raises:
            ModelNotSetException: If there is no encoder.
            ValueError: If the loader has no ID images, or one that the network does not take.
        """
        encoder, net = self._encoder_view(), getattr(self.encoder, "__self__", None)
        z, y = [], []
        for images, labels in id_reader(net, data_loader, "data_loader", self.labelled):
            z.append(upcast(encoder(images.to(self.device)).flatten(1)))
            y.append(torch.zeros(len(images)).long() if labels is None else labels)
        return self.fit_features(torch.cat(z), torch.cat(y))

    @torch.no_grad()
    @without_autocast
    def predict(self, x: Tensor) -> Tensor:
        """Scores ``(B,)`` of images ``(B, C, H, W)``, larger = more OOD.

        Raises:
            ModelNotSetException: If there is no encoder.
            RequiresFittingException: If it has not been fitted.
            ValueError: On a TIENet, if the images are not finite, or not of the shape and value
                range of training.
        """
        if isinstance(net := getattr(self.encoder, "__self__", None), TIENet):
            net.check(x)
        return self.predict_features(upcast(self._encoder_view()(x.to(self.device))))

    def _encoder_view(self) -> Callable[[Tensor], Tensor]:
        if self.encoder is None:
            raise ModelNotSetException
        return holder_view(self).encoder  # type: ignore[return-value]


class Thresholded(Detector):
    """A threshold on the score, and the scores of held-out ID images that set it."""

    false_alarm: float | None
    guarantee: str  #: what ``false_alarm`` bounds
    confidence: float  #: of the guarantee ``pac``, in (0, 1)
    per_class: bool  #: whether the guarantee is for each predicted class

    def _promise(
        self, false_alarm: float | None, guarantee: str, confidence: float, per_class: bool
    ) -> None:
        if false_alarm is not None:
            check_number("false_alarm", false_alarm, 0, 1, above=True)
        found = Guarantee(guarantee, confidence, bool(per_class))
        self.false_alarm, self.guarantee = false_alarm, found.kind
        self.confidence, self.per_class = found.confidence, found.per_class

    @property
    def _guarantee(self) -> Guarantee:
        return Guarantee(self.guarantee, self.confidence, self.per_class)

    def _forget_threshold(self) -> None:
        #: largest score of an accepted input, or ``(m+1,)`` as
        #: :func:`tie_ext.scores.threshold.class_thresholds` gives them
        self.threshold: Tensor | None = None
        self.calibration_scores: Tensor | None = None  #: ``(M,)`` scores that set the threshold
        self.calibration_labels: Tensor | None = None  #: ``(M,)`` their predicted classes

    def recalibrate(
        self: Fitted,
        false_alarm: float,
        scores: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        guarantee: str | None = None,
        confidence: float | None = None,
        per_class: bool | None = None,
    ) -> Fitted:
        """Set the threshold for another false-alarm rate or guarantee, or by other images.

        Arguments:
            false_alarm: Share of new ID images that may be rejected, in (0, 1].
            scores: Scores ``(M,)`` of held-out ID images, larger = more OOD; None for
                :attr:`calibration_scores`.
            labels: Their predicted classes ``(M,)``, for ``per_class``.
            guarantee: ``average`` or ``pac``; None, as for the next two, for the detector's own.
            confidence: Of ``pac``, in (0, 1).
            per_class: Whether each predicted class has a threshold of its own.

        Raises:
            RequiresFittingException: If there are no calibration scores.
            ValueError: If a number is out of range, there are too few scores for the guarantee, or
                one is not finite.
        """
        given = {"kind": guarantee, "confidence": confidence, "per_class": per_class}
        changes: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        wanted = replace(self._guarantee, **changes)
        if scores is None:
            scores, labels = self.calibration_scores, self.calibration_labels
        if scores is None:
            raise RequiresFittingException("Expected calibration scores, but got none; call fit")
        threshold = wanted.threshold(scores, labels, false_alarm)
        device = self.device or scores.device
        self._promise(false_alarm, wanted.kind, wanted.confidence, wanted.per_class)
        self.calibration_scores, self.threshold = scores.to(device), threshold.to(device)
        self.calibration_labels = None if labels is None else labels.to(device)
        return self

    def _fitted_threshold(self) -> Tensor:
        if self.threshold is None:
            raise RequiresFittingException(
                "Expected a threshold to decide by, but got none yet: "
                "give false_alarm, and call fit(loader)"
            )
        return self.threshold

    def _saved_threshold(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries of ``detector.json`` and ``detector.safetensors``."""
        settings = {
            "false_alarm": self.false_alarm,
            "threshold": None if self.threshold is None else self.threshold.tolist(),
            "guarantee": self.guarantee,
            "confidence": self.confidence,
            "per_class": self.per_class,
        }
        state = {
            "calibration_scores": self.calibration_scores,
            "calibration_labels": self.calibration_labels,
        }
        return settings, state

    def _restore_threshold(self, settings: dict[str, Any], state: dict[str, Any]) -> None:
        earlier = {"guarantee": "average", "confidence": 0.95, "per_class": False}
        self._promise(
            settings["false_alarm"], **{k: settings.get(k, v) for k, v in earlier.items()}
        )
        self.threshold = saved_threshold(settings)
        self.calibration_scores, self.calibration_labels = saved_scores(state)
