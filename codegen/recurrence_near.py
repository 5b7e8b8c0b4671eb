"""The window branch of a recurrence as softmax attention in generated kernels, differentiable, its largest score included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.codegen.schedule import Schedule
from subquad.codegen.softmax_call import softmax_backward, softmax_state
from subquad.kernels import RecurrenceSpec, SoftmaxSpec
from subquad.kernels.recurrence_layout import Layout

TABLES = ("int64", "int64")
"""Element types of the mask's tables: tokens before and live tokens of each row."""


def near_spec(what: RecurrenceSpec) -> SoftmaxSpec:
    """The softmax of token q over the joined slots j: the sinks, then the window's history and the tokens.

    Slot `sinks + place` holds token t0[b] - window + place; a sink is seen once it is there, and any other token that is
    live (t1[b]) while it is no older than the window.
    """
    window, sinks = what.window, what.sinks
    near = f"(j - {sinks} > q) & (j - {sinks} <= q + {window}) & (j - {sinks} < t1[b] + {window})"
    near += f" & (t0[b] - {window} + j >= {2 * sinks})"
    if not sinks:
        return SoftmaxSpec(what.scale, mask=near)
    return SoftmaxSpec(what.scale, mask=f"((j < {sinks}) & (j <= t0[b] + q)) | ((j >= {sinks}) & {near})")


def near(layout: Layout, what: RecurrenceSpec, schedule: Schedule | None) -> tuple[Tensor, Tensor]:
    """(softmax output [B, T, H, V] over each token's window, sum [B, T, H] of its weights beside a largest of 1), fp32
    sums; rows of queries in the layout's order.
    """
    batch, length = layout.q.shape[:2]
    live = torch.as_tensor(layout.live, device=layout.q.device).reshape(-1).expand(batch).contiguous()
    keys = torch.cat([layout.sinks_k, layout.keys], 1).to(layout.q.dtype)
    values = torch.cat([layout.sinks_v, layout.values], 1).to(layout.q.dtype)
    tables = (layout.past.expand(batch).contiguous(), live)
    return Near.apply(near_spec(what).json(), tables, schedule, layout.q, keys, values)  # type: ignore[no-any-return, no-untyped-call]


class Near(torch.autograd.Function):
    """(o [B, T, H, V], mass [B, T, H]) of q, k, v; mass = sum exp(score - largest), whose gradient reaches the largest too
    (the first of equal ones).
    """

    @staticmethod
    def forward(
        ctx: Any, spec: str, tables: tuple[Tensor, ...], schedule: Schedule | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        names = ("q_positions", "bias", "sinks")
        ctx.given = dict.fromkeys(names) | {name: [] for name in ("rows", "lengths", "positions", "scalars")}
        ctx.given |= {"q": q, "k": [k], "v": [v], "operands": list(tables), "spec": spec}
        ctx.schedule = schedule
        o, lse, mass, slot = softmax_state(ctx.given, schedule)
        ctx.state = o, lse, mass, slot
        return o, mass

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor, grad_mass: Tensor) -> tuple[Any, ...]:
        o, lse, mass, slot = ctx.state
        change = grad_mass.float() * mass
        dq, dk, dv = softmax_backward(ctx.given, grad_o, change, o, lse, schedule=ctx.schedule, largest=(slot, -change))
        return None, None, None, dq, dk, dv
