"""Writes the backward kernels of softmax attention: dq and the bias by query blocks, dk and dv by key blocks."""

from __future__ import annotations

from subquad.codegen.softmax_parts import LOG2E, SoftmaxParts
from subquad.codegen.text import STRIDE, Argument, fill

_INDEX = """
$q_index
q_lo, q_hi = tl.min(q_index), tl.max(q_index)
i_lo, i_hi = tl.min(rows), tl.max(rows)
"""
_SLOTS = """
$kv_index
kv_lo, kv_hi = tl.min(kv_index), tl.max(kv_index)
j_lo, j_hi = tl.min(slots), tl.max(slots)
"""
_WEIGHTS = """
score = $pair
$modify
seen = row_ok[:, None] & slot_ok[None, :]
$live
$restrict
weight = tl.exp2(tl.where(seen, score - lse[:, None], float("-inf")))
dweight = $dweight
dscore = weight * (dweight - delta[:, None])
$top
$bias
$slope
"""
_ROW_TILES = """
query = tl.load(q_ptr + (b * q_stride_b + rows * q_stride_t + h * q_stride_h)[:, None] + key_columns[None, :],
                mask=row_ok[:, None] & (key_columns < $key_dim)[None, :], other=0.0)
cell = (b * q_len + rows) * heads + h
grad = tl.load(do_ptr + cell[:, None] * $value_dim + value_columns[None, :],
               mask=row_ok[:, None] & (value_columns < $value_dim)[None, :], other=0.0)
lse = tl.load(lse_ptr + cell, mask=row_ok, other=0.0) * $log2e
lse = tl.where(lse == float("-inf"), 0.0, lse)
delta = tl.load(delta_ptr + cell, mask=row_ok, other=0.0)
$largest
"""
_KEY_TILES = """
keys = tl.load(k_ptr + (b * k_stride_b + slots * k_stride_t + kv_head * k_stride_h)[:, None] + key_columns[None, :],
               mask=slot_ok[:, None] & (key_columns < $key_dim)[None, :], other=0.0)
values = tl.load(v_ptr + (b * v_stride_b + slots * v_stride_t + kv_head * v_stride_h)[:, None] + value_columns[None, :],
                 mask=slot_ok[:, None] & (value_columns < $value_dim)[None, :], other=0.0)
"""

_QUERIES = """
b = (tl.program_id(1) // heads).to(tl.int64)
h = tl.program_id(1) % heads
kv_head = h // group
key_columns = tl.arange(0, $key_pad)
value_columns = tl.arange(0, $value_pad)
rows = tl.program_id(0) * $block_q + tl.arange(0, $block_q)
row_ok = rows < q_len
rows = tl.minimum(rows, q_len - 1)
$index
$row_tiles
dq = tl.zeros([$block_q, $key_pad], tl.float32)
for begin in range(0, kv_len, $block_kv):
    slots = begin + tl.arange(0, $block_kv)
    slot_ok = slots < kv_len
    slots = tl.minimum(slots, kv_len - 1)
    $slots
    if $maybe:
        $key_tiles
        $weights
        dq += $product
tl.store(dq_ptr + cell[:, None] * $key_dim + key_columns[None, :], dq * $scale,
         mask=row_ok[:, None] & (key_columns < $key_dim)[None, :])
"""

_KEYS = """
b = (tl.program_id(1) // kv_heads).to(tl.int64)
kv_head = tl.program_id(1) % kv_heads
key_columns = tl.arange(0, $key_pad)
value_columns = tl.arange(0, $value_pad)
slots = tl.program_id(0) * $block_kv + tl.arange(0, $block_kv)
slot_ok = slots < kv_len
slots = tl.minimum(slots, kv_len - 1)
$slots
$key_tiles
dk = tl.zeros([$block_kv, $key_pad], tl.float32)
dv = tl.zeros([$block_kv, $value_pad], tl.float32)
for step in range(0, group * q_blocks):
    h = kv_head * group + step // q_blocks
    rows = (step % q_blocks) * $block_q + tl.arange(0, $block_q)
    row_ok = rows < q_len
    rows = tl.minimum(rows, q_len - 1)
    $index
    if $maybe:
        $row_tiles
        $weights
        dv += $dv
        dk += $dk
place = (b * kv_len + slots) * kv_heads + kv_head
tl.store(dk_ptr + place[:, None] * $key_dim + key_columns[None, :], dk * $scale,
         mask=slot_ok[:, None] & (key_columns < $key_dim)[None, :])
tl.store(dv_ptr + place[:, None] * $value_dim + value_columns[None, :], dv,
         mask=slot_ok[:, None] & (value_columns < $value_dim)[None, :])
"""


