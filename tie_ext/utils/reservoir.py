"""A bounded random sample of what passes by, by Vitter's algorithm R."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Reservoir:
    """A uniform random sample of at most ``most`` of all rows ``(M, ...)`` that were added.

    Arguments:
        most: Rows kept, >= 1.
        generator: Of the random numbers, on the CPU; None for the global random state.
    """

    def __init__(self, most: int, generator: torch.Generator | None = None):
        self.most, self.seen, self.generator = most, 0, generator
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, *columns: Tensor) -> None:
        """Offer rows ``(M, ...)``, in one tensor or in several that belong together, row by row."""
        count, free = len(columns[0]), self.most - min(self.seen, self.most)
        if free:
            self.parts.append(tuple(column[:free].clone() for column in columns))
        if rest := max(0, count - free):
            if len(self.parts) > 1:
                self.parts = [self.columns]
            chance = torch.rand(rest, dtype=torch.float64, generator=self.generator)
            place = (chance * torch.arange(self.seen + free + 1, self.seen + count + 1)).long()
            taken = (place < self.most).nonzero()[:, 0]
            # Of two rows for one place the later wins, as if they had come one by one.
            last = dict(zip(place[taken].tolist(), taken.tolist(), strict=True))
            to, of = (
                torch.tensor(list(rows), dtype=torch.long) for rows in (last.keys(), last.values())
            )
            for kept, column in zip(self.parts[0], columns, strict=True):
                kept[to.to(kept.device)] = column[free:][of.to(column.device)]
        self.seen += count

    def passing(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches; each is offered as it goes by."""
        for batch in batches:
            self.add(*batch)
            yield batch

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The sample, as many tensors as were offered together."""
        return tuple(torch.cat(parts) for parts in zip(*self.parts, strict=True))

    @property
    def rows(self) -> Tensor:
        """The sample, where one tensor was offered."""
        return self.columns[0] if self.parts else torch.empty(0, 0)
