"""Names one kernel completely: operator, wiring, sizes, blocks and target, with a hash over all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

OPS = ("softmax_attention", "recurrence")
DTYPES = ("float32", "float16", "bfloat16")
FLAGS = (
    "base", "bias", "gate", "grad_bias", "lengths", "live", "pages", "partial", "positions", "q_positions", "raw", "reverse",
    "shared", "sinks", "top", "valid",
)  # fmt: skip
TABLES = ("int8", "int64")


@dataclass(frozen=True)
class KernelSpec:
    """Everything the source of one kernel depends on; no batch and no sequence length, since kernels never specialise
    on them.

    op: the operator. part: which of its kernels ("forward", "states", "grad_keys", ...).
    operator: its SoftmaxSpec or RecurrenceSpec as canonical JSON. dtype: of q, k, v and o. key_dim,
    value_dim: per head. feature_dim: columns of each feature weight (recurrence). flags: optional inputs that are
    present. tables: element types of t0, t1... around: what moves into the kernels from before and behind the operator
    (q/k norms, rotary embedding, output norm and gate), as Surroundings.json(); "" for nothing. block_q, block_kv,
    num_warps, num_stages: the schedule. target: "cuda:90", "hip:gfx942", ... Raises ValueError naming the field at fault.
    """

    op: str
    operator: str
    dtype: str
    key_dim: int
    value_dim: int
    feature_dim: int = 0
    part: str = "forward"
    flags: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    around: str = ""
    block_q: int = 64
    block_kv: int = 64
    num_warps: int = 4
    num_stages: int = 1
    target: str = "cuda:90"

    def __post_init__(self) -> None:
        for name, value, allowed in (("op", self.op, OPS), ("dtype", self.dtype, DTYPES)):
            if value not in allowed:
                raise ValueError(f"KernelSpec.{name} is {value!r}; it must be one of {', '.join(allowed)}.")
        object.__setattr__(self, "flags", tuple(sorted(self.flags)))
        for name, values, members in (("flags", self.flags, FLAGS), ("tables", self.tables, TABLES)):
            if not set(values) <= set(members):
                raise ValueError(f"KernelSpec.{name} is {values!r}; its members must be among {', '.join(members)}.")
        for name, size in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            if size < 1:
                raise ValueError(f"KernelSpec.{name} is {size}; it must be at least 1.")
        for name, size in (("block_q", self.block_q), ("block_kv", self.block_kv)):
            if size < 16 or size & (size - 1):
                raise ValueError(f"KernelSpec.{name} is {size}; it must be a power of two of at least 16.")

    def json(self) -> str:
        """Canonical JSON of every field."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """SHA-256 over every field, in hexadecimal."""
        return hashlib.sha256(self.json().encode()).hexdigest()
