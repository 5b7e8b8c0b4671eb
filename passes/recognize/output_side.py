"""Reads what is done to the output of an attention before anything else reads it: a norm of each head's row, and a gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch.fx

from subquad.ir.graph import rank_of, shape_of
from subquad.ir.provenance import Norm, Output
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.projection_norm import read_norm
from subquad.passes.recognize.provenance_terms import given, word

Node = torch.fx.Node
Act = Literal["sigmoid", "silu"]
IDLE = ("cast", "contiguous", "clone", "alias", "detach")
Held = Callable[[Any], Node | None]
"""The parameter or buffer that an argument is; None when it is computed."""
REACH = 24
"""Operations behind an output that are searched for a norm or a gate."""


def read_output(out: Node, width: int, held: Held) -> Output:
    """What stands behind `out`, whose last axis are the `width` columns of one head's rows.

    Every value up to the last of them has one reader (the parts of a norm aside) and keeps these rows whole.  The gate has the
    shape of what it gates, so that every number has its own, and does not depend on the output.
    """
    norm: Norm | None = None
    here = out
    for _ in range(REACH):
        found = _norm_of(here, width, held) if norm is None else None
        if found is not None:
            norm, here = found, found.node
            continue
        users = list(here.users)
        if len(users) != 1:
            break
        gate = _gate(users[0], here)
        if gate is not None:
            return Output(norm, None) if out in _behind(gate[1], out) else Output(norm, gate[0])
        if not _keeps_rows(users[0], here, width):
            break
        here = users[0]
    return Output(norm, None)


def _behind(node: Node, start: Node) -> set[Node]:
    """What `node` is computed from, back to `start` and nothing before it."""
    found, reach = {node}, [node]
    while reach:
        for before in reach.pop().all_input_nodes:
            if before not in found and not before < start:
                found.add(before)
                reach.append(before)
    return found


def _keeps_rows(user: Node, x: Node, width: int) -> bool:
    """True for casts and for views that leave the runs of `width` numbers along the last axis whole."""
    if word(user) in IDLE:
        return bool(user.args) and user.args[0] is x
    last = (shape_of(user) or (None,))[-1]
    if not isinstance(last, int) or last % width:
        return False
    if kind(user) in ("view", "flatten", "unflatten"):
        return True
    rank = rank_of(user) or 0
    if kind(user) == "transpose":
        named = arguments(user)
        return all(axis % rank != rank - 1 for axis in (named["dim0"], named["dim1"]))
    if kind(user) == "permute":
        return bool(arguments(user)["dims"][-1] % rank == rank - 1)
    return False


def _norm_of(x: Node, width: int, held: Held) -> Norm | None:
    """The RMS norm of the rows of x, with its weight, where nothing else reads x."""
    if (shape_of(x) or (None,))[-1] != width:
        return None
    found: Norm | None = None
    reach, seen = [x], {x}
    while reach and len(seen) < REACH:
        for user in reach.pop(0).users:
            if user in seen:
                continue
            seen.add(user)
            norm = read_norm(user, held)
            if norm is None or norm.name != "rms" or _bare(norm.x) is not _bare(x):
                reach.append(user)
            elif found is None or (found.weight is None and norm.weight is not None):
                found = norm
                reach.append(user)
    if found is None:
        return None
    inside = _behind(found.node, x)
    parts = [part for part in inside - {found.node} if x in _behind(part, x)]
    return found if all(user in inside for part in parts for user in part.users) else None


def _bare(node: Any) -> Any:
    while word(node) in ("cast", "contiguous"):
        node = given(node, 0, "input")
    return node


def _gate(product: Node, x: Node) -> tuple[Act, Node] | None:
    """(act, g) of x * act(g) with g of x's shape."""
    if word(product) != "mul":
        return None
    a, b = given(product, 0, "input"), given(product, 1, "other")
    other = b if a is x else a
    if not isinstance(other, Node) or other is x or shape_of(other) != shape_of(x):
        return None
    other = _bare(other)
    name = word(other)
    acts: dict[str, Act] = {"sigmoid": "sigmoid", "silu": "silu"}
    if name in acts:
        gate = given(other, 0, "input")
        return (acts[name], gate) if isinstance(gate, Node) and shape_of(gate) == shape_of(x) else None
    if name == "mul":
        sides = given(other, 0, "input"), given(other, 1, "other")
        for g, act in (sides, sides[::-1]):
            if (
                word(_bare(act)) == "sigmoid"
                and isinstance(g, Node)
                and _bare(given(_bare(act), 0, "input")) is _bare(g)
            ):
                return ("silu", g) if shape_of(g) == shape_of(x) else None
    return None
