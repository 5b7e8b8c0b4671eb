"""Read a batched product, written as matmul or einsum, by the roles of its axes: batch, head, time, dim."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch.fx

from subquad.ir.mask import B, H
from subquad.ir.site import CanonicalAxes
from subquad.ir.vocabulary import arguments, kind

Node = torch.fx.Node
TIME, DIM = sympy.symbols("time dim", integer=True, nonnegative=True)
Axes = tuple[sympy.Symbol | None, ...]


@dataclass(frozen=True)
class Product:
    """left × right with one letter per axis, as in einsum; shared batch letters, one contracted letter."""

    left: Node
    right: Node
    left_letters: str
    right_letters: str
    out_letters: str

    @property
    def contracted(self) -> str:
        """The letter summed over."""
        return next(c for c in self.left_letters if c in self.right_letters and c not in self.out_letters)

    @property
    def weights_values(self) -> bool:
        """True when the contraction runs over the left's last axis: probabilities times values."""
        return self.left_letters[-1] == self.contracted

    @property
    def axes_of_left(self) -> Axes:
        """Roles of the left axes when the product gives scores: out letters are (b, h, q, k)."""
        return tuple(self._scores_role(c, query=True) for c in self.left_letters)

    @property
    def axes_of_right(self) -> Axes:
        """Roles of the right axes when the product gives scores."""
        return tuple(self._scores_role(c, query=False) for c in self.right_letters)

    def _scores_role(self, letter: str, query: bool) -> sympy.Symbol | None:
        out = self.out_letters
        if letter == self.contracted:
            return DIM
        if letter == (out[-2] if query else out[-1]):
            return TIME
        return _batch_role(letter, out)

    @property
    def values_axes(self) -> Axes:
        """Roles of the right axes when the left is probabilities (b, h, q, k)."""
        return tuple(
            TIME if c == self.contracted else _batch_role(c, self.left_letters) if c in self.left_letters else DIM
            for c in self.right_letters
        )

    def output_axes(self, rank: int) -> CanonicalAxes:
        """For canonical (batch, time, head, dim), the output axis that holds it."""
        dim = next(c for c in self.out_letters if c not in self.left_letters)
        place = self.out_letters.index
        head = place(self.left_letters[1]) if rank == 4 else None
        return place(self.left_letters[0]), place(self.left_letters[-2]), head, place(dim)


def _batch_role(letter: str, order: str) -> sympy.Symbol | None:
    place = order.index(letter)
    if place == 0:
        return B
    return H if place == 1 and len(order) == 4 else None


def read_product(node: Node) -> Product | None:
    """The product that a matmul, bmm or two-operand einsum computes; None for anything else."""
    name = kind(node)
    if name == "matmul":
        a = arguments(node)
        value = node.meta.get("val", node.meta.get("example_value"))
        batch = {3: "b", 4: "bh"}.get(value.dim() if value is not None else 0)
        if batch is None or not isinstance(a["a"], Node) or not isinstance(a["b"], Node):
            return None
        if any(_rank(x) != len(batch) + 2 for x in (a["a"], a["b"])):
            return None
        return Product(a["a"], a["b"], batch + "mk", batch + "kn", batch + "mn")
    if name == "einsum":
        a = arguments(node)
        return _einsum(str(a["equation"]).replace(" ", ""), a["operands"])
    return None


def _rank(node: Node) -> int:
    value = node.meta.get("val", node.meta.get("example_value"))
    return int(value.dim()) if value is not None else 0


def _einsum(equation: str, operands: list[Node]) -> Product | None:
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2 or len(operands) != 2 or "." in equation:
        return None
    for order in ((0, 1), (1, 0)):
        left, right = terms[order[0]], terms[order[1]]
        shared = [c for c in left if c in right]
        contracted = [c for c in shared if c not in out]
        free = [c for c in out if c not in shared]
        if len(contracted) != 1 or len(free) != 2 or len(set(left)) != len(left) or len(out) not in (3, 4):
            return None
        if free[0] in left and len(left) == len(right) == len(out):
            return Product(operands[order[0]], operands[order[1]], left, right, out)
    return None
