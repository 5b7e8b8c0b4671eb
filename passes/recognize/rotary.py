"""Read a rotary embedding from the terms of an operand: which pairs it turns, by which tables, what it turned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.fx

from subquad.ir.graph import shape_of, value_of
from subquad.ir.provenance import Rotary, Table
from subquad.ir.vocabulary import kind
from subquad.passes.recognize.provenance_index import REGROUPED, SIMPLE, Indices, trace_lanes
from subquad.passes.recognize.provenance_terms import Read, Term
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
LAYOUTS = (SIMPLE | REGROUPED) - {"slice", "select", "narrow"}
Turned = tuple[Rotary, Read, Read]
"""A rotation without its position, and what its cosines and sines read, one lane per place of the width."""


def read_rotary(
    terms: Sequence[Term], start: int, width: int, sizes: dict[str, Any], roles: dict[str, str]
) -> Turned | str:
    """The rotation that gives places start … start + width of an operand; a sentence when the terms are none.

    terms: those of these places, ending where the pre-rotary tensor's origin begins.  roles: of every token "b", "t" or "h".
    """
    if any(len(term.factors) != 1 for term in terms):
        return "each element meets more than one table"
    groups = _groups(terms, sizes, SIMPLE | REGROUPED | {"getitem"})
    if len(groups) != 2:
        groups = _groups(terms, sizes, LAYOUTS)
    if len(groups) != 2:
        return f"it is multiplied by {len(groups)} tables, where a rotation has cosines and sines"
    numbers = {abs(term.sign) for term in terms}
    signs = {key: {np.sign(term.sign) for term, _ in found} for key, found in groups.items()}
    cosines = [key for key in groups if signs[key] == {1.0}]
    sines = [key for key in groups if signs[key] == {1.0, -1.0}]
    if len(cosines) != 1 or len(sines) != 1 or numbers != {1.0}:
        return "the signs of the products are not those of a rotation"
    pre = _common(terms, roles)
    if pre is None:
        return "what is turned is not one tensor with an axis for the width"
    node, places = pre
    cos, sin = (_gather(groups[key], node, places, start, width) for key in (cosines[0], sines[0]))
    if cos is None or sin is None:
        return "not every place has one cosine and one sine"
    tables = [_table(read, roles, key[1]) for (read, _, _), key in ((cos, cosines[0]), (sin, sines[0]))]
    if tables[0] is None or tables[1] is None:
        return "the tables are read along other axes than batch, time and width"
    first, second, turn = cos[1], sin[1], sin[2]
    style = _style(first, second, turn)
    if style is None:
        return "the pairs are not those of a rotation"
    axes = _axes(terms, node, roles)
    rotary = Rotary(
        style, width, tuple(first.tolist()), tuple(second.tolist()), tuple(turn.tolist()), tables[0], tables[1], node, axes, None
    )  # fmt: skip
    return rotary, cos[0], sin[0]


Groups = dict[tuple[Any, ...], list[tuple[Term, Read]]]


def _groups(terms: Sequence[Term], sizes: dict[str, Any], through: frozenset[str]) -> Groups:
    """Terms by the table that they meet."""
    groups: Groups = {}
    for term in terms:
        table = settled(term.factors[0], sizes, through)
        part = None if table.part is None else int(table.part[0])
        groups.setdefault((table.node, part), []).append((term, table))
    return groups


def settled(read: Read, sizes: dict[str, Any], through: frozenset[str]) -> Read:
    """A table behind views of the given kinds."""
    while True:
        if kind(read.node) not in through:
            return read
        value, before = value_of(read.node), None
        traced = trace_lanes(read.node, read.indices, sizes)
        if traced is not None:
            before = value_of(traced[0])
        if not isinstance(before, torch.Tensor) or not isinstance(value, torch.Tensor) or before.dtype != value.dtype:
            return read
        if traced is None or any(len(i.terms) > 1 or (i.terms and i.token is None) for i in traced[1]):
            return read
        read = Read(traced[0], traced[1], read.part)


def _common(terms: Sequence[Term], roles: dict[str, str]) -> tuple[Node, dict[int, np.ndarray]] | None:
    """The tensor nearest to the rotation that all terms read and that holds the rotated places, whole, on one axis."""
    for candidate in terms[0].trail:
        reads = [next((r for r in term.trail if r.node is candidate.node), None) for term in terms]
        if any(r is None or r.part is not None for r in reads):
            continue
        axis = _width_axis([r.indices for r in reads if r is not None])
        if axis is None:
            continue
        size = (shape_of(candidate.node) or ())[axis]
        places = {id(term): r.indices[axis].values for term, r in zip(terms, reads, strict=True) if r is not None}
        covered = np.unique(np.concatenate(list(places.values())))
        if isinstance(size, int) and np.array_equal(covered, np.arange(size)):
            return candidate.node, places
    return None


def _width_axis(reads: Sequence[Indices]) -> int | None:
    """The axis that lanes run along when every other axis is one token, the same in all reads, or zero."""
    axis = None
    for n, indices in enumerate(zip(*reads, strict=True)):
        if all(i.is_zero for i in indices) or (indices[0].token and {i.token for i in indices} == {indices[0].token}):
            continue
        if any(i.terms for i in indices) or axis is not None:
            return None
        axis = n
    return axis


def _axes(terms: Sequence[Term], node: Node, roles: dict[str, str]) -> tuple[tuple[int, ...], ...]:
    reads = [next(r for r in term.trail if r.node is node) for term in terms]
    read, width = reads[0], _width_axis([r.indices for r in reads])
    held: dict[str, list[tuple[str, int]]] = {"b": [], "t": [], "h": []}
    for n, index in enumerate(read.indices):
        if index.token is not None:
            held[roles[index.token]].append((index.token, n))
    ordered = [tuple(n for _, n in sorted(held[role])) for role in "bth"]
    return (*ordered, (width,) if width is not None else ())


def _gather(
    group: list[tuple[Term, Read]], node: Node, places: dict[int, np.ndarray], start: int, width: int
) -> tuple[Read, np.ndarray, np.ndarray] | None:
    """What one table's products read, lane by lane: the table, the place in the pre-rotary tensor, the sign."""
    source, sign = np.full(width, -1), np.zeros(width, dtype=np.int64)
    merged: list[np.ndarray] = []
    table = group[0][1]
    for n, index in enumerate(table.indices):
        values = np.zeros(width, dtype=np.int64)
        for term, read in group:
            if read.indices[n].terms != index.terms:
                return None
            values[term.lanes - start] = read.indices[n].values
        merged.append(values)
    count = np.zeros(width, dtype=np.int64)
    for term, _ in group:
        lanes = term.lanes - start
        count[lanes] += 1
        source[lanes], sign[lanes] = places[id(term)], int(np.sign(term.sign))
    if (count != 1).any():
        return None
    indices = tuple(type(i)(values, i.terms) for values, i in zip(merged, table.indices, strict=True))
    part = None if table.part is None else np.full(width, table.part[0])
    return Read(table.node, indices, part), source, sign


