"""Runs the linear recurrence of any decay and update over chunks: products inside chunks, a scan of states between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.delta_states import Corrected, corrected
from subquad.kernels.pair_scores import channel_scores, scalar_weights, unit_inverse
from subquad.kernels.sizes import surely

FLOOR = -100.0
"""Least log decay of one token: exp of it is 0 beside 1 in fp32 and fp64, and sums of it keep their precision."""
SPAN = 60.0
"""Log decay of a chunk up to which rows may be scaled from its middle: exp of half of it, and of all of it among the entries
above the diagonal that are dropped, is far from overflow in fp32, and factors cost no relative precision."""
GROUP = 32
"""States that are joined at once by a triangle of decays; more are grouped first."""


@dataclass(frozen=True)
class Chunks:
    """One recurrence over n chunks of C tokens in L lanes (batch times heads).

    query, key [L, n, C, F] are features; value [L, n, C, V]; decay [L, n or 1, C, 1 or F] log decays of at most 0, or None;
    beta [L, n, C, 1] for the delta update, or None. A token with zero key, beta and decay changes nothing. C is a power of
    two where decay has F columns or beta is given. gentle promises that the log decays of no chunk sum to less than -SPAN.
    differentiated: gradients will be asked for. silent: outputs will not be read, and are not computed.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor | None
    beta: Tensor | None
    gentle: bool = False
    differentiated: bool = False
    silent: bool = False


