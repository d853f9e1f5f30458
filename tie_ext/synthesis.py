"""Who proposes outliers: the one interface of all methods, and the simplest of them, noise.

TIE's inversion, noise and the outliers of other papers all answer one question: given this classifier and this batch of ID images, what
might be an outlier? So the training loop has no branches, and methods combine as a list.
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext.networks import TIENet, evaluating, register_range

Batches = Iterable[tuple[Tensor, Tensor]]
"""Any re-iterable of ``(x, y)``: images ``(B, C, H, W)`` and integer labels ``(B,)``; a ``DataLoader``, a list of batches."""


class Candidates(NamedTuple):
    """Proposed outliers."""

    x: Tensor
    """``(M, C, H, W)`` in the value range of the data."""
    y: Tensor
    """``(M,)`` the output each was aimed at, in ``[0, n]``; n is the garbage class."""


class Synthesizer(nn.Module, abc.ABC):
    """Proposes outliers. What it learns lives in its ``state_dict``, so that a run resumes where it stood."""

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


@contextmanager
def frozen(classifier: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside; mode and flags of every part as they were outside.

    Gradients still flow *through* the classifier, to its input.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
    classifier.requires_grad_(False)
    try:
        with evaluating(classifier):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Noise(Synthesizer):
    """Gaussian noise, white or of several spatial scales.

    White is the paper's: N(0, I) for data scaled to [-1, 1], clipped to the data's range. Multi-scale noise is a random mixture of standard
    normals drawn at S, S/2, S/4, ... 2 pixels and upsampled, with random contrast, level and brightness per image, clipped: blobs, clouds,
    gradients, flat areas and black and white shapes beside the speckle, as the spectrum of natural images falls with frequency and that of
    white noise does not.

    Arguments:
        multiscale: Several scales (default) or white.
        low: Smallest value of the data, a number or one a channel.
        high: Largest value of the data.
    """

    low: Tensor
    high: Tensor

    def __init__(self, multiscale: bool = True, low: float | Sequence[float] | Tensor = 0.0, high: float | Sequence[float] | Tensor = 1.0):
        super().__init__()
        self.multiscale = multiscale
        register_range(self, low, high)

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Noise images of the shape and on the device of ``x``, all aimed at the garbage class."""
        images = self.draw(tuple(x.shape)).to(x.device)
        return Candidates(images, torch.full((len(images),), classifier.num_classes, device=x.device))

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Noise images of shape ``(M, C, H, W)`` in ``[low, high]``, on the device of the range."""
        noise = self._toned(self._mixture(shape)) if self.multiscale else torch.randn(*shape, device=self.low.device)
        return self.low + (self.high - self.low) * (noise / 2 + 0.5).clamp(0, 1)

    def _mixture(self, shape: Sequence[int]) -> Tensor:
        M, C, H, W = shape
        device = self.low.device
        sizes = [H]
        while sizes[-1] > 2:
            sizes.append((sizes[-1] + 1) // 2)
        # Squared uniforms make weights uneven, so that most images are dominated by a scale or two.
        weights = F.normalize(torch.rand(M, len(sizes), device=device).square(), dim=1)
        noise = torch.zeros(M, C, H, W, device=device)
        for weight, size in zip(weights.T, sizes, strict=True):
            layer = torch.randn(M, C, size, size, device=device)
            noise += weight.view(-1, 1, 1, 1) * F.interpolate(layer, (H, W), mode="bilinear" if size < H else "nearest")
        return noise

    def _toned(self, noise: Tensor) -> Tensor:
        uniform, level, brightness = (f(len(noise), 1, 1, 1, device=noise.device) for f in (torch.rand, torch.randn, torch.randn))
        # Contrast from 0.1, nearly flat, to 10, black and white: where it ends at 2, a tenth of black and white noise passes for ID images.
        return 10 ** (2 * uniform - 1) * (noise + level) + brightness