def _table(read: Read, roles: dict[str, str], part: int | None) -> Table | None:
    axes, columns = [], None
    shape = shape_of(read.node) or ()
    for size, index in zip(shape, read.indices, strict=True):
        role = roles.get(index.token or "")
        if role in ("b", "t"):
            axes.append(role)
        elif index.is_zero and (is_one(size) or columns is not None):
            axes.append("")
        elif not index.terms and columns is None:
            axes.append("d")
            columns = tuple(index.values.tolist())
        else:
            return None
    if columns is None:
        return None
    return Table(read.node, tuple(axes), columns, part)


def _style(first: np.ndarray, second: np.ndarray, signs: np.ndarray) -> str | None:
    """The name of the pairing; None when it does not turn pairs of places into pairs of places."""
    width = len(first)
    if width % 2:
        return None
    lanes, half = np.arange(width), width // 2
    low = lanes < half
    if np.array_equal(first, lanes):
        if np.array_equal(second, (lanes + half) % width) and np.array_equal(signs, np.where(low, -1, 1)):
            return "half"
        if np.array_equal(second, lanes ^ 1) and np.array_equal(signs, np.where(lanes % 2 == 0, -1, 1)):
            return "interleaved"
    mixed = np.where(low, 2 * lanes, 2 * (lanes - half) + 1)
    if (
        np.array_equal(first, mixed)
        and np.array_equal(second, mixed ^ 1)
        and np.array_equal(signs, np.where(low, -1, 1))
    ):
        return "deinterleaved"
    pairs = {(a, b): s for a, b, s in zip(first.tolist(), second.tolist(), signs.tolist(), strict=True)}
    if len(pairs) == width and all(pairs.get((b, a)) == -s for (a, b), s in pairs.items()):
        return "other"
    return None
