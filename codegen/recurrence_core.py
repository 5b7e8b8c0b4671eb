"""The recurrence as differentiable torch around one function whose forward and backward are generated kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.codegen import recurrence_run as run
from subquad.codegen.recurrence_near import near
from subquad.codegen.recurrence_rows import (
    counted,
    empty_windows,
    flat,
    sequences,
)
from subquad.codegen.schedule import Schedule, recurrence_schedule
from subquad.codegen.surrounded import surroundings_of
from subquad.kernels import RecurrenceSpec
from subquad.kernels.features import features, normalise, repeat_heads
from subquad.kernels.recurrence_lanes import ordered
from subquad.kernels.recurrence_layout import Layout, arrange, complete

Arguments = dict[str, Any]


def composed(given: Arguments, schedule: Schedule | None = None) -> tuple[Tensor, ...]:
    """The operator's outputs, differentiable in every floating argument.

    Feature maps, gates and normaliser are torch; what depends on the order of tokens is in kernels: the recurrence, and
    the window as softmax attention. Memory is O(T F).
    """
    what = RecurrenceSpec.parse(given["spec"])
    layout = None
    if what.window:
        names = ("q", "k", "v", "valid", "window_k", "window_v", "seen")
        layout = arrange(**{name: given[name] for name in names}, spec=what)
        given = given | _far(layout, given, what)
    q, k, v, valid = (given[name] for name in ("q", "k", "v", "valid"))
    batch, length, heads, _ = q.shape
    value_dim = v.shape[3]
    phi_q = features(what.feature_map, q.float().transpose(1, 2), given["feature_q"]).transpose(1, 2)
    plain_k = repeat_heads(k, heads) if given["feature_k"] else k.transpose(1, 2)
    phi_k = features(what.key_map, plain_k.float(), given["feature_k"]).transpose(1, 2)
    state = sums = None
    if given["state"] is not None:
        state, sums = given["state"][..., :value_dim], None
        if given["seen"] is not None:
            state = torch.where((given["seen"] > 0).view(-1, 1, 1, 1), state, torch.zeros_like(state))
        if what.sums:
            sums = given["state"][..., value_dim]
            empty = -torch.inf if what.decay == "additive" else 0.0
            if given["seen"] is not None:
                sums = torch.where((given["seen"] > 0).view(-1, 1, 1), sums, torch.full_like(sums, empty))
    decay = given["decay"]
    total = None
    if what.decay == "additive":
        phi_k = phi_k.repeat_interleave(heads // phi_k.shape[2], 2)
        if what.causal:
            phi_k, decay, total = additive(phi_k, valid, sums)
        else:
            phi_k, state, total = shares(phi_k, valid, state, sums)
        sums = None
    elif what.decay == "head":
        decay = decay.expand(batch, length, -1)
    if decay is not None:
        axis = 2 if decay.dim() >= 3 else -1
        decay = decay.float().clamp(min=-100.0)
        decay = decay if decay.shape[axis] == heads else decay.repeat_interleave(heads // decay.shape[axis], axis)
    beta = given["beta"]
    if beta is not None and beta.shape[2] != heads:
        beta = beta.repeat_interleave(heads // beta.shape[2], 2)
    flags = () if valid is None else ("valid",)
    wide = torch.float32 if q.dtype == torch.float16 else q.dtype  # features may leave the range of fp16
    phi_q, phi_k, v = (x.to(wide) for x in (phi_q, phi_k, v))
    spec = run.core_spec(what, phi_q, phi_q.shape[3], value_dim, flags)
    chosen = schedule or recurrence_schedule(spec)
    rows = sequences(given, chosen.chunk)
    mask = None if valid is None else valid.reshape(-1).to(torch.int8)
    tensors = (phi_q, phi_k, v, decay, beta)
    numerator, mass, final, final_sum = Core.apply(
        spec,
        rows,
        chosen,
        what.normaliser != "none" or layout is not None or not surroundings_of(given).o.empty,
        mask,
        *(None if x is None else flat(x) for x in tensors),
        state,
        sums,
    )  # type: ignore[no-untyped-call]
    numerator = numerator.view(batch, length, heads, value_dim)
    denominator = mass.view(batch, length, heads, 1) if mass.numel() else numerator[..., :1]
    if layout is not None:
        out = _beside(layout, numerator, denominator, given["window_gate"], what, schedule)
    else:
        out = normalise(numerator, denominator, what)
    if layout is None and valid is not None:
        out = torch.where(valid[:, :, None, None], out, torch.zeros_like(out))
    if what.sums:
        final = torch.cat([final, (final_sum if total is None else total)[..., None]], -1)
    if layout is not None:
        return complete(layout, out.to(q.dtype), final, what)
    return out.to(q.dtype), final, *empty_windows(k, given["v"], rows.count), counted(given)


def _far(layout: Layout, given: Arguments, what: RecurrenceSpec) -> Arguments:
    """What the recurrence beside a window reads: under a shared denominator a token's key is the one that leaves its window."""
    length = layout.q.shape[1]
    place = torch.arange(length, device=layout.q.device)
    there = (place < torch.as_tensor(layout.live, device=place.device)).expand(layout.q.shape[0], -1)
    enters = slice(what.window, None)
    if what.branch == "shared":
        enters = slice(0, length)
        there = there & (layout.past[:, None] - what.window + place >= what.sinks)
    found: Arguments = {"q": layout.q, "k": layout.keys[:, enters], "v": layout.values[:, enters], "valid": there}
    gates = {name: given[name] for name in ("decay", "beta")}
    return found | (gates if layout.order is None else {n: ordered(x, layout.order) for n, x in gates.items()})


