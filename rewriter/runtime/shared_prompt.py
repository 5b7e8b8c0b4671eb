"""Run the prompts of a batch: what rows have in common once, what is known not at all, then their own parts behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.key_tree import KeyTree
from subquad.runtime.prefix_tree import Sharing
from subquad.runtime.radix_tree import KnownPrefix
from subquad.runtime.sharing_plan import batches
from subquad.runtime.state import DecoderState


class KnownPrefixes(Protocol):
    """Keys and values of prefixes that earlier calls computed."""

    def known(self, tokens: Tensor) -> KnownPrefix:
        """The longest known prefix of a prompt int64 [T]; of its last token logits are wanted, so that it is never part."""


def run_shared(
    engine: DecodeEngine,
    ids: Tensor,
    mask: Tensor | None,
    sharing: Sharing,
    room: int,
    cache: KnownPrefixes | None = None,
    begin: Sequence[int] | None = None,
    every: list[Tensor] | None = None,
) -> tuple[Tensor, DecoderState, int]:
    """Logits [B, V] behind the last tokens of ids [B, T], the state behind them, both in the order of `sharing`, and how many
    tokens were run.

    mask [B, T]: zero for padding, which is left out.  room: new tokens of a row that there shall be room for.  begin: for each
    row of the batch its first column behind which logits are wanted, on to its last but one; they are no one's to share, and
    come row after row in the order of `sharing`.  every: without a cache, receives the logits [columns, V] behind all tokens of
    each of the sharing's nodes; the logits returned are then those behind all own tokens of the rows, row after row.
    """
    rows = rows_in_order(ids, mask, sharing)
    known = [KnownPrefix(()) if cache is None else cache.known(row) for row in rows]
    ends = sharing.shared.tolist()
    more = sum(max(0, one.count - end) for one, end in zip(known, ends, strict=True))
    tree = KeyTree(engine.layout, sum(node.stop - node.start for node in sharing.nodes) + more, engine.device)
    above: list[int | None] = [None] * len(rows)
    waiting: list[tuple[int, int]] = []
    depth: dict[int | None, int] = {None: 0}
    for node in sharing.nodes:
        first, cut = node.first, min(max(known[node.first].count, node.start), node.stop)
        parent = above[first]
        for start, stop in ((node.start, cut), (cut, node.stop)):
            if start == stop:
                continue
            number = tree.add(rows[first][start:stop], parent)
            depth[number] = depth[parent] + (stop > cut)
            if stop > cut:
                waiting.append((number, depth[number]))
            else:
                tree.load(number, known[first].read(start, stop))
            parent = number
        above[first : first + node.rows] = [parent] * node.rows
    for row, one in enumerate(known):
        if one.count > ends[row]:
            number = above[row] = tree.add(rows[row][ends[row] : one.count], above[row])
            tree.load(number, one.read(ends[row], one.count))
            ends[row] = one.count
    ran = sum(len(row) - end for row, end in zip(rows, ends, strict=True)) + sum(
        tree.nodes[n].length for n, _ in waiting
    )
    logits_of: dict[int, Tensor] = {}
    for group in batches([(d, tree.nodes[n].length) for n, d in waiting]):
        numbers = [waiting[place][0] for place in group]
        paths = [tree.nodes[n].path for n in numbers]
        runs = [tree.nodes[n].tokens for n in numbers]
        everywhere = None if every is None else [(0, len(run) - 1) for run in runs]
        found, state = _run(engine, tree, [p[-2] if len(p) > 1 else None for p in paths], runs, 0, everywhere)
        if every is not None:
            logits_of.update(zip(numbers, found.split([len(run) for run in runs]), strict=True))
        for row, n in enumerate(numbers):
            tree.fill(n, state, row)
    own = [row[end:] for row, end in zip(rows, ends, strict=True)]
    wanted = None
    if begin is not None:
        wanted = [(begin[b] - ends[n], len(own[n]) - 2) for n, b in enumerate(sharing.order.tolist())]
    if every is not None:
        every += [logits_of[n] for n in sorted(logits_of)]
        wanted = [(0, len(run) - 1) for run in own]
    logits, state = _run(engine, tree, above, own, room, wanted)
    return logits, state, ran


def rows_in_order(ids: Tensor, mask: Tensor | None, sharing: Sharing) -> list[Tensor]:
    """The rows of ids [B, T] without their padding, in the order of `sharing`."""
    begin = sharing.begin.tolist()
    length = [ids.shape[1]] * ids.shape[0] if mask is None else (mask != 0).sum(1).tolist()
    return [ids[row, begin[row] : begin[row] + length[row]] for row in sharing.order.tolist()]


def _run(
    engine: DecodeEngine, tree: KeyTree, above: list[int | None], runs: list[Tensor], room: int,
    wanted: list[tuple[int, int]] | None = None,
) -> tuple[Tensor, DecoderState]:  # fmt: skip
    """The runs of tokens, each behind a node."""
    widths = [int(run.shape[0]) for run in runs]
    state = tree.rows(above, max(widths) + room)
    block = torch.zeros(len(runs), max(widths), dtype=torch.int64, device=engine.device)
    for row, run in enumerate(runs):
        block[row, : widths[row]] = run
    return engine.branch(state, block, widths, wanted), state
