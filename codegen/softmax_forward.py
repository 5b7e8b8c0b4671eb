"""Writes the forward kernels of softmax attention: partial states over one segment, and their merge."""

from __future__ import annotations

from subquad.codegen.loading import epilogue_arguments, epilogue_lines, prologue_arguments
from subquad.codegen.softmax_parts import LOG2E, SoftmaxParts
from subquad.codegen.text import STRIDE, Argument, fill

_PARTIAL = """
part = tl.program_id(2)
kv_head = tl.program_id(1) % kv_heads
$pack
row = tl.program_id(0) * $block_q + tl.arange(0, $block_q)
row_ok = row < count
row = tl.minimum(row, count - 1)
$member
t = (row // group) % q_len
h = kv_head * group + row % group
value_columns = tl.arange(0, $value_pad)
$q_index
q_lo = tl.min(q_index, axis=0)
q_hi = tl.max(q_index, axis=0)
i_lo = tl.min(t, axis=0)
i_hi = tl.max(t, axis=0)
$live_rows
$query
top = tl.full([$block_q], float("-inf"), tl.float32)
total = tl.zeros([$block_q], tl.float32)
mixed = tl.zeros([$block_q, $value_pad], tl.float32)
$top_slot
first = part * keys_per_part
for begin in range(first, tl.minimum(first + keys_per_part, kv_len), $block_kv):
    slots = begin + tl.arange(0, $block_kv)
    slot_ok = slots < kv_len
    slots = tl.minimum(slots, kv_len - 1)
    $place
    $kv_index
    j_lo = slot0 + begin
    j_hi = slot0 + tl.minimum(begin + $block_kv, kv_len) - 1
    if $maybe:
        $keys
        score = $pair
        $modify
        seen = row_ok[:, None] & slot_ok[None, :]
        $live
        $restrict
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weight = tl.exp2(score - base[:, None])
        values = tl.load(v_ptr + (place_v + kv_head * v_stride_h)[:, None] + value_columns[None, :],
                         mask=slot_ok[:, None] & (value_columns < $value_dim)[None, :], other=0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        mixed = mixed * shrink[:, None] + $product
        $track
        top = new_top
$sink
empty = total == 0.0
safe = tl.where(empty, 1.0, total)
lse = tl.where(empty, float("-inf"), (top + tl.log2(safe)) * $ln2)
cell = (((part0 + part).to(tl.int64) * batch + b) * q_len + t) * heads + h
place_o = cell[:, None] * $value_dim + value_columns[None, :]
ok_o = row_ok[:, None] & (value_columns < $value_dim)[None, :]
found = mixed / safe[:, None]
$finish
tl.store(o_ptr + place_o, found, mask=ok_o)
tl.store(lse_ptr + cell, lse, mask=row_ok)
$keep
"""

_SHARED_PACK = """
pack = tl.program_id(1) // kv_heads
member0 = tl.load(packs_ptr + pack)
count = (tl.load(packs_ptr + pack + 1) - member0).to(tl.int32) * q_len * group
if count == 0:
    return
"""

_SINK = """
sink = tl.load(sinks_ptr + h) * $log2e
with_sink = tl.maximum(top, sink)
total = total * tl.exp2(top - with_sink) + tl.exp2(sink - with_sink)
mixed = mixed * tl.exp2(top - with_sink)[:, None]
top = with_sink
"""


