"""Write FlexAttention's higher-order operator out as product, score_mod, mask, softmax and product, so that it can be read.

The functions that the user gave work on one score at a time; here they are applied to all scores at once, with the indices
laid out to broadcast over [B, H, Tq, Tk].
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from subquad.ir.emitter import Emitter
from subquad.ir.graph import dtype_of, shape_of, users_of, value_of
from subquad.ir.vocabulary import kind

Node = torch.fx.Node
aten = torch.ops.aten
ELEMENTWISE = frozenset(
    ["mul", "div", "floordiv", "mod", "add", "sub", "rsub", "neg", "abs", "tanh", "exp", "where", "masked_fill",
     "maximum", "le", "lt", "ge", "gt", "eq", "ne", "and", "or", "not", "cast", "contiguous", "clamp", "scalar_tensor", "index",
     "full", "ones", "new_ones", "full_like"]
)  # fmt: skip


def flex_written_out(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same computation with every flex_attention whose functions are elementwise written out; itself when there is none.

    module: a captured graph with recorded values.  A call whose log-sum-exp is read, or whose functions hold anything but
    elementwise operations and reads of a tensor at their indices, stays as it is.
    """
    calls = [node for node in module.graph.nodes if is_flex(node)]
    if all(why_kept(module, node) for node in calls):
        return module
    environment: dict[Node, Node] = {}
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, environment))
    copied = torch.fx.GraphModule(module, graph)
    for node in calls:
        if not why_kept(module, node):
            _write_out(copied, environment[node])
    _without_islands(graph)
    copied.recompile()
    return copied


def _without_islands(graph: torch.fx.Graph) -> None:
    """Drop what is connected neither to the output nor to anything from outside: the block masks of replaced calls.

    They may hold writes and vmap regions, which elimination of dead code keeps.
    """
    graph.eliminate_dead_code()
    reached = {graph.output_node()}
    stack = [graph.output_node()]
    while stack:
        node = stack.pop()
        for other in [*node.all_input_nodes, *(() if node.op in ("placeholder", "get_attr") else node.users)]:
            if other not in reached:
                reached.add(other)
                stack.append(other)
    nested = any("batch_dim" in str(node.target) for node in reached)
    for node in reversed(list(graph.nodes)):
        outside = node.op in ("placeholder", "get_attr") or any(n.op == "placeholder" for n in node.all_input_nodes)
        bookkeeping = "_functorch.predispatch" in str(getattr(node.target, "__module__", ""))
        if node in reached or outside or node.users or (bookkeeping and nested):
            continue
        graph.erase_node(node)


def is_flex(node: Any) -> bool:
    """True for a call of the flex_attention operator."""
    return isinstance(node, Node) and getattr(node.target, "__name__", "") == "flex_attention"


def why_kept(module: torch.fx.GraphModule, node: Node) -> str:
    """The reason why a call is not written out; "" when it is."""
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in users_of(node)):
        return "the log-sum-exp or the maxima of flex_attention are read, which no rewrite gives"
    parts = _parts(module, node)
    for name in ("score_mod", "mask_mod"):
        odd = _odd_operation(parts[name])
        if odd is not None:
            return f"the {name} of flex_attention holds `{kind(odd) or odd.target}`, which is not understood"
    return ""


def _parts(module: torch.fx.GraphModule, node: Node) -> dict[str, Any]:
    """The operator's arguments by name; mask_mod is the last of the block mask."""
    names = ("q", "k", "v", "score_mod", "block_mask", "scale", "options", "score_buffers", "mask_buffers")
    found: dict[str, Any] = {"score_buffers": (), "mask_buffers": ()}
    found.update(zip(names, node.args, strict=False))
    found.update(node.kwargs)
    for name, holder in (("score_mod", found["score_mod"]), ("mask_mod", found["block_mask"][-1])):
        found[name] = module.get_submodule(str(holder.target))
    return found


