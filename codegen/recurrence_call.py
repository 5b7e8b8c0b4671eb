"""The operator subquad::recurrence, forward and backward, by its generated kernels: same arguments, same results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subquad.codegen import recurrence_run as run
from subquad.codegen.recurrence_core import composed
from subquad.codegen.recurrence_rows import counted, empty_windows, final_state, flat, sequences, split_state
from subquad.codegen.recurrence_template import admits
from subquad.codegen.running import dtype_name, target_of
from subquad.codegen.schedule import Schedule, recurrence_schedule
from subquad.codegen.surrounded import applied, leaves_of, picked, pointers, surroundings_of
from subquad.ir.kernel_spec import KernelSpec
from subquad.kernels import RecurrenceSpec
from subquad.kernels.operator_scope import recording
from subquad.kernels.recurrence_arguments import differentiable
from subquad.kernels.recurrence_forms import feature_width
from subquad.kernels.recurrence_layout import arrange, complete
from subquad.kernels.surroundings import finished

Arguments = dict[str, Any]
STEP = 8
"""Tokens up to which a call without a window walks token by token."""


def runs(given: Arguments) -> bool:
    """True for the calls of the operator that the kernels compute."""
    what = RecurrenceSpec.parse(given["spec"])
    plain = given["q"].shape[1] > 0 and given["q"].dtype == given["k"].dtype == given["v"].dtype
    return plain and (given["cu_seqlens"] is None or not (what.window or what.decay == "additive"))


def base_spec(given: Arguments, gradients: bool = False) -> KernelSpec:
    """The spec of a call's kernels, or of those of its gradients, without optional inputs, part and schedule."""
    what = RecurrenceSpec.parse(given["spec"])
    q, value_dim = given["q"], given["v"].shape[3]
    if gradients or not _own_features(given, what):
        like = q.new_empty(0, dtype=torch.float32 if q.dtype == torch.float16 else q.dtype)
        return run.core_spec(what, like, feature_width(given), value_dim, ())
    weights = [*given["feature_q"], *given["feature_k"]]
    hidden = weights[0].shape[-1] if weights else 0
    sizes = (q.shape[3], value_dim, hidden)
    around = given.get("around", "")
    return KernelSpec("recurrence", given["spec"], dtype_name(q), *sizes, around=around, target=target_of(q))


def _own_features(given: Arguments, what: RecurrenceSpec) -> bool:
    """True where the forward kernels compute the feature maps."""
    weights = (*given["feature_q"], *given["feature_k"])
    return admits(what, dtype_name(given["q"]), max((w.shape[-2] * w.shape[-1] for w in weights), default=0))


def recurrence_forward(given: Arguments, schedule: Schedule | None = None) -> tuple[Tensor, ...]:
    """Outputs (o, state, window_k, window_v, seen) of the operator."""
    what = RecurrenceSpec.parse(given["spec"])
    if not _own_features(given, what):
        return _surrounded(given, schedule)
    if what.window:
        return _windowed(given, what, schedule)
    batch, length = given["q"].shape[:2]
    made = _prepared(given, what, schedule, {})
    out = made.values["o_ptr"]
    if not what.causal:
        made = run.raw(made)
        run.forward(made)
        run.forward(run.from_behind(made, out))
    elif given["cu_seqlens"] is None and length <= STEP and schedule is None:
        made.run("step")
    else:
        run.forward(made)
    state = final_state(made)
    seen = counted(given)
    k, v = given["k"], given["v"]
    rows = made.rows.count
    return (
        out.view(batch, length, *out.shape[1:]),
        state,
        *empty_windows(k, v, rows),
        seen,
    )


def recurrence_backward(given: Arguments, grads: Sequence[Tensor], schedule: Schedule | None = None) -> list[Tensor]:
    """Gradients of every floating input that is present, in argument order, for grads of (o, state, window_k, window_v);
    then those of the tensors of its surroundings.
    """
    with recording():
        fresh = leaves_of(given)
        inputs = differentiable(fresh) + [fresh["surroundings"][name] for name in surroundings_of(given).tensors]
        outputs = _surrounded(fresh, schedule)[:4]
        pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=False) if out.requires_grad]
        found = torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]


