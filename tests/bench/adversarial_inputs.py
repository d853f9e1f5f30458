r"""Adversarial inputs: images that a finished network takes for a class, and a detector accepts.

Symbols: ``x (B, C, S, S)`` images; ``y (B,)`` the target class; ``logits (B, n+1)``, garbage last;
``h (B, F)`` penultimate features; ``s (B,)`` the score of a detector, larger = more OOD; ``t`` its
threshold and ``d`` its standard deviation on held-out ID images.

.. math:: L = \mathrm{CE}(y, \mathrm{softmax}(\mathrm{logits}_{1 \dots n}))
          + \log(1 + \max(0, m + (s - t) / d))

A *blind* attack minimises the first term: it knows the classifier and nothing of the detector. An
*adaptive* one minimises both. The logarithm keeps the cross-entropy in sight far from ID images,
where scores differ by thousands of deviations.

An image is *found* where the detector accepts it and the network predicts the target class. Enough
steps of gradient ascent find one against every detector: detectors differ in how many it takes.
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
from tie_ext.utils.random import seeded
from tie_ext.utils.views import eval_view, frozen_view

FALSE_ALARM = 0.05
"""Share of ID images that a detector may reject."""
MARGIN = 0.1
"""m: how far below the threshold an adaptive attack aims, in deviations."""
RATE = 0.01
"""Step of gradient ascent, a share of the value range: 100 steps carry a pixel from end to end."""
MARKS = (0, 1, 2, 3, 5, 10, 20, 30, 50, 100)
"""Steps of ascent after which the found images are counted; it ends with the last."""
BATCH = 64
"""Images per generator step."""

Score = Callable[[Tensor, Tensor], Tensor]
"""A differentiable score ``(B,)`` of logits ``(B, n+1)`` and features ``(B, F)``, larger = more
OOD."""
Rule = Callable[[Reference, Tensor], Tensor]
"""A differentiable one of :data:`tie_ext.scores.combination.RULES`: all but those that count."""


class Detector(NamedTuple):
    """A score with a threshold."""

    score: Score
    """What is compared with the threshold."""
    threshold: Tensor
    """Largest score of an accepted image."""
    deviation: Tensor
    """Standard deviation of the score on held-out ID images, > 0."""

    def accepts(self, logits: Tensor, h: Tensor) -> Tensor:
        """Whether images are accepted ``(B,)``."""
        return self.score(logits, h) <= self.threshold

    def fooled(self, logits: Tensor, h: Tensor, y: Tensor) -> Tensor:
        """Whether images are accepted and predicted to be the target class, ``(B,)``."""
        return self.accepts(logits, h) & (logits[:, :-1].argmax(1) == y)


@torch.no_grad()
def outputs(net: TIENet, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits ``(N, n+1)`` and features ``(N, F)`` of batches of images, in evaluation mode."""
    view = eval_view(net)
    logits, h = zip(*map(view.outputs, batches), strict=True)
    return torch.cat(logits), torch.cat(h)


