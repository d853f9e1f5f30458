r"""Fooling images: what is found by somebody who searches a finished network for images that it takes for a class.

Symbols: ``x (B, C, S, S)`` images; ``y (B,)`` the class asked for; ``logits (B, n+1)``, garbage last; ``h (B, F)`` penultimate features;
``s (B,)`` a detector's score, larger = more OOD; ``t`` its line and ``d`` its deviation on held-out ID images.

.. math:: L = \mathrm{CE}(y, \mathrm{softmax}(\mathrm{logits}_{1 \dots n})) + \log(1 + \max(0, m + (s - t) / d))

A *blind* searcher minimises the first term: it knows the classifier, and nothing of the detector. An *adaptive* one minimises both, so that
whatever the detector computes is against it. The logarithm is there because far from ID images scores differ by thousands of deviations, beside
which no cross-entropy would be seen.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_ood.detector import EnergyBased, Mahalanobis, MaxSoftmax, ViM
from torch import Tensor

from tie_ext.combination import reference, stouffer
from tie_ext.decision import conformal_threshold, decide, ood_score
from tie_ext.gaussians import Gaussians, fit_gaussians, unit
from tie_ext.generator import Generator
from tie_ext.network import TIENet
from tie_ext.outliers.inversion import CLEAR, loss_terms, soft_code
from tie_ext.support.modules import evaluating, frozen
from tie_ext.support.random import seeded
from tie_ext.synthesis import Candidates

FALSE_ALARM = 0.05
"""Share of ID images that a detector may reject."""
MARGIN = 0.1
"""How far below the line an adaptive searcher wants to be, in deviations: m."""
RATE = 0.02
"""First step of gradient ascent, a share of the value range; steps shrink to 0, so that 100 of them can carry a pixel from one end to the other."""
BATCH = 64
"""Images a generator step, and images climbed at once."""

Score = Callable[[Tensor, Tensor], Tensor]
"""A score ``(B,)`` of logits ``(B, n+1)`` and features ``(B, F)``, through which gradients flow; larger = more OOD."""


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


Searcher = Callable[[TIENet, Detector | None], Candidates]
"""Images found against a network and a detector, and the class ``(B,)`` each was to be taken for; blind where the detector is None."""


@torch.no_grad()
def outputs(net: TIENet, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, n+1)`` and features ``(N, F)`` of batches of images, in evaluation mode."""
    with evaluating(net):
        pairs = [net(x, return_feature=True, garbage=True) for x in batches]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([h for _, h in pairs])


