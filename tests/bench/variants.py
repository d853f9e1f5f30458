"""What trials change beyond settings: other garbage classes, codes, noise and rules, as networks and trainers. What came of each: docs/ledger.md."""

import copy
from itertools import islice
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from tie_ext import Noise, TIEConfig, TIENet, TIETrainer, uncertainty
from tie_ext.exclusion import GarbagePool, cutoff
from tie_ext.inversion import loss_terms, soft_code
from tie_ext.metrics import CandidateTally
from tie_ext.synthesis import frozen
from tie_ext.training import STATISTICS_BATCHES


class PerClassNet(TIENet):
    """n garbage classes, one beside each ID class; the garbage logit that everything else reads is their log-sum-exp."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.garbage = nn.Linear(self.feature_size, self.num_classes)

    def head(self, h: Tensor) -> Tensor:
        ids, garbage = self.fc(h), self.garbage(h)
        self.every = torch.cat([ids, garbage], dim=1)
        return torch.cat([ids, garbage.logsumexp(1, keepdim=True)], dim=1)


class PerClassTrainer(TIETrainer):
    """Garbage goes to the garbage class beside the ID class that the network takes it for."""

    def _loss(self, logits: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        n = self.net.num_classes
        every = self.net.every
        target = torch.where(y == n, n + every[:, :n].argmax(1), y)
        return F.cross_entropy(every, target, torch.cat([weights[:n], weights[n:].expand(n)]))


class UnlikeTrainer(TIETrainer):
    """Expels what is uncertain, and what has features farther from every ID class than tau's rule allows for ID images (Mahalanobis)."""

    @torch.no_grad()
    def exclude(self, batches) -> dict:
        with frozen(self.net):
            parts = [(self.net(x, return_feature=True, garbage=True), y) for x, y in batches]
            logits, h, y = torch.cat([p[0][0] for p in parts]), torch.cat([p[0][1] for p in parts]), torch.cat([p[1] for p in parts])
            means = torch.stack([h[y == c].mean(0) for c in range(self.net.num_classes)])
            precision = torch.linalg.pinv((h - means[y]).T.cov(), hermitian=True)

            def far(h: Tensor) -> Tensor:
                offset = h[:, None] - means
                return (offset @ precision * offset).sum(-1).amin(1).sqrt()

            tau, limit = cutoff(uncertainty(logits.softmax(1)), self.config.lam), cutoff(far(h), self.config.lam)
            self.net.tau.fill_(tau)
            tally = CandidateTally(self.net.num_classes + 1)
            for synthesizer in self.synthesizers:
                for x, labels in self._draws(batches):
                    candidates = synthesizer.sample(self.net, x, labels)
                    logits_c, h_c = self.net(candidates.x, return_feature=True, garbage=True)
                    out = (uncertainty(logits_c.softmax(1)) > tau) | (far(h_c) > limit)
                    self.pool.add(candidates.x[out])
                    tally.add(logits_c.softmax(1), candidates.y, out)
        return {"tau": tau, "accuracy": (logits.argmax(1) == y).double().mean().item(), **tally.result()}


class AstrayTrainer(TIETrainer):
    """Expels what is uncertain and elsewhere than asked: an inversion that its class was asked for and got is what the class looks like."""

    @torch.no_grad()
    def exclude(self, batches) -> dict:
        with frozen(self.net):
            u, accuracy = self._uncertainties(batches)
            tau = cutoff(u, self.config.lam)
            self.net.tau.fill_(tau)
            tally = CandidateTally(self.net.num_classes + 1)
            for synthesizer in self.synthesizers:
                for x, y in self._draws(batches):
                    candidates = synthesizer.sample(self.net, x, y)
                    p = self.net(candidates.x, garbage=True).softmax(1)
                    out = (uncertainty(p) > tau) & (p.argmax(1) != candidates.y)
                    self.pool.add(candidates.x[out])
                    tally.add(p, candidates.y, out)
        return {"tau": tau, "accuracy": accuracy, **tally.result()}


