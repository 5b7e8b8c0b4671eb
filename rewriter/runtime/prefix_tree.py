"""Finds what the rows of a batch of token ids have in common: one shared prefix, or a tree of prefixes with few levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Node:
    """Columns start .. stop - 1 that the sorted rows first .. first + rows - 1 have in common."""

    start: int
    stop: int
    first: int
    rows: int


@dataclass(frozen=True)
class Level:
    """One level of segments: node n holds columns starts[n] .. starts[n] + lengths[n] - 1.

    rows [B]: the node each sorted row reads; a row whose node has length 0 shares nothing on this level.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Sharing:
    """What rows share.

    order [B]: the row of the batch at each sorted place; place [B], its inverse, undoes it: sorted[place] is the batch
    again. begin [B]: the first real column of each row of the batch, its left padding; all columns of nodes count from
    there. shared [B]: columns of each sorted row that some level holds. nodes: those kept, parents first. levels: the
    same, level by level.
    """

    order: Tensor
    place: Tensor
    begin: Tensor
    shared: Tensor
    nodes: tuple[Node, ...]
    levels: tuple[Level, ...]

    @property
    def saved(self) -> int:
        """Tokens that need not be computed or stored again."""
        return sum((node.rows - 1) * (node.stop - node.start) for node in self.nodes)


def common_columns(ids: Tensor) -> int:
    """The number of leading columns of ids [B, T] that are equal in all rows."""
    same = (ids == ids[:1]).all(0)
    return int(same.shape[0] if bool(same.all()) else same.int().argmin())


@dataclass(frozen=True)
class SortedRows:
    """The rows of a batch in an order in which those with a common prefix are neighbours.

    order, place, begin: see Sharing.  common: columns that each sorted row has in common with the next.  free: columns of
    each sorted row that may be shared.  length: columns of each sorted row.
    """

    order: Tensor
    place: Tensor
    begin: Tensor
    common: list[int]
    free: list[int]
    length: list[int]

    def tree(self, least: int, levels: int) -> Sharing:
        """The prefixes that pay; see find_sharing."""
        batch = len(self.free)
        nodes = _nodes(self.common, self.free, least, levels)
        shared = torch.zeros(batch, dtype=torch.int64)
        for node in nodes:
            shared[node.first : node.first + node.rows] = node.stop
        return Sharing(self.order, self.place, self.begin, shared, tuple(nodes), _by_level(nodes, batch))


def sorted_rows(
    ids: Tensor, mask: Tensor | None = None, keys: Tensor | None = None, own: int | Tensor = 1
) -> SortedRows:
    """Sort the rows of ids [B, T]; arguments as those of find_sharing, own int64 [B] where rows differ.

    The longest common prefixes of neighbours then hold the whole compressed trie (Kasai et al. 2001, intervals of the array
    of longest common prefixes).
    """
    batch, width = ids.shape
    begin, length = _extent(mask, batch, width)
    rows = _from_the_left(ids, begin, length)
    if keys is not None:
        rows = torch.cat([keys[:, None].to(rows.dtype), rows], 1)
    lead = 0 if keys is None else 1
    order = _sorted(rows)
    rows, length = rows.index_select(0, order), length.index_select(0, order)
    place = torch.empty_like(order)
    place[order] = torch.arange(batch)
    free = (length - (own if isinstance(own, int) else own.index_select(0, order))).clamp_min(0).tolist()
    return SortedRows(order, place, begin, _neighbours(rows, lead), free, length.tolist())


def find_sharing(
    ids: Tensor,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    *,
    least: int = 16,
    levels: int = 3,
    own: int = 1,
) -> Sharing:
    """The prefixes that rows of ids [B, T] share, as a tree of at most `levels` levels.

    mask [B, T]: nonzero where a column is real. Padding may be on the left or the right, with nothing but real columns
    between; a left padded row is compared from its first real column on. keys [B]: rows share only where these are equal
    too (an adapter, a hash of an image). least: a node of l columns and n rows is kept where (n - 1) * l >= least * n,
    since it costs each of its rows one more partial state; what is not kept falls to the nodes below. own: columns at the
    end of each row that are never shared, since their logits are wanted. Raises ValueError for a mask with holes.
    """
    return sorted_rows(ids, mask, keys, own).tree(least, levels)


