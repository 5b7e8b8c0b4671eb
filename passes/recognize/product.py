"""Read a batched product, written as matmul, bmm, baddbmm or einsum: which axes are shared, kept and summed over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch.fx

from subquad.ir.graph import rank_of, shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
Indices = tuple[sympy.Basic, ...]
PRODUCTS = frozenset(["matmul", "einsum", "baddbmm"])


@dataclass(frozen=True)
class Product:
    """alpha · left × right + beta · addend, with one label per axis as in einsum.

    Labels of size-one axes that are broadcast are kept: a shared label may have size one on either side.
    """

    left: Node
    right: Node
    left_labels: str
    right_labels: str
    out_labels: str
    alpha: float = 1.0
    addend: Node | None = None
    beta: float = 0.0

    @property
    def contracted(self) -> str:
        """The label summed over."""
        return next(c for c in self.left_labels if c in self.right_labels and c not in self.out_labels)

    @property
    def kept_left(self) -> str:
        """The labels of the output that only the left operand has."""
        return "".join(c for c in self.out_labels if c not in self.right_labels)

    @property
    def kept_right(self) -> str:
        """The labels of the output that only the right operand has."""
        return "".join(c for c in self.out_labels if c not in self.left_labels)

    def swapped(self) -> Product:
        """The same product with its operands exchanged."""
        return Product(
            self.right, self.left, self.right_labels, self.left_labels, self.out_labels,
            self.alpha, self.addend, self.beta,
        )  # fmt: skip

    def indices(self, side: Node, labels: str, out: Indices, contracted: sympy.Basic) -> Indices:
        """Formulas of an operand's indices from those of the output; zero where the operand is broadcast."""
        known = dict(zip(self.out_labels, out, strict=True)) | {self.contracted: contracted}
        shape = shape_of(side) or ()
        return tuple(sympy.S.Zero if is_one(size) else known[c] for size, c in zip(shape, labels, strict=True))


_LETTERS = "abcdefgh"


def read_product(node: Node) -> Product | None:
    """The product of two tensors that a node computes; None for anything else."""
    name = kind(node)
    if name not in PRODUCTS:
        return None
    a = arguments(node)
    if name == "einsum":
        return _einsum(str(a["equation"]).replace(" ", ""), a["operands"])
    left, right = (a["left"], a["right"]) if name == "baddbmm" else (a["a"], a["b"])
    ranks = rank_of(left) or 0, rank_of(right) or 0
    if min(ranks) < 2:
        return None
    batch = _LETTERS[: max(ranks) - 2]
    labels = tuple(batch[len(batch) - (rank - 2) :] for rank in ranks)
    product = Product(left, right, labels[0] + "mk", labels[1] + "kn", batch + "mn")
    if name == "matmul":
        return product
    if not all(isinstance(a[key], int | float) for key in ("alpha", "beta")):
        return None
    addend = a["addend"] if a["beta"] != 0 else None
    return Product(
        left, right, product.left_labels, product.right_labels, product.out_labels, float(a["alpha"]), addend,
        float(a["beta"]),
    )  # fmt: skip


def factors(node: Node) -> list[Any]:
    """What a product multiplies."""
    a = arguments(node)
    return (
        list(a["operands"]) if kind(node) == "einsum" else [a[key] for key in ("a", "b", "left", "right") if key in a]
    )


def _einsum(equation: str, operands: list[Any]) -> Product | None:
    inputs, arrow, out = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or len(operands) != 2 or not all(isinstance(x, Node) for x in operands):
        return None
    if "." in equation:
        spread = _spread(terms, operands)
        if spread is None:
            return None
        terms, ellipsis = spread
        out = out.replace("...", ellipsis)
    if not arrow:
        joined = "".join(terms)
        out = (ellipsis if "." in equation else "") + "".join(
            sorted(c for c in set(joined) if joined.count(c) == 1 and c.isalpha())
        )
    left, right = terms
    contracted = [c for c in left if c in right and c not in out]
    single = [c for c in left + right if c not in out and c not in contracted]
    if len(contracted) != 1 or single or any(len(set(t)) != len(t) for t in (left, right, out)):
        return None
    product = Product(operands[0], operands[1], left, right, out)
    kept = [[c for c in out if c not in other] for other in (left, right)]
    return product if any(kept) else None


def _spread(terms: list[str], operands: list[Any]) -> tuple[list[str], str] | None:
    """Replace `...` by digits, aligned at the right."""
    widths = [
        (rank_of(node) or 0) - len(term.replace("...", "")) if "..." in term else 0
        for term, node in zip(terms, operands, strict=True)
    ]
    widest = max(widths)
    if widest > 9 or min(widths) < 0:
        return None
    letters = "0123456789"[:widest]
    return [t.replace("...", letters[widest - w :]) for t, w in zip(terms, widths, strict=True)], letters
