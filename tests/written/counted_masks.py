"""Masks that people compute: documents, lengths, blocks, prefixes, by cumulative sums, searches, writes and tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case

VOCABULARY, WIDTH, HEADS, SIZE = 30, 32, 4, 8
END = 2
Tensor = torch.Tensor


class Masked(nn.Module):
    """Embedded ids and one attention under a mask made from ids and a second input; `add` says that the mask is added."""

    def __init__(self, make: Callable[..., Tensor], add: bool = False) -> None:
        super().__init__()
        self.make, self.add = make, add
        self.tok, self.qkv = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, ids: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for x in self.qkv(self.tok(ids)).chunk(3, -1))
        scores = q @ k.mT * SIZE**-0.5
        mask = self.make(ids, *more)
        scores = scores + mask if self.add else scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def lower(ids: Tensor) -> Tensor:
    t = ids.shape[1]
    return torch.ones(t, t, dtype=torch.bool, device=ids.device).tril()


def ended_documents(ids: Tensor) -> Tensor:
    """Documents counted by end tokens before each token, the end itself in the document that it ends."""
    number = torch.cumsum(ids == END, 1) - (ids == END).long()
    return (number[:, None, :, None] == number[:, None, None, :]) & lower(ids)


def ended_by_pad(ids: Tensor) -> Tensor:
    """The same count shifted by one with F.pad."""
    number = F.pad((ids == END).int().cumsum(-1)[:, :-1], (1, 0))
    same = number.unsqueeze(-1).eq(number.unsqueeze(-2)).unsqueeze(1)
    return torch.tril(same)


def searched_documents(ids: Tensor, ends: Tensor) -> Tensor:
    """Cumulative lengths (as flash attention's cu_seqlens) turned to document numbers by searchsorted."""
    at = torch.arange(ids.shape[1], device=ids.device)
    number = torch.searchsorted(ends, at, right=True)
    return (number[:, None] == number) & (at[:, None] >= at)


def bucketized_documents(ids: Tensor, ends: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1], device=ids.device)
    number = torch.bucketize(at, ends, right=True)
    return number[:, None] == number[None]


def first_of_document(ids: Tensor) -> Tensor:
    """A key is seen from the start of the query's document, which a running maximum finds."""
    at = torch.arange(ids.shape[1], device=ids.device)
    start = torch.where(F.pad(ids[:, :-1], (1, 0), value=END) == END, at, 0).cummax(-1).values
    return ((at >= start[:, :, None]) & (at <= at[:, None]))[:, None]


def blocks_by_division(ids: Tensor) -> Tensor:
    block = torch.div(torch.arange(ids.shape[1], device=ids.device), 4, rounding_mode="floor")
    return block.unsqueeze(0) == block.unsqueeze(1)


def blocks_by_repeat(ids: Tensor) -> Tensor:
    """Blocks of four by repeat_interleave of block numbers, cut to the length."""
    t = ids.shape[1]
    block = torch.arange(t, device=ids.device).repeat_interleave(4)[:t]
    return block[:, None] >= block[None]


def blocks_by_kron(ids: Tensor) -> Tensor:
    """A block diagonal of ones by a Kronecker product of fixed size, cut to the length."""
    t = ids.shape[1]
    whole = torch.kron(torch.eye(8, device=ids.device), torch.ones(4, 4, device=ids.device)) > 0
    return whole[:t, :t]


def prefix_by_write(ids: Tensor) -> Tensor:
    """A triangle whose first three columns are then opened."""
    mask = lower(ids).clone()
    mask[:, :3] = True
    return mask


def prefix_by_length(ids: Tensor, length: Tensor) -> Tensor:
    at = torch.arange(ids.shape[1], device=ids.device)
    return ((at < length[:, None])[:, None, None, :] | lower(ids)) & (at[None] >= 0)


def suffix_given(ids: Tensor, types: Tensor) -> Tensor:
    """Tokens of type zero see each other, tokens of type one see them and what is before them (token types)."""
    same = (types[:, None, :] == 0).expand(-1, types.shape[1], -1)
    return (same | lower(ids))[:, None]


def left_padding(ids: Tensor, kept: Tensor) -> Tensor:
    return (kept[:, None, None] * lower(ids).long()).bool()


