"""States every axis of the recurrence token by token: the judge of faster forms, and the form of axes that have none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from subquad.kernels.features import features, gate, normalise, repeat_heads, width
from subquad.kernels.spec import RecurrenceSpec

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def recurrence_reference(
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
    dtype: torch.dtype = torch.float64,
) -> Result:
    """Arguments and meaning of the operator subquad::recurrence, computed in `dtype`; differentiable; outputs are not
    cast down.
    """
    what = RecurrenceSpec.parse(spec)
    rows = []
    for row, (start, stop) in sequences(q, cu_seqlens):
        index = slice(row, row + 1) if cu_seqlens is None else slice(0, 1)
        part = (index, slice(start, stop))
        live = list(range(stop - start)) if valid is None else torch.nonzero(valid[part][0]).flatten().tolist()
        log_decay = None if decay is None else (decay.expand(stop - start, -1) if decay.dim() == 1 else decay[part][0])
        first = None
        if state is not None and window_k is not None and window_v is not None and seen is not None:
            first = (state[row].to(dtype), window_k[row].to(dtype), window_v[row].to(dtype), int(seen[row]))
        fq = features(what.feature_map, repeat_heads(q[part].to(dtype), q.shape[2]), feature_q)[0]
        one = _Sequence(what, q.shape[2], window_gate, feature_k, dtype, first, k.shape, v.shape[3])
        outputs = one.run(
            q[part][0].to(dtype), k[part][0].to(dtype), v[part][0].to(dtype), fq,
            None if log_decay is None else log_decay.to(dtype), None if beta is None else beta[part][0].to(dtype), live,
        )  # fmt: skip
        rows.append((outputs, *one.final(q.device)))
    outs, states, keys, values, counts = zip(*rows, strict=True)
    o = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)[None]
    return o, torch.stack(states), torch.stack(keys), torch.stack(values), torch.stack(counts)


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, tuple[int, int]]]:
    """(index, (start, stop)) of each sequence: the batch rows, or the pieces of a packed row. Raises ValueError if
    both.
    """
    if cu_seqlens is None:
        return [(row, (0, q.shape[1])) for row in range(q.shape[0])]
    bounds = cu_seqlens.tolist()
    if q.shape[0] != 1 or bounds[0] != 0 or bounds[-1] != q.shape[1]:
        raise ValueError(
            f"recurrence got cu_seqlens {bounds} for q {list(q.shape)}; packed input has B = 1 and ends at T."
        )
    return list(enumerate(itertools.pairwise(bounds)))


class _Sequence:
    """One sequence: linear state [H, F, V + 1] and the list of held (number, k, v) of its window."""

    def __init__(
        self,
        spec: RecurrenceSpec,
        heads: int,
        window_gate: Tensor | None,
        feature_k: Sequence[Tensor],
        dtype: torch.dtype,
        first: tuple[Tensor, Tensor, Tensor, int] | None,
        key_shape: Sequence[int],
        value_width: int,
    ) -> None:
        self.spec, self.heads, self.feature_k, self.dtype = spec, heads, feature_k, dtype
        self.kv_heads, self.key_width, self.value_width = key_shape[2], key_shape[3], value_width
        self.held: list[tuple[int, Tensor, Tensor]] = []
        if first is None:
            device = feature_k[0].device if feature_k else None
            features_width = width(spec.feature_map, self.key_width, feature_k)
            self.state = torch.zeros(heads, features_width, value_width + 1, dtype=dtype, device=device)
            self.count = 0
        else:
            self.state, keys, values, self.count = first
            for number in range(self.count):
                if number < spec.sinks or number >= max(spec.sinks, self.count - spec.window):
                    slot = self.slot(number)
                    if slot is not None:
                        self.held.append((number, keys[slot], values[slot]))
        self.log_gamma = gate(window_gate, spec, self.state)

    def slot(self, number: int) -> int | None:
        if number < self.spec.sinks:
            return number
        return self.spec.sinks + (number - self.spec.sinks) % self.spec.window if self.spec.window else None

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        fq: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        live: list[int],
    ) -> Tensor:
        outputs = [q.new_zeros(self.heads, self.value_width) for _ in range(q.shape[0])]
        for token in live:
            if log_decay is not None:
                rate = torch.exp(log_decay[token])
                self.state = self.state * (rate[:, None, None] if rate.dim() == 1 else rate[:, :, None])
            self.held.append((self.count, k[token], v[token]))
            if self.spec.window == 0 or self.spec.branch == "convex":
                self.absorb(k[token], v[token], None if beta is None else beta[token])
            oldest = self.count - self.spec.window
            for number, key, value in self.held:
                if self.spec.sinks <= number <= oldest and self.spec.window and self.spec.branch == "shared":
                    self.absorb(key, value, None)
            self.held = [item for item in self.held if item[0] < self.spec.sinks or item[0] > oldest]
            self.count += 1
            if self.spec.causal:
                outputs[token] = self.read(q[token], fq[:, token])
        if not self.spec.causal:
            for token in live:
                outputs[token] = self.read(q[token], fq[:, token])
        return torch.stack(outputs) if outputs else q.new_zeros(0, self.heads, self.value_width)

    def absorb(self, key: Tensor, value: Tensor, beta: Tensor | None) -> None:
        group = self.heads // self.kv_heads
        phi = features(self.spec.feature_map, key.repeat_interleave(group, 0)[None, :, None, :], self.feature_k)[
            0, :, 0
        ]
        value = value.repeat_interleave(group, 0)
        if self.spec.update == "delta":
            value = value - torch.einsum("hf,hfv->hv", phi, self.state[..., :-1])
            value = value if beta is None else beta[:, None] * value
        self.state = self.state + phi[:, :, None] * torch.cat([value, torch.ones_like(value[:, :1])], -1)[:, None, :]

    def read(self, q: Tensor, fq: Tensor) -> Tensor:
        linear = torch.einsum("hf,hfv->hv", fq, self.state)
        numerator, denominator = linear[:, :-1], linear[:, -1:]
        if not self.spec.window:
            return normalise(numerator, denominator, self.spec)
        group = self.heads // self.kv_heads
        keys = torch.stack([key for _, key, _ in self.held]).repeat_interleave(group, 1)
        values = torch.stack([value for _, _, value in self.held]).repeat_interleave(group, 1)
        score = torch.einsum("hk,nhk->hn", q, keys) * self.spec.scale
        weight = torch.exp(score - score.amax(-1, keepdim=True))
        gamma = torch.exp(self.log_gamma)[:, None]
        near, mass = torch.einsum("hn,nhv->hv", weight, values), weight.sum(-1, keepdim=True)
        if self.spec.branch == "convex":
            return gamma * near / mass + (1 - gamma) * normalise(numerator, denominator, self.spec)
        return (gamma * near + numerator) / (gamma * mass + denominator)

    def final(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shape = (self.spec.sinks + self.spec.window, self.kv_heads)
        keys = [torch.zeros(self.kv_heads, self.key_width, dtype=self.dtype, device=device)] * shape[0]
        values = [torch.zeros(self.kv_heads, self.value_width, dtype=self.dtype, device=device)] * shape[0]
        for number, key, value in self.held:
            slot = self.slot(number)
            if slot is not None:
                keys[slot], values[slot] = key, value
        empty = torch.zeros(0, self.kv_heads, 1, dtype=self.dtype, device=device)
        return (
            self.state,
            torch.stack(keys) if keys else empty.expand(0, self.kv_heads, self.key_width),
            torch.stack(values) if values else empty.expand(0, self.kv_heads, self.value_width),
            torch.tensor(self.count, dtype=torch.int64, device=device),
        )
