"""OpenOOD's loaders of ID images, read alike wherever they come from.

``main.py`` gives training images augmented and in random order, the evaluation API gives them as
they are tested. What is fitted to one of them has to be fitted to the other.
"""

from collections.abc import Iterator

import torch
from openood.utils.config import Config
from torch import Tensor
from torch.utils.data import DataLoader

from tie_ext.openood.network import normalization, value_range

BATCH_SIZE = 128
MAX_IMAGES = 50_000
"""Images that are read of a loader: all of CIFAR's, and a random sample of ImageNet's."""


class PlainImages:
    """Batches ``(x, y)`` of one of OpenOOD's loaders, the images prepared as for tests.

    Images are ``(B, 3, S, S)``. Their order and the batch size are the same for every script, seed
    and number of processes, so that what is computed from them is the same to the last bit. The
    order is random, as OpenOOD's lists are sorted by class. Of more than :data:`MAX_IMAGES` those
    that come first are read.

    Arguments:
        loader: The loader, batches ``{"data": ..., "data_aux": ..., "label": ...}``.
        tested: A loader of test or validation images; None for none. Where both loaders prepare
            images alike, ``data`` is read, and ``data_aux`` where they do not: OpenOOD puts the
            image without augmentation there.
    """

    def __init__(self, loader: DataLoader, tested: DataLoader | None = None):
        plain = tested is not None and _transform(loader) is _transform(tested)
        self.loader, self.key = _ordered(loader), "data" if plain else "data_aux"

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        while True:
            # Augmentation draws random numbers, also where its images are not used.
            with torch.random.fork_rng(devices=[]):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch.get(self.key, batch["data"]), batch["label"]


def _transform(loader: DataLoader) -> object:
    return getattr(getattr(loader, "dataset", None), "preprocessor", None)


def _ordered(loader: DataLoader) -> DataLoader:
    """The same images in batches and in an order that depend on their number alone."""
    if not isinstance(loader, DataLoader):
        return loader
    rng = torch.Generator().manual_seed(0)  # none of it comes from the global random state
    order = torch.randperm(len(loader.dataset), generator=rng)[:MAX_IMAGES].tolist()  # type: ignore[arg-type]
    return DataLoader(
        loader.dataset, BATCH_SIZE, sampler=order, num_workers=loader.num_workers, generator=rng
    )


def value_range_of(loader: DataLoader, dataset: Config | None) -> tuple[list[float], list[float]]:
    """What a loader's transform makes of 0 and of 1, one number a channel.

    Read from the transform's last step, ``Normalize``, or else from the config of the data set,
    which the evaluation API does not give to a postprocessor that is passed to it.
    """
    preprocessor = _transform(loader)
    transform = getattr(preprocessor, "transform", preprocessor)
    last = (getattr(transform, "transforms", None) or [transform])[-1]
    mean, std = normalization(dataset and (dataset.normalization_type or dataset.name))
    return value_range(getattr(last, "mean", mean), getattr(last, "std", std))
