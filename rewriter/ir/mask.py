"""The mask of an attention site as a symbolic predicate over (batch, head, query, key) indices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch.fx
from sympy.logic.boolalg import Boolean

from subquad.ir.mask_family import family_name
from subquad.ir.mask_symbols import KV, B, FloorDiv, H, Q, Where
from subquad.ir.mask_text import print_expression

__all__ = ["KV", "B", "EmptyRows", "FloorDiv", "H", "Mask", "Q", "Table", "Where", "print_expression"]

EmptyRows = Literal["zero", "mean", "nan"]


@dataclass(frozen=True)
class Table:
    """A tensor that the predicate reads: `name` is the sympy function's name, `node` the graph node that computes it.

    `axes` is its rank; a table indexed by both q and kv is dense and makes the mask opaque.
    """

    name: str
    node: Any = field(compare=False)
    axes: int = 0

    @property
    def label(self) -> str:
        """The tensor's name, and the input that it is computed from when that is one other tensor."""
        stack, inputs, met = [self.node], set[str](), set[Any]()
        while stack:
            node = stack.pop()
            if not isinstance(node, torch.fx.Node) or node in met:
                continue
            met.add(node)
            if node.op == "placeholder" or len(met) > 64:
                inputs.add(node.name)
            stack.extend(node.all_input_nodes if len(inputs) < 2 else [])
        return f"{self.name} of {inputs.pop()}" if len(inputs) == 1 and self.name not in inputs else self.name


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees.

    predicate: sympy boolean over b, h, q, kv, size symbols and tables; None when nothing could be proved (opaque), and
    then the site keeps the additive or boolean tensor `tensor` as it is.
    empty_rows: the value of a row that sees no key: "zero" (SDPA), "mean" (finite fill), "nan" (-inf without guard).
    evidence: sentences saying where the predicate was read and how it was cross-checked.
    """

    predicate: Boolean | None
    tables: tuple[Table, ...] = ()
    empty_rows: EmptyRows = "zero"
    tensor: Any = field(default=None, compare=False)
    evidence: tuple[str, ...] = ()

    @property
    def is_opaque(self) -> bool:
        """True when the mask is only known as a tensor."""
        return self.predicate is None

    @property
    def is_full(self) -> bool:
        """True when every query sees every key."""
        return self.predicate is sympy.true or self.predicate == sympy.true

    @property
    def family(self) -> str:
        """The field's name for the predicate: full, causal, window(8), padding(attention_mask), and conjunctions."""
        if self.predicate is None:
            return "opaque"
        return family_name(self.predicate, {table.name: table.label for table in self.tables})

    def text(self) -> str | None:
        """The predicate in the operators' expression language; None for a full or opaque mask.

        Tables print as t0, t1, … in the order of `tables`, size symbols as s0, s1, … in the order of `sizes`.
        """
        if self.predicate is None or self.is_full:
            return None
        names = {table.name: f"t{i}" for i, table in enumerate(self.tables)}
        sizes = {symbol: f"s{i}" for i, symbol in enumerate(self.sizes)}
        return print_expression(self.predicate, names, sizes)

    @property
    def sizes(self) -> tuple[sympy.Symbol, ...]:
        """Size symbols that the predicate reads, ordered by name."""
        if self.predicate is None:
            return ()
        free = self.predicate.free_symbols - {B, H, Q, KV}
        return tuple(sorted(free, key=lambda symbol: symbol.name))

    def block(self, q: tuple[int, int], kv: tuple[int, int]) -> str:
        """ "full", "empty" or "partial" for queries q[0]..q[1] and keys kv[0]..kv[1], both ends included.

        Sound: "full" and "empty" are proofs; a predicate that interval arithmetic cannot decide is "partial".
        """
        if self.predicate is None:
            return "partial"
        verdict = _interval(self.predicate, {Q: q, KV: kv})
        return {True: "full", False: "empty", None: "partial"}[verdict]

    def json(self) -> dict[str, Any]:
        """The public words of a mask."""
        return {
            "family": self.family,
            "predicate": None if self.predicate is None else print_expression(self.predicate, {}, {}),
            "tables": [table.name for table in self.tables],
            "empty_rows": self.empty_rows,
            "evidence": list(self.evidence),
        }


def _bounds(e: sympy.Basic, box: dict[sympy.Symbol, tuple[int, int]]) -> tuple[int, int] | None:
    if e.is_Integer:
        return int(e), int(e)
    if e in box:
        return box[e]
    parts = [_bounds(a, box) for a in e.args]
    if not parts or any(p is None for p in parts):
        return None
    ranges: list[tuple[int, int]] = [p for p in parts if p is not None]
    if isinstance(e, sympy.Add):
        return sum(lo for lo, _ in ranges), sum(hi for _, hi in ranges)
    if isinstance(e, sympy.Mul):
        lo, hi = ranges[0]
        for a, c in ranges[1:]:
            corners = (lo * a, lo * c, hi * a, hi * c)
            lo, hi = min(corners), max(corners)
        return lo, hi
    if isinstance(e, FloorDiv) and ranges[1][0] == ranges[1][1] > 0:
        return ranges[0][0] // ranges[1][0], ranges[0][1] // ranges[1][0]
    if isinstance(e, sympy.Abs):
        lo, hi = ranges[0]
        return (0 if lo <= 0 <= hi else min(abs(lo), abs(hi))), max(abs(lo), abs(hi))
    return None


def _interval(p: sympy.Basic, box: dict[sympy.Symbol, tuple[int, int]]) -> bool | None:
    """The truth of a predicate over a whole box of indices: True, False, or None when it varies or is unknown."""
    if p == sympy.true or p == sympy.false:
        return bool(p)
    if isinstance(p, sympy.Not):
        inner = _interval(p.args[0], box)
        return None if inner is None else not inner
    if isinstance(p, (sympy.And, sympy.Or)):
        absorbing = isinstance(p, sympy.Or)
        verdicts = [_interval(a, box) for a in p.args]
        if absorbing in verdicts:
            return absorbing
        return None if None in verdicts else not absorbing
    if isinstance(p, sympy.core.relational.Relational):
        difference = _bounds(sympy.expand(p.lhs - p.rhs), box)
        sides = _bounds(p.lhs, box), _bounds(p.rhs, box)
        if difference is None and sides[0] is not None and sides[1] is not None:
            difference = sides[0][0] - sides[1][1], sides[0][1] - sides[1][0]
        if difference is None:
            return None
        lo, hi = difference
        if isinstance(p, (sympy.Le, sympy.Lt)):
            return _sign(hi <= 0, lo > 0) if isinstance(p, sympy.Le) else _sign(hi < 0, lo >= 0)
        if isinstance(p, (sympy.Ge, sympy.Gt)):
            return _sign(lo >= 0, hi < 0) if isinstance(p, sympy.Ge) else _sign(lo > 0, hi <= 0)
        equal = _sign(lo == hi == 0, lo > 0 or hi < 0)
        if isinstance(p, sympy.Eq):
            return equal
        return None if equal is None else not equal
    return None


def _sign(always: bool, never: bool) -> bool | None:
    return True if always else False if never else None
