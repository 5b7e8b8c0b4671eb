"""Carry claims about shared columns over one attention site: its mask must keep shared queries to shared keys."""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch.fx
from sympy.core.function import AppliedUndef

from subquad.ir.graph import shape_of
from subquad.ir.mask import KV, B, Mask, Q
from subquad.ir.site import CanonicalAxes, Operand, Packed, ScoreTensor, Site
from subquad.passes.recognize.mixed_radix import quotient_and_rest
from subquad.passes.recognize.symbolic_tensor import axis, size_of
from subquad.passes.share_prefix.claims import Shared, Sizes, meet

Node = torch.fx.Node
CANONICAL = sympy.symbols("row column", integer=True, nonnegative=True)
"""Row and column of an operand, whatever its layout."""


def attention(site: Site, claims: Mapping[Node, Shared], batch: Sizes) -> Shared | None:
    """The claim of the site's result; None when a shared query may see a key that is not shared."""
    parts = [operand_claim(operand, claims) for operand in (site.q, site.k, site.v)]
    if any(part is None for part in parts) or site.dropout > 0:
        return None
    inputs = [part for part in parts if part is not None]
    if any(part.column is not None for part in inputs) and not keeps_to_earlier_keys(site.mask):
        return None
    tables = _tables(site.mask, claims)
    extras = _score_tensors(site, claims, batch)
    if tables is None or extras is None:
        return None
    found = meet([*inputs, *tables, *extras])
    place = _places(site.out, site.out_axes, site.packed)
    if found is None or place is None:
        return None
    return found.at(dict(zip(CANONICAL, place, strict=True)))


def operand_claim(operand: Operand, claims: Mapping[Node, Shared]) -> Shared | None:
    """The claim of q, k or v in CANONICAL indices."""
    claim, place = claims.get(operand.node), _places(operand.node, operand.axes, operand.packed)
    if claim is None or place is None or claim.row != place[0] or claim.column not in (None, place[1]):
        return None
    row, column = CANONICAL
    return Shared(row, None if claim.column is None else column, claim.columns, claim.group)


def _places(node: Node, axes: CanonicalAxes, packed: tuple[Packed, ...]) -> tuple[sympy.Basic, sympy.Basic] | None:
    """Formulas of batch and time in the indices of the node; None unless each is held by one axis."""
    rows, times = axes[0], axes[1]
    shape = shape_of(node)
    if len(rows) != 1 or len(times) != 1 or shape is None:
        return None
    sizes, digits = dict(packed), []
    ranges = {axis(n): size_of(size) for n, size in enumerate(shape)}
    for n in range(len(shape)):
        rest: sympy.Basic = axis(n)
        unpacked: list[sympy.Basic] = []
        for size in reversed(sizes.get(n, (None,))[1:]):
            rest, last = quotient_and_rest(rest, size_of(size), ranges)
            unpacked.insert(0, last)
        digits += [rest, *unpacked]
    return digits[rows[0]], digits[times[0]]


def keeps_to_earlier_keys(mask: Mask) -> bool:
    """True when the predicate says for every query q that the keys it sees are at q or before."""
    if mask.predicate is None:
        return False
    terms = mask.predicate.args if isinstance(mask.predicate, sympy.And) else (mask.predicate,)
    return any(_says_earlier(term) for term in terms)


def _says_earlier(term: sympy.Basic) -> bool:
    """m >= 0 with m <= q - kv."""
    if isinstance(term, sympy.Ge | sympy.Gt):
        margin = term.lhs - term.rhs - (1 if isinstance(term, sympy.Gt) else 0)
    elif isinstance(term, sympy.Le | sympy.Lt):
        margin = term.rhs - term.lhs - (1 if isinstance(term, sympy.Lt) else 0)
    else:
        return False
    return bool(sympy.expand(Q - KV - margin).is_nonnegative)


def _tables(mask: Mask, claims: Mapping[Node, Shared]) -> list[Shared] | None:
    """Claims of the tables that the predicate reads by row; None when it may tell rows apart in another way."""
    if mask.predicate is None:
        return [] if mask.is_full else None
    read = mask.predicate.atoms(AppliedUndef)
    nodes = {table.name: table.node for table in mask.tables}
    found = []
    for table in read:
        first, *others = table.args
        if B not in table.free_symbols:
            continue
        claim = claims.get(nodes[table.func.__name__])
        if claim is None or first != B or claim.row != axis(0) or any(B in other.free_symbols for other in others):
            return None
        if claim.column is not None and table.args[claim_axis(claim)] not in (Q, KV):
            return None
        row, column = CANONICAL
        found.append(Shared(row, None if claim.column is None else column, claim.columns, claim.group))
    return None if B in mask.predicate.xreplace({table: sympy.Dummy() for table in read}).free_symbols else found


def claim_axis(claim: Shared) -> int:
    """The axis that counts the columns of a claim whose column is one index; axis 0 for any other formula."""
    assert claim.column is not None
    return next((n for n in range(8) if claim.column == axis(n)), 0)


def _score_tensors(site: Site, claims: Mapping[Node, Shared], batch: Sizes) -> list[Shared] | None:
    """Claims of biases, gain and sinks that have a batch axis; None when one has, and no claim."""
    tensors = [*site.biases, site.gain, site.sinks]
    found = []
    for tensor in tensors:
        if not isinstance(tensor, ScoreTensor):
            continue
        claim = claims.get(tensor.node)
        if claim is None and not any(size_of(size) in batch for size in shape_of(tensor.node) or ()):
            continue
        if claim is None or claim.row != axis(0):
            return None
        row, column = CANONICAL
        found.append(Shared(row, None if claim.column is None else column, claim.columns, claim.group))
    return found