def host_scores(net: TIENet, h: Tensor, y: Tensor) -> dict[str, Score]:
    """The hosts' detectors of a plain network by name.

    pytorch-ood fits them. Its own scores stop the gradient, so the formulas are written again.

    Arguments:
        net: The network.
        h: Features ``(N, F)`` of its training images.
        y: Their labels ``(N,)``.
    """
    fitted = Mahalanobis(None).fit_features(h, y)
    plus = fit_gaussians(F.normalize(h), y, shrinkage=True)
    gaussians = Gaussians(fitted.mu, fitted.precision)
    vim = ViM(None, d=net.feature_size // 2, w=net.fc.weight, b=net.fc.bias).fit_features(h, y)

    def vim_score(logits: Tensor, h: Tensor) -> Tensor:
        residual = ((h - vim.u) @ vim.principal_subspace).norm(dim=1)
        return vim.alpha * residual - logits[:, :-1].logsumexp(1)

    return {
        "MSP": lambda logits, h: MaxSoftmax.score(logits[:, :-1]),
        "energy": lambda logits, h: EnergyBased.score(logits[:, :-1]),
        "GEN": lambda logits, h: GEN.score(logits[:, :-1]),
        "Mahalanobis": lambda logits, h: gaussians.distance(h),
        "Mahalanobis++": lambda logits, h: plus.distance(F.normalize(h)),
        "ViM": vim_score,
    }


def level_1_score(logits: Tensor, h: Tensor) -> Tensor:
    """Lead of the garbage logit ``(B,)``: level 1 rejects above 0."""
    return logits[:, -1] - logits[:, :-1].amax(1)


def garbage_score(logits: Tensor, h: Tensor) -> Tensor:
    """Log-odds of the garbage class ``(B,)``, whatever gives its logit."""
    return ood_score(logits)


def combined(parts: Sequence[Score], logits: Tensor, h: Tensor, rule: Rule = zsum) -> Score:
    """Several scores combined by a rule, on the scale of logits ``(N, n+1)`` and features
    ``(N, F)`` of held-out ID images.
    """

    def columns(logits: Tensor, h: Tensor) -> Tensor:
        return torch.stack([score(logits, h) for score in parts], dim=1)

    learned = reference(columns(logits, h))
    return lambda logits, h: rule(learned, columns(logits, h))


def with_threshold(score: Score, logits: Tensor, h: Tensor) -> Detector:
    """A score with the threshold that :data:`FALSE_ALARM` of ID images may exceed, by split
    conformal on held-out ones that set no scale.

    Raises:
        ValueError: If there are too few images for that, or a score is not finite.
    """
    s = score(logits, h)
    return Detector(score, conformal_threshold(s, FALSE_ALARM), s.std())


def criterion(logits: Tensor, h: Tensor, y: Tensor, detector: Detector | None) -> Tensor:
    """What an attack minimises, ``(B,)``; smaller = closer to the target class and, where there is
    a detector, to be accepted.
    """
    loss = F.cross_entropy(logits[:, :-1], y, reduction="none")
    if detector is None:
        return loss
    above = (detector.score(logits, h) - detector.threshold) / detector.deviation
    return loss + (MARGIN + above).clamp_min(0).log1p()


def invert(
    net: TIENet, y: Tensor, steps: int, seed: int, detector: Detector | None = None
) -> Tensor:
    """One inversion for each target class, by a new generator that learns from the frozen network.

    Besides the criterion it minimises the cosine between features, as TIE does, or it would make
    one image per class.

    Arguments:
        net: The network; left as it was.
        y: Target classes ``(M,)`` in ``[0, n)``.
        steps: Generator steps, each of :data:`BATCH` images.
        seed: Seed of the generator's weights and codes.
        detector: What an adaptive attack sees; None for a blind one.

    Returns:
        Images ``(M, C, S, S)`` in ``[low, high]``.
    """
    n, device, view = net.num_classes, net.low.device, frozen_view(net)

    def generate(generator: Generator, y: Tensor) -> tuple[Tensor, Tensor]:
        code = soft_code(y, n, CLEAR)
        return generator(torch.randn(len(y), generator.latent_size, device=device), code), code

    with seeded(seed):
        generator = Generator(net.image_shape or (), n, low=net.low.cpu(), high=net.high.cpu())
        generator = generator.to(device)
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
        for _ in range(steps):
            target = torch.randint(n, (BATCH,), device=device)
            x, code = generate(generator, target)
            logits, h = view.outputs(x)
            loss = criterion(logits, h, target, detector).mean()
            loss = loss + loss_terms(logits[:, :-1], h, code)["cosine"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            made = eval_view(generator)
            return torch.cat([generate(made, part)[0] for part in y.to(device).split(BATCH)])


def ascend(
    net: TIENet,
    start: Tensor,
    y: Tensor,
    detector: Detector | None = None,
    marks: Sequence[int] = MARKS,
) -> Iterator[tuple[int, Tensor]]:
    """Gradient ascent on the log-probability of the target class: steps along the gradient's sign,
    in ``[low, high]``.

    Arguments:
        net: The network; left as it was.
        start: Images ``(M, C, S, S)`` to start from.
        y: Target classes ``(M,)`` in ``[0, n)``.
        detector: What an adaptive attack sees; it ascends the negative criterion, and leaves an
            image as it is once it is found.
        marks: Numbers of steps to give the images after, ascending.

    Returns:
        At each of the marks, the steps taken and the images ``(M, C, S, S)``.
    """
    view, step_size = frozen_view(net), RATE * (net.high - net.low)
    x, active = net.clip(start.detach()).clone(), torch.arange(len(start), device=start.device)
    for step in range(marks[-1] + 1):
        if len(active):
            current = x[active].requires_grad_()
            with torch.enable_grad():
                logits, h = view.outputs(current)
                loss = criterion(logits, h, y[active], detector).sum()
                (gradient,) = torch.autograd.grad(loss, current)
            if detector is not None:
                missing = ~detector.fooled(logits.detach(), h.detach(), y[active])
                active, current, gradient = (part[missing] for part in (active, current, gradient))
        if step in marks:
            yield step, x.clone()
        if len(active):
            x[active] = net.clip(current.detach() - step_size * gradient.sign())


def verdict(
    net: TIENet,
    detector: Detector,
    found: Candidates,
    judges: Sequence[tuple[TIENet, Detector]] = (),
) -> tuple[dict, Tensor]:
    """How an attack ended.

    Arguments:
        net: The network.
        detector: Its detector.
        found: The images, and the target class in ``[0, n)`` of each.
        judges: Networks trained separately, with detectors of their own.

    Returns:
        Shares of 1: ``found``; of these ``judged``, those that fool a judge too, mean over the
        judges, and ``confidence``, their mean probability of the target class (None where nothing
        was found, or there is no judge). And which were found ``(M,)``.
    """
    logits, h = outputs(net, found.x.split(500))
    fooled = detector.fooled(logits, h, found.y)
    x, y = found.x[fooled], found.y[fooled]
    judged = [own.fooled(*outputs(judge, x.split(500)), y) for judge, own in judges if len(x)]
    return {
        "found": _share(fooled),
        "judged": _share(torch.cat(judged)) if judged else None,
        "confidence": _share(logits[fooled, :-1].softmax(1).gather(1, y[:, None])),
    }, fooled


def _share(which: Tensor) -> float | None:
    """Mean of an outcome ``(M,)``; None of none."""
    return which.double().mean().item() if len(which) else None
