"""Chooses the torch form of a recurrence, runs long inputs in blocks, and differentiates them block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from subquad.kernels import recurrence_packed as packed
from subquad.kernels.features import width
from subquad.kernels.linear_chunks import SPAN
from subquad.kernels.operator_scope import recording
from subquad.kernels.recurrence_arguments import (
    STATE,
    TOKENS,
    Arguments,
    differentiable,
    flat_gradients,
    named_gradients,
)
from subquad.kernels.recurrence_both import recurrence_both
from subquad.kernels.recurrence_by_token import Result
from subquad.kernels.recurrence_chunked import recurrence_chunked
from subquad.kernels.recurrence_lanes import CHUNK
from subquad.kernels.sizes import surely
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import RecurrenceSpec

BLOCK = 1 << 19
"""Entries of a feature tensor that the block loop handles at once (rows, heads, tokens, features): such a tensor stays in
cache, and the loop costs little beside its products."""


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

    NotImplemented, returned to a decomposition table, keeps the operator as it is: packed sequences, and delta over more
    than one chunk of tokens, whose states depend on each other chunk by chunk.
    """
    what = RecurrenceSpec.parse(spec)
    long_delta = what.update == "delta" and not surely(q.shape[1] <= CHUNK)
    if cu_seqlens is not None or long_delta or surely(q.shape[1] == 0):
        return NotImplemented
    names = ("q", "k", "v", "decay", "beta", "feature_q", "feature_k", "window_gate", "valid", *STATE)
    values = (q, k, v, decay, beta, feature_q, feature_k, window_gate, valid, state, window_k, window_v, seen)
    result = _run(dict(zip(names, values, strict=True)), what)
    return (result[0].to(q.dtype), *result[1:])


def forward(arguments: Arguments) -> Result:
    """The operator's outputs by the torch forms; not traceable."""
    q, v = arguments["q"], arguments["v"]
    what = RecurrenceSpec.parse(arguments["spec"])
    if arguments["cu_seqlens"] is not None:
        return packed.forward(arguments, forward)
    if q.shape[0] == 0 or q.shape[1] == 0:
        return _unchanged(arguments, what)
    walk = _walk(arguments, what)
    if len(walk) == 1:
        result = _run_block(arguments, what, walk[0][2])
        return (result[0].to(q.dtype), *result[1:])
    out = q.new_empty(*q.shape[:3], v.shape[3])
    carry: Sequence[Tensor | None] = [arguments[name] for name in STATE]
    for start, stop, deep in walk:
        part, *carry = _run_block(_block(arguments, start, stop, carry), what, deep)
        out[:, start:stop] = part
    return (out, *carry)  # type: ignore[return-value]


