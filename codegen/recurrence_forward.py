"""Writes the forward kernels of the recurrence: sums of log decays, UT transform, states between chunks, outputs."""

from __future__ import annotations

from subquad.codegen.loading import epilogue_arguments, epilogue_lines, prologue_arguments
from subquad.codegen.recurrence_parts import Block, Parts
from subquad.codegen.recurrence_window import combine, query_lines, window_arguments, window_lines
from subquad.codegen.text import Argument, fill

TABLES: list[Argument] = [("bounds_ptr", "*i64"), ("chunks_ptr", "*i64"), ("owner_ptr", "*i64")]
"""First row of each sequence (and the end), first chunk of each sequence (and the end), sequence of each chunk (-1: none)."""
HEADS: list[Argument] = [(name, "i32") for name in ("heads", "k_heads", "v_heads")]

_CHUNK = """
index = tl.program_id(0)
h = tl.program_id(1)
n = tl.load(owner_ptr + index)
if n < 0:
    return
stop = tl.load(bounds_ptr + n + 1)
first = tl.load(bounds_ptr + n)
start = first + (index - tl.load(chunks_ptr + n)) * $chunk
"""
_ROWS = """
local = tl.arange(0, $chunk)
rows = $rows
row_ok = start + local < stop
$keys
"""
_HEAD = """
k_head = h // (heads // k_heads)
v_head = h // (heads // v_heads)
"""


def chunk_lines(parts: Parts) -> list[str]:
    """Lines that find this program's chunk: sequence n, head h, rows start.. below stop."""
    return [*fill(_CHUNK, chunk=parts.chunk), *row_lines(parts), *fill(_HEAD)]


def row_lines(parts: Parts) -> list[str]:
    """Lines for the chunk's rows, which of them are tokens, and the rows of their keys."""
    return fill(_ROWS, chunk=parts.chunk, rows=parts.row_of("start + local"), keys=key_lines(parts))


def key_lines(parts: Parts) -> list[str]:
    """Lines for the rows of k and v that belong to the chunk's rows, and which of them count."""
    window = parts.what.window
    shift = {"shared": f"rows + n * {window}", "convex": f"rows + (n + 1) * {window}"}[parts.what.branch]
    lines = [f"key_rows = {shift if window else 'rows'}"]
    if "valid" in parts.spec.flags:
        return [*lines, "key_ok = row_ok & (tl.load(valid_ptr + rows, mask=row_ok, other=0) != 0)"]
    return [*lines, "key_ok = row_ok"]


def inputs(parts: Parts, *sides: str) -> list[Argument]:
    """Arguments that the parts of a kernel read: rows of q and k with the weights of their maps, padding, sums of
    decays.
    """
    element = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[parts.spec.dtype]
    found: list[Argument] = []
    for side in sides:
        found.append((f"{side}_ptr", element))
        if side in "qk":
            found += [
                (line.split(" = ")[0].replace(f"_{side}", f"_{side}_ptr"), "*fp32") for line in parts.weights(side)
            ]
            found += prologue_arguments(parts.around.q if side == "q" else parts.around.k, side)
    if any(name.endswith("_table_stride_t") for name, _ in found):
        found.append(("table_period", "i32"))
    if parts.decay != "none":
        found.append(("G_ptr", "*fp32"))
    if "valid" in parts.spec.flags:
        found.append(("valid_ptr", "*i8"))
    return found + TABLES + HEADS


def values_line(parts: Parts, name: str = "values", columns: str = "value_columns") -> str:
    """A line that loads the chunk's rows of v."""
    return (
        f"{name} = tl.load(v_ptr + (key_rows * v_heads + v_head)[:, None] * {parts.spec.value_dim} + {columns}[None, :],"
        f" mask=key_ok[:, None] & ({columns} < {parts.spec.value_dim})[None, :], other=0.0).to(tl.float32)"
    )


