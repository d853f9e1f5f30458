"""Several detectors of one network as one, with one guarantee. Larger score = more OOD, labels < 0 are OOD."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pytorch_ood.api import (
    Detector,
    DetectorInfo,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Batches
from tie_ext.pytorch_ood.detector import read_detector_json
from tie_ext.pytorch_ood.members import (
    ALL,
    FEATURES,
    ITSELF,
    LOGITS,
    Outputs,
    check_spec,
    member_of,
    network_of,
    outputs,
    predictor,
    reads,
    state_of,
)
from tie_ext.scores.combination import RULES, Counting, Reference, check_rule, reference
from tie_ext.scores.decision import Decision, decide, rejected_above, uncertainty, upcast
from tie_ext.scores.threshold import calibration_size, conformal_threshold
from tie_ext.utils.checks import check_finite, check_labels, check_number, describe
from tie_ext.utils.files import load_state, reading, save_state, sha256, write_json
from tie_ext.utils.modules import evaluating

FORMAT, VERSION = "tie_ext combined detector", 1
SPLIT = 0
"""Seed of the split of the held-out images."""


class Combined(Detector):
    """Detectors of one network, each of which fails somewhere, as one that fails in fewer places.

    ``fit`` learns the scale of each score on one half of the held-out ID images and draws the line of :meth:`decide` on the other, so that the
    false-alarm rate holds whatever the dependence of the scores. The halves are drawn at random with a fixed seed.

    All members that read the network's logits (n, or n+1 of a :class:`tie_ext.TIENet`) or its ``features`` share one forward pass, in
    evaluation mode. Others, such as ODIN, run by themselves.

    Arguments:
        detectors: The members, each with its network: ``[TIEDetector(net), Mahalanobis(net.features).fit(training), EnergyBased(net)]``. Fit
            those that need it on the training images; those that are not fitted yet are by :meth:`fit`, each time anew, on a quarter of the held-out
            ones.
        false_alarm: Reject ID inputs with at most this probability, in (0, 1], guaranteed for held-out ID data
            (:func:`tie_ext.scores.threshold.conformal_threshold`). None for scores without a line: all held-out images then set the scale.
        rule: How the scores are combined, a name in :data:`tie_ext.scores.combination.RULES`.

    Raises:
        TypeError: If the members are not pytorch-ood detectors.
        ValueError: If there are none, a number is out of range or there is no such rule.

    Example:
        >>> detector = Combined([TIEDetector(net), EnergyBased(net)]).fit(held_out_loader)  # doctest: +SKIP
        >>> label, uncertainty, score, level = detector.decide(x)                           # doctest: +SKIP

    References:
        E. Dadalto Câmara Gomes, P. Colombo, G. Staerman, N. Noiry, P. Piantanida et al. *Combine and conquer*. arXiv:2406.16045, for rules of
        meta-analysis on OOD scores.
    """

    info: ClassVar = DetectorInfo(
        paper=Paper(
            title="Combine and Conquer: A Meta-Analysis on Data Shift and Out-of-Distribution Detection",
            venue="arXiv",
            year=2024,
            url="https://arxiv.org/abs/2406.16045",
        ),
        tasks={Task.CLASSIFICATION},
        ai_coded=True,
    )
    requires_fit: ClassVar = True
    hyperparameter_space: ClassVar = {"rule": list(RULES)}

    def __init__(
        self,
        detectors: Sequence[Detector],
        false_alarm: float | None = 0.05,
        rule: str = "zsum",
    ):
        super().__init__()
        if not isinstance(detectors, Sequence) or not all(
            isinstance(member, Detector) for member in detectors
        ):
            got = (
                [type(member).__name__ for member in detectors]
                if isinstance(detectors, Sequence)
                else type(detectors).__name__
            )
            raise TypeError(f"Expected a list of pytorch-ood detectors, but got {got}")
        if not detectors:
            raise ValueError("Expected at least one detector to combine, but got none")
        if false_alarm is not None:
            check_number("false_alarm", false_alarm, 0, 1, above=True)
        self.detectors, self.false_alarm, self.rule = (
            list(detectors),
            false_alarm,
            check_rule(rule),
        )
        self.network = network_of(self.detectors)
        self.reference: Reference | None = None  #: scale of the members' scores, once fitted
        self.threshold: Tensor | None = (
            None  #: largest score of an accepted input, once fitted to a false-alarm rate
        )
        self.calibration_scores: Tensor | None = None  #: ``(M,)``, those that set the threshold
        self._fitted_here: set[int] = (
            set()
        )  # members that `fit` has fitted, and fits anew: they know images of the last calibration

    @property
    def device(self) -> torch.device | None:
        """Where the network is."""
        return self._infer_value_device(self.network)

    def to(self, device: str | torch.device) -> "Combined":
        """Move network, members and what was fitted to a device."""
        for member in self.detectors:
            member.to(device)
        super().to(device)
        self.reference = None if self.reference is None else Reference(*self.reference)
        return self

    def set_hyperparameters(self, **kwargs: str) -> "Combined":
        """Set ``rule``; a threshold that was fitted is forgotten, as it was one on the scores of the old rule.

        Raises:
            ValueError: If a name is unknown or there is no such rule.
        """
        check_rule(kwargs.get("rule", self.rule))
        super().set_hyperparameters(**kwargs)
        self.threshold = None
        return self

    @torch.no_grad()
    def fit(self, data_loader: Batches) -> "Combined":
        """Learn the scale of the scores and draw the line of :meth:`decide`; each image is read once.

        Half of the images set the scale, half draw the line. Where members have to be fitted first, half of the former fit them: what a member
        has been fitted on does not show its scale.

        Arguments:
            data_loader: Batches ``(x, y)`` of ID images that the network was not trained on; those with y < 0 are left out.

        Returns:
            The detector.

        Raises:
            ModelNotSetException: If no member has a network.
            ValueError: If the loader has too few ID images, a member cannot be fitted on its share, or a score is not finite or the same for
                all images.
        """
        held = self._hold(data_loader)
        fitting, scaling, calibrating = self._parts(len(held.y), bool(self._fitted_here))
        self.reference = self.threshold = None
        for place in sorted(self._fitted_here):
            self._fit_member(place, held, fitting)
        with evaluating(self._net()):
            columns = [
                self._score(place, held.outputs, held.scores[place], held.images)
                for place in range(len(self.detectors))
            ]
        return self._learn(self._matrix(columns, len(held.y)), scaling, calibrating)

    def fit_scores(self, scores: Tensor) -> "Combined":
        """As :meth:`fit`, from the scores ``(N, k)`` that members which need no fitting, or have been fitted on other images, give held-out ID
        images (:meth:`scores`).
        """
        scores = self._checked(scores)
        _, scaling, calibrating = self._parts(len(scores), False)
        return self._learn(scores, scaling, calibrating)

    def _learn(self, scores: Tensor, scaling: Tensor, calibrating: Tensor) -> "Combined":
        scaling, calibrating = scaling.to(scores.device), calibrating.to(scores.device)
        self.threshold, self.reference = None, reference(scores[scaling])
        if self.false_alarm is not None:
            self.calibration_scores = self.predict_scores(scores[calibrating])
            self.threshold = conformal_threshold(self.calibration_scores, self.false_alarm)
        return self

    def _parts(self, count: int, fitting: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that fit members, that set the scale and that draw the line: none in common."""
        needed = 4 if fitting else 2
        if self.false_alarm is not None:
            needed = max(2 * calibration_size(self.false_alarm) - 1, 2 * needed)
        if count < needed:
            wanted = (
                f"for a false-alarm rate of {self.false_alarm}, half of them to draw the line"
                if self.false_alarm
                else "to set the scale"
            )
            raise ValueError(f"Expected at least {needed} ID images {wanted}, but got {count}")
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT))
        half = count if self.false_alarm is None else count // 2
        quarter = half // 2 if fitting else 0
        return rows[:quarter], rows[quarter:half], rows[half:]

    def _hold(self, data_loader: Batches) -> "CalibrationPass":
        """One pass over held-out images: what the members read of them, and the scores of those that run by themselves."""
        net, kinds = self._net(), self._kinds()
        batches: list[tuple] = []
        with evaluating(net):
            for x, y in data_loader:
                x, y = (part.to(self.device) for part in (x, y))
                x, y = x[y >= 0], y[y >= 0]
                if not len(x):
                    continue
                seen = self._outputs(x, [*kinds, LOGITS])
                check_labels(y, len(x), seen.logits.shape[1] - (ALL in kinds))
                if not batches:
                    self._fitted_here |= {
                        place
                        for place, member in enumerate(self.detectors)
                        if _needs_fitting(member, x[:1])
                    }
                runs = [place for place, kind in enumerate(kinds) if kind == ITSELF]
                given = {
                    place: self.detectors[place].predict(x)
                    for place in runs
                    if place not in self._fitted_here
                }
                read_again = (
                    x if len(given) < len(runs) else x[:0]
                )  # by those that are still to be fitted
                batches.append((y, *seen, read_again.cpu(), given))
        if not batches:
            raise ValueError(
                "Expected ID images (labels >= 0) to fit on, but got none from the loader"
            )
        y, logits, features, images = (
            torch.cat(parts) for parts in zip(*(batch[:4] for batch in batches), strict=True)
        )
        scores = [
            torch.cat([batch[4][i] for batch in batches]) if i in batches[0][4] else None
            for i in range(len(kinds))
        ]
        return CalibrationPass(y, Outputs(logits, features), images, scores)

    def _fit_member(self, place: int, held: "CalibrationPass", rows: Tensor) -> None:
        member, kind, rows = self.detectors[place], self._kinds()[place], rows.to(held.y.device)
        y = held.y[rows]
        try:
            if kind == ITSELF:
                images = held.images[rows.cpu()]
                member.fit(list(zip(images.split(64), y.cpu().split(64), strict=True)))
            else:
                fit = member.fit_features if kind == FEATURES else member.fit_logits  # type: ignore[attr-defined]
                fit(held.outputs.read(kind, self._net())[rows], y)
        except (
            AssertionError,
            ValueError,
        ) as error:  # the former is how pytorch-ood's Mahalanobis says that a class is missing
            raise ValueError(
                f"Expected images that {type(member).__name__} can be fitted on, but got {len(rows)} of {len(y.unique())} classes, on which it "
                f"fails ({error or 'AssertionError'}); fit it on training images before"
            ) from error

    def predict(self, x: Tensor) -> Tensor:
        """Scores ``(B,)`` of images ``(B, C, H, W)``, larger = more OOD.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If it has not been fitted.
            ValueError: If a score is not finite; for a TIENet, if the images are not finite, or not of the shape and value range of training.
        """
        self._net()
        if self.reference is None:
            raise RequiresFittingException
        return self.predict_scores(self.scores(x))

    def predict_scores(self, scores: Tensor) -> Tensor:
        """Combined scores ``(B,)`` of the members' scores ``(B, k)``, larger = more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
            ValueError: If the scores are not finite, or not of k columns.
        """
        if self.reference is None:
            raise RequiresFittingException
        return RULES[self.rule](self.reference, self._checked(scores))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Scores ``(B, k)`` of images by each member, larger = more OOD, by one forward pass for all that share the network."""
        x = x.to(self.device)
        with evaluating(self._net()):
            seen = self._outputs(x, self._kinds()) if set(self._kinds()) != {ITSELF} else None
            return self._scores(x, seen)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level of images ``(B, C, H, W)``; those that score above the threshold are rejected.

        Level 0 is accepted, 1 rejected with the garbage class the likeliest of n+1 (of a TIENet), 2 rejected otherwise. Label and uncertainty
        are those of the network, over its n+1 outputs where it is a TIENet.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If there is no line: it has not been fitted to a false-alarm rate.
            ValueError: As :meth:`predict` does.
        """
        net, x = self._net(), x.to(self.device)
        line = self._line()
        with evaluating(net):
            seen = self._outputs(x, [*self._kinds(), ALL if isinstance(net, TIENet) else LOGITS])
            return _decision(
                seen.logits,
                self.predict_scores(self._scores(x, seen)),
                line,
                isinstance(net, TIENet),
            )

    def recalibrate(self, false_alarm: float, scores: Tensor | None = None) -> "Combined":
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
        """Network, members and decision as one module, images ``(B, C, H, W)`` to :class:`tie_ext.Decision`, for ``torch.export`` and ONNX.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If there is no line: it has not been fitted to a false-alarm rate.
            TypeError: If the network is no TIENet, or a member cannot be exported.
        """
        net, threshold, members = self._tie_net("export"), self._line(), []
        for member, kind in zip(self.detectors, self._kinds(), strict=True):
            traced = check_spec(member, kind).traced
            if traced is None:
                raise TypeError(
                    f"Expected members that torch can export, but got {type(member).__name__}"
                )
            members.append((kind, traced(member)))
        return CombinedExportModule(net, members, self.rule, self.reference, threshold)  # type: ignore[arg-type]

    def save(self, folder: str | os.PathLike) -> None:
        """Write network, members and line to a folder: ``network.safetensors``, ``members.safetensors`` and ``detector.json``, each atomically.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If it has not been fitted.
            TypeError: If the network is no TIENet, or a member is not one of :data:`tie_ext.pytorch_ood.members.MEMBERS` on it. Nothing is
                written then.
            OSError: If a file cannot be written.
        """
        folder, net = Path(folder), self._tie_net("save")
        if self.reference is None:
            raise RequiresFittingException
        members = [
            state_of(member, kind)
            for member, kind in zip(self.detectors, self._kinds(), strict=True)
        ]
        net.save(folder / "network.safetensors")
        save_state(
            folder / "members.safetensors",
            "members",
            {"reference": self.reference._asdict(), "members": members},
        )
        prints = {
            f"{name}_sha256": sha256(folder / f"{name}.safetensors")
            for name in ("network", "members")
        }
        line = {
            "threshold": None if self.threshold is None else float(self.threshold),
            "fitted_here": sorted(self._fitted_here),
        }
        settings = {
            "members": [state["name"] for state in members],
            "rule": self.rule,
            "false_alarm": self.false_alarm,
        }
        write_json(
            folder / "detector.json",
            {"format": FORMAT, "version": VERSION, **prints, **settings, **line},
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        backbone: nn.Module | None = None,
        device: str | torch.device = "cpu",
    ) -> "Combined":
        """Read what :meth:`save` wrote.

        Arguments:
            folder: The folder.
            backbone: The architecture, where it is not one of the paper's CNNs; its weights come from the file.
            device: Where the detector is to be.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is truncated, foreign or of a newer major version, or not the one that the others were saved with.
        """
        folder = Path(folder)
        net, path = TIENet.load(folder / "network.safetensors", backbone), folder / "detector.json"
        saved = read_detector_json(path, FORMAT, VERSION)
        state = load_state(folder / "members.safetensors", "members")
        with reading(f"a whole detector.json at {path}"):
            if saved["members_sha256"] != sha256(folder / "members.safetensors"):
                raise ValueError(
                    f"Expected beside {path} the members it was saved with, but got others; fit the detector again and save it"
                )
            with reading(f"members of a combination in {folder / 'members.safetensors'}"):
                detector = cls(
                    [member_of(net, member) for member in state["members"]],
                    saved["false_alarm"],
                    {"stouffer": "zsum"}.get(saved["rule"], saved["rule"]),  # as 0.2.0 called it
                )
                detector._read(net, state["reference"])
            detector._fitted_here = set(saved["fitted_here"])
            if not detector._fitted_here <= set(range(len(detector.detectors))):
                raise ValueError(f"fitted_here {saved['fitted_here']!r}")
            if saved["threshold"] is not None:
                check_number("threshold", saved["threshold"], -3e38, 3e38)
                detector.threshold = torch.tensor(float(saved["threshold"]))
        return detector.to(device)

    def _read(self, net: TIENet, saved: dict[str, Any]) -> None:
        """Take a reference, and try it and the members on zeros: what does not fit together shall say so before it is used."""
        found = Reference(**saved)
        k, n = len(self.detectors), len(found.ordered)
        if [tuple(part.shape) for part in found] != [(k,), (k,), (n, k)] or not all(
            bool(part.isfinite().all()) for part in found
        ):
            raise ValueError(
                f"a reference of shapes {[tuple(part.shape) for part in found]} for {k} members, or one that is not finite"
            )
        if not bool(
            (found.deviation > 0).all() and (found.ordered[1:] >= found.ordered[:-1]).all()
        ):
            raise ValueError(
                "a reference whose deviations are not positive or whose scores are not in order"
            )
        self.network, self.reference = net, found
        zeros = Outputs(
            net.fc.weight.new_zeros(1, net.num_classes + 1),
            net.fc.weight.new_zeros(1, net.feature_size),
        )
        try:
            with torch.no_grad():
                self.predict_scores(self._scores(zeros.features, zeros))
        except RequiresFittingException as error:
            raise ValueError("a member that is not fitted") from error

    def _net(self) -> nn.Module:
        if self.network is None:
            raise ModelNotSetException
        return self.network

    def _tie_net(self, purpose: str) -> TIENet:
        net = self._net()
        if not isinstance(net, TIENet):
            raise TypeError(
                f"Expected detectors on a TIENet to {purpose}, but got {type(net).__name__}; wrap it as TIENet(model, n, image_shape)"
            )
        return net

    def _line(self) -> Tensor:
        if self.threshold is None:
            raise RequiresFittingException(
                "Expected a line to decide by, but got none yet: give false_alarm, and call fit(loader)"
            )
        return self.threshold

    def _kinds(self) -> list[str]:
        return [reads(member, self.network) for member in self.detectors]

    def _outputs(self, x: Tensor, kinds: Sequence[str]) -> Outputs:
        net = self._net()
        if isinstance(net, TIENet):
            net.check(x)
        return outputs(net, x, kinds)

    def _scores(self, x: Tensor, seen: Outputs | None) -> Tensor:
        return self._matrix(
            [self._score(place, seen, None, x) for place in range(len(self.detectors))], len(x)
        )

    def _score(self, place: int, seen: Outputs | None, known: Tensor | None, x: Tensor) -> Tensor:
        """One member's scores, of what is at hand: scores it has given before, what it reads of the network, or the images."""
        member, kind = self.detectors[place], self._kinds()[place]
        if known is not None:
            return known
        if kind == ITSELF or seen is None:
            return torch.cat([member.predict(part) for part in x.to(self.device).split(64)])
        return predictor(member)(seen.read(kind, self._net()))

    def _matrix(self, columns: Sequence[Tensor], count: int) -> Tensor:
        for member, column in zip(self.detectors, columns, strict=True):
            if column.shape != (count,):
                raise ValueError(
                    f"Expected one score an image from {type(member).__name__}, but got {describe(column)} for {count}"
                )
            check_finite(column, f"scores from {type(member).__name__}")
        return _stacked(columns)

    def _checked(self, scores: Tensor) -> Tensor:
        if (
            not isinstance(scores, Tensor)
            or scores.ndim != 2
            or scores.shape[1] != len(self.detectors)
            or not scores.is_floating_point()
        ):
            raise ValueError(
                f"Expected floating-point scores of shape (B, {len(self.detectors)}), but got {describe(scores)}"
            )
        check_finite(scores, "scores")
        return scores.float()  # as the reference is, also where members give double precision, which not every device has


