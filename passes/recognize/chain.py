"""The operations between a score product and its softmax, with the place of every element in one frame."""

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
from subquad.passes.recognize.product import PRODUCTS, Product, factors, read_product
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.symbolic_tensor import is_one, size_of

Node = torch.fx.Node
Indices = tuple[sympy.Basic, ...]
VIEWS = frozenset(
    ["view", "flatten", "unflatten", "transpose", "t", "reversed", "permute", "movedim", "unsqueeze", "squeeze", "expand",
     "repeat", "contiguous"]
)  # fmt: skip
JOINED = frozenset(["cat", "pad"])
_STEPS = VIEWS | {
    "mul", "div", "add", "sub", "tanh", "where", "masked_fill", "maximum", "cast", "dropout", "rsub", "neg", "cat", "pad",
    "clamp", "index_put",
}  # fmt: skip


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


def paths_to_products(softmax_input: Any) -> list[tuple[Node, ...]]:
    """The ways from a product of activations down to a softmax's input; where products are added, those first whose
    operands both have all of its axes.

    Raises NotAttention when there is none.
    """
    if not isinstance(softmax_input, Node):
        raise NotAttention("the softmax is taken of a constant", softmax_input, "constant")
    paths = [tuple(reversed(path)) for path in _upward_paths(softmax_input)]
    return sorted(paths, key=lambda path: _is_broadcast(path[0]))


def _is_broadcast(node: Node) -> bool:
    product = read_product(node)
    return product is None or any(rank_of(side) != rank_of(node) for side in (product.left, product.right))


def read_chain(nodes: tuple[Node, ...], dim: int | None) -> Chain:
    """Place the operations from a product to a softmax over axis `dim` in one frame.

    Raises NotAttention when keys are not what the softmax runs over.
    """
    product = read_product(nodes[0])
    if product is None:
        raise NotAttention("the scores come from a product that does not pair queries with keys", nodes[0], "no-pairs")
    widest = _widest(nodes)
    shape = shape_of(widest) or ()
    chain = _in_frame(product, nodes, dim, widest, shape, digits(shape))
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


def _upward_paths(start: Node) -> list[list[Node]]:
    """The nodes from the softmax's input up to each product of two activations, the nearest first."""
    frontier: list[list[Node]] = [[start]]
    nearest: Node = start
    seen = {start}
    found: list[list[Node]] = []
    while frontier:
        path = frontier.pop(0)
        here = path[-1]
        if is_score_product(here):
            found.append(path)
            continue
        if kind(here) not in _STEPS:
            nearest = here
            continue
        for operand in _score_operands(here):
            if operand not in seen:
                seen.add(operand)
                frontier.append([*path, operand])
    if not found and _mixes_scores(nearest):
        raise NotAttention("the scores are mixed by a weight before the softmax", nearest, "mixed-heads")
    if not found:
        raise NotAttention(_why_no_product(nearest), nearest, "no-product")
    return found


def _mixes_scores(node: Node) -> bool:
    """True for a product of scores by a weight: what it multiplies leads straight to a product of two activations.

    Values weighted by probabilities are such a product too, but no scores.
    """
    if not _projects(node):
        return False
    stack = [n for n in node.all_input_nodes if not is_weight(n)]
    seen = set(stack)
    while stack:
        here = stack.pop()
        if is_score_product(here):
            return not any(_is_probability(side) for side in factors(here))
        new = [n for n in _score_operands(here) if n not in seen] if kind(here) in _STEPS else []
        seen.update(new)
        stack.extend(new)
    return False


def _is_probability(node: Any) -> bool:
    while kind(node) in VIEWS | {"cast", "dropout"}:
        node = arguments(node)["x"]
    return kind(node) in ("softmax", "softmax_core", "div")


def is_score_product(node: Node) -> bool:
    """True for a product of two activations that keeps an axis of each."""
    if kind(node) not in PRODUCTS:
        return False
    product = read_product(node)
    return product is not None and not is_weight(product.left) and not is_weight(product.right)


def is_weight(value: Any) -> bool:
    """True for a parameter or buffer, possibly behind views and lifted to an input: the second factor of a projection."""
    while isinstance(value, Node) and kind(value) in VIEWS | {"cast"}:
        value = arguments(value)["x"]
    if not isinstance(value, Node):
        return False
    lifted = (value.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type")
    return value.op == "get_attr" or (value.op == "placeholder" and lifted is not None)


def _why_no_product(node: Node) -> str:
    """Look further up for what the softmax is taken of."""
    name = kind(node) or (str(node.target) if node.op != "placeholder" else f"the input {node.name}")
    source = node
    while (kind(source) in VIEWS | PICKED or _is_scatter(source)) and isinstance(source.args[0], Node):
        source = source.args[0]
    frontier, seen = [node], {node}
    for here in frontier:
        if here is not node and is_score_product(here):
            return f"`{name}` between the product of queries and keys and the softmax is not understood"
        if len(seen) < FURTHEST and (not _projects(here) or (here is source and _convolves(here))):
            new = [n for n in here.all_input_nodes if n not in seen]
            seen.update(new)
            frontier.extend(new)
    if _projects(source):
        return PROJECTION
    return f"no product of queries and keys feeds the softmax: the walk up ended at `{name}`"


def _projects(node: Node) -> bool:
    if kind(node) in PRODUCTS:
        return any(is_weight(side) for side in factors(node))
    return kind(node) in ("linear", "addmm") or _convolves(node)


def _convolves(node: Node) -> bool:
    return node.op == "call_function" and "conv" in str(getattr(node.target, "__name__", ""))


def _is_scatter(node: Node) -> bool:
    return "scatter" in str(node.target) and node.op != "placeholder"


PICKED = frozenset(["slice", "select", "getitem", "topk", "cast", "unbind", "masked_fill"])
FURTHEST = 24
PROJECTION = (
    "the softmax is taken of a projection by a weight, not of a product of queries and keys: "
    "a router, pooling or classifier, which no attention rewrite applies to"
)


def _score_operands(node: Node) -> list[Node]:
    a = arguments(node)
    if kind(node) == "cat":
        return [part for part in a["tensors"] if isinstance(part, Node)]
    names = {"where": ("a", "b"), "masked_fill": ("x",), "index_put": ("x",)}.get(kind(node), ("x", "a", "b"))
    rank, shape = rank_of(node), shape_of(node) or ()
    alike: list[Node] = []
    others: list[Node] = []
    for name in names:
        value = a.get(name)
        other = shape_of(value)
        if isinstance(value, Node) and other is not None and (rank_of(value) == rank or kind(node) in VIEWS):
            same = len(other) == len(shape) and all(str(x) == str(y) for x, y in zip(other, shape, strict=True))
            (alike if same else others).append(value)
    return alike + others
