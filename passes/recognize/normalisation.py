"""Find every softmax of a graph, whether it is called or written out with exponentials and sums."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx

from subquad.ir.graph import dtype_of, rank_of, shape_of
from subquad.ir.vocabulary import arguments, kind
from subquad.passes.recognize.product import PRODUCTS, read_product
from subquad.passes.recognize.refusing import NotAttention
from subquad.passes.recognize.score_path import VIEWS
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
SAME = frozenset(["cast", "contiguous"])
HIDING = frozenset(["mul", "masked_fill", "where"])


@dataclass(frozen=True)
class Normalised:
    """A softmax: probabilities `node` of the scores `x` over axis `dim`.

    extra_logit: a further logit in the denominator (softmax-plus-one has 0), a tensor of them, or None.  word: how it is
    spelled.
    passed: interior nodes of a softmax that is written out.  divided: the node that divides weighted values by the sum of
    the exponentials, where `node` gives the exponentials alone.  masked: products of the exponentials, first to last, that
    are to hide keys by a zero.  safe: rows without any key get zeros.  base: of the powers.
    """

    node: Node
    x: Any
    dim: int | None
    extra_logit: Node | float | None = None
    word: str = "softmax"
    passed: tuple[Node, ...] = ()
    divided: Node | None = None
    masked: tuple[Node, ...] = ()
    safe: bool = False
    base: float = math.e


@dataclass(frozen=True)
class _Sum:
    """The sum of exponentials over one axis, plus a further term, and the least that it is taken for."""

    dim: int
    further: Any
    passed: tuple[Node, ...]
    least: Any = None


def read_softmax(node: Node) -> Normalised | None:
    """The softmax whose probabilities a node gives; None when it gives none.

    Raises NotAttention for a normalised exponential whose denominator is not the sum of its numerators.
    """
    name = kind(node)
    if name in ("softmax", "softmax_core"):
        a = arguments(node)
        return Normalised(node, a["x"], a["dim"], safe=node.target is torch.ops.aten._safe_softmax.default)
    if name == "exp":
        return _exponential(node)
    if name in ("div", "mul"):
        return _quotient(node)
    return None


def _exponential(node: Node) -> Normalised | None:
    """exp(log_softmax(x)), exp(x - logsumexp(x)) and exp(x - logaddexp(logsumexp(x), sink))."""
    inner = arguments(node)["x"]
    if kind(inner) == "log_softmax":
        a = arguments(inner)
        return Normalised(node, a["x"], a["dim"], word="exp of log_softmax", passed=(inner,))
    if kind(inner) != "sub":
        return None
    a = arguments(inner)
    if a.get("alpha", 1) != 1:
        return None
    sides = list(arguments(a["b"]).values()) if kind(a["b"]) == "logaddexp" else []
    for total, logit in ((a["b"], None), *((side, sides[1 - n]) for n, side in enumerate(sides))):
        dim = _log_sum_exp_axis(total, a["a"])
        if dim is not None:
            passed = (inner, *dict.fromkeys((a["b"], total)))
            return Normalised(node, a["a"], dim, logit, "exp minus logsumexp", passed)
    return None


def _log_sum_exp_axis(value: Any, x: Any) -> int | None:
    """The axis over which a value is log(sum(exp(x))), kept with size one, also as m + log(sum(exp(x - m))); else None."""
    rank = rank_of(x) or 0
    if kind(value) == "logsumexp":
        total = arguments(value)
        dim = _one(total["dim"])
        return dim if total["x"] is x and total["keepdim"] else None
    if kind(value) != "add" or rank_of(value) != rank:
        return None
    a = arguments(value)
    log, top = (a["a"], a["b"]) if kind(_behind(a["a"], VIEWS)) == "log" else (a["b"], a["a"])
    log = _behind(log, VIEWS)
    inside = _inside(log, "log")
    shifted = _inside(_inside(inside, "sum"), "exp")
    if kind(shifted) != "sub" or arguments(shifted)["a"] is not x:
        return None
    if _behind(arguments(shifted)["b"], VIEWS) is not _behind(top, VIEWS):
        return None
    dim = _one(arguments(inside)["dim"])
    return dim if dim is not None and is_one((shape_of(value) or ())[dim]) else None


def _quotient(node: Node) -> Normalised | None:
    """exp(x) / sum(exp(x)), exp(x) · (1 / sum(exp(x))) and (exp(x) · V) / sum(exp(x)), also with a constant in the sum."""
    for top, bottom, between in _fractions(node):
        numerator, weighted = _numerator(top)
        total = None if numerator is None else _sum_of(numerator, bottom)
        if numerator is None or total is None:
            continue
        exponential, masked = _unmasked(numerator)
        found = _normalised(node, exponential, total, bool(masked))
        passed = (*between, *found.passed)
        if weighted:
            return replace(found, node=numerator, passed=passed, divided=node, masked=masked)
        return replace(found, passed=(top, exponential, *masked, *passed), masked=masked)
    return None


def _fractions(node: Node) -> list[tuple[Any, Any, tuple[Node, ...]]]:
    """Numerator, denominator and interior nodes of a quotient, also of a product with a reciprocal."""
    a = arguments(node)
    if kind(node) == "div":
        return [(a["a"], a["b"], ())] if a.get("rounding_mode") is None else []
    return [
        (top, arguments(other)["x"], (other,))
        for top, other in ((a["a"], a["b"]), (a["b"], a["a"]))
        if kind(other) == "reciprocal"
    ]


def _numerator(top: Any) -> tuple[Node | None, bool]:
    """The exponentials of a numerator, as they are summed, and whether they already weight values there."""
    top = _behind(top, SAME)
    if _unmasked(top)[0] is not None:
        return top, False
    top = _behind(top, VIEWS)
    product = read_product(top) if kind(top) in PRODUCTS else None
    if product is None:
        return None, False
    sides = [_behind(side, VIEWS | SAME) for side in (product.left, product.right)]
    found = [side for side in sides if _unmasked(side)[0] is not None]
    return (found[0], True) if len(found) == 1 else (None, False)


def _unmasked(value: Any) -> tuple[Any, tuple[Node, ...]]:
    """The exponential behind products and fills of the same shape that may hide keys, and these, first to last."""
    masked: list[Node] = []
    while kind(value) in HIDING | SAME:
        if kind(value) in HIDING:
            masked.insert(0, value)
        value = _side(value)
    return (value, tuple(masked)) if power_of(value) is not None else (None, ())


def power_of(value: Any) -> tuple[Any, float] | None:
    """The exponent and the base of a power of a fixed number above one; None for anything else."""
    name = kind(value)
    if name in ("exp", "exp2"):
        return arguments(value)["x"], math.e if name == "exp" else 2.0
    a = arguments(value) if name == "pow" else {}
    base = a.get("base")
    return (a["exponent"], float(base)) if isinstance(base, int | float) and base > 1 else None


def leads_to_exp(value: Any, depth: int = 6) -> bool:
    """True for exponentials, behind a few products and fills that may hide some."""
    if kind(value) in HIDING | SAME:
        return depth > 0 and _side(value, depth - 1) is not None
    return power_of(value) is not None


def _side(node: Node, depth: int = 6) -> Any:
    """The operand of a product or choice that leads to exponentials and has its shape."""
    a = arguments(node)
    sides = [a["x"]] if "x" in a else [a["a"], a["b"]]
    alike = [side for side in sides if rank_of(side) and str(shape_of(side)) == str(shape_of(node))]
    return next((side for side in alike if leads_to_exp(side, depth)), None)


def _sum_of(exponential: Node, bottom: Any) -> _Sum | None:
    """Read a denominator: the sum of the exponentials over one axis that is kept, or put back, with size one."""
    passed: list[Node] = []
    further: Any = None
    least: Any = None
    place: int | None = None
    while isinstance(bottom, Node):
        passed.append(bottom)
        a = arguments(bottom) if kind(bottom) else {}
        if kind(bottom) in SAME or kind(bottom) == "expand":
            bottom = a["x"]
        elif place is None and (put_back := _put_back(bottom)) is not None:
            place, bottom = put_back, a["x"]
        elif kind(bottom) == "add" and further is None:
            first = isinstance(a["a"], Node) and kind(_behind(a["a"], SAME | {"unsqueeze"})) == "sum"
            bottom, further = (a["a"], a["b"]) if first else (a["b"], a["a"])
        elif kind(bottom) == "clamp" and least is None and further is None and a["max"] is None:
            bottom, least = a["x"], a["min"]
        elif kind(bottom) == "einsum" and place is not None:
            summed = _summed_letter(a)
            same = summed == place and a["operands"][0] is exponential
            return _Sum(place, further, tuple(passed), least) if same else None
        elif kind(bottom) == "sum":
            dim = _one(a["dim"])
            summed, moved = _unmoved(a["x"])
            if dim is None or summed is not exponential:
                return None
            dim %= rank_of(a["x"]) or 1
            passed += moved
            kept = place is None if a["keepdim"] else place == dim
            return _Sum(dim, further, tuple(passed), least) if kept else None
        else:
            return None
    return None


def _put_back(node: Node) -> int | None:
    """The axis of size one that an unsqueeze, or an index of one None beside whole axes, makes; None for anything else."""
    rank = rank_of(node) or 1
    if kind(node) == "unsqueeze":
        return int(arguments(node)["dim"]) % rank
    if kind(node) != "getitem":
        return None
    index = arguments(node)["index"]
    items = list(index) if isinstance(index, list | tuple) else [index]
    if items.count(None) != 1 or any(x not in (None, Ellipsis, slice(None)) for x in items):
        return None
    place = items.index(None)
    return place if Ellipsis not in items[:place] else rank - (len(items) - place)


def _unmoved(value: Any) -> tuple[Any, list[Node]]:
    """The tensor behind casts, copies and permutations that move nothing, and these permutations."""
    moved: list[Node] = []
    while kind(value) in SAME or (kind(value) == "permute" and _stays(arguments(value)["dims"])):
        moved += [value] if kind(value) == "permute" else []
        value = arguments(value)["x"]
    return value, moved


def _stays(dims: Any) -> bool:
    return [d % len(dims) for d in dims] == list(range(len(dims)))


def _summed_letter(a: dict[str, Any]) -> int | None:
    """The axis that an einsum of one operand sums over, all others kept in order; None for any other."""
    term, _, out = str(a["equation"]).replace(" ", "").partition("->")
    dropped = [n for n in range(len(term)) if term[:n] + term[n + 1 :] == out]
    return dropped[0] if len(a["operands"]) == 1 and len(set(term)) == len(term) and dropped else None


def _normalised(node: Node, exponential: Node, total: _Sum, masked: bool) -> Normalised:
    x, base = power_of(exponential) or (None, math.e)
    of, further, shifted = "exp" if base == math.e else f"powers of {base:g}", total.further, _behind(x, SAME)
    at_least_one = not masked and _reaches_zero(shifted, total.dim)
    if total.least is not None and not (at_least_one and isinstance(total.least, int | float) and total.least <= 1):
        what = f"the exponentials' sum is clamped at {total.least}, which it can fall short of"
        raise NotAttention(what, node, "denominator")
    if at_least_one and isinstance(further, int | float) and 0 <= further <= _half_unit(exponential):
        further = None
    if further is None:
        return Normalised(node, x, total.dim, word=f"{of} over its sum", passed=total.passed, base=base)
    word = f"{of} over its sum and a further power"
    if kind(shifted) != "sub":
        if isinstance(further, int | float) and further > 0:
            word = f"{of} over {'one' if further == 1 else f'{further:g}'} plus its sum"
            return Normalised(node, x, total.dim, math.log(further), word, total.passed, base=base)
    elif base == math.e:
        logit = _shifted_alike(further, arguments(shifted)["b"], total.dim)
        if logit is not None:
            passed = (*total.passed, shifted, *_spine(further))
            return Normalised(node, arguments(shifted)["a"], total.dim, logit, word, passed)
    raise NotAttention(
        f"the exponentials are divided by their sum plus {further}, which is not a softmax", node, "denominator"
    )


def _reaches_zero(shifted: Any, dim: int) -> bool:
    """True for exponents minus their own maximum over an axis: their largest power is one, and so is their sum at least."""
    a = arguments(shifted) if kind(shifted) == "sub" else {"b": None}
    top = _behind(a["b"], SAME)
    if kind(top) == "getitem" and arguments(top)["index"] == 0:
        top = arguments(top)["x"]
    if kind(top) not in ("amax", "extreme") or "min" in str(top.target):
        return False
    t = arguments(top)
    over = _one(t["dim"])
    same = over is not None and over % (rank_of(shifted) or 1) == dim % (rank_of(shifted) or 1)
    return same and bool(t["keepdim"]) and _behind(t["x"], SAME) is _behind(a["a"], SAME)


def _half_unit(node: Node) -> float:
    """What added to one, or to more, is rounded away."""
    dtype = dtype_of(node)
    return torch.finfo(dtype).eps / 2 if dtype is not None and dtype.is_floating_point else 0.0


def _shifted_alike(value: Any, shift: Any, dim: int) -> Node | float | None:
    """The logit L of a term exp(L - shift) beside exponentials that are shifted by the same number of a row; else None."""
    inner = _behind(_inside(_behind(value, SAME), "exp"), SAME)
    shape = shape_of(shift)
    if not isinstance(shift, Node) or shape is None or not is_one(shape[dim]):
        return None
    if _inside(inner, "neg") is shift:
        return 0.0
    a = arguments(inner) if kind(inner) in ("sub", "rsub") else {}
    if not a or a["alpha"] != 1:
        return None
    logit, less = (a["a"], a["b"]) if kind(inner) == "sub" else (a["b"], a["a"])
    return logit if less is shift else None


def _inside(node: Any, name: str) -> Any:
    """The argument of an operation of one kind; None for any other."""
    return arguments(node)["x"] if kind(node) == name else None


def _spine(value: Any) -> tuple[Node, ...]:
    exponential = _behind(value, SAME)
    return exponential, _behind(arguments(exponential)["x"], SAME)


def _behind(node: Any, kinds: frozenset[str]) -> Any:
    while kind(node) in kinds:
        node = arguments(node)["x"]
    return node


def _one(dim: Any) -> int | None:
    if isinstance(dim, list | tuple):
        return int(dim[0]) if len(dim) == 1 else None
    return dim if isinstance(dim, int) else None
