"""A random sample of a loader's images, in a time that does not grow with their number."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from tie_ext.utils.distributed import rank, share, world
from tie_ext.utils.loader import check_loader, read_batch

LONGEST = 10**7
"""Indices read of a sampler, which may have no end."""


class SampledLoader:
    """At most so many images of a loader, the same at each reading.

    Of a ``DataLoader`` whose data set has indices, images are drawn: with its own ``collate_fn``
    and workers, and another sampler. Of a list, batches are drawn. Of anything else the first
    images are read, so that a stream has to be in random order.

    In several processes each reads its share: images that its ``DistributedSampler`` gives it;
    without one, each its part of a data set that all have; of other loaders its own.

    Arguments:
        loader: Batches, as :class:`~tie_ext.utils.loader.BatchReader` takes them.
        count: Images, in all processes together; None for all.
        seed: Of the sample. It is stratified where the data set has ``targets``, as torchvision's
            have; images whose target is < 0 are left out.
        name: What the loader is called in errors.
        rereadable: Whether it will be read more than once.

    Raises:
        TypeError: If the loader is no iterable.
        ValueError: If it gives no batches, or only once where twice is needed.
    """

    def __init__(
        self,
        loader: Iterable,
        count: int | None,
        seed: int,
        name: str = "loader",
        rereadable: bool = True,
    ):
        check_loader(loader, name, rereadable)
        rng = torch.Generator().manual_seed(seed)
        self.loader, self.name = loader, name
        self.whole = True  #: whether no image was left out
        self.left = LONGEST if count is None else share(count)
        self.keys: list[Hashable] | None = None
        if _has_indices(loader):
            self.keys, self.whole = _drawn(loader, count, rng)  # type: ignore[arg-type]
            self.loader = _reloaded(loader, self.keys, seed)  # type: ignore[arg-type]
        elif isinstance(loader, Sequence) and len(loader):
            first = len(read_batch(loader[0], name)[0])
            if first * len(loader) > self.left:
                order = torch.randperm(len(loader), generator=rng)
                self.loader = [loader[i] for i in order.tolist()]

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]  # TypeError, as progress bars expect

    def __iter__(self) -> Iterator[Any]:
        left = self.left
        for batch in self.loader:
            if left <= 0:
                self.whole = False
                return
            images, labels = read_batch(batch, self.name)
            if len(images) > left:
                self.whole, images = False, images[:left]
                labels = labels if labels is None else labels[:left]
            left -= len(images)
            yield images if labels is None else (images, labels)

    def peek(self) -> list:
        """A batch of the loader in a list, of one image where it has indices; an empty list for an
        empty loader.
        """
        few = self.loader if self.keys is None else _reloaded(self.loader, self.keys[:1], 0)  # type: ignore[arg-type]
        return list(islice(few, 1))


def stratified(labels: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Indices ``(min(count, N),)`` of a random sample, in random order, of which each class has
    its share; at least one image, where the count allows it.

    Arguments:
        labels: ``(N,)``, integers.
        count: Images.
        rng: Source of random numbers.
    """
    order = torch.randperm(len(labels), generator=rng)
    _, label, sizes = labels[order].unique(return_inverse=True, return_counts=True)
    by_class = label.argsort(stable=True)
    place = torch.empty_like(order)  # of each image among those of its class
    place[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[label[by_class]]
    chosen = order[(place / sizes[label]).argsort(stable=True)[:count]]
    return chosen[torch.randperm(len(chosen), generator=rng)]


def _has_indices(loader: Iterable) -> bool:
    return (
        isinstance(loader, DataLoader)
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def _drawn(
    loader: DataLoader, count: int | None, rng: torch.Generator
) -> tuple[list[Hashable], bool]:
    """Indices of this process's part of a sample, and whether it is of all images."""
    keys = _keys(loader)
    count = len(keys) if count is None else count
    targets = _targets(loader.dataset)
    if targets is None or not all(type(key) is int for key in keys):
        rows = torch.randperm(len(keys), generator=rng)[:count]
    else:
        labels = targets[torch.tensor(keys, dtype=torch.long)]
        known = (labels >= 0).nonzero()[:, 0]
        rows = known[stratified(labels[known], count, rng)] if len(known) else known
    whole = len(keys) <= count
    if isinstance(loader.sampler, DistributedSampler):
        return [keys[row] for row in rows[: share(count)].tolist()], whole
    return [keys[row] for row in rows[rank() :: world()].tolist()], whole


def _keys(loader: DataLoader) -> Sequence[Hashable]:
    """Indices of a loader's images, each once."""
    if type(loader.batch_sampler) is not BatchSampler:
        return list(dict.fromkeys(islice(chain.from_iterable(loader.batch_sampler), LONGEST)))  # type: ignore[arg-type]
    if type(loader.sampler) in (SequentialSampler, RandomSampler):
        return range(len(loader.dataset))  # type: ignore[arg-type]
    return list(dict.fromkeys(islice(loader.sampler, LONGEST)))


def _targets(dataset: Dataset) -> Tensor | None:
    """Labels ``(N,)`` that a data set has in memory; None where it has none."""
    if isinstance(dataset, Subset):
        of = _targets(dataset.dataset)
        return None if of is None else of[torch.as_tensor(dataset.indices)]
    try:
        found = torch.as_tensor(getattr(dataset, "targets", None))
    except (TypeError, ValueError, RuntimeError):
        return None  # labels of another kind, such as boxes
    whole = found.shape == (len(dataset),) and not found.is_floating_point()  # type: ignore[arg-type]
    return found.long() if whole else None


def _reloaded(loader: DataLoader, keys: list[Hashable], seed: int) -> DataLoader:
    """The loader over some of its images."""
    size = loader.batch_size or len(next(iter(loader.batch_sampler)))  # type: ignore[arg-type]
    workers = min(loader.num_workers, -(-len(keys) // size))
    return DataLoader(
        loader.dataset,
        size,
        sampler=keys,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout if workers else 0,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        generator=torch.Generator().manual_seed(seed),
    )