def backward(arguments: Arguments, grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of every floating input that is present, in the order of `differentiable`, for grads of (o, state,
    window_k, window_v).

    Blocks are computed again from the last to the first, so that memory is O(BLOCK) beside inputs, gradients and one
    state per block.
    """
    if arguments["cu_seqlens"] is not None:
        return packed.backward(arguments, grads, backward)
    what = RecurrenceSpec.parse(arguments["spec"])
    if arguments["q"].shape[0] == 0 or arguments["q"].shape[1] == 0:
        return _gradients(partial(_unchanged, what=what), arguments, grads)
    walk = _walk(arguments, what)
    carry: Sequence[Tensor | None] = [arguments[name] for name in STATE]
    starts = [carry]
    for start, stop, deep in walk[:-1]:
        carry = _run_block(_block(arguments, start, stop, carry), what, deep, silent=True)[1:]
        starts.append(carry)
    total: dict[str, Any] = {}
    pieces: dict[str, list[Tensor]] = {}
    carried = list(grads[1:])
    for (start, stop, deep), carry in zip(reversed(walk), reversed(starts), strict=True):
        block = _block(arguments, start, stop, carry)
        found = named_gradients(
            block,
            _gradients(
                partial(_run_block, what=what, deep=deep, differentiated=True),
                block,
                [grads[0][:, start:stop], *carried],
            ),
        )
        if len(walk) > 1:
            carried = [found.pop(name) for name in STATE[:3] if name in found]
        for name, grad in found.items():
            if name in TOKENS and block[name].dim() > 1:
                pieces.setdefault(name, []).append(grad)
            elif isinstance(grad, list):
                total[name] = (
                    [one + other for one, other in zip(total[name], grad, strict=True)] if name in total else grad
                )
            else:
                total[name] = total[name] + grad if name in total else grad
    if len(walk) > 1 and arguments["state"] is not None:
        total |= dict(zip(STATE[:3], carried, strict=True))
    total |= {name: torch.cat(grads[::-1], 1) for name, grads in pieces.items()}
    return flat_gradients(total)


def feature_width(arguments: Arguments) -> Any:
    """F of the state of these arguments."""
    return width(RecurrenceSpec.parse(arguments["spec"]).key_map, arguments["k"].shape[3], arguments["feature_k"])


def _run(
    named: Arguments,
    what: RecurrenceSpec,
    deep: bool = False,
    gentle: bool = False,
    differentiated: bool = False,
    silent: bool = False,
) -> Result:
    names = ("q", "k", "v", "decay", "feature_q", "feature_k", "valid", "state", "seen")
    given = {name: named[name] for name in names}
    if not what.causal:
        return recurrence_both(**given, spec=what)
    given |= {name: named[name] for name in ("beta", "window_gate", "window_k", "window_v")}
    return recurrence_chunked(
        **given, spec=what, deep=deep, gentle=gentle, differentiated=differentiated, silent=silent
    )


def _run_block(
    named: Arguments, what: RecurrenceSpec, deep: bool, differentiated: bool = False, silent: bool = False
) -> Result:
    """`_run` for values at hand: gates that stay open enough take the cheaper products."""
    decay = named["decay"]
    gentle = decay is not None and decay.numel() > 0 and float(decay.detach().amin()) * CHUNK >= -SPAN
    return _run(named, what, deep, gentle, differentiated, silent)


def _unchanged(arguments: Arguments, what: RecurrenceSpec) -> Result:
    """The outputs of a call without tokens: the state as it was."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    slots = what.sinks + what.window
    if arguments["state"] is not None:
        state, window_k, window_v, seen = (arguments[name] for name in STATE)
        free = (torch.arange(slots, device=q.device) >= seen[:, None])[..., None, None]
        return o, state.clone(), window_k.masked_fill(free, 0), window_v.masked_fill(free, 0), seen.clone()
    shape = (q.shape[0], q.shape[2], feature_width(arguments), what.columns(v.shape[3]))
    return (
        o,
        q.new_zeros(shape, dtype=compute_dtype(q)),
        k.new_zeros(k.shape[0], slots, *k.shape[2:]),
        v.new_zeros(v.shape[0], slots, *v.shape[2:]),
        q.new_zeros(q.shape[0], dtype=torch.int64),
    )


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
        if not pairs:
            return [torch.zeros_like(one) for one in inputs]
        found = torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True)]


def _block(arguments: Arguments, start: int, stop: int, carry: Sequence[Tensor | None]) -> Arguments:
    tokens = {name: arguments[name] for name in TOKENS if arguments[name] is not None and arguments[name].dim() > 1}
    part = {name: value[:, start:stop] for name, value in tokens.items()}
    return arguments | part | dict(zip(STATE, carry, strict=True))


def _walk(arguments: Arguments, what: RecurrenceSpec) -> list[tuple[int, int, bool]]:
    """(start, stop, deep) of each block; deep when every row has surely seen sinks + window tokens before it."""
    batch, total, heads, _ = arguments["q"].shape
    if not what.causal:
        return [(0, total, False)]
    columns = max(feature_width(arguments), arguments["v"].shape[3])
    size = max(BLOCK // (batch * heads * columns) // CHUNK, 1) * CHUNK
    seen = 0 if arguments["seen"] is None or not what.window else int(arguments["seen"].min())
    sure = arguments["valid"] is None
    return [
        (start, min(start + size, total), sure and seen + start >= what.sinks + what.window)
        for start in range(0, total, size)
    ]
