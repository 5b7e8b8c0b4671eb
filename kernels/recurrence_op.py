"""Registers subquad::recurrence with torch: kernel dispatch, fake kernel, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels import recurrence_forms as forms
from subquad.kernels.operator_scope import own_precision
from subquad.kernels.provider import provided
from subquad.kernels.recurrence_arguments import STATE, differentiable
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

ARGUMENTS = (
    "q", "k", "v", "decay", "beta", "feature_q", "feature_k", "window_gate", "valid", "state", "window_k", "window_v", "seen",
    "cu_seqlens", "spec",
)  # fmt: skip


def check(arguments: dict[str, Any]) -> RecurrenceSpec:
    """Raise ValueError naming the first argument of the recurrence that does not fit; return the parsed spec."""
    spec = RecurrenceSpec.parse(arguments["spec"])
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[3] != q.shape[3] or k.shape[2] != v.shape[2]:
        raise ValueError(
            f"recurrence got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; they must be [B, T, H, K], [B, T, Hkv, K] "
            "and [B, T, Hkv, V]."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"recurrence got {q.shape[2]} query heads over {k.shape[2]} key heads; the first must be a multiple."
        )
    for name, wanted in (("decay", spec.decay not in ("none", "additive")), ("beta", spec.update == "delta")):
        if (arguments[name] is not None) != wanted:
            raise ValueError(
                f"recurrence got {name} {'present' if not wanted else 'absent'}, but the spec says the opposite."
            )
    dims = {"head": 1, "token": 3, "channel": 4}.get(spec.decay, 0)
    for name, rank in (("decay", dims), ("beta", 3)):
        value = arguments[name]
        if value is not None and (
            value.dim() != rank or value.shape[0 if rank == 1 else 2] not in (q.shape[2], k.shape[2])
        ):
            raise ValueError(
                f"recurrence got {name} {list(value.shape)} for q {list(q.shape)}; it needs {rank} axes and one entry per query "
                f"head or per key head."
            )
    parts = [arguments[name] is not None for name in STATE]
    if any(parts) != all(parts):
        raise ValueError(
            "recurrence got part of an initial state; give all of state, window_k, window_v and seen, or none."
        )
    return spec


def recurrence_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    window_gate: Tensor | None,
    valid: Tensor | None,
    state: Tensor | None,
    window_k: Tensor | None,
    window_v: Tensor | None,
    seen: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Recurrence over q [B, T, H, K], k [B, T, Hkv, K], v [B, T, Hkv, V] with an optional window softmax branch.

    decay: log decays [H], [B, T, H] or [B, T, H, F], at most 0 (-inf forgets everything); beta [B, T, H] for the delta
    update; Hkv in the place of H where a KV group shares them. feature_q, feature_k: weights w0.. [H, K, F'] of the
    feature maps. window_gate: [H] logit of gamma. valid: bool [B, T]; an invalid token contributes nothing, decays and
    advances nothing and outputs 0. state [B, H, F, spec.columns(V)], window_k and window_v [B, sinks + window, Hkv, K|V],
    seen int64 [B]: what an earlier call returned; a row with seen = 0 has an empty past, whose state is zero.
    cu_seqlens: int64 [N + 1] bounds of sequences packed into B = 1 (B of the state is then N). spec:
    RecurrenceSpec.json().

    Returns o [B, T, H, V] in q's dtype, state in fp32 (fp64 for fp64 inputs), window_k, window_v and seen. Where
    spec.sums, the state's last column is the sum of phi(k), or the logarithm of the sum of additive weights. Window
    buffer: the first `sinks` valid tokens, then a ring where token n sits in slot sinks + (n - sinks) % window; free
    slots are 0. Calls compose: prefix, then rest with its state, equals one call. Source: LoLCATs (2410.10254) with a
    sliding window and attention sinks; conventions of flash-linear-attention.
    """
    arguments = dict(
        zip(
            ARGUMENTS,
            (
                q,
                k,
                v,
                decay,
                beta,
                feature_q,
                feature_k,
                window_gate,
                valid,
                state,
                window_k,
                window_v,
                seen,
                cu_seqlens,
                spec,
            ),
            strict=True,
        )
    )
    check(arguments)
    provider = provided()
    found = provider("recurrence", arguments) if provider is not None and q.device.type != "cpu" else None
    with own_precision(q.device.type):
        result = forms.forward(arguments) if found is None else found
    return tuple(output.contiguous() for output in result)  # type: ignore[return-value]


