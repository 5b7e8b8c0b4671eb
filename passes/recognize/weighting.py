"""Follow attention probabilities down to the product that weights the values, and to an output with clean axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
import torch.fx

from subquad.ir.graph import shape_of, users_of
from subquad.ir.mask import EmptyRows
from subquad.ir.site import CanonicalAxes, Packed
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.chain import JOINED, Chain, Indices, step_forward
from subquad.passes.recognize.frame import DIM, digit
from subquad.passes.recognize.guards import decomposed_nan_to_num, guarded_rows
from subquad.passes.recognize.index_map import IndexMap, trace_view, viewed
from subquad.passes.recognize.normalisation import Normalised
from subquad.passes.recognize.product import PRODUCTS, Product, read_product
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_chain import ScoreReader, drops_out
from subquad.passes.recognize.score_path import VIEWS
from subquad.passes.recognize.scores import Scores
from subquad.passes.recognize.symbolic_tensor import size_of

Node = torch.fx.Node
SHAPE_ONLY = frozenset(["full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones", "sym_size"])
RETURNED = "the attention probabilities are returned or unused"
SHARED = "the attention probabilities have other uses than weighting values once"


@dataclass(frozen=True)
class Weighting:
    """How probabilities weight values.

    values, indices: the tensor of values and formulas of its indices.  out, out_axes: the result and its axes.
    empty_rows: the value a guard gives to rows without keys, None without a guard.  passed: interior nodes, probabilities
    first, the output excluded.  packed: axes of the result that count batch and heads together, as in Site.
    """

    values: Node
    indices: Indices
    out: Node
    out_axes: CanonicalAxes
    empty_rows: EmptyRows | None
    passed: tuple[Node, ...]
    packed: tuple[Packed, ...] = ()


def read_weighting(found: Normalised, chain: Chain, scores: Scores, reader: ScoreReader) -> Weighting:
    """Walk down from the probabilities; raises NotAttention when they do anything but weight values."""
    here, place = found.node, chain.places[chain.nodes[-1]]
    passed: list[Node] = [here]
    empty: EmptyRows | None = None
    whole = not any(kind(node) in JOINED for node in chain.nodes)
    while True:
        guard = decomposed_nan_to_num(here)
        if guard:
            empty = "zero" if scores.infinite else "mean"
            passed += guard
            here = guard[-1]
        user, product = _next(here, found.passed)
        if product is not None:
            if not whole:
                raise NotAttention("the probability of an appended logit weights a value", user, "sink")
            weighting = _output(user, product, place, chain, passed, empty, found.divided)
            return weighting if found.divided is None else _divided(weighting, found.divided)
        name = kind(user)
        if name == "dropout":
            a = arguments(user)
            if drops_out(a):
                raise NotAttention(
                    "attention dropout is active, which no rewrite can keep exact; call eval()", user, "dropout"
                )
        elif name in VIEWS:
            place = chain.frame.simplified(step_forward(user, here, place))
        elif name in ("slice", "narrow", "getitem"):
            place = _kept_keys(user, here, place, chain, scores)
            whole = True
        elif name in ("where", "masked_fill", "nan_to_num", "mul"):
            empty = guarded_rows(user, here, place, scores, reader)
        elif name != "cast":
            what = name or user.target
            raise NotAttention(
                f"the softmax does not weight values: it is followed by `{what}`, not by a product with V",
                user,
                "no-values",
            )
        passed.append(user)
        here = user


def _divided(weighting: Weighting, quotient: Node) -> Weighting:
    """The same weighting one division later, where the exponentials' sum divides what they weighted."""
    users = users_of(weighting.out)
    if users != [quotient] or str(shape_of(quotient)) != str(shape_of(weighting.out)):
        raise NotAttention(
            "the weighted values are used before they are divided by the exponentials' sum", quotient, "values"
        )
    return replace(weighting, out=quotient, passed=(*weighting.passed, weighting.out))


