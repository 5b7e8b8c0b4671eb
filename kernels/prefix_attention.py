"""Registers subquad::prefix_attention: adds to softmax states what rows see of keys that they share, stored once as a tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.segments import Segment
from subquad.kernels.softmax_cpu import segment_state
from subquad.kernels.softmax_native import MOST_ROWS, Stored, add_stored, fits, pairs_seen
from subquad.kernels.softmax_partial import partial
from subquad.kernels.softmax_torch import softmax_attention_torch
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.state import merge
from subquad.kernels.visibility import Predicate

NODE = ("slot", "length", "column", "first", "rows")
"""What a row of `nodes` says: the first stored slot, how many, the position of the first, and the query rows below."""


def prefix_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, nodes: Tensor, q_positions: Tensor, o: Tensor, lse: Tensor,
    operands: Sequence[Tensor], scalars: Sequence[int], spec: str,
) -> Tensor:  # fmt: skip
    """Output [B, Tq, H, V] of softmax attention over a tree of shared keys and the keys that (o, lse) stands for.

    q [B, Tq, H, K].  k [N, Hkv, K], v [N, Hkv, V]: the slots of all nodes, each stored once.  nodes int64 [n, 5], see NODE:
    the query rows first .. first + rows - 1 read the slots slot .. slot + length - 1, whose positions count from `column`;
    the nodes of a row are disjoint.  q_positions [B, Tq].  o [B, Tq, H, V], lse [B, Tq, H] (natural, -inf for no key): the
    state over the rows' own keys, sinks included.  operands, scalars, spec: as in softmax_attention; the mask may read q,
    kv, b, h and i.

    The queries of all rows below a node are rows of one product, so that its keys are read once (Hydragen, 2402.05099,
    section 3; trees of any depth), and states merge by their log-sum-exp.  Has no gradient.
    """
    what = SoftmaxSpec.parse(spec)
    predicate = Predicate(what.mask, q.shape[0], q.shape[2], q.shape[1], q_positions, operands, scalars)
    whole = o.to(lse.dtype, copy=True, memory_format=torch.contiguous_format)
    known = lse.clone(memory_format=torch.contiguous_format)
    native: list[Stored] = []
    fitting = known.dtype == torch.float32 and fits(q, k, v)
    for slot, length, column, first, rows in nodes.tolist():
        stored, below = slice(slot, slot + length), slice(first, first + rows)
        key, value = k[None, stored], v[None, stored]
        if fitting and rows * q.shape[1] * q.shape[2] // k.shape[1] <= MOST_ROWS:
            part = _stored(q, key, value, column, below, predicate)
            if part is not None:
                native.append(part)
                continue
        plain = what.mask is None and q.device.type == "cpu"
        found = partial(q[below], key, value, what, None, None) if plain else None
        found = found or _masked(q, key, value, column, below, what, predicate)
        if found is not None:
            whole[below], known[below] = merge(whole[below], known[below], *found)
    if native:
        add_stored(q, native, whole, known, what)
    return whole.to(q.dtype)


def _stored(q: Tensor, k: Tensor, v: Tensor, column: int, below: slice, predicate: Predicate) -> Stored | None:
    """A node as the C++ form takes it; None where its mask tells heads apart."""
    first, rows = below.start, below.stop - below.start
    if predicate.mask is None:
        return Stored(k, v, first, rows, True)
    segment = _segment(q.shape[0], k, v, column)
    if predicate.over(segment)[1]:
        return Stored(k, v, first, rows, True)
    shown = pairs_seen(segment, predicate)
    if shown is None:
        return None
    shown = shown.expand(q.shape[0], q.shape[1], -1)[below].contiguous()
    return Stored(k, v, first, rows, True, visible=shown)


def _segment(batch: int, k: Tensor, v: Tensor, column: int) -> Segment:
    """A node as a segment that every row of the batch reads."""
    return Segment(k, v, torch.zeros(batch, dtype=torch.int64), 0, column, None, None)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, column: int, below: slice, spec: SoftmaxSpec, predicate: Predicate
) -> tuple[Tensor, Tensor] | None:
    """The state of the rows below a node under a mask, which is evaluated for the whole batch; None where nothing is seen."""
    batch = q.shape[0]
    if q.device.type != "cpu":
        positions = column + torch.arange(k.shape[1], device=q.device)[None]
        everyone = torch.zeros(batch, dtype=torch.int64, device=q.device)
        found = softmax_attention_torch(
            q, [k], [v], [everyone], [], [positions], predicate.q_positions, None, None, predicate.operands,
            predicate.scalars, spec.json(),
        )  # fmt: skip
        return found[0][below], found[1][below]
    state = segment_state(q, _segment(batch, k, v, column), spec, predicate, None)
    return None if state is None else (state[0][below], state[1][below])


prefix_attention = torch.library.custom_op("subquad::prefix_attention", prefix_attention_forward, mutates_args=())


@prefix_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, nodes: Tensor, q_positions: Tensor, o: Tensor, lse: Tensor,
    operands: Sequence[Tensor], scalars: Sequence[int], spec: str,
) -> Tensor:  # fmt: skip
    return torch.empty_like(o)
