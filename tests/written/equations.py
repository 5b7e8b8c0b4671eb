"""Products written as einsum with letters in every order, as einops, and as other batched products."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any
from unittest.mock import ANY

import torch
from torch import nn

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8
SCALE = SIZE**-0.5


class Lettered(nn.Module):
    """Heads laid out as `layout` says, products by einsum with the scores' axes as `scores` says."""

    def __init__(self, layout: str, scores: str, groups: int = HEADS) -> None:
        super().__init__()
        self.layout, self.scores, self.groups = layout, scores, groups
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * groups * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        order = ["bthd".index(c) for c in self.layout]
        q = self.q(x).view(b, t, HEADS, SIZE).permute(order)
        k, v = (y.view(b, t, HEADS, SIZE).permute(order) for y in self.kv(x).chunk(2, -1))
        of_q, of_k = self.layout.replace("t", "i"), self.layout.replace("t", "j")
        scores = torch.einsum(f"{of_q},{of_k}->{self.scores}", q, k) * SCALE
        weights = torch.softmax(scores, dim=self.scores.index("j"))
        return torch.einsum(f"{self.scores},{of_k}->bihd", weights, v).reshape(b, t, WIDTH)


class Grouped(nn.Module):
    """Query heads [B, T, G, n, D] share the keys of their group without repeating them."""

    def __init__(self, matmul: bool) -> None:
        super().__init__()
        self.matmul = matmul
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * 2 * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 2, SIZE)
        k, v = self.kv(x).view(b, t, 2, 2, SIZE).unbind(2)
        if self.matmul:
            q, k, v = q.permute(0, 2, 3, 1, 4), k.permute(0, 2, 1, 3)[:, :, None], v.permute(0, 2, 1, 3)[:, :, None]
            o = torch.softmax(q @ k.mT * SCALE, -1) @ v
            return o.permute(0, 3, 1, 2, 4).reshape(b, t, WIDTH)
        scores = torch.einsum("bqgnd,bkgd->bgnqk", q, k) * SCALE
        return torch.einsum("bgnqk,bkgd->bqgnd", scores.softmax(-1), v).reshape(b, t, WIDTH)


class OneKeyHead(nn.Module):
    """All query heads share one key and value head: the shared tensor has no head axis at all."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, SIZE), nn.Linear(WIDTH, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, HEADS, SIZE)
        scores = torch.einsum("bihd,bjd->bhij", q, self.k(x)) * SCALE
        return torch.einsum("bhij,bjd->bihd", scores.softmax(-1), self.v(x)).reshape(b, t, WIDTH)


class Rearranged(nn.Module):
    """einops for the layout, and for the products too when `products`."""

    def __init__(self, products: bool) -> None:
        super().__init__()
        self.products = products
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from einops import einsum, rearrange

        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=HEADS) for y in self.to_qkv(x).chunk(3, dim=-1))
        if self.products:
            dots = einsum(q, k, "b h i d, b h j d -> b h i j") * SCALE
            out = einsum(dots.softmax(dim=-1), v, "b h i j, b h j d -> b h i d")
        else:
            out = torch.matmul(torch.matmul(q, rearrange(k, "b h n d -> b h d n")).mul(SCALE).softmax(-1), v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class Repeated(nn.Module):
    """Groups repeated, heads merged into the batch and a triangle, by einops."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * 2 * SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from einops import rearrange, repeat

        q = rearrange(self.q(x), "b n (h d) -> (b h) n d", h=HEADS)
        k, v = rearrange(self.kv(x), "b n (s g d) -> s b g n d", s=2, g=2)
        k, v = (repeat(y, "b g n d -> (b g r) n d", r=2) for y in (k, v))
        scores = torch.einsum("b i d, b j d -> b i j", q, k) * SCALE
        n = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.finfo(scores.dtype).max)
        return rearrange(scores.softmax(-1) @ v, "(b h) n d -> b n (h d)", h=HEADS)