def element(parts: Parts) -> str:
    """Triton type of q, k, v and o."""
    return {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[parts.spec.dtype]


def between(parts: Parts) -> str:
    """Triton type of states kept between kernels: bf16 has the range that sums need, fp16 has not."""
    return "*bf16" if parts.spec.dtype == "bfloat16" else "*fp32"


def state_cells(parts: Parts, block: Block, place: str, columns: str = "value_columns") -> tuple[str, str]:
    """(offset, mask) of the tile [pad, V] of one block in a buffer [.., F, V] whose row `place` is given."""
    rows = f"tl.arange(0, {block.pad})"
    offset = f"(({place}) * {parts.features} + {block.offset} + {rows})[:, None] * {parts.spec.value_dim} + {columns}[None, :]"
    return offset, f"({rows} < {block.width})[:, None] & ({columns} < {parts.spec.value_dim})[None, :]"


def sum_cells(parts: Parts, block: Block, place: str) -> tuple[str, str]:
    """(offset, mask) of the vector [pad] of one block in a buffer [.., F] whose row `place` is given."""
    rows = f"tl.arange(0, {block.pad})"
    return f"({place}) * {parts.features} + {block.offset} + {rows}", f"{rows} < {block.width}"


def initial(pointer: str, cells: str, ok: str) -> str:
    """The value a state starts from: what is in memory if the call has a state, else zeros, without reading the pointer."""
    return f"tl.load({pointer} + {cells}, mask=tl.where(has_state != 0, {ok}, False), other=0.0)"


def first_only(ok: str, axis: int) -> str:
    """A mask that holds only in the first program along one axis of the grid."""
    return f"tl.where(tl.program_id({axis}) == 0, {ok}, False)"


def cumulate(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """G: running sums of the log decays within each chunk, fp32; a padded token's is 0."""
    channel = parts.decay == "channel"
    width = parts.features
    columns = [f"columns = tl.program_id(2) * {parts.slice} + tl.arange(0, {parts.slice})"] if channel else []
    beside = f"[:, None] & (columns < {width})[None, :]" if channel else ""

    def cells(place: str) -> str:
        return f"({place})[:, None] * {width} + columns[None, :]" if channel else place

    place = "g_head + gate_rows * 0" if parts.what.decay == "head" else cells("gate_rows * g_heads + g_head")
    body = [
        *chunk_lines(parts), *columns, *gate_lines(parts), "g_head = h // (heads // g_heads)",
        f"value = tl.load(g_ptr + {place}, mask=gate_ok{beside}, other=0.0).to(tl.float32)",
        f"tl.store(G_ptr + {cells('rows * heads + h')}, tl.cumsum(tl.maximum(value, -100.0), 0), mask=row_ok{beside})",
    ]  # fmt: skip
    arguments: list[Argument] = [("g_ptr", "*fp32"), *inputs(parts), ("g_heads", "i32")]
    return f"G_t = sum of max(g, -100) over the chunk's tokens up to t{BEFORE[parts.reverse]}", arguments, body


BEFORE = ("", ", itself not")
"""What a running sum of the reversed tokens leaves out: a token's gate stands between it and those it is read by."""


def gate_lines(parts: Parts) -> list[str]:
    """Lines for the rows of the gates that the running sums take in, which of them are there, and which of these count."""
    if not parts.reverse:
        return ["gate_rows, gate_there, gate_ok = rows, row_ok, key_ok"]
    counts = "(tl.load(valid_ptr + gate_rows, mask=gate_there, other=0) != 0)"
    valid = f" & {counts}" if "valid" in parts.spec.flags else ""
    return ["gate_rows = rows + 1", "gate_there = row_ok & (gate_rows < stop)", f"gate_ok = gate_there{valid}"]


_PREPARE = """
$chunk_lines
beta = tl.load(beta_ptr + rows * b_heads + h // (heads // b_heads), mask=key_ok, other=0.0).to(tl.float32)
$decays
$weights
a = tl.zeros([$chunk, $chunk], tl.float32)
$scores
a = $triangle * beta[:, None]
inverse = unit_inverse(a, $chunk, $rows_of_block)
tl.store(inverse_ptr + (rows * heads + h)[:, None] * $chunk + local[None, :], inverse, mask=row_ok[:, None])
for low in range(0, $value_dim, $value_block):
    value_columns = low + tl.arange(0, $value_block)
    $values
    u = $u
    tl.store(u_ptr + (rows * heads + h)[:, None] * $value_dim + value_columns[None, :], u,
             mask=row_ok[:, None] & (value_columns < $value_dim)[None, :])
$keys
"""


def prepare(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """UT transform of the delta rule: inverse = (I + A)^-1, u = inverse (beta v), w = inverse (beta e^G k)."""
    scores, keys = [], []
    for block in parts.blocks:
        tile = parts.feature("k", block) + parts.decays(block)
        k = f"k{block.index}"
        columns = f"tl.arange(0, {block.pad})"
        scores += [*tile, f"a += {parts.scores(k, k, block, parts.precision)}"]
        keys += [
            *tile,
            f"w = {parts.dot('inverse', f'beta[:, None] * {parts.risen(k, block)}', parts.precision)}",
            f"tl.store(w_ptr + (rows * heads + h)[:, None] * {parts.features} + {block.offset} + {columns}[None, :], w,"
            f" mask=row_ok[:, None] & ({columns} < {block.width})[None, :])",
        ]
    body = fill(
        _PREPARE, chunk_lines=chunk_lines(parts), chunk=parts.chunk, decays=parts.decays(), weights=parts.weights("k"),
        scores=scores, keys=keys, rows_of_block=parts.rows_of_block, values=[values_line(parts)],
        triangle=f"({parts.triangle('a', strict=True)})",
        value_dim=parts.spec.value_dim, value_block=parts.value_block,
        u=parts.dot("inverse", "beta[:, None] * values", parts.precision),
    )  # fmt: skip
    arguments: list[Argument] = [
        *inputs(parts, "k", "v"), ("beta_ptr", "*fp32"), ("b_heads", "i32"), ("inverse_ptr", "*fp32"),
        ("u_ptr", element(parts)), ("w_ptr", element(parts)),
    ]  # fmt: skip
    return (
        "A_ij = beta_i k_i.k_j e^(G_i - G_j), j < i; inverse = (I + A)^-1; u = inverse (beta v); w = inverse (beta e^G k)",
        arguments,
        body,
    )


_STATES = """
n = tl.program_id(1)
h = tl.program_id(2)
stop = tl.load(bounds_ptr + n + 1)
first = tl.load(bounds_ptr + n)
first_chunk = tl.load(chunks_ptr + n)
count = tl.load(chunks_ptr + n + 1) - first_chunk
value_columns = tl.program_id(0) * $value_block + tl.arange(0, $value_block)
value_ok = value_columns < $value_dim
$head
$weights
$begin
for i in range(0, count):
    start = first + i * $chunk
    $rows
    $keep
    $decays
    $values
    $advance
$end
"""


def states(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """The state before each chunk, the delta rule's corrected values, and the final state; one program walks a sequence."""
    begin, keep, advance, end, reads = [], [], [], [], []
    for block in parts.blocks:
        i, k = block.index, f"k{block.index}"
        own, ok = state_cells(parts, block, "n * heads + h")
        chunk, _ = state_cells(parts, block, "(first_chunk + i) * heads + h")
        own_sum, sum_ok = sum_cells(parts, block, "n * heads + h")
        chunk_sum, _ = sum_cells(parts, block, "(first_chunk + i) * heads + h")
        sum_ok = first_only(sum_ok, 0)
        begin.append(f"S{i} = {initial('state_ptr', own, ok)}")
        keep.append(f"tl.store(states_ptr + {chunk}, S{i}, mask={ok})")
        advance += parts.feature("k", block) + parts.decays(block)
        if parts.delta:
            columns = f"tl.arange(0, {block.pad})"
            reads += [
                f"w = tl.load(w_ptr + (rows * heads + h)[:, None] * {parts.features} + {block.offset} + {columns}[None, :],"
                f" mask=row_ok[:, None] & ({columns} < {block.width})[None, :], other=0.0).to(tl.float32)",
                f"values -= {parts.dot('w', f'S{i}')}",
            ]
        product = parts.dot(f"tl.trans({parts.sunk(k, block)})", "values")
        advance.append(f"S{i} = {parts.aged(f'S{i}', block)} + {product}")
        end.append(f"tl.store(final_ptr + {own}, S{i}, mask={ok})")
        if parts.sums:
            begin.append(f"z{i} = {initial('state_sum_ptr', own_sum, sum_ok)}")
            keep.append(f"tl.store(sums_ptr + {chunk_sum}, z{i}, mask={sum_ok})")
            advance.append(f"z{i} = {parts.aged(f'z{i}', block, vector=True)} + tl.sum({parts.sunk(k, block)}, axis=0)")
            end.append(f"tl.store(final_sum_ptr + {own_sum}, z{i}, mask={sum_ok})")
    values = [values_line(parts)]
    if parts.delta:
        cells = f"(rows * heads + h)[:, None] * {parts.spec.value_dim} + value_columns[None, :]"
        values = [
            f"values = tl.load(u_ptr + {cells}, mask=row_ok[:, None] & value_ok[None, :], other=0.0).to(tl.float32)",
            *reads,
            f"tl.store(corrected_ptr + {cells}, values, mask=row_ok[:, None] & value_ok[None, :])",
        ]
    body = fill(
        _STATES, value_block=parts.value_block, value_dim=parts.spec.value_dim, chunk=parts.chunk, head=fill(_HEAD),
        weights=parts.weights("k"), begin=begin, rows=row_lines(parts),
        keep=keep, decays=parts.decays(), values=values, advance=advance, end=end,
    )  # fmt: skip
    arguments = inputs(parts, "k", *([] if parts.delta else ["v"]))
    if parts.delta:
        arguments += [("w_ptr", element(parts)), ("u_ptr", element(parts)), ("corrected_ptr", element(parts))]
    arguments += [("has_state", "i32"), ("state_ptr", "*fp32"), ("states_ptr", between(parts)), ("final_ptr", "*fp32")]
    if parts.sums:
        arguments += [("state_sum_ptr", "*fp32"), ("sums_ptr", "*fp32"), ("final_sum_ptr", "*fp32")]
    rule = "S <- e^(G_last) S + (e^(G_last - G) phi(k))^T values"
    return f"{rule}{', values = u - w S' if parts.delta else ''}; S before each chunk is kept", arguments, body


_OUTPUT = """
$chunk_lines
value_columns = tl.program_id(2) * $value_block + tl.arange(0, $value_block)
value_ok = value_columns < $value_dim
cells = (rows * heads + h)[:, None] * $value_dim + value_columns[None, :]
$decays
$weights
$query
read = $read
mass = $mass
score = tl.zeros([$chunk, $chunk], tl.float32)
$blocks
score = $triangle
$values
read += $product
$finish
tl.store(o_ptr + cells, read, mask=row_ok[:, None] & value_ok[None, :])
"""


def output_lines(parts: Parts) -> list[str]:
    """Lines that take `read` through the output's norm and gate."""
    ok = "row_ok[:, None] & value_ok[None, :]"
    return epilogue_lines(parts.around.o, "read", "cells", ok, parts.spec.value_dim, "value_columns")


def output(parts: Parts) -> tuple[str, list[Argument], list[str]]:
    """o of each chunk from the state before it, its own keys, and the window; "raw" leaves out normaliser and scale;
    "reverse" adds to what the tokens read in the other direction.
    """
    blocks: list[str] = []
    for block in parts.blocks:
        i = block.index
        chunk, ok = state_cells(parts, block, "index.to(tl.int64) * heads + h")
        chunk_sum, sum_ok = sum_cells(parts, block, "index.to(tl.int64) * heads + h")
        blocks += [*parts.feature("q", block), *parts.feature("k", block), *parts.decays(block)]
        blocks.append(f"score += {parts.scores(f'q{i}', f'k{i}', block)}")
        blocks.append(f"S = tl.load(states_ptr + {chunk}, mask={ok}, other=0.0).to(tl.float32)")
        blocks.append(f"read += {parts.dot(parts.risen(f'q{i}', block), 'S')}")
        if parts.sums:
            blocks.append(f"z = tl.load(sums_ptr + {chunk_sum}, mask={sum_ok}, other=0.0)")
            blocks.append(f"mass += tl.sum({parts.risen(f'q{i}', block)} * z[None, :], axis=1)")
    values = [values_line(parts)]
    if parts.delta:
        values = [
            f"values = tl.load(corrected_ptr + (rows * heads + h)[:, None] * {parts.spec.value_dim} + value_columns[None, :],"
            " mask=row_ok[:, None] & value_ok[None, :], other=0.0).to(tl.float32)"
        ]
    raw = "raw" in parts.spec.flags
    finish = ["mass += tl.sum(score, axis=1)"] if parts.sums else []
    if raw and parts.sums:
        finish.append(f"tl.store(mass_ptr + rows * heads + h, mass, mask={first_only('row_ok', 2)})")
    if not raw:
        finish += window_lines(parts) + combine(parts) + output_lines(parts)
    read, mass = f"tl.zeros([{parts.chunk}, {parts.value_block}], tl.float32)", f"tl.zeros([{parts.chunk}], tl.float32)"
    if parts.reverse:
        read = "tl.load(part_ptr + cells, mask=row_ok[:, None] & value_ok[None, :], other=0.0)"
        mass = "tl.load(part_mass_ptr + rows * heads + h, mask=row_ok, other=0.0)" if parts.sums else mass
    body = fill(
        _OUTPUT, read=read, mass=mass, chunk_lines=chunk_lines(parts), chunk=parts.chunk, value_block=parts.value_block,
        value_dim=parts.spec.value_dim, decays=parts.decays(), weights=parts.weights("q") + parts.weights("k"),
        query=[] if raw else query_lines(parts), blocks=blocks, triangle=parts.triangle("score"), values=values,
        product=parts.dot("score", "values"), finish=finish,
    )  # fmt: skip
    arguments = inputs(parts, "q", "k", *([] if parts.delta and not parts.what.window else ["v"]))
    arguments += [("corrected_ptr", element(parts))] if parts.delta else []
    arguments += [("states_ptr", between(parts))] + ([("sums_ptr", "*fp32")] if parts.sums else [])
    arguments += [("mass_ptr", "*fp32")] if raw and parts.sums else []
    arguments += [] if raw else [*window_arguments(parts), *epilogue_arguments(parts.around.o, element(parts))]
    if parts.reverse:
        arguments += [("part_ptr", "*fp32"), *([("part_mass_ptr", "*fp32")] if parts.sums else [])]
    return (
        "o = (e^G phi(q)) S + tril(phi(q) phi(k)^T e^(G_i - G_j)) values",
        [*arguments, ("o_ptr", "*fp32" if raw else element(parts))],
        body,
    )
