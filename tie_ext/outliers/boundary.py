r"""Outliers at the boundary of the ID manifold, from a class-conditional VAE (S. Vernekar et al., 2019).

Symbols: ``g`` decoder, ``h`` encoder's mean, ``z (B, L)`` codes, ``x (B, D)`` flat images, ``J (B, D, L)`` the decoder's Jacobian at ``h(x)``.

Type I leaves the manifold: ``x + beta v`` with ``v`` a random unit vector normal to its tangent space, the column space of ``J``. Type II stays
on it and leaves the data: ``g(z)`` with z on the ellipsoid, of its class, that holds 95 % of the codes.
"""

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Batches, Candidates, Domain, Synthesizer
from tie_ext.outliers.vae import VAE, encoded, fit_vae
from tie_ext.utils.modules import evaluating
from tie_ext.utils.settings import Settings, setting


def tangent(vae: VAE, x: Tensor, y: Tensor) -> Tensor:
    """Orthonormal basis ``(B, D, L)`` of the manifold's tangent space at images ``(B, C, S, S)``: Q of a QR of the decoder's Jacobian.

    The D - L vectors of the null space are never built.

    References:
        Vernekar et al., section 3.1, equation 1.
    """
    return torch.linalg.qr(jacobian(vae, vae.encode(x, y), y)).Q


def jacobian(vae: VAE, z: Tensor, y: Tensor) -> Tensor:
    """Derivative ``(B, D, L)`` of the decoded images by their codes ``(B, L)``: L forward derivatives of the whole batch at once."""
    directions = torch.eye(z.shape[1], device=z.device)[:, None, :].expand(-1, len(z), -1)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch's own, of its first use of forward derivatives
        columns = vmap(lambda d: jvp(lambda code: vae.decode(code, y), (z,), (d,))[1])(directions)
    return columns.flatten(2).permute(1, 2, 0)


def normal(basis: Tensor, v: Tensor) -> Tensor:
    """Unit vectors ``(B, D)``: what is left of ``v (B, D)`` off the space that the orthonormal basis ``(B, D, L)`` spans."""
    left = v - (basis @ (basis.mT @ v[:, :, None]))[:, :, 0]
    return F.normalize(left, dim=1)


@dataclass(frozen=True)
class BoundarySettings(Settings):
    """How the VAE is trained, and how far off the manifold and the data the outliers lie."""

    latent_size: int = setting(
        8,
        "Length of the VAE's codes (the paper: 8 for MNIST, 10 for FashionMNIST).",
        low=1,
        high=4096,
    )
    vae_epochs: int = setting(
        10,
        'Passes of the VAE over the data; the paper trains "till convergence".',
        low=1,
        high=10**6,
    )
    beta: tuple[float, float] = setting(
        (0.1, 1.0),
        "Range of type I's step, as a share of the value range, as in the paper.",
        low=0,
        high=1e6,
    )
    inside: float = setting(
        0.95, "Share of a class's codes inside its ellipsoid.", low=0, high=1, above=True
    )


class ManifoldBoundary(Synthesizer):
    """Half of the candidates of type I, half of type II, from a class-conditional VAE that is trained once, at the first ``fit``.

    Arguments:
        domain: The network the outliers are for, or the :class:`tie_ext.outliers.base.Domain` of its data.
        settings: How they are made.

    References:
        S. Vernekar et al. *Out-of-distribution Detection in Classifiers via Generation*, arXiv:1910.04241, section 3.
    """

    settings_class: ClassVar = BoundarySettings
    mean: Tensor
    factor: Tensor
    radius: Tensor

    def __init__(self, domain: TIENet | Domain, settings: BoundarySettings | None = None):
        super().__init__(domain, settings)
        n, L = self.num_classes, self.settings.latent_size
        self.vae = VAE(domain, L)
        self.register_buffer("mean", torch.zeros(n, L))
        self.register_buffer(
            "factor", torch.eye(L).repeat(n, 1, 1)
        )  # of the covariances: S = factor factor^T
        self.register_buffer(
            "radius", torch.full((n,), math.nan)
        )  # NaN until the VAE has been trained

    def fit(self, classifier: TIENet, batches: Batches, progress: float) -> dict[str, float]:
        """Train the VAE and find each class's ellipsoid, the first time; the classifier plays no part in it."""
        if not self.radius.isnan().any():
            return {}
        loss = fit_vae(self.vae, batches, self.settings.vae_epochs)
        codes, labels = encoded(self.vae, batches)
        device = codes.device
        for c in range(len(self.mean)):
            z = codes[labels == c]
            self.mean[c] = z.mean(0)
            offset = z - self.mean[c]
            # A ridge, so that a class of few images has a covariance that can be inverted.
            covariance = offset.T @ offset / max(1, len(z) - 1) + 1e-4 * torch.eye(
                z.shape[1], device=device
            )
            self.factor[c] = torch.linalg.cholesky(covariance)
            distance = torch.linalg.solve_triangular(self.factor[c], offset.T, upper=False).norm(
                dim=0
            )
            self.radius[c] = distance.quantile(self.settings.inside)
        return {"vae": loss}

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Type I for the first half of the images, type II for the classes of the rest; both aimed at the garbage class."""
        self._check()
        x, y = x.to(self.low), y.to(self.low.device).long()
        half = len(x) // 2
        with evaluating(self.vae):
            images = torch.cat([self.off_manifold(x[:half], y[:half]), self.at_the_edge(y[half:])])
        return self._garbage(images)

    @torch.no_grad()
    def off_manifold(self, x: Tensor, y: Tensor) -> Tensor:
        """Type I: images ``(B, C, S, S)`` moved along a random normal of the manifold, clipped to the value range."""
        if not len(x):
            return x
        v = normal(
            tangent(self.vae, x, y), torch.randn(len(x), x[0].numel(), device=x.device)
        ).view_as(x)
        beta = torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(*self.settings.beta)
        # Paper: x + beta v with v a unit vector of all pixels. Here: clipped, because candidates stay in the value range.
        return self.clip(x + beta * (self.high - self.low) * v)

    @torch.no_grad()
    def at_the_edge(self, y: Tensor) -> Tensor:
        """Type II: decoded points ``(B, C, S, S)`` on the ellipsoids of the classes ``(B,)``; uniform in direction where it is a sphere."""
        direction = F.normalize(torch.randn(len(y), self.mean.shape[1], device=y.device), dim=1)
        step = self.radius[y, None] * (self.factor[y] @ direction[:, :, None])[:, :, 0]
        return self.vae.decode(self.mean[y] + step, y)

    def _check(self) -> None:
        if self.radius.isnan().any():
            raise RuntimeError(
                "Expected a trained VAE to sample from, but got an untrained one; call fit first"
            )
