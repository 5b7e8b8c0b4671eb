"""Lists the kernels that an operator needs, forward and backward, each with its schedule, from one base spec."""

from __future__ import annotations

from dataclasses import replace

import torch

from subquad.codegen.recurrence_near import TABLES, near_spec
from subquad.codegen.recurrence_parts import text_width
from subquad.codegen.recurrence_run import core_spec
from subquad.codegen.recurrence_template import admits, backward_parts, forward_parts
from subquad.codegen.schedule import recurrence_schedule, scheduled, softmax_schedule
from subquad.codegen.surrounded import only
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import RecurrenceSpec

DECODE_ROWS = 16
"""Rows of the tile of a decoding step."""


def operator_kernels(base: KernelSpec) -> list[KernelSpec]:
    """Every kernel of the operator that `base` describes (its part and schedule are ignored), without repetition.

    base.flags: the optional inputs its calls have. base.around moves into forward kernels; gradients are taken around the
    operator, and the keys of a decoding step, which come from a cache, are finished.
    """
    return list(dict.fromkeys(_recurrence(base) if base.op == "recurrence" else _softmax(base)))


def _softmax(base: KernelSpec) -> list[KernelSpec]:
    found = [scheduled(replace(base, part="forward"))]
    decode = softmax_schedule(replace(base, part="forward"), DECODE_ROWS)
    if "pages" not in base.flags:
        kept = tuple(flag for flag in base.flags if flag != "sinks")
        flags = tuple({*kept, "partial", "lengths", "q_positions"})
        step = replace(base, part="forward", flags=flags, around=only(base.around, "q"))
        found.append(scheduled(step, decode))
    sinks = ("sinks",) if "sinks" in base.flags else ()
    found.append(scheduled(replace(base, part="merge", flags=sinks, around=only(base.around, "o"))))
    if "pages" in base.flags:
        return found
    base = replace(base, around="")
    dense = {"lengths": "live", "shared": "positions", "base": "positions"}
    backward = tuple({dense.get(flag, flag) for flag in base.flags} - {"sinks", "partial"})
    bias = ("grad_bias",) if "bias" in base.flags else ()
    queries = replace(base, part="grad_queries", flags=(*backward, *bias))
    return [*found, scheduled(queries), scheduled(replace(base, part="grad_keys", flags=backward))]


def _recurrence(base: KernelSpec) -> list[KernelSpec]:
    what = RecurrenceSpec.parse(base.operator)
    found: list[KernelSpec] = []

    def add(spec: KernelSpec, parts: tuple[str, ...]) -> None:
        found.extend(scheduled(replace(spec, part=part), recurrence_schedule(spec)) for part in parts)

    valid = ("valid",) if what.window else ()
    if admits(what, base.dtype, base.key_dim * base.feature_dim):
        flags = (*base.flags, *valid, *(() if what.causal else ("raw",)))
        add(replace(base, flags=flags), forward_parts(what))
        if not what.causal:
            add(replace(base, flags=(*base.flags, "reverse")), forward_parts(what))
        elif not what.window:
            add(base, ("step",))
    if what.window:
        near = KernelSpec(
            "softmax_attention", near_spec(what).json(), base.dtype, base.key_dim, base.value_dim, flags=("top",),
            tables=TABLES, target=base.target,
        )  # fmt: skip
        found += [scheduled(replace(near, part=part)) for part in ("forward", "grad_queries", "grad_keys")]
    features = sum(text_width(text, base.key_dim, base.feature_dim) for text in what.key_map)
    like = torch.empty(0, dtype=torch.float32 if base.dtype == "float16" else getattr(torch, base.dtype))
    flags = tuple({*base.flags, *valid} - {"gate"})
    core = replace(core_spec(what, like, features, base.value_dim, flags), target=base.target)
    inner = RecurrenceSpec.parse(core.operator)
    for direction in ((),) if what.causal else ((), ("reverse",)):
        add(replace(core, flags=(*core.flags, *direction)), (*forward_parts(inner), *backward_parts(inner)))
    return found
