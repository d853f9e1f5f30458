"""The conditional generator: from latent vectors ``z (B, Z)`` and soft class codes ``(B, n+1)`` to
images ``(B, C, H, W)``: the middle of squares of their longer side.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tie_ext.utils.bounded import Bounded

LARGEST = 11
"""Codes of more entries are scaled as codes of so many."""


class Generator(Bounded):
    """Four to six transposed convolutions from a latent vector and a soft code to an image.

    Arguments:
        image_shape: ``(C, H, W)`` of the images, C 1 or 3, the longer side 28 to 224 pixels.
        code_size: Length of the soft code, n+1.
        latent_size: Length Z of the latent vector.
        width: Channels of the last stage but the image; earlier stages have up to four times that.
        low: Smallest value of the data, a number or one per channel.
        high: Largest value of the data.

    Raises:
        ValueError: If the shape is too small or too large, or has neither one nor three channels.

    References:
        TIE, section 6.1: 4-6 transposed convolutions, normally distributed weights.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        code_size: int,
        latent_size: int = 64,
        width: int = 32,
        low: float | Sequence[float] | Tensor = 0.0,
        high: float | Sequence[float] | Tensor = 1.0,
    ):
        super().__init__(low, high)
        self.image_shape = check_image_shape(image_shape)
        channels, size = self.image_shape[0], max(self.image_shape[1:])
        self.code_size, self.latent_size = code_size, latent_size
        sizes = [size]  # from the image down to a seed of at most 7x7
        while sizes[-1] > 7:
            sizes.append(math.ceil(sizes[-1] / 2))
        sizes.reverse()
        sizes += [size] * max(0, 4 - len(sizes))  # the paper has four at least
        widths = [min(4, 2 ** (len(sizes) - 2 - i)) * width for i in range(len(sizes) - 1)]
        widths.append(channels)
        first = nn.ConvTranspose2d(latent_size + code_size, widths[0], sizes[0], bias=False)
        layers: list[nn.Module] = [first]
        for i in range(1, len(sizes)):
            cin, cout, last = widths[i - 1], widths[i], i == len(sizes) - 1
            layers += [nn.BatchNorm2d(cin), nn.ReLU(inplace=True)]
            layers.append(_upsample(cin, cout, sizes[i - 1], sizes[i], bias=last))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, code: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` in ``[low, high]``.

        Arguments:
            z: Latent vectors ``(B, Z)``.
            code: Soft codes ``(B, n+1)``, whose rows sum to 1.
        """
        # Of mean 0. The scale suits z of variance 1; it stops at ten classes and garbage.
        scaled = (code - 1 / self.code_size) * min(self.code_size, LARGEST)
        x = self.layers(torch.cat([z, scaled], dim=1)[:, :, None, None])
        _, H, W = self.image_shape
        top, left = (x.shape[2] - H) // 2, (x.shape[3] - W) // 2
        x = x[:, :, top : top + H, left : left + W].sigmoid()
        return self.from_unit(x).contiguous()  # the backbone decides on its layout


def _upsample(cin: int, cout: int, before: int, after: int, bias: bool) -> nn.ConvTranspose2d:
    """To the same size s, to 2s or to 2s - 1."""
    stride = 1 if after == before else 2
    return nn.ConvTranspose2d(cin, cout, 4 if after == 2 * before else 3, stride, 1, bias=bias)


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """The shape of images that a generator can make.

    Raises:
        ValueError: If it is not ``(1 or 3, H, W)`` with the longer side in [28, 224].
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or shape[0] not in (1, 3) or not 28 <= max(shape[1:]) <= 224:
        raise ValueError(
            "Expected an image shape (C, H, W) with C 1 or 3 and the longer side in [28, 224], "
            f"but got {shape}"
        )
    return shape[0], shape[1], shape[2]
