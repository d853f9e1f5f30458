"""The interface of all methods that propose outliers.

TIE's inversion, noise and the outliers of other papers answer one question: given this classifier
and this batch of ID images, what could an outlier be? So the training loop has no branches, and
methods combine as a list.
"""

import abc
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tie_ext.models.network import TIENet
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.progress import Progress
from tie_ext.utils.settings import Settings

Loader = Iterable[tuple[Tensor, Any]]
"""ID images ``(B, C, H, W)`` and their labels ``(B,)``, batch by batch, such as a ``DataLoader``
or a :class:`tie_ext.utils.loader.BatchReader` of labelled images; it is read more than once."""


class Domain(NamedTuple):
    """What a synthesizer needs to know of the data. A :class:`tie_ext.models.network.TIENet` has
    the same four attributes and can stand in its place.
    """

    num_classes: int
    """n."""
    image_shape: tuple[int, ...] | None
    """``(C, S, S)``; None for any."""
    low: Tensor
    """Smallest value of the images, ``(1 or C, 1, 1)``."""
    high: Tensor
    """Largest value."""


class Candidates(NamedTuple):
    """Proposed outliers."""

    x: Tensor
    """``(M, C, H, W)`` in the value range of the data."""
    y: Tensor
    """``(M,)`` the output that each was made for, in ``[0, n]``; n is the garbage class."""


class Synthesizer(Bounded, abc.ABC):
    """A method that proposes outliers. Its ``state_dict`` holds all that it has learned, so that a
    run resumes where it stopped.

    Arguments:
        domain: The network that the outliers are for, or the :class:`Domain` of its data; not
            kept.
        settings: An object of its ``settings_class``; None for its defaults.

    Raises:
        TypeError: If the settings are those of another method.
    """

    settings_class: ClassVar[type[Settings]] = Settings
    """A frozen dataclass of :func:`tie_ext.utils.settings.setting` fields."""
    effort: float = 1.0
    """Share of the steps in its settings that :meth:`fit` takes, in (0, 1]; TIE's loop lowers it
    where there are few images."""
    title: str = ""
    """Of the progress bar of :meth:`fit`; none is shown without it."""

    def __init__(self, domain: TIENet | Domain, settings: Settings | None = None):
        super().__init__(domain.low.cpu(), domain.high.cpu())
        self.num_classes = domain.num_classes
        self.settings: Any = self.settings_class() if settings is None else settings
        if not isinstance(self.settings, self.settings_class):
            raise TypeError(
                f"Expected {self.settings_class.__name__} for {type(self).__name__}, "
                f"but got {type(settings).__name__}"
            )

    def fit(self, classifier: TIENet, loader: Loader, progress: float) -> dict[str, float]:
        """Learn from the classifier as it is after this epoch; by default there is nothing to
        learn.

        Arguments:
            classifier: The network; left as it was: weights, modes, flags, BatchNorm statistics.
            loader: The ID data.
            progress: Share of the run that is done, in ``[0, 1]``.

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

    def _steps(self, count: int) -> Iterable[int]:
        """The share of ``count`` steps that :attr:`effort` says, one at least, in a progress
        bar.
        """
        steps = range(max(1, round(self.effort * count)))
        return Progress(steps, self.title, disable=not self.title)

    def _garbage(self, x: Tensor) -> Candidates:
        """Images ``(M, C, H, W)``, all for the garbage class."""
        return Candidates(x, torch.full((len(x),), self.num_classes, device=x.device))


class Prior(Synthesizer):
    """A method that needs no data and no network, so that the garbage pool can begin with it."""

    @abc.abstractmethod
    def draw(self, shape: Sequence[int]) -> Tensor:
        """Images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the range."""

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Images of the shape and on the device of ``x``, all for the garbage class."""
        return self._garbage(self.draw(tuple(x.shape)).to(x.device))
