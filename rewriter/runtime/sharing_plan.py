"""Decides how much of what the rows of a batch have in common is computed once, and says why when nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from subquad.runtime.prefix_tree import Sharing, SortedRows, sorted_rows

PASS = 48
"""Tokens in the time of which one more pass over the network reads its weights (an estimate for two cores in fp32)."""
LEVELS = 3
"""Most levels of a tree."""
LEAST = 16
"""Columns that a node of very many rows must have; see find_sharing."""
GAIN = 0.95
"""Share of the tokens of a padded batch above which nothing is shared."""
WORTH = 2**28
"""Bytes of keys and values that a decoding step must save before it does without compiled programs, where those cannot read
shared keys; they read them in the time that the operations between attention lose when they run one by one (12 ms a step of
SmolLM2 on two cores)."""


@dataclass(frozen=True)
class SharingPlan:
    """What rows share.

    rows, tokens: of the batch, padding left out.  computed: tokens that are computed.  sharing: the tree, None where nothing
    is shared; why_not then says why.  once: whether keys stay stored once while decoding; otherwise each row gets its copy.
    cached: tokens that a prefix cache knew.
    """

    rows: int
    tokens: int
    computed: int
    sharing: Sharing | None
    why_not: str | None = None
    once: bool = False
    cached: int = 0

    @property
    def saved(self) -> int:
        """Tokens that were not computed again."""
        return self.tokens - self.computed

    def decided(self, token_bytes: int, compiled_rows: int) -> SharingPlan:
        """The plan with `once` decided.

        token_bytes: bytes of keys and values of a token.  compiled_rows: most rows that a compiled step takes which cannot
        read shared keys, 0 without one.
        """
        if self.sharing is None or not self.sharing.nodes:
            return self
        return replace(self, once=self.rows > compiled_rows or self.sharing.saved * token_bytes >= WORTH)

    def json(self) -> dict[str, Any]:
        """The public words: prompts and tokens, how many were computed and saved, and the nodes of the tree, parents first."""
        nodes = () if self.sharing is None else self.sharing.nodes
        order = [] if self.sharing is None else self.sharing.order.tolist()
        return {
            "prompts": self.rows,
            "tokens": self.tokens,
            "computed": self.computed,
            "saved": self.saved,
            "cached": self.cached,
            "stored_once": self.once,
            "why_not": self.why_not,
            "nodes": [
                {"columns": [node.start, node.stop], "prompts": sorted(order[node.first : node.first + node.rows])}
                for node in nodes
            ],
        }


def plan_sharing(
    ids: Tensor, mask: Tensor | None = None, keys: Tensor | None = None, own: int | Tensor = 1
) -> SharingPlan:
    """The tree of prefixes of ids [B, T] that makes the prompt cheapest; arguments as those of find_sharing."""
    batch, width = ids.shape
    if batch < 2:
        return SharingPlan(batch, ids.numel(), ids.numel(), None, "there is one row")
    try:
        found = sorted_rows(ids.cpu(), None if mask is None else mask.cpu(), keys, own)
    except ValueError:
        return SharingPlan(batch, ids.numel(), ids.numel(), None, "the attention mask hides columns inside a row")
    tokens = sum(found.length)
    if min(found.length) == 0:
        empty = int(found.order[found.length.index(0)])
        return SharingPlan(batch, tokens, tokens, None, f"row {empty} holds no token")
    if max(found.common) < LEAST:
        return SharingPlan(
            batch, tokens, tokens, None, f"no two rows have more than {max(found.common)} leading tokens in common"
        )
    trees = [found.tree(LEAST, levels) for levels in range(1, LEVELS + 1)]
    costs = [prompt_cost(found, tree) for tree in trees]
    best = min(range(LEVELS), key=lambda n: costs[n])
    saved = trees[best].saved
    if saved == 0 or costs[best] > GAIN * batch * width:
        return SharingPlan(
            batch, tokens, tokens, None,
            f"sharing would save {saved} of {tokens} tokens, which is less than the passes that it adds cost",
        )  # fmt: skip
    return SharingPlan(batch, tokens, tokens - saved, trees[best])


def prompt_cost(rows: SortedRows, sharing: Sharing) -> int:
    """Tokens that are computed for a tree and the rows' own parts, padding and the reading of weights included."""
    depth: dict[int | None, int] = {None: -1}
    nodes = []
    for n, (node, parent) in enumerate(zip(sharing.nodes, parents(sharing), strict=True)):
        depth[n] = depth[parent] + 1
        nodes.append((depth[n], node.stop - node.start))
    groups = batches(nodes)
    padded = sum(nodes[group[0]][1] * len(group) for group in groups)
    own = max(length - shared for length, shared in zip(rows.length, sharing.shared.tolist(), strict=True))
    return padded + own * len(rows.length) + PASS * len(groups)


def batches(nodes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Numbers of nodes (depth, length) that run together: those of one depth whose lengths are alike, so that little is
    padding; the longest first, depth after depth.
    """
    groups: list[list[int]] = []
    for n in sorted(range(len(nodes)), key=lambda n: (nodes[n][0], -nodes[n][1])):
        (depth, length), first = nodes[n], groups[-1][0] if groups else None
        if first is not None and nodes[first][0] == depth and len(groups[-1]) * (nodes[first][1] - length) <= PASS:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def parents(sharing: Sharing) -> list[int | None]:
    """For each node the one above it."""
    last: list[int | None] = [None] * len(sharing.order)
    found = []
    for n, node in enumerate(sharing.nodes):
        found.append(last[node.first])
        last[node.first : node.first + node.rows] = [n] * node.rows
    return found
