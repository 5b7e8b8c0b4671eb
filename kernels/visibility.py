"""Says which query-key pairs a mask predicate shows: pair by pair, for a whole segment at once, or by blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from subquad.kernels.evaluation import evaluate
from subquad.kernels.expression import parse
from subquad.kernels.intervals import block_tests
from subquad.kernels.segments import Segment

CAUSAL = frozenset({"q >= kv", "kv <= q", "(q >= kv)", "(kv <= q)"})
"""Texts of the causal mask."""
DENSE_PAIRS = 256 * 256
"""Query-key pairs up to which a mask is evaluated for all pairs at once."""


def predicate_env(
    mask: str, batch: Any, heads: int, query: Tensor, position: Tensor, operands: Sequence[Tensor],
    scalars: Sequence[int], first: Any = 0,
) -> dict[str, Any]:  # fmt: skip
    """What `evaluate` needs for the mask: index tensors that broadcast to [B, H, Tq, N], tables and scalars.

    query [1 or B, Tq], position [1 or B, 1 or Hkv, N]; first: the slots before these.
    """
    device, names = position.device, parse(mask).names
    env: dict[str, Any] = {"q": query[:, None, :, None], "kv": per_head(position, heads)}
    if "b" in names:
        env["b"] = torch.arange(batch, device=device)[:, None, None, None]
    if "h" in names:
        env["h"] = torch.arange(heads, device=device)[None, :, None, None]
    if "i" in names:
        env["i"] = torch.arange(query.shape[1], device=device)[None, None, :, None]
    if "j" in names:
        env["j"] = (first + torch.arange(position.shape[2], device=device))[None, None, None, :]
    return env | _constants(operands, scalars)


def _constants(operands: Sequence[Tensor], scalars: Sequence[int]) -> dict[str, Any]:
    tables: dict[str, Any] = {f"t{index}": table for index, table in enumerate(operands)}
    return tables | {f"s{index}": number for index, number in enumerate(scalars)}


def per_head(slots: Tensor, heads: int) -> Tensor:
    """[1 or B, 1 or Hkv, N] as [1 or B, 1 or H, 1, N]."""
    if slots.shape[1] > 1:
        slots = slots.repeat_interleave(heads // slots.shape[1], 1)
    return slots[:, :, None, :]


def query_positions(q: Tensor, q_positions: Tensor | None) -> Tensor:
    """Logical query indices [1 or B, Tq]."""
    return torch.arange(q.shape[1], device=q.device)[None, :] if q_positions is None else q_positions


def visibility(mask: str | None, env: dict[str, Any], seen: Tensor | None) -> Tensor | None:
    """Bool [1 or B, 1 or H, 1 or Tq, N] of the pairs seen, or None where every pair is; seen: [.., N], which slots live."""
    if mask is None:
        return seen
    holds = evaluate(mask, env)
    if not isinstance(holds, Tensor):
        holds = torch.full_like(env["kv"], bool(holds), dtype=torch.bool)
    while holds.dim() < 4:
        holds = holds[None]
    holds = holds.expand(*holds.shape[:3], env["kv"].shape[-1])
    return holds if seen is None else holds & seen


@dataclass(frozen=True)
class Predicate:
    """The mask of one call and what it reads; mask None shows every pair. Looks at values, so it is not traceable."""

    mask: str | None
    batch: int
    heads: int
    q_len: int
    q_positions: Tensor | None
    operands: Sequence[Tensor]
    scalars: Sequence[int]

    def pairs(self, segment: Segment) -> dict[str, Any]:
        """The environment of `visibility` for all queries and the segment's slots."""
        if self.mask is None:
            return {}
        query = self.q_positions
        if query is None:
            query = torch.arange(self.q_len, device=segment.k.device)[None, :]
        return predicate_env(
            self.mask, self.batch, self.heads, query, segment.position(), self.operands, self.scalars, segment.first
        )

    def over(self, segment: Segment) -> tuple[bool, bool]:
        """(may any pair of the segment be visible, are all of them visible), as far as intervals tell."""
        if self.mask is None:
            return True, True
        maybe, always = block_tests(self.mask)
        if always == "False" and (maybe == "True" or self.q_len * segment.count <= DENSE_PAIRS):
            return True, False
        needed = parse(maybe, "test").names | parse(always, "test").names
        env = _constants(self.operands, self.scalars)
        for name in ("q", "kv"):
            if needed & {f"{name}_lo", f"{name}_hi"}:
                env[f"{name}_lo"], env[f"{name}_hi"] = self._query_bounds if name == "q" else _key_bounds(segment)
        env |= {"i_lo": 0, "i_hi": self.q_len - 1, "j_lo": segment.first, "j_hi": segment.first + segment.count - 1}
        if "b" in needed:
            env["b"] = torch.arange(self.batch, device=self._device)[:, None, None, None]
        if "h" in needed:
            env["h"] = torch.arange(self.heads, device=self._device)[None, :, None, None]
        found = [evaluate(text, env, "test") for text in (maybe, always)]
        some, every = (x if isinstance(x, bool) else torch.as_tensor(x) for x in found)
        return bool(some if isinstance(some, bool) else some.any()), bool(
            every if isinstance(every, bool) else every.all()
        )

    @property
    def _device(self) -> torch.device:
        return self.operands[0].device if self.operands else torch.device("cpu")

    @functools.cached_property
    def _query_bounds(self) -> tuple[int, int]:
        if self.q_positions is None:
            return 0, self.q_len - 1
        low, high = torch.aminmax(self.q_positions)
        return int(low), int(high)

    def blocks(self, env: dict[str, Any], size: int) -> tuple[Tensor, Tensor]:
        """Bool [query blocks, key blocks] of `size` rows and slots each: may any pair be visible, are all visible, over all
        batch rows and heads; env: of `pairs`.
        """
        assert self.mask is not None
        k_len = env["kv"].shape[3]
        shape = (-(-self.q_len // size), -(-k_len // size))
        bounds: dict[str, Any] = {}
        for name, length, dim in (("q", self.q_len, 2), ("i", self.q_len, 2), ("kv", k_len, 3), ("j", k_len, 3)):
            if name in env:
                ends = _block_bounds(env[name].movedim(dim, -1), length, size)
                bounds[f"{name}_lo"], bounds[f"{name}_hi"] = (end.movedim(-1, dim) for end in ends)
        found = []
        for text in block_tests(self.mask):
            value = torch.as_tensor(evaluate(text, env | bounds, "test"))
            found.append(value.expand(*torch.broadcast_shapes(value.shape, (1, 1, *shape))))
        return found[0].flatten(0, 1).any(0), found[1].flatten(0, 1).all(0)


def _key_bounds(segment: Segment) -> tuple[int, int]:
    if segment.places is not None:
        low, high = torch.aminmax(segment.places)
        return int(low), int(high)
    if isinstance(segment.base, Tensor):
        low, high = torch.aminmax(segment.base)
        return int(low), int(high) + segment.count - 1
    return segment.base, segment.base + segment.count - 1


def _block_bounds(index: Tensor, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value [.., blocks] of index [.., length] in blocks of `size`."""
    blocks = -(-length // size)
    padded = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], blocks * size - length)], -1)
    grouped = padded.unflatten(-1, (blocks, size))
    return grouped.amin(-1), grouped.amax(-1)
