"""Who proposes outliers: the one interface of all methods.

TIE's inversion, noise and the outliers of other papers all answer one question: given this classifier and this batch of ID images, what
might be an outlier? So the training loop has no branches, and methods combine as a list.
"""

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.utils.modules import Bounded
from tie_ext.utils.settings import Settings

Batches = Iterable[tuple[Tensor, Tensor]]
"""Any re-iterable of ``(x, y)``: images ``(B, C, H, W)`` and integer labels ``(B,)``; a ``DataLoader``, a list of batches."""


class Domain(NamedTuple):
    """What a synthesizer has to know of the data. A :class:`tie_ext.models.network.TIENet` has the same four attributes and can stand in its place."""

    num_classes: int
    """n."""
    image_shape: tuple[int, ...] | None
    """``(C, S, S)``; None where any will do."""
    low: Tensor
    """Smallest value of the images, ``(1 or C, 1, 1)``."""
    high: Tensor
    """Largest value."""


class Candidates(NamedTuple):
    """Proposed outliers."""

    x: Tensor
    """``(M, C, H, W)`` in the value range of the data."""
    y: Tensor
    """``(M,)`` the output each was aimed at, in ``[0, n]``; n is the garbage class."""


class Synthesizer(Bounded, abc.ABC):
    """Proposes outliers. What it learns lives in its ``state_dict``, so that a run resumes where it stood.

    Arguments:
        domain: The network it is to propose outliers for, or the :class:`Domain` of the data. It is not kept.
        settings: An object of its ``settings_class``; None for its defaults.

    Raises:
        TypeError: If the settings are another method's.
    """

    settings_class: ClassVar[type[Settings]] = Settings
    """The method's settings: a frozen dataclass of :func:`tie_ext.utils.settings.setting` fields."""

    def __init__(self, domain: TIENet | Domain, settings: Settings | None = None):
        super().__init__(domain.low.cpu(), domain.high.cpu())
        self.num_classes = domain.num_classes
        self.settings: Any = self.settings_class() if settings is None else settings
        if not isinstance(self.settings, self.settings_class):
            raise TypeError(
                f"Expected {self.settings_class.__name__} for {type(self).__name__}, but got {type(settings).__name__}"
            )

    def fit(self, classifier: TIENet, batches: Batches, progress: float) -> dict[str, float]:
        """Learn from the classifier as it stands after this epoch's training; the default has nothing to learn.

        Arguments:
            classifier: The network. It is left as it was: weights, mode, flags, BatchNorm statistics.
            batches: The ID data.
            progress: How much of the run is done, in ``[0, 1]``.

        Returns:
            Mean of each loss term by name, for the log.
        """
        return {}

    @abc.abstractmethod
    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Propose about as many outliers as there are images in the batch.

        Arguments:
            classifier: As for :meth:`fit`, and left as it was.
            x: ID images ``(B, C, H, W)``, left as they were.
            y: Their labels ``(B,)``.

        Returns:
            The :class:`Candidates`, on the device of ``x``.
        """

    def _garbage(self, x: Tensor) -> Candidates:
        """Images ``(M, C, H, W)``, all aimed at the garbage class."""
        return Candidates(x, torch.full((len(x),), self.num_classes, device=x.device))


class Prior(Synthesizer):
    """Proposes outliers from nothing, so that the garbage pool can begin with them."""

    @abc.abstractmethod
    def draw(self, shape: Sequence[int]) -> Tensor:
        """Images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the range."""

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Images of the shape and on the device of ``x``, all aimed at the garbage class."""
        return self._garbage(self.draw(tuple(x.shape)).to(x.device))
