"""Writes the recurrence kernel for a few tokens: the definition token by token, the state in registers."""

from __future__ import annotations

from subquad.codegen.loading import epilogue_arguments
from subquad.codegen.recurrence_forward import (
    element,
    first_only,
    initial,
    inputs,
    output_lines,
    state_cells,
    sum_cells,
)
from subquad.codegen.recurrence_parts import Parts
from subquad.codegen.recurrence_window import combine
from subquad.codegen.text import Argument, fill

_STEP = """
n = tl.program_id(1)
h = tl.program_id(2)
k_head = h // (heads // k_heads)
v_head = h // (heads // v_heads)
first = tl.load(bounds_ptr + n)
stop = tl.load(bounds_ptr + n + 1)
value_columns = tl.program_id(0) * $value_block + tl.arange(0, $value_block)
value_ok = value_columns < $value_dim
$weights
$begin
for t in range(first, stop):
    rows = t + tl.arange(0, 16) * 0
    row_ok = tl.arange(0, 16) == 0
    key_rows = rows
    key_ok = $key_ok
    counts = tl.sum(key_ok.to(tl.int32), axis=0) > 0
    $decays
    $tiles
    value = tl.load(v_ptr + (t * v_heads + v_head) * $value_dim + value_columns, mask=value_ok, other=0.0).to(tl.float32)
    value = tl.where(counts, value, 0.0)
    $correct
    read = tl.zeros([16, $value_block], tl.float32)
    mass = tl.zeros([16], tl.float32)
    $advance
    cells = (rows * heads + h)[:, None] * $value_dim + value_columns[None, :]
    $combine
    tl.store(o_ptr + cells, read, mask=row_ok[:, None] & value_ok[None, :])
$end
"""


def step(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """A few tokens, one after the other; phi is computed on a tile of 16 rows of which the first is the token."""
    begin, tiles, correct, advance, end = [], [], [], [], []
    for block in parts.blocks:
        i = block.index
        own, ok = state_cells(parts, block, "n * heads + h")
        own_sum, sum_ok = sum_cells(parts, block, "n * heads + h")
        begin.append(f"S{i} = {initial('state_ptr', own, ok)}")
        tiles += [
            *parts.feature("q", block),
            f"q{i} = tl.sum(q{i}, axis=0)",
            *parts.feature("k", block),
            f"k{i} = tl.sum(k{i}, axis=0)",
        ]
        if parts.decay == "scalar":
            tiles.append(f"S{i} = S{i} * tl.exp(g)")
        if parts.decay == "channel":
            columns = f"{block.offset} + tl.arange(0, {block.pad})"
            tiles.append(
                f"g{i} = tl.maximum(tl.load(g_ptr + (t * g_heads + g_head) * {parts.features} + {columns},"
                f" mask=tl.arange(0, {block.pad}) < {block.width}, other=0.0), -100.0)"
            )
            tiles += [f"g{i} = tl.where(counts, g{i}, 0.0)", f"S{i} = S{i} * tl.exp(g{i})[:, None]"]
        if parts.delta:
            correct.append(f"value -= tl.sum(k{i}[:, None] * S{i}, axis=0)")
        advance.append(f"S{i} += k{i}[:, None] * value[None, :]")
        advance.append(f"read += tl.sum(q{i}[:, None] * S{i}, axis=0)[None, :]")
        end.append(f"tl.store(final_ptr + {own}, S{i}, mask={ok})")
        if parts.sums:
            begin.append(f"z{i} = {initial('state_sum_ptr', own_sum, sum_ok)}")
            how = {"none": "", "scalar": " * tl.exp(g)", "channel": f" * tl.exp(g{i})"}[parts.decay]
            advance += [f"z{i} = z{i}{how} + k{i}", f"mass += tl.sum(q{i} * z{i}, axis=0)"]
            end.append(f"tl.store(final_sum_ptr + {own_sum}, z{i}, mask={first_only(sum_ok, 0)})")
    decays = ["g_head = h // (heads // g_heads)"] if parts.decay != "none" else []
    if parts.decay == "scalar":
        place = "g_head" if parts.what.decay == "head" else "t * g_heads + g_head"
        decays.append(f"g = tl.where(counts, tl.maximum(tl.load(g_ptr + {place}), -100.0), 0.0)")
    if parts.delta:
        correct.append(
            "value = tl.where(counts, value * tl.load(beta_ptr + t * b_heads + h // (heads // b_heads)), 0.0)"
        )
    padded = "tl.where(tl.load(valid_ptr + t) != 0, row_ok, False)" if "valid" in parts.spec.flags else "row_ok"
    body = fill(
        _STEP, value_block=parts.value_block, value_dim=parts.spec.value_dim, weights=parts.weights("q") + parts.weights("k"),
        begin=begin, key_ok=padded, decays=decays, tiles=tiles, correct=correct, advance=advance, end=end,
        combine=combine(parts) + output_lines(parts),
    )  # fmt: skip
    arguments = [one for one in inputs(parts, "q", "k", "v") if one[0] not in ("G_ptr", "chunks_ptr", "owner_ptr")]
    arguments += [("g_ptr", "*fp32"), ("g_heads", "i32")] if parts.decay != "none" else []
    arguments += [("beta_ptr", "*fp32"), ("b_heads", "i32")] if parts.delta else []
    arguments += [("has_state", "i32"), ("state_ptr", "*fp32"), ("final_ptr", "*fp32")]
    arguments += [("state_sum_ptr", "*fp32"), ("final_sum_ptr", "*fp32")] if parts.sums else []
    return (
        "S <- e^g S; S <- S + phi(k) (beta) (v (- phi(k) S)); o = phi(q) S",
        [*arguments, *epilogue_arguments(parts.around.o, element(parts)), ("o_ptr", element(parts))],
        body,
    )
