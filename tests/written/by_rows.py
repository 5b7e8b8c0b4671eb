"""Heads in groups with biases of their own, and rows of probabilities that are scaled or emptied as a whole."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8
Tensor = torch.Tensor


class Attention(nn.Module):
    """Projections and heads; subclasses say what happens between the product and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate = nn.Parameter(torch.randn(HEADS))
        self.row_gate = nn.Linear(WIDTH, 1)

    def heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of the source, [B, H, T, D]."""
        return tuple(
            f(y).unflatten(-1, (HEADS, SIZE)).transpose(1, 2)
            for f, y in ((self.query, x), (self.key, source), (self.value, source))
        )  # type: ignore[return-value]

    def joined(self, o: Tensor) -> Tensor:
        """Heads side by side, projected."""
        return self.out(o.transpose(1, 2).flatten(2))


class GroupedBiases(Attention):
    """Half of the heads look near, the others far: scores are split by groups of heads, biased and joined again."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, ...]], order: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.split, self.order = split, order

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x, x)
        scores = q @ k.transpose(-1, -2) * SIZE**-0.5
        place = torch.arange(x.shape[1], device=x.device)
        distance = (place[:, None] - place[None, :]).abs().to(x.dtype)
        near, far = self.split(scores)
        biased = near - distance, far + distance.sqrt()[None]
        scores = torch.cat([biased[n] for n in self.order], dim=1)
        future = place[None, :] > place[:, None]
        return self.joined(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)


class MediaCross(Attention):
    """Text attends to the picture before it, and text before the first picture to nothing (Flamingo, §2.3)."""

    def __init__(self, all_before: bool) -> None:
        super().__init__()
        self.all_before = all_before

    def forward(self, text: Tensor, media: Tensor, places: Tensor) -> Tensor:
        b, pictures, patches, _ = media.shape
        q, k, v = self.heads(text, media.reshape(b, pictures * patches, WIDTH))
        scores = torch.einsum("bhid,bhjd->bhij", q * SIZE**-0.5, k)
        seen = places.cumsum(-1)
        number = (torch.arange(pictures, device=text.device) + 1).repeat_interleave(patches)
        compare = torch.ge if self.all_before else torch.eq
        mask = compare(seen[:, None, :, None], number[None, None, None, :])
        scores = scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        p = scores.softmax(-1).masked_fill((seen == 0)[:, None, :, None], 0.0)
        return self.joined(torch.einsum("bhij,bhjd->bhid", p, v))


class Gated(Attention):
    """Probabilities times a number per head, and per query."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x, x)
        p = F.softmax(q @ k.transpose(-1, -2) * SIZE**-0.5, dim=-1) * self.gate.sigmoid().view(1, -1, 1, 1)
        p = F.dropout(p * self.row_gate(x).sigmoid()[:, None], 0.1, self.training)
        return self.joined(p @ v)


class KeyGated(Attention):
    """Probabilities times a number per key, which is no row's."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x, x)
        p = F.softmax(q @ k.transpose(-1, -2) * SIZE**-0.5, dim=-1) * self.row_gate(x).sigmoid()[:, None].mT
        return self.joined(p @ v)


class EmptyRows(Attention):
    """Rows without any key are zeroed by what the mask says, not by what the scores hold."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(x, x)
        scores = (q @ k.transpose(-1, -2) * SIZE**-0.5).masked_fill(~mask[:, None], -torch.inf)
        some = mask.any(-1, keepdim=True)[:, None]
        p = torch.where(some, scores.softmax(-1), torch.zeros_like(scores))
        return self.joined(p @ v)


def _media(batch: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.zeros(batch, time, dtype=torch.bool)
    places[:, 2] = places[0, 5] = True
    return torch.randn(batch, time, WIDTH), torch.randn(batch, 2, 3, WIDTH), places


def _masked(batch: int, time: int) -> tuple[Tensor, Tensor]:
    mask = torch.rand(batch, time, time) > 0.4
    mask[0, 3] = False
    return torch.randn(batch, time, WIDTH), mask


def _sliced(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores[:, :1], scores[:, 1:]


CASES = [
    Case("biases of chunks of heads", lambda: GroupedBiases(lambda s: s.chunk(2, dim=1)), hidden(), ({"mask": "causal"},)),
    Case("biases of uneven groups", lambda: GroupedBiases(lambda s: s.split([1, 3], dim=1)), hidden(), ({"mask": "causal"},)),
    Case("biases of sliced groups", lambda: GroupedBiases(_sliced), hidden(), ({"mask": "causal"},)),
    Case("groups that change places", lambda: GroupedBiases(lambda s: s.chunk(2, dim=1), (1, 0)), hidden(), (), ("",)),
    Case("pictures before text", lambda: MediaCross(True), _media, ({"empty_rows": "mean"},)),
    Case("the last picture before text", lambda: MediaCross(False), _media, ({"empty_rows": "mean"},)),
    Case("gated heads and queries", Gated, hidden(), ({"mask": "full"},)),
    Case("gated keys", KeyGated, hidden(), (), ("something else than their mask",)),
    Case("rows emptied by the mask", EmptyRows, _masked),
]  # fmt: skip
