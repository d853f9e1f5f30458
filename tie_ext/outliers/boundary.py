r"""Outliers at the boundary of the ID manifold, from a class-conditional VAE (S. Vernekar et al., 2019).

Symbols: ``g`` decoder, ``h`` encoder's mean, ``z (B, L)`` codes, ``x (B, D)`` flat images, ``J (B, D, L)`` the decoder's Jacobian at ``h(x)``.

Type I leaves the manifold: ``x + beta v`` with ``v`` a random unit vector normal to its tangent space, the column space of ``J``. Type II stays
on it and leaves the data: ``g(z)`` with z on the ellipsoid, of its class, that holds 95 % of the codes.
"""

import math
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vmap

from tie_ext.checks import check_number
from tie_ext.networks import Generator, TIENet, evaluating
from tie_ext.synthesis import Batches, Candidates, Synthesizer


class VAE(nn.Module):
    """A variational auto-encoder of ID images; an encoder/decoder pair for everything that works in a latent space.

    Arguments:
        image_shape: ``(C, S, S)``, S in [28, 224].
        num_classes: n.
        latent_size: L.
        conditional: Encoder and decoder know the class, so that the code holds what is left of the image; else the code holds it all.
        width: Channels of the first layer of the encoder and the last stage of the decoder.
        low: Smallest value of the data, a number or one a channel.
        high: Largest value of the data.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        latent_size: int = 8,
        conditional: bool = True,
        width: int = 16,
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
    ):
        super().__init__()
        check_number("latent_size", latent_size, 1, 4096, integer=True)
        self.num_classes, self.latent_size, self.conditional = num_classes, latent_size, conditional
        self.decoder = Generator(image_shape, num_classes, latent_size, width, low, high)
        layers: list[nn.Module] = []
        for cin, cout in ((image_shape[0] + num_classes, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * width, 2 * latent_size))
        self.encoder.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(B, L)`` of the codes of images ``(B, C, S, S)`` with labels ``(B,)``."""
        low, high = self.decoder.low, self.decoder.high
        planes = self.code(y)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        mean, log_variance = self.encoder(torch.cat([(x - low) / (high - low), planes], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """Codes ``(B, L)``: the posterior's mean."""
        return self.posterior(x, y)[0]

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Images ``(B, C, S, S)`` in ``[low, high]`` of codes ``(B, L)`` and labels ``(B,)``."""
        return self.decoder(z, self.code(y))

    def code(self, y: Tensor) -> Tensor:
        """What encoder and decoder are told of the class ``(B, n)``: one-hot, or nothing."""
        known = F.one_hot(y, self.num_classes).float()
        return known if self.conditional else torch.full_like(known, 1 / self.num_classes)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative evidence lower bound an image: squared error, as of a Gaussian with standard deviation 0.1 of the range, plus KL; nats."""
        low, high = self.decoder.low, self.decoder.high
        mean, log_variance = self.posterior(x, y)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = ((self.decode(z, y) - x) / (high - low)).square().flatten(1).sum(1) / (2 * 0.1**2)
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        return (error + divergence).mean()


def fit_vae(vae: VAE, batches: Batches, epochs: int, lr: float = 1e-3) -> float:
    """Train a VAE on ID data.

    Arguments:
        vae: The VAE; left in evaluation mode.
        batches: The ID data.
        epochs: Passes over it.
        lr: Adam's learning rate.

    Returns:
        Mean loss of the last pass, nats an image.
    """
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    device = vae.decoder.low.device
    for _ in range(epochs):
        losses = []
        for x, y in batches:
            if len(x) < 2:
                continue  # BatchNorm cannot learn from one image
            loss = vae.train().loss(x.to(device), y.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    vae.eval()
    return float(torch.stack(losses).mean())


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
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its first use of forward derivatives
        columns = vmap(lambda d: jvp(lambda code: vae.decode(code, y), (z,), (d,))[1])(directions)
    return columns.flatten(2).permute(1, 2, 0)


def normal(basis: Tensor, v: Tensor) -> Tensor:
    """Unit vectors ``(B, D)``: what is left of ``v (B, D)`` off the space that the orthonormal basis ``(B, D, L)`` spans."""
    left = v - (basis @ (basis.mT @ v[:, :, None]))[:, :, 0]
    return F.normalize(left, dim=1)


class ManifoldBoundary(Synthesizer):
    """Half of the candidates of type I, half of type II, from a class-conditional VAE that is trained once, at the first ``fit``.

    Arguments:
        image_shape: ``(C, S, S)`` of the images.
        num_classes: n.
        low: Smallest value of the data, a number or one a channel.
        high: Largest value of the data.
        latent_size: L (the paper: 8 for MNIST, 10 for FashionMNIST).
        vae_epochs: Passes over the data; the paper trains "till convergence".
        beta: Range of type I's step, as a share of the value range (the paper: [0.1, 1] of [0, 1]).
        inside: Share of a class's codes inside its ellipsoid.

    References:
        S. Vernekar et al. *Out-of-distribution Detection in Classifiers via Generation*, arXiv:1910.04241, section 3.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
        latent_size: int = 8,
        vae_epochs: int = 10,
        beta: tuple[float, float] = (0.1, 1.0),
        inside: float = 0.95,
    ):
        super().__init__()
        check_number("vae_epochs", vae_epochs, 1, 10**6, integer=True)
        check_number("inside", inside, 0, 1, above=True)
        self.vae = VAE(image_shape, num_classes, latent_size, low=low, high=high)
        self.vae_epochs, self.beta, self.inside = vae_epochs, beta, inside
        self.register_buffer("mean", torch.zeros(num_classes, latent_size))
        self.register_buffer("factor", torch.eye(latent_size).repeat(num_classes, 1, 1))  # of the covariances: S = factor factor^T
        self.register_buffer("radius", torch.full((num_classes,), math.nan))  # NaN until the VAE has been trained

    mean: Tensor
    factor: Tensor
    radius: Tensor

    def fit(self, classifier: TIENet, batches: Batches, progress: float) -> dict[str, float]:
        """Train the VAE and find each class's ellipsoid, the first time; the classifier plays no part in it."""
        if not self.radius.isnan().any():
            return {}
        loss = fit_vae(self.vae, batches, self.vae_epochs)
        device = self.mean.device
        with torch.no_grad():
            pairs = [(self.vae.encode(x.to(device), y.to(device)), y.to(device)) for x, y in batches]
        codes, labels = torch.cat([z for z, _ in pairs]), torch.cat([y for _, y in pairs])
        for c in range(len(self.mean)):
            z = codes[labels == c]
            self.mean[c] = z.mean(0)
            offset = z - self.mean[c]
            # A ridge, so that a class of few images has a covariance that can be inverted.
            covariance = offset.T @ offset / max(1, len(z) - 1) + 1e-4 * torch.eye(z.shape[1], device=device)
            self.factor[c] = torch.linalg.cholesky(covariance)
            distance = torch.linalg.solve_triangular(self.factor[c], offset.T, upper=False).norm(dim=0)
            self.radius[c] = distance.quantile(self.inside)
        return {"vae": loss}

    def sample(self, classifier: TIENet, x: Tensor, y: Tensor) -> Candidates:
        """Type I for the first half of the images, type II for the classes of the rest; both aimed at the garbage class."""
        self._check()
        half = len(x) // 2
        with evaluating(self.vae):
            images = torch.cat([self.off_manifold(x[:half], y[:half]), self.at_the_edge(y[half:])])
        return Candidates(images, torch.full((len(x),), classifier.num_classes, device=x.device))

    @torch.no_grad()
    def off_manifold(self, x: Tensor, y: Tensor) -> Tensor:
        """Type I: images ``(B, C, S, S)`` moved along a random normal of the manifold, clipped to the value range."""
        low, high = self.vae.decoder.low, self.vae.decoder.high
        if not len(x):
            return x
        v = normal(tangent(self.vae, x, y), torch.randn(len(x), x[0].numel(), device=x.device)).view_as(x)
        beta = torch.empty(len(x), 1, 1, 1, device=x.device).uniform_(*self.beta)
        # Paper: x + beta v with v a unit vector of all pixels. Here: clipped, because candidates stay in the value range.
        return torch.minimum(torch.maximum(x + beta * (high - low) * v, low), high)

    @torch.no_grad()
    def at_the_edge(self, y: Tensor) -> Tensor:
        """Type II: decoded points ``(B, C, S, S)`` on the ellipsoids of the classes ``(B,)``; uniform in direction where it is a sphere."""
        direction = F.normalize(torch.randn(len(y), self.mean.shape[1], device=y.device), dim=1)
        step = self.radius[y, None] * (self.factor[y] @ direction[:, :, None])[:, :, 0]
        return self.vae.decode(self.mean[y] + step, y)

    def _check(self) -> None:
        if self.radius.isnan().any():
            raise RuntimeError("Expected a trained VAE to sample from, but got an untrained one; call fit first")
