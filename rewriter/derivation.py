"""Derive the stateful step graph of a decoder from a stateless captured graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from subquad.fixed_part import fixed_part, frontier
from subquad.graph_copy import submodule
from subquad.ir.graph import ancestors, value_of
from subquad.kernels.spec import RecurrenceSpec, SoftmaxSpec
from subquad.locality import prove_locality
from subquad.mask_terms import implies_causal
from subquad.pair_tables import PairTables
from subquad.runtime.layout import DecoderLayout, SiteState
from subquad.shared_sites import SharedSites
from subquad.step_graph import PROMPT_INPUTS, SHARED_INPUTS, STEP_INPUTS, STREAM, StepGraph, sweep
from subquad.step_sites import PromptSites, StepSites, state_names
from subquad.token_axis import Locality, operator_arguments, refuse

Node = torch.fx.Node


def derive(module: torch.fx.GraphModule, others: bool = False) -> StepGraph:
    """Derive prefill and step from an ATen graph f(token ids [B, T], padding [B, T], ...) -> (logits [B, T, V], ...).

    Every attention site must be a subquad operator.  The parameters stay the module's own objects.  others: the graph may
    take inputs that do not grow with the tokens (see `Fixed`); what they alone lead to is computed once.
    Raises NotIncremental naming the node, module path and source line when the graph cannot be run token by token.
    """
    proof = prove_locality(module, others)
    nodes = list(module.graph.nodes)
    logits = _logits(nodes, proof)
    live = set(ancestors([logits]))
    sites = [n for n in nodes if n in live and _is_site(n) and n not in proof.fixed and n not in proof.cross]
    for node in sites:
        _check_causal(node, proof)
    tables = _tables(sites, proof)
    sums = [n for n in proof.history if n in live]
    history = _history(module, proof, tables, sums)
    shareable = not proof.given and _shareable(sites, live)
    kinds = ["step", "first", *(("joined", "branch") if shareable else ())]
    parts = {kind: _build(module, proof, logits, live, sites, tables, sums, kind) for kind in kinds}
    layout = DecoderLayout(
        history, tuple(str(n.target) for n in proof.inputs), tuple(_site_state(n) for n in sites),
        len(tables), tuple(_past_axis(proof, n) for n in sums), _limit(module, proof, live), fixed_part(module, proof, live),
    )  # fmt: skip
    return StepGraph(parts.pop("step"), parts.pop("first"), layout, parts)


def _shareable(sites: list[Node], live: set[Node]) -> bool:
    """Whether rows may share keys: no log-sum-exp is read, which a shared softmax does not give, and there is no bias."""
    softmax = [site for site in sites if site.target is torch.ops.subquad.softmax_attention.default]
    if any(operator_arguments(site)["bias"] is not None for site in softmax):
        return False
    return all(u.args[1] == 0 for site in softmax for u in site.users if u in live)


def _is_site(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "subquad"


def _logits(nodes: list[Node], proof: Locality) -> Node:
    output = nodes[-1]
    leaves = [n for n in torch.utils._pytree.tree_leaves(output.args) if isinstance(n, Node)]
    for leaf in leaves:
        value = value_of(leaf)
        axis = proof.axes.get(leaf)
        if isinstance(value, torch.Tensor) and value.dim() == 3 and axis is not None and axis.axis == 1:
            return leaf
    refuse(leaves[0] if leaves else output, "the model returns no logits [batch, tokens, vocabulary].")
    raise AssertionError


def _check_causal(node: Node, proof: Locality) -> None:
    named = operator_arguments(node)
    if node.target is torch.ops.subquad.recurrence.default:
        if not RecurrenceSpec.parse(named["spec"]).causal or named.get("cu_seqlens") is not None:
            refuse(node, "the recurrence is bidirectional or packed; only a causal one can be run token by token.")
        return
    spec = SoftmaxSpec.parse(named["spec"])
    if spec.mask is None or not implies_causal(spec.mask):
        refuse(
            node,
            f"its mask ({spec.mask or 'full'}) lets a token see later ones, so every new token would change the past.",
        )
    if named.get("bias") is not None and named["bias"] not in proof.placed:
        refuse(
            node,
            "an additive bias over queries and keys is not carried from step to step; only mask predicates are, and a bias of"
            " their places alone.",
        )
    if any(isinstance(n, Node) and proof.depends_on_length(value_of(n)) for n in named["scalars"]):
        refuse(node, "its mask depends on the total length, which changes with every new token.")
    for table in named["operands"]:
        if table not in proof.closed:
            refuse(node, "its mask reads values that the network computes.")


def _tables(sites: list[Node], proof: Locality) -> list[Node]:
    """Mask tables with a token axis: they are read over the whole history."""
    found: dict[Node, None] = {}
    for node in sites:
        for table in operator_arguments(node).get("operands", []):
            if table in proof.axes:
                found[table] = None
    return list(found)


def _is_padding(table: Node, proof: Locality) -> bool:
    """Whether a table is the padding mask itself, in any dtype."""
    while isinstance(table, Node) and _name(table) in ("to", "_to_copy", "alias", "clone", "contiguous"):
        table = table.args[0]  # type: ignore[assignment]
    return table in proof.inputs[1:]


def _past_axis(proof: Locality, node: Node) -> int:
    """The token axis of a running sum: [B, T, ...] or [T, ...]."""
    axis = proof.axes[node].axis
    if axis > 1:
        refuse(node, "a running sum over the tokens lies on an axis behind the second.")
    return axis


def _history(
    module: torch.fx.GraphModule, proof: Locality, tables: list[Node], sums: list[Node]
) -> torch.fx.GraphModule | None:
    wanted = [*tables, *sums]
    if not wanted:
        return None
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {}
    for node in proof.inputs:
        mapping[node] = graph.placeholder(str(node.target))
    for node in ancestors(wanted):
        if node not in mapping:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(mapping[n] for n in wanted))
    return submodule(module, graph)


def _site_state(node: Node) -> SiteState:
    named = operator_arguments(node)
    key = value_of(named["k"][0] if isinstance(named["k"], (list, tuple)) else named["k"])
    value = value_of(named["v"][0] if isinstance(named["v"], (list, tuple)) else named["v"])
    sizes = {
        "dtype": key.dtype,
        "kv_heads": int(key.shape[2]),
        "key_dim": int(key.shape[3]),
        "value_dim": int(value.shape[3]),
    }
    if node.target is torch.ops.subquad.softmax_attention.default:
        return SiteState("kv", **sizes)
    spec = RecurrenceSpec.parse(named["spec"])
    state = value_of(node)[1]
    return SiteState(
        "recurrent", heads=int(state.shape[1]), features=int(state.shape[2]), window=spec.sinks + spec.window,
        sums=spec.sums, **sizes,
    )  # fmt: skip


def _build(
    module: torch.fx.GraphModule, proof: Locality, logits: Node, live: set[Node], sites: list[Node], tables: list[Node],
    sums: list[Node], kind: str,
) -> torch.fx.GraphModule:  # fmt: skip
    """The graph of a prompt ("first"), whose rows are rows, or one of those whose rows are strung to one; see StepGraph."""
    graph = torch.fx.Graph()
    mapping: dict[Node, Node] = {n: graph.placeholder(str(n.target)) for n in proof.inputs}
    ids = next(iter(mapping.values()))
    names = {"first": PROMPT_INPUTS, "step": STEP_INPUTS}.get(kind, SHARED_INPUTS)
    shared = {name: graph.placeholder(name) for name in names}
    table_nodes = {t: graph.placeholder(f"table_{n}") for n, t in enumerate(tables)}
    mapping |= {node: graph.placeholder(f"fixed_{n}") for n, node in enumerate(frontier(proof, live))}
    for n, node in enumerate(sums):
        mapping[node] = graph.placeholder(f"past_{n}")
    states = [[graph.placeholder(f"{name}_{n}") for name in state_names(site)] for n, site in enumerate(sites)]
    softmax = [site for site in sites if site.target is torch.ops.subquad.softmax_attention.default]
    pools = {
        site: [graph.placeholder(f"shared_{name}_{sites.index(site)}") for name in ("k", "v")]
        for site in (softmax if names is SHARED_INPUTS else ())
    }
    batch = graph.call_function(torch.ops.aten.sym_size.int, (ids, 0))
    width = graph.call_function(torch.ops.aten.sym_size.int, (ids, 1))
    batch_symbols = set().union(*(_symbols(value_of(n).shape[0]) for n in proof.inputs))
    writer: PromptSites | StepSites
    if kind == "first":
        columns = graph.call_function(torch.ops.aten.unsqueeze.default, (shared["columns"], 0))
        writer = PromptSites(graph, shared, PairTables(graph, proof, columns, columns))
    elif kind == "step":
        writer = StepSites(graph, shared, proof.axes, PairTables(graph, proof, shared["queries"], shared["keys"]))
    else:
        padding = {t for t in tables if _is_padding(t, proof)}
        writer = SharedSites(graph, shared, proof.axes, padding, pools, fresh=kind == "branch")
    fresh: list[Node] = []
    for node in module.graph.nodes:
        if node not in live or node in mapping or node in proof.fixed or node in proof.pairs:
            continue
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr in proof.tokens:
            mapping[node] = width
        elif isinstance(value, torch.SymInt) and value.node.expr in batch_symbols:
            mapping[node] = batch
        elif node in sites:
            n = sites.index(node)
            mapping[node] = writer.site(node, mapping, table_nodes, states[n])
            if len(states[n]) == 4:
                fresh += [graph.call_function(operator.getitem, (mapping[node], i)) for i in range(1, 5)]
        elif node in proof.cross:
            mapping[node] = writer.cross(node, mapping)
        elif node.target is operator.getitem and (node.args[0] in sites or node.args[0] in proof.cross):
            mapping[node] = writer.output(mapping[node.args[0]], node.args[1])
        elif _name(node) == "arange" and node in proof.axes:
            mapping[node] = _positions(graph, node, shared["columns"])
        elif _name(node) == "slice" and node in proof.axes and node.args[0] not in proof.axes:
            mapping[node] = _table_rows(graph, node, mapping, shared["columns"])
        elif _is_identity(node):
            mapping[node] = mapping[node.args[0]]
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = {}
            if node.target is torch.ops.aten.view.default:
                mapping[node].target = torch.ops.aten.reshape.default
        if _is_stream(node, proof, batch_symbols):
            mapping[node].meta[STREAM] = True
    graph.output((mapping[logits], *fresh))
    sweep(graph)
    return submodule(module, graph)


def _is_identity(node: Node) -> bool:
    """A cast to the dtype a value has, or a slice that keeps everything."""
    if _name(node) not in ("to", "slice"):
        return False
    value, source = value_of(node), value_of(node.args[0])
    return bool(value.dtype == source.dtype and value.device == source.device and value.shape == source.shape)


def _symbols(size: Any) -> set[Any]:
    return {size.node.expr} if isinstance(size, torch.SymInt) else set()


def _is_stream(node: Node, proof: Locality, batch_symbols: set[Any]) -> bool:
    value, axis = value_of(node), proof.axes.get(node)
    if not isinstance(value, torch.Tensor) or axis is None or not value.is_floating_point():
        return False
    plain = axis.axis == 1 and axis.outer == 1 and axis.inner == 1 and value.dim() >= 3
    return plain and bool(_symbols(value.shape[0]) & batch_symbols)


def _positions(graph: torch.fx.Graph, node: Node, columns: Node) -> Node:
    """arange(start, end, step) over the tokens, at the columns of this call."""
    named = operator_arguments(node)
    value = value_of(node)
    out = columns
    if named.get("step", 1) != 1:
        out = graph.call_function(torch.ops.aten.mul.Tensor, (out, named["step"]))
    if named.get("start", 0):
        out = graph.call_function(torch.ops.aten.add.Tensor, (out, named["start"]))
    if value.dtype != torch.int64:
        out = graph.call_function(torch.ops.aten.to.dtype, (out, value.dtype))
    return out


def _table_rows(graph: torch.fx.Graph, node: Node, mapping: dict[Node, Node], columns: Node) -> Node:
    """table[start : start + T] along one axis, at the columns of this call."""
    named = operator_arguments(node)
    start = named.get("start") or 0
    place = columns if start == 0 else graph.call_function(torch.ops.aten.add.Tensor, (columns, start))
    return graph.call_function(torch.ops.aten.index_select.default, (mapping[node.args[0]], named.get("dim", 0), place))


def _limit(module: torch.fx.GraphModule, proof: Locality, live: set[Node]) -> int | None:
    """Rows of the smallest position table that is read at the token's own column."""
    found: list[int] = []
    for node in module.graph.nodes:
        if node not in live:
            continue
        if _name(node) == "embedding" and node.args[0].op == "get_attr":
            offset = _column_offset(node.args[1])
            if offset is not None:
                found.append(int(value_of(node.args[0]).shape[0]) - offset)
        elif _name(node) == "slice" and node in proof.axes and node.args[0] not in proof.axes:
            named = operator_arguments(node)
            found.append(int(value_of(node.args[0]).shape[named.get("dim", 0)]) - (named.get("start") or 0))
    return min(found, default=None)


def _column_offset(node: Any) -> int | None:
    offset = 0
    while isinstance(node, Node) and _name(node) != "arange":
        if _name(node) == "add" and isinstance(node.args[1], int):
            offset += node.args[1]
        elif _name(node) not in (
            "unsqueeze",
            "expand",
            "repeat",
            "to",
            "view",
            "slice",
            "contiguous",
            "clone",
            "alias",
        ):
            return None
        node = node.args[0]
    if not isinstance(node, Node):
        return None
    start = operator_arguments(node).get("start", 0)
    return offset + start if isinstance(start, int) else None


def _name(node: Any) -> str:
    if isinstance(node, Node) and isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name.partition("::")[2])
    return ""