def forward(parts: SoftmaxParts) -> tuple[str, list[Argument], list[str]]:
    """The state of each query row over one segment (or one part of its keys); the query heads of a KV group, and the
    batch rows that read the same segment row ("shared"), are rows of one tile, so that its keys are read once.
    """
    spec, shared, paged = parts.spec, parts.has("shared"), parts.has("pages")
    if shared:
        pack = fill(_SHARED_PACK)
        member = ["b = tl.load(members_ptr + member0 + row // (group * q_len))"]
        segment = "pack"
    else:
        pack = ["b = (tl.program_id(1) // kv_heads).to(tl.int64)", "count = q_len * group"]
        member = []
        segment = "b"
    column = "[:, None]" if shared else ""
    if paged:
        stored = "page * page_size + slots % page_size"
        place = [
            "page = tl.load(pages_ptr + b * pages_stride_b + kv_head * pages_stride_h + slots // page_size)",
            "slot_ok = slot_ok & (page >= 0)",
            "page = tl.maximum(page, 0)",
            "place_k = page * k_stride_b + (slots % page_size) * k_stride_t",
            "place_v = page * v_stride_b + (slots % page_size) * v_stride_t",
        ]
    else:
        stored = f"{segment} * positions_stride_b + slots"
        place = [
            f"place_k = {segment}.to(tl.int64) * k_stride_b + slots * k_stride_t",
            f"place_v = {segment}.to(tl.int64) * v_stride_b + slots * v_stride_t",
        ]
    ragged = parts.has("base") and shared
    if parts.has("positions"):
        index = [f"kv_index = tl.load(positions_ptr + {stored})"]
    elif parts.has("base"):
        index = [f"kv_index = base_of{column} + slots{'[None, :]' if shared else ''}"]
    else:
        index = ["kv_index = slot0 + slots"]
    index += ["kv_lo, kv_hi = tl.min(kv_index), tl.max(kv_index)"]
    names = {
        "b": f"b{column}", "h": "h[:, None]", "q": "q_index[:, None]", "i": "t[:, None]", "j": "(slot0 + slots)[None, :]",
        "kv": "kv_index" if ragged else "kv_index[None, :]",
    }  # fmt: skip
    vectors = frozenset({"h", "b"} if shared else {"h"})
    maybe, always = parts.tests(vectors, {})
    live_rows = ["length = tl.load(lengths_ptr + b)"] if parts.has("lengths") else []
    live_rows += ["base_of = tl.load(base_ptr + b)"] if parts.has("base") else []
    bias_row = "(b * bias_stride_b + h * bias_stride_h + t * bias_stride_q)[:, None]"
    bias_place = f"{bias_row} + ((slot0 + slots) * bias_stride_k)[None, :]"
    query = parts.rows("q", "query", "b * q_stride_b + t * q_stride_t + h * q_stride_h", "row_ok", "b", "t")
    keys = parts.rows("k", "keys", "place_k + kv_head * k_stride_h", "slot_ok", segment, "slots", down=True)
    around = parts.around
    if not around.k.empty and (shared or paged):
        raise ValueError(
            f"KernelSpec.around has {around.k.words('k')}, but keys in pages or shared rows are stored finished."
        )
    finish = epilogue_lines(around.o, "found", "place_o", "ok_o", spec.value_dim, "value_columns")
    q_rows = "q_index = tl.load(q_positions_ptr + b * q_positions_stride_b + t)"
    body = fill(
        _PARTIAL, query=query, keys=keys, finish=finish, pack=pack, member=member, block_q=spec.block_q,
        block_kv=spec.block_kv,
        value_dim=spec.value_dim, value_pad=parts.value_pad,
        q_index=q_rows if parts.has("q_positions") else "q_index = t", live_rows=live_rows, place=place, kv_index=index,
        maybe=maybe, pair=parts.dot("query", "keys"),
        modify=[*parts.modified(), *parts.biased(bias_place, "row_ok[:, None] & slot_ok[None, :]")],
        live=[f"seen &= (slots[None, :] < length{column})"] if parts.has("lengths") else [],
        restrict=parts.restricted(always, names), product=parts.dot("weight.to(values.dtype)", "values"),
        sink=fill(_SINK, log2e=LOG2E) if parts.has("sinks") else [], ln2=repr(1 / LOG2E),
        top_slot=[f"top_slot = tl.full([{spec.block_q}], -1, tl.int32)"] if parts.has("top") else [],
        track=["top_slot = tl.where(new_top > top, begin + tl.argmax(score, axis=1), top_slot)"] if parts.has("top") else [],
        keep=[f"tl.store({name}_ptr + cell, {value}, mask=row_ok)" for name, value in (("mass", "total"), ("slot", "top_slot"))]
        if parts.has("top") else [],
    )  # fmt: skip
    kind = parts.element
    strides = [(f"{name}_stride_{axis}", STRIDE) for name in "qkv" for axis in "bth"]
    arguments: list[Argument] = [("q_ptr", kind), ("k_ptr", kind), ("v_ptr", kind)]
    arguments += [("o_ptr", "*fp32" if parts.has("partial") else kind), ("lse_ptr", "*fp32"), *strides]
    arguments += [
        (name, "i32") for name in ("batch", "heads", "kv_heads", "group", "q_len", "kv_len", "keys_per_part", "part0")
    ]
    arguments += [("slot0", "i64")]
    arguments += [("mass_ptr", "*fp32"), ("slot_ptr", "*i32")] if parts.has("top") else []
    arguments += [("packs_ptr", "*i64"), ("members_ptr", "*i64")] if shared else []
    arguments += (
        [("pages_ptr", "*i64"), ("pages_stride_b", "i64"), ("pages_stride_h", "i64"), ("page_size", "i32")]
        if paged
        else []
    )
    arguments += [("lengths_ptr", "*i64")] if parts.has("lengths") else []
    arguments += [("base_ptr", "*i64")] if parts.has("base") else []
    arguments += [("positions_ptr", "*i64"), ("positions_stride_b", "i64")] if parts.has("positions") else []
    arguments += [("q_positions_ptr", "*i64"), ("q_positions_stride_b", "i64")] if parts.has("q_positions") else []
    if parts.has("bias"):
        arguments += [("bias_ptr", "*fp32"), *((f"bias_stride_{axis}", "i64") for axis in "bhqk")]
    arguments += [("sinks_ptr", "*fp32")] if parts.has("sinks") else []
    arguments += [*prologue_arguments(around.q, "q"), *prologue_arguments(around.k, "k")]
    arguments += epilogue_arguments(around.o, kind)
    return (
        "o = softmax(scores) v over the visible keys of one segment, lse natural; a row without keys gives (0, -inf)",
        [*arguments, *parts.arguments()],
        body,
    )