def _extent(mask: Tensor | None, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """(first real column, number of real columns) of each row."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64), torch.full((batch,), width)
    real = mask != 0
    length = real.sum(1)
    begin = torch.where(length > 0, real.int().argmax(1), 0)
    columns = torch.arange(width)
    whole = (columns >= begin[:, None]) & (columns < (begin + length)[:, None])
    holes = (whole != real).any(1)
    if bool(holes.any()):
        raise ValueError(
            f"find_sharing got a mask with hidden columns inside row {int(holes.int().argmax())}; "
            "only padding at the ends can be left out."
        )
    return begin, length


def _from_the_left(ids: Tensor, begin: Tensor, length: Tensor) -> Tensor:
    """The rows moved to column 0, with -1 behind their end."""
    width = ids.shape[1]
    if bool((length == width).all()):
        return ids
    columns = torch.arange(width)
    moved = ids.gather(1, (columns + begin[:, None]).clamp_max(max(width - 1, 0))) if width else ids
    return moved.masked_fill(columns >= length[:, None], -1)


def _sorted(rows: Tensor) -> Tensor:
    """Row numbers in the order of the rows' bytes, in which rows with a common prefix are neighbours."""
    texts = [row.tobytes() for row in rows.contiguous().numpy()]
    return torch.tensor(sorted(range(len(texts)), key=texts.__getitem__), dtype=torch.int64)


def _neighbours(rows: Tensor, lead: int) -> list[int]:
    """Columns that each sorted row has in common with the next, 0 where their keys (the first `lead` columns) differ."""
    if rows.shape[0] < 2:
        return []
    differ = rows[1:] != rows[:-1]
    first = torch.where(differ.any(1), differ.int().argmax(1), rows.shape[1])
    return (first - lead).clamp_min(0).tolist()


def _nodes(common: list[int], free: list[int], least: int, levels: int) -> list[Node]:
    """The nodes that pay, from the root down; the columns of one that does not are its children's."""
    kept: list[Node] = []
    waiting = [(0, len(free), 0, 0)] if free else []
    while waiting:
        first, count, start, depth = waiting.pop()
        if count < 2 or depth == levels:
            continue
        inside = common[first : first + count - 1]
        stop = min(*inside, *free[first : first + count])
        if stop > start and (count - 1) * (stop - start) >= least * count:
            kept.append(Node(start, stop, first, count))
            start, depth = stop, depth + 1
        waiting += [(place, size, start, depth) for place, size in _children(inside, free, first, count, stop)]
    return sorted(kept, key=lambda node: (node.start, node.first))


def _children(inside: list[int], free: list[int], first: int, count: int, stop: int) -> list[tuple[int, int]]:
    """(first row, rows) of the groups that go on together behind column `stop`."""
    groups = []
    begin = 0
    for place in range(count):
        ends = (
            place == count - 1
            or inside[place] <= stop
            or free[first + place] <= stop
            or free[first + place + 1] <= stop
        )
        if ends:
            if place + 1 - begin < count:
                groups.append((first + begin, place + 1 - begin))
            begin = place + 1
    return groups


def _by_level(nodes: list[Node], batch: int) -> tuple[Level, ...]:
    depths: list[list[Node]] = []
    deep = [0] * batch
    for node in nodes:
        depth = deep[node.first]
        if depth == len(depths):
            depths.append([])
        depths[depth].append(node)
        for row in range(node.first, node.first + node.rows):
            deep[row] = depth + 1
    found = []
    for members in depths:
        starts, lengths, rows = [n.start for n in members], [n.stop - n.start for n in members], [len(members)] * batch
        for number, node in enumerate(members):
            rows[node.first : node.first + node.rows] = [number] * node.rows
        if len(members) in rows:
            starts, lengths = [*starts, 0], [*lengths, 0]
        found.append(Level(tuple(starts), tuple(lengths), tuple(rows)))
    return tuple(found)
