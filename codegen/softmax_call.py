"""The operator subquad::softmax_attention, forward and backward, by its generated kernels: same arguments, same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.codegen.running import dtype_name, launch, processors, target_of
from subquad.codegen.schedule import Schedule, scheduled, softmax_schedule
from subquad.codegen.surrounded import attention_gradients, only, pointers, surroundings_of, with_only
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import SoftmaxSpec
from subquad.kernels.segments import check, join, segments
from subquad.kernels.softmax_torch import finish
from subquad.kernels.surroundings import finished

Arguments = dict[str, Any]
SPLITS = 32
"""Most parts into which the keys of one segment are cut where there are too few query rows to fill the device."""


def runs(given: Arguments) -> bool:
    """True for the calls of the operator that the kernels compute: one type, at least one row and one key."""
    kinds = {x.dtype for x in (given["q"], *given["k"], *given["v"])}
    return len(kinds) == 1 and given["q"].numel() > 0 and all(x.numel() for x in given["k"])


def base_spec(given: Arguments, part: str = "forward") -> KernelSpec:
    """The spec of a call's kernels, without optional inputs and schedule."""
    q = given["q"]
    return KernelSpec(
        "softmax_attention", given["spec"], dtype_name(q), q.shape[3], given["v"][0].shape[3], part=part,
        tables=tuple("int8" if operand.dtype == torch.bool else "int64" for operand in given["operands"]),
        around=given.get("around", ""), target=target_of(q),
    )  # fmt: skip


def softmax_forward(
    given: Arguments, schedule: Schedule | None = None, parts: int | None = None
) -> tuple[Tensor, Tensor]:
    """(o, lse) of the operator: each segment is read where it lies, its keys in at most `parts` parts (by default enough to
    fill the device), and partial states are merged.
    """
    what = SoftmaxSpec.parse(given["spec"])
    if given["sinks"] is not None or what.empty_rows == "zero":
        o, lse = _states(given, schedule, parts)
    else:
        o, lse = _states(with_only(given, "q", "k"), schedule, parts)
        names = ("k", "v", "rows", "lengths", "positions")
        o, lse = finish(o, lse, segments(*(given[name] for name in names)), None, what)
        o = finished(o, surroundings_of(given).o, given.get("surroundings", {}))
    return o.to(given["q"].dtype), lse


