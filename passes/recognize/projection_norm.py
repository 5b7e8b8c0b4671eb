"""Read a normalisation of q or k, called as one operation or written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.fx

from subquad.ir.graph import rank_of, shape_of
from subquad.ir.provenance import Norm
from subquad.ir.vocabulary import module_of
from subquad.passes.recognize.provenance_terms import given, word
from subquad.passes.recognize.symbolic_tensor import is_one

Node = torch.fx.Node
Held = Callable[[Any], Node | None]
"""The parameter or buffer that an argument is, behind views and casts; None when it is computed."""


def read_norm(node: Node, held: Held) -> Norm | None:
    """The normalisation over the last axis that `node` is the result of; None when it is none."""
    width = (shape_of(node) or (None,))[-1]
    if not isinstance(width, int):
        return None
    return _called(node, held, width) or _written(node, held, width)


def _called(node: Node, held: Held, width: int) -> Norm | None:
    name, call = word(node), node
    if name == "getitem" and isinstance(node.args[0], Node) and node.args[1] == 0:
        call = node.args[0]
        name = word(call)
    if name in ("rms_norm", "_fused_rms_norm"):
        weight, eps = given(call, 2, "weight"), given(call, 3, "eps")
        return _norm("rms", node, call, weight, None, eps, width, held)
    if name in ("layer_norm", "native_layer_norm"):
        weight, bias, eps = given(call, 2, "weight"), given(call, 3, "bias"), given(call, 4, "eps", 1e-5)
        return _norm("layer", node, call, weight, bias, eps, width, held)
    if name in ("layernorm", "rmsnorm") and node.op == "call_module":
        module: Any = module_of(node)
        if tuple(module.normalized_shape) == (width,) and getattr(module, "weight", None) is None:
            return Norm(
                name.removesuffix("norm"), node, given(node, 0, "input"), None, None, float(module.eps or 0.0), width
            )
    return None


def _norm(name: str, node: Node, call: Node, weight: Any, bias: Any, eps: Any, width: int, held: Held) -> Norm | None:
    shape = given(call, 1, "normalized_shape")
    x = given(call, 0, "input")
    if not isinstance(shape, list | tuple) or len(shape) != 1 or not isinstance(x, Node) or isinstance(eps, Node):
        return None
    read = [None if value is None else held(value) for value in (weight, bias)]
    if any(r is None and value is not None for r, value in zip(read, (weight, bias), strict=True)):
        return None
    return Norm(name, node, x, read[0], read[1], float(eps or 0.0), width)


def _written(node: Node, held: Held, width: int) -> Norm | None:
    """weight · (x − mean) / √(mean of squares + ε) + bias, any of weight, mean and bias absent."""
    here, bias, weight, offset = _bare(node), None, None, 0.0
    if word(here) == "add":
        a, b = here.args[:2]
        bias = held(b) if _is_row(b, width) else None
        if bias is None and _is_row(a, width):
            bias, b, a = held(a), a, b
        if bias is None or not isinstance(a, Node):
            return None
        here = _bare(a)
    core = _core(here)
    if core is None and word(here) == "mul":
        for x, y in (here.args[:2], here.args[1::-1]):
            weight, offset = _weight(y, held, width)
            if weight is not None and isinstance(x, Node):
                core = _core(_bare(x))
                break
    if core is None:
        return None
    name, x, eps = core
    if weight is None and bias is not None:
        return None
    return Norm(name, node, x, weight, bias, eps, width, offset)


def _is_row(value: Any, width: int) -> bool:
    shape = shape_of(value)
    return (
        shape is not None
        and len(shape) >= 1
        and isinstance(shape[-1], int)
        and shape[-1] == width
        and all(is_one(size) for size in shape[:-1])
    )


def _weight(value: Any, held: Held, width: int) -> tuple[Node | None, float]:
    """A held vector, or one for each head, or one plus it."""
    shape = shape_of(value) or ()
    per_head = len(shape) == 2 and all(isinstance(size, int) for size in shape) and shape[-1] == width
    if not isinstance(value, Node) or not (per_head or _is_row(value, width)):
        return None, 0.0
    bare = _bare(value)
    if word(bare) == "add":
        a, b = bare.args[:2]
        number, tensor = (a, b) if isinstance(a, int | float) else (b, a)
        return (held(tensor), float(number)) if isinstance(number, int | float) else (None, 0.0)
    return held(value), 0.0


def _bare(value: Any) -> Any:
    while word(value) in ("cast", "contiguous"):
        value = given(value, 0, "input")
    return value


def _core(node: Any) -> tuple[str, Node, float] | None:
    """(name, x, ε) of x / √(mean(x²) + ε), of the same of x − mean(x), and of x over its length."""
    name = word(node)
    if name not in ("mul", "div"):
        return None
    a, b = node.args[:2]
    for top, bottom in ((a, b), (b, a)) if name == "mul" else ((a, b),):
        if not isinstance(top, Node) or not isinstance(bottom, Node):
            continue
        root = _inverse_root(bottom) if name == "mul" else _root(bottom)
        if root is None:
            continue
        eps, inner = _plus(root)
        inner = _bare(inner)
        if not _over_last(inner):
            continue
        if word(inner) == "mean":
            squared = _bare(_square(_bare(inner.args[0])))
            if squared is None or not _same(squared, _bare(top)):
                continue
            centred = _centred(squared)
            return ("layer", centred, eps) if centred is not None else ("rms", top, eps)
        if word(inner) == "var" and _biased(inner):
            centred = _centred(_bare(top))
            if centred is not None and _bare(inner.args[0]) is _bare(centred):
                return "layer", centred, eps
        if word(inner) == "sum":
            squared = _bare(_square(_bare(inner.args[0])))
            if squared is not None and squared is _bare(top):
                return "l2", top, eps
    return None


def _inverse_root(node: Node) -> Any:
    bare = _bare(node)
    if word(bare) == "rsqrt" or (word(bare) == "pow" and given(bare, 1, "exponent") == -0.5):
        return bare.args[0]
    if word(bare) == "reciprocal":
        return _root(bare.args[0])
    return None


def _root(node: Any) -> Any:
    bare = _bare(node)
    if word(bare) == "sqrt" or (word(bare) == "pow" and given(bare, 1, "exponent") == 0.5):
        return bare.args[0]
    return None


def _plus(node: Any) -> tuple[float, Any]:
    bare = _bare(node)
    if word(bare) == "add":
        a, b = bare.args[:2]
        if isinstance(b, int | float):
            return float(b), a
        if isinstance(a, int | float):
            return float(a), b
    return 0.0, bare


def _square(node: Any) -> Any:
    name = word(node)
    if name == "square" or (name == "pow" and given(node, 1, "exponent") == 2):
        return node.args[0]
    if name == "mul" and node.args[0] is node.args[1]:
        return node.args[0]
    return None


def _centred(node: Any) -> Any:
    """x of x − mean(x) over the last axis."""
    if word(node) != "sub":
        return None
    x, mean = node.args[:2]
    mean = _bare(mean)
    return x if word(mean) == "mean" and _over_last(mean) and _bare(mean.args[0]) is _bare(x) else None


def _same(a: Any, b: Any) -> bool:
    """True for one value, or for two differences of the same values."""
    if a is b:
        return True
    if word(a) != "sub" or word(b) != "sub":
        return False
    return all(_bare(x) is _bare(y) for x, y in zip(a.args[:2], b.args[:2], strict=True))


def _over_last(node: Any) -> bool:
    """True for a reduction over the last axis that keeps it."""
    if word(node) not in ("mean", "sum", "var"):
        return False
    dim = given(node, 1, "dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    last = (rank_of(node.args[0]) or 0) - 1
    keep = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 and isinstance(node.args[2], bool) else False)
    if word(node) == "var":
        keep = node.kwargs.get("keepdim", node.args[3] if len(node.args) > 3 else False)
    return isinstance(dim, int) and dim in (-1, last) and bool(keep)


def _biased(node: Node) -> bool:
    """True for a variance that divides by the number of elements."""
    correction = node.kwargs.get("correction", given(node, 2, "unbiased", True))
    return correction in (0, False)
