"""The place of every element of the scores, from their product to their softmax, in one frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch.fx

from subquad.ir.graph import rank_of, shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.frame import DIM, Frame, digit, digits
from subquad.passes.recognize.index_map import IndexMap, trace_view, viewed
from subquad.passes.recognize.merged_heads import is_head, splits
from subquad.passes.recognize.product import Product, read_product
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_path import VIEWS
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

Node = torch.fx.Node
Indices = tuple[sympy.Basic, ...]
JOINED = frozenset(["cat", "pad"])


@dataclass(frozen=True)
class Chain:
    """Nodes from a score product to the input of its softmax.

    product: the first node, read, with queries on the left.  nodes: all of them, first to last.  frame: the axes of the
    widest of them.  places: for each node, formulas of its indices in the frame's digits.
    """

    product: Product
    nodes: tuple[Node, ...]
    frame: Frame
    places: dict[Node, Indices]


def read_chain(nodes: tuple[Node, ...], dim: int | None) -> Chain:
    """Place the operations from a product to a softmax over axis `dim` in one frame.

    Raises NotAttention when keys are not what the softmax runs over.
    """
    product = read_product(nodes[0])
    if product is None:
        raise NotAttention("the scores come from a product that does not pair queries with keys", nodes[0], "no-pairs")
    widest = _widest(nodes)
    shape = shape_of(widest) or ()
    try:
        chain = _in_frame(product, nodes, dim, widest, shape, digits(shape))
    except NotAttention as no:
        coarse = shape_of(nodes[0]) or ()
        if no.kind != "softmax-axis" or len(coarse) >= len(shape):
            raise
        widest = nodes[0]  # the axes of the product, while a view between counts queries or keys on several
        chain = _in_frame(product, nodes, dim, widest, coarse, digits(coarse))
    rest = chain.frame.wide((*chain.frame.batch, *chain.frame.heads))
    fixed = [n for n in rest if isinstance(chain.frame.shape[n], int)]
    certain = len(chain.frame.heads) > 1 or (chain.frame.heads and len(fixed) == 1)
    return chain if certain else _with_heads(chain, dim, widest)


def _in_frame(
    product: Product, nodes: tuple[Node, ...], dim: int | None, widest: Node, shape: tuple[Any, ...], start: Indices
) -> Chain:
    """The chain in the frame of given sizes, in whose digits `start` holds the indices of the widest node."""
    found = _places(nodes, nodes.index(widest), start, shape)
    places = {node: found[node] for node in nodes}
    last = places[nodes[-1]]
    if dim is None or not -len(last) <= dim < len(last):
        raise NotAttention(
            f"the softmax runs over axis {dim}, which is not one axis of the scores", nodes[-1], "softmax-axis"
        )
    keys = _without_offset(last[dim % len(last)])
    key = next((n for n in range(len(shape)) if keys == digit(n)), None)
    if key is None:
        what = "an axis of size one" if keys == 0 else "several axes of the scores at once, or a part of one"
        raise NotAttention(f"the softmax runs over {what}, not over keys", nodes[-1], "softmax-axis")
    of_product = dict(zip(product.out_labels, places[nodes[0]], strict=True))
    if keys not in [of_product[label] for label in product.kept_right]:
        product = product.swapped()
    if [of_product[label] for label in product.kept_right] != [keys]:
        raise NotAttention(
            "the softmax does not run over the keys of the product that feeds it", nodes[-1], "softmax-axis"
        )
    queries = [of_product[label] for label in product.kept_left]
    right = IndexMap(product.right, product.indices(product.right, product.right_labels, places[nodes[0]], DIM))
    return Chain(product, nodes, _roles(right, queries, key, shape), places)


def _with_heads(chain: Chain, dim: int | None, widest: Node) -> Chain:
    """The chain with the heads that its operands tell: alone, among other fixed axes, or counted with the batch."""
    parts = () if chain.frame.heads else splits(chain.frame, _operands(chain))
    for shape, start in ((chain.frame.shape, chain.places[widest]), *parts):
        parted = _in_frame(chain.product, chain.nodes, dim, widest, shape, start)
        frame, operands = parted.frame, _operands(parted)
        rest = sorted((*frame.batch, *frame.heads))
        heads = tuple(n for n in rest if is_head(frame, n, operands))
        if heads:
            batch = tuple(n for n in rest if n not in heads)
            return replace(parted, frame=replace(frame, batch=batch, heads=heads))
    return chain


def _operands(chain: Chain) -> tuple[IndexMap, IndexMap]:
    product, out = chain.product, chain.places[chain.nodes[0]]
    left, right = (
        IndexMap(side, product.indices(side, labels, out, DIM))
        for side, labels in ((product.left, product.left_labels), (product.right, product.right_labels))
    )
    return left, right


def _without_offset(index: sympy.Basic) -> sympy.Basic:
    """The key an index counts when an appended logit comes before the first one."""
    return index - index.as_coeff_Add()[0]


def _widest(nodes: tuple[Node, ...]) -> Node:
    """The last of the nodes with the most axes, before any concatenation."""
    end = next((n for n, node in enumerate(nodes) if kind(node) in JOINED), len(nodes))
    most = max(rank_of(node) or 0 for node in nodes[:end])
    return next(node for node in reversed(nodes[:end]) if rank_of(node) == most)


def _places(nodes: tuple[Node, ...], frame: int, start: Indices, shape: tuple[Any, ...]) -> dict[Node, Indices]:
    places = {nodes[frame]: start}
    plain = Frame(shape, (), (), None, 0)
    for later, earlier in zip(reversed(nodes[1 : frame + 1]), reversed(nodes[:frame]), strict=True):
        if kind(later) not in VIEWS:
            places[earlier] = _same_shape(places[later], earlier, later)
            continue
        before = trace_view(IndexMap(later, places[later]))
        if before is None or before.node is not earlier:
            raise NotAttention("the scores are rearranged in a way that is not understood", later, "layout")
        places[earlier] = plain.simplified(before.indices)
    for earlier, later in zip(nodes[frame:], nodes[frame + 1 :], strict=False):
        places[later] = plain.simplified(step_forward(later, earlier, places[earlier]))
    return places


def step_forward(later: Node, earlier: Node, place: Indices) -> Indices:
    """Formulas of the indices of `later`, a view of or an operation on `earlier`, from those of `earlier`."""
    name = kind(later)
    if name in JOINED:
        return _behind(later, earlier, place)
    if name not in VIEWS:
        return _same_shape(place, later, earlier)
    moved = viewed(later, earlier, place)
    if moved is None:
        raise NotAttention("the scores are rearranged in a way that is not understood", later, "layout")
    return moved


def _behind(later: Node, earlier: Node, place: Indices) -> Indices:
    a = arguments(later)
    offset: sympy.Basic = sympy.S.Zero
    if kind(later) == "pad":
        along, offset = len(place) - 1, size_of(a["pad"][0])
    else:
        along = a["dim"] % len(place)
        for part in a["tensors"][: list(a["tensors"]).index(earlier)]:
            offset = offset + size_of((shape_of(part) or ())[along])
    return tuple(index + offset if n == along else index for n, index in enumerate(place))


def _same_shape(place: Indices, node: Node, known: Node) -> Indices:
    shape, other = shape_of(node) or (), shape_of(known) or ()
    if len(shape) != len(other) or any(is_one(a) != is_one(b) for a, b in zip(shape, other, strict=True)):
        raise NotAttention("the scores are broadcast to more axes between the product and the softmax", node, "layout")
    return place


def _roles(keys: IndexMap, queries: list[sympy.Basic], key: int, shape: tuple[Any, ...]) -> Frame:
    """Queries are what only the left operand has; the last other axis counts heads when its number is fixed.

    Where several axes are the left operand's alone, as of heads that share one key head, a symbolic one counts queries.
    """
    plain = Frame(shape, (), (), None, key)
    only = [n for index in queries for n in plain.digits_of(index) or ()]
    query = next((n for n in reversed(only) if not isinstance(shape[n], int)), only[-1] if only else None)
    if query is None:
        query = next((n for n in (len(shape) - 2, len(shape) - 1) if n >= 0 and n != key and is_one(shape[n])), None)
    rest = [n for n in range(len(shape)) if n not in (query, key)]
    wide = [n for n in rest if not is_one(shape[n])]
    fixed = [n for n in wide if isinstance(shape[n], int)]
    if not fixed or len(rest) < 2:
        return Frame(shape, tuple(rest), (), query, key)
    heads = [fixed[-1]]
    others = [n for n in rest if n not in wide] + [n for n in wide if n not in heads]
    while len(others) > 1 and others[-1] in fixed and others[-1] < heads[0] and _keys_lack(keys, shape, heads[0]):
        heads.insert(0, others.pop())
    return Frame(shape, tuple(others), tuple(heads), query, key)


def _keys_lack(keys: IndexMap, shape: tuple[Any, ...], place: int) -> bool:
    """True when the keys are broadcast along an axis of the scores: query heads that share a key head."""
    if is_one(shape[place]):
        return False
    here: IndexMap | None = keys
    frame = Frame(shape, (), (), None, 0)
    while here is not None:
        if not any(digit(place) in index.free_symbols for index in here.indices):
            return True
        here = frame.traced(here)
    return False
