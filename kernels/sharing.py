"""Finds which query rows read the same stored rows of a segment, so that their queries can share one product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Stored rows start .. start + stored - 1, each read by `shared` query rows.

    order: the query rows [stored * shared], those of the first stored row first; None for all of them in order.
    """

    start: int
    stored: int
    shared: int
    order: Tensor | None

    def of(self, tensor: Tensor) -> Tensor:
        """The stored rows of [Bs, ..]."""
        return tensor if self.stored == tensor.shape[0] else tensor[self.start : self.start + self.stored]

    def queries(self, tensor: Tensor) -> Tensor:
        """The query rows of [B, ..]; a tensor [1, ..] holds for every row and stays."""
        return tensor if self.order is None or tensor.shape[0] == 1 else tensor.index_select(0, self.order)


def runs(rows: Tensor | None, batch: int) -> list[Run]:
    """A partition of the query rows into runs; rows int64 [B], or None where row b reads row b."""
    if rows is None:
        return [Run(0, batch, 1, None)]
    read = rows.tolist()
    if not read:
        return []
    if read.count(read[0]) == batch:
        return [Run(read[0], 1, batch, None)]
    if read == list(range(read[0], read[0] + batch)):
        return [Run(read[0], batch, 1, None)]
    readers: dict[int, list[int]] = {}
    for query, source in enumerate(read):
        readers.setdefault(source, []).append(query)
    found: list[tuple[int, list[list[int]]]] = []
    for source in sorted(readers):
        start, groups = found[-1] if found else (0, [])
        if groups and start + len(groups) == source and len(groups[0]) == len(readers[source]):
            groups.append(readers[source])
        else:
            found.append((source, [readers[source]]))
    return [_run(start, groups, batch) for start, groups in found]


def _run(start: int, groups: list[list[int]], batch: int) -> Run:
    flat = [query for group in groups for query in group]
    whole = flat == list(range(batch))
    return Run(start, len(groups), len(groups[0]), None if whole else torch.tensor(flat))
