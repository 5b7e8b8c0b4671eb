"""Remove what export leaves behind and no rewrite needs: assertions, and nodes without users."""

from __future__ import annotations

import torch.fx

from subquad.ir.vocabulary import kind

PURE = frozenset({"sdpa", "dropout", "softmax"})
"""Kinds that fx keeps for their random numbers; a replaced one that nobody reads draws none that matters."""


def tidy(module: torch.fx.GraphModule) -> int:
    """Drop assertion nodes and dead code, then check and recompile; returns the number of nodes removed."""
    graph = module.graph
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if kind(node) == "assertion":
            graph.erase_node(node)
    graph.eliminate_dead_code(lambda node: kind(node) not in PURE and node.is_impure())
    graph.lint()
    module.recompile()
    return before - len(graph.nodes)
