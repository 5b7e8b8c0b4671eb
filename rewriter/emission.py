"""Put an operator call in the place of a recognised site, in either graph dialect."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx

import subquad.kernels  # noqa: F401  (registers the operators)
from subquad.ir.graph import dtype_of, shape_of, value_of
from subquad.ir.mask import KV, B, Mask
from subquad.ir.rewrite import SiteOperator
from subquad.ir.site import Bias, Operand, Site

Node = torch.fx.Node
PARAMETERS = "subquad"
"""Name of the submodule, under the site's module, that holds the tensors a rewrite adds."""


class Emitter:
    """Inserts nodes before one place and records their fake values."""

    def __init__(self, module: torch.fx.GraphModule, before: Node) -> None:
        self.graph, self.before = module.graph, before
        self.module = module

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert target(*args, **kwargs)."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        concrete = torch.fx.node.map_arg((args, kwargs), value_of)
        try:
            with _fake_mode(concrete), torch.no_grad():
                node.meta["val"] = target(*concrete[0], **concrete[1])
        except Exception:
            node.meta["val"] = None
        return node

    def attribute(self, target: str, value: torch.Tensor) -> Node:
        """Insert a get_attr of a parameter the graph module already holds."""
        with self.graph.inserting_before(self.before):
            node = self.graph.get_attr(target)
        mode = _mode_of(value_of(n) for n in self.graph.nodes)
        node.meta["val"] = value if mode is None else mode.from_tensor(value.detach(), static_shapes=True)
        return node


def _mode_of(values: Any) -> Any:
    for value in torch.utils._pytree.tree_leaves(list(values)):
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return None


def _fake_mode(values: Any) -> Any:
    mode = _mode_of([values])
    return mode if mode is not None else torch.no_grad()


def emit_site(
    module: torch.fx.GraphModule, site: Site, call: SiteOperator, parameters: dict[str, torch.Tensor], prefix: str
) -> Node:
    """Replace the site's output by the operator's; returns the operator node.

    parameters: the tensors of call.parameters, already attributes of `module` under `prefix`.
    """
    emitter = Emitter(module, site.out)
    q, k, v = (_canonical(emitter, operand) for operand in (site.q, site.k, site.v))
    learned = {
        argument: [emitter.attribute(f"{prefix}.{name}", parameters[name]) for name in names]
        for argument, names in call.parameters.items()
    }
    if call.operator == "softmax_attention":
        node = _softmax(emitter, site, call, q, k, v)
    else:
        node = _recurrence(emitter, site, call, q, k, v, learned)
    out = emitter.call(operator.getitem, node, 0)
    out = _restored(emitter, out, site)
    if dtype_of(out) is not None and dtype_of(out) != dtype_of(site.out):
        out = emitter.call(torch.ops.aten.to.dtype, out, dtype_of(site.out))
    site.out.replace_all_uses_with(out, delete_user_cb=lambda user: user is not out)
    return node


def _softmax(emitter: Emitter, site: Site, call: SiteOperator, q: Node, k: Node, v: Node) -> Node:
    tables = [table.node for table in site.mask.tables]
    return emitter.call(
        torch.ops.subquad.softmax_attention.default,
        q, [k], [v], [], [], [], None, _bias(emitter, site, q), site.sinks, tables, _sizes(emitter, site.mask), call.spec,
    )  # fmt: skip


def _recurrence(
    emitter: Emitter, site: Site, call: SiteOperator, q: Node, k: Node, v: Node, learned: dict[str, list[Node]]
) -> Node:
    def one(name: str) -> Node | None:
        return learned[name][0] if learned.get(name) else None

    return emitter.call(
        torch.ops.subquad.recurrence.default,
        q, k, v, one("decay"), one("beta"), learned.get("feature_q", []), learned.get("feature_k", []), one("window_gate"),
        _valid(emitter, site.mask), None, None, None, None, None, call.spec,
    )  # fmt: skip


def _canonical(emitter: Emitter, operand: Operand) -> Node:
    """The operand as [B, T, H, D]."""
    node = operand.node
    order = [axis for axis in operand.axes if axis is not None]
    extra = [n for n in range(len(shape_of(node) or ())) if n not in order]
    for n in reversed(extra):
        node = emitter.call(torch.ops.aten.squeeze.dim, node, n)
        order = [axis - 1 if axis > n else axis for axis in order]
    if order != sorted(order):
        node = emitter.call(torch.ops.aten.permute.default, node, order)
    for place, axis in enumerate(operand.axes):
        if axis is None:
            node = emitter.call(torch.ops.aten.unsqueeze.default, node, place)
    return node


def _restored(emitter: Emitter, node: Node, site: Site) -> Node:
    """From [B, T, H, V] to the axes of the replaced output."""
    for place in reversed(range(4)):
        if site.out_axes[place] is None:
            node = emitter.call(torch.ops.aten.squeeze.dim, node, place)
    axes = [axis for axis in site.out_axes if axis is not None]
    order = sorted(range(len(axes)), key=lambda n: axes[n])
    return emitter.call(torch.ops.aten.permute.default, node, order) if order != list(range(len(axes))) else node


def _bias(emitter: Emitter, site: Site, q: Node) -> Node | None:
    total: Node | None = None
    for bias in site.biases:
        term = _term(emitter, bias, q)
        total = term if total is None else emitter.call(torch.ops.aten.add.Tensor, total, term)
    return total


def _term(emitter: Emitter, bias: Bias, q: Node) -> Node:
    if bias.role == "add":
        return bias.node if bias.factor == 1.0 else emitter.call(torch.ops.aten.mul.Tensor, bias.node, bias.factor)
    zeros = emitter.call(torch.ops.aten.zeros_like.default, bias.node, dtype=dtype_of(q))
    hidden = bias.node
    if dtype_of(hidden) != torch.bool:
        hidden = emitter.call(torch.ops.aten.ne.Scalar, hidden, 0)
    if bias.role == "keep":
        hidden = emitter.call(torch.ops.aten.logical_not.default, hidden)
    return emitter.call(torch.ops.aten.masked_fill.Scalar, zeros, hidden, float("-inf"))


def _sizes(emitter: Emitter, mask: Mask) -> list[Any]:
    return [_size_node(emitter, symbol) for symbol in mask.sizes]


def _size_node(emitter: Emitter, symbol: sympy.Symbol) -> Node:
    """A node that holds the value of a size symbol: a symbolic input, or the size of some input's axis."""
    for node in emitter.graph.nodes:
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
        for axis, size in enumerate(shape_of(node) or ()):
            if node.op == "placeholder" and isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return emitter.call(torch.ops.aten.sym_size.int, node, axis)
    raise ValueError(f"no input of the graph has the size {symbol}")


def padding_table(mask: Mask) -> Any | None:
    """The [B, T] table of a `table[b, kv] != 0` conjunct, None when the mask has no padding."""
    names = {table.name: table for table in mask.tables}
    return next((names[f.func.__name__].node for f in _padding_terms(mask)), None)


def _padding_terms(mask: Mask) -> list[Any]:
    if mask.predicate is None:
        return []
    parts = mask.predicate.args if isinstance(mask.predicate, sympy.And) else (mask.predicate,)
    return [
        part.args[0]
        for part in parts
        if isinstance(part, sympy.Ne) and part.args[1] == 0 and getattr(part.args[0], "args", ()) == (B, KV)
    ]


def _valid(emitter: Emitter, mask: Mask) -> Node | None:
    table = padding_table(mask)
    if table is None:
        return None
    return table if dtype_of(table) == torch.bool else emitter.call(torch.ops.aten.ne.Scalar, table, 0)
