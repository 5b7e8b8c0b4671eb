"""The logits of all columns of a batch, computed once for what its rows have in common and copied to the rows when read."""

from __future__ import annotations

from torch import Tensor

from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.lazy_logits import LazyLogits
from subquad.runtime.prefix_tree import Sharing
from subquad.runtime.shared_prompt import run_shared


class SharedLogits:
    """Where rows of LazyLogits [B, T, V] come from: the logits of each node of the tree, and of each row's own columns.

    Columns of padding are zero.
    """

    def __init__(self, engine: DecodeEngine, ids: Tensor, mask: Tensor | None, sharing: Sharing) -> None:
        """Runs the model on ids [B, T]; mask [B, T] is zero where they are padding."""
        self.shape = (*ids.shape, 0)
        nodes: list[Tensor] = []
        own, _, self.ran = run_shared(engine, ids, mask, sharing, 0, every=nodes)
        begin = sharing.begin.tolist()
        length = [ids.shape[1]] * ids.shape[0] if mask is None else (mask != 0).sum(1).tolist()
        order, shared = sharing.order.tolist(), sharing.shared.tolist()
        self.shape = (*ids.shape, own.shape[1])
        self.parts: list[tuple[int, int, Tensor]] = []
        """(row of the batch, first column, logits of the columns from there on)."""
        for node, found in zip(sharing.nodes, nodes, strict=True):
            self.parts += [(row, begin[row] + node.start, found) for row in order[node.first : node.first + node.rows]]
        counts = [length[row] - end for row, end in zip(order, shared, strict=True)]
        for row, end, found in zip(order, shared, own.split(counts), strict=True):
            self.parts.append((row, begin[row] + end, found))

    def row(self, index: int) -> Tensor:
        """The logits [B, V] of column `index`."""
        out = self.parts[0][2].new_zeros(self.shape[0], self.shape[2])
        for row, first, found in self.parts:
            if first <= index < first + len(found):
                out[row] = found[index - first]
        return out

    def full(self) -> Tensor:
        """All logits [B, T, V]."""
        out = self.parts[0][2].new_empty(self.shape)
        for row, first, found in self.parts:
            out[row, first : first + len(found)] = found
        for row in range(self.shape[0]):
            begin = min(first for n, first, _ in self.parts if n == row)
            end = max(first + len(found) for n, first, found in self.parts if n == row)
            out[row, :begin] = 0
            out[row, end:] = 0
        return out

    def lazily(self) -> Tensor:
        """Logits of the shape, which take memory for all rows when more than single columns of them are read."""
        some = self.parts[0][2]
        return LazyLogits(self.row, self.full, self.shape, some.dtype, some.device)
