"""Several detectors of one network as one, with one threshold. Larger score = more OOD, labels < 0
are OOD.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pytorch_ood.api import (
    Detector,
    DetectorInfo,
    ModelNotSetException,
    Paper,
    RequiresFittingException,
    Task,
)
from pytorch_ood.detector import KNN
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood.base import Thresholded, id_reader, warn_if_seen
from tie_ext.pytorch_ood.files import read_folder, write_folder
from tie_ext.pytorch_ood.knn import SampledKNN
from tie_ext.pytorch_ood.members import (
    Outputs,
    check_spec,
    confidence_of,
    forward,
    member_of,
    member_score,
    network_of,
    reads,
    state_of,
    weights_of,
)
from tie_ext.pytorch_ood.sample import kept_sample
from tie_ext.scores.combination import FORMULAS, RULES, Reference, check_rule
from tie_ext.scores.decision import Decision, decide_by_score, upcast
from tie_ext.scores.threshold import calibrate, split
from tie_ext.scores.trust import trust
from tie_ext.utils.checks import check_finite, check_labels, check_number, describe
from tie_ext.utils.files import reading
from tie_ext.utils.views import eval_view

FORMAT = "tie_ext combined detector"


class Combined(Thresholded, Detector):
    """Detectors of one network, each of which fails somewhere, as one that fails in fewer places.

    ``fit`` learns the scale of each score on one half of the held-out ID images and sets the
    threshold of :meth:`decide` on the other, so that the false-alarm rate holds whatever the
    dependence between the scores (:func:`tie_ext.scores.threshold.calibrate`).

    All members that read the network's logits (n, or n+1 of a :class:`tie_ext.TIENet`) or its
    ``features`` share one forward pass. Others, such as ODIN, make their own. All use views in
    evaluation mode, which leave the network as it is, so that threads can share a detector. A
    function that a member was given in the place of a network is called as it is.

    Arguments:
        detectors: The members, each with its network, fitted on training images where they need
            it: ``[TIEDetector(net), Mahalanobis(net.features).fit(train_loader),
            EnergyBased(net)]``.
        false_alarm: Share of new ID inputs that may be rejected, in (0, 1]. None for scores
            without a threshold: all held-out images then set the scale.
        rule: How the scores are combined, a name in :data:`tie_ext.scores.combination.RULES`. By
            ``tail`` each member has the weight of its entry in
            :data:`tie_ext.pytorch_ood.members.MEMBERS`, or 1 without an entry; distances to
            training images have it as far as they are trusted: by the training images that the
            network has kept, else by how a KNN among the members ranks those held-out images that
            set the scale, else not at all (:mod:`tie_ext.scores.trust`).
        guarantee: What ``false_alarm`` bounds, ``average`` or ``pac``; as for the next two,
            :class:`tie_ext.scores.threshold.Guarantee` says more.
        confidence: Of ``pac``, in (0, 1).
        per_class: Give each predicted class that has enough held-out images a threshold of its
            own.

    Raises:
        TypeError: If the members are not pytorch-ood detectors.
        ValueError: If there are none, a number is out of range or there is no such rule.

    Example:
        >>> detector = Combined([TIEDetector(net), EnergyBased(net)])  # doctest: +SKIP
        >>> detector.fit(calibration_loader)                           # doctest: +SKIP
        >>> label, uncertainty, score, level = detector.decide(x)      # doctest: +SKIP

    References:
        E. Dadalto Câmara Gomes, P. Colombo, G. Staerman, N. Noiry, P. Piantanida et al. *Combine
        and conquer*. arXiv:2406.16045, for rules of meta-analysis on OOD scores.
    """

    info: ClassVar = DetectorInfo(
        paper=Paper(
            title="Combine and Conquer: A Meta-Analysis on Data Shift and Out-of-Distribution "
            "Detection",
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
        rule: str = "tail",
        guarantee: str = "average",
        confidence: float = 0.95,
        per_class: bool = False,
    ):
        super().__init__()
        members = detectors if isinstance(detectors, list | tuple) else [detectors]
        if strange := [type(m).__name__ for m in members if not isinstance(m, Detector)]:
            raise TypeError(f"Expected a list of pytorch-ood detectors, but got {strange[0]}")
        if not members:
            raise ValueError("Expected at least one detector to combine, but got none")
        self._promise(false_alarm, guarantee, confidence, per_class)
        self.detectors = list(members)
        self.rule = check_rule(rule)
        self.network = network_of(self.detectors)
        self.reference: Reference | None = None  #: scale of the members' scores, once fitted
        self._forget_threshold()

    def to(self, device: str | torch.device) -> "Combined":
        """Move network, members and what was fitted to a device."""
        for member in self.detectors:
            member.to(device)
        super().to(device)
        self.reference = None if self.reference is None else Reference(*self.reference)
        return self

    def set_hyperparameters(self, **kwargs: str) -> "Combined":
        """Set ``rule``. A fitted threshold is forgotten, as it was one on the scores of the old
        rule.

        Raises:
            ValueError: If a name is unknown or there is no such rule.
        """
        check_rule(kwargs.get("rule", "tail"))
        before = self.rule
        super().set_hyperparameters(**kwargs)
        if before == "tails" != self.rule:  # of 0.3.0, whose scale has no tail
            self.reference = None
        self._forget_threshold()
        return self

    @torch.no_grad()
    def fit(self, calibration_loader: Iterable) -> "Combined":
        """Learn the scale of the scores and set the threshold of :meth:`decide`; each image is
        read once.

        Arguments:
            calibration_loader: Batches of ID images that the network was not trained on, with or
                without labels; those with labels < 0 are left out.

        Returns:
            The detector.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If a member has not been fitted.
            ValueError: If the loader has too few ID images, they are not of the shape and value
                range of training, or a score is not finite or the same for all.
        """
        net = self._net()
        view, found, predicted, sure, features = eval_view(net), [], [], [], []
        for x, labels in id_reader(net, calibration_loader, "calibration_loader"):
            x = x.to(self.device)
            outputs = forward(view, x, self._fields())
            if labels is not None:
                check_labels(labels, len(x), outputs.logits.shape[1])
            found.append(self._stack(outputs, x))
            predicted.append(outputs.logits.argmax(dim=1))
            sure.append(confidence_of(outputs))
            features += [] if outputs.features is None else [outputs.features]
        if features and isinstance(net, TIENet):
            warn_if_seen(net.train_features, torch.cat(features))
        if isinstance(net, TIENet) and net.train_features is not None:
            share = kept_sample(net).trust()
        else:
            share = self._trust(torch.cat(found), torch.cat(sure))
        return self.fit_scores(torch.cat(found), torch.cat(predicted), share)

    def fit_scores(
        self, scores: Tensor, labels: Tensor | None = None, trust: float = 0.0
    ) -> "Combined":
        """As :meth:`fit`, from what is known of N held-out ID images.

        Arguments:
            scores: The members' scores ``(N, k)`` (:meth:`scores`).
            labels: Predicted classes ``(N,)``, which ``per_class`` needs.
            trust: The share, in [0, 1], of their weights that distances to training images have in
                the mean of ``tail``.
        """
        check_number("trust", trust, 0, 1)
        rule = "tail" if self.rule == "tails" else self.rule  # of a detector of 0.3.0
        names = [type(member).__name__ for member in self.detectors]
        about = (weights_of(self.detectors, trust), labels, self._guarantee, names)
        found = calibrate(self._checked(scores), rule, self.false_alarm, *about)
        self.reference, self.calibration_scores, self.calibration_labels, self.threshold = found
        self.rule = rule
        return self

    def _trust(self, scores: Tensor, confidence: Tensor) -> float:
        """How far a KNN among the members is trusted, by the scores ``(N, k)`` of those images
        that set the scale; no image that sets the threshold is asked, so that the false-alarm rate
        holds.
        """
        kinds = [type(member) in (SampledKNN, KNN) for member in self.detectors]
        if True not in kinds:
            return 0.0
        rows = split(len(scores), self.false_alarm, self._guarantee.probability)[0]
        rows = rows.to(scores.device)
        return trust(scores[rows, kinds.index(True)], confidence[rows])

    def predict(self, x: Tensor) -> Tensor:
        """Scores ``(B,)`` of images ``(B, C, H, W)``, larger = more OOD.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If it has not been fitted.
            ValueError: If a score is not finite; for a TIENet, if the images are not finite, or
                not of the shape and value range of training.
        """
        return self.predict_scores(self.scores(x))

    def predict_scores(self, scores: Tensor) -> Tensor:
        """Combined scores ``(B,)`` of the members' scores ``(B, k)``, larger = more OOD.

        Raises:
            RequiresFittingException: If it has not been fitted.
            ValueError: If the scores are not finite, or not of k columns.
        """
        if self.reference is None:
            raise RequiresFittingException
        return FORMULAS[self.rule](self.reference, self._checked(scores))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Scores ``(B, k)`` of images by each member, larger = more OOD, by one forward pass for
        all that share the network.
        """
        x = x.to(self.device)
        return self._stack(self._outputs(x, self._fields()), x)

    def score_outputs(self, outputs: Outputs) -> Tensor:
        """Scores ``(B, k)`` by each member of what the network has given for B images; none of the
        members may run by itself.
        """
        return self._stack(outputs, outputs.logits)

    @torch.no_grad()
    def decide(self, x: Tensor) -> Decision:
        """Label, uncertainty, score and level of images ``(B, C, H, W)``; those that score above
        the threshold are rejected.

        Level 0 is accepted, 1 rejected with the garbage class the most likely of n+1 (of a
        TIENet), 2 rejected otherwise. Label and uncertainty are those of the network, over its n+1
        outputs where it is a TIENet.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If it has not been fitted to a false-alarm rate.
            ValueError: As :meth:`predict` does.
        """
        garbage, x = isinstance(self._net(), TIENet), x.to(self.device)
        threshold = self._fitted_threshold()
        outputs = self._outputs(x, self._fields() | ({"all_logits"} if garbage else set()))
        logits = outputs.all_logits if outputs.all_logits is not None else outputs.logits
        score = self.predict_scores(self._stack(outputs, x))
        return decide_by_score(logits, score, threshold, garbage=garbage)

    def export_module(self) -> nn.Module:
        """Network, members and decision as one module, images ``(B, C, H, W)`` to
        :class:`tie_ext.Decision`, for ``torch.export`` and ONNX.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If it has not been fitted to a false-alarm rate.
            TypeError: If the network is no TIENet, or a member cannot be exported.
        """
        net, threshold, members = self._tie_net("export"), self._fitted_threshold(), []
        for member in self.detectors:
            exported = check_spec(member, net).exported
            if exported is None:
                raise TypeError(
                    f"Expected members that torch can export, but got {type(member).__name__}"
                )
            members.append((str(reads(member, net)), exported(member)))
        return CombinedExportModule(net, members, self.rule, self.reference, threshold)  # type: ignore[arg-type]

    def save(self, folder: str | os.PathLike) -> None:
        """Write network, members and threshold to a folder; docs/file-format.md says what is in
        it.

        Raises:
            ModelNotSetException: If no member has a network.
            RequiresFittingException: If it has not been fitted.
            TypeError: If the network is no TIENet, or a member is not one of
                :data:`tie_ext.pytorch_ood.members.MEMBERS` on it. Nothing is written then.
            OSError: If a file cannot be written.
        """
        net = self._tie_net("save")
        if self.reference is None:
            raise RequiresFittingException
        members = [state_of(member, net) for member in self.detectors]
        settings, state = self._saved_threshold()
        settings |= {"members": [member["name"] for member in members], "rule": self.rule}
        state |= {"members": members, "reference": self.reference._asdict()}
        write_folder(folder, FORMAT, net, settings, state)

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
            backbone: The architecture, where it is not one of the paper's CNNs; its weights come
                from the file.
            device: Where the detector is to be.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is truncated, foreign or of a newer major version, or not the one
                that the others were saved with.
        """
        net = TIENet.load(Path(folder) / "network.safetensors", backbone)
        saved, state = read_folder(folder, FORMAT)
        with reading(f"a whole combined detector in {folder}"):
            members = [member_of(net, member) for member in state["members"]]
            detector = cls(members, saved["false_alarm"])
            detector.rule = saved_rule(saved["rule"])
            detector.network, detector.reference = net, _saved_reference(state, len(members))
            detector._restore_threshold(saved, state)
            detector._try_members(net)
        return detector.to(device)

    def _try_members(self, net: TIENet) -> None:
        """Score zeros: parts that do not fit together are refused when they are loaded."""
        like = upcast(net.fc.weight)
        zeros, features = (like.new_zeros(1, n) for n in (net.num_classes + 1, net.feature_size))
        try:
            with torch.no_grad():
                self.predict_scores(self.score_outputs(Outputs(zeros[:, :-1], features, zeros)))
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
                f"Expected detectors on a TIENet to {purpose}, but got {type(net).__name__}; "
                "wrap it as TIENet(model, n, image_shape)"
            )
        return net

    def _fields(self) -> set[str]:
        """Fields of :class:`Outputs` that members read."""
        found = {reads(member, self.network) for member in self.detectors}
        return {field for field in found if field is not None}

    def _outputs(self, x: Tensor, fields: set[str]) -> Outputs:
        net = self._net()
        if isinstance(net, TIENet):
            net.check(x)
        return forward(eval_view(net), x, fields)

    def _stack(self, outputs: Outputs, x: Tensor) -> Tensor:
        """Scores ``(B, k)`` of the members, float32."""
        columns = []
        for member in self.detectors:
            column, name = member_score(member, self.network, outputs, x), type(member).__name__
            if column.shape != (len(x),):
                raise ValueError(
                    f"Expected one score per image from {name}, "
                    f"but got {describe(column)} for {len(x)}"
                )
            check_finite(column, f"scores from {name}")
            columns.append(column)
        return _stacked(columns)

    def _checked(self, scores: Tensor) -> Tensor:
        good = isinstance(scores, Tensor) and scores.ndim == 2 and scores.is_floating_point()
        if not good or scores.shape[1] != len(self.detectors):
            raise ValueError(
                f"Expected floating-point scores of shape (B, {len(self.detectors)}), "
                f"but got {describe(scores)}"
            )
        check_finite(scores, "scores")
        return scores.float()  # some members give double precision, which not every device has


class CombinedExportModule(nn.Module):
    """Network, members and decision in one forward pass.

    Arguments:
        net: The network, which is left as it is.
        members: The field of :class:`~tie_ext.pytorch_ood.members.Outputs` that each member reads,
            and its score of that.
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
        self.net, self.members, self.rule = eval_view(net), list(members), FORMULAS[rule]
        self.net.keep_training(None, None)  # no part of what is exported
        for name, value in {"threshold": threshold, **learned._asdict()}.items():
            self.register_buffer(name, value)
        self.eval()  # exporters warn of a module in training mode

    def forward(self, x: Tensor) -> Decision:
        """The :class:`tie_ext.Decision` of images ``(B, C, H, W)``."""
        logits, h = (upcast(part) for part in self.net.outputs(x))
        outputs = Outputs(logits[:, :-1], h, logits)
        scores = _stacked([score(getattr(outputs, field)) for field, score in self.members])
        learned = Reference(*(getattr(self, name) for name in Reference._fields))
        return decide_by_score(logits, self.rule(learned, scores), self.threshold)


