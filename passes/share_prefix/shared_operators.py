"""What our own attention operators do to claims about shared columns: shared queries must read shared keys alone."""

from __future__ import annotations

import ast
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import shape_of
from subquad.kernels.expression import parse
from subquad.kernels.recurrence_arguments import TOKENS
from subquad.kernels.recurrence_op import ARGUMENTS as RECURRENCE_ARGUMENTS
from subquad.kernels.softmax_op import ARGUMENTS
from subquad.kernels.spec import RecurrenceSpec, SoftmaxSpec
from subquad.kernels.visibility import CAUSAL
from subquad.passes.recognize.symbolic_tensor import axis, is_one
from subquad.passes.share_prefix.claims import Claims, Shared, Sizes, meet

Node = torch.fx.Node


def softmax_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a softmax_attention node by name."""
    return dict(zip(ARGUMENTS, node.args, strict=True))


def softmax_operator(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """The claim of both results, whose rows and columns are their first two axes."""
    named = softmax_arguments(node)
    if any(named[name] for name in ("rows", "lengths", "positions")) or named["q_positions"] is not None:
        return None
    parts = [claims.get(n) for n in (named["q"], *named["k"], *named["v"])]
    known = [part for part in parts if part is not None and part.row == axis(0) and part.column in (None, axis(1))]
    if len(known) < len(parts) or not _alike(named["bias"], batch):
        return None
    mask = SoftmaxSpec.parse(named["spec"]).mask
    whole = all(part.column is None for part in known)
    return meet(known) if mask_allows(mask, whole) and (whole or named["bias"] is None) else None


def recurrence_arguments(node: Node) -> dict[str, Any]:
    """The arguments of a recurrence node by name."""
    return dict(zip(RECURRENCE_ARGUMENTS, node.args, strict=True))


def token_arguments(named: dict[str, Any]) -> list[str]:
    """Those arguments of a recurrence, by name, whose first two axes are rows and columns."""
    given = [name for name in TOKENS if isinstance(named[name], Node)]
    return [name for name in given if name != "decay" or RecurrenceSpec.parse(named["spec"]).decay != "head"]


def recurrence_operator(node: Node, claims: Claims, batch: Sizes) -> Shared | None:
    """The claim of the output; the states behind the last token are shared only where all columns are."""
    named = recurrence_arguments(node)
    if named["state"] is not None or named["cu_seqlens"] is not None:
        return None
    tokens = token_arguments(named)
    parts = [claims.get(named[name]) for name in tokens]
    known = [part for part in parts if part is not None and part.row == axis(0) and part.column in (None, axis(1))]
    others = [n for n in node.all_input_nodes if n not in [named[name] for name in tokens]]
    if len(known) < len(parts) or any(n in claims for n in others):
        return None
    whole = all(part.column is None for part in known)
    return meet(known) if whole or RecurrenceSpec.parse(named["spec"]).causal else None


def _alike(bias: object, batch: Sizes) -> bool:
    """True when all rows of the batch are given one bias."""
    shape = shape_of(bias) if isinstance(bias, Node) else ()
    return shape is not None and (len(shape) < 4 or is_one(shape[-4]))


def mask_allows(mask: str | None, whole: bool) -> bool:
    """True when the mask is the same for all rows and, unless all keys are shared, shows a query no key behind it."""
    if mask is None:
        return whole
    terms = _terms(parse(mask).node)
    if any(parse(term).names & {"b", "i", "j"} for term in terms):
        return False
    return whole or any(term in CAUSAL for term in terms)


def _terms(node: ast.expr) -> list[str]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return [*_terms(node.left), *_terms(node.right)]
    return [ast.unparse(node)]
