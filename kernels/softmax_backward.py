"""Computes the gradients of softmax attention piece by piece, each with the log-sum-exp of the whole rows; memory is O(T)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.segments import Segment, segments
from subquad.kernels.sharing import Run, runs
from subquad.kernels.softmax_partial_backward import Spread, partial_backward
from subquad.kernels.softmax_pieces import Piece, pieces, slots_of, take, trimmed, visible_parts
from subquad.kernels.softmax_torch import compute_dtype
from subquad.kernels.spec import SoftmaxSpec
from subquad.kernels.visibility import Predicate


def softmax_attention_backward(
    grad_o: Tensor,
    grad_lse: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    rows: Sequence[Tensor],
    lengths: Sequence[Tensor],
    positions: Sequence[Tensor],
    q_positions: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    operands: Sequence[Tensor],
    scalars: Sequence[int],
    spec: str,
    bias_too: bool,
) -> list[Tensor]:
    """Gradients [q, *k, *v, bias if bias_too (with four dimensions), sinks if given].

    grad_o [B, Tq, H, V], grad_lse [B, Tq, H] (or [0] for none); o, lse: the operator's outputs. Stored rows that several
    query rows read get the sum of their gradients. The weights are exp(score - lse) whatever the segment, since lse is
    that of the whole row, sink included.
    """
    what = SoftmaxSpec.parse(spec)
    batch, q_len, heads, _ = q.shape
    dtype = compute_dtype(q)
    parts = segments(k, v, rows, lengths, positions)
    predicate = Predicate(what.mask, batch, heads, q_len, q_positions, operands, scalars)
    bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
    dq = torch.zeros_like(q, dtype=dtype)
    dks, dvs = ([torch.zeros(x.shape, dtype=dtype, device=x.device) for x in side] for side in (k, v))
    dbias = torch.zeros_like(bias, dtype=dtype) if bias is not None and bias_too else None
    empty = lse == -torch.inf
    if bool(empty.any()):
        if what.empty_rows == "mean" and sinks is None:
            _add_mean(dvs, parts, grad_o.to(dtype).masked_fill(~empty[..., None], 0.0))
        grad_o, o = (x.masked_fill(empty[..., None], 0.0) for x in (grad_o, o))
        grad_lse = grad_lse.masked_fill(empty, 0.0) if grad_lse.numel() else grad_lse
        lse = lse.masked_fill(empty, torch.inf)
    whole = _Whole(q, o, lse, grad_o, grad_lse if grad_lse.numel() else None, what)
    for segment, dk, dv in zip(parts, dks, dvs, strict=True):
        for part in visible_parts(trimmed(segment), predicate) if q.numel() else []:
            at = part.first - segment.first
            here = slice(at, at + part.count)
            accumulators = (dq, dk[:, here], dv[:, here], slots_of(dbias, part))
            whole.add(part, predicate, slots_of(bias, part), accumulators)
    grads = [dq.to(q.dtype), *(g.to(x.dtype) for g, x in zip([*dks, *dvs], [*k, *v], strict=True))]
    if bias is not None and dbias is not None:
        grads.append(dbias.to(bias.dtype))
    if sinks is not None:
        grads.append(whole.sinks(sinks).to(sinks.dtype))
    return grads


class _Whole:
    """Queries with their whole rows' results and gradients."""

    def __init__(self, q: Tensor, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, spec: SoftmaxSpec) -> None:
        self.q, self.o, self.lse, self.do, self.dlse, self.spec = q, o, lse, do, dlse, spec

    def add(
        self, segment: Segment, predicate: Predicate, bias: Tensor | None,
        into: tuple[Tensor, Tensor, Tensor, Tensor | None],
    ) -> None:  # fmt: skip
        """Add what a segment's keys have in the gradients of (q, its k, its v, its part of the bias)."""
        groups = runs(segment.rows, self.q.shape[0])
        for piece in pieces(segment, predicate, self.spec.softcap is None and bias is None):
            offset = 0
            for slots in piece.slots:
                size = slots.stop - slots.start
                visible = None if piece.visible is None else piece.visible[..., offset : offset + size]
                for run in groups:
                    self._run(segment, piece, slots, run, visible, bias, into)
                offset += size

    def _run(
        self, segment: Segment, piece: Piece, slots: slice, run: Run, visible: Tensor | None, bias: Tensor | None,
        into: tuple[Tensor, Tensor, Tensor, Tensor | None],
    ) -> None:  # fmt: skip
        dq, dk, dv, dbias = into
        local = bias if bias is None or bias.shape[2] == 1 else bias[:, :, piece.rows]
        local = local if local is None or local.shape[3] == 1 else take(local, (slots,), 3)
        q, o, lse, do = (run.queries(x[:, piece.rows]) for x in (self.q, self.o, self.lse, self.do))
        dlse = None if self.dlse is None else run.queries(self.dlse[:, piece.rows])
        shown, extra = (None if x is None else run.queries(x) for x in (visible, local))
        spread = None if dbias is None else _spread(dbias, run, piece.rows, slots)
        stored = slice(run.start, run.start + run.stored)
        found = partial_backward(
            q, segment.k[stored, slots], segment.v[stored, slots], (o, lse), (do, dlse), self.spec, shown, extra,
            piece.causal, spread,
        )  # fmt: skip
        if run.order is None:
            dq[:, piece.rows] += found[0]
        else:
            dq[:, piece.rows].index_add_(0, run.order, found[0].to(dq.dtype))
        dk[stored, slots] += found[1]
        dv[stored, slots] += found[2]

    def sinks(self, sinks: Tensor) -> Tensor:
        """Gradient [H] of the sinks: a sink is a key with score sink and no value."""
        shift = -(self.do.to(self.lse.dtype) * self.o.to(self.lse.dtype)).sum(-1)
        shift = shift if self.dlse is None else shift + self.dlse
        return (torch.exp(sinks.to(self.lse.dtype) - self.lse) * shift).sum((0, 1))


