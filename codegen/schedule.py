"""The schedule of each operator's kernel, the same for kernels launched at run time and kernels built ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from subquad.ir.kernel_spec import KernelSpec


@dataclass(frozen=True)
class Schedule:
    """Query rows (of a recurrence: the chunk) and keys in a block, and warps of a program."""

    block_q: int
    block_kv: int
    num_warps: int


SOFTMAX = Schedule(64, 64, 4)
RECURRENCE = Schedule(32, 32, 8)
_BY_OPERATOR = {"softmax_attention": SOFTMAX, "recurrence": RECURRENCE}


def scheduled(spec: KernelSpec, schedule: Schedule | None = None) -> KernelSpec:
    """The spec under a schedule, by default its operator's own; raises ValueError for blocks that no kernel can have."""
    chosen = schedule or _BY_OPERATOR[spec.op]
    return replace(spec, block_q=chosen.block_q, block_kv=chosen.block_kv, num_warps=chosen.num_warps)
