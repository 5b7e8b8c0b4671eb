"""Read the Python numbers that Dynamo made inputs where an attention call takes them, so that a site has a scale."""

from __future__ import annotations

import torch
import torch.fx
from torch.fx.node import map_arg
from torch.utils._sympy.symbol import SymT, symbol_is_type

from subquad.ir.graph import value_of
from subquad.ir.vocabulary import kind

Node = torch.fx.Node


def read_lifted_numbers(module: torch.fx.GraphModule) -> None:
    """Replace, in place, every floating number that SDPA is given as a node by its value.

    module: Dynamo's graph with dynamic=True, where the attributes and globals that are numbers are symbolic.  Dynamo guards
    what is read and compiles again when it changes.  A number that depends on sizes or on a tensor's content stays.
    """
    for node in module.graph.nodes:
        if kind(node) == "sdpa":
            node.args, node.kwargs = map_arg((node.args, node.kwargs), _read)


def _read(node: Node) -> Node | float:
    value = value_of(node)
    if not isinstance(value, torch.SymFloat):
        return node
    symbols = value.node.expr.free_symbols
    return float(value) if all(symbol_is_type(symbol, SymT.FLOAT) for symbol in symbols) else node