recurrence = torch.library.custom_op("subquad::recurrence", recurrence_forward, mutates_args=())


@recurrence.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    window_gate: Tensor | None,
    valid: Tensor | None,
    state: Tensor | None,
    window_k: Tensor | None,
    window_v: Tensor | None,
    seen: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values = (
        q,
        k,
        v,
        decay,
        beta,
        feature_q,
        feature_k,
        window_gate,
        valid,
        state,
        window_k,
        window_v,
        seen,
        cu_seqlens,
        spec,
    )
    arguments = dict(zip(ARGUMENTS, values, strict=True))
    what = check(arguments)
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = what.sinks + what.window
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        q.new_empty(rows, q.shape[2], forms.feature_width(arguments), what.columns(v.shape[3]), dtype=compute_dtype(q)),
        k.new_empty(rows, slots, *k.shape[2:]),
        v.new_empty(rows, slots, *v.shape[2:]),
        q.new_empty(rows, dtype=torch.int64),
    )


@torch.library.custom_op("subquad::recurrence_backward", mutates_args=())
def recurrence_backward(
    grads: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    window_gate: Tensor | None,
    valid: Tensor | None,
    state: Tensor | None,
    window_k: Tensor | None,
    window_v: Tensor | None,
    seen: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: str,
) -> list[Tensor]:
    """Gradients of recurrence's floating inputs that are present, for grads of (o, state, window_k, window_v)."""
    values = (
        q,
        k,
        v,
        decay,
        beta,
        feature_q,
        feature_k,
        window_gate,
        valid,
        state,
        window_k,
        window_v,
        seen,
        cu_seqlens,
        spec,
    )
    arguments = dict(zip(ARGUMENTS, values, strict=True))
    provider = provided() if q.device.type != "cpu" else None
    with own_precision(q.device.type):
        found = None if provider is None else provider("recurrence_backward", arguments | {"grads": grads})
        if found is None:
            found = forms.backward(arguments, grads)
    wanted = differentiable(arguments)
    return [grad.to(one.dtype).contiguous() for grad, one in zip(found, wanted, strict=True)]


@recurrence_backward.register_fake
def _(
    grads: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    window_gate: Tensor | None,
    valid: Tensor | None,
    state: Tensor | None,
    window_k: Tensor | None,
    window_v: Tensor | None,
    seen: Tensor | None,
    cu_seqlens: Tensor | None,
    spec: str,
) -> list[Tensor]:
    values = (
        q,
        k,
        v,
        decay,
        beta,
        feature_q,
        feature_k,
        window_gate,
        valid,
        state,
        window_k,
        window_v,
        seen,
        cu_seqlens,
        spec,
    )
    arguments = dict(zip(ARGUMENTS, values, strict=True))
    return [one.new_empty(one.shape) for one in differentiable(arguments)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    named = dict(zip(ARGUMENTS, inputs, strict=True))
    ctx.counts = (len(named["feature_q"]), len(named["feature_k"]))
    ctx.spec = named["spec"]
    single = [named[name] for name in ARGUMENTS if name not in ("feature_q", "feature_k", "spec")]
    ctx.save_for_backward(*single, *named["feature_q"], *named["feature_k"])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    names = [name for name in ARGUMENTS if name not in ("feature_q", "feature_k", "spec")]
    saved = ctx.saved_tensors
    named: dict[str, Any] = dict(zip(names, saved[: len(names)], strict=True)) | {"spec": ctx.spec}
    weights = list(saved[len(names) :])
    named["feature_q"], named["feature_k"] = weights[: ctx.counts[0]], weights[ctx.counts[0] :]
    found = list(torch.ops.subquad.recurrence_backward(list(grads[:4]), *(named[name] for name in ARGUMENTS)))
    results: list[Any] = []
    for name in ARGUMENTS:
        value = named[name]
        if isinstance(value, list):
            results.append([found.pop(0) for _ in value])
        else:
            floating = isinstance(value, Tensor) and name not in ("valid", "seen", "cu_seqlens")
            results.append(found.pop(0) if floating else None)
    return tuple(results)


recurrence.register_autograd(_backward, setup_context=_setup_context)
