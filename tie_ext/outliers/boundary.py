r"""Outliers at the boundary of the ID manifold, from a class-conditional VAE (Vernekar et al.).

Symbols: ``g`` decoder, ``h`` mean of the encoder, ``z (B, L)`` codes, ``x (B, D)`` flat images,
``J (B, D, L)`` Jacobian of the decoder at ``h(x)``.

Type I leaves the manifold: ``x + beta v``, with ``v`` a random unit vector normal to its tangent
space, which is the column space of ``J``. Type II stays on the manifold and leaves the data:
``g(z)``, with z on the ellipsoid that holds 95 % of the codes of its class.
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
from tie_ext.outliers.base import Candidates, Domain, Loader, Synthesizer
from tie_ext.outliers.vae import VAE, encode_all, fit_vae
from tie_ext.utils.settings import Settings, setting
from tie_ext.utils.views import eval_view

RIDGE = 1e-4
"""Added to a covariance, so that that of a class of few images can be inverted."""


def tangent(vae: VAE, x: Tensor, y: Tensor) -> Tensor:
    """Orthonormal basis ``(B, D, L)`` of the tangent space of the manifold at images
    ``(B, C, S, S)``: Q of a QR decomposition of the decoder's Jacobian.

    The D - L vectors of the null space are never computed.

    References:
        Vernekar et al., section 3.1, equation 1.
    """
    return torch.linalg.qr(jacobian(vae, vae.encode(x, y), y)).Q


def jacobian(vae: VAE, z: Tensor, y: Tensor) -> Tensor:
    """Derivative ``(B, D, L)`` of the decoded images with respect to their codes ``(B, L)``: L
    forward derivatives, each of the whole batch.
    """
    directions = torch.eye(z.shape[1], device=z.device)[:, None, :].expand(-1, len(z), -1)
    with warnings.catch_warnings():
        # torch's own, when forward derivatives are first used.
        warnings.simplefilter("ignore", FutureWarning)
        columns = vmap(lambda d: jvp(lambda code: vae.decode(code, y), (z,), (d,))[1])(directions)
    return columns.flatten(2).permute(1, 2, 0)


def normal(basis: Tensor, v: Tensor) -> Tensor:
    """Unit vectors ``(B, D)``: the part of ``v (B, D)`` that is orthogonal to the space of the
    orthonormal basis ``(B, D, L)``.
    """
    return F.normalize(v - (basis @ (basis.mT @ v[:, :, None]))[:, :, 0], dim=1)


@dataclass(frozen=True)
class BoundarySettings(Settings):
    """How the VAE is trained, and how far the outliers lie off the manifold and the data."""

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
        0.95, "Share of the codes of a class inside its ellipsoid.", low=0, high=1, above=True
    )


class ManifoldBoundary(Synthesizer):
    """Outliers from a class-conditional VAE, half of type I and half of type II. The VAE is
    trained once, at the first ``fit``.

    Arguments:
        domain: The network that the outliers are for, or the
            :class:`~tie_ext.outliers.base.Domain` of its data.
        settings: How they are made.

    References:
        S. Vernekar et al. *Out-of-distribution Detection in Classifiers via Generation*,
        arXiv:1910.04241, section 3.
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
        # Of the covariance: S = factor factor^T.
        self.register_buffer("factor", torch.eye(L).repeat(n, 1, 1))
        # NaN until the VAE is trained.
        self.register_buffer("radius", torch.full((n,), math.nan))

    def fit(self, classifier: TIENet, loader: Loader, progress: float) -> dict[str, float]:
        """Train the VAE and compute the ellipsoid of each class, the first time. The classifier is
        not used.
        """
        if not self.radius.isnan().any():
            return {}
        loss = fit_vae(self.vae, loader, self.settings.vae_epochs)
        codes, labels = encode_all(self.vae, loader)
        ridge = RIDGE * torch.eye(codes.shape[1], device=codes.device)
        for c in range(len(self.mean)):
            z = codes[labels == c]
            self.mean[c] = z.mean(0)
            offset = z - self.mean[c]
            covariance = offset.T @ offset / max(1, len(z) - 1) + ridge
            self.factor[c] = torch.linalg.cholesky(covariance)
            whitened = torch.linalg.solve_triangular(self.factor[c], offset.T, upper=False)
            self.radius[c] = whitened.norm(dim=0).quantile(self.settings.inside)
        return {"vae": loss}

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Type I of the first half of the images, type II of the classes of the others; all for
        the garbage class.
        """
        if self.radius.isnan().any():
            raise RuntimeError(
                "Expected a trained VAE to sample from, but got an untrained one; call fit first"
            )
        x, y = x.to(self.low), y.to(self.low.device).long()
        half = len(x) // 2
        images = [self.off_manifold(x[:half], y[:half]), self.on_ellipsoid(y[half:])]
        return self._garbage(torch.cat(images))

    @torch.no_grad()
    def off_manifold(self, x: Tensor, y: Tensor) -> Tensor:
        """Type I: images ``(B, C, S, S)`` moved along a random normal of the manifold, clipped to
        the value range.
        """
        if not len(x):
            return x
        basis = tangent(eval_view(self.vae), x, y)
        v = normal(basis, torch.randn(len(x), x[0].numel(), device=x.device)).view_as(x)
        beta = torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(*self.settings.beta)
        # Paper: x + beta v with v a unit vector of all pixels. Here: clipped, because candidates
        # stay in the value range.
        return self.clip(x + beta * (self.high - self.low) * v)

    @torch.no_grad()
    def on_ellipsoid(self, y: Tensor) -> Tensor:
        """Type II: decoded points ``(B, C, S, S)`` on the ellipsoids of the classes ``(B,)``.
        Directions are uniform before the ellipsoid stretches them.
        """
        direction = F.normalize(torch.randn(len(y), self.mean.shape[1], device=y.device), dim=1)
        step = self.radius[y, None] * (self.factor[y] @ direction[:, :, None])[:, :, 0]
        return eval_view(self.vae).decode(self.mean[y] + step, y)
