"""Batches of images, as networks take them: float in [0, 1] or in a network's value range.

torch's ``DataLoader`` decodes images from disk (:mod:`tie_ext.cli.images`). It does not make the
batches: collating single images takes twenty times as long as indexing a tensor of them, and its
workers would hold batches instead of small pieces in memory.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tie_ext.cli.images import ImageSet
from tie_ext.training.attach import KEPT
from tie_ext.utils.bounded import Bounded
from tie_ext.utils.checks import check_number
from tie_ext.utils.subset import stratified

SCORING = 500
"""Images per batch where nothing is trained."""


def shifted(x: Tensor, max_shift: int) -> Tensor:
    """Each image shifted at random: a crop of the padded image, as OpenOOD trains with.

    Arguments:
        x: Images ``(B, C, H, W)``; pixels that move in are 0.
        max_shift: Largest shift in either direction, in pixels; 0 leaves the images, and the
            random state, as they are.
    """
    if max_shift == 0:
        return x
    B, _, H, W = x.shape
    top, left = torch.randint(2 * max_shift + 1, (2, B, 1)).to(x.device)
    rows, columns = top + torch.arange(H, device=x.device), left + torch.arange(W, device=x.device)
    padded, image = F.pad(x, (max_shift,) * 4), torch.arange(B, device=x.device)[:, None, None]
    crops = padded[image, :, rows[:, :, None], columns[:, None, :]]
    # Contiguous: indexing leaves the channels last, on which backbones that use `view` fail.
    return crops.permute(0, 3, 1, 2).contiguous()


def scaled(x: Tensor, bounds: Bounded | None) -> Tensor:
    """Images uint8 ``(B, C, S, S)`` as float in the value range of a network, on its device; in
    [0, 1] for None.
    """
    if bounds is None:
        return x.float() / 255
    return bounds.from_unit(x.to(bounds.low.device).float() / 255)


class ImageBatches:
    """Re-iterable batches ``(x, y)`` of images, float and int64.

    Arguments:
        images: The set.
        batch_size: Images per batch; the last batch may be smaller.
        shuffle: Give a new order at each iteration, from torch's global random state.
        shift: Largest random shift in pixels (:func:`shifted`).
        scale: What knows the value range of the images, on their device; None for [0, 1].
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int = SCORING,
        shuffle: bool = False,
        shift: int = 0,
        scale: Bounded | None = None,
    ):
        check_number("batch_size", batch_size, 1, 10**6, integer=True)
        check_number("shift", shift, 0, images.shape[-1], integer=True)
        self.images, self.batch_size, self.shuffle = images, batch_size, shuffle
        self.shift, self.scale = shift, scale

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def _order(self) -> Tensor:
        return torch.randperm(len(self.images)) if self.shuffle else torch.arange(len(self.images))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = self._order().split(self.batch_size)
        for part, pixels in zip(rows, self.images.parts(rows), strict=True):
            yield scaled(shifted(pixels, self.shift), self.scale), self.images.y[part]


def sampled_batches(
    images: ImageSet, seed: int, batch_size: int = SCORING, scale: Bounded | None = None
) -> ImageBatches:
    """Batches of as many images as :func:`tie_ext.attach` reads, drawn at random by class.

    Arguments:
        images: The set.
        seed: Of the sample.
        batch_size: Images per batch.
        scale: As for :class:`ImageBatches`.
    """
    rows = stratified(images.y, KEPT, torch.Generator().manual_seed(seed))
    return ImageBatches(images.take(rows), batch_size, scale=scale)


def training_batches(
    images: ImageSet, batch_size: int = 128, shift: int | None = None, scale: Bounded | None = None
) -> ImageBatches:
    """Shuffled batches of shifted images, for training.

    The shift is not only for accuracy: tau comes from the uncertainty of training images, which
    falls to 0 for images that the network has learned by heart.

    Arguments:
        images: The set.
        batch_size: Images per batch.
        shift: Largest shift in pixels; None for an eighth of the image's side (28 pixels: 3; 32
            pixels: 4, as OpenOOD's crops).
        scale: As for :class:`ImageBatches`.
    """
    shift = images.shape[-1] // 8 if shift is None else shift
    return ImageBatches(images, batch_size, shuffle=True, shift=shift, scale=scale)
