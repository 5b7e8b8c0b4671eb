"""The schedules of the kernels: a model of registers, bytes and operations proposes, a measurement on the device may decide."""

from __future__ import annotations

from dataclasses import dataclass, replace

from subquad.codegen import tuned
from subquad.codegen.recurrence_parts import Parts, pad
from subquad.ir.kernel_spec import KernelSpec

REGISTERS = {"cuda": 200, "hip": 140}
"""fp32 values per thread that a kernel may keep by the model's count; above it programs get more warps or smaller tiles."""


SOFTMAX_REGISTERS = 130
"""The same for softmax kernels, whose tiles of pointers take more of the rest."""


EARLY_FORWARD = 115
"""The same for the forward kernel before sm_90, where keys and values are kept as loaded and as operands."""


SPLIT = 6
"""What operands in fp32 cost beside those in bf16: two parts of twice the width, each kept for every product it enters."""


BESIDE = {"states": 1, "grad_states": 3, "grad_keys": 26, "grad_transform": 13}
"""Tiles of rows by columns that channel decays keep beside the others; a kernel with more products in two levels keeps more.
In fp32 a chunk has one level."""


EARLY = {"prepare": 1.0, "grad_states": 1.0, "grad_transform": 1.0, "grad_keys": 2.0, "grad_values": 2.25}
"""What a kernel for sm_80 keeps beside one for sm_90 (1.5 times as much for all others, channel decays the same)."""


REPEATING = ("output", "grad_values")
"""Kernels that compute the scores again for every block of values, so that more warps come before smaller blocks."""


WAVES = 4
"""Most waves of 64 of a program on AMD: with more, each may use half as many registers."""


@dataclass(frozen=True)
class Schedule:
    """A chunk of tokens (or block of query rows), the width of a block of values (or keys), warps of a program; other
    (block, warps) for single kernels by name.
    """

    chunk: int
    block: int
    warps: int
    special: tuple[tuple[str, tuple[int, int]], ...] = ()

    def of(self, part: str) -> tuple[int, int]:
        """(block, warps) of one kernel."""
        return dict(self.special).get(part, (self.block, self.warps))


RECURRENCE_PARTS = (
    "cumulate",
    "prepare",
    "states",
    "output",
    "step",
    "grad_values",
    "grad_states",
    "grad_keys",
    "grad_transform",
    "decumulate",
)


