"""A variational auto-encoder of ID images, for outliers that are proposed in a latent space.

Symbols: ``x (B, C, S, S)`` images, ``y (B,)`` labels, ``z (B, L)`` codes.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext.models.generator import Generator
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Domain, Loader
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.checks import check_number
from tie_ext.utils.distributed import average_gradients, average_statistics, broadcast, gathered

DEVIATION = 0.1
"""Of the decoder's Gaussian, as a share of the value range."""


class VAE(Bounded):
    """A variational auto-encoder of ID images.

    Arguments:
        domain: Number of classes, shape ``(C, S, S)``, S in [28, 224], and value range.
        latent_size: L.
        conditional: Whether encoder and decoder are given the class, so that the code holds the
            rest of the image; else the code holds all of it.
        width: Channels of the first layer of the encoder and of the last stage of the decoder.
    """

    def __init__(
        self,
        domain: TIENet | Domain,
        latent_size: int = 8,
        conditional: bool = True,
        width: int = 16,
    ):
        super().__init__(domain.low.cpu(), domain.high.cpu())
        check_number("latent_size", latent_size, 1, 4096, integer=True)
        self.num_classes, self.latent_size = domain.num_classes, latent_size
        self.conditional = conditional
        self.decoder = Generator(
            domain.image_shape or (), domain.num_classes, latent_size, width, self.low, self.high
        )
        self.first = nn.Conv2d(self.decoder.image_shape[0], width, 3, 2, 1, bias=False)
        # A class adds a number to each channel, as a constant plane beside the image would.
        self.told = nn.Linear(domain.num_classes, width, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        for cin, cout in pairwise((width, 2 * width, 4 * width)):
            convolution = nn.Conv2d(cin, cout, 3, 2, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]
        last = nn.Linear(64 * width, 2 * latent_size)
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), last)
        self.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(B, L)`` of the codes of images ``(B, C, S, S)`` with labels
        ``(B,)``.
        """
        maps = self.first(self.to_unit(x.to(self.low))) + self.told(self.code(y))[:, :, None, None]
        mean, log_variance = self.encoder(maps).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """Codes ``(B, L)``: the mean of the posterior."""
        return self.posterior(x, y)[0]

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Images ``(B, C, S, S)`` in ``[low, high]`` of codes ``(B, L)`` and labels ``(B,)``."""
        return self.decoder(z, self.code(y))

    def code(self, y: Tensor) -> Tensor:
        """The class as encoder and decoder are given it, ``(B, n)``: one-hot, or the same for
        all.
        """
        known = F.one_hot(y.long(), self.num_classes).float()
        return known if self.conditional else torch.full_like(known, 1 / self.num_classes)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative evidence lower bound, nats per image: squared error of a Gaussian of
        :data:`DEVIATION`, plus the KL divergence of the posterior.
        """
        mean, log_variance = self.posterior(x, y)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        squares = (self.to_unit(self.decode(z, y)) - self.to_unit(x)).square()
        error = squares.flatten(1).sum(1) / (2 * DEVIATION**2)
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        return (error + divergence).mean()


def fit_vae(vae: VAE, loader: Loader, epochs: int, lr: float = 1e-3) -> float:
    """Train a VAE on ID data; under ``torch.distributed`` the processes train one, each on its
    share.

    Arguments:
        vae: The VAE; left in evaluation mode.
        loader: The ID data.
        epochs: Passes over it.
        lr: Learning rate of Adam.

    Returns:
        Mean loss of the last pass, nats per image.

    Raises:
        ValueError: If no batch has two images.
    """
    broadcast(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    losses: list[Tensor] = []
    vae.train()
    for _ in range(epochs):
        losses = []
        for x, y in loader:
            if len(x) < 2:
                continue  # BatchNorm cannot learn from one image
            loss = vae.loss(x.to(vae.low), y.to(vae.low.device).long())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(vae)
            optimizer.step()
            losses.append(loss.detach())
    average_statistics(vae)
    vae.eval()
    if not losses:
        raise ValueError(
            "Expected batches of two or more ID images to train a VAE on, but got none"
        )
    return float(gathered(torch.stack(losses), vae.low.device).mean())


@torch.no_grad()
def encode_all(vae: VAE, loader: Loader) -> tuple[Tensor, Tensor]:
    """Codes ``(N, L)`` and labels ``(N,)`` of the ID data of all processes, by a VAE in evaluation
    mode.
    """
    device = vae.low.device
    pairs = [
        (vae.encode(x.to(vae.low), y), y) for x, y in ((x, y.to(device).long()) for x, y in loader)
    ]
    codes, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return gathered(codes, device), gathered(labels, device)
