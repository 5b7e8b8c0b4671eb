"""Masks as people write them: each spelling's family, and its predicate against its tensor at several sizes and paddings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from subquad.ir.mask import KV, B, H, Mask, Q
from subquad.kernels.evaluation import evaluate
from subquad.passes.recognize.mask_algebra import MaskAlgebra
from subquad.passes.recognize.symbolic_tensor import as_condition, axis, is_boolean, visible

LOW = torch.finfo(torch.float32).min
INFINITE = float("-inf")
Spelling = Callable[[Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[str, Spelling]] = {}


def spelling(family: str) -> Callable[[Spelling], Spelling]:
    def register(function: Spelling) -> Spelling:
        SPELLINGS[function.__name__] = (family, function)
        return function

    return register


def rows(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])[:, None]


def columns(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])[None, :]


def square(ids: Tensor, value: float = 1.0) -> Tensor:
    return torch.full((ids.shape[1], ids.shape[1]), value)


@spelling("causal")
def triangle_of_ones(ids: Tensor, kept: Tensor) -> Tensor:
    return torch.ones(ids.shape[1], ids.shape[1]).tril().bool()


@spelling("causal")
def triangle_equal_to_zero(ids: Tensor, kept: Tensor) -> Tensor:
    return torch.zeros_like(square(ids)).masked_fill(square(ids).tril() == 0, INFINITE)


@spelling("causal")
def triangle_of_minus_infinity(ids: Tensor, kept: Tensor) -> Tensor:
    return torch.triu(square(ids, INFINITE), diagonal=1)


@spelling("causal")
def not_the_upper_triangle(ids: Tensor, kept: Tensor) -> Tensor:
    return ~torch.triu(square(ids).bool(), 1)


@spelling("causal")
def upper_triangle_transposed(ids: Tensor, kept: Tensor) -> Tensor:
    return torch.triu(square(ids)).transpose(0, 1) > 0


@spelling("causal")
def generate_square_subsequent(ids: Tensor, kept: Tensor) -> Tensor:
    mask = (torch.triu(square(ids)) == 1).transpose(0, 1)
    return mask.float().masked_fill(mask == 0, INFINITE).masked_fill(mask == 1, 0.0)


@spelling("causal")
def filled_with_a_view_comparison(ids: Tensor, kept: Tensor) -> Tensor:
    size = ids.shape[1]
    place = torch.arange(size)
    return square(ids, LOW).masked_fill(place < (place + 1).view(size, 1), 0)


@spelling("causal")
def less_than_next(ids: Tensor, kept: Tensor) -> Tensor:
    return columns(ids) < rows(ids) + 1


@spelling("causal")
def difference_not_negative(ids: Tensor, kept: Tensor) -> Tensor:
    return (rows(ids) - columns(ids)) >= 0


@spelling("causal")
def running_count_of_ones(ids: Tensor, kept: Tensor) -> Tensor:
    place = torch.ones_like(ids).cumsum(-1) - 1
    return place[:, None, :] <= place[:, :, None]


@spelling("causal")
def clamped_difference(ids: Tensor, kept: Tensor) -> Tensor:
    return (columns(ids) - rows(ids)).clamp(min=0).to(torch.bool).logical_not()


@spelling("causal")
def logarithm_of_a_triangle(ids: Tensor, kept: Tensor) -> Tensor:
    return square(ids).tril().log()


@spelling("causal")
def one_minus_triangle_times_minimum(ids: Tensor, kept: Tensor) -> Tensor:
    return (1.0 - square(ids).tril()) * LOW


@spelling("causal")
def boolean_times_number(ids: Tensor, kept: Tensor) -> Tensor:
    return (columns(ids) > rows(ids)) * LOW


@spelling("causal")
def in_half_precision_filled_with_infinity(ids: Tensor, kept: Tensor) -> Tensor:
    return torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.float16).masked_fill(columns(ids) > rows(ids), INFINITE)


@spelling("causal & window(4)")
def sliding_window(ids: Tensor, kept: Tensor) -> Tensor:
    return (columns(ids) <= rows(ids)) & (columns(ids) > rows(ids) - 4)


@spelling("causal & window(4)")
def window_of_two_triangles(ids: Tensor, kept: Tensor) -> Tensor:
    ones = square(ids).bool()
    return torch.bitwise_xor(ones.tril(), ones.tril(-4))


@spelling("causal & window(4)")
def window_from_triangles_multiplied(ids: Tensor, kept: Tensor) -> Tensor:
    return (square(ids).tril() * square(ids).triu(-3)) == 1


@spelling("window(±2)")
def symmetric_window(ids: Tensor, kept: Tensor) -> Tensor:
    return (rows(ids) - columns(ids)).abs() <= 2


@spelling("causal & chunk(4)")
def chunks(ids: Tensor, kept: Tensor) -> Tensor:
    return (rows(ids) // 4 == columns(ids) // 4) & (columns(ids) <= rows(ids))


@spelling("chunk(4)")
def chunks_by_true_division(ids: Tensor, kept: Tensor) -> Tensor:
    return (rows(ids) / 4).floor() == (columns(ids) / 4).floor()


@spelling("causal & dilated(3)")
def dilated(ids: Tensor, kept: Tensor) -> Tensor:
    distance = rows(ids) - columns(ids)
    return (distance >= 0) & (distance % 3 == 0)


@spelling("prefix(3)")
def prefix(ids: Tensor, kept: Tensor) -> Tensor:
    return (columns(ids) < 3) | (columns(ids) <= rows(ids))


@spelling("causal & padding(kept)")
def padding_and(ids: Tensor, kept: Tensor) -> Tensor:
    return (columns(ids) <= rows(ids))[None, None] & kept[:, None, None, :].bool()


@spelling("causal & padding(kept)")
def padding_filled(ids: Tensor, kept: Tensor) -> Tensor:
    mask = torch.zeros_like(square(ids)).masked_fill(columns(ids) > rows(ids), LOW)
    return mask[None, None].masked_fill(kept[:, None, None, :] == 0, LOW)


@spelling("causal & padding(kept)")
def padding_indexed(ids: Tensor, kept: Tensor) -> Tensor:
    b, q = torch.arange(ids.shape[0])[:, None, None, None], torch.arange(ids.shape[1])[None, None, :, None]
    kv = torch.arange(ids.shape[1])[None, None, None, :]
    return (q.new_ones((), dtype=torch.bool) & (kv <= q) & kept.bool()[b, kv]).expand(-1, -1, ids.shape[1], -1)


@spelling("keys(kept[b, kv] == 1)")
def padding_inverted_and_filled(ids: Tensor, kept: Tensor) -> Tensor:
    inverted = 1.0 - kept[:, None, None, :].expand(-1, 1, ids.shape[1], -1).to(torch.float32)
    return inverted.masked_fill(inverted.to(torch.bool), LOW)


@spelling("padding(kept)")
def padding_of_a_boolean_times_minimum(ids: Tensor, kept: Tensor) -> Tensor:
    return (1.0 - kept.bool()[:, None, None, :].float()) * LOW


@spelling("padding(kept) & queries(kept[b, q] != 0)")
def padding_of_both_sides(ids: Tensor, kept: Tensor) -> Tensor:
    seen = kept.bool()
    return seen[:, None, :, None] * seen[:, None, None, :]


@spelling("padding(kept) & queries(kept[b, q] != 0)")
def padding_as_a_matrix_product(ids: Tensor, kept: Tensor) -> Tensor:
    seen = kept.bool().float()
    return (seen.unsqueeze(2) @ seen.unsqueeze(1)).bool()[:, None]


@spelling("documents(ids)")
def documents(ids: Tensor, kept: Tensor) -> Tensor:
    return (ids[:, :, None] == ids[:, None, :])[:, None]


@spelling("causal & documents(ids) & padding(kept)")
def packed(ids: Tensor, kept: Tensor) -> Tensor:
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return torch.where(same & (columns(ids) <= rows(ids)) & (kept[:, None, None, :] != 0), 0.0, INFINITE)


@spelling("causal & documents(cumsum of ids)")
def packed_by_positions(ids: Tensor, kept: Tensor) -> Tensor:
    number = (torch.diff(ids, prepend=ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (number[:, None, :, None] == number[:, None, None, :]) & (columns(ids) <= rows(ids))


@spelling("causal")
def packed_by_positions_that_count(ids: Tensor, kept: Tensor) -> Tensor:
    place = torch.arange(ids.shape[1])[None].expand(ids.shape[0], -1)
    number = (torch.diff(place, prepend=place[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return (number[:, None, :, None] == number[:, None, None, :]) & (place[:, None, None, :] <= place[:, None, :, None])


@spelling("causal | (documents(ids) & queries(ids[b, q] >= 0))")
def image_blocks(ids: Tensor, kept: Tensor) -> Tensor:
    block = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids[:, None, :, None] >= 0)
    return (columns(ids) <= rows(ids)) | block


@spelling("lengths(sum_1 of kept)")
def lengths(ids: Tensor, kept: Tensor) -> Tensor:
    return columns(ids)[None, None] < kept.sum(-1)[:, None, None, None]


@spelling("causal by cumsum of kept & padding(kept)")
def positions_of_padding(ids: Tensor, kept: Tensor) -> Tensor:
    place = kept.cumsum(-1) - 1
    return (place[:, None, None, :] <= place[:, None, :, None]) & kept[:, None, None, :].bool()


@spelling("causal")
def maximum_after_a_sum(ids: Tensor, kept: Tensor) -> Tensor:
    mask = square(ids, LOW).triu(1) + square(ids, LOW).triu(1)
    return torch.maximum(mask, torch.tensor(LOW))


@spelling("causal")
def written_into_slices(ids: Tensor, kept: Tensor) -> Tensor:
    size = ids.shape[1]
    whole = torch.slice_scatter(square(ids, 5.0), torch.zeros(size, size), 1, 0, size)
    return torch.where(columns(ids) > rows(ids), LOW, whole)


@spelling("causal | (q <= 1)")
def parts_side_by_side(ids: Tensor, kept: Tensor) -> Tensor:
    triangle = square(ids).tril()
    return torch.cat([square(ids)[:2], triangle[2:]], 0) > 0


SOFT: dict[str, Spelling] = {
    "minus ten thousand": lambda ids, kept: (1.0 - kept.bool()[:, None, None, :].float()) * -10000.0,
    "a number times an integer mask": lambda ids, kept: (1.0 - kept[:, None, None, :].float()) * LOW,
    "minimum of float16": lambda ids, kept: torch.triu(torch.full((7, 7), -65504.0, dtype=torch.float16), 1),
    "two minima added": lambda ids, kept: square(ids, LOW).triu(1) + square(ids, LOW).triu(2),
    "zero times infinity": lambda ids, kept: (1.0 - square(ids).tril()) * INFINITE,
    "slopes": lambda ids, kept: (columns(ids) - rows(ids)).float() * 0.5,
    "a bonus": lambda ids, kept: torch.where(columns(ids) <= rows(ids), 1.0, INFINITE),
}


def _formula(function: Spelling) -> tuple[MaskAlgebra, sympy.Basic, int]:
    ids, kept = torch.arange(33).reshape(3, 11) % 5, torch.ones(3, 11, dtype=torch.int64)
    module = make_fx(_named(function), tracing_mode="symbolic", pre_dispatch=True)(ids, kept)
    for node, name in zip(module.graph.nodes, ("ids", "kept"), strict=False):
        node.name = name
    algebra = MaskAlgebra(module)
    out = next(node for node in module.graph.nodes if node.op == "output").args[0]
    found = algebra.formula(out)
    return algebra, found.expression, found.rank


def _named(function: Spelling) -> Spelling:
    return lambda ids, kept: function(ids, kept)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_proved_and_equals_its_tensor(name: str) -> None:
    family, function = SPELLINGS[name]
    algebra, formula, rank = _formula(function)
    read = (as_condition(formula), True) if is_boolean(formula) else visible(formula)
    assert read is not None, formula
    places = {2: (Q, KV), 3: (B, Q, KV), 4: (B, H, Q, KV)}[rank]
    predicate = read[0].xreplace({axis(n): symbol for n, symbol in enumerate(places)})
    tables = tuple(algebra.tables[f] for f in sorted({f.func.__name__ for f in predicate.atoms(AppliedUndef)}))
    mask = Mask(predicate, tables)
    assert mask.family == family
    for batch, length, padding in ((2, 7, "left"), (3, 12, "right"), (1, 1, "none"), (2, 2, "odd")):
        _equal(mask, function, batch, length, padding, read[1])


def _equal(mask: Mask, function: Spelling, batch: int, length: int, padding: str, infinite: bool) -> None:
    ids = (torch.arange(batch * length).reshape(batch, length) * 7919) % 5 - 1
    kept = torch.ones(batch, length, dtype=torch.int64)
    place, hidden = torch.arange(length)[None], torch.arange(batch)[:, None] % length
    if padding in ("left", "right"):
        kept = ((place >= hidden) if padding == "left" else (place < length - hidden)).long()
    if padding == "odd":
        kept = (torch.arange(batch * length).reshape(batch, length)) % 4 - 1
    actual = function(ids, kept)
    seen = actual if actual.dtype == torch.bool else actual == 0
    if actual.dtype != torch.bool:
        assert bool((actual[~seen] == INFINITE).all()) if infinite else bool((actual[~seen] <= -1e30).all())
    environment = {
        "b": torch.arange(batch)[:, None, None, None], "h": torch.zeros(1, 1, 1, 1, dtype=torch.int64),
        "q": torch.arange(length)[:, None], "kv": torch.arange(length)[None, :],
    }  # fmt: skip
    for n, table in enumerate(mask.tables):
        environment[f"t{n}"] = _value(table.node, ids, kept)
    for n, _ in enumerate(mask.sizes):
        environment[f"s{n}"] = length
    text = mask.text()
    predicted = torch.tensor(True) if text is None else evaluate(text, environment)
    assert torch.equal(*torch.broadcast_tensors(torch.as_tensor(predicted), seen)), mask.family


def _value(node: torch.fx.Node, ids: Tensor, kept: Tensor) -> Tensor:
    interpreter = torch.fx.Interpreter(node.graph.owning_module, garbage_collect_values=False)
    interpreter.run(ids, kept)
    return interpreter.env[node]


@pytest.mark.parametrize("name", SOFT)
def test_what_does_not_hide_completely_and_equally_stays_additive(name: str) -> None:
    _, formula, _ = _formula(SOFT[name])
    assert visible(formula) is None, formula