def _beside(
    layout: Layout, numerator: Tensor, denominator: Tensor, gate: Tensor | None, what: RecurrenceSpec,
    schedule: Schedule | None,
) -> Tensor:  # fmt: skip
    """The window's softmax and the recurrence's part [B, T, H, V], under one denominator or as a convex sum."""
    local, weight = near(layout, what, schedule)
    if gate is None:
        gamma = torch.full((), 1.0 if what.branch == "shared" else 0.5, device=numerator.device)
    else:
        gamma = torch.sigmoid(gate.float())[:, None]
    if what.branch == "convex":
        return gamma * local + (1 - gamma) * normalise(numerator, denominator, what)
    mass = gamma * weight[..., None]
    total = mass + denominator
    return (mass * local + numerator) / torch.where(total == 0, torch.ones_like(total), total)


def additive(logits: Tensor, valid: Tensor | None, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(k, g, log sum) of weights exp(logits [B, T, H, F]) that add up along the tokens: k_t = exp(logits_t - L_t) and
    g_t = L_{t-1} - L_t with L the running log-sum-exp (LightNet, 2405.21022).
    """
    if valid is not None:
        logits = logits.masked_fill(~valid[:, :, None, None], -torch.inf)
    first = torch.full_like(logits[:, :1], -torch.inf) if before is None else before[:, None].to(logits.dtype)
    running = torch.logcumsumexp(torch.cat([first, logits], 1), 1)
    empty = running == -torch.inf
    safe = running.masked_fill(empty, 0.0)
    gate = torch.where(empty[:, :-1], torch.full_like(logits, -100.0), safe[:, :-1] - safe[:, 1:])
    gate = gate.masked_fill(empty[:, 1:], 0.0)
    return torch.exp(logits - safe[:, 1:]), gate, safe[:, -1]


def shares(
    logits: Tensor, valid: Tensor | None, state: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(k, state, log sum) of weights exp(logits [B, T, H, F]) that all tokens read: each channel's softmax over time, the
    state, whose sum is exp(before), among it.
    """
    if valid is not None:
        logits = logits.masked_fill(~valid[:, :, None, None], -torch.inf)
    first = torch.full_like(logits[:, :1], -torch.inf) if before is None else before[:, None].to(logits.dtype)
    total = torch.logsumexp(torch.cat([first, logits], 1), 1)
    safe = total.masked_fill(total == -torch.inf, 0.0)
    state = None if state is None else state * torch.exp(first[:, 0] - safe)[..., None]
    return torch.exp(logits - safe[:, None]), state, safe


class Core(torch.autograd.Function):
    """(numerator [R, H, V], mass [R, H] or empty, final state, its sums or empty) over rows phi(q), phi(k), v, g, beta."""

    @staticmethod
    def forward(
        ctx: Any, spec: Any, rows: run.Rows, schedule: Schedule, wanted: bool, mask: Tensor | None, q: Tensor, k: Tensor,
        v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None, sums: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        heads = q.shape[1]
        values: dict[str, Any] = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "k_heads": k.shape[1], "v_heads": v.shape[1]}
        values |= {"g_ptr": g, "g_heads": heads, "beta_ptr": None if beta is None else beta.float(), "b_heads": heads}
        values |= {"valid_ptr": mask}
        if state is not None:
            values["state_ptr"] = state.float().contiguous()
            values |= {} if sums is None else {"state_sum_ptr": sums.float().contiguous()}
        made = run.raw(run.prepared(spec, rows, schedule, heads, values))
        needs = wanted or not any(ctx.needs_input_grad)
        ctx.passes = [made] if made.what.causal else [made, run.from_behind(made)]
        for one in ctx.passes:
            run.forward(one, output=needs)
        found = made.values
        final = found["final_ptr"]
        return found["o_ptr"], found["mass_ptr"], final, found.get("final_sum_ptr", final.new_empty(0))

    @staticmethod
    def backward(ctx: Any, do: Tensor, dmass: Tensor, dfinal: Tensor, dfinal_sum: Tensor) -> tuple[Any, ...]:
        values, first = ctx.passes[0].values, ctx.passes[0]
        found = run.backward(first, do, dmass, dfinal, dfinal_sum)
        for other in ctx.passes[1:]:
            more = run.backward(other, do, dmass, torch.zeros_like(dfinal), torch.zeros_like(dfinal_sum))
            found |= {name: found[name] + more[name] for name in ("dq", "dk", "dv", "dg") if name in found}
        dk, dv = (grouped(found[name], values[f"{name[1]}_heads"]) for name in ("dk", "dv"))
        state, sums = (found.get(name) if values["has_state"] else None for name in ("dinitial", "dinitial_sum"))
        return None, None, None, None, None, found["dq"], dk, dv, found.get("dg"), found.get("dbeta"), state, sums


def grouped(grad: Tensor, heads: int) -> Tensor:
    """[R, H, *] summed over the query heads that read one of `heads` heads."""
    return grad if grad.shape[1] == heads else grad.unflatten(1, (heads, -1)).sum(2)
