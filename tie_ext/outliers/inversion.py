r"""TIE's inversion: a conditional generator learns images to which the classifier gives the
outputs that it was asked for.

Symbols: ``z (B, Z) ~ N(0, I)``; ``v (B, n+1) ~ N(0, I)``; the soft code ``c = softmax(v)``; the
target class ``y = argmax c``; ``x = G(z, c)``; ``p = softmax(f(x))`` over n+1 outputs;
``h (B, F)`` penultimate features of ``x``.

.. math:: L = \alpha\, \mathrm{KL}(c \,\|\, p) + \beta\, \mathrm{CE}(y, p)
          + \gamma\, \frac{1}{B(B-1)} \sum_{i \ne j} \cos(h_i, h_j)
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.models.generator import Generator
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Candidates, Domain, Loader, Synthesizer
from tie_ext.utils.distributed import average_gradients, average_statistics
from tie_ext.utils.settings import Settings, setting
from tie_ext.utils.views import eval_view, frozen_view

RIVALS = 10
"""Classes beside the target that a code may name: all others, where there are ten classes and
garbage, as in the paper."""
CLEAR = 0.5
"""Margin of the target in codes for images that people look at."""
TOGETHER = 256
"""Images generated at once where the generator does not learn."""


def soft_code(y: Tensor, num_outputs: int, margin: float = 0.0) -> Tensor:
    """Soft codes ``(B, K)`` with ``argmax == y``: a softmax of standard normals, given which of
    them is the largest.

    The components of v are exchangeable, so that putting the largest in place ``y`` gives exactly
    the distribution of v given its argmax: every class is equally frequent, at many degrees of
    confidence. Two entries of a code may be almost equal, which asks for an image between two
    classes; a margin prevents it. Of many classes, :data:`RIVALS` at random take part in each code
    and the others are 0: among a thousand normals the largest would have 1.6 %, and no code would
    name its class.

    Arguments:
        y: Target classes ``(B,)`` in ``[0, K)``.
        num_outputs: K = n+1.
        margin: Added to the largest normal, >= 0, so that it leads by at least as much.

    References:
        TIE, section 3.
    """
    v = torch.randn(len(y), min(num_outputs, RIVALS + 1), device=y.device)
    v = v.sort(1, descending=True).values
    v[:, 0] += margin
    # The target, then others in random order.
    order = torch.rand(len(y), num_outputs, device=y.device).scatter_(1, y[:, None], 2.0)
    places = order.topk(v.shape[1], dim=1).indices
    return torch.zeros_like(order).scatter_(1, places, v.softmax(1))


def generate(generator: Generator, code: Tensor) -> Tensor:
    """Images ``(B, C, S, S)`` of soft codes ``(B, n+1)`` and random latent vectors."""
    return generator(torch.randn(len(code), generator.latent_size, device=code.device), code)


def loss_terms(logits: Tensor, features: Tensor, code: Tensor) -> dict[str, Tensor]:
    """The three terms of the inversion loss, unweighted.

    Arguments:
        logits: ``(B, n+1)`` of the generated images.
        features: ``(B, F)`` of the generated images, B >= 2.
        code: Soft codes ``(B, n+1)`` that the images were generated from.

    Returns:
        ``kl``: KL(code || p), scalar >= 0. ``ce``: cross-entropy with the argmax of the code,
        scalar >= 0. ``cosine``: mean cosine similarity of the features of different images, in
        [-1, 1]; small = diverse.

    References:
        TIE, section 3; for the cosine, Network Inversion for Uncertainty-Aware OOD Detection,
        section 3.
    """
    log_p = logits.log_softmax(1)
    h = F.normalize(features, dim=1)
    # Sum over i != j of <h_i, h_j> = |sum_i h_i|^2 - sum_i |h_i|^2, without the B x B matrix.
    pairs = h.sum(0).square().sum() - h.square().sum()
    return {
        "kl": F.kl_div(log_p, code, reduction="batchmean"),
        # Paper: "soft or one-hot" targets. Here: one-hot, because with soft ones KL and CE have
        # the same gradient.
        "ce": F.nll_loss(log_p, code.argmax(1)),
        # Paper: TIE prints 1 - cos, which would pull the features together when minimised. Here:
        # cos, as in the predecessor's text, because both papers describe a term that spreads the
        # features.
        "cosine": pairs / (len(h) * (len(h) - 1)),
    }


@dataclass(frozen=True)
class InversionSettings(Settings):
    """How the generator is trained."""

    steps: int = setting(
        80,
        "Generator steps an epoch; it is kept from epoch to epoch (their cost: "
        "docs/research/cost.md).",
        low=1,
        high=10**6,
    )
    batch_size: int = setting(64, "Images a generator step.", low=2, high=10**6)
    lr: float = setting(1e-3, "Learning rate of the generator (Adam).", low=0, high=1, above=True)
    alpha: float = setting(0.1, "Weight of the KL term of the inversion loss.", low=0, high=1e6)
    beta: float = setting(1.0, "Weight of its CE term.", low=0, high=1e6)
    gamma_start: float = setting(
        1.0, "Weight of its cosine term at the start of the run (the paper: 10).", low=0, high=1e6
    )
    gamma_end: float = setting(
        1.0,
        "Weight of its cosine term at the end of the run (the paper: 100); linear between.",
        low=0,
        high=1e6,
    )
    width: int = setting(16, "Width of the generator.", low=1, high=4096)

    def gamma(self, progress: float) -> float:
        """Weight of the cosine term when a share ``progress`` in [0, 1] of the run is done."""
        return self.gamma_start + (self.gamma_end - self.gamma_start) * progress


class Inversion(Synthesizer):
    """Inverts the classifier by a generator that is trained against it and kept from epoch to
    epoch.

    Arguments:
        domain: The network to invert, or the :class:`~tie_ext.outliers.base.Domain` of its data:
            images ``(C, S, S)``, S in [28, 224]. The generator has n+1 classes, garbage included.
        settings: How it is trained.

    Raises:
        ValueError: If no generator can make images of that shape.

    References:
        TIE, sections 3, 4.2 and 6.1.
    """

    settings_class: ClassVar = InversionSettings

    def __init__(self, domain: TIENet | Domain, settings: InversionSettings | None = None):
        super().__init__(domain, settings)
        self.num_outputs = self.num_classes + 1
        self.generator = Generator(
            domain.image_shape or (),
            self.num_outputs,
            width=self.settings.width,
            low=self.low,
            high=self.high,
        )
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=self.settings.lr)

    def fit(self, classifier: TIENet, loader: Loader, progress: float) -> dict[str, float]:
        """Train the generator for ``steps`` steps against the frozen classifier; see
        :meth:`Synthesizer.fit`. The ID data is not read.
        """
        weights = {
            "kl": self.settings.alpha,
            "ce": self.settings.beta,
            "cosine": self.settings.gamma(progress),
        }
        self.generator.train()
        view = frozen_view(classifier)
        log = [self._step(view, weights) for _ in range(self.settings.steps)]
        average_statistics(self.generator)
        # Read here, since reading a number within a step would wait for the device.
        means = torch.stack(log).double().mean(0).tolist()
        return dict(zip([*weights, "agreement"], means, strict=True))

    def _step(self, classifier: TIENet, weights: dict[str, float]) -> Tensor:
        """One step of the generator; its loss terms and the share of images of their target."""
        y = torch.randint(self.num_outputs, (self.settings.batch_size,), device=self.device)
        code = soft_code(y, self.num_outputs)
        logits, h = classifier.outputs(generate(self.generator, code))
        terms = loss_terms(logits, h, code)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.generator)
        self.optimizer.step()
        agreement = (logits.argmax(1) == y).float().mean()
        return torch.stack([*terms.values(), agreement]).detach()

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """As many inversions as there are images in ``x``, of every class equally often, garbage
        included.
        """
        # At random, so that short batches do not favour the first classes.
        first = torch.randint(self.num_outputs, (1,), device=self.device)
        targets = (torch.arange(len(x), device=self.device) + first) % self.num_outputs
        return self.invert(targets, margin=0.0)

    @torch.no_grad()
    def invert(self, y: Tensor, margin: float = CLEAR) -> Candidates:
        """One inversion of each target class: an image that the network takes for that class.

        Arguments:
            y: Classes ``(M,)`` in ``[0, n]``.
            margin: Of the codes, >= 0; 0 as in training, which wants images between classes too.
                Of those that miss their class nearly all had a code with a close second
                (``docs/research/papers.md``).

        Returns:
            The :class:`Candidates`; the generator is left as it was.
        """
        y, generator = y.to(self.device), eval_view(self.generator)
        # A few at a time, so that memory hardly grows with their number.
        codes = (soft_code(part, self.num_outputs, margin) for part in y.split(TOGETHER))
        return Candidates(torch.cat([generate(generator, code) for code in codes]), y)

    @property
    def device(self) -> torch.device:
        """Where the generator lives."""
        return self.generator.low.device

    def get_extra_state(self) -> dict:
        """State of the optimiser, so that a resumed run goes on as if it had not stopped."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        """Put the state of the optimiser back."""
        # A copy, since the optimiser would share the tensors of the state.
        self.optimizer.load_state_dict(copy.deepcopy(state))
