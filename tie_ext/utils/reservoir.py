"""A bounded random sample of a stream, by Vitter's algorithm R."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def replacements(seen: int, size: int, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Which new rows enter a sample, and where: each row of the stream is then in it with the same
    probability.

    Arguments:
        seen: Rows of the stream so far.
        size: Rows of a full sample.
        chance: A uniform number in [0, 1) for each new row ``(M,)``, float64; those of rows that
            fill the sample up are not used.

    Returns:
        Indices of the rows that enter ``(K,)``, and their places in the sample ``(K,)``, all
        different.

    References:
        J. S. Vitter. *Random Sampling with a Reservoir*, 1985, algorithm R.
    """
    count = torch.arange(seen, seen + len(chance))
    place = torch.where(count < size, count, (chance * (count + 1)).long())
    # Of two rows for one place the later wins, as if they had come one by one.
    last = {p: row for row, p in enumerate(place.tolist()) if p < size}
    rows, places = (torch.tensor(list(part), dtype=torch.long) for part in (last.values(), last))
    return rows, places


class Reservoir:
    """A uniform random sample of at most ``max_samples`` of all rows ``(M, ...)`` that were added.

    Arguments:
        max_samples: Rows kept, >= 1.
        generator: Of the random numbers, on the CPU; None for the global random state.
    """

    def __init__(self, max_samples: int, generator: torch.Generator | None = None):
        self.max_samples, self.seen, self.generator = max_samples, 0, generator
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, *columns: Tensor) -> None:
        """Offer rows ``(M, ...)``, in one tensor or in several that belong together row by row."""
        free = self.max_samples - min(self.seen, self.max_samples)
        if free:
            self.parts.append(tuple(column[:free].clone() for column in columns))
        self.seen += min(free, len(columns[0]))
        columns = tuple(column[free:] for column in columns)
        if len(columns[0]):
            self._replace(columns)

    def _replace(self, columns: tuple[Tensor, ...]) -> None:
        """Offer rows to a full sample."""
        if len(self.parts) > 1:
            self.parts = [self.columns]
        chance = torch.rand(len(columns[0]), dtype=torch.float64, generator=self.generator)
        rows, places = replacements(self.seen, self.max_samples, chance)
        for kept, column in zip(self.parts[0], columns, strict=True):
            kept[places.to(kept.device)] = column[rows.to(column.device)]
        self.seen += len(chance)

    def passing(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches; each is offered as it is read."""
        for batch in batches:
            self.add(*batch)
            yield batch

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The sample, in as many tensors as were offered together."""
        return tuple(torch.cat(parts) for parts in zip(*self.parts, strict=True))

    @property
    def rows(self) -> Tensor:
        """The sample, of the first tensor that was offered."""
        return self.columns[0] if self.parts else torch.empty(0, 0)
