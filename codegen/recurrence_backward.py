"""Writes the backward kernels of the recurrence over rows phi(q), phi(k) [R, H, F] that are already in memory.

Formulas: Gated Linear Attention (2312.06635) for the gates, DeltaNet (2406.06484) for the UT transform; each was checked
against the derivative of the token-by-token form.
"""

from __future__ import annotations

from subquad.codegen.recurrence_forward import (
    BEFORE,
    between,
    chunk_lines,
    element,
    first_only,
    gate_lines,
    inputs,
    row_lines,
    state_cells,
    sum_cells,
    values_line,
)
from subquad.codegen.recurrence_parts import Parts
from subquad.codegen.text import Argument, fill

_VALUES = """
$chunk_lines
value_columns = tl.program_id(2) * $value_block + tl.arange(0, $value_block)
value_ok = value_columns < $value_dim
$decays
cells = (rows * heads + h)[:, None] * $value_dim + value_columns[None, :]
grad = tl.load(do_ptr + cells, mask=row_ok[:, None] & value_ok[None, :], other=0.0)
score = tl.zeros([$chunk, $chunk], tl.float32)
found = tl.zeros([$chunk, $value_block], tl.float32)
$blocks
score = $triangle
found += $product
tl.store(dv_ptr + cells, found, mask=row_ok[:, None] & value_ok[None, :])
"""


