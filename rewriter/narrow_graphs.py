"""Rewrite a step graph for few tokens: masks evaluated once, attention in one operator, and all there is to know of one token."""

from __future__ import annotations

import ast
from collections.abc import Callable

import torch
import torch.fx

from subquad.kernels.narrow_attention import EMPTY_ROWS
from subquad.kernels.spec import SoftmaxSpec
from subquad.runtime import few_tokens
from subquad.step_graph import copied, sweep
from subquad.token_axis import operator_arguments

Node = torch.fx.Node


def few_token_graph(step: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a step graph that computes the same, for so few tokens that a mask of all pairs may be held."""
    module = copied(step)
    inputs = _inputs(module)
    pairs = (inputs.get("queries"), inputs.get("keys"), inputs.get("tree"))
    _attentions(module.graph, lambda tables, scalars, mask: (few_tokens.visible_pairs, (*pairs, tables, scalars, mask)))
    sweep(module.graph)
    module.recompile()
    return module


def one_token_graph(step: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of a step graph that computes the same for B = w = 1."""
    module = copied(step)
    inputs = _inputs(module)
    for size in list(inputs["queries"].users):
        if size.target is torch.ops.aten.sym_size.int:
            size.replace_all_uses_with(1)  # type: ignore[arg-type]
    keys = (inputs["columns"], inputs["keys"])
    _attentions(module.graph, lambda tables, scalars, mask: (few_tokens.visible_keys, (*keys, tables, scalars, mask)))
    for node in list(module.graph.nodes):
        if node.target is torch.ops.subquad.recurrence.default:
            _recurrence(node, inputs["real"])
        elif node.target is torch.ops.aten.index_put_.default:
            _write(module.graph, node)
    sweep(module.graph)
    module.recompile()
    return module


def _inputs(module: torch.fx.GraphModule) -> dict[str, Node]:
    return {str(n.target): n for n in module.graph.find_nodes(op="placeholder")}


def _attentions(
    graph: torch.fx.Graph, visible: Callable[[object, object, str], tuple[object, tuple[object, ...]]]
) -> None:
    """Softmax attention as narrow_attention over a mask of pairs, which sites that see alike share.

    visible: (tables, scalars, mask) -> the function that evaluates the mask, and its arguments.  Where the mask differs by
    head or the log-sum-exp is read, the operator stays.
    """
    masks: dict[tuple[object, ...], Node] = {}
    for node in graph.find_nodes(op="call_function", target=torch.ops.subquad.softmax_attention.default):
        named = operator_arguments(node)
        spec = SoftmaxSpec.parse(named["spec"])
        if (
            named["bias"] is not None
            or spec.mask is None
            or _reads_head(spec.mask)
            or any(user.args[1] != 0 for user in node.users)
        ):
            continue
        tables = tuple(named["operands"][:-1])
        tree = f" & t{len(tables)}[b, i, j]"
        if not spec.mask.endswith(tree):  # a cross attention, which reads what is fixed
            continue
        mask, scalars = spec.mask.removesuffix(tree), tuple(named["scalars"])
        key = (mask, tables, scalars)
        with graph.inserting_before(node):
            if key not in masks:
                masks[key] = graph.call_function(*visible(list(tables), list(scalars), mask))  # type: ignore[arg-type]
            how = (named["sinks"], spec.scale, spec.softcap or 0.0, EMPTY_ROWS.index(spec.empty_rows))
            out = graph.call_function(
                torch.ops.subquad.narrow_attention.default,
                (named["q"], named["k"][0], named["v"][0], masks[key], *how),
            )
        for user in list(node.users):
            out.meta.update(user.meta)
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        graph.erase_node(node)


def _reads_head(mask: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == "h" for n in ast.walk(ast.parse(mask)))


def _recurrence(node: Node, real: Node) -> None:
    """The traceable form; the token is real unless the model's own padding says no."""
    named = operator_arguments(node)
    valid = named["valid"]
    named["valid"] = None if valid is real else valid.args[1]
    node.target, node.args = few_tokens.recur, tuple(named.values())


def _write(graph: torch.fx.Graph, node: Node) -> None:
    """One slot of one row is written."""
    buffer, index, new = node.args
    assert isinstance(index, (list, tuple))
    places = index[1]
    with graph.inserting_before(node):
        row = graph.call_function(torch.ops.aten.unsqueeze.default, (new, 0))
    node.target, node.args = torch.ops.aten.index_copy_.default, (buffer, 1, places, row)
