"""Rewrite a step graph for few tokens: masks evaluated once, attention in one operator, and all there is to know of one token."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

import torch
import torch.fx

from subquad.kernels.narrow_attention import EMPTY_ROWS
from subquad.kernels.spec import SoftmaxSpec
from subquad.runtime import few_tokens
from subquad.step_graph import copied, sweep
from subquad.token_axis import operator_arguments

Node = torch.fx.Node
Visible = Callable[[object, object, str], tuple[object, tuple[object, ...]]]
PREFIX = torch.ops.subquad.prefix_attention.default


def few_token_graph(step: torch.fx.GraphModule, joined: torch.fx.GraphModule | None) -> torch.fx.GraphModule:
    """A copy of a step graph that computes the same, for so few tokens that a mask of all pairs may be held.

    joined: the step of rows that share keys, if they can; it is copied instead where all of its attentions have the narrow form,
    so that one program serves rows with and without shared keys, whatever their number and length.
    """
    for source in (joined, step):
        if source is None:
            continue
        module = copied(source)
        inputs = _inputs(module)
        pairs = tuple(inputs.get(name) for name in ("queries", "keys", "tree"))
        slots = (inputs.get("queries"), inputs.get("slots"))
        _attentions(
            module.graph,
            lambda *mask, pairs=pairs: (few_tokens.visible_pairs, (*pairs, *mask)),
            lambda *mask, slots=slots: (few_tokens.visible_slots, (*slots, *mask)),
        )
        if not module.graph.find_nodes(op="call_function", target=PREFIX):
            break
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
    _attentions(module.graph, lambda *mask: (few_tokens.visible_keys, (*keys, *mask)))
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


def _attentions(graph: torch.fx.Graph, visible: Visible, above: Visible | None = None) -> None:
    """Softmax attention, with what is added to it from shared keys, as narrow_attention over masks that alike sites share.

    visible, above: (tables, scalars, mask) -> the function that evaluates the mask over own keys, or over shared ones, and its
    arguments.  Where the mask differs by head or anything else reads the log-sum-exp, the operators stay.
    """
    masks: dict[tuple[object, ...], Node] = {}

    def shown(read: Visible, tables: Sequence[object], scalars: Sequence[object], mask: str) -> Node:
        key = (read, mask, tuple(tables), tuple(scalars))
        if key not in masks:
            masks[key] = graph.call_function(*read(list(tables), list(scalars), mask))  # type: ignore[arg-type]
        return masks[key]

    for node in graph.find_nodes(op="call_function", target=torch.ops.subquad.softmax_attention.default):
        named = operator_arguments(node)
        spec = SoftmaxSpec.parse(named["spec"])
        joined = next((u for user in node.users for u in user.users if u.target is PREFIX and u.args[6] is user), None)
        shared = {} if joined is None else operator_arguments(joined)
        beyond = SoftmaxSpec.parse(shared["spec"]).mask if shared else None
        others = [user for user in node.users if user.args[1] != 0 and list(user.users) != [joined]]
        if named["bias"] is not None or spec.mask is None or _reads_head(spec.mask) or others:
            continue
        if beyond is not None and _reads_head(beyond):
            continue
        tables = named["operands"][:-1]
        tree = f" & t{len(tables)}[b, i, j]"
        if not spec.mask.endswith(tree):  # a cross attention, which reads what is fixed
            continue
        with graph.inserting_before(node):
            seen = shown(visible, tables, named["scalars"], spec.mask.removesuffix(tree))
            how = (named["sinks"], spec.scale, spec.softcap or 0.0, EMPTY_ROWS.index(spec.empty_rows))
            more: tuple[Node | None, ...] = ()
            if shared:
                over = None
                if beyond is not None and above is not None:
                    over = shown(above, shared["operands"], shared["scalars"], beyond)
                more = (shared["k"], shared["v"], shared["nodes"], over)
            out = graph.call_function(
                torch.ops.subquad.narrow_attention.default,
                (named["q"], named["k"][0], named["v"][0], seen, *how, *more),
            )
        for user in [user for user in node.users if user.args[1] == 0] if joined is None else [joined]:
            out.meta.update(user.meta)
            user.replace_all_uses_with(out)
            graph.erase_node(user)
        for user in list(node.users):
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
