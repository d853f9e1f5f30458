r"""TIE's inversion: a conditional generator learns which images make the classifier answer what it was asked for.

Symbols: ``z (B, Z) ~ N(0, I)``; ``v (B, n+1) ~ N(0, I)``; the soft code ``c = softmax(v)``; the class asked for ``y = argmax c``;
``x = G(z, c)``; ``p = softmax(f(x))`` over n+1 outputs; ``h (B, F)`` penultimate features of ``x``.

.. math:: L = \alpha\, \mathrm{KL}(c \,\|\, p) + \beta\, \mathrm{CE}(y, p) + \gamma\, \frac{1}{B(B-1)} \sum_{i \ne j} \cos(h_i, h_j)
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.models.generator import Generator
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Batches, Candidates, Domain, Synthesizer
from tie_ext.utils.distributed import average_gradients, average_statistics
from tie_ext.utils.modules import frozen
from tie_ext.utils.settings import Settings, setting

RIVALS = 10
"""Classes beside the one asked for that a code may name: all others where there are ten classes and garbage, as in the paper."""
CLEAR = 0.5
"""By how much the largest of a code's normals leads, where people look at what comes of it."""
TOGETHER = 256
"""Images generated at once where the generator does not learn."""


def soft_code(y: Tensor, num_outputs: int, margin: float = 0.0) -> Tensor:
    """Soft codes ``(B, K)`` with ``argmax == y``: a softmax of standard normals, given which of them is the largest.

    The components of v are exchangeable, so putting the largest in place ``y`` gives exactly the distribution of v given its argmax;
    every class is asked for equally often, with many degrees of confidence. Two entries of a code may be all but equal, which asks for what
    lies between two classes; with a margin none is. Of many classes :data:`RIVALS` stand beside the one asked for, anew in each code, and the
    others are 0: among a thousand normals the largest would have 1.6 %, and no code would name its class.

    Arguments:
        y: Classes asked for ``(B,)`` in ``[0, K)``.
        num_outputs: K = n+1.
        margin: Added to the largest normal, >= 0: it leads by at least as much.

    References:
        TIE, section 3.
    """
    v = (
        torch.randn(len(y), min(num_outputs, RIVALS + 1), device=y.device)
        .sort(1, descending=True)
        .values
    )
    v[:, 0] += margin
    # The class asked for, then others in random order.
    order = (
        torch.rand(len(y), num_outputs, device=y.device)
        .scatter_(1, y[:, None], 2.0)
        .topk(v.shape[1], dim=1)
        .indices
    )
    return torch.zeros(len(y), num_outputs, device=y.device).scatter_(1, order, v.softmax(1))


def loss_terms(logits: Tensor, features: Tensor, code: Tensor) -> dict[str, Tensor]:
    """The three terms of the inversion loss, unweighted.

    Arguments:
        logits: ``(B, n+1)`` of the generated images.
        features: ``(B, F)`` of the generated images, B >= 2.
        code: Soft codes ``(B, n+1)`` they were asked for.

    Returns:
        ``kl``: KL(code || p), scalar >= 0. ``ce``: cross-entropy with the code's argmax, scalar >= 0.
        ``cosine``: mean cosine similarity of the features of different images, in [-1, 1]; small = diverse.

    References:
        TIE, section 3; for the cosine, Network Inversion for Uncertainty-Aware OOD Detection, section 3.
    """
    log_p = logits.log_softmax(1)
    h = F.normalize(features, dim=1)
    # Sum over i != j of <h_i, h_j> = |sum_i h_i|^2 - sum_i |h_i|^2, without the B x B matrix.
    pairs = h.sum(0).square().sum() - h.square().sum()
    return {
        "kl": F.kl_div(log_p, code, reduction="batchmean"),
        # Paper: "soft or one-hot" targets. Here: one-hot, because with soft ones KL and CE have the same gradient.
        "ce": F.nll_loss(log_p, code.argmax(1)),
        # Paper: TIE prints 1 - cos, which would pull the features together when minimised. Here: cos, as in the predecessor's text,
        # because both papers describe a term that spreads the features.
        "cosine": pairs / (len(h) * (len(h) - 1)),
    }


@dataclass(frozen=True)
class InversionSettings(Settings):
    """How the generator is trained."""

    steps: int = setting(
        80,
        "Generator steps an epoch, from where it stood (docs/research/cost.md says what they take).",
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
    """Inverts the classifier with a generator that is trained against it, warm from epoch to epoch.

    Arguments:
        domain: The network to invert, or the :class:`tie_ext.outliers.base.Domain` of its data: images ``(C, S, S)``, S in [28, 224]. The generator
            is asked for n+1 classes, garbage included.
        settings: How it is trained.

    Raises:
        ValueError: If no generator can make such images.

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

    def fit(self, classifier: TIENet, batches: Batches, progress: float) -> dict[str, float]:
        """Train the generator against the frozen classifier for ``steps`` steps; see :meth:`Synthesizer.fit`."""
        weight = {
            "kl": self.settings.alpha,
            "ce": self.settings.beta,
            "cosine": self.settings.gamma(progress),
        }
        told: list[Tensor] = []
        self.generator.train()
        with frozen(classifier):
            for _ in range(self.settings.steps):
                y = torch.randint(
                    self.num_outputs, (self.settings.batch_size,), device=self.device
                )
                code = soft_code(y, self.num_outputs)
                logits, h = classifier.outputs(self._generate(code))
                terms = loss_terms(logits, h, code)
                loss = torch.stack([weight[name] * term for name, term in terms.items()]).sum()
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                average_gradients(self.generator)
                self.optimizer.step()
                told.append(
                    torch.stack([*terms.values(), (logits.argmax(1) == y).float().mean()]).detach()
                )
        average_statistics(self.generator)
        # Read here, as a number that is read in a step makes it wait for the device.
        return dict(
            zip([*weight, "agreement"], torch.stack(told).double().mean(0).tolist(), strict=True)
        )

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """As many inversions as there are images in ``x``, every class (garbage included) asked for equally often."""
        first = torch.randint(
            self.num_outputs, (1,), device=self.device
        )  # so that short batches do not favour the first classes
        return self.invert(
            (torch.arange(len(x), device=self.device) + first) % self.num_outputs, clearly=False
        )

    @torch.no_grad()
    def invert(self, y: Tensor, clearly: bool = True) -> Candidates:
        """One inversion for each class asked for: what it looks like to the network.

        Arguments:
            y: Classes ``(M,)`` in ``[0, n]``.
            clearly: Ask by codes that lean to their class (:data:`CLEAR`), for people to look at; else as training asks, which wants what lies
                between classes too. What misses its class was nearly always asked for by a code close to a tie (``docs/research/agreement.md``).

        Returns:
            The :class:`Candidates`; the generator's mode is left as it was.
        """
        y = y.to(self.device)
        with frozen(
            self.generator
        ):  # a few at a time, so that any number takes little more than its own place
            x = [
                self._generate(soft_code(part, self.num_outputs, CLEAR if clearly else 0.0))
                for part in y.split(TOGETHER)
            ]
        return Candidates(torch.cat(x), y)

    @property
    def device(self) -> torch.device:
        """Where the generator lives."""
        return self.generator.low.device

    def _generate(self, code: Tensor) -> Tensor:
        return self.generator(
            torch.randn(len(code), self.generator.latent_size, device=code.device), code
        )

    def get_extra_state(self) -> dict:
        """The optimiser, so that a resumed run goes on as if it had not stopped."""
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        """Put the optimiser back."""
        self.optimizer.load_state_dict(
            copy.deepcopy(state)
        )  # which would share its tensors with the state