class HalfNoisePool(GarbagePool):
    """The noise that a pool began with is kept apart, and makes half of every draw; a reservoir holds what was expelled."""

    def __init__(self, began: GarbagePool):
        super().__init__(len(began.images), began.images.shape[1:], began.low, began.high)
        self.noise = began

    def draw(self, k: int) -> Tensor:
        return self.noise.draw(k) if not len(self) else torch.cat([self.noise.draw(k // 2), super().draw(k - k // 2)])


class HalfNoiseTrainer(TIETrainer):
    """Noise keeps its share of the garbage while inversions come in."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pool = HalfNoisePool(self.pool)


class QuantileTrainer(TIETrainer):
    """tau is what one in a hundred ID images exceeds, instead of mean + lambda * std."""

    def exclude(self, batches) -> dict:
        with patch("tie_ext.training.cutoff", lambda u, lam: float(u.quantile(0.99))):
            return super().exclude(batches)


class AveragedTrainer(TIETrainer):
    """A constant rate; what inverts, is judged and stays is the mean of the weights over the epoch's steps, from which training does not go on."""

    last: dict | None = None

    def train(self, batches, weights: Tensor) -> dict[str, float]:
        if self.last is not None:
            self.net.load_state_dict(self.last)
        average = AveragedModel(self.net)  # buffers as the network has them
        hook = self.optimizer.register_step_post_hook(lambda *_: average.update_parameters(self.net))
        with patch.object(TIEConfig, "lr_in", lambda config, epoch: config.lr):
            losses = super().train(batches, weights)
        hook.remove()
        self.last = copy.deepcopy(self.net.state_dict())
        self.net.load_state_dict(average.module.state_dict())
        update_bn((x for x, _ in islice(self._with_garbage(batches, "statistics"), STATISTICS_BATCHES)), self.net)
        return losses


class RestartTrainer(TIETrainer):
    """The generator starts anew in every epoch, so that each epoch's inversions are other ones."""

    def invert(self, batches, progress: float) -> dict[str, float]:
        self.synthesizers = [self._synthesizer(name) for name in self.config.synthesizer.split(",")]
        return super().invert(batches, progress)


def sharp_code(y: Tensor, num_outputs: int, margin: float = 0.0, full=soft_code) -> Tensor:
    """Codes that say more clearly which class is asked for: at temperature 1/2, squares that are brought back to sum 1."""
    squared = full(y, num_outputs, margin).square()
    return squared / squared.sum(1, keepdim=True)


def clear_code(y: Tensor, num_outputs: int, margin: float = 0.0, full=soft_code) -> Tensor:
    """Codes as soft as the paper's, but for the largest normal, which is 0.5 larger: none is close to a tie."""
    return full(y, num_outputs, margin + 0.5)


def softer_code(y: Tensor, num_outputs: int, margin: float = 0.0, full=soft_code) -> Tensor:
    """Codes with more ties: at temperature 2; the margin is added after it."""
    return (full(y, num_outputs).log() / 2 + margin * F.one_hot(y, num_outputs)).softmax(1)


class SharpCodesTrainer(TIETrainer):
    """TIE's inversion, asked by codes at temperature 1/2."""

    code = staticmethod(sharp_code)

    def __init__(self, net: TIENet, config: TIEConfig):
        super().__init__(net, config)
        patch("tie_ext.inversion.soft_code", self.code).start()  # for good, so that what is judged is asked for by these codes too


class ClearCodesTrainer(SharpCodesTrainer):
    """TIE's inversion, asked by codes that have no ties."""

    code = staticmethod(clear_code)


class SofterCodesTrainer(SharpCodesTrainer):
    """TIE's inversion, asked by codes at temperature 2."""

    code = staticmethod(softer_code)


def frontier_code(y: Tensor, num_outputs: int, margin: float = 0.0, full=soft_code) -> Tensor:
    """Half of the codes for an ID class ask for what is as much that class as garbage; with a margin none does."""
    code, n = full(y, num_outputs, margin), num_outputs - 1
    half = ((torch.arange(len(y)) % 2 == 0) & (y < n)) if not margin else torch.zeros_like(y, dtype=torch.bool)
    between = torch.full_like(code, 0.1 / (n - 1))
    between[:, n] = 0.45
    between[torch.arange(len(y)), y] = 0.45 * 1.001  # so that it is still the class that is asked for
    return torch.where(half[:, None], between / between.sum(1, keepdim=True), code)


def frontier_terms(logits: Tensor, features: Tensor, code: Tensor, full=loss_terms) -> dict[str, Tensor]:
    """As the package's, but codes between a class and garbage are the target of the cross-entropy themselves, instead of their argmax."""
    n, asked = code.shape[1] - 1, code.argmax(1)
    between = (asked < n) & (code[:, n] > 0.99 * code.amax(1))
    target = torch.where(between[:, None], code, F.one_hot(asked, n + 1).to(code))
    return {**full(logits, features, code), "ce": -(target * logits.log_softmax(1)).sum(1).mean()}


class FrontierTrainer(SharpCodesTrainer):
    """Inversions that lie between an ID class and garbage join the paper's."""

    code = staticmethod(frontier_code)

    def __init__(self, net: TIENet, config: TIEConfig):
        super().__init__(net, config)
        patch("tie_ext.inversion.loss_terms", frontier_terms).start()


class NoiseTrainer(TIETrainer):
    """No TIE: the garbage class stays the noise it began with."""

    def __init__(self, net: TIENet, config: TIEConfig):
        super().__init__(net, config, synthesizers=[])


class QuadraticNet(TIENet):
    """The garbage logit reads squared features too, so that it can grow in every direction away from ID features."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.garbage = nn.Linear(2 * self.feature_size, 1)

    def head(self, h: Tensor) -> Tensor:
        return torch.cat([self.fc(h), self.garbage(torch.cat([h, h.square()], dim=1))], dim=1)


class DistanceNet(TIENet):
    """The garbage logit reads the Mahalanobis distance to the nearest ID class too, of features as they were after the last epoch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.garbage = nn.Linear(self.feature_size + 1, 1)
        self.register_buffer("means", torch.zeros(self.num_classes, self.feature_size))
        self.register_buffer("inverse_covariance", torch.zeros(self.feature_size, self.feature_size))

    def head(self, h: Tensor) -> Tensor:
        offset = h[:, None] - self.means
        squared = (offset @ self.inverse_covariance * offset).sum(-1).amin(1, keepdim=True).clamp(min=0)
        return torch.cat([self.fc(h), self.garbage(torch.cat([h, squared.log1p()], dim=1))], dim=1)


class DistanceTrainer(NoiseTrainer):
    """No TIE; class means and the shared precision are those of the ID images after each epoch."""

    def train(self, batches, weights: Tensor) -> dict[str, float]:
        losses = super().train(batches, weights)
        with frozen(self.net):
            h, y = (torch.cat(part) for part in zip(*((self.net.features(x), y) for x, y in batches), strict=True))
        means = torch.stack([h[y == c].mean(0) for c in range(self.net.num_classes)])
        covariance = (h - means[y]).T.cov()
        floor = 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))  # features that are always 0 have no variance
        self.net.means.copy_(means)
        self.net.inverse_covariance.copy_(torch.linalg.inv(covariance + floor))
        return losses


def low_contrast(self: Noise, noise: Tensor) -> Tensor:
    """A contrast up to 2, which hardly ever is black and white."""
    return 2 * torch.rand(len(noise), 1, 1, 1) * noise + torch.randn(len(noise), 1, 1, 1)


def half_low_contrast(self: Noise, noise: Tensor, full=Noise._toned) -> Tensor:
    """Half of the images so, half of them with every contrast."""
    return torch.cat([low_contrast(self, noise[::2]), full(self, noise[1::2])])


class LowContrastTrainer(NoiseTrainer):
    """No TIE, and noise of low contrast."""

    toned = low_contrast

    def __init__(self, net: TIENet, config: TIEConfig):
        with patch("tie_ext.synthesis.Noise._toned", type(self).toned):
            super().__init__(net, config)


class HalfLowContrastTrainer(LowContrastTrainer):
    """No TIE, and noise half of which is of low contrast."""

    toned = half_low_contrast


def banded(self: Noise, noise: Tensor, full=Noise._toned) -> Tensor:
    """Half of the images are kept only between two levels of another noise, strokes and blobs; the rest of them is one level, often the lowest."""
    toned = full(self, noise)
    width, center, level = (f(len(noise), 1, 1, 1, device=noise.device) for f in (torch.rand, torch.randn, torch.randn))
    M, C, H, W = noise.shape
    other = F.interpolate(self._mixture((M, C, H // 4, W // 4)), (H, W), mode="bicubic")  # smooth, so that its bands are strokes
    inside = (other / other.std((1, 2, 3), keepdim=True) - center).abs() < 10 ** (1.5 * width - 1.2)  # from thin lines to all but all
    banded = torch.where(inside, toned, 3 * level)
    return torch.cat([banded[::2], toned[1::2]])


def windowed(self: Noise, noise: Tensor, full=Noise._toned) -> Tensor:
    """Half of the images are kept only inside one blob, of any size and with an uneven edge; the rest of them is one level, often the lowest."""
    toned = full(self, noise)
    M, _, H, W = noise.shape
    size, level = torch.rand(M, 1, 1, 1, device=noise.device), torch.randn(M, 1, 1, 1, device=noise.device)
    center = 0.5 * torch.rand(2, M, 1, 1, 1, device=noise.device) - 0.25
    y, x = torch.linspace(-1, 1, H, device=noise.device).view(-1, 1), torch.linspace(-1, 1, W, device=noise.device)
    edge = F.interpolate(self._mixture((M, 1, H // 4, W // 4)), (H, W), mode="bicubic")
    inside = ((y - center[0]).square() + (x - center[1]).square()).sqrt() < 0.2 + 0.7 * size + 0.2 * edge
    windowed = torch.where(inside, toned, 3 * level)
    return torch.cat([windowed[::2], toned[1::2]])


class WindowedTrainer(LowContrastTrainer):
    """No TIE, and noise half of which is a thing on a plain background."""

    toned = windowed


class BandedTrainer(LowContrastTrainer):
    """No TIE, and noise half of which lies in bands on a plain background."""

    toned = banded


VARIANTS = {
    "none": (TIENet, TIETrainer),
    "no-tie": (TIENet, NoiseTrainer),
    "no-tie-low-contrast": (TIENet, LowContrastTrainer),
    "no-tie-banded": (TIENet, BandedTrainer),
    "no-tie-windowed": (TIENet, WindowedTrainer),
    "no-tie-quadratic": (QuadraticNet, NoiseTrainer),
    "no-tie-distance": (DistanceNet, DistanceTrainer),
    "no-tie-half-low-contrast": (TIENet, HalfLowContrastTrainer),
    "unlike": (TIENet, UnlikeTrainer),
    "half-noise": (TIENet, HalfNoiseTrainer),
    "quantile": (TIENet, QuantileTrainer),
    "astray": (TIENet, AstrayTrainer),
    "averaged": (TIENet, AveragedTrainer),
    "restart": (TIENet, RestartTrainer),
    "sharp-codes": (TIENet, SharpCodesTrainer),
    "softer-codes": (TIENet, SofterCodesTrainer),
    "frontier": (TIENet, FrontierTrainer),
    "clear-codes": (TIENet, ClearCodesTrainer),
    "per-class": (PerClassNet, PerClassTrainer),
}