def live_values(part: str, parts: Parts, chunk: int, block: int) -> int:
    """fp32 values that one program of a recurrence kernel keeps at once: a count of its tiles, calibrated on builds for sm_90.

    Before sm_90 both operands of a product are kept in registers too: EARLY as much in all, and twice the tiles of inverses
    and carried gradients.
    """
    delta, channel = int(parts.delta), parts.decay == "channel"
    early = parts.spec.target == "cuda:80"
    operands = 2 if early else 1
    tile, blocks = max((one.pad for one in parts.blocks), default=16), len(parts.blocks)
    square, rows, values, state = chunk * chunk, chunk * tile, chunk * block, tile * block
    counts = {
        "prepare": 6 * operands * square + rows + values,
        "states": blocks * state + rows * (1 + delta) + values,
        "output": square + 2 * values + 2 * rows + state,
        "grad_values": square + 2 * values + 2 * rows + state,
        "grad_states": operands * (blocks * state + rows * (1 + 2 * delta) + 2 * values),
        "grad_keys": square + rows * (4 + delta) + 2 * values + 2 * state,
        "grad_transform": 4 * operands * square + 3 * rows + 2 * values,
        "step": blocks * state + 4 * 16 * tile,
    }
    if parts.sums and part == "states":
        counts[part] += blocks * rows // 4
    if (
        parts.sums
        and part == "output"
        and "raw" in parts.spec.flags
        and any(text != "x" for text in parts.what.key_map)
    ):
        counts[part] += rows // 2
    if part in counts and not parts.around.empty:
        counts[part] += (2 * rows + chunk * pad(parts.spec.key_dim)) * (2 if part in ("prepare", "states") else 1)
    if early and part == "grad_states":
        counts[part] += 3 * max(blocks - 2, 0) * rows
    found = counts.get(part, 0) if delta or part not in ("prepare", "grad_transform") else 0
    if found and parts.spec.feature_dim:
        sides = 2 if part in ("output", "step") else 1
        found += (sides * pad(parts.spec.feature_dim) + chunk) * pad(parts.spec.key_dim)
    if part == "output" and parts.what.window:
        width = pad(
            parts.spec.key_dim
        )  # in bf16 queries are kept as operands, and what is read takes the place of the values
        narrow = parts.spec.dtype == "bfloat16"
        found += (chunk // 2 + 32) * width + 32 * block if narrow else (chunk + 32) * (width + block)
    found = int(found * EARLY.get(part, 1.5)) if early and not channel else found
    single = parts.spec.dtype == "float32"
    if channel and found:
        found = 2 * found + (8 if single else BESIDE.get(part, 8)) * rows
    return SPLIT * found if single else found


def recurrence_schedule(spec: KernelSpec) -> Schedule:
    """The schedule of a recurrence's kernels: the measured one of this device if there is one, else the model's."""
    measured = tuned.lookup(spec)
    return Schedule(*measured) if measured else recurrence_candidates(spec)[0]


def recurrence_candidates(spec: KernelSpec) -> list[Schedule]:
    """Schedules worth measuring, the model's choice first.

    Bytes of states between chunks fall with the chunk, operations within chunks grow with it (F V / C against C (F + V)
    per token), so that chunks near sqrt(F V) are best; two-level decays double the work within a chunk and get half of it,
    operands in fp32 a quarter.  A longer chunk, or one whose kernels do not all fit the registers of the spec's target,
    comes last.
    """
    parts = Parts(replace(spec, part="output"))
    longest = 16 if spec.dtype == "float32" else 32 if parts.decay == "channel" else 64
    best = max(16, pad(int((parts.features * spec.value_dim) ** 0.5)))
    fitted = [_fitted(parts, chunk) for chunk in (64, 32, 16) if chunk <= best]
    good = [schedule for schedule, fits in fitted if fits and schedule.chunk <= longest]
    return [*good, *(schedule for schedule, _ in reversed(fitted) if schedule not in good)]


def _fitted(parts: Parts, chunk: int) -> tuple[Schedule, bool]:
    """The schedule of a chunk, and whether the registers hold what its kernels keep."""
    special, fits = [], True
    for part in RECURRENCE_PARTS:
        parts = Parts(replace(parts.spec, part=part))
        early = parts.spec.target == "cuda:80" and part == "grad_keys"
        narrow = parts.spec.dtype == "float32" or parts.decay == "channel" or early
        blocks = (64, 32, 16) if narrow else (64, 32)
        options = [(block, warps) for warps in (4, 8) for block in blocks]
        if part in REPEATING:
            options.sort(key=lambda option: -option[0])
        width = pad(parts.spec.value_dim)
        most = 32 * REGISTERS[parts.spec.target.partition(":")[0]]
        fitting = [o for o in options if live_values(part, parts, chunk, min(o[0], width)) <= most * o[1]]
        fits = fits and bool(fitting)
        special.append((part, fitting[0] if fitting else options[-1]))
    return Schedule(chunk, 64, 4, tuple(special)), fits


def softmax_schedule(spec: KernelSpec, rows: int) -> Schedule:
    """The schedule of a softmax kernel for tiles of at most `rows` query rows; few rows get small tiles over more keys."""
    measured = tuned.lookup(spec)
    if measured and rows > 16:
        return Schedule(*measured)
    return softmax_candidates(spec, rows)[0]


def softmax_candidates(spec: KernelSpec, rows: int) -> list[Schedule]:
    """Schedules worth measuring, the model's choice first: tiles whose accumulators fit the registers, before sm_90 with
    both forms of the operands that grad_keys transposes.
    """
    key, value = pad(spec.key_dim), pad(spec.value_dim)
    tried = [(128, 64, 8), (64, 64, 4), (64, 64, 8), (64, 32, 8), (32, 32, 8)]
    if rows <= 16 and spec.part == "forward":
        tried = [(16, 64, 4), (16, 32, 4)]
    found = []
    for block_q, block_kv, warps in tried:
        kept = {
            "forward": block_q * value,
            "grad_queries": block_q * (key + value),
            "grad_keys": block_kv * (key + value),
        }
        tiles = {"forward": 2, "grad_queries": 3, "grad_keys": 3}.get(spec.part, 0) * block_q * block_kv
        tiles += 2 * block_q * block_kv * (("bias" in spec.flags) + bool(spec.tables))
        wide = 2.5 if spec.dtype == "float32" else 1.0
        loads = (block_q * key + block_kv * (key + value)) // 2 + (block_q * key if spec.around else 0)
        loads *= 3 if spec.target == "cuda:80" and spec.part == "grad_keys" else 1
        if spec.target == "cuda:80" and spec.part == "forward":
            both_forms = kept["forward"] + tiles // 2 + 3 * loads // 2
            if both_forms * wide > EARLY_FORWARD * 32 * warps:
                continue
        if (kept.get(spec.part, 0) + tiles + loads) * wide <= SOFTMAX_REGISTERS * 32 * warps:
            found.append(Schedule(block_q, block_kv, warps))
    return found or [Schedule(16, 16, 4)]


def scheduled(spec: KernelSpec, schedule: Schedule | None = None) -> KernelSpec:
    """The spec of one kernel under a schedule, by default its operator's own on the spec's target.

    Waves on AMD are twice as wide as warps, and more than four of a program halve the registers of each.
    """
    if spec.op == "recurrence":
        chosen = schedule or recurrence_schedule(spec)
    else:
        chosen = schedule or softmax_schedule(spec, 64)
    block, warps = chosen.of(spec.part)
    if (
        spec.op == "recurrence"
        and spec.part in ("output", "step")
        and "raw" not in spec.flags
        and Parts(spec).whole_rows
    ):
        warps = warps if pad(spec.value_dim) <= block else max(warps, 8)
        block = pad(spec.value_dim)
    if spec.target.startswith("hip"):
        warps = min(warps, WAVES)
    return replace(spec, block_q=chosen.chunk, block_kv=block, num_warps=warps)