_MERGE = """
cell = tl.program_id(0).to(tl.int64)
value_columns = tl.arange(0, $value_pad)
top = tl.full([], float("-inf"), tl.float32)
total = tl.zeros([], tl.float32)
mixed = tl.zeros([$value_pad], tl.float32)
for part in range(0, parts):
    lse = tl.load(partial_lse_ptr + part * cells + cell)
    new_top = tl.maximum(top, lse)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink, weight = tl.exp(top - base), tl.exp(lse - base)
    values = tl.load(partial_ptr + (part * cells + cell) * $value_dim + value_columns, mask=value_columns < $value_dim, other=0.0)
    mixed = mixed * shrink + weight * values
    total = total * shrink + weight
    top = new_top
$sink
empty = total == 0.0
safe = tl.where(empty, 1.0, total)
place_o = cell * $value_dim + value_columns
found = mixed / safe
$finish
tl.store(o_ptr + place_o, found, mask=value_columns < $value_dim)
tl.store(lse_ptr + cell, tl.where(empty, float("-inf"), top + tl.log(safe)))
"""

_MERGE_SINK = """
sink = tl.load(sinks_ptr + cell % heads)
with_sink = tl.maximum(top, sink)
total = total * tl.exp(top - with_sink) + tl.exp(sink - with_sink)
mixed = mixed * tl.exp(top - with_sink)
top = with_sink
"""


def merge(parts: SoftmaxParts) -> tuple[str, list[Argument], list[str]]:
    """The state over all parts of the keys, each with its own output and log-sum-exp; the sink enters here."""
    width = parts.spec.value_dim
    body = fill(
        _MERGE,
        value_pad=parts.value_pad,
        value_dim=parts.spec.value_dim,
        sink=fill(_MERGE_SINK) if parts.has("sinks") else [],
        finish=epilogue_lines(
            parts.around.o, "found", "place_o", f"value_columns < {width}", width, "value_columns", axis=0
        ),
    )
    arguments: list[Argument] = [("partial_ptr", "*fp32"), ("partial_lse_ptr", "*fp32"), ("o_ptr", parts.element)]
    arguments += [("lse_ptr", "*fp32"), ("parts", "i32"), ("cells", "i64"), ("heads", "i32")]
    arguments += [("sinks_ptr", "*fp32")] if parts.has("sinks") else []
    arguments += epilogue_arguments(parts.around.o, parts.element)
    return (
        "(o, lse) of the union of disjoint key sets from the (o, lse) of each; two empty sets give (0, -inf)",
        arguments,
        body,
    )