def _odd_operation(part: torch.fx.GraphModule) -> Node | None:
    """The first operation of a function that does not act on each element alone."""
    for node in part.graph.nodes:
        if node.op in ("placeholder", "output") or kind(node) in ELEMENTWISE or _read_of(node) is not None:
            continue
        if node.op == "get_attr" and all(_read_of(user) is not None for user in users_of(node)):
            continue
        if kind(node) == "getitem" and all(isinstance(n, Node) for n in _items(node.args[1])):
            continue
        return node
    return None


def _read_of(node: Node) -> tuple[Node, tuple[Any, ...]] | None:
    """The tensor and the indices of an element that torch.export reads by applying an index function; else None."""
    if getattr(node.target, "__name__", "") != "flat_apply" or "mod_index" not in str(node.args[1]).lower():
        return None
    tensor, *indices = node.args[3:]
    assert isinstance(tensor, Node)
    return tensor, tuple(indices)


def _items(index: Any) -> tuple[Any, ...]:
    return tuple(index) if isinstance(index, list | tuple) else (index,)


def _write_out(module: torch.fx.GraphModule, node: Node) -> None:
    parts = _parts(module, node)
    emit = Emitter(module, node)
    q, k, v = parts["q"], parts["k"], parts["v"]
    groups = _size(q, 1) // _size(k, 1)
    if groups > 1:
        k, v = (emit.call(aten.repeat_interleave.self_int, side, groups, 1) for side in (k, v))
    scores = emit.call(aten.matmul.default, q, emit.call(aten.transpose.int, k, -2, -1))
    scores = emit.call(aten.mul.Tensor, scores, parts["scale"])
    indices = [_index(emit, q, 0, 0), _index(emit, q, 1, 1), _index(emit, q, 2, 2), _index(emit, k, 2, 3)]
    scores = _applied(emit, parts["score_mod"], (scores, *indices, *parts["score_buffers"]))
    seen = _applied(emit, parts["mask_mod"], (*indices, *parts["mask_buffers"]))
    scores = emit.call(aten.where.ScalarOther, seen, scores, float("-inf"))
    weights = emit.call(aten._safe_softmax.default, scores, -1)
    if dtype_of(weights) != dtype_of(v):
        weights = emit.call(aten.to.dtype, weights, dtype_of(v))
    out = emit.call(aten.matmul.default, weights, v)
    for user in users_of(node):
        if user.args[1] == 0:
            user.replace_all_uses_with(out)
        module.graph.erase_node(user)
    module.graph.erase_node(node)


def _size(node: Node, axis: int) -> Any:
    return (shape_of(node) or ())[axis]


def _index(emit: Emitter, like: Node, axis: int, place: int) -> Node:
    """The indices along an axis of a tensor, as the axis `place` of four."""
    size = _size(like, axis)
    length = size if isinstance(size, int) else emit.call(aten.sym_size.int, like, axis)
    value = value_of(like)
    device = value.device if isinstance(value, torch.Tensor) else torch.device("cpu")
    index = emit.call(aten.arange.default, length, device=device)
    for axis_before in range(place):
        index = emit.call(aten.unsqueeze.default, index, axis_before)
    for _ in range(3 - place):
        index = emit.call(aten.unsqueeze.default, index, -1)
    return index


def _applied(emit: Emitter, part: torch.fx.GraphModule, values: tuple[Any, ...]) -> Any:
    """Insert the operations of a function of single elements, applied to tensors that broadcast together."""
    environment: dict[Node, Any] = {}
    given = iter(values)
    for node in part.graph.nodes:
        if node.op == "placeholder":
            environment[node] = next(given)
        elif node.op == "output":
            result = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]
            return environment[result] if isinstance(result, Node) else result
        elif (read := _read_of(node)) is not None:
            tensor, indices = torch.fx.node.map_arg(read, lambda n: environment[n])
            environment[node] = emit.call(aten.index.Tensor, tensor, list(indices))
        elif node.op != "get_attr":
            args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: environment[n])
            environment[node] = emit.operation(node, args, kwargs)
    raise ValueError("a graph without an output")
