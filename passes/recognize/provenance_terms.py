"""Expand the elements of a tensor into sums of products: signal times tables, however the arithmetic is spelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.fx

from subquad.ir.graph import shape_of, value_of
from subquad.ir.vocabulary import kind, module_of
from subquad.passes.recognize.provenance_index import Index, Indices, constant, trace_lanes
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
LIMIT = 200
"""Steps of one expansion; a rotary embedding takes about ten per term."""


def word(node: Any) -> str:
    """The vocabulary's kind of a node, or else the bare name of its operation in any dialect."""
    if not isinstance(node, Node):
        return ""
    name = kind(node)
    if name and name not in ("reduction", "contiguous"):
        return name
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload):
            bare = str(node.target._schema.name).split("::")[-1]
        else:
            bare = str(getattr(node.target, "__name__", ""))
        return name if name == "contiguous" else bare
    if node.op == "call_module":
        return type(module_of(node)).__name__.lower()
    return name or (str(node.target) if node.op == "call_method" else "")


def given(node: Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of an operation outside the vocabulary, by position or by name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


@dataclass(frozen=True, eq=False)
class Read:
    """Elements of a tensor, one per lane.  part: of complex numbers, 0 real and 1 imaginary per lane; None for real ones."""

    node: Node
    indices: Indices
    part: np.ndarray | None = None

    def take(self, kept: np.ndarray) -> Read:
        """Some of the lanes."""
        part = None if self.part is None else self.part[kept]
        return Read(self.node, tuple(i.take(kept) for i in self.indices), part)


@dataclass(frozen=True, eq=False)
class Term:
    """sign · Π factors · element, for the lanes of an operand that have it.

    trail: what was read since the last arithmetic, `read` included, nearest to the operand first.
    """

    read: Read
    lanes: np.ndarray
    sign: float = 1.0
    factors: tuple[Read, ...] = ()
    trail: tuple[Read, ...] = ()

    def moved(self, read: Read) -> Term:
        """The same term, one view earlier."""
        return replace(self, read=read, trail=(*self.trail, read))

    def computed(self, read: Read, sign: float = 1.0, factors: tuple[Read, ...] = ()) -> Term:
        """A term of the operation that made the element."""
        return replace(self, read=read, sign=self.sign * sign, factors=(*self.factors, *factors), trail=(read,))

    def take(self, kept: np.ndarray, read: Read | None = None) -> Term:
        """Some of the lanes; `read` replaces what is read."""
        factors = tuple(f.take(kept) for f in self.factors)
        if read is not None:
            return Term(read, self.lanes[kept], self.sign, factors, (read,))
        return Term(self.read.take(kept), self.lanes[kept], self.sign, factors, tuple(r.take(kept) for r in self.trail))


class Expansion:
    """Expands terms step by step until `is_end` holds or nothing is known of how an element was made.

    is_signal: for a node, whether it depends on activations; a product's other factor is then a table.
    sizes: of every token.
    """

    def __init__(
        self,
        is_signal: Callable[[Node], bool],
        is_end: Callable[[Node], bool],
        sizes: dict[str, Any],
        tables: bool = False,
    ) -> None:
        self.is_signal, self.is_end, self.sizes, self.tables = is_signal, is_end, sizes, tables

    def leaves(self, start: Term) -> list[Term]:
        """The terms that cannot be expanded further; their sum is what `start` reads."""
        pending, found, steps = [start], [], 0
        while pending:
            term = pending.pop()
            steps += 1
            nexts = None if steps > LIMIT or self.is_end(term.read.node) else self._step(term)
            if nexts is None:
                found.append(term)
            else:
                pending.extend(nexts)
        return found

    def _step(self, term: Term) -> list[Term] | None:
        read = term.read
        traced = trace_lanes(read.node, read.indices, self.sizes)
        if traced is not None:
            return [term.moved(Read(traced[0], traced[1], read.part))]
        rule = _RULES.get(word(read.node))
        return None if rule is None else rule(self, term, read.node)

    def aligned(self, value: Any, read: Read) -> Read | None:
        """The elements of a tensor that is broadcast to the node that `read` reads."""
        shape = shape_of(value)
        if shape is None or len(shape) > len(read.indices):
            return None
        lanes = len(term_lanes(read))
        zero = constant(0, lanes)
        offset = len(read.indices) - len(shape)
        indices = tuple(zero if is_one(s) else read.indices[n + offset] for n, s in enumerate(shape))
        value_is_complex = is_complex(value)
        return Read(value, indices, read.part if value_is_complex else None)


def term_lanes(read: Read) -> np.ndarray:
    """An array with one element per lane."""
    if read.part is not None:
        return read.part
    return read.indices[0].values if read.indices else np.zeros(1, dtype=np.int64)


def is_complex(node: Any) -> bool:
    """True for a tensor of complex numbers."""
    value = value_of(node) if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype.is_complex


def _sum(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    if given(node, 2, "alpha", 1) != 1 or len(node.all_input_nodes) != 2:
        return None
    second = -1.0 if word(node) == "sub" else 1.0
    reads = [e.aligned(x, term.read) for x in node.args[:2]]
    if any(r is None for r in reads) or not all(e.is_signal(r.node) for r in reads if r is not None):
        return None
    return [term.computed(r, sign) for r, sign in zip(reads, (1.0, second), strict=True) if r is not None]


def _negated(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    inner = e.aligned(node.args[0] if node.args else node.kwargs.get("input"), term.read)
    return None if inner is None else [term.computed(inner, -1.0)]


def _multiplied(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    a, b = given(node, 0, "input"), given(node, 1, "other")
    for x, y in ((a, b), (b, a)):
        if isinstance(y, int | float) and y != 0:
            read = e.aligned(x, term.read)
            if read is None or (word(node) == "div" and y is not b):
                return None
            number = float(y) if word(node) == "mul" else 1 / float(y)
            return [term.computed(read, number)]
    if word(node) == "div" or e.tables:
        return None
    first, second = e.aligned(a, term.read), e.aligned(b, term.read)
    if first is None or second is None:
        return None
    signal, table = (first, second) if e.is_signal(first.node) else (second, first)
    if not e.is_signal(signal.node) or e.is_signal(table.node):
        return None
    if not is_complex(node):
        return [term.computed(signal, factors=(table,))]
    return _complex_product(term, signal, table)


def _complex_product(term: Term, signal: Read, table: Read) -> list[Term] | None:
    """(x + iy)(c + is): the real part is xc - ys, the imaginary part yc + xs."""
    if signal.part is None or table.part is None:
        return None
    found = []
    for part in (0, 1):
        kept = np.flatnonzero(term.read.part == part) if term.read.part is not None else np.zeros(0, dtype=int)
        if not kept.size:
            continue
        here = term.take(kept)
        for of_table in (0, 1):
            of_signal = np.full(kept.size, part ^ of_table)
            sign = -1.0 if part == 0 and of_table == 1 else 1.0
            x = Read(signal.node, signal.take(kept).indices, of_signal)
            y = Read(table.node, table.take(kept).indices, np.full(kept.size, of_table))
            found.append(here.computed(x, sign, (y,)))
    return found


def _joined(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    """Concatenation or stacking: each lane reads one of the tensors."""
    tensors = given(node, 0, "tensors")
    read = term.read
    along = given(node, 1, "dim", 0) % len(read.indices)
    index = read.indices[along]
    if index.terms:
        return None
    found: list[Term] = []
    begin = 0
    for tensor in tensors:
        shape = shape_of(tensor) or ()
        size = 1 if word(node) == "stack" else shape[along]
        if not isinstance(size, int):
            return None
        kept = np.flatnonzero((index.values >= begin) & (index.values < begin + size))
        if kept.size:
            part = read.take(kept)
            here = Index(part.indices[along].values - begin)
            rest = (*part.indices[:along], *(() if word(node) == "stack" else (here,)), *part.indices[along + 1 :])
            found.append(term.take(kept, Read(tensor, rest, part.part)))
        begin += size
    return found


def _written(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    """A tensor with a slice of one axis overwritten."""
    read = term.read
    along = given(node, 2, "dim", 0) % len(read.indices)
    index, size = read.indices[along], (shape_of(node) or ())[along]
    bounds = given(node, 3, "start"), given(node, 4, "end"), given(node, 5, "step", 1)
    if index.terms or not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
        return None
    places = range(size)[slice(*bounds)]
    inside = np.isin(index.values, np.asarray(places))
    found = []
    base, source = given(node, 0, "input"), given(node, 1, "src")
    for kept, tensor in ((np.flatnonzero(inside), source), (np.flatnonzero(~inside), base)):
        if kept.size:
            part = read.take(kept)
            here = part.indices[along]
            if tensor is source:
                here = Index((here.values - places.start) // places.step)
            found.append(
                term.take(kept, Read(tensor, (*part.indices[:along], here, *part.indices[along + 1 :]), part.part))
            )
    return found


def _as_real(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    last = term.read.indices[-1]
    base = given(node, 0, "input")
    if last.terms or term.read.part is not None:
        return None
    return [term.moved(Read(base, term.read.indices[:-1], last.values))]


def _as_complex(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    if term.read.part is None:
        return None
    return [term.moved(Read(given(node, 0, "input"), (*term.read.indices, Index(term.read.part))))]


def _one_part(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    part = np.full(len(term_lanes(term.read)), 0 if word(node) == "real" else 1)
    base = given(node, 0, "input")
    return [term.moved(Read(base, term.read.indices, part))] if is_complex(base) else None


def _of_two(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    """torch.complex(real, imaginary)."""
    if term.read.part is None:
        return None
    found = []
    for part, value in enumerate((given(node, 0, "real"), given(node, 1, "imag"))):
        kept = np.flatnonzero(term.read.part == part)
        if kept.size:
            found.append(term.take(kept, Read(value, term.read.take(kept).indices)))
    return found


def _copied(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    """copy(into, source) is the source."""
    source = e.aligned(given(node, 1, "src"), term.read)
    return None if source is None else [term.moved(source)]


def _idle(e: Expansion, term: Term, node: Node) -> list[Term] | None:
    """Dropout that does nothing."""
    if given(node, 1, "p", 0.5) > 0 and given(node, 2, "train", node.kwargs.get("training", True)):
        return None
    return [term.moved(replace(term.read, node=given(node, 0, "input")))]


_RULES: dict[str, Callable[[Expansion, Term, Node], list[Term] | None]] = {
    "add": _sum, "sub": _sum, "neg": _negated, "mul": _multiplied, "div": _multiplied, "cat": _joined, "stack": _joined,
    "view_as_real": _as_real, "view_as_complex": _as_complex, "real": _one_part, "imag": _one_part, "complex": _of_two,
    "dropout": _idle, "slice_scatter": _written, "copy": _copied,
}  # fmt: skip