class AddedProduct(nn.Module):
    """baddbmm adds a bias per key to scaled scores of merged heads; a fill and float32 follow."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        fused = self.qkv(x).view(b, t, HEADS, 3, SIZE)
        q, k, v = (fused[..., n, :].transpose(1, 2).reshape(b * HEADS, t, SIZE) for n in range(3))
        slopes = 2.0 ** (-2.0 * torch.arange(1, HEADS + 1))
        alibi = (slopes[None, :, None] * torch.arange(t)[None, None]).expand(b, -1, -1).reshape(b * HEADS, 1, t)
        scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=SCALE)
        scores = scores.view(b, HEADS, t, t)
        hidden_keys = torch.ones(t, t, dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(hidden_keys, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype).view(b * HEADS, t, t)
        return torch.bmm(weights, v).view(b, HEADS, t, SIZE).transpose(1, 2).reshape(b, t, WIDTH)


class Layout(nn.Module):
    """matmul on heads kept in the order given; `merged` folds them into the batch."""

    def __init__(self, layout: str, merged: bool = False) -> None:
        super().__init__()
        self.layout, self.merged, self.qkv = layout, merged, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, SIZE) for y in self.qkv(x).chunk(3, -1))
        if self.layout == "thbd":
            q, k, v = (y.permute(1, 2, 0, 3) for y in (q, k, v))
            scores = torch.matmul(q.permute(2, 1, 0, 3), k.permute(2, 1, 3, 0))
            o = torch.matmul((scores * SCALE).softmax(3), v.permute(2, 1, 0, 3)).permute(2, 0, 1, 3)
            return o.transpose(0, 1).reshape(b, t, WIDTH)
        if self.layout == "hbtd":
            q, k, v = (y.permute(2, 0, 1, 3) for y in (q, k, v))
            if self.merged:
                q, k, v = (y.flatten(0, 1) for y in (q, k, v))
            o = torch.softmax(q @ k.transpose(-1, -2) * SCALE, -1) @ v
            return o.view(HEADS, b, t, SIZE).permute(1, 2, 0, 3).reshape(b, t, WIDTH)
        parts = [torch.softmax(q[:, :, n] @ k[:, :, n].mT * SCALE, -1) @ v[:, :, n] for n in range(HEADS)]
        return torch.cat(parts, -1)


class OneHead(nn.Module):
    """[B, T, C] without heads; `vectors` drops the batch as well."""

    def __init__(self, batchless: bool = False) -> None:
        super().__init__()
        self.batchless, self.qkv = batchless, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.batchless:
            x = x.flatten(0, 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(torch.mm(q, k.t()) if self.batchless else torch.bmm(q, k.mT), -1) @ v


class Mapped(nn.Module):
    """torch.vmap over the batch and over the heads of a plain two-axis attention."""

    def __init__(self, sdpa: bool) -> None:
        super().__init__()
        self.qkv, self.sdpa = nn.Linear(WIDTH, 3 * WIDTH), sdpa

    def one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.sdpa:
            return nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return torch.softmax(q @ k.T * SCALE, -1) @ v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, HEADS, SIZE).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return torch.vmap(torch.vmap(self.one))(q, k, v).transpose(1, 2).flatten(2)


class SeveralAxes(nn.Module):
    """Features on two axes: rows of an alignment share one map of probabilities (MSA Transformer), or windows are weighted
    as a whole by one token each (SepViT)."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tied = tied
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * WIDTH) for n in ((3, 3, 3) if tied else (1, 1, 3)))
        self.out = nn.Parameter(torch.randn(3, HEADS, SIZE, WIDTH) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HEADS, SIZE)) for f in (self.q, self.k, self.v))
        if self.tied:
            q, k, v = (y.permute(2, 1, 0, 3, 4) for y in (q, k, v))
            p = (torch.einsum("rinhd,rjnhd->hnij", q, k) * SCALE).softmax(-1)
            return torch.einsum("rinhd,rhdo->nio", torch.einsum("hnij,rjnhd->rinhd", p, v), self.out)
        q, k = (y.squeeze(2).transpose(1, 2) for y in (q, k))
        p = (torch.einsum("bhid,bhjd->bhij", q, k) * SCALE).softmax(-1)
        o = torch.einsum("bhij,bhjwd->bhiwd", p, v.permute(0, 3, 1, 2, 4))
        return torch.einsum("bhiwd,whdo->bio", o, self.out)


WORDS = {"heads": HEADS, "head_dim": SIZE, "scale": SCALE, "mask": "full"}


def one(name: str, build: Any, quick: bool = True, **words: Any) -> Case:
    """Where heads come before the batch and both are fixed, as in Dynamo's first graph, nobody can tell them apart."""
    if name.endswith(("hbij", "heads, batch")):
        words["heads"] = ANY
    return Case(name, build, hidden(), (WORDS | words,), quick=("export",) if quick else ())


ORDERS = tuple(product(("bthd", "bhtd", "thbd", "htbd"), ("bhij", "bhji", "bijh", "hbij", "ijbh", "bihj")))

CASES = (
    *(one(f"einsum {a} {s}", partial(Lettered, a, s), n % 5 == 0) for n, (a, s) in enumerate(ORDERS)),
    one("groups by einsum", partial(Grouped, False), kv_heads=2),
    one("groups by broadcast matmul", partial(Grouped, True), kv_heads=2),
    one("one key head without an axis", OneKeyHead, kv_heads=1),
    one("einops layout", partial(Rearranged, False)),
    one("einops layout and products", partial(Rearranged, True)),
    one("einops repeat, merged heads", Repeated, kv_heads=2, mask="causal", empty_rows="mean"),
    one("baddbmm with a bias per key", AddedProduct, mask="causal", biases=1, empty_rows="mean"),
    one("time, heads, batch", partial(Layout, "thbd")),
    one("heads, batch", partial(Layout, "hbtd")),
    one("heads merged in front of the batch", partial(Layout, "hbtd", True)),
    Case("a product per head", partial(Layout, "list"), hidden(), ({"heads": 1, "head_dim": SIZE},) * HEADS),
    one("rows of an alignment tied", partial(SeveralAxes, True), head_dim=3 * SIZE),
    one("windows weighted as a whole", partial(SeveralAxes, False), value_dim=3 * SIZE),
    one("no heads", OneHead, heads=1, head_dim=WIDTH, scale=1.0),
    one("no heads and no batch", partial(OneHead, True), heads=1, head_dim=WIDTH, scale=1.0),
    one("vmap twice", partial(Mapped, False)),
    one("vmap twice over sdpa", partial(Mapped, True)),
)  # fmt: skip
