"""Attention over sets, graphs and latents, and tokens in blocks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from written.case import Case, hidden

WIDTH, HEADS, SIZE = 32, 4, 8


class Pair(nn.Module):
    """Heads split along the features and stacked along the batch: queries from one set, keys from another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(y), self.v(y)
        q_, k_, v_ = (torch.cat(z.split(SIZE, 2), 0) for z in (q, k, v))
        a = torch.softmax(q_.bmm(k_.transpose(1, 2)) / WIDTH**0.5, 2)
        o = torch.cat((q_ + a.bmm(v_)).split(x.size(0), 0), 2)
        return o + F.relu(self.o(o))


class Induced(nn.Module):
    """A set attends to learned points that attended to it; then a learned seed pools it."""

    def __init__(self) -> None:
        super().__init__()
        self.points, self.seed = nn.Parameter(torch.randn(1, 3, WIDTH)), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.a, self.b, self.c = Pair(), Pair(), Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(self.points.repeat(x.size(0), 1, 1), x)
        x = self.b(x, h)
        return self.c(self.seed.expand(x.size(0), -1, -1), x)


class Latents(nn.Module):
    """A few latents read the inputs, think among themselves and answer."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined = joined
        self.latents = nn.Parameter(torch.randn(5, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = self.latents.unsqueeze(0).repeat(x.shape[0], 1, 1)
        x, latents = self.norms[0](x), self.norms[1](latents)
        source = torch.cat((x, latents), dim=-2) if self.joined else x
        q, (k, v) = self.q(latents), self.kv(source).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in (q, k, v))
        sim = torch.einsum("... i d, ... j d -> ... i j", q * SIZE**-0.5, k)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        return torch.einsum("... i j, ... j d -> ... i d", sim.softmax(dim=-1), v).transpose(1, 2).flatten(2)


class GraphAttention(nn.Module):
    """Nodes attend to their neighbours: by a product of projections, or by the sum of two scores as in GAT."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.left, self.right = (nn.Parameter(torch.randn(HEADS, SIZE)) for _ in range(2))
        self.edge = nn.Linear(3, HEADS)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor, edges: torch.Tensor | None = None) -> torch.Tensor:
        b, n, _ = x.shape
        v = self.v(x).view(b, n, HEADS, SIZE)
        if self.how == "additive":
            e = (v * self.left).sum(-1)[:, :, None] + (v * self.right).sum(-1)[:, None]
            e = F.leaky_relu(e, 0.2).permute(0, 3, 1, 2)
        else:
            q, k = self.q(x).view(b, n, HEADS, SIZE), self.k(x).view(b, n, HEADS, SIZE)
            e = torch.einsum("bihd,bjhd->bhij", q, k) * SIZE**-0.5
        if self.how == "edges":
            e = e + self.edge(edges).permute(0, 3, 1, 2)
        e = e.masked_fill(adjacency.unsqueeze(1) == 0, -9e15)
        return torch.einsum("bhij,bjhd->bihd", e.softmax(-1), v).reshape(b, n, WIDTH)


class Blocks(nn.Module):
    """Tokens attend inside blocks of four made by a reshape; `halo` adds the block before."""

    def __init__(self, halo: bool) -> None:
        super().__init__()
        self.halo, self.qkv = halo, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t // 4, 4, HEADS, SIZE).transpose(2, 3) for y in self.qkv(x).chunk(3, -1))
        if self.halo:
            k, v = (torch.cat([F.pad(y, (0, 0) * 3 + (1, 0))[:, :-1], y], 3) for y in (k, v))
            seen = torch.ones(4, 8, dtype=torch.bool).tril(4)
            scores = (q @ k.mT * SIZE**-0.5).masked_fill(~seen, -torch.inf)
        else:
            scores = q @ k.mT * SIZE**-0.5
        return (scores.softmax(-1) @ v).transpose(2, 3).reshape(b, t, WIDTH)


class ReadOnce(nn.Module):
    """Attention pooling: a learned query per head reads the tokens, with keys and values of their own."""

    def __init__(self, project: bool) -> None:
        super().__init__()
        self.project = project
        self.query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.shape
        asked = self.query.expand(b, -1, -1)
        q = (self.q(asked) if self.project else asked).view(b, 1, HEADS, SIZE).transpose(1, 2)
        k, v = (w(x).view(b, t, HEADS, SIZE).transpose(1, 2) for w in (self.k, self.v))
        return (torch.softmax(q @ k.mT * SIZE**-0.5, -1) @ v).transpose(1, 2).flatten(1)


class ContentLookup(nn.Module):
    """A recurrent decoder's state asks an encoder: dot scores, one query per step."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        scores = torch.bmm(memory, self.q(state).unsqueeze(2)).squeeze(2)
        return torch.bmm(torch.softmax(scores, 1).unsqueeze(1), memory).squeeze(1)


class AdditiveLookup(nn.Module):
    """The same with a small network in place of the product: v·tanh(Wq + Uk)."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(16, 1, bias=False)

    def forward(self, state: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        scores = self.v(torch.tanh(self.w(state)[:, None] + self.u(memory))).squeeze(-1)
        return torch.bmm(scores.softmax(-1)[:, None], memory)[:, 0]


def graph(batch: int, nodes: int) -> tuple[torch.Tensor, ...]:
    adjacency = ((torch.rand(batch, nodes, nodes) > 0.6) | torch.eye(nodes, dtype=torch.bool)).long()
    return torch.randn(batch, nodes, WIDTH), adjacency


def graph_with_edges(batch: int, nodes: int) -> tuple[torch.Tensor, ...]:
    return *graph(batch, nodes), torch.randn(batch, nodes, nodes, 3)


def in_fours(batch: int, time: int) -> tuple[torch.Tensor]:
    return (torch.randn(batch, time // 4 * 4, WIDTH),)


def state(batch: int, time: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, WIDTH), torch.randn(batch, time, WIDTH)


HEADED = {"heads": HEADS, "head_dim": SIZE, "scale": SIZE**-0.5}

CASES = (
    Case("induced points and a seed", Induced, hidden(), ({"head_dim": SIZE, "scale": WIDTH**-0.5},) * 3),
    Case("latents", partial(Latents, False), hidden(), (HEADED | {"mask": "full", "phase": "cross"},)),
    Case("latents see themselves", partial(Latents, True), hidden(), (HEADED | {"mask": "full", "phase": "cross"},)),
    Case("neighbours by a product", partial(GraphAttention, "product"), graph, (HEADED | {"mask": "opaque"},)),
    Case("neighbours with edge features", partial(GraphAttention, "edges"), graph_with_edges, (HEADED,)),
    Case("neighbours by a sum of scores", partial(GraphAttention, "additive"), graph, (), ("no product",)),
    Case("blocks of four", partial(Blocks, False), in_fours, (HEADED | {"mask": "full"},)),
    Case("blocks of four and the one before", partial(Blocks, True), in_fours, (HEADED,)),
    Case("pooled by a projected query", partial(ReadOnce, True), hidden(), (HEADED,)),
    Case("pooled by a learned query", partial(ReadOnce, False), hidden(), (), ("",)),
    Case("lookup by a product", ContentLookup, state, ({"heads": 1, "head_dim": WIDTH, "scale": 1.0},)),
    Case("lookup by a network", AdditiveLookup, state, (), ("projection",)),
)  # fmt: skip
