"""Run the prompts of a batch: what rows have in common once, then their own parts behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.runtime.decode_engine import DecodeEngine
from subquad.runtime.key_tree import KeyTree
from subquad.runtime.prefix_tree import Sharing
from subquad.runtime.sharing_plan import batched, parents
from subquad.runtime.state import DecoderState


def run_shared(
    engine: DecodeEngine, ids: Tensor, mask: Tensor | None, sharing: Sharing, room: int
) -> tuple[Tensor, DecoderState]:
    """Logits [B, V] behind the last tokens of ids [B, T], and the state behind them, both in the order of `sharing`.

    mask [B, T]: zero for padding, which is left out.  room: new tokens of a row that there shall be room for.
    """
    order, begin = sharing.order.tolist(), sharing.begin.tolist()
    length = ids.new_full((ids.shape[0],), ids.shape[1]) if mask is None else (mask != 0).sum(1)
    rows = [ids[row, begin[row] : begin[row] + int(length[row])] for row in order]
    tree = KeyTree(engine.layout, sum(node.stop - node.start for node in sharing.nodes), engine.device)
    for node, parent in zip(sharing.nodes, parents(sharing), strict=True):
        tree.add(rows[node.first][node.start : node.stop], parent)
    for numbers in batched(sharing):
        runs = [tree.nodes[n].tokens for n in numbers]
        above = [tree.nodes[n].path[-2] if len(tree.nodes[n].path) > 1 else None for n in numbers]
        _, state = _run(engine, tree, above, runs, 0)
        for row, n in enumerate(numbers):
            tree.fill(n, state, row)
    deepest: list[int | None] = [None] * len(rows)
    for n, node in enumerate(sharing.nodes):
        deepest[node.first : node.first + node.rows] = [n] * node.rows
    own = [row[int(shared) :] for row, shared in zip(rows, sharing.shared, strict=True)]
    return _run(engine, tree, deepest, own, room)


def _run(
    engine: DecodeEngine, tree: KeyTree, above: list[int | None], runs: list[Tensor], room: int
) -> tuple[Tensor, DecoderState]:
    """The runs of tokens, each behind a node."""
    widths = [int(run.shape[0]) for run in runs]
    state = tree.rows(above, max(widths) + room)
    block = torch.zeros(len(runs), max(widths), dtype=torch.int64, device=engine.device)
    for row, run in enumerate(runs):
        block[row, : widths[row]] = run
    return engine.branch(state, block, widths), state