def grad_values(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """dv of each chunk; for the delta rule only the part that the chunk's own queries give (of the corrected values)."""
    blocks = []
    for block in parts.blocks:
        i = block.index
        chunk, ok = state_cells(parts, block, "index.to(tl.int64) * heads + h")
        blocks += [*parts.feature("q", block), *parts.feature("k", block), *parts.decays(block)]
        blocks.append(f"score += {parts.scores(f'q{i}', f'k{i}', block)}")
        if not parts.delta:
            blocks.append(f"dS = tl.load(dstates_ptr + {chunk}, mask={ok}, other=0.0).to(tl.float32)")
            blocks.append(f"found += {parts.dot(parts.sunk(f'k{i}', block), 'dS')}")
    body = fill(
        _VALUES, chunk_lines=chunk_lines(parts), chunk=parts.chunk, value_block=parts.value_block,
        value_dim=parts.spec.value_dim, decays=parts.decays(), blocks=blocks, triangle=parts.triangle("score"),
        product=parts.dot("tl.trans(score)", "grad"),
    )  # fmt: skip
    arguments = [*inputs(parts, "q", "k"), ("do_ptr", "*fp32")]
    arguments += [] if parts.delta else [("dstates_ptr", between(parts))]
    return "dv = P^T do + (e^(G_last - G) k) dS, P = tril(q k^T e^(G_i - G_j))", [*arguments, ("dv_ptr", "*fp32")], body


_STATES = """
n = tl.program_id(1)
h = tl.program_id(2)
stop = tl.load(bounds_ptr + n + 1)
first = tl.load(bounds_ptr + n)
first_chunk = tl.load(chunks_ptr + n)
count = tl.load(chunks_ptr + n + 1) - first_chunk
value_columns = tl.program_id(0) * $value_block + tl.arange(0, $value_block)
value_ok = value_columns < $value_dim
k_head = h // (heads // k_heads)
$begin
for back in range(0, count):
    i = count - 1 - back
    start = first + i * $chunk
    $rows
    $decays
    $keep
    cells = (rows * heads + h)[:, None] * $value_dim + value_columns[None, :]
    grad = tl.load(do_ptr + cells, mask=row_ok[:, None] & value_ok[None, :], other=0.0)
    $values
    $advance
$end
"""


def grad_states(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """dS after each chunk and before the first, from the last chunk to the first; the delta rule's dv is completed."""
    begin, keep, values, advance, end = [], [], [], [], []
    for block in parts.blocks:
        i = block.index
        own, ok = state_cells(parts, block, "n * heads + h")
        chunk, _ = state_cells(parts, block, "(first_chunk + i) * heads + h")
        own_sum, sum_ok = sum_cells(parts, block, "n * heads + h")
        chunk_sum, _ = sum_cells(parts, block, "(first_chunk + i) * heads + h")
        sum_ok = first_only(sum_ok, 0)
        begin.append(f"dS{i} = tl.load(dfinal_ptr + {own}, mask={ok}, other=0.0)")
        keep.append(f"tl.store(dstates_ptr + {chunk}, dS{i}, mask={ok})")
        q = parts.risen(f"q{i}", block)
        if parts.delta:
            columns = f"tl.arange(0, {block.pad})"
            keep += [*parts.decays(block)]
            values += [*parts.feature("k", block), f"dv += {parts.dot(parts.sunk(f'k{i}', block), f'dS{i}')}"]
            advance.append(
                f"w = tl.load(w_ptr + (rows * heads + h)[:, None] * {parts.features} + {block.offset} + {columns}[None, :],"
                f" mask=row_ok[:, None] & ({columns} < {block.width})[None, :], other=0.0).to(tl.float32)"
            )
        else:
            advance += parts.decays(block)
        advance += parts.feature("q", block)
        less = f" - {parts.dot('tl.trans(w)', 'dv')}" if parts.delta else ""
        advance.append(f"dS{i} = {parts.aged(f'dS{i}', block)} + {parts.dot(f'tl.trans({q})', 'grad')}{less}")
        end.append(f"tl.store(dinitial_ptr + {own}, dS{i}, mask={ok})")
        if parts.sums:
            begin.append(f"dz{i} = tl.load(dfinal_sum_ptr + {own_sum}, mask={sum_ok}, other=0.0)")
            keep.append(f"tl.store(dsums_ptr + {chunk_sum}, dz{i}, mask={sum_ok})")
            advance.append(
                f"dz{i} = {parts.aged(f'dz{i}', block, vector=True)} + tl.sum({q} * grad_mass[:, None], axis=0)"
            )
            end.append(f"tl.store(dinitial_sum_ptr + {own_sum}, dz{i}, mask={sum_ok})")
    if parts.sums:
        values.append("grad_mass = tl.load(dmass_ptr + rows * heads + h, mask=row_ok, other=0.0)")
    if parts.delta:
        ok = "row_ok[:, None] & value_ok[None, :]"
        values = [
            f"dv = tl.load(dv_ptr + cells, mask={ok}, other=0.0)",
            *values,
            f"tl.store(dv_ptr + cells, dv, mask={ok})",
        ]
    body = fill(
        _STATES, value_block=parts.value_block, value_dim=parts.spec.value_dim, chunk=parts.chunk, begin=begin,
        rows=row_lines(parts), decays=parts.decays(), keep=keep, values=values, advance=advance, end=end,
    )  # fmt: skip
    arguments = [*inputs(parts, "q", *(["k"] if parts.delta else [])), ("do_ptr", "*fp32")]
    arguments += [("w_ptr", element(parts)), ("dv_ptr", "*fp32")] if parts.delta else []
    arguments += [("dfinal_ptr", "*fp32"), ("dstates_ptr", between(parts)), ("dinitial_ptr", "*fp32")]
    if parts.sums:
        arguments += [
            ("dmass_ptr", "*fp32"),
            ("dfinal_sum_ptr", "*fp32"),
            ("dsums_ptr", "*fp32"),
            ("dinitial_sum_ptr", "*fp32"),
        ]
    rule = "dS <- e^(G_last) dS + (e^G q)^T do"
    return (
        f"{rule}{' - w^T dv, dv += (e^(G_last - G) k) dS' if parts.delta else ''}; dS after each chunk is kept",
        arguments,
        body,
    )


_KEYS = """
$chunk_lines
fb = tl.program_id(2)
columns = fb * $slice + tl.arange(0, $slice)
column_ok = columns < $features
tile = (rows * heads + h)[:, None] * $features + columns[None, :]
tile_ok = row_ok[:, None] & column_ok[None, :]
$decays
q0 = tl.load(q_ptr + tile, mask=tile_ok, other=0.0).to(tl.float32)
k0 = tl.load(k_ptr + (rows * k_heads + k_head)[:, None] * $features + columns[None, :],
             mask=key_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
a = tl.zeros([$chunk, $chunk], tl.float32)
dq = tl.zeros([$chunk, $slice], tl.float32)
dk = tl.zeros([$chunk, $slice], tl.float32)
moved = tl.zeros([$slice], tl.float32)
$more
for low in range(0, $value_dim, $value_block):
    value_columns = low + tl.arange(0, $value_block)
    value_ok = value_columns < $value_dim
    cells = (rows * heads + h)[:, None] * $value_dim + value_columns[None, :]
    cell_ok = row_ok[:, None] & value_ok[None, :]
    grad = tl.load(do_ptr + cells, mask=cell_ok, other=0.0)
    $values
    square = ((index.to(tl.int64) * heads + h) * $features + columns)[:, None] * $value_dim + value_columns[None, :]
    square_ok = column_ok[:, None] & value_ok[None, :]
    S = tl.load(states_ptr + square, mask=square_ok, other=0.0).to(tl.float32)
    dS = tl.load(dstates_ptr + square, mask=square_ok, other=0.0).to(tl.float32)
    a += $pairs
    dq += $read
    dk += $wrote
    moved += tl.sum(S * dS, axis=1)
    $delta
$sums
a = $triangle
sunk = $sunk
dq = $risen + $left
dk_last = sunk * dk
dk = tl.where(key_ok[:, None], $sunk_grad + $right, 0.0)
$dG
tl.store(dq_ptr + tile, dq, mask=tile_ok)
tl.store(dk_ptr + tile, dk, mask=tile_ok)
$end
"""


def grad_keys(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """dq, dk, the gradient of G, and for the delta rule dw; one program owns a slice of phi's columns."""
    block = parts.blocks[0]
    values = [values_line(parts)]
    delta, more, end = [], [], []
    if parts.delta:
        values = ["values = tl.load(corrected_ptr + cells, mask=cell_ok, other=0.0).to(tl.float32)"]
        more = [f"dw = tl.zeros([{parts.chunk}, {block.pad}], tl.float32)"]
        values.append("dv = tl.load(dv_ptr + cells, mask=cell_ok, other=0.0)")
        delta = [f"dw -= {parts.dot('dv', 'tl.trans(S)')}"]
        end = ["tl.store(dw_ptr + tile, dw, mask=tile_ok)"]
    sums = []
    if parts.sums:
        sums = [
            f"place = (index.to(tl.int64) * heads + h) * {parts.features} + columns",
            "z = tl.load(sums_ptr + place, mask=column_ok, other=0.0)",
            "dz = tl.load(dsums_ptr + place, mask=column_ok, other=0.0)",
            "grad_mass = tl.load(dmass_ptr + rows * heads + h, mask=row_ok, other=0.0)",
            "a += grad_mass[:, None]",
            "dq += grad_mass[:, None] * z[None, :]",
            "dk += dz[None, :]",
            "moved += z * dz",
        ]
    decays = parts.decays()
    gates: list[str] = []
    if parts.decay == "channel":
        decays = [
            f"G0 = tl.load(G_ptr + (rows * heads + h)[:, None] * {parts.features} + columns[None, :], mask=tile_ok, other=0.0)",
            f"last0 = tl.load(G_ptr + ({parts.last_row} * heads + h) * {parts.features} + columns,"
            " mask=column_ok, other=0.0)",
        ]
    if parts.decay != "none":
        is_last = f"(rows == {parts.last_row})"
        total = (
            "tl.exp(last0) * moved + tl.sum(dk_last, axis=0)"
            if parts.decay == "channel"
            else "whole * moved + tl.sum(dk_last, axis=0)"
        )
        gates = [f"dG = q0 * dq - k0 * dk + tl.where({is_last}[:, None], ({total})[None, :], 0.0)"]
        if parts.decay == "channel":
            gates.append("tl.store(dG_ptr + tile, dG, mask=tile_ok)")
        else:
            gates.append(
                "tl.store(dG_ptr + (fb * tl.load(bounds_ptr + sequences) + rows) * heads + h, tl.sum(dG, axis=1), mask=row_ok)"
            )
    triangle = parts.triangle("a")
    body = fill(
        _KEYS, chunk_lines=chunk_lines(parts), slice=block.pad, features=parts.features, decays=decays, chunk=parts.chunk,
        more=more, value_dim=parts.spec.value_dim, value_block=parts.value_block, values=values,
        pairs=parts.dot("grad", "tl.trans(values)"), read=parts.dot("grad", "tl.trans(S)"),
        wrote=parts.dot("values", "tl.trans(dS)"), delta=delta, sums=sums, triangle=triangle, sunk=parts.sunk("k0", block),
        risen=parts.risen("dq", block), left=parts.left("a", "k0", block), right=parts.right("a", "q0", block),
        sunk_grad=parts.sunk("dk", block), dG=gates, end=end,
    )  # fmt: skip
    arguments = [*inputs(parts, "q", "k", *([] if parts.delta else ["v"])), ("do_ptr", "*fp32")]
    arguments += [("corrected_ptr", element(parts)), ("dv_ptr", "*fp32"), ("dw_ptr", "*fp32")] if parts.delta else []
    arguments += [("states_ptr", between(parts)), ("dstates_ptr", between(parts))]
    arguments += [("sums_ptr", "*fp32"), ("dsums_ptr", "*fp32"), ("dmass_ptr", "*fp32")] if parts.sums else []
    arguments += [("dq_ptr", "*fp32"), ("dk_ptr", "*fp32")]
    if parts.decay != "none":
        arguments += [("dG_ptr", "*fp32")] + ([("sequences", "i32")] if parts.decay == "scalar" else [])
    return (
        "dq = e^G (do S^T) + a k, dk = e^(G_last - G) (v dS^T) + a^T q with a = tril(do v^T e^(G_i - G_j))",
        arguments,
        body,
    )


_TRANSFORM = """
$chunk_lines
beta = tl.load(beta_ptr + rows * b_heads + h // (heads // b_heads), mask=key_ok, other=0.0).to(tl.float32)
$decays
inverse = tl.load(inverse_ptr + (rows * heads + h)[:, None] * $chunk + local[None, :], mask=row_ok[:, None], other=0.0)
dbeta = tl.zeros([$chunk], tl.float32)
a = tl.zeros([$chunk, $chunk], tl.float32)
$scalar
for low in range(0, $value_dim, $value_block):
    value_columns = low + tl.arange(0, $value_block)
    value_ok = value_columns < $value_dim
    cells = (rows * heads + h)[:, None] * $value_dim + value_columns[None, :]
    dv = tl.load(dv_ptr + cells, mask=row_ok[:, None] & value_ok[None, :], other=0.0)
    $values
    a += $value_pairs
    du = $du
    dbeta += tl.sum(values * du, axis=1)
    tl.store(dv_ptr + cells, beta[:, None] * du, mask=row_ok[:, None] & value_ok[None, :])
$pairs
a = $inner
a = -$triangle
$blocks
tl.store(dbeta_ptr + rows * heads + h, dbeta, mask=row_ok)
$end
"""


def grad_transform(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """Back through the UT transform: dv and dbeta, and what it adds to dk and to the gradient of G."""
    pairs, blocks = [], []
    exact = parts.precision
    for block in parts.blocks:
        k = f"k{block.index}"
        columns = f"tl.arange(0, {block.pad})"
        tile = f"(rows * heads + h)[:, None] * {parts.features} + {block.offset} + {columns}[None, :]"
        ok = f"row_ok[:, None] & ({columns} < {block.width})[None, :]"
        load = [
            *parts.feature("k", block),
            *parts.decays(block),
            f"dw = tl.load(dw_ptr + {tile}, mask={ok}, other=0.0)",
        ]
        pairs += [*load, f"a += {parts.dot('dw', f'tl.trans(beta[:, None] * {parts.risen(k, block)})', exact)}"]
        blocks += [
            *load,
            f"dw = {parts.risen(parts.dot('tl.trans(inverse)', 'dw', exact), block)} + {parts.left('a', k, block)}",
            f"dbeta += tl.sum({k} * dw, axis=1)",
            "dw = beta[:, None] * dw",
            f"column = {parts.right('a', f'(beta[:, None] * {k})', block)}",
            f"tl.store(dk_ptr + {tile}, tl.load(dk_ptr + {tile}, mask={ok}, other=0.0) + dw + column, mask={ok})",
        ]
        if parts.decay == "channel":
            blocks.append(f"dG = tl.load(dG_ptr + {tile}, mask={ok}, other=0.0) + {k} * (dw - column)")
            blocks.append(f"tl.store(dG_ptr + {tile}, dG, mask={ok})")
        if parts.decay == "scalar":
            blocks.append(f"dG += tl.sum({k} * (dw - column), axis=1)")
    scalar = parts.decay == "scalar"
    inner = parts.dot("tl.trans(inverse)", parts.dot("a", "tl.trans(inverse)", exact), exact)
    body = fill(
        _TRANSFORM, chunk_lines=chunk_lines(parts), decays=parts.decays(), chunk=parts.chunk,
        scalar=[f"dG = tl.zeros([{parts.chunk}], tl.float32)"] if scalar else [],
        value_dim=parts.spec.value_dim, value_block=parts.value_block, values=[values_line(parts)],
        value_pairs=parts.dot("dv", "tl.trans(beta[:, None] * values)", exact), du=parts.dot("tl.trans(inverse)", "dv", exact),
        pairs=pairs, inner=inner, triangle=f"({parts.triangle('a', strict=True)})", blocks=blocks,
        end=["tl.store(dG_ptr + rows * heads + h, tl.load(dG_ptr + rows * heads + h, mask=row_ok, other=0.0) + dG, mask=row_ok)"]
        if scalar else [],
    )  # fmt: skip
    arguments = [*inputs(parts, "k", "v"), ("beta_ptr", "*fp32"), ("b_heads", "i32"), ("inverse_ptr", "*fp32")]
    arguments += [("dv_ptr", "*fp32"), ("dw_ptr", "*fp32"), ("dk_ptr", "*fp32"), ("dbeta_ptr", "*fp32")]
    arguments += [("dG_ptr", "*fp32")] if parts.decay != "none" else []
    return (
        "du = inverse^T dv, a = -tril(inverse^T (dv (beta v)^T + dw (beta e^G k)^T) inverse^T e^(G_i - G_j))",
        arguments,
        body,
    )


def decumulate(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """dg from the gradient of G: sums from each token to the end of its chunk; 0 for a padded token."""
    channel = parts.decay == "channel"
    width = parts.features
    columns = [f"columns = tl.program_id(2) * {parts.slice} + tl.arange(0, {parts.slice})"] if channel else []
    extra = f"[:, None] & (columns < {width})[None, :]" if channel else ""

    def cells(place: str) -> str:
        return f"({place})[:, None] * {width} + columns[None, :]" if channel else place

    body = [
        *chunk_lines(parts), *columns, *gate_lines(parts),
        f"value = tl.load(dG_ptr + {cells('rows * heads + h')}, mask=row_ok{extra}, other=0.0)",
        f"value = tl.where(gate_ok{'[:, None]' if channel else ''}, tl.cumsum(value, 0, reverse=True), 0.0)",
        f"tl.store(dg_ptr + {cells('gate_rows * heads + h')}, value, mask=gate_there{extra})",
    ]  # fmt: skip
    kept = [one for one in inputs(parts) if one[0] != "G_ptr"]
    arguments: list[Argument] = [("dG_ptr", "*fp32"), ("dg_ptr", "*fp32"), *kept]
    return f"dg_t = sum of dG over the chunk's tokens from t on{BEFORE[parts.reverse]}", arguments, body
