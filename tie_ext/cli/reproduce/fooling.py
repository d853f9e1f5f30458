r"""Fooling images: what is found by somebody who searches a finished network for images that it takes for a class.

Symbols: ``x (B, C, S, S)`` images; ``y (B,)`` the class asked for; ``logits (B, n+1)``, garbage last; ``h (B, F)`` penultimate features;
``s (B,)`` a detector's score, larger = more OOD; ``t`` its line and ``d`` its deviation on held-out ID images.

.. math:: L = \mathrm{CE}(y, \mathrm{softmax}(\mathrm{logits}_{1 \dots n})) + \log(1 + \max(0, m + (s - t) / d))

A *blind* searcher minimises the first term: it knows the classifier, and nothing of the detector. An *adaptive* one minimises both, so that
whatever the detector computes is against it. The logarithm is there because far from ID images scores differ by thousands of deviations, beside
which no cross-entropy would be seen.

An image is *found* where the detector accepts it and the network calls it the class asked for. Gradient ascent finds one against every detector,
if it may take enough steps: what tells detectors apart is how many it takes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_ood.detector import GEN, EnergyBased, Mahalanobis, MaxSoftmax, ViM
from torch import Tensor

from tie_ext.models.generator import Generator
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Candidates
from tie_ext.outliers.inversion import CLEAR, loss_terms, soft_code
from tie_ext.scores.combination import Reference, reference, zsum
from tie_ext.scores.decision import ood_score
from tie_ext.scores.mahalanobis import Gaussians, fit_gaussians
from tie_ext.scores.threshold import conformal_threshold
from tie_ext.utils.modules import evaluating, frozen
from tie_ext.utils.random import seeded

FALSE_ALARM = 0.05
"""Share of ID images that a detector may reject."""
MARGIN = 0.1
"""How far below the line an adaptive searcher wants to be, in deviations: m."""
RATE = 0.01
"""Step of gradient ascent, a share of the value range: 100 of them can carry a pixel from one end to the other."""
MARKS = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Steps of ascent after which what was found is counted; it ends with the last."""
BATCH = 64
"""Images a generator step."""

Score = Callable[[Tensor, Tensor], Tensor]
"""A score ``(B,)`` of logits ``(B, n+1)`` and features ``(B, F)``, through which gradients flow; larger = more OOD."""

Rule = Callable[[Reference, Tensor], Tensor]
"""One of :data:`tie_ext.scores.combination.RULES` through which gradients flow: all but those that count."""


class Detector(NamedTuple):
    """A score with a line."""

    score: Score
    """What is compared with the line."""
    line: Tensor
    """Largest score of an accepted image."""
    deviation: Tensor
    """Standard deviation of the score on held-out ID images, > 0: the unit in which a searcher reads it."""

    def accepts(self, logits: Tensor, h: Tensor) -> Tensor:
        """Whether images are accepted ``(B,)``."""
        return self.score(logits, h) <= self.line


