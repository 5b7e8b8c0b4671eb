"""Put an operator call in the place of a recognised site, in either graph dialect."""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
import torch.fx

import subquad.kernels  # noqa: F401  (registers the operators)
from subquad.ir.emitter import Emitter
from subquad.ir.graph import dtype_of, rank_of, shape_of, users_of, value_of
from subquad.ir.mask import KV, B, Mask
from subquad.ir.rewrite import SiteOperator
from subquad.ir.site import Bias, ScoreTensor, Site
from subquad.ir.vocabulary import kind
from subquad.layout_emission import canonical, laid_out, restored, size_node

Node = torch.fx.Node
LAYOUT = frozenset(
    ["view", "flatten", "unflatten", "transpose", "t", "permute", "movedim", "unsqueeze", "squeeze", "expand"]
)
PARAMETERS = "subquad"
"""Name of the submodule, under the site's module, that holds the tensors a rewrite adds."""


def emit_site(
    module: torch.fx.GraphModule, site: Site, call: SiteOperator, parameters: dict[str, torch.Tensor], prefix: str
) -> Node:
    """Replace the site's output by the operator's; returns the operator node.

    parameters: the tensors of call.parameters, already attributes of `module` under `prefix`.
    """
    emitter = Emitter(module, site.out)
    q, k, v = (_wide(emitter, canonical(emitter, operand, site), site) for operand in (site.q, site.k, site.v))
    learned = {
        argument: [emitter.attribute(f"{prefix}.{name}", parameters[name]) for name in names]
        for argument, names in call.parameters.items()
    }
    if call.operator == "softmax_attention":
        node = _softmax(emitter, site, call, q, k, v)
    else:
        node = _recurrence(emitter, site, call, q, k, v, learned)
    out = emitter.call(operator.getitem, node, 0)
    if call.operator == "softmax_attention" and isinstance(site.sinks, ScoreTensor):
        out = _shared_with_rows(emitter, out, node, site.sinks)
    out = restored(emitter, out, site)
    if dtype_of(out) is not None and dtype_of(out) != dtype_of(site.out):
        out = emitter.call(torch.ops.aten.to.dtype, out, dtype_of(site.out))
    site.out.replace_all_uses_with(out, delete_user_cb=lambda user: user is not out)
    _let_copy(out)
    return node


def _wide(emitter: Emitter, operand: Node, site: Site) -> Node:
    """The operand in the dtype of the site's result where that holds more digits: operators round to the queries' dtype."""
    held, wanted = dtype_of(operand), dtype_of(site.out)
    if held is None or wanted is None or held == wanted or torch.promote_types(held, wanted) != wanted:
        return operand
    return emitter.call(torch.ops.aten.to.dtype, operand, wanted)


def _let_copy(start: Node) -> None:
    """Views of the result become reshapes: its strides are the operator's, not those of the product it stands for."""
    stack = [start]
    while stack:
        for user in users_of(stack.pop()):
            if kind(user) not in LAYOUT:
                continue
            if user.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                user.target = torch.ops.aten.reshape.default
            elif user.target is torch.ops.aten.view_as.default:
                user.target = torch.ops.aten.reshape_as.default
            elif user.op == "call_method" and user.target in ("view", "view_as"):
                user.target = user.target.replace("view", "reshape")
            stack.append(user)


def _softmax(emitter: Emitter, site: Site, call: SiteOperator, q: Node, k: Node, v: Node) -> Node:
    tables = [table.node for table in site.mask.tables]
    if site.gain is not None:
        rows = laid_out(emitter, site.gain)
        for _ in range(4 - (rank_of(rows) or 0)):
            rows = emitter.call(torch.ops.aten.unsqueeze.default, rows, 0)
        rows = emitter.call(torch.ops.aten.permute.default, rows, [0, 2, 1, 3])
        operation = torch.ops.aten.div.Tensor if site.gain.divides else torch.ops.aten.mul.Tensor
        q = emitter.call(torch.ops.aten.to.dtype, emitter.call(operation, q, rows), dtype_of(q))
    return emitter.call(
        torch.ops.subquad.softmax_attention.default,
        q, [k], [v], [], [], [], None, _bias(emitter, site, q), _sinks(emitter, site), tables, _sizes(emitter, site.mask),
        call.spec,
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


def _bias(emitter: Emitter, site: Site, q: Node) -> Node | None:
    total: Node | None = None
    for bias in site.biases:
        term = _term(emitter, bias, q)
        total = term if total is None else emitter.call(torch.ops.aten.add.Tensor, total, term)
    return total


def _term(emitter: Emitter, bias: Bias, q: Node) -> Node:
    node = laid_out(emitter, bias)
    if bias.role == "add":
        return node if bias.factor == 1.0 else emitter.call(torch.ops.aten.mul.Tensor, node, bias.factor)
    zeros = emitter.call(torch.ops.aten.zeros_like.default, node, dtype=dtype_of(q))
    hidden = node
    if bias.role == "low":
        hidden = emitter.call(torch.ops.aten.le.Scalar, node, -1e30)
    elif dtype_of(node) != torch.bool:
        hidden = emitter.call(torch.ops.aten.ne.Scalar, node, 0)
    if bias.role == "keep":
        hidden = emitter.call(torch.ops.aten.logical_not.default, hidden)
    return emitter.call(torch.ops.aten.masked_fill.Scalar, zeros, hidden, bias.fill)


def _shared_with_rows(emitter: Emitter, out: Node, node: Node, sinks: ScoreTensor) -> Node:
    """The result where a further logit s of each row, without a value, takes its part: out·Σexp / (Σexp + exp s)."""
    logits = laid_out(emitter, sinks)
    if _is_per_head(logits):
        return out
    for _ in range(4 - (rank_of(logits) or 0)):
        logits = emitter.call(torch.ops.aten.unsqueeze.default, logits, 0)
    rows = emitter.call(torch.ops.aten.permute.default, logits, [0, 2, 1, 3])
    lse = emitter.call(torch.ops.aten.unsqueeze.default, emitter.call(operator.getitem, node, 1), -1)
    share = emitter.call(torch.ops.aten.sigmoid.default, emitter.call(torch.ops.aten.sub.Tensor, lse, rows))
    return emitter.call(torch.ops.aten.mul.Tensor, out, share)


def _is_per_head(logits: Node) -> bool:
    """True for logits [1, H, 1, 1], which the operator takes itself."""
    shape = (1,) * 4 + (shape_of(logits) or ())
    return all(isinstance(size, int) and size == 1 for size in (shape[-4], shape[-2], shape[-1]))


def _sinks(emitter: Emitter, site: Site) -> Node | None:
    """The logits [H]; none where each row has its own."""
    if site.sinks is None:
        return None
    if isinstance(site.sinks, float):
        return emitter.call(
            torch.ops.aten.full.default, [site.heads], site.sinks, dtype=torch.float32, device=_device(site)
        )
    logits = laid_out(emitter, site.sinks)
    if not _is_per_head(logits):
        return None
    logits = emitter.call(torch.ops.aten.flatten.using_ints, logits, 0, -1)
    return emitter.call(torch.ops.aten.expand.default, logits, [site.heads])


def _device(site: Site) -> torch.device:
    value = value_of(site.out)
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def _sizes(emitter: Emitter, mask: Mask) -> list[Any]:
    return [size_node(emitter, symbol) for symbol in mask.sizes]


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
