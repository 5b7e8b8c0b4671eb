"""Chooses the torch form of a recurrence, runs long inputs in blocks, and differentiates them block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.autograd_scope import recording
from subquad.kernels.features import features, normalise, repeat_heads, width
from subquad.kernels.recurrence_by_token import Result, recurrence_reference, sequences
from subquad.kernels.recurrence_chunked import recurrence_chunked, supports
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

BLOCK = 512
"""Tokens handled at once by the block loop: intermediates of this size stay in cache."""
STATE = ("state", "window_k", "window_v", "seen")
TOKENS = ("q", "k", "v", "beta", "valid")
Arguments = dict[str, Any]


def recurrence_torch(
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
) -> Result:
    """The operator subquad::recurrence as traceable torch with symbolic sizes, where a traceable form exists; else
    NotImplemented.

    NotImplemented, returned to a decomposition table, keeps the operator as it is: packed sequences, decays, delta
    and convex windows.
    """
    what = RecurrenceSpec.parse(spec)
    if cu_seqlens is not None or not (supports(what) or _both(what)):
        return NotImplemented
    if _both(what):
        result = _bidirectional(q, k, v, feature_q, feature_k, valid, state, seen, what)
    else:
        carry = (state, window_k, window_v, seen)
        result = recurrence_chunked(q, k, v, feature_q, feature_k, window_gate, valid, *carry, what)
    return (result[0].to(q.dtype), *result[1:])


def forward(arguments: Arguments) -> Result:
    """The operator's outputs on CPU by the fastest form; not traceable."""
    q, k, v, cu_seqlens = (arguments[name] for name in ("q", "k", "v", "cu_seqlens"))
    what = RecurrenceSpec.parse(arguments["spec"])
    if cu_seqlens is not None and (supports(what) or _both(what)):
        batch, places = _unpack(arguments)
        result = forward(batch)
        return (result[0][places][None], *result[1:])
    if q.shape[1] and (supports(what) or _both(what)):
        return _in_blocks(arguments, what)
    if q.shape[1] == 0 and arguments["state"] is not None and cu_seqlens is None:
        return (
            torch.zeros_like(q[..., :1]).expand(*q.shape[:3], v.shape[3]),
            *(arguments[name].clone() for name in STATE),
        )
    o, state, window_k, window_v, seen = recurrence_reference(**arguments, dtype=compute_dtype(q))
    return o.to(q.dtype), state, window_k.to(k.dtype), window_v.to(v.dtype), seen


