"""Tensors that meet the scores, read in the scores' own frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx

from subquad.ir.graph import shape_of, value_of
from subquad.ir.site import ScoreTensor
from subquad.ir.vocabulary import kind
from subquad.passes.recognize.chain import Indices
from subquad.passes.recognize.finer_axes import laid_out
from subquad.passes.recognize.folding import folded
from subquad.passes.recognize.frame import Frame, digit
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.symbolic_tensor import axis, is_one

Node = torch.fx.Node
SHAPES = frozenset(["sym_size", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"])


@dataclass(frozen=True)
class ScoreFrame:
    """The frame of one chain's scores, the place of each of its nodes, and the formulas of the graph's tensors.

    shapes: of the scores at a node whose recorded shape is not theirs (an SDPA call).
    """

    frame: Frame
    places: dict[Node, Indices]
    algebra: MaskAlgebra
    shapes: dict[Node, tuple[Any, ...]] = field(default_factory=dict)

    def require_independent(self, value: Any, node: Node) -> None:
        """Refuse a tensor that is computed from the scores it meets: they would have to exist to compute it."""
        stack, seen = [value], set[Node]()
        while stack:
            here = stack.pop()
            if not isinstance(here, Node) or here in seen or here < self.first:
                continue
            if here in self.places:
                raise NotAttention("the scores meet a tensor that is computed from them", node, "depends-on-scores")
            seen.add(here)
            stack.extend(_contents(here))

    def element(self, value: Any, node: Node) -> sympy.Basic:
        """The formula, in the indices of `node`, of an argument that is broadcast to it."""
        self.require_independent(value, node)
        if isinstance(value, Node) and shape_of(value) is not None:
            self.algebra.formula(value)
        return self.algebra.element(value, self.shapes.get(node) or shape_of(node) or ())

    def in_frame(self, formula: sympy.Basic, node: Node) -> sympy.Basic:
        """A formula of the indices of `node` as one of b, h, q and kv."""
        return self.frame.canonical(formula.xreplace({axis(n): at for n, at in enumerate(self.places[node])}))

    def over_scores(self, value: Node, node: Node) -> ScoreTensor:
        """A tensor that is broadcast to `node`, laid out over the scores."""
        self.require_independent(value, node)
        views = self.frame.views(shape_of(value) or (), len(self.places[node]), self.places[node])
        if views is None:
            sizes = self.shapes.get(node) or shape_of(node) or ()
            views = laid_out(self.frame, shape_of(value) or (), sizes, self.places[node])
        if views is None:
            raise NotAttention("a tensor meets the scores in a layout that is not understood", node, "layout")
        return ScoreTensor(value, views)

    @property
    def first(self) -> Node:
        """The node that makes the scores."""
        return next(iter(self.places))

    def number(self, value: Any) -> float | None:
        """A scalar argument's number: a Python number, or a tensor whose formula is one; None when it is neither."""
        return constant_of(value, self.algebra)

    def varies_with_key(self, value: Node, node: Node) -> bool:
        shape, place = shape_of(value) or (), self.places[node]
        offset = len(place) - len(shape)
        return any(
            not is_one(size) and digit(self.frame.key) in place[n + offset].free_symbols for n, size in enumerate(shape)
        )


def _contents(node: Node) -> list[Node]:
    """The inputs of an operation that it reads more of than their shapes and dtypes."""
    if kind(node) in SHAPES:
        return []
    if kind(node) in ("expand_as", "cast", "view"):
        return [x for x in node.args[:1] if isinstance(x, Node)]
    return node.all_input_nodes


def constant_of(value: Any, algebra: MaskAlgebra) -> float | None:
    """A scalar argument's number: a Python number, or a tensor whose formula is one; None when it is neither."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Node):
        recorded = value_of(value)
        if isinstance(recorded, torch.Tensor):
            expression = algebra.formula(value).expression
            if expression.is_number and expression is not sympy.nan:
                return float(expression)
            return folded(value, algebra.module)
        if isinstance(recorded, (int, float)):
            return float(recorded)
        if isinstance(recorded, torch.SymFloat) and is_lifted(value):
            return float(recorded)
    return None


def is_lifted(value: Node) -> bool:
    """True for a Python number that Dynamo made an input: to read it makes Dynamo compile again when it changes."""
    while value.op == "call_method" and value.target == "item":
        value = value.args[0]  # type: ignore[assignment]
    return value.op == "placeholder" and "grapharg" in value.meta
