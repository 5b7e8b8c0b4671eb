"""States every axis of the recurrence token by token: the judge of the faster forms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.features import features, gate, normalise, width
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
    given = {
        "decay": decay, "beta": beta, "feature_q": [w.to(dtype) for w in feature_q],
        "feature_k": [w.to(dtype) for w in feature_k], "window_gate": window_gate,
    }  # fmt: skip
    rows = []
    for row, (start, stop) in sequences(q, cu_seqlens):
        index = row if cu_seqlens is None else 0
        first = None
        if state is not None and window_k is not None and window_v is not None and seen is not None:
            first = (state[row].to(dtype), window_k[row].to(dtype), window_v[row].to(dtype), int(seen[row]))
        live = list(range(stop - start))
        if valid is not None:
            live = torch.nonzero(valid[index, start:stop]).flatten().tolist()
        tokens = {
            name: x if x is None or x.dim() == 1 else x[index, start:stop].to(dtype)
            for name, x in (("q", q), ("k", k), ("v", v), ("decay", decay), ("beta", beta))
        }
        rows.append(_Sequence(what, given | tokens, first).run(live))
    if not rows:
        return _nothing(q, k, v, what, width(what.key_map, k.shape[3], feature_k), dtype)
    outs, states, keys, values, counts = zip(*rows, strict=True)
    o = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)[None]
    return o, torch.stack(states), torch.stack(keys), torch.stack(values), torch.stack(counts)


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, tuple[int, int]]]:
    """(index, (start, stop)) of each sequence: the batch rows, or the pieces of a packed row. Raises ValueError for
    bounds that do not fit.
    """
    if cu_seqlens is None:
        return [(row, (0, q.shape[1])) for row in range(q.shape[0])]
    bounds = cu_seqlens.tolist()
    falls = any(start > stop for start, stop in itertools.pairwise(bounds))
    if q.shape[0] != 1 or not bounds or bounds[0] != 0 or bounds[-1] != q.shape[1] or falls:
        raise ValueError(
            f"recurrence got cu_seqlens {bounds} for q {list(q.shape)}; packed input has B = 1, and bounds rise from 0 to T."
        )
    return list(enumerate(itertools.pairwise(bounds)))


def _nothing(q: Tensor, k: Tensor, v: Tensor, what: RecurrenceSpec, features_width: int, dtype: torch.dtype) -> Result:
    slots = what.sinks + what.window
    return (
        q.new_zeros(*q.shape[:3], v.shape[3], dtype=dtype),
        q.new_zeros(0, q.shape[2], features_width, what.columns(v.shape[3]), dtype=dtype),
        k.new_zeros(0, slots, *k.shape[2:], dtype=dtype),
        v.new_zeros(0, slots, *v.shape[2:], dtype=dtype),
        q.new_zeros(0, dtype=torch.int64),
    )


class _Sequence:
    """One sequence: linear state [H, F, V], its sums [H, F, 1], and the list of held (number, k, v) of its window."""

    def __init__(
        self, spec: RecurrenceSpec, given: dict[str, Any], first: tuple[Tensor, Tensor, Tensor, int] | None
    ) -> None:
        self.spec, self.given = spec, given
        self.q, self.k, self.v = given["q"], given["k"], given["v"]
        self.heads = self.q.shape[1]
        self.held: list[tuple[int, Tensor, Tensor]] = []
        self.empty = -torch.inf if spec.decay == "additive" else 0.0
        wide = width(spec.key_map, self.k.shape[2], given["feature_k"])
        self.state = self.v.new_zeros(self.heads, wide, self.v.shape[2])
        self.sums = self.v.new_full((self.heads, wide, 1), self.empty)
        self.count = 0
        if first is not None:
            state, keys, values, self.count = first
            self.state = state[..., : self.v.shape[2]]
            if spec.sums and (self.count or spec.decay != "additive"):
                self.sums = state[..., self.v.shape[2] :]
            for number in range(self.count):
                if number < spec.sinks or number >= max(spec.sinks, self.count - spec.window):
                    slot = self.slot(number)
                    if slot is not None:
                        self.held.append((number, keys[slot], values[slot]))
        self.log_gamma = gate(given["window_gate"], spec, self.state)

    def slot(self, number: int) -> int | None:
        if number < self.spec.sinks:
            return number
        return self.spec.sinks + (number - self.spec.sinks) % self.spec.window if self.spec.window else None

    def per_head(self, x: Tensor) -> Tensor:
        """[H or Hkv, ..] as [H, ..]."""
        return x.repeat_interleave(self.heads // x.shape[0], 0)

    def phi(self, x: Tensor, side: str) -> Tensor:
        texts = self.spec.feature_map if side == "feature_q" else self.spec.key_map
        return features(texts, self.per_head(x)[None, :, None, :], self.given[side])[0, :, 0]

    def run(self, live: Sequence[int]) -> Result:
        spec = self.spec
        linear, near = {}, {}
        for token in live:
            self.fade(token)
            key, value = self.k[token], self.v[token]
            self.held.append((self.count, key, value))
            if spec.window == 0 or spec.branch == "convex":
                self.absorb(key, value, None if self.given["beta"] is None else self.given["beta"][token])
            oldest = self.count - spec.window
            for number, old_key, old_value in self.held:
                if spec.sinks <= number <= oldest and spec.window and spec.branch == "shared":
                    self.absorb(old_key, old_value, None)
            self.held = [item for item in self.held if item[0] < spec.sinks or item[0] > oldest]
            self.count += 1
            linear[token], near[token] = self.read(token), self.near(token)
        if not spec.causal:
            self.look_ahead(live, linear)
        none = self.v.new_zeros(self.heads, self.v.shape[2])
        out = [self.mixed(*near[t], *linear[t]) if t in near else none for t in range(self.q.shape[0])]
        o = torch.stack(out) if out else self.q.new_zeros(0, *none.shape)
        return (o, *self.final())

    def look_ahead(self, live: Sequence[int], linear: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Add to each token's read what lies after it."""
        if self.given["decay"] is None:
            linear.update({token: self.read(token) for token in live})
            return
        after = _Sequence(self.spec, self.given, None)
        for token in reversed(live):
            numerator, denominator = after.read(token)
            linear[token] = (linear[token][0] + numerator, linear[token][1] + denominator)
            after.absorb(self.k[token], self.v[token], None)
            after.fade(token)

    def fade(self, token: int) -> None:
        """Decay the state by the token's gate."""
        decay = self.given["decay"]
        if decay is not None:
            now = self.per_head(decay if decay.dim() == 1 else decay[token]).to(self.state.dtype)
            rate = torch.exp(now)[:, None, None] if now.dim() == 1 else torch.exp(now)[:, :, None]
            self.state, self.sums = self.state * rate, self.sums * rate

    def absorb(self, key: Tensor, value: Tensor, beta: Tensor | None) -> None:
        phi, value = self.phi(key, "feature_k"), self.per_head(value)
        if self.spec.decay == "additive":
            total = torch.logaddexp(self.sums[..., 0], phi)
            keep = torch.exp(self.sums[..., 0] - total)[:, :, None]
            self.state = self.state * keep + torch.exp(phi - total)[:, :, None] * value[:, None, :]
            self.sums = total[:, :, None]
            return
        if self.spec.update == "delta":
            value = value - torch.einsum("hf,hfv->hv", phi, self.state)
            value = value if beta is None else self.per_head(beta)[:, None] * value
        self.state = self.state + phi[:, :, None] * value[:, None, :]
        self.sums = self.sums + phi[:, :, None]

    def read(self, token: int) -> tuple[Tensor, Tensor]:
        """(phi(q) S [H, V], phi(q).sum phi(k) [H, 1])."""
        phi = self.phi(self.q[token], "feature_q")
        linear = torch.einsum("hf,hfv->hv", phi, self.state)
        if self.spec.decay == "additive":
            return linear, torch.zeros_like(linear[:, :1])
        return linear, torch.einsum("hf,hfo->ho", phi, self.sums)

    def near(self, token: int) -> tuple[Tensor | None, Tensor | None]:
        """(sum of the window's weighted values [H, V], sum of its weights [H, 1]), the largest weight 1."""
        if not self.spec.window:
            return None, None
        keys = torch.stack([self.per_head(key) for _, key, _ in self.held])
        values = torch.stack([self.per_head(value) for _, _, value in self.held])
        score = torch.einsum("hk,nhk->hn", self.q[token], keys) * self.spec.scale
        weight = torch.exp(score - score.amax(-1, keepdim=True))
        return torch.einsum("hn,nhv->hv", weight, values), weight.sum(-1, keepdim=True)

    def mixed(self, near: Tensor | None, mass: Tensor | None, numerator: Tensor, denominator: Tensor) -> Tensor:
        if near is None or mass is None:
            return normalise(numerator, denominator, self.spec)
        gamma = torch.exp(self.log_gamma)[:, None]
        if self.spec.branch == "convex":
            return gamma * near / mass + (1 - gamma) * normalise(numerator, denominator, self.spec)
        return (gamma * near + numerator) / (gamma * mass + denominator)

    def final(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots = self.spec.sinks + self.spec.window
        keys, values = self.k.new_zeros(slots, *self.k.shape[1:]), self.v.new_zeros(slots, *self.v.shape[1:])
        for number, key, value in self.held:
            slot = self.slot(number)
            if slot is not None:
                place = (torch.arange(slots, device=keys.device) == slot)[:, None, None]
                keys, values = torch.where(place, key, keys), torch.where(place, value, values)
        sums = self.sums if self.count else torch.zeros_like(self.sums)
        state = torch.cat([self.state, sums], -1) if self.spec.sums else self.state
        return state, keys, values, torch.tensor(self.count, dtype=torch.int64, device=self.k.device)