def _surrounded(given: Arguments, schedule: Schedule | None) -> tuple[Tensor, ...]:
    """The operator's outputs, differentiable, with prologues and epilogue in torch."""
    out, *rest = composed(applied(given), schedule)
    return finished(out, surroundings_of(given).o, given.get("surroundings", {})), *rest


def _prepared(given: Arguments, what: RecurrenceSpec, schedule: Schedule | None, extra: dict[str, Any]) -> run.Pass:
    q, k, v = given["q"], given["k"], given["v"]
    batch, length, heads, _ = q.shape
    flags = ["valid"] if given["valid"] is not None else []
    flags += ["gate"] if what.window and given["window_gate"] is not None else []
    spec = replace(base_spec(given), flags=tuple(flags))
    chosen = schedule or recurrence_schedule(spec)
    rows = sequences(given, chosen.chunk)
    values = {"q_ptr": flat(q), "k_ptr": flat(k), "v_ptr": flat(v), "k_heads": k.shape[2], "v_heads": v.shape[2]}
    values["o_ptr"] = q.new_empty(batch * length, heads, v.shape[3])
    for side in "qk":
        values |= {f"w{n}_{side}_ptr": weight.float().contiguous() for n, weight in enumerate(given[f"feature_{side}"])}
    if given["valid"] is not None:
        values["valid_ptr"] = given["valid"].reshape(-1).to(torch.int8)
    if given["decay"] is not None:
        decay = given["decay"].float()
        values["g_heads"] = decay.shape[-1] if what.decay in ("head", "token") else decay.shape[-2]
        values["g_ptr"] = decay.contiguous()
    if given["beta"] is not None:
        values |= {"beta_ptr": given["beta"].float().contiguous(), "b_heads": given["beta"].shape[-1]}
    if given["state"] is not None:
        values |= split_state(given["state"], given["seen"], v.shape[3])
    return run.prepared(spec, rows, chosen, heads, values | pointers(given) | extra)


def _windowed(given: Arguments, what: RecurrenceSpec, schedule: Schedule | None) -> tuple[Tensor, ...]:
    """Tokens without padding in front, with the window's history before them; absent tokens drop out at the end. Keys of
    the history are finished, so that those of the tokens are before they join them.
    """
    given = applied(given, "k")
    q, k, v = given["q"], given["k"], given["v"]
    batch, length, heads = q.shape[:3]
    layout = arrange(q, k, v, given["valid"], given["window_k"], given["window_v"], given["seen"], what)
    order = layout.order
    place = torch.arange(length, device=q.device)
    live = torch.as_tensor(layout.live, device=q.device).reshape(-1).expand(batch).contiguous()
    past = layout.past.expand(batch).contiguous()
    valid = place < live[:, None]
    if what.branch == "shared":
        valid = valid & (past[:, None] - what.window + place >= what.sinks)
    tokens = {name: given[name] for name in ("decay", "beta")}
    if order is not None:
        tokens = {n: x if x is None or x.dim() < 3 else _picked(x, order) for n, x in tokens.items()}
        tokens["surroundings"] = picked(given, lambda x: _picked(x, order))
    extra = {"past_ptr": past, "live_ptr": live}
    if given["window_gate"] is not None:
        gate = given["window_gate"].float().reshape(-1)
        extra["gate_ptr"] = gate.expand(heads).contiguous()
    joined = (
        given | tokens | {"q": layout.q, "k": layout.keys.to(k.dtype), "v": layout.values.to(v.dtype), "valid": valid}
    )
    extra |= {
        "sink_k_ptr": layout.sinks_k.to(k.dtype).contiguous(),
        "sink_v_ptr": layout.sinks_v.to(v.dtype).contiguous(),
    }
    made = _prepared(joined, what, schedule, extra)
    run.forward(made)
    return complete(layout, made.values["o_ptr"].view(batch, length, heads, -1), final_state(made), what)


def _picked(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.view(*order.shape, *([1] * (x.dim() - 2))).expand(-1, -1, *x.shape[2:]))
