"""Runs generated kernels on tensors: picks the KernelSpec, imports its source, launches, checks itself at first use."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from subquad.codegen import recurrence_template, softmax_template
from subquad.codegen.cache import load, store
from subquad.codegen.schedule import RECURRENCE, SOFTMAX, Schedule, scheduled
from subquad.codegen.source import arguments, emit
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import RecurrenceSpec, SoftmaxSpec, recurrence_reference, softmax_attention_reference
from subquad.kernels.recurrence_layout import arrange, complete
from subquad.kernels.segments import check, join, segments
from subquad.kernels.softmax_torch import finish

TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference from the fp64 reference the self-check accepts, on unit normal inputs."""


def provider(operator: str, given: dict[str, Any]) -> Any:
    """The provider for subquad.kernels: outputs of `operator` by a generated kernel, or None if there is none that has
    proved right.
    """
    q = given["q"]
    if q.device.type != "cuda" or q.dtype not in TOLERANCE or not importlib.util.find_spec("triton"):
        return None
    if operator == "softmax_attention" and any(row.dim() == 3 and row.shape[1] > 1 for row in given["rows"]):
        return None
    if operator == "recurrence":
        plain = given["cu_seqlens"] is None and q.shape[1] > 0
        if not plain or not recurrence_template.admits(RecurrenceSpec.parse(given["spec"])):
            return None
    if not _trusted(operator, q.device.index or 0, q.dtype, given["spec"], _sizes(operator, given)):
        return None
    return softmax_forward(given) if operator == "softmax_attention" else recurrence_forward(given)