def padding_by_flip(ids: Tensor, kept: Tensor) -> Tensor:
    """The mask turned around and back."""
    return kept.flip(1).flip(1)[:, None, None, :] > 0


def square_of_padding(ids: Tensor, kept: Tensor) -> Tensor:
    return torch.bmm(kept[:, :, None].float(), kept[:, None, :].float()).bool().unsqueeze(1) & lower(ids)


def band(ids: Tensor) -> Tensor:
    """A band of diagonals as the difference of two triangles."""
    ones = torch.ones(ids.shape[1], ids.shape[1], device=ids.device)
    return (ones.tril() - ones.tril(-3)).bool()


def band_by_product(ids: Tensor) -> Tensor:
    ones = torch.ones(1, 1, ids.shape[1], ids.shape[1], device=ids.device)
    return (ones.tril(2) * ones.triu(-2)) == 1


def strided_by_mod(ids: Tensor) -> Tensor:
    """Every third key, counted from the query, negative differences included."""
    at = torch.arange(ids.shape[1], device=ids.device)
    return (at[:, None] - at) % 3 == 0


def strided_by_fmod(ids: Tensor) -> Tensor:
    """The same with the sign of the dividend: zero is the same."""
    at = torch.arange(ids.shape[1], device=ids.device)
    return torch.fmod(at[:, None] - at, 3) == 0


def globals_and_window(ids: Tensor) -> Tensor:
    """The first two tokens see and are seen by all; others see a window."""
    at = torch.arange(ids.shape[1], device=ids.device)
    first = at < 2
    return first[:, None] | first[None, :] | ((at[:, None] - at[None, :]).abs() <= 2)


def globals_by_id(ids: Tensor) -> Tensor:
    """Separator tokens are global."""
    special = ids == END
    at = torch.arange(ids.shape[1], device=ids.device)
    return (special[:, None, :] | special[:, :, None] | ((at[:, None] - at).abs() < 2)).unsqueeze(1)


def excluded_self(ids: Tensor) -> Tensor:
    return ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)


def diagonal_filled(ids: Tensor) -> Tensor:
    """A strict triangle with its first row opened, so that no row is empty."""
    mask = lower(ids).tril(-1)
    return torch.cat([torch.ones_like(mask[:1]), mask[1:]])


def per_head(ids: Tensor) -> Tensor:
    """Another window for every head."""
    width = torch.tensor([1, 2, 4, 8], device=ids.device)[:, None, None]
    at = torch.arange(ids.shape[1], device=ids.device)
    distance = at[:, None] - at
    return (distance >= 0) & (distance < width)


def permuted(ids: Tensor, order: Tensor) -> Tensor:
    """A factorisation order: a key is seen when its rank is not above the query's (XLNet)."""
    return (order[:, None, :] <= order[:, :, None])[:, None]


def xor_of_spans(ids: Tensor) -> Tensor:
    """Alternate blocks of two see the other kind, and themselves."""
    kind = (torch.arange(ids.shape[1], device=ids.device) // 2) % 2 == 0
    return (kind[:, None] ^ kind[None]) | torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)


def random_blocks(ids: Tensor) -> Tensor:
    """A table of blocks fixed when the model was made, repeated to tokens."""
    table = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]], device=ids.device)
    whole = table.repeat_interleave(4, 0).repeat_interleave(4, 1).bool()
    return whole[: ids.shape[1], : ids.shape[1]]


def scattered(ids: Tensor, kept: Tensor) -> Tensor:
    """One key that every query sees, written by scatter, beside the triangle."""
    seen = torch.zeros_like(ids).scatter(1, kept.argmax(-1, keepdim=True), 1).bool()
    return seen[:, None, None] | lower(ids)


def added_triangle(ids: Tensor) -> Tensor:
    t = ids.shape[1]
    mask = torch.empty(t, t, device=ids.device).fill_(float("-inf"))
    mask.triu_(1)
    return mask