def _next(here: Node, ignored: tuple[Node, ...]) -> tuple[Node, Product | None]:
    """The one user of the probabilities, and the product when it weights values by them."""
    users = [user for user in users_of(here) if kind(user) not in SHAPE_ONLY and user not in ignored]
    if len(users) != 1 or users[0].op == "output":
        raise NotAttention(_uses(users) if len(users) > 1 else RETURNED, here, "probabilities-used")
    user = users[0]
    product = read_product(user) if kind(user) in PRODUCTS else None
    if product is not None and product.right is here:
        product = product.swapped()
    return user, product if product is not None and product.left is here else None


def _uses(users: list[Node]) -> str:
    """The sentence that names what reads the probabilities."""
    names = ["the output" if user.op == "output" else f"`{kind(user) or user.target}`" for user in users]
    return f"{SHARED}: they go to {', '.join(dict.fromkeys(names))}"


def _kept_keys(user: Node, here: Node, place: Indices, chain: Chain, scores: Scores) -> Indices:
    """A slice that drops the probability of an appended logit and keeps those of all keys."""
    shape = shape_of(user) or ()
    marks = tuple(sympy.Dummy(f"x{n}") for n in range(len(shape)))
    traced = trace_view(IndexMap(user, marks))
    keys = digit(chain.frame.key)
    along = next((n for n, index in enumerate(place) if keys in index.free_symbols), None)
    if traced is None or traced.node is not here or len(shape) != len(place) or along is None or scores.sinks is None:
        raise NotAttention("a part of the attention probabilities is cut out", user, "values")
    begins = sympy.expand(traced.indices[along] - marks[along])
    others = all(index == mark for n, (index, mark) in enumerate(zip(traced.indices, marks, strict=True)) if n != along)
    kept = size_of(shape[along])
    if begins != scores.first_key or not others or sympy.expand(kept - chain.frame.sizes[keys]) != 0:
        raise NotAttention("a part of the attention probabilities is cut out", user, "values")
    return tuple(keys if n == along else index for n, index in enumerate(place))


def _output(
    node: Node, product: Product, place: Indices, chain: Chain, passed: list[Node], empty: EmptyRows | None,
    divided: Node | None,
) -> Weighting:  # fmt: skip
    """The weighting by a product, behind views up to clean axes, and up to the division that follows."""
    frame = chain.frame
    of_left = dict(zip(product.left_labels, place, strict=True))
    keys = digit(frame.key)
    if of_left[product.contracted] != keys:
        raise NotAttention("the probabilities are summed over another axis than the keys", node, "values")
    if product.addend is not None or product.alpha != 1:
        raise NotAttention("the weighted values are scaled or added to something in one operation", node, "values")
    out = tuple(of_left.get(label, DIM) for label in product.out_labels)
    indices = product.indices(product.right, product.right_labels, out, keys)
    last, first = node, out
    dim = next((size for size, index in zip(shape_of(node) or (), out, strict=True) if index == DIM), 1)
    read = frame.axes(shape_of(node) or (), out, frame.query, dim)
    interior: list[Node] = []
    while read is None or (divided is not None and users_of(last) != [divided]):
        users = users_of(last)
        moved = viewed(users[0], last, out) if len(users) == 1 and kind(users[0]) in VIEWS else None
        if moved is None:
            break
        interior.append(last)
        last, out = users[0], frame.simplified(moved)
        read = frame.axes(shape_of(last) or (), out, frame.query, dim)
    if read is not None:
        return Weighting(product.right, indices, last, read.axes, empty, (*passed, *interior))
    shape, parts, packed = frame.unpacked(shape_of(node) or (), first, dim)
    read = frame.axes(shape, parts, frame.query, dim)
    if read is None:
        raise NotAttention("the weighted values are laid out in a way that is not understood", node, "layout")
    return Weighting(product.right, indices, node, read.axes, empty, tuple(passed), packed)
