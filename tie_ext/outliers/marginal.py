r"""Disentangled marginal representations (DMR): ID images without their class, decoded.

Symbols: ``E`` encoder, ``G`` decoder, ``mu_y`` mean code of class y, ``w = E(x) - mu_y`` the
marginal representation of an image.

.. math:: x_{out} = G\Big(\lambda \cdot \frac{1}{k} \sum_{i=1}^{k} w_i\Big), \quad \lambda \sim
U[1, 3],
          \text{ the k images of different classes}
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Candidates, Domain, Loader, Synthesizer
from tie_ext.outliers.vae import VAE, fit_vae
from tie_ext.utils.distributed import total
from tie_ext.utils.settings import Settings, setting
from tie_ext.utils.views import eval_view


class Codec(Protocol):
    """A module with an encoder and a decoder; the paper's is StyleGAN-XL with an inversion
    encoder.
    """

    latent_size: int

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """Codes ``(B, L)`` of images ``(B, C, S, S)`` with labels ``(B,)``."""
        ...

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Images ``(B, C, S, S)`` in the value range, of codes ``(B, L)``; a codec that is not
        conditional ignores the labels.
        """
        ...


@dataclass(frozen=True)
class MarginalSettings(Settings):
    """What is mixed, how it is scaled, and how the built-in VAE is trained."""

    k: int = setting(
        5,
        "Images mixed, of different classes (the paper: 5); fewer where there are fewer classes. "
        "1 for no mixing.",
        low=1,
        high=10**6,
    )
    scale: tuple[float, float] = setting(
        (1.0, 3.0), "Range of lambda, as in the paper.", low=0, high=1e6
    )
    vae_epochs: int = setting(10, "Passes of the built-in VAE over the data.", low=1, high=10**6)


class MarginalRepresentations(Synthesizer):
    """Outliers from marginal representations.

    Arguments:
        domain: The network that the outliers are for, or the
            :class:`~tie_ext.outliers.base.Domain` of its data.
        settings: How they are made.
        codec: A trained :class:`Codec`; None for a VAE that is trained once, at the first ``fit``.

    References:
        DMR, equations 5 to 7.
    """

    settings_class: ClassVar = MarginalSettings
    codec: Any
    mean: Tensor

    def __init__(
        self,
        domain: TIENet | Domain,
        settings: MarginalSettings | None = None,
        codec: nn.Module | None = None,
    ):
        super().__init__(domain, settings)
        self.own = codec is None
        # Not conditional: a VAE that is given the class does not put it into the code, and
        # subtracting its mean would change nothing.
        self.codec = VAE(domain, 32, conditional=False) if codec is None else codec
        # mu_y; NaN until fit.
        size = (self.num_classes, int(self.codec.latent_size))
        self.register_buffer("mean", torch.full(size, torch.nan))

    def fit(self, classifier: TIENet, loader: Loader, progress: float) -> dict[str, float]:
        """Train the built-in VAE and compute the mean code of each class, the first time. The
        classifier is not used.
        """
        if not self.mean.isnan().any():
            return {}
        epochs, device = self.settings.vae_epochs, self.mean.device
        losses = {"vae": fit_vae(self.codec, loader, epochs)} if self.own else {}
        sums, counts = torch.zeros_like(self.mean), torch.zeros(len(self.mean), device=device)
        codec = eval_view(self.codec)
        with torch.no_grad():
            for x, y in loader:
                y = y.to(device).long()
                sums.index_add_(0, y, codec.encode(x.to(self.low), y))
                counts += y.bincount(minlength=len(counts))
        sums, counts = total(sums, device), total(counts, device)
        self.mean.copy_(sums / counts[:, None])
        return losses

    @torch.no_grad()
    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """One outlier an image of the batch, each mixed of k images of different classes; all for
        the garbage class.
        """
        if self.mean.isnan().any():
            raise RuntimeError(
                "Expected a fitted codec to sample from, but got one without class means; "
                "call fit first"
            )
        x, y, codec = x.to(self.low), y.to(self.low.device).long(), eval_view(self.codec)
        w = codec.encode(x, y) - self.mean[y]
        mixed = w[self.partners(y)].mean(1)
        factor = torch.empty(len(x), 1, device=x.device).uniform_(*self.settings.scale)
        return self._garbage(self.clip(codec.decode(factor * mixed, y)))

    def partners(self, y: Tensor) -> Tensor:
        """Rows ``(B, k)`` of a batch to mix, for each of B outliers: a random image of each of k
        random classes that the batch has.
        """
        _, of, counts = y.unique(return_inverse=True, return_counts=True)
        rows, first = of.argsort(), counts.cumsum(0) - counts  # sorted by class; starts of classes
        order, k = (
            torch.rand(len(y), len(counts), device=y.device),
            min(self.settings.k, len(counts)),
        )
        chosen = order.topk(k, dim=1).indices
        member = (torch.rand(chosen.shape, device=y.device) * counts[chosen]).long()
        return rows[first[chosen] + member.minimum(counts[chosen] - 1)]


@torch.no_grad()
def marginal_features(
    encoder: Callable[[Tensor], Tensor],
    synthesizer: Synthesizer,
    loader: Loader,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Features of ID images and of one outlier for each, on which DMR's rejection network learns.

    Arguments:
        encoder: Penultimate features ``(B, C, S, S) -> (B, F)`` of the frozen classifier, in
            evaluation mode.
        synthesizer: Proposes the outliers; one that needs no classifier. It is fitted here.
        loader: The ID data.
        device: Where to compute.

    Returns:
        Features ``(N, F)``, and which of them are those of an outlier ``(N,)``, bool.
    """
    none: Any = None  # what works in a latent space has no use for a classifier
    with torch.enable_grad():
        synthesizer.to(device).fit(none, loader, 0.0)
    features, outlier = [], []
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        proposed = synthesizer.sample(none, x, y).x
        features += [encoder(x), encoder(proposed)]
        outlier += [torch.zeros(len(x), device=device), torch.ones(len(proposed), device=device)]
    return torch.cat(features), torch.cat(outlier).bool()


def fit_rejection(
    features: Tensor, outlier: Tensor, hidden: int = 128, epochs: int = 10, lr: float = 0.01
) -> nn.Module:
    """DMR's rejection network B, which separates features of outliers from those of ID images.

    Arguments:
        features: ``(N, F)``.
        outlier: Which are those of an outlier ``(N,)``, bool.
        hidden: Width of the hidden layer.
        epochs: Passes over the features (the paper: 10).
        lr: Learning rate of SGD with momentum 0.9 (the paper: 0.01).

    Returns:
        B, ``(B, F) -> (B, 1)``: log-odds of an outlier; larger = more OOD.

    Raises:
        ValueError: If either kind is missing.

    References:
        DMR, section 3.4, equation 8.
    """
    target = outlier.float()
    if target.mean() in (0, 1):
        raise ValueError(
            "Expected features of ID images and of outliers, "
            f"but got {int(target.sum())} outliers of {len(target)}"
        )
    layers = (nn.Linear(features.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1))
    network = nn.Sequential(*layers).to(features.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), device=features.device).split(128):
            log_odds = network(features[rows]).squeeze(1)
            loss = F.binary_cross_entropy_with_logits(log_odds, target[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return network