def _stacked(columns: Sequence[Tensor]) -> Tensor:
    return torch.stack([column.float() for column in columns], dim=1)


def saved_rule(name: Any) -> str:
    """The rule of a file, which may be one that is no longer offered.

    Raises:
        ValueError: If there is none of this name.
    """
    name = "zsum" if name == "stouffer" else name  # as 0.2.0 called it
    return name if isinstance(name, str) and name in FORMULAS else check_rule(name)


def _saved_reference(state: dict[str, Any], k: int) -> Reference:
    """The scale of k members' scores, as a file has it.

    Raises:
        ValueError: If its parts do not fit together.
    """
    found = Reference(**state["reference"])
    for part, value in found._asdict().items():
        if value is not None:
            check_finite(value, part)
    shapes = [tuple(part.shape) for part in found if part is not None]
    if shapes != [(k,), (k,), (len(found.ordered), k), (k,), (k,), ()][: len(shapes)]:
        raise ValueError(f"a reference of shapes {shapes} for {k} members")
    if not bool((found.deviation > 0).all() and (found.ordered.diff(dim=0) >= 0).all()):
        raise ValueError("a reference with deviations <= 0, or scores that do not ascend")
    if found.weights is not None and not (found.weights.min() >= 0 and found.weights.sum() > 0):
        raise ValueError("a reference with weights below 0, or all 0")
    if found.tail is not None and (found.edge is None or not found.tail.min() >= 0):
        raise ValueError("a reference with a tail of weights below 0, or without its edge")
    return found
