"""Prove that the tables of a rotary embedding are cosines and sines of one position times fixed frequencies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import sympy
import torch
import torch.fx

from subquad.ir.graph import attribute, dtype_of, shape_of
from subquad.ir.provenance import BATCH, TIME, Position
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.provenance_index import Index
from subquad.passes.recognize.provenance_terms import Expansion, Read, Term, given, term_lanes, word
from subquad.passes.recognize.symbolic_tensor import axis, is_one

Node = torch.fx.Node
Angle = tuple[Read, Read]
"""What an angle is the product of: a position, the same in every lane, and frequencies, the same at every position."""
TOLERANCE = 1e-4


class AngleReader:
    """Reads tables of one graph; positions are given as formulas by its mask algebra.

    roles: of every token "b", "t" or "h".  sizes: of every token.
    """

    def __init__(self, algebra: MaskAlgebra, sizes: dict[str, Any], roles: dict[str, str]) -> None:
        self.algebra, self.sizes, self.roles = algebra, sizes, roles
        self.module = algebra.module

    def position(self, cos: Read, sin: Read) -> tuple[Position | None, float, str]:
        """(position, factor on both tables, why there is none)."""
        of_cos, of_sin = self._root(cos), self._root(sin)
        if of_cos is None or of_sin is None:
            return None, 1.0, "the tables are put together from several tensors"
        (c, c_factor), (s, s_factor) = of_cos, of_sin
        if abs(c_factor - s_factor) > 1e-12 * abs(c_factor):
            return None, 1.0, "cosines and sines are scaled differently"
        names = [self._function(read) for read in (c, s)]
        if names[0] == "cos" and names[1] == "sin":
            return self._from_angles(c, s, c_factor)
        held = [self.constant(read.node) for read in (c, s)]
        if held[0] is not None and held[1] is not None:
            return self._from_content(c, s, held[0], held[1], c_factor)
        return self._from_rows(c, s, c_factor)

    def _root(self, read: Read) -> tuple[Read, float] | None:
        """Where a table is made, behind views, casts, concatenations and numbers; None when by several tensors."""
        lanes = np.arange(len(term_lanes(read)))
        expansion = Expansion(lambda n: False, lambda n: False, self.sizes, tables=True)
        leaves = expansion.leaves(Term(read, lanes, trail=(read,)))
        nodes = {leaf.read.node for leaf in leaves}
        numbers = {leaf.sign for leaf in leaves}
        if len(nodes) != 1 or len(numbers) != 1:
            return None
        merged = _merged(leaves, len(lanes))
        return None if merged is None else (merged, numbers.pop())

    def _function(self, read: Read) -> str:
        name = word(read.node)
        if name == "polar" and read.part is not None:
            return "sin" if read.part[0] else "cos"
        return name

    def _argument(self, read: Read) -> Read | None:
        if word(read.node) == "polar":
            radius, angle = read.node.args[:2]
            if _only_number(radius, self) != 1.0:
                return None
            return Read(angle, read.indices) if isinstance(angle, Node) else None
        inner: Node = given(read.node, 0, "input")
        return Read(inner, read.indices)

    def _from_angles(self, cos: Read, sin: Read, factor: float) -> tuple[Position | None, float, str]:
        angles = []
        for read in (cos, sin):
            inner = self._argument(read)
            root = None if inner is None else self._root(inner)
            if root is None:
                return (
                    None,
                    factor,
                    "the angle is put together from several tensors, not one position times frequencies",
                )
            angle = self._product(root[0])
            if angle is None:
                return None, factor, f"the angle is made by `{word(root[0].node)}`, not as a position times frequencies"
            angles.append((angle, root[1]))
        (of_cos, a), (of_sin, b) = angles
        same = a == b and all(_equal(x, y) for x, y in zip(of_cos, of_sin, strict=True))
        if not same:
            return None, factor, "cosines and sines are of different angles"
        position, frequency = of_cos
        expression = self.expression(position)
        if isinstance(expression, str):
            return None, factor, expression
        node, formula = expression
        values = self.values(frequency)
        frequencies = None if values is None else tuple((values * a).tolist())
        return Position(node, formula, frequencies, base_of(frequencies)), factor, ""

    def _product(self, read: Read) -> Angle | None:
        """An angle as position × frequency, written as a product, an outer product or a matrix product over one term."""
        node, name = read.node, word(read.node)
        lanes = len(term_lanes(read))
        zero = Index(np.zeros(lanes, dtype=np.int64))
        expansion = Expansion(lambda n: False, lambda n: False, self.sizes, tables=True)
        if name == "mul":
            sides = [expansion.aligned(x, read) for x in (given(node, 0, "input"), given(node, 1, "other"))]
        elif name == "matmul":
            a = arguments(node)
            left, right = shape_of(a["a"]) or (), shape_of(a["b"]) or ()
            if len(left) != len(right) or not is_one(left[-1]) or not is_one(right[-2]):
                return None
            *batch, m, n = read.indices
            sides = [Read(a["a"], (*batch, m, zero)), Read(a["b"], (*batch, zero, n))]
        elif name in ("outer", "ger"):
            first, second = given(node, 0, "input"), given(node, 1, "vec2")
            sides = [Read(first, read.indices[:1]), Read(second, read.indices[1:])]
        elif name == "einsum":
            a = arguments(node)
            inputs, _, out = str(a["equation"]).replace(" ", "").partition("->")
            labels = inputs.split(",")
            if len(labels) != 2 or set("".join(labels)) != set(out) or "." in inputs:
                return None
            known = dict(zip(out, read.indices, strict=True))
            sides = [Read(x, tuple(known[c] for c in term)) for x, term in zip(a["operands"], labels, strict=True)]
        else:
            return None
        found: list[Read] = []
        for side in sides:
            root = None if side is None else self._root(side)
            if root is None or root[1] != 1.0:
                return None
            found.append(root[0])
        for position, frequency in (found, found[::-1]):
            if not any(i.terms for i in frequency.indices) and all(_constant(i) for i in position.indices):
                return position, frequency
        return None

    def _from_content(
        self, cos: Read, sin: Read, c: torch.Tensor, s: torch.Tensor, factor: float
    ) -> tuple[Position | None, float, str]:
        """Tables that are held: rows are positions, and the content must be cosines and sines of their multiples."""
        rows = [self._row_axis(read) for read in (cos, sin)]
        if rows[0] is None or rows[1] is None or not _equal_index(cos.indices[rows[0]], sin.indices[rows[1]]):
            return None, factor, "the held tables are not read one row per position"
        found = self._verified(c, s, cos, sin, rows)  # type: ignore[arg-type]
        if found is None:
            return None, factor, "the held tables are not cosines and sines of a position times fixed frequencies"
        expression = self._formula(cos.indices[rows[0]])
        if expression is None:
            return None, factor, "the rows of the held tables are not taken in order"
        return Position(None, expression, found, base_of(found)), factor, ""

    def _row_axis(self, read: Read) -> int | None:
        moving = [n for n, index in enumerate(read.indices) if index.terms]
        return moving[0] if len(moving) == 1 else None

    def _verified(
        self, c: torch.Tensor, s: torch.Tensor, cos: Read, sin: Read, rows: list[int]
    ) -> tuple[float, ...] | None:
        tables = []
        for tensor, read, row in ((c, cos, rows[0]), (s, sin, rows[1])):
            index: list[Any] = [torch.as_tensor(i.values) for i in read.indices]
            moved = tensor.detach().cpu().movedim(row, 0)
            rest = [i for n, i in enumerate(index) if n != row]
            picked = moved[(slice(None), *rest)] if rest else moved[:, None]
            if picked.is_complex():
                picked = picked.imag if read.part is not None and read.part[0] else picked.real
            tables.append(picked.double())
        cosines, sines = tables
        if cosines.shape != sines.shape or cosines.shape[0] < 2:
            return None
        frequencies = torch.atan2(sines[1], cosines[1])
        angles = torch.arange(cosines.shape[0], dtype=torch.float64)[:, None] * frequencies
        slack = TOLERANCE * (1 + torch.arange(cosines.shape[0], dtype=torch.float64)[:, None])
        good = ((cosines - angles.cos()).abs() < slack) & ((sines - angles.sin()).abs() < slack)
        return tuple(frequencies.tolist()) if bool(good.all()) else None

    def _from_rows(self, cos: Read, sin: Read, factor: float) -> tuple[Position | None, float, str]:
        """Tables whose rows are picked by a tensor of positions: indexing, an embedding, gather."""
        of_cos, of_sin = self._picked(cos), self._picked(sin)
        if of_cos is None or of_sin is None:
            return None, factor, f"the tables are made by `{word(cos.node) or cos.node.name}`, whose angle is not known"
        (c, c_row, c_at), (s, s_row, s_at) = of_cos, of_sin
        tables = self.constant(c.node), self.constant(s.node)
        if tables[0] is None or tables[1] is None or c_at.node is not s_at.node:
            return None, factor, "rows are picked from tables whose content is not known"
        found = self._verified(tables[0], tables[1], c, s, [c_row, s_row])
        if found is None:
            return None, factor, "the held tables are not cosines and sines of a position times fixed frequencies"
        expression = self.expression(c_at)
        if isinstance(expression, str):
            return None, factor, expression
        return Position(expression[0], expression[1], found, base_of(found)), factor, ""

    def _picked(self, read: Read) -> tuple[Read, int, Read] | None:
        """(the table read at row zero, its row axis, the positions) of a table whose rows are picked."""
        node, name = read.node, word(read.node)
        zero = Index(np.zeros(len(term_lanes(read)), dtype=np.int64))
        table, ids = None, None
        if name == "embedding":
            a = arguments(node) if kind(node) == "embedding" and node.op != "call_function" else None
            first, second = (a["weight"], a["indices"]) if a else node.args[:2]
            table, ids = (first, second) if dtype_of(second) not in (torch.float32, None) else (second, first)
        elif name == "index":
            rows = given(node, 1, "indices")
            if isinstance(rows, list | tuple) and len(rows) == 1:
                table, ids = node.args[0], rows[0]
        elif name == "getitem" and isinstance(node.args[1], Node):
            table, ids = node.args[0], node.args[1]
        elif name == "gather":
            table, ids = given(node, 0, "input"), given(node, 2, "index")
            along = given(node, 1, "dim") % len(read.indices)
            inner = tuple(zero if n == along else index for n, index in enumerate(read.indices))
            root = self._root(Read(table, inner))
            at = self._root(Read(ids, read.indices))
            if root is None or at is None or not all(_constant(i) for i in at[0].indices):
                return None
            flat = Read(root[0].node, tuple(Index(i.values) for i in root[0].indices))
            rows_axis = (shape_of(root[0].node) or ()).__len__() - 2
            return flat, rows_axis, at[0]
        if not isinstance(ids, Node) or not isinstance(table, Node):
            return None
        rank = len(shape_of(ids) or ())
        root = self._root(Read(table, (zero, *read.indices[rank:]), read.part))
        at = self._root(Read(ids, read.indices[:rank]))
        if root is None or at is None:
            return None
        return root[0], 0, at[0]

    def constant(self, node: Node) -> torch.Tensor | None:
        """The content of a held tensor that is no trained parameter."""
        if node in self.algebra.tensors:
            return self.algebra.tensors[node]
        if node.op == "get_attr":
            value = attribute(self.module, str(node.target))
            if isinstance(value, torch.Tensor):
                return value
        return None

    def values(self, read: Read) -> np.ndarray | None:
        """The numbers that lanes read of a tensor made of constants alone."""
        tensor = self.constant(read.node)
        if tensor is None:
            tensor = _computed(read.node, self, 0)
        if tensor is None or tensor.is_meta:
            return None
        picked = tensor.detach().cpu()[tuple(torch.as_tensor(i.values) for i in read.indices)]
        return np.asarray(picked.double().tolist())

    def expression(self, read: Read) -> tuple[Node, sympy.Basic] | str:
        """The node that holds a position, and its formula in BATCH and TIME; a sentence when it has none."""
        node = read.node
        try:
            formula = self.algebra.formula(node).expression
        except (TypeError, KeyError):
            return f"the position `{node.name}` is no tensor"
        named = {axis(n): self._formula(index) for n, index in enumerate(read.indices)}
        if any(value is None for value in named.values()):
            return f"the position `{node.name}` is read along other axes than batch and time"
        return node, formula.xreplace(named)

    def _formula(self, index: Index) -> sympy.Basic | None:
        """An index that lanes share, in BATCH and TIME."""
        if not _constant(index):
            return None
        total: sympy.Basic = sympy.Integer(int(index.values[0]) if index.values.size else 0)
        for token, factor in index.terms:
            symbol = {"b": BATCH, "t": TIME}.get(self.roles.get(token, ""))
            if symbol is None and token.startswith("+"):
                symbol = sympy.Symbol(token[1:], integer=True)
            if symbol is None:
                return None
            total = total + factor * symbol
        return total


def _merged(leaves: list[Term], lanes: int) -> Read | None:
    """One read of what several terms read of one node, each for some of the lanes."""
    read = leaves[0].read
    indices = []
    for n, index in enumerate(read.indices):
        values = np.zeros(lanes, dtype=np.int64)
        for leaf in leaves:
            other = leaf.read.indices[n]
            if other.terms != index.terms:
                return None
            values[leaf.lanes] = other.values
        indices.append(Index(values, index.terms))
    part = None
    if read.part is not None:
        part = np.zeros(lanes, dtype=np.int64)
        for leaf in leaves:
            if leaf.read.part is not None:
                part[leaf.lanes] = leaf.read.part
    return Read(read.node, tuple(indices), part)


def _constant(index: Index) -> bool:
    return bool((index.values == index.values[:1]).all())


def _equal_index(a: Index, b: Index) -> bool:
    return a.terms == b.terms and np.array_equal(a.values, b.values)


def _equal(a: Read, b: Read) -> bool:
    return a.node is b.node and all(_equal_index(x, y) for x, y in zip(a.indices, b.indices, strict=True))


def _only_number(node: Any, reader: AngleReader) -> float | None:
    if isinstance(node, int | float):
        return float(node)
    if word(node) in ("ones", "ones_like"):
        return 1.0
    tensor = reader.constant(node) if isinstance(node, Node) else None
    return (
        float(tensor.reshape(-1)[0]) if tensor is not None and bool((tensor == tensor.reshape(-1)[0]).all()) else None
    )


def _computed(node: Node, reader: AngleReader, depth: int) -> torch.Tensor | None:
    """A small tensor computed from constants alone; None when anything else is needed."""
    if depth > 20 or node.op not in ("call_function", "call_method", "get_attr"):
        return reader.constant(node) if node.op == "placeholder" else None
    if node.op == "get_attr":
        return reader.constant(node)
    known: dict[Node, torch.Tensor] = {}
    for inner in node.all_input_nodes:
        value = _computed(inner, reader, depth + 1)
        if value is None:
            return None
        known[inner] = value
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: known[n])
    with torch.no_grad():
        target: Any = node.target
        made = target(*args, **kwargs) if node.op == "call_function" else getattr(args[0], target)(*args[1:], **kwargs)
    return made if isinstance(made, torch.Tensor) else None


def base_of(frequencies: tuple[float, ...] | None) -> float | None:
    """θ when the distinct frequencies, in falling order, are θ^(-2j/width) for j = 0, 1, …; None for any other."""
    if frequencies is None or len(frequencies) < 4:
        return None
    half = len(frequencies) // 2
    distinct = np.array(sorted(frequencies, reverse=True)[::2], dtype=np.float64)
    if abs(distinct[0] - 1) > TOLERANCE or distinct[1] <= 0:
        return None
    theta = float(distinct[1] ** -half)
    near = float(round(theta))
    for base in (near, theta):
        if base > 0 and np.allclose(distinct, base ** (-np.arange(half) / half), rtol=1e-3, atol=1e-9):
            return base
    return None


def with_position(rotary: Any, found: tuple[Position | None, float, str]) -> Any:
    """A rotation with its proved position, or with the reason why there is none."""
    position, factor, why = found
    return replace(rotary, position=position, scale=factor, why=why)
