"""A variational auto-encoder of ID images, for the outliers that are proposed in a latent space.

Symbols: ``x (B, C, S, S)`` images, ``y (B,)`` labels, ``z (B, L)`` codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tie_ext.models.generator import Generator
from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Batches, Domain
from tie_ext.utils.checks import check_number
from tie_ext.utils.distributed import average_gradients, average_statistics, broadcast, gathered
from tie_ext.utils.modules import Bounded


class VAE(Bounded):
    """A variational auto-encoder of ID images; an encoder/decoder pair for everything that works in a latent space.

    Arguments:
        domain: Number of classes, shape ``(C, S, S)``, S in [28, 224], and value range of the images.
        latent_size: L.
        conditional: Encoder and decoder know the class, so that the code holds what is left of the image; else the code holds it all.
        width: Channels of the first layer of the encoder and the last stage of the decoder.
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
        self.num_classes, self.latent_size, self.conditional = (
            domain.num_classes,
            latent_size,
            conditional,
        )
        self.decoder = Generator(
            domain.image_shape or (), domain.num_classes, latent_size, width, self.low, self.high
        )
        self.first = nn.Conv2d(self.decoder.image_shape[0], width, 3, 2, 1, bias=False)
        self.told = nn.Linear(
            domain.num_classes, width, bias=False
        )  # a class adds to each channel what a plane of ones beside the image would
        layers: list[nn.Module] = [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        for cin, cout in ((width, 2 * width), (2 * width, 4 * width)):
            layers += [
                nn.Conv2d(cin, cout, 3, 2, 1, bias=False),
                nn.BatchNorm2d(cout),
                nn.ReLU(inplace=True),
            ]
        self.encoder = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * width, 2 * latent_size)
        )
        self.to(memory_format=torch.channels_last)

    def posterior(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance ``(B, L)`` of the codes of images ``(B, C, S, S)`` with labels ``(B,)``."""
        seen = self.first(self.unit(x.to(self.low))) + self.told(self.code(y))[:, :, None, None]
        mean, log_variance = self.encoder(seen).chunk(2, dim=1)
        return mean, log_variance.clamp(-10, 10)

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """Codes ``(B, L)``: the posterior's mean."""
        return self.posterior(x, y)[0]

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Images ``(B, C, S, S)`` in ``[low, high]`` of codes ``(B, L)`` and labels ``(B,)``."""
        return self.decoder(z, self.code(y))

    def code(self, y: Tensor) -> Tensor:
        """What encoder and decoder are told of the class ``(B, n)``: one-hot, or nothing."""
        known = F.one_hot(y.long(), self.num_classes).float()
        return known if self.conditional else torch.full_like(known, 1 / self.num_classes)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative evidence lower bound an image: squared error, as of a Gaussian with standard deviation 0.1 of the range, plus KL; nats."""
        mean, log_variance = self.posterior(x, y)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        error = (self.unit(self.decode(z, y)) - self.unit(x)).square().flatten(1).sum(1) / (
            2 * 0.1**2
        )
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        return (error + divergence).mean()


def fit_vae(vae: VAE, batches: Batches, epochs: int, lr: float = 1e-3) -> float:
    """Train a VAE on ID data; under ``torch.distributed`` the processes train one, each on its share.

    Arguments:
        vae: The VAE; left in evaluation mode.
        batches: The ID data.
        epochs: Passes over it.
        lr: Adam's learning rate.

    Returns:
        Mean loss of the last pass, nats an image.

    Raises:
        ValueError: If no batch has two images.
    """
    broadcast(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr)
    losses: list[Tensor] = []
    for _ in range(epochs):
        losses = []
        for x, y in batches:
            if len(x) < 2:
                continue  # BatchNorm cannot learn from one image
            loss = vae.train().loss(x.to(vae.low), y.to(vae.low.device).long())
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
def encoded(vae: VAE, batches: Batches) -> tuple[Tensor, Tensor]:
    """Codes ``(N, L)`` and labels ``(N,)`` of the ID data of all processes; the VAE is in evaluation mode."""
    device = vae.low.device
    pairs = [
        (vae.encode(x.to(vae.low), y.to(device).long()), y.to(device).long()) for x, y in batches
    ]
    codes, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    return gathered(codes, device), gathered(labels, device)
