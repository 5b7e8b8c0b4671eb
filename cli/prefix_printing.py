"""How what prompts have in common looks on a terminal: the tree of prefixes, and the tokens that it saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

if TYPE_CHECKING:
    from subquad.batch_generation import SharingPlan

SHOWN = 48
"""Characters of a prefix's text that are shown."""


def print_sharing(console: Console, plan: SharingPlan, text: Callable[[int, int, int], str]) -> None:
    """The tree of one batch, or why there is none.

    text: (row of the batch, first column, behind the last) → the text of these columns.
    """
    if plan.sharing is None:
        console.print(f"{plan.rows} prompts, {plan.tokens:,} tokens; nothing was shared: {plan.why_not}.")
        return
    share = plan.saved / plan.tokens
    tree = Tree(
        f"{plan.rows} prompts, {plan.tokens:,} tokens; {plan.saved:,} saved ({share:.0%}), keys "
        f"{'stored once' if plan.once else 'copied to each row'}"
    )
    order = plan.sharing.order.tolist()
    branches: list[tuple[int, int, int, Tree]] = []
    for node in plan.sharing.nodes:
        above = [t for first, rows, stop, t in branches if first <= node.first < first + rows and stop == node.start]
        words = " ".join(text(order[node.first], node.start, node.stop).split())
        words = words if len(words) <= SHOWN else words[:SHOWN] + "…"
        label = f"{node.stop - node.start:,} tokens of {node.rows} prompts  [dim]{escape(words)}[/dim]"
        branches.append((node.first, node.rows, node.stop, (above[-1] if above else tree).add(label)))
    alone = int((plan.sharing.shared == 0).sum())
    if alone:
        tree.add(f"{alone} prompts share too little with any other")
    console.print(tree)