def _spread(dbias: Tensor, run: Run, rows: slice, slots: slice) -> Spread:
    """Adds gradients of scores to the gradient of the bias, summed over the dimensions that it was broadcast along."""

    def add(dscore: Tensor, inner_rows: slice, inner_slots: slice) -> None:
        target = dbias
        if target.shape[2] > 1:
            target = target[:, :, rows][:, :, inner_rows]
        if target.shape[3] > 1:
            target = target[..., slots][..., inner_slots]
        for dim in range(4):
            if dbias.shape[dim] == 1 and dscore.shape[dim] != 1:
                dscore = dscore.sum(dim, keepdim=True)
        if run.order is None or dbias.shape[0] == 1:
            target += dscore
        else:
            target.index_add_(0, run.order, dscore)

    return add


def _add_mean(dvs: Sequence[Tensor], parts: Sequence[Segment], do: Tensor) -> None:
    """Add the gradient of rows that put out the mean of their live values; do [B, Tq, H, V] is 0 on all others."""
    lives = [part.live() for part in parts]
    counts = [
        torch.full((do.shape[0], 1), part.count, device=do.device) if live is None else live.sum(-1)
        for part, live in zip(parts, lives, strict=True)
    ]
    total = torch.stack([count.expand(do.shape[0], 1) for count in counts]).sum(0).clamp_min(1)
    share = do.sum(1).unflatten(1, (parts[0].k.shape[2], -1)).sum(2) / total[..., None]
    for dv, part, live in zip(dvs, parts, lives, strict=True):
        spread = share[:, None].expand(-1, part.count, -1, -1)
        spread = spread if live is None else spread * live[:, 0, :, None, None]
        if part.rows is None:
            dv += spread
        else:
            dv.index_add_(0, part.rows, spread.contiguous())
