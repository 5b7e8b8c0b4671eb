"""Prints the window softmax branch of a recurrence's output kernel, and the normaliser that ends it."""

from __future__ import annotations

from subquad.codegen.recurrence_parts import Parts, pad
from subquad.codegen.text import Argument, fill

_WINDOW = """
past = tl.load(past_ptr + n)
live = tl.load(live_ptr + n)
place0 = start - tl.load(bounds_ptr + n)
top = tl.full([$chunk], float("-inf"), tl.float32)
near_mass = tl.zeros([$chunk], tl.float32)
near = tl.zeros([$chunk, $value_block], tl.float32)
$sinks
for step in range(0, $chunk + $window, $block):
    place = place0 + step + tl.arange(0, $block)
    joined = tl.load(bounds_ptr + n) + n * $window + place
    place_ok = place < live + $window
    keys = tl.load(k_ptr + (joined * k_heads + k_head)[:, None] * $key_dim + key_columns[None, :],
                   mask=place_ok[:, None] & (key_columns < $key_dim)[None, :], other=0.0).to(tl.float32)
    local_values = tl.load(v_ptr + (joined * v_heads + v_head)[:, None] * $value_dim + value_columns[None, :],
                           mask=place_ok[:, None] & value_ok[None, :], other=0.0).to(tl.float32)
    age = (place0 + local)[:, None] + $window - place[None, :]
    seen = (age >= 0) & (age < $window) & ((past - $window + place >= $sink_count) & place_ok)[None, :]
    pair = $pair * $scale
    top, near_mass, near = absorb(tl.where(seen, pair, float("-inf")), local_values, top, near_mass, near)
gamma = $gamma
"""

_SINKS = """
sink = tl.arange(0, $sink_pad)
sink_cells = n * $sink_count + sink
sink_keys = tl.load(sink_k_ptr + (sink_cells * k_heads + k_head)[:, None] * $key_dim + key_columns[None, :],
                    mask=(sink < $sink_count)[:, None] & (key_columns < $key_dim)[None, :], other=0.0).to(tl.float32)
sink_values = tl.load(sink_v_ptr + (sink_cells * v_heads + v_head)[:, None] * $value_dim + value_columns[None, :],
                      mask=(sink < $sink_count)[:, None] & value_ok[None, :], other=0.0).to(tl.float32)
sink_seen = (sink < $sink_count)[None, :] & (sink[None, :] <= (past + place0 + local)[:, None])
sink_pair = $pair * $scale
top, near_mass, near = absorb(tl.where(sink_seen, sink_pair, float("-inf")), sink_values, top, near_mass, near)
"""

ABSORB = '''

@triton.jit
def absorb(score, values, top, mass, near):
    """One online-softmax step; the final maximum is that of the whole window, which a shared denominator needs."""
    new_top = tl.maximum(top, tl.max(score, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp(top - base)
    weight = tl.exp(score - base[:, None])
    near = near * shrink[:, None] + $product
    return new_top, mass * shrink + tl.sum(weight, axis=1), near
'''


def window_arguments(parts: Parts) -> list[Argument]:
    """Arguments of the window branch: tokens before and live tokens of each sequence, gate, sink slots."""
    if not parts.what.window:
        return []
    kind = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}[parts.spec.dtype]
    found: list[Argument] = [("past_ptr", "*i64"), ("live_ptr", "*i64")]
    found += [("gate_ptr", "*fp32")] if "gate" in parts.spec.flags else []
    return found + ([("sink_k_ptr", kind), ("sink_v_ptr", kind)] if parts.what.sinks else [])


def query_lines(parts: Parts) -> list[str]:
    """Lines that leave the rows of q for the window's products, as operands, so that no row in fp32 is kept beside the
    linear part.
    """
    if not parts.what.window:
        return []
    width = parts.spec.key_dim
    operand = ["query = query.to(tl.bfloat16)"] if parts.spec.dtype == "bfloat16" else []
    return [f"key_columns = tl.arange(0, {pad(width)})", *parts.row("q", 0, width, pad(width), "query"), *operand]


def window_lines(parts: Parts) -> list[str]:
    """Lines that leave the window's near [chunk, V], near_mass [chunk] and gamma."""
    what, spec = parts.what, parts.spec
    if not what.window:
        return []
    constant = "1.0" if what.branch == "shared" else "0.5"
    sizes: dict[str, str | int] = {
        "sink_count": what.sinks, "sink_pad": pad(what.sinks), "key_dim": spec.key_dim, "value_dim": spec.value_dim,
        "scale": repr(what.scale),
    }  # fmt: skip
    sinks = fill(_SINKS, **sizes, pair=parts.dot("query", "tl.trans(sink_keys)")) if what.sinks else []
    return fill(
        _WINDOW, **sizes, chunk=parts.chunk, value_block=parts.value_block, block=32, window=what.window, sinks=sinks,
        pair=parts.dot("query", "tl.trans(keys)"),
        gamma="tl.sigmoid(tl.load(gate_ptr + h))" if "gate" in spec.flags else constant,
    )  # fmt: skip


def absorb_helper(parts: Parts) -> str:
    """The online-softmax step, where there is a window."""
    return ABSORB.replace("$product", parts.dot("weight", "values")) if parts.what.window else ""


def combine(parts: Parts) -> list[str]:
    """Lines that make the output `read` from the linear part (read, mass) and the window."""
    what = parts.what
    if what.window and what.branch == "shared":
        return [
            "mass += gamma * near_mass",
            "read = (gamma * near + read) / tl.where(mass == 0.0, 1.0, mass)[:, None]",
        ]
    if what.normaliser == "sum":
        lines = ["read = read / tl.where(mass == 0.0, 1.0, mass)[:, None]"]
    else:
        lines = [f"read = read * {what.scale!r}"]
        if what.normaliser == "group":
            lines.append(
                f"read = tl.where(value_ok[None, :], read - tl.sum(read, axis=1)[:, None] / {parts.spec.value_dim}, 0.0)"
            )
        if what.normaliser in ("rms", "group"):
            lines.append(
                f"read = read * tl.rsqrt(tl.sum(read * read, axis=1)[:, None] / {parts.spec.value_dim} + 1e-6)"
            )
    if what.window:
        lines.append("near = near / tl.where(near_mass == 0.0, 1.0, near_mass)[:, None]")
        lines.append("read = gamma * near + (1.0 - gamma) * read")
    elif "valid" in parts.spec.flags:
        lines.append("read = tl.where(key_ok[:, None], read, 0.0)")
    return lines