def added_inverted(ids: Tensor, kept: Tensor) -> Tensor:
    return (1.0 - kept[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min


def added_integers(ids: Tensor, kept: Tensor) -> Tensor:
    """The same from integers, multiplied before the cast."""
    return (1 - kept)[:, None, None].float() * -1e38


def added_per_query(ids: Tensor, kept: Tensor) -> Tensor:
    hidden_keys = kept[:, None, None, :] == 0
    mask = torch.zeros(1, device=ids.device).expand(ids.shape[0], 1, ids.shape[1], ids.shape[1])
    return mask.masked_fill(hidden_keys | ~lower(ids), torch.finfo(torch.float32).min)


def added_twice(ids: Tensor, kept: Tensor) -> Tensor:
    lowest = torch.finfo(torch.float32).min
    causal = torch.full((ids.shape[1],) * 2, lowest, device=ids.device).triu(1)[None, None]
    causal = causal.expand(ids.shape[0], 1, -1, -1).clone()
    hidden_keys = (causal + kept[:, None, None, :].to(causal.dtype)) == 0
    return causal.masked_fill(hidden_keys, lowest)


def ids(batch: int, time: int) -> tuple[Tensor]:
    return (torch.randint(0, 8, (batch, time)),)


def padded(left: bool) -> Callable[[int, int], tuple[Tensor, ...]]:
    def inputs(batch: int, time: int) -> tuple[Tensor, ...]:
        kept = torch.arange(time) < (time - torch.arange(batch)[:, None] * 2)
        return *ids(batch, time), (kept.flip(1) if left else kept).long()

    return inputs


def with_ends(batch: int, time: int) -> tuple[Tensor, ...]:
    return *ids(batch, time), torch.tensor([3, 5, time])


def with_lengths(batch: int, time: int) -> tuple[Tensor, ...]:
    return *ids(batch, time), torch.arange(batch) + 2


def with_types(batch: int, time: int) -> tuple[Tensor, ...]:
    return *ids(batch, time), (torch.arange(time) >= torch.arange(batch)[:, None] + 2).long()


def with_order(batch: int, time: int) -> tuple[Tensor, ...]:
    return *ids(batch, time), torch.stack([torch.randperm(time) for _ in range(batch)])


def one(
    make: Callable[..., Tensor], inputs: Any = ids, mask: str | None = None, add: bool = False, **words: Any
) -> Case:
    found = {"heads": HEADS, "scale": SIZE**-0.5, **({} if mask is None else {"mask": mask}), **words}
    return Case(make.__name__.replace("_", " "), lambda: Masked(make, add), inputs, (found,))


CASES = (
    one(ended_documents, mask="causal & documents(sub of ids)"),
    one(ended_by_pad, mask="causal & documents(pad of ids)"),
    one(searched_documents, with_ends),
    one(bucketized_documents, with_ends),
    one(first_of_document),
    one(blocks_by_division, mask="chunk(4)"),
    one(blocks_by_repeat, mask="((q // 4) >= (kv // 4))"),
    one(blocks_by_kron, mask="chunk(4)"),
    one(prefix_by_write, mask="prefix(3)"),
    one(prefix_by_length, with_lengths, mask="prefix(more_0)"),
    one(suffix_given, with_types, mask="causal | keys(more_0[b, kv] == 0)"),
    one(left_padding, padded(True), mask="causal & padding(more_0)"),
    one(padding_by_flip, padded(False), mask="keys(more_0[b, kv] >= 1)"),
    one(square_of_padding, padded(False)),
    one(band, mask="causal & window(3)"),
    one(band_by_product, mask="window(±2)"),
    one(strided_by_mod, mask="dilated(3)"),
    one(strided_by_fmod, mask="dilated(3)"),
    one(globals_and_window, mask="window(±2) | (kv <= 1) | (q <= 1)"),
    one(globals_by_id),
    one(excluded_self, mask="(kv != q)"),
    one(diagonal_filled, mask="causal(-1) | (q <= 0)"),
    one(per_head),
    one(permuted, with_order, mask="causal by more_0"),
    one(xor_of_spans),
    one(random_blocks, mask="opaque"),
    one(scattered, padded(False)),
    one(added_triangle, mask="causal", add=True),
    one(added_inverted, padded(True), add=True, biases=1),
    one(added_integers, padded(False), add=True, biases=1),
    one(added_per_query, padded(True), mask="causal & padding(more_0)", add=True),
    one(added_twice, padded(False), mask="causal & padding(more_0)", add=True),
)