def backward(arguments: Arguments, grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of every floating input that is present, in the order of `differentiable`, for grads of (o, state,
    window_k, window_v).
    """
    what = RecurrenceSpec.parse(arguments["spec"])
    if arguments["q"].shape[1] and arguments["cu_seqlens"] is None and supports(what):
        return _blocks_backward(arguments, what, grads)

    def run(named: Arguments) -> tuple[Tensor, ...]:
        if named["cu_seqlens"] is None and _both(what):
            return recurrence_torch(**named)
        o, *rest = recurrence_reference(**named, dtype=compute_dtype(named["q"]))
        return (o, *rest)

    return _gradients(run, arguments, grads)


def differentiable(arguments: Arguments) -> list[Tensor]:
    """The floating inputs that are present, parameters of the feature maps one by one, in argument order."""
    names = ("q", "k", "v", "decay", "beta", "feature_q", "feature_k", "window_gate", "state", "window_k", "window_v")
    found: list[Tensor] = []
    for name in names:
        value = arguments[name]
        found.extend(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return found


def _gradients(
    run: Callable[[Arguments], tuple[Tensor, ...]], arguments: Arguments, grads: Sequence[Tensor]
) -> list[Tensor]:
    with recording():
        fresh = {
            name: [item.detach().requires_grad_() for item in value]
            if isinstance(value, list | tuple)
            else (value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value)
            for name, value in arguments.items()
        }
        inputs = differentiable(fresh)
        outputs = run(fresh)[:4]
        pairs = [(out, grad.to(out.dtype)) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        found = torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]


def _block(arguments: Arguments, start: int, stop: int, carry: Sequence[Tensor | None]) -> Arguments:
    part = {name: arguments[name] if arguments[name] is None else arguments[name][:, start:stop] for name in TOKENS}
    return arguments | part | dict(zip(STATE, carry, strict=True))


def _run_block(named: Arguments, what: RecurrenceSpec, deep: bool) -> Result:
    names = ("q", "k", "v", "feature_q", "feature_k", "window_gate", "valid", *STATE)
    return recurrence_chunked(**{name: named[name] for name in names}, spec=what, deep=deep)


def _walk(arguments: Arguments, what: RecurrenceSpec) -> list[tuple[int, int, bool]]:
    """(start, stop, deep) of each block; deep when every row has surely seen sinks + window tokens before it."""
    total = arguments["q"].shape[1]
    seen = 0 if arguments["seen"] is None else int(arguments["seen"].min())
    sure = arguments["valid"] is None
    return [
        (start, min(start + BLOCK, total), sure and seen + start >= what.sinks + what.window)
        for start in range(0, total, BLOCK)
    ]


def _in_blocks(arguments: Arguments, what: RecurrenceSpec) -> Result:
    q, v = arguments["q"], arguments["v"]
    if _both(what):
        names = ("q", "k", "v", "feature_q", "feature_k", "valid", "state", "seen")
        result = _bidirectional(**{name: arguments[name] for name in names}, spec=what)
        return (result[0].to(q.dtype), *result[1:])
    out = q.new_empty(*q.shape[:3], v.shape[3])
    carry: Sequence[Tensor | None] = [arguments[name] for name in STATE]
    for start, stop, deep in _walk(arguments, what):
        part, *carry = _run_block(_block(arguments, start, stop, carry), what, deep)
        out[:, start:stop] = part
    state, window_k, window_v, seen = carry
    assert state is not None
    assert window_k is not None
    assert window_v is not None
    assert seen is not None
    return out, state, window_k, window_v, seen


def _blocks_backward(arguments: Arguments, what: RecurrenceSpec, grads: Sequence[Tensor]) -> list[Tensor]:
    """Recompute block by block from the last to the first, so that memory is O(BLOCK) beside inputs and gradients."""
    walk = _walk(arguments, what)
    carry: Sequence[Tensor | None] = [arguments[name] for name in STATE]
    starts = [carry]
    for start, stop, deep in walk[:-1]:
        carry = _run_block(_block(arguments, start, stop, carry), what, deep)[1:]
        starts.append(carry)
    pieces: list[list[Tensor]] = []
    shared: list[Tensor] = []
    carried = list(grads[1:])
    parameters = len(arguments["feature_q"]) + len(arguments["feature_k"]) + (arguments["window_gate"] is not None)
    for (start, stop, deep), carry in zip(reversed(walk), reversed(starts), strict=True):
        named = _block(arguments, start, stop, carry) | {"decay": None, "beta": None}
        found = _gradients(partial(_run_block, what=what, deep=deep), named, [grads[0][:, start:stop], *carried])
        pieces.append(found[:3])
        own = found[3 : 3 + parameters]
        shared = own if not shared else [one + other for one, other in zip(shared, own, strict=True)]
        carried = found[3 + parameters :]
    tokens = [torch.cat([piece[index] for piece in reversed(pieces)], 1) for index in range(3)]
    unused = [torch.zeros_like(arguments[name]) for name in ("decay", "beta") if arguments[name] is not None]
    return [*tokens, *unused, *shared, *carried]


def _both(what: RecurrenceSpec) -> bool:
    return not what.causal and what.decay == "none" and what.sums


def _bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_q: Sequence[Tensor],
    feature_k: Sequence[Tensor],
    valid: Tensor | None,
    state: Tensor | None,
    seen: Tensor | None,
    spec: RecurrenceSpec,
) -> Result:
    dtype, heads = compute_dtype(q), q.shape[2]
    phi_k = features(spec.key_map, repeat_heads(k.to(dtype), heads), feature_k)
    if valid is not None:
        phi_k = phi_k * valid[:, None, :, None].to(dtype)
    value = torch.cat([v.to(dtype), v.new_ones(*v.shape[:3], 1, dtype=dtype)], -1)
    total = torch.matmul(phi_k.transpose(2, 3), repeat_heads(value, heads))
    total = total if state is None else total + state
    mixed = torch.matmul(features(spec.feature_map, q.to(dtype).transpose(1, 2), feature_q), total)
    out = normalise(mixed[..., :-1], mixed[..., -1:], spec).transpose(1, 2)
    count = torch.full((q.shape[0],), q.shape[1], dtype=torch.int64, device=q.device)
    if valid is not None:
        out = torch.where(valid[:, :, None, None], out, torch.zeros_like(out))
        count = valid.sum(1)
    empty = (k.new_zeros(k.shape[0], 0, *k.shape[2:]), v.new_zeros(v.shape[0], 0, *v.shape[2:]))
    return out, total, *empty, count if seen is None else count + seen


def _unpack(arguments: Arguments) -> tuple[Arguments, tuple[Tensor, Tensor]]:
    """A packed row as a padded batch of its sequences, and the (sequence, place) of each packed token."""
    q = arguments["q"]
    pieces = [bounds for _, bounds in sequences(q, arguments["cu_seqlens"])]
    lengths = torch.tensor([stop - start for start, stop in pieces], device=q.device)
    longest = int(lengths.max()) if pieces else 0
    slots = torch.arange(longest, device=q.device)[None, :]
    inside = slots < lengths[:, None]
    starts = torch.tensor([start for start, _ in pieces], device=q.device)
    source = torch.where(inside, starts[:, None] + slots, torch.zeros_like(slots))
    valid = inside if arguments["valid"] is None else inside & arguments["valid"][0][source]
    batch = arguments | {name: arguments[name][0][source] for name in ("q", "k", "v")}
    return batch | {"valid": valid, "cu_seqlens": None}, tuple(torch.nonzero(inside, as_tuple=True))  # type: ignore[return-value]


def feature_width(arguments: Arguments) -> Any:
    """F of the state of these arguments."""
    return width(RecurrenceSpec.parse(arguments["spec"]).key_map, arguments["k"].shape[3], arguments["feature_k"])