@torch.no_grad()
def outputs(net: TIENet, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, n+1)`` and features ``(N, F)`` of batches of images, in evaluation mode."""
    with evaluating(net):
        pairs = [net.outputs(x) for x in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([h for _, h in pairs])


def host_scores(net: TIENet, h: Tensor, y: Tensor) -> dict[str, Score]:
    """The hosts' detectors of a plain network by name, fitted on features ``(N, F)`` and labels ``(N,)`` of its training images.

    pytorch-ood fits them; its own scores are cut off from the gradient, so that the formulas stand here again.
    """
    fitted, plus = Mahalanobis(None).fit_features(h, y), fit_gaussians(F.normalize(h), y)
    gaussians = Gaussians(fitted.mu, fitted.precision)
    vim = ViM(None, d=net.feature_size // 2, w=net.fc.weight, b=net.fc.bias).fit_features(h, y)
    return {
        "MSP": lambda logits, h: MaxSoftmax.score(logits[:, :-1]),
        "energy": lambda logits, h: EnergyBased.score(logits[:, :-1]),
        "GEN": lambda logits, h: GEN.score(logits[:, :-1]),
        "Mahalanobis": lambda logits, h: gaussians.distance(h),
        "Mahalanobis++": lambda logits, h: plus.distance(F.normalize(h)),
        "ViM": lambda logits, h: (
            vim.alpha * ((h - vim.u) @ vim.principal_subspace).norm(dim=1)
            - logits[:, :-1].logsumexp(1)
        ),
    }


def level_1_score(logits: Tensor, h: Tensor) -> Tensor:
    """By how much the garbage logit leads ``(B,)``: level 1 rejects above 0."""
    return logits[:, -1] - logits[:, :-1].amax(1)


def garbage_score(logits: Tensor, h: Tensor) -> Tensor:
    """Log-odds of the garbage class ``(B,)``, whatever gives its logit."""
    return ood_score(logits)


def combined(parts: Sequence[Score], logits: Tensor, h: Tensor, rule: Rule = zsum) -> Score:
    """Several scores as one by a rule, on the scale that held-out ID images ``(N, n+1)``, ``(N, F)`` give them."""

    def columns(logits: Tensor, h: Tensor) -> Tensor:
        return torch.stack([score(logits, h) for score in parts], dim=1)

    learned = reference(columns(logits, h))
    return lambda logits, h: rule(learned, columns(logits, h))


def with_line(score: Score, logits: Tensor, h: Tensor) -> Detector:
    """A score with the line that :data:`FALSE_ALARM` of ID images may exceed, by split conformal on held-out ones that set no scale.

    Raises:
        ValueError: If there are too few images for that, or a score is not finite.
    """
    s = score(logits, h)
    return Detector(score, conformal_threshold(s, FALSE_ALARM), s.std())


def criterion(logits: Tensor, h: Tensor, y: Tensor, detector: Detector | None) -> Tensor:
    """What a searcher minimises, ``(B,)``; smaller = taken for the class and, where there is a detector, accepted."""
    loss = F.cross_entropy(logits[:, :-1], y, reduction="none")
    if detector is None:
        return loss
    above = (detector.score(logits, h) - detector.line) / detector.deviation
    return loss + (MARGIN + above).clamp_min(0).log1p()


def invert(
    net: TIENet, y: Tensor, steps: int, seed: int, detector: Detector | None = None
) -> Tensor:
    """One inversion for each class asked for, by a generator that starts afresh and learns from the frozen network.

    Besides the criterion it minimises the cosine between features, as TIE does, lest one image a class be all it makes.

    Arguments:
        net: The network; left as it was.
        y: Classes asked for ``(M,)`` in ``[0, n)``.
        steps: Of the generator, each of :data:`BATCH` images.
        seed: Of the generator's weights and codes.
        detector: What an adaptive searcher sees.

    Returns:
        Images ``(M, C, S, S)`` in ``[low, high]``.
    """
    n, device = net.num_classes, net.low.device

    def generate(y: Tensor) -> tuple[Tensor, Tensor]:
        code = soft_code(y, n, CLEAR)
        return generator(torch.randn(len(y), generator.latent_size, device=device), code), code

    with frozen(net), seeded(seed):
        generator = Generator(net.image_shape or (), n, low=net.low.cpu(), high=net.high.cpu()).to(
            device
        )
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
        for _ in range(steps):
            asked = torch.randint(n, (BATCH,), device=device)
            x, code = generate(asked)
            logits, h = net.outputs(x)
            loss = (
                criterion(logits, h, asked, detector).mean()
                + loss_terms(logits[:, :-1], h, code)["cosine"]
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with evaluating(generator), torch.no_grad():
            return torch.cat([generate(part)[0] for part in y.to(device).split(BATCH)])


def climb(
    net: TIENet,
    start: Tensor,
    y: Tensor,
    detector: Detector | None = None,
    marks: Sequence[int] = MARKS,
) -> Iterator[tuple[int, Tensor]]:
    """Gradient ascent on the log-probability of the class asked for: steps along the gradient's sign, in ``[low, high]``.

    Arguments:
        net: The network; left as it was.
        start: Images ``(M, C, S, S)`` to start from.
        y: Classes asked for ``(M,)`` in ``[0, n)``.
        detector: What an adaptive searcher sees; it climbs the negative criterion, and leaves an image as it is from when it is found.
        marks: Steps at which to look, ascending.

    Returns:
        At each of the marks, the steps taken and the images ``(M, C, S, S)``.
    """
    x, going = net.clip(start.detach()).clone(), torch.arange(len(start), device=start.device)
    for step in range(marks[-1] + 1):
        if len(going):
            there = x[going].requires_grad_()
            with frozen(net), torch.enable_grad():
                logits, h = net.outputs(there)
                (gradient,) = torch.autograd.grad(
                    criterion(logits, h, y[going], detector).sum(), there
                )
            if detector is not None:
                missing = ~fooled(detector, logits.detach(), h.detach(), y[going])
                going, there, gradient = going[missing], there[missing], gradient[missing]
        if step in marks:
            yield step, x.clone()
        if len(going):
            x[going] = net.clip(there.detach() - RATE * (net.high - net.low) * gradient.sign())


def fooled(detector: Detector, logits: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """Whether images are accepted and called the class asked for, ``(B,)``."""
    return detector.accepts(logits, h) & (logits[:, :-1].argmax(1) == y)


def verdict(
    net: TIENet,
    detector: Detector,
    searched: Candidates,
    judges: Sequence[tuple[TIENet, Detector]] = (),
) -> tuple[dict, Tensor]:
    """What becomes of images that were searched for.

    Arguments:
        net: The network.
        detector: Its detector.
        searched: Images, and the class in ``[0, n)`` each was to be taken for.
        judges: Networks trained apart, with detectors of their own.

    Returns:
        Which were found ``(M,)``, and shares of 1: ``found``; of these ``judged``, those that a judge accepts *and* calls the class asked
        for, mean over the judges, and ``confidence``, their mean probability of that class (None where nothing was found, or nobody judges).
    """
    logits, h = outputs(net, searched.x.split(500))
    found = fooled(detector, logits, h, searched.y)
    x, y = searched.x[found], searched.y[found]
    judged = [fooled(own, *outputs(judge, x.split(500)), y) for judge, own in judges if len(x)]
    return {
        "found": _share(found),
        "judged": _share(torch.cat(judged)) if judged else None,
        "confidence": _share(logits[found, :-1].softmax(1).gather(1, y[:, None])),
    }, found


def _share(which: Tensor) -> float | None:
    """Mean of an outcome ``(M,)``; None of none."""
    return which.double().mean().item() if len(which) else None