def softmax_state(given: Arguments, schedule: Schedule | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse) of one dense segment with, for each row, the sum of its weights beside a largest of 1 (0 without keys) and
    the slot of the first largest (-1 without keys), [B, T, H] in fp32 and int32.
    """
    q = given["q"]
    mass = q.new_empty(q.shape[:3], dtype=torch.float32)
    slot = torch.empty_like(mass, dtype=torch.int32)
    o, lse = _states(given, schedule, 1, {"mass_ptr": mass, "slot_ptr": slot})
    return o, lse, mass, slot


def _states(
    given: Arguments, schedule: Schedule | None, most: int | None, largest: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    q, k, v, rows, lengths, positions = (given[name] for name in ("q", "k", "v", "rows", "lengths", "positions"))
    check(q, k, v, rows, lengths, positions)
    batch, q_len, heads, _ = q.shape
    kv_heads, value_dim = k[0].shape[2], v[0].shape[3]
    flags, shared_values = _common(given)
    base = base_spec(given)
    counts = [part.count for part in segments(k, v, rows, lengths, positions)]
    plans = []
    for s, count in enumerate(counts):
        own, values = _segment(given, s, counts)
        if largest is not None:
            own, values = (*own, "top"), values | largest
        spec = dataclasses.replace(base, flags=(*flags, *own))
        chosen = schedule or softmax_schedule(spec, q_len * heads // kv_heads)
        packs, members = (values["packs"], batch) if "shared" in own else (batch, 1)
        tiles = -(-q_len * (heads // kv_heads) * members // chosen.chunk)
        splits = min(most or SPLITS, -(-count // chosen.block))
        if most is None:
            splits = _splits(tiles * kv_heads * packs, count, chosen.block, q)
        plans.append((spec, values, chosen, (tiles, kv_heads * packs, splits), count))
    parts = sum(grid[2] for *_, grid, _ in plans)
    partial = parts > 1
    o = q.new_empty(batch, q_len, heads, value_dim)
    lse = q.new_empty(batch, q_len, heads, dtype=torch.float32)
    some = (
        (q.new_empty(parts, *o.shape, dtype=torch.float32), lse.new_empty(parts, *lse.shape)) if partial else (o, lse)
    )
    done = 0
    for spec, values, chosen, grid, count in plans:
        kept = tuple(flag for flag in spec.flags if not (partial and flag == "sinks"))
        around = only(spec.around, "q", "k") if partial else spec.around
        flags = (*kept, *(("partial",) if partial else ()))
        named = scheduled(dataclasses.replace(spec, flags=flags, around=around), chosen)
        blocks = -(-count // chosen.block)
        each = -(-blocks // grid[2]) * chosen.block
        launch(
            named,
            shared_values | values | {"o_ptr": some[0], "lse_ptr": some[1], "part0": done, "keys_per_part": each},
            grid,
        )
        done += grid[2]
    if partial:
        sinks = ("sinks",) if given["sinks"] is not None else ()
        spec = dataclasses.replace(base, part="merge", flags=sinks, around=only(base.around, "o"))
        values = shared_values | {"partial_ptr": some[0], "partial_lse_ptr": some[1], "o_ptr": o, "lse_ptr": lse}
        launch(spec, values | {"parts": parts, "cells": lse.numel()}, (lse.numel(),))
    return o, lse


def softmax_backward(
    given: Arguments, grad_o: Tensor, grad_lse: Tensor, o: Tensor, lse: Tensor, bias_too: bool = True,
    schedule: Schedule | None = None, largest: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Gradients [q, *k, *v, bias with four dimensions if bias_too, sinks if given] from the outputs o and lse; the segments
    are joined for it; then those of the tensors of its surroundings. `largest`: the slot of each row's largest score and
    that score's own gradient, as `softmax_state` gives the first.
    """
    if not surroundings_of(given).empty:

        def inner(call: Arguments, out: Tensor, grad: Tensor) -> list[Tensor]:
            return softmax_backward(call, grad, grad_lse, out, lse, bias_too, schedule)

        return attention_gradients(given, grad_o, lambda call: softmax_forward(call, schedule), o, inner)
    what = SoftmaxSpec.parse(given["spec"])
    q, k, v, rows = given["q"], given["k"], given["v"], given["rows"]
    keys = join(k, v, rows, given["lengths"], given["positions"])
    batch, q_len, heads, width = q.shape
    count, kv_heads, value_dim = keys.k.shape[1], keys.k.shape[2], keys.v.shape[3]
    empty = lse == -torch.inf
    delta = (grad_o.float() * o.float().masked_fill(empty[..., None], 0.0)).sum(-1)
    if grad_lse.numel():
        delta = delta - grad_lse.float().masked_fill(empty, 0.0)
    flags, values = _common(given)
    key, value = _last_contiguous(keys.k), _last_contiguous(keys.v)
    values |= {
        "k_ptr": key,
        "v_ptr": value,
        "do_ptr": grad_o.to(q.dtype).contiguous(),
        "lse_ptr": lse,
        "delta_ptr": delta,
    }
    values |= _strides("k", key) | _strides("v", value) | {"kv_len": count}
    if given["positions"] or given["lengths"] or rows:
        flags = (*flags, "positions")
        values |= _per_head("positions", keys.position, batch, kv_heads)
    if keys.live is not None:
        flags = (*flags, "live")
        values |= _per_head("live", keys.live.to(torch.int8), batch, kv_heads)
    flags = tuple(flag for flag in flags if flag != "sinks")
    if largest is not None:
        flags = (*flags, "top")
        values |= {"slot_ptr": largest[0], "dtop_ptr": largest[1].contiguous()}
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    dk = dq.new_empty(batch, count, kv_heads, width)
    dv = dq.new_empty(batch, count, kv_heads, value_dim)
    values |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv}
    bias = given["bias"]
    dbias = None
    if bias is not None:
        bias = bias[(None,) * (4 - bias.dim())]
        dbias = torch.zeros(bias.shape, dtype=torch.float32, device=q.device)
        values["dbias_ptr"] = dbias
        flags = (*flags, "grad_bias") if bias_too else flags
        values |= {f"bias_stride_{axis}": 0 if bias.shape[d] == 1 else dbias.stride(d) for d, axis in enumerate("bhqk")}
        values["bias_ptr"] = bias.float().contiguous()
    spec = dataclasses.replace(base_spec(given), flags=flags)
    for part in ("grad_queries", "grad_keys"):
        chosen = schedule or softmax_schedule(dataclasses.replace(spec, part=part), q_len)
        values["q_blocks"] = -(-q_len // chosen.chunk)
        named = scheduled(dataclasses.replace(spec, part=part), chosen)
        grid = (
            (values["q_blocks"], batch * heads)
            if part == "grad_queries"
            else (-(-count // chosen.block), batch * kv_heads)
        )
        launch(named, values, grid)
    if what.empty_rows == "mean" and given["sinks"] is None:
        dv = dv + _mean_gradient(grad_o, empty, keys.live, dv)
    grads = [dq.to(q.dtype), *_stored(dk, k, rows), *_stored(dv, v, rows)]
    if bias is not None and dbias is not None and bias_too:
        grads.append(dbias.to(bias.dtype))
    if given["sinks"] is not None:
        weight = torch.exp(given["sinks"].float() - lse)
        grads.append((-weight * delta).sum((0, 1)).to(given["sinks"].dtype))
    return grads


def _stored(joined: Tensor, like: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """Gradients [B, N, Hkv, *] of joined segments as those of the stored ones; rows read several times get the sum."""
    parts = torch.split(joined, [segment.shape[1] for segment in like], 1)
    if not rows:
        return [part.to(segment.dtype) for part, segment in zip(parts, like, strict=True)]
    return [
        part.new_zeros(segment.shape).index_add_(0, row, part).to(segment.dtype)
        for part, segment, row in zip(parts, like, rows, strict=True)
    ]


def _mean_gradient(grad_o: Tensor, empty: Tensor, live: Tensor | None, like: Tensor) -> Tensor:
    """What rows without a visible key, whose output is the mean of the live values, give to dv [B, N, Hkv, V]."""
    shared = (grad_o.float() * empty[..., None]).sum(1).unflatten(1, (like.shape[2], -1)).sum(2)
    if live is None:
        return (shared / like.shape[1])[:, None].expand_as(like)
    there = live.float().expand(like.shape[0], like.shape[2], -1)
    return (shared[:, :, None] * (there / there.sum(-1, keepdim=True).clamp_min(1))[..., None]).transpose(1, 2)


def _common(given: Arguments) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(flags, values) that all kernels of a call share."""
    q, kv_heads = _last_contiguous(given["q"]), given["k"][0].shape[2]
    batch, q_len, heads = q.shape[:3]
    values: dict[str, Any] = {"q_ptr": q} | _strides("q", q)
    values |= {"batch": batch, "heads": heads, "kv_heads": kv_heads, "group": heads // kv_heads, "q_len": q_len}
    values |= pointers(given)
    flags = []
    if given["bias"] is not None:
        flags.append("bias")
        bias = given["bias"].float()
        bias = bias[(None,) * (4 - bias.dim())]
        values["bias_ptr"] = bias
        values |= {f"bias_stride_{axis}": 0 if bias.shape[d] == 1 else bias.stride(d) for d, axis in enumerate("bhqk")}
    if given["sinks"] is not None:
        flags.append("sinks")
        values["sinks_ptr"] = given["sinks"].float().contiguous()
    if given["q_positions"] is not None:
        flags.append("q_positions")
        places = given["q_positions"].to(torch.int64).contiguous()
        values |= {"q_positions_ptr": places, "q_positions_stride_b": places.stride(0) if places.shape[0] > 1 else 0}
    for index, operand in enumerate(given["operands"]):
        table = torch.atleast_1d(operand.to(torch.int8 if operand.dtype == torch.bool else torch.int64))
        values[f"t{index}_ptr"] = table
        values |= {f"t{index}_stride{axis}": table.stride(axis) for axis in range(table.dim())}
        values |= {f"t{index}_size{axis}": size for axis, size in enumerate(table.shape)}
    values |= {f"s{index}": number for index, number in enumerate(given["scalars"])}
    return tuple(flags), values


def _segment(given: Arguments, s: int, counts: list[int]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(flags, values) of one segment."""
    k, v = _last_contiguous(given["k"][s]), _last_contiguous(given["v"][s])
    values: dict[str, Any] = {"k_ptr": k, "v_ptr": v, "kv_len": counts[s], "slot0": sum(counts[:s])}
    values |= _strides("k", k) | _strides("v", v)
    flags = []
    row = given["rows"][s] if given["rows"] else None
    if row is not None and row.dim() == 3:
        flags.append("pages")
        row = row.contiguous()
        values |= {"pages_ptr": row, "page_size": k.shape[1], "pages_stride_b": row.stride(0)}
        values["pages_stride_h"] = row.stride(1) if row.shape[1] > 1 else 0
    elif row is not None:
        flags.append("shared")
        packs = torch.searchsorted(row.sort().values, torch.arange(k.shape[0] + 1, device=row.device))
        values |= {"members_ptr": row.argsort(stable=True), "packs_ptr": packs, "packs": k.shape[0]}
    if given["lengths"]:
        flags.append("lengths")
        values["lengths_ptr"] = given["lengths"][s].to(torch.int64).contiguous()
    if given["positions"]:
        flags.append("positions")
        place = given["positions"][s].contiguous()
        values |= {"positions_ptr": place, "positions_stride_b": place.stride(0)}
    elif given["lengths"] and s:
        flags.append("base")
        values["base_ptr"] = torch.stack(list(given["lengths"][:s])).sum(0).to(torch.int64)
    return tuple(flags), values


def _splits(programs: int, count: int, block: int, q: Tensor) -> int:
    """Parts of the keys: enough that the device has two programs per processor, each with four blocks of keys or more."""
    wanted = -(-2 * processors(q) // max(programs, 1))
    return max(1, min(wanted, SPLITS, count // (4 * block)))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": x.stride(d) for d, axis in enumerate("bth")}


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _per_head(name: str, table: Tensor, batch: int, kv_heads: int) -> dict[str, Any]:
    """A table [1 or B, 1 or Hkv, N] with its strides."""
    table = table.expand(batch, kv_heads, -1)
    table = table if table.stride(-1) == 1 else table.contiguous()
    return {f"{name}_ptr": table, f"{name}_stride_b": table.stride(0), f"{name}_stride_h": table.stride(1)}