def run(chunks: Chunks, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """(phi(q) S of every token [L, n, C, V], last state [L, F, V]) from the state before [L, F, V].

    With G the sum of log decays inside a chunk, D_ij = exp(G_i - G_j), A = tril(Q K^T * D), the output is
    (Q e^G) S + A V and the next state e^{G_C} S + (K e^{G_C - G})^T V; delta replaces V by U - W S with
    T = (I + tril_-1(beta K K^T * D))^-1, W = T (beta e^G K), U = T (beta V). Sources: GLA (2312.06635) §4.3, Mamba-2
    (2405.21060) §6, DeltaNet (2406.06484) §3, Gated DeltaNet (2412.06464) §3.3.
    """
    gates = _Gates(chunks.decay, chunks.gentle)
    query, key, value = chunks.query, chunks.key, chunks.value
    leaving = gates.to_end(key).transpose(-1, -2)
    faded = gates.faded(key)
    if chunks.beta is None:
        before, final = states(torch.matmul(leaving, value), gates.log_rate, start)
    else:
        if start is None:
            start = query.new_zeros(query.shape[0], key.shape[-1], value.shape[-1])
        strict = chunks.beta * gates.scores(key, faded, -1)
        inverse = unit_inverse(strict) * chunks.beta.transpose(-1, -2)
        recalled, fresh = torch.matmul(inverse, gates.from_start(key)), torch.matmul(inverse, value)
        form = Corrected.apply if chunks.differentiated else corrected
        before, value, final = form(recalled, fresh, leaving, gates.log_rate, start)  # type: ignore[no-untyped-call]
    if chunks.silent:
        return torch.empty_like(value), final
    inside = torch.matmul(gates.scores(query, faded, 0), value)
    if before is None:
        return inside, final
    out = torch.baddbmm(inside.flatten(0, 1), gates.from_start(query).flatten(0, 1), before.flatten(0, 1))
    return out.unflatten(0, inside.shape[:2]), final


class _Gates:
    """The decays of chunks, and what they do to rows and scores."""

    def __init__(self, decay: Tensor | None, gentle: bool) -> None:
        self.total = None if decay is None else decay.clamp(min=FLOOR).cumsum(2)
        self.gentle = gentle and self.total is not None
        self.weights: Tensor | None = None
        if self.total is not None and gentle:
            middle = self.total - self.total[:, :, self.total.shape[2] // 2, None]
            self.rows, self.keys = torch.exp(middle), torch.exp(-middle)
        elif self.total is not None and self.total.shape[-1] == 1:
            self.weights = scalar_weights(self.total)

    @property
    def log_rate(self) -> Tensor | None:
        """Log decay of a whole chunk, [L, n or 1, 1 or F]."""
        return None if self.total is None else self.total[:, :, -1]

    def from_start(self, rows: Tensor) -> Tensor:
        """Rows decayed since the start of their chunk, their own decay included."""
        return rows if self.total is None else rows * torch.exp(self.total)

    def to_end(self, rows: Tensor) -> Tensor:
        """Rows decayed from their token to the end of their chunk."""
        return rows if self.total is None else rows * torch.exp(self.total[:, :, -1:] - self.total)

    def faded(self, keys: Tensor) -> Tensor:
        """Keys as `scores` takes them."""
        return keys * self.keys if self.gentle else keys

    def scores(self, rows: Tensor, faded: Tensor, diagonal: int) -> Tensor:
        """sum_f rows_if keys_jf exp(G_if - G_jf) up to the given diagonal, else 0."""
        if self.total is not None and not self.gentle:
            if self.weights is None:
                scores = channel_scores(rows, faded, self.total.expand_as(faded))
            else:
                scores = torch.matmul(rows, faded.transpose(-1, -2)) * self.weights
            return scores.tril(-1) if diagonal else scores
        rows = rows * self.rows if self.gentle else rows
        return torch.matmul(rows, faded.transpose(-1, -2)).tril(diagonal)


def states(added: Tensor, log_rate: Tensor | None, start: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """States before each chunk [L, n, F, V] (None: all zero) and after the last [L, F, V].

    S_c+1 = exp(log_rate_c) S_c + added_c from `start` (None: zero); added [L, n, F, V], log_rate [L, n or 1, 1 or F].
    Up to GROUP chunks are joined by one product with their triangle of decays; longer runs group by group, whose totals
    are joined likewise, so that any symbolic count has a form of fixed depth.
    """
    count = added.shape[1]
    if surely(count == 1):
        final = added[:, 0]
        if start is None:
            return None, final
        return start[:, None], final + (start if log_rate is None else start * torch.exp(log_rate[:, 0])[..., None])
    if surely(count <= GROUP):
        return _triangle(added, log_rate, start)
    if log_rate is None:
        before = torch.cat([torch.zeros_like(added[:, :1]), added.cumsum(1)], 1)
        before = before if start is None else before + start[:, None]
        return before[:, :-1], before[:, -1]
    groups: Any = (count + GROUP - 1) // GROUP
    if not isinstance(count, int):
        groups = groups + 1  # one group of padding: a symbolic count of at least 2 needs no guard for the size 1
    missing = groups * GROUP - count
    log_rate = log_rate.expand(-1, count, -1)
    pad, shape = torch.nn.functional.pad, (groups, GROUP)
    added = pad(added, (0, 0, 0, 0, 0, missing)).unflatten(1, shape)
    log_rate = pad(log_rate, (0, 0, 0, missing)).unflatten(1, shape)
    inner, totals = _triangle(added.flatten(0, 1), log_rate.flatten(0, 1), None)
    join = states if isinstance(count, int) else _triangle
    outer, final = join(totals.unflatten(0, added.shape[:2]), log_rate.sum(2), start)
    assert outer is not None
    passed = torch.exp(log_rate.cumsum(2) - log_rate)[..., None] * outer[:, :, None]
    before = (inner.unflatten(0, added.shape[:2]) + passed).flatten(1, 2)
    return before[:, :count], final


def _triangle(added: Tensor, log_rate: Tensor | None, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """`states` by one product of [n + 1, n] decays with what the chunks add."""
    lanes, count, width, columns = added.shape
    ones = torch.ones(count + 1, count, dtype=torch.bool, device=added.device).tril(-1)
    if log_rate is None:
        joined = torch.matmul(ones.to(added.dtype), added.flatten(2)).unflatten(2, (width, columns))
        joined = joined if start is None else joined + start[:, None]
        return joined[:, :-1], joined[:, -1]
    total = torch.nn.functional.pad(log_rate.expand(-1, count, -1).cumsum(1), (0, 0, 1, 0))
    gaps = total.transpose(1, 2)[..., None] - total.transpose(1, 2)[..., None, 1:]
    decays = torch.exp(gaps.masked_fill(~ones, -torch.inf))
    if total.shape[-1] == 1:
        joined = torch.matmul(decays[:, 0], added.flatten(2)).unflatten(2, (width, columns))
    else:
        joined = torch.matmul(decays, added.transpose(1, 2)).transpose(1, 2)
    if start is not None:
        joined = joined + torch.exp(total)[..., None] * start[:, None]
    return joined[:, :-1], joined[:, -1]