def target_of(tensor: Tensor) -> str:
    """The build target of the device a tensor is on; a CPU tensor (Triton's interpreter) counts as cuda:90."""
    if tensor.device.type != "cuda":
        return "cuda:90"
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(tensor.device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return f"cuda:{major}{minor}"


def softmax_forward(given: dict[str, Any], schedule: Schedule = SOFTMAX) -> tuple[Tensor, Tensor]:
    """subquad::softmax_attention by its Triton kernel; segments are joined first. Same arguments by name, same
    results.
    """
    what = SoftmaxSpec.parse(given["spec"])
    q, k, v = given["q"], given["k"], given["v"]
    check(q, k, v, given["rows"], given["lengths"], given["positions"])
    keys = join(k, v, given["rows"], given["lengths"], given["positions"])
    batch, q_len, heads, width = q.shape
    count, kv_heads = keys.k.shape[1], keys.k.shape[2]
    q, key, value = (_last_contiguous(x) for x in (q, keys.k, keys.v))
    o = q.new_empty(batch, q_len, heads, value.shape[3])
    lse = q.new_empty(batch, q_len, heads, dtype=torch.float32)
    values: dict[str, Any] = {"q_ptr": q, "k_ptr": key, "v_ptr": value, "o_ptr": o, "lse_ptr": lse}
    values |= {
        f"{name}_stride_{axis}": x.stride(d)
        for name, x in zip("qkv", (q, key, value), strict=True)
        for d, axis in enumerate("bth")
    }
    values |= {"heads": heads, "group": heads // kv_heads, "q_len": q_len, "kv_len": count}
    flags = []
    if given["bias"] is not None:
        flags.append("bias")
        bias = given["bias"].float().expand(batch, heads, q_len, count)
        values |= {"bias_ptr": bias} | {f"bias_stride_{axis}": bias.stride(d) for d, axis in enumerate("bhqk")}
    if given["sinks"] is not None:
        flags.append("sinks")
        values["sinks_ptr"] = given["sinks"].float().contiguous()
    if given["q_positions"] is not None:
        flags.append("q_positions")
        values |= _table("q_positions", given["q_positions"].contiguous())
    if given["positions"] or given["lengths"]:
        flags.append("positions")
        values |= _table("positions", keys.position[:, 0].expand(batch, -1).contiguous())
    if keys.live is not None:
        flags.append("live")
        values |= _table("live", keys.live[:, 0].to(torch.int8))
    tables = []
    for index, operand in enumerate(given["operands"]):
        kind = torch.int8 if operand.dtype == torch.bool else torch.int64
        tables.append("int8" if operand.dtype == torch.bool else "int64")
        table = torch.atleast_1d(operand.to(kind))
        values[f"t{index}_ptr"] = table
        values |= {f"t{index}_stride{axis}": table.stride(axis) for axis in range(table.dim())}
        values |= {f"t{index}_size{axis}": size for axis, size in enumerate(table.shape)}
    values |= {f"s{index}": number for index, number in enumerate(given["scalars"])}
    spec = KernelSpec(
        "softmax_attention", given["spec"], _dtype(q), width, value.shape[3], flags=tuple(flags), tables=tuple(tables),
        target=target_of(q),
    )  # fmt: skip
    if o.numel():
        _launch(scheduled(spec, schedule), values, (-(-q_len // schedule.block_q), batch * heads))
    parts = segments(k, v, given["rows"], given["lengths"], given["positions"])
    o, lse = finish(o, lse, parts, None, what) if given["sinks"] is None else (o, lse)
    return o.to(q.dtype), lse


def recurrence_forward(given: dict[str, Any], schedule: Schedule = RECURRENCE) -> tuple[Tensor, ...]:
    """subquad::recurrence by its Triton kernel for specs the template admits. Same arguments by name, same results."""
    what = RecurrenceSpec.parse(given["spec"])
    q, v = given["q"], given["v"]
    batch, length, heads, width = q.shape
    layout = arrange(q, given["k"], v, given["valid"], given["window_k"], given["window_v"], given["seen"], what)
    query = layout.q.contiguous()
    out = q.new_empty(batch, length, heads, v.shape[3])
    weights = [*given["feature_q"], *given["feature_k"]]
    hidden = weights[0].shape[-1] if weights else 0
    flags = () if given["state"] is None else ("state",)
    spec = scheduled(
        KernelSpec("recurrence", given["spec"], _dtype(q), width, v.shape[3], hidden, flags, target=target_of(q)),
        schedule,
    )
    final = q.new_empty(batch, heads, sum(recurrence_template.block_widths(spec)), v.shape[3] + 1, dtype=torch.float32)
    live = torch.as_tensor(layout.live, device=q.device).reshape(-1).expand(batch).contiguous()
    values: dict[str, Any] = {
        "q_ptr": query,
        "k_ptr": layout.keys.contiguous(),
        "v_ptr": layout.values.contiguous(),
        "o_ptr": out,
    }
    values |= {"past_ptr": layout.past.expand(batch).contiguous(), "live_ptr": live, "final_ptr": final}
    values["state_ptr"] = final if given["state"] is None else given["state"].contiguous()
    logit = 40.0 if given["window_gate"] is None else given["window_gate"].float()
    values["gate_ptr"] = torch.as_tensor(logit, device=q.device).reshape(-1).expand(heads).contiguous()
    values |= {"sink_k_ptr": layout.sinks_k.contiguous(), "sink_v_ptr": layout.sinks_v.contiguous()}
    for side, side_weights in (("q", given["feature_q"]), ("k", given["feature_k"])):
        values |= {f"w{index}_{side}_ptr": weight.float().contiguous() for index, weight in enumerate(side_weights)}
    kv_heads = layout.keys.shape[2]
    values |= {"heads": heads, "kv_heads": kv_heads, "group": heads // kv_heads, "length": length}
    _launch(spec, values, (-(-v.shape[3] // recurrence_template.VALUE_BLOCK), batch * heads))
    return complete(layout, out, final, what)


def _launch(spec: KernelSpec, values: dict[str, Any], grid: tuple[int, int]) -> None:
    kernel = load(store(emit(spec), spec.op)).kernel
    kernel[grid](*(values[name] for name, _ in arguments(spec)), num_warps=spec.num_warps, num_stages=spec.num_stages)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table(name: str, table: Tensor) -> dict[str, Any]:
    return {f"{name}_ptr": table, f"{name}_stride_b": table.stride(0)}


def _sizes(operator: str, given: dict[str, Any]) -> tuple[int, ...]:
    k, v = (given["k"][0], given["v"][0]) if operator == "softmax_attention" else (given["k"], given["v"])
    hidden = given["feature_q"][0].shape[-1] if operator == "recurrence" and given["feature_q"] else 0
    return (k.shape[3], v.shape[3], hidden)


@functools.lru_cache(maxsize=256)
def _trusted(operator: str, device: int, dtype: torch.dtype, spec: str, sizes: tuple[int, ...]) -> bool:
    """Run the kernel once on small random inputs against the fp64 reference; on disagreement or failure warn and never
    use it.
    """
    try:
        error = self_check(operator, f"cuda:{device}", dtype, spec, sizes)
    except Exception as failure:
        warnings.warn(
            f"The Triton {operator} kernel failed on cuda:{device} ({failure}); the torch form is used.", stacklevel=2
        )
        return False
    if error <= TOLERANCE[dtype]:
        return True
    warnings.warn(
        f"The Triton {operator} kernel differs from the reference by {error:.1e} on cuda:{device} in {dtype}; "
        "the torch form is used.",
        stacklevel=2,
    )
    return False


def self_check(operator: str, device: str, dtype: torch.dtype, spec: str, sizes: tuple[int, ...]) -> float:
    """Largest difference between kernel and fp64 reference on random inputs of these head sizes; NaN counts as
    infinite.
    """
    generator = torch.Generator().manual_seed(0)
    width, value_width, hidden = sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = draw(2, 70, 4, width), draw(2, 70, 2, width), draw(2, 70, 2, value_width)
    if operator == "softmax_attention":
        what = SoftmaxSpec.parse(spec)
        ranks = softmax_template.ranks(what.mask)
        tables = [torch.randint(0, 2, (80,) * rank, generator=generator) for rank in ranks]
        given: dict[str, Any] = {key: [] for key in ("rows", "lengths", "positions")} | {
            "q": q, "k": [k], "v": [v], "q_positions": None, "bias": None, "sinks": None, "operands": tables,
            "scalars": [3] * softmax_template.scalar_count(what.mask), "spec": spec,
        }  # fmt: skip
        wanted, got = softmax_attention_reference(**given)[0], softmax_forward(_to(given, device))[0]
    else:
        weights = recurrence_template.weight_count(RecurrenceSpec.parse(spec))
        names = ("decay", "beta", "window_gate", "valid", "state", "window_k", "window_v", "seen", "cu_seqlens")
        maps = {
            side: [draw(4, width, hidden) * width**-0.5 for _ in range(weights)] for side in ("feature_q", "feature_k")
        }
        given = dict.fromkeys(names) | {"q": q, "k": k, "v": v, "spec": spec} | maps
        wanted, got = recurrence_reference(**given)[0], recurrence_forward(_to(given, device))[0]
    error = (got.cpu().double() - wanted).abs().nan_to_num(torch.inf)
    return float(torch.where(wanted.isnan() & got.cpu().isnan(), 0.0, error).max())


def _to(given: dict[str, Any], device: str) -> dict[str, Any]:
    return {
        name: [item.to(device) if isinstance(item, Tensor) else item for item in value]
        if isinstance(value, list)
        else (value.to(device) if isinstance(value, Tensor) else value)
        for name, value in given.items()
    }
