"""Random torch programs over integer, boolean and mask tensors.

A program is a nested tuple; `run` executes it.  Vectors are [B, T], matrices [B, T, T] (both may have axes of size one).
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

Program = tuple[Any, ...]
small = st.integers(-3, 6)
positive = st.integers(1, 5)
divisors = st.sampled_from([1, 2, 3, 4, -2, -3])
comparisons = st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"])
FILLS = [float("-inf"), -1e4, -3.3895313892515355e38, torch.finfo(torch.float32).min, -65504.0, 0.0, 1.0, 0.5]

DTYPES = {
    name: getattr(torch, name)
    for name in ("int8", "int16", "int32", "uint8", "bool", "float16", "bfloat16", "float32", "float64")
}


def _vectors(integers: SearchStrategy[Program]) -> SearchStrategy[Program]:
    return st.one_of(
        st.tuples(st.just("shift"), integers, small),
        st.tuples(st.just("times"), integers, st.integers(-2, 3)),
        st.tuples(st.just("floordiv"), integers, divisors),
        st.tuples(st.just("mod"), integers, divisors),
        st.tuples(st.just("fmod"), integers, positive),
        st.tuples(st.just("quotient"), integers, positive, st.sampled_from(["floor", "trunc", "long"])),
        st.tuples(st.just("clamp"), integers, small, positive),
        st.tuples(
            st.sampled_from(["neg", "abs", "flip", "float", "int8", "half", "roundtrip", "sign", "running"]), integers
        ),
        st.tuples(st.just("roll"), integers, small),
        st.tuples(st.just("pad"), integers, positive, small),
        st.tuples(st.just("tail"), integers, positive),
        st.tuples(st.just("write"), integers, positive, small),
        st.tuples(st.sampled_from(["minimum", "maximum", "add", "sub"]), integers, integers),
        st.tuples(st.just("join"), integers, integers, positive),
        st.tuples(st.just("pick"), integers, integers),
        st.tuples(st.just("fill"), integers, comparisons, small, small),
        st.tuples(st.just("either"), integers, comparisons, small, integers),
        st.tuples(st.sampled_from(["searchsorted", "bucketize", "search_left"]), integers),
        st.tuples(st.sampled_from(["cummax", "argmax_first", "ended", "zero_scattered", "counted"]), integers),
        st.tuples(st.just("quotient"), integers, divisors, st.sampled_from(["trunc", "both"])),
        st.tuples(st.just("large"), integers, st.sampled_from([1 << 31, 1 << 33, 3037000507, -(1 << 40)])),
        st.tuples(st.just("int32"), integers, st.sampled_from([3, 1 << 16, 1 << 28])),
        st.tuples(st.just("interleaved"), integers, positive),
        st.tuples(st.just("put"), integers, comparisons, small, small),
        st.tuples(st.just("as"), integers, st.sampled_from(list(DTYPES))),
        st.tuples(
            st.just("scaled_float"),
            integers,
            st.sampled_from([0.5, 1.5, 1e6, 3e18]),
            st.sampled_from(["int32", "int64"]),
        ),
        st.tuples(st.sampled_from(["shift_left", "shift_right"]), integers, st.sampled_from([1, 31, 62])),
        st.tuples(st.sampled_from(["summed", "summed_int32", "bits", "place", "ranked"]), integers),
        st.tuples(st.just("extreme"), integers, small, st.booleans()),
        st.tuples(st.just("far"), integers, st.sampled_from([-(2.0**100), torch.finfo(torch.float32).min, 1e20])),
    )


vectors = st.recursive(st.sampled_from([("range",), ("ids",), ("kept",), ("ones",)]), _vectors, max_leaves=3)
numbers = st.one_of(
    st.tuples(st.sampled_from(["rows", "columns"]), vectors),
    st.tuples(st.just("sub"), st.tuples(st.just("rows"), vectors), st.tuples(st.just("columns"), vectors)),
)


def _conditions(inner: SearchStrategy[Program]) -> SearchStrategy[Program]:
    return st.one_of(
        st.tuples(st.sampled_from(["and", "or", "xor", "add_bool", "mul_bool"]), inner, inner),
        st.tuples(st.sampled_from(["not", "through_float", "through_int", "one_minus", "log_mask"]), inner),
        st.tuples(st.sampled_from(["tril", "triu"]), inner, st.integers(-2, 2)),
        st.tuples(st.sampled_from(["flipped", "rolled"]), inner),
        st.tuples(st.just("columns_opened"), inner, positive),
        st.tuples(st.just("same"), vectors, comparisons),
        st.tuples(st.just("where_bool"), inner, inner, inner),
        st.tuples(st.just("stacked"), inner, inner, st.integers(0, 1)),
    )


conditions = st.recursive(
    st.one_of(
        st.tuples(comparisons, numbers, small),
        st.tuples(comparisons, numbers, st.sampled_from([0.5, 1.0, -0.25, 2.5])),
        st.tuples(comparisons, st.tuples(st.just("rows"), vectors), st.tuples(st.just("columns"), vectors)),
        st.tuples(st.just("among"), numbers),
        st.tuples(st.just("nonzero"), numbers),
        st.tuples(st.just("outer"), vectors, vectors),
        st.just(("given",)),
        st.just(("identity",)),
    ),
    _conditions,
    max_leaves=3,
)
masks = st.recursive(
    st.one_of(
        st.tuples(st.just("filled"), conditions, st.sampled_from(FILLS)),
        st.tuples(st.just("chosen"), conditions, st.sampled_from(FILLS), st.sampled_from(FILLS)),
        st.tuples(st.just("scaled"), conditions, st.sampled_from(FILLS)),
        st.tuples(st.just("triangle"), st.sampled_from(FILLS), st.integers(-1, 1)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("plus"), inner, inner),
        st.tuples(st.just("at_least"), inner, st.sampled_from(FILLS)),
        st.tuples(st.just("refill"), inner, conditions, st.sampled_from(FILLS)),
        st.tuples(st.sampled_from(["bfloat16", "float16", "float64", "inverted"]), inner),
    ),
    max_leaves=3,
)
programs = st.one_of(conditions, masks)


def _vector(p: Program, ids: Tensor, kept: Tensor) -> Tensor:
    def go(x: Program) -> Tensor:
        return _vector(x, ids, kept)

    match p:
        case ("range",):
            return torch.arange(ids.shape[1])[None, :]
        case ("ids",):
            return ids
        case ("kept",):
            return kept
        case ("ones",):
            return torch.ones_like(ids)
        case ("shift", x, n):
            return go(x) + n
        case ("times", x, n):
            return n * go(x)
        case ("floordiv", x, n):
            return go(x) // n
        case ("mod", x, n):
            return go(x) % n
        case ("fmod", x, n):
            return torch.fmod(go(x), n)
        case ("quotient", x, n, "floor"):
            return (go(x) / n).floor().long()
        case ("quotient", x, n, "trunc"):
            return torch.div(go(x), n, rounding_mode="trunc")
        case ("quotient", x, n, "long"):
            return (go(x) / n).long()
        case ("clamp", x, low, width):
            return go(x).clamp(min=low, max=low + width)
        case ("neg", x):
            return -go(x)
        case ("abs", x):
            return go(x).abs()
        case ("sign", x):
            return go(x).sign()
        case ("flip", x):
            return go(x).flip(-1)
        case ("float", x):
            return (go(x).float() - 1).long()
        case ("int8", x):
            return (go(x).to(torch.int8) * 50).long()
        case ("half", x):
            return (go(x).half() == 1).long()
        case ("roundtrip", x):
            return go(x).float().round().int().long()
        case ("quotient", x, n, "both"):
            return torch.div(go(x), n, rounding_mode="trunc") * n + torch.fmod(go(x), n)
        case (("searchsorted" | "search_left") as name, x):
            return torch.searchsorted(torch.tensor([-1, 0, 0, 3]), go(x).contiguous(), right=name == "searchsorted")
        case ("bucketize", x):
            return torch.bucketize(go(x), torch.tensor([0, 2, 5]))
        case ("cummax", x):
            return go(x).cummax(-1).values
        case ("counted", x):
            return (go(x) == 0).cumsum(-1) - (go(x) == 0).long()
        case ("argmax_first", x):
            return (go(x) > 0).int().argmax(-1, keepdim=True).expand_as(go(x))
        case ("ended", x):
            return nn.functional.pad((go(x) == 1).long().cumsum(-1)[:, :-1], (1, 0))
        case ("zero_scattered", x):
            whole = go(x)
            return whole.scatter(1, torch.zeros_like(whole[:, :1]), 0)
        case ("large", x, n):
            return go(x) * n
        case ("int32", x, n):
            return (go(x).to(torch.int32) * n).long()
        case ("interleaved", x, n):
            whole = go(x)
            return torch.arange(whole.shape[-1]).repeat_interleave(n)[None, : whole.shape[-1]] + whole
        case ("put", x, relation, n, value):
            whole = go(x).clone()
            condition = getattr(torch, relation)(whole, n)
            return torch.index_put(whole, (condition,), torch.tensor(value))
        case ("as", x, name):
            return go(x).to(DTYPES[name]).to(torch.int64)
        case ("scaled_float", x, factor, name):
            return (go(x).float() * factor).to(DTYPES.get(name, torch.int64)).long()
        case ("shift_left", x, n):
            return go(x) << n
        case ("shift_right", x, n):
            return go(x) >> n
        case ("summed", x):
            return go(x).sum(-1, keepdim=True).expand_as(go(x))
        case ("summed_int32", x):
            return go(x).cumsum(-1, dtype=torch.int32).long()
        case ("bits", x):
            return go(x).float().view(torch.int32).long()
        case ("place", x):
            return go(x).argmax(-1, keepdim=True).expand_as(go(x))
        case ("ranked", x):
            return go(x).sort(-1).values
        case ("extreme", x, n, high):
            limits = torch.iinfo(torch.int64)
            return torch.where(go(x) > n, go(x), limits.max if high else limits.min)
        case ("far", x, value):
            return ((go(x).float() + value) == value).long()
        case ("running", x):
            return torch.ones_like(go(x)).cumsum(-1) - 1
        case ("roll", x, n):
            return torch.roll(go(x), n, -1)
        case ("pad", x, n, value):
            return nn.functional.pad(go(x), (n, 0), value=value)[..., :-n]
        case ("tail", x, n):
            whole = go(x)
            return torch.cat([whole, whole], -1)[..., -n - whole.shape[-1] : -n]
        case ("write", x, n, value):
            whole = go(x).clone()
            return torch.slice_scatter(whole, torch.full_like(whole[..., :n], value), -1, 0, n)
        case (("minimum" | "maximum" | "add" | "sub") as name, x, y):
            return getattr(torch, name)(go(x), go(y))
        case ("join", x, y, n):
            first, second = torch.broadcast_tensors(go(x), go(y))
            return torch.cat([first[..., :n], second[..., n:]], -1)
        case ("pick", x, y):
            length = ids.shape[1]
            return go(x).expand(ids.shape[0], -1)[:, (go(y)[0] % length) - (length if y[0] == "flip" else 0)]
        case ("fill", x, relation, n, value):
            whole = go(x)
            return whole.masked_fill(getattr(torch, relation)(whole, n), value)
        case ("either", x, relation, n, y):
            whole = go(x)
            return torch.where(getattr(torch, relation)(whole, n), whole, go(y))
    raise AssertionError(p)


def run(p: Any, ids: Tensor, kept: Tensor, given: Tensor) -> Any:
    """Execute a program on ids [B, T], kept [B, T] and given [B, T, T] (boolean)."""

    def go(x: Any) -> Any:
        return run(x, ids, kept, given)

    if not isinstance(p, tuple):
        return p
    length = ids.shape[1]
    match p:
        case ("rows", x):
            return _vector(x, ids, kept)[:, :, None]
        case ("columns", x):
            return _vector(x, ids, kept)[:, None, :]
        case ("sub", x, y):
            return go(x) - go(y)
        case (("le" | "lt" | "ge" | "gt" | "eq" | "ne") as relation, x, y):
            return getattr(torch, relation)(go(x), go(y))
        case ("among", x):
            return torch.isin(go(x), torch.tensor([0, 2, 5]))
        case ("nonzero", x):
            return go(x).bool()
        case ("outer", x, y):
            a, b = (_vector(v, ids, kept) > 0 for v in (x, y))
            return (a.float()[:, :, None] @ b.float()[:, None, :]) > 0
        case ("given",):
            return given
        case ("identity",):
            return torch.eye(length, dtype=torch.bool)[None]
        case ("and", x, y):
            return go(x) & go(y)
        case ("or", x, y):
            return torch.logical_or(go(x), go(y))
        case ("xor", x, y):
            return go(x) ^ go(y)
        case ("add_bool", x, y):
            return go(x) + go(y)
        case ("mul_bool", x, y):
            return go(x) * go(y)
        case ("not", x):
            return ~go(x)
        case ("through_float", x):
            return go(x).float() > 0.5
        case ("through_int", x):
            return (go(x).to(torch.uint8) - 1) > 3
        case ("one_minus", x):
            return (1.0 - go(x).to(torch.float32)).bool()
        case ("log_mask", x):
            return go(x).float().log().isinf()
        case (("tril" | "triu") as name, x, n):
            return getattr(torch, name)(go(x).expand(-1, length, length), n)
        case ("flipped", x):
            return go(x).flip(-1)
        case ("rolled", x):
            return go(x).expand(-1, length, length).roll((1, -2), (1, 2))
        case ("columns_opened", x, n):
            whole = go(x).expand(-1, length, length).clone()
            whole[:, :, :n] = True
            return whole
        case ("same", x, relation):
            vector = _vector(x, ids, kept)
            return getattr(torch, relation)(vector[:, :, None], vector[:, None, :])
        case ("where_bool", x, y, z):
            return torch.where(go(x), go(y), go(z))
        case ("stacked", x, y, n):
            return torch.stack(torch.broadcast_tensors(go(x), go(y)))[n]
        case ("filled", x, value):
            return torch.zeros(length, length).masked_fill(go(x), value)
        case ("chosen", x, yes, no):
            return torch.where(go(x), yes, no)
        case ("scaled", x, value):
            return (1.0 - go(x).float()) * value
        case ("triangle", value, n):
            return torch.full((length, length), value).triu(n)[None]
        case ("plus", x, y):
            return go(x) + go(y)
        case ("at_least", x, value):
            return go(x).clamp(min=value) if value < 0 else torch.maximum(go(x), torch.tensor(value))
        case ("refill", x, condition, value):
            return go(x).masked_fill(go(condition), value)
        case (("bfloat16" | "float16" | "float64") as name, x):
            return go(x).to(getattr(torch, name))
        case ("inverted", x):
            return 1 - go(x)
    raise AssertionError(p)


class Programs(nn.Module):
    """Several programs on the same inputs."""

    def __init__(self, what: list[Program]) -> None:
        super().__init__()
        self.what = what

    def forward(self, ids: Tensor, kept: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(p, ids, kept, given).clone() for p in self.what)


def inputs(batch: int, length: int, seed: int, plain: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """ids from -4 to 6 and now and then far away, kept from -1 to 2 (0 and 1 when plain), given at random."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-4, 7, (batch, length), generator=g)
    if not plain:
        ids[0, -1] = [2**24 + 1, -(2**24) - 1, 70000, -129][seed % 4]
    kept = torch.randint(*((0, 2) if plain else (-1, 3)), (batch, length), generator=g)
    return ids, kept, torch.rand(batch, length, length, generator=g) < 0.5


def traced(what: list[Program]) -> torch.fx.GraphModule:
    """The programs' graph with symbolic batch and length, as export sees it before decompositions."""
    with torch.no_grad():
        return make_fx(Programs(what), tracing_mode="symbolic", pre_dispatch=True)(*inputs(3, 11, 0, True))