def grad_queries(parts: SoftmaxParts) -> tuple[str, list[Argument], list[str]]:
    """dq of a block of query rows, and what it adds to the gradient of the bias."""
    bias = []
    if parts.has("grad_bias"):
        place = (
            "(b * bias_stride_b + h * bias_stride_h + rows * bias_stride_q)[:, None] + (slots * bias_stride_k)[None, :]"
        )
        bias = [f"tl.atomic_add(dbias_ptr + {place}, dscore, mask=seen)"]
    body = fill(_QUERIES, **_holes(parts, bias), product=parts.dot("dscore.to(keys.dtype)", "keys"))
    arguments = [*_arguments(parts), ("dq_ptr", "*fp32")] + ([("dbias_ptr", "*fp32")] if parts.has("grad_bias") else [])
    return "dq = scale dscore k, dscore = p (do v^T - delta), p = exp(score - lse)", arguments, body


def grad_keys(parts: SoftmaxParts) -> tuple[str, list[Argument], list[str]]:
    """dk and dv of a block of keys, over all query rows and the heads of the KV group."""
    body = fill(
        _KEYS, **_holes(parts, []), dv=parts.dot("tl.trans(weight.to(grad.dtype))", "grad"),
        dk=parts.dot("tl.trans(dscore.to(query.dtype))", "query"),
    )  # fmt: skip
    arguments = [*_arguments(parts), ("q_blocks", "i32"), ("dk_ptr", "*fp32"), ("dv_ptr", "*fp32")]
    return "dv = p^T do, dk = scale dscore^T q, dscore = p (do v^T - delta), p = exp(score - lse)", arguments, body


def _holes(parts: SoftmaxParts, bias: list[str]) -> dict[str, str | int | list[str]]:
    spec = parts.spec
    names = {"q": "q_index[:, None]", "i": "rows[:, None]", "j": "slots[None, :]", "kv": "kv_index[None, :]"}
    maybe, always = parts.tests(frozenset(), {})
    q_rows = "q_index = tl.load(q_positions_ptr + b * q_positions_stride_b + rows)"
    index = fill(_INDEX, q_index=q_rows if parts.has("q_positions") else "q_index = rows")
    kv = "kv_index = tl.load(positions_ptr + b * positions_stride_b + kv_head * positions_stride_h + slots)"
    slots = fill(_SLOTS, kv_index=kv if parts.has("positions") else "kv_index = slots")
    live = "tl.load(live_ptr + b * live_stride_b + kv_head * live_stride_h + slots)"
    place = "(b * bias_stride_b + h * bias_stride_h + rows * bias_stride_q)[:, None] + (slots * bias_stride_k)[None, :]"
    modify = [*parts.modified(slope=True), *parts.biased(place, "row_ok[:, None] & slot_ok[None, :]")]
    sizes: dict[str, str | int | list[str]] = {
        "key_dim": spec.key_dim, "value_dim": spec.value_dim, "log2e": repr(LOG2E), "scale": repr(parts.what.scale),
    }  # fmt: skip
    largest = [
        "top_slot = tl.load(slot_ptr + cell, mask=row_ok, other=-1)",
        "dtop = tl.load(dtop_ptr + cell, mask=row_ok, other=0.0)",
    ]
    rows = fill(_ROW_TILES, **sizes, largest=largest if parts.has("top") else [])
    weights = fill(
        _WEIGHTS, pair=parts.dot("query", "tl.trans(keys)"), modify=modify,
        live=[f"seen &= ({live} != 0)[None, :]"] if parts.has("live") else [], restrict=parts.restricted(always, names),
        dweight=parts.dot("grad", "tl.trans(values)"), bias=bias,
        top=["dscore += tl.where(seen & (slots[None, :] == top_slot[:, None]), dtop[:, None], 0.0)"]
        if parts.has("top") else [],
        slope=[] if parts.what.softcap is None else ["dscore = dscore * slope"],
    )  # fmt: skip
    return sizes | {
        "block_q": spec.block_q, "block_kv": spec.block_kv, "key_pad": parts.key_pad, "value_pad": parts.value_pad,
        "index": index, "slots": slots, "maybe": maybe, "row_tiles": rows,
        "key_tiles": fill(_KEY_TILES, **sizes), "weights": weights,
    }  # fmt: skip


def _arguments(parts: SoftmaxParts) -> list[Argument]:
    kind = parts.element
    found: list[Argument] = [("q_ptr", kind), ("k_ptr", kind), ("v_ptr", kind), ("do_ptr", kind)]
    found += [("lse_ptr", "*fp32"), ("delta_ptr", "*fp32")]
    found += [(f"{name}_stride_{axis}", STRIDE) for name in "qkv" for axis in "bth"]
    found += [(name, "i32") for name in ("heads", "kv_heads", "group", "q_len", "kv_len")]
    found += [("q_positions_ptr", "*i64"), ("q_positions_stride_b", "i64")] if parts.has("q_positions") else []
    for flag, kind in (("positions", "*i64"), ("live", "*i8")):
        if parts.has(flag):
            found += [(f"{flag}_ptr", kind), (f"{flag}_stride_b", "i64"), (f"{flag}_stride_h", "i64")]
    if parts.has("bias"):
        found += [("bias_ptr", "*fp32"), *((f"bias_stride_{axis}", "i64") for axis in "bhqk")]
    found += [("slot_ptr", "*i32"), ("dtop_ptr", "*fp32")] if parts.has("top") else []
    return [*found, *parts.arguments()]