class CalibrationPass(NamedTuple):
    """What one pass over held-out ID images leaves."""

    y: Tensor
    """``(N,)`` labels."""
    outputs: Outputs
    """What the network gave."""
    images: Tensor
    """``(N, C, H, W)``, on the CPU, where members that run by themselves are still to be fitted; else none."""
    scores: list[Tensor | None]
    """Scores ``(N,)`` of members that run by themselves and need no fitting."""


class CombinedExportModule(nn.Module):
    """Network, members and decision in one forward pass.

    Arguments:
        net: The network; it is put into evaluation mode.
        members: What each member reads of it, and its score of that.
        rule: The name of the rule.
        learned: The scale of the scores.
        threshold: Largest score of an accepted input.
    """

    threshold: Tensor

    def __init__(
        self,
        net: TIENet,
        members: Sequence[tuple[str, Callable[[Tensor], Tensor]]],
        rule: str,
        learned: Reference,
        threshold: Tensor,
    ):
        super().__init__()
        self.net, self.members, self.rule = net.eval(), list(members), RULES[rule]
        for name, value in {"threshold": threshold, **learned._asdict()}.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Decision:
        """The :class:`tie_ext.Decision` of images ``(B, C, H, W)``."""
        seen = Outputs(*self.net.outputs(x))
        scores = _stacked([score(seen.read(kind, self.net)) for kind, score in self.members])
        learned = Counting(*(getattr(self, name) for name in Reference._fields))
        return _decision(seen.logits, self.rule(learned, scores), self.threshold, True)


def _stacked(columns: Sequence[Tensor]) -> Tensor:
    """Scores ``(B, k)`` of k members."""
    return torch.stack([column.float() for column in columns], dim=1)


def _decision(logits: Tensor, score: Tensor, threshold: Tensor, garbage: bool) -> Decision:
    """The decision of logits ``(B, n)``, or ``(B, n+1)`` with garbage, where a score of ``(B,)`` says what is rejected."""
    if garbage:
        return rejected_above(threshold, decide(logits)._replace(score=score))
    p = upcast(logits).softmax(dim=1)
    return rejected_above(
        threshold,
        Decision(
            p.argmax(dim=1), uncertainty(p), score, torch.zeros_like(score, dtype=torch.long)
        ),
    )


def _needs_fitting(member: Detector, x: Tensor) -> bool:
    if not member.requires_fit:
        return False
    try:
        member.predict(x)
    except RequiresFittingException:
        return True
    return False