def host_scores(net: TIENet, h: Tensor, y: Tensor) -> dict[str, Score]:
    """The hosts' detectors of a plain network by name, fitted on features ``(N, F)`` and labels ``(N,)`` of its training images.

    pytorch-ood fits them; its own scores are cut off from the gradient, so that the formulas stand here again.
    """
    fitted, plus = Mahalanobis(None).fit_features(h, y), fit_gaussians(unit(h), y)
    gaussians = Gaussians(fitted.mu, fitted.precision)
    vim = ViM(None, d=net.feature_size // 2, w=net.fc.weight, b=net.fc.bias).fit_features(h, y)
    return {
        "MSP": lambda logits, h: MaxSoftmax.score(logits[:, :-1]),
        "energy": lambda logits, h: EnergyBased.score(logits[:, :-1]),
        "Mahalanobis": lambda logits, h: gaussians.distance(h),
        "Mahalanobis++": lambda logits, h: plus.distance(unit(h)),
        "ViM": lambda logits, h: vim.alpha * ((h - vim.u) @ vim.principal_subspace).norm(dim=1) - logits[:, :-1].logsumexp(1),
    }


def garbage_score(logits: Tensor, h: Tensor) -> Tensor:
    """Log-odds of the garbage class ``(B,)``, whatever gives its logit."""
    return ood_score(logits)


def combined(parts: Sequence[Score], logits: Tensor, h: Tensor) -> Score:
    """Several scores as one by Stouffer's rule, on the scale that held-out ID images ``(N, n+1)``, ``(N, F)`` give them."""

    def columns(logits: Tensor, h: Tensor) -> Tensor:
        return torch.stack([score(logits, h) for score in parts], dim=1)

    learned = reference(columns(logits, h))
    return lambda logits, h: stouffer(learned, columns(logits, h))


def with_line(score: Score, logits: Tensor, h: Tensor) -> Detector:
    """A score with the line that :data:`FALSE_ALARM` of ID images may exceed, by split conformal on held-out ones that set no scale.

    Raises:
        ValueError: If there are too few images for that, or a score is not finite.
    """
    s = score(logits, h)
    return Detector(score, conformal_threshold(s, FALSE_ALARM), s.std())


def objective(logits: Tensor, h: Tensor, y: Tensor, detector: Detector | None) -> Tensor:
    """What a searcher minimises, ``(B,)``; smaller = taken for the class and, where there is a detector, accepted."""
    loss = F.cross_entropy(logits[:, :-1], y, reduction="none")
    if detector is None:
        return loss
    above = (detector.score(logits, h) - detector.line) / detector.deviation
    return loss + (MARGIN + above).clamp_min(0).log1p()


def invert(net: TIENet, y: Tensor, steps: int, seed: int, detector: Detector | None = None) -> Tensor:
    """One inversion for each class asked for, by a generator that starts afresh and learns from the frozen network.

    Besides the objective it minimises the cosine between features, as TIE does, lest one image a class be all it makes.

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
        generator = Generator(net.image_shape or (), n, low=net.low.cpu(), high=net.high.cpu()).to(device)
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
        for _ in range(steps):
            asked = torch.randint(n, (BATCH,), device=device)
            x, code = generate(asked)
            logits, h = net(x, return_feature=True, garbage=True)
            loss = objective(logits, h, asked, detector).mean() + loss_terms(logits[:, :-1], h, code)["cosine"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with evaluating(generator), torch.no_grad():
            return torch.cat([generate(part)[0] for part in y.to(device).split(BATCH)])


def climb(net: TIENet, start: Tensor, y: Tensor, steps: int, detector: Detector | None = None) -> Tensor:
    """Gradient ascent on the log-probability of the class asked for: steps along the gradient's sign, in ``[low, high]``.

    Arguments:
        net: The network; left as it was.
        start: Images ``(M, C, S, S)`` to start from.
        y: Classes asked for ``(M,)`` in ``[0, n)``.
        steps: Of ascent, their size from :data:`RATE` of the value range down to 0 along a line.
        detector: What an adaptive searcher sees; it climbs the negative objective.

    Returns:
        Each image as it was when its objective was smallest, ``(M, C, S, S)``.
    """
    with frozen(net):
        return torch.cat([_climb(net, *part, steps, detector) for part in zip(start.split(BATCH), y.split(BATCH), strict=True)])


def _climb(net: TIENet, start: Tensor, y: Tensor, steps: int, detector: Detector | None) -> Tensor:
    x = best = net.clip(start.detach())
    least = torch.full((len(x),), math.inf, device=x.device)
    for step in range(steps + 1):
        x = x.detach().requires_grad_()
        logits, h = net(x, return_feature=True, garbage=True)
        loss = objective(logits, h, y, detector)
        better = loss.detach() < least
        best, least = torch.where(better[:, None, None, None], x.detach(), best), torch.where(better, loss.detach(), least)
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        x = net.clip(x - RATE * (1 - step / (steps + 1)) * (net.high - net.low) * gradient.sign())
    return best


def verdict(net: TIENet, detector: Detector, found: Candidates, judges: Sequence[tuple[TIENet, Detector]] = ()) -> dict[str, float | None]:
    """What becomes of images that were searched for.

    Arguments:
        net: The network they were searched against.
        detector: Its detector.
        found: Images, and the class in ``[0, n)`` each was to be taken for.
        judges: Networks trained apart, with detectors of their own.

    Returns:
        Shares of 1: ``accepted`` by the detector; of these ``as asked``, those that the network calls the class asked for, and ``judged``, those that
        a judge calls so *and* accepts, mean over the judges (None where nothing was accepted, or nobody judges). ``confidence``: mean
        probability of the class asked for, of all images. Where the garbage class was trained, what passes without a threshold: ``level 0``, and
        ``not level 1``.
    """
    logits, h = outputs(net, found.x.split(500))
    accepted = detector.accepts(logits, h)
    result: dict[str, float | None] = {
        "accepted": _share(accepted),
        "as asked": _share(logits[accepted, :-1].argmax(1) == found.y[accepted]),
        "confidence": logits[:, :-1].softmax(1).gather(1, found.y[:, None]).mean().item(),
        "judged": None,
    }
    if math.isfinite(net.tau):
        level = decide(logits, net.tau).level
        result |= {"level 0": _share(level == 0), "not level 1": _share(level != 1)}
    if judges and accepted.any():
        through = []
        for judge, own in judges:
            logits, h = outputs(judge, found.x[accepted].split(500))
            through.append(own.accepts(logits, h) & (logits[:, :-1].argmax(1) == found.y[accepted]))
        result["judged"] = _share(torch.cat(through))
    return result


def _share(which: Tensor) -> float | None:
    """Share of an outcome ``(M,)``; None of none."""
    return which.double().mean().item() if len(which) else None


def measure(
    net: TIENet, detectors: Mapping[str, Detector], searchers: Mapping[str, Searcher], judges: Sequence[tuple[TIENet, Detector]] = ()
) -> Iterator[tuple[dict, Candidates]]:
    """The table of a network: detectors x searchers x forms.

    A blind search is made once, whatever the number of detectors that then look at what it found.

    Returns:
        Row by row, ``searcher``, ``detector``, ``form`` and the :func:`verdict`, and the images it is about.
    """
    for name, search in searchers.items():
        blind = search(net, None)
        for label, detector in detectors.items():
            for form in ("blind", "adaptive"):
                found = blind if form == "blind" else search(net, detector)
                yield {"searcher": name, "detector": label, "form": form, **verdict(net, detector, found, judges)}, found
