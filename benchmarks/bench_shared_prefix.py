"""Decoding and prefill over a shared prefix: partial states per segment against SDPA over expanded keys."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
import torch.nn.functional as F

from subquad.compilation import native_forms
from subquad.kernels import SoftmaxSpec, ancestors, softmax_attention, tree_mask

SIZE = 64
Call = Callable[[], torch.Tensor]


def seconds(call: Call) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def row(name: str, peer: Call, ours: Call, rounds: int) -> None:
    """Print one row: the two alternate, and the median of the ratios counts."""
    torch.testing.assert_close(peer(), ours(), rtol=2e-2, atol=2e-3)
    pairs = [(seconds(peer), seconds(ours)) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    slow, fast = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
    print(f"| {name} | {slow:.3f} | {fast:.3f} | {ratio:.2f}× |", flush=True)


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """[B, T, H, D] as contiguous [B, H, T, D]."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


def shared_prefix(
    batch: int, prefix: int, own: int, heads: int, kv_heads: int, q_len: int, dtype: torch.dtype, rounds: int
) -> None:
    """One prefix for all rows, own keys behind it; q_len queries a row, causal among the last q_len keys."""
    draw = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    q = draw(batch, q_len, heads, SIZE)
    k, v = ([draw(1, prefix, kv_heads, SIZE), draw(batch, own, kv_heads, SIZE)] for _ in range(2))
    rows = [torch.zeros(batch, dtype=torch.int64), torch.arange(batch)]
    at = (prefix + own - q_len + torch.arange(q_len)).expand(batch, -1)
    spec = SoftmaxSpec(SIZE**-0.5, mask="q >= kv").json()
    mask = None
    if q_len > 1:
        mask = (at[0][:, None] >= torch.arange(prefix + own))[None, None]
    query, key, value = heads_first(q, *(torch.cat([x[0].expand(batch, -1, -1, -1), x[1]], 1) for x in (k, v)))
    parts = [heads_first(*x) for x in (k, v)]
    gqa = heads != kv_heads

    def ours() -> torch.Tensor:
        o: torch.Tensor = softmax_attention(q, k, v, rows, [], [], at, None, None, [], [], spec)[0]
        return o

    def expanded() -> torch.Tensor:
        o = F.scaled_dot_product_attention(query, key, value, mask, scale=SIZE**-0.5, enable_gqa=gqa)
        return o.transpose(1, 2)

    def spelled() -> torch.Tensor:
        both = (torch.cat([x[0].expand(batch, -1, -1, -1), x[1]], 2) for x in parts)
        return F.scaled_dot_product_attention(query, *both, mask, scale=SIZE**-0.5, enable_gqa=gqa).transpose(1, 2)

    what = f"B {batch}, P {prefix}, S {own}, heads {heads}/{kv_heads}, {q_len} queries, {str(dtype)[6:]}"
    row(f"{what}: SDPA, expanded", expanded, ours, rounds)
    row(f"{what}: expand + cat + SDPA", spelled, ours, rounds)


def no_sharing(batch: int, length: int, heads: int, dtype: torch.dtype, rounds: int) -> None:
    """The same keys once as a plain segment, and once through a row map in which no two rows share."""
    q, k, v = (torch.randn(batch, n, heads, SIZE).to(dtype) for n in (1, length, length))
    at = torch.full((batch, 1), length - 1)
    spec = SoftmaxSpec(SIZE**-0.5, mask="q >= kv").json()
    rows = [torch.arange(batch)]
    call = lambda maps: softmax_attention(q, [k], [v], maps, [], [], at, None, None, [], [], spec)[0]  # noqa: E731
    row(f"no sharing, B {batch}, {length} keys: dense against row map", lambda: call([]), lambda: call(rows), rounds)


def draft_tree(batch: int, context: int, width: int, heads: int, kv_heads: int, rounds: int) -> None:
    """Verification of a draft tree of `width` nodes behind a context; the peer takes the mask as a tensor."""
    q = torch.randn(batch, width, heads, SIZE)
    k, v = (torch.randn(batch, context + width, kv_heads, SIZE) for _ in range(2))
    parents = torch.tensor([[(node - 1) // 3 if node else -1 for node in range(width)]]).expand(batch, -1)
    table = ancestors(parents)
    at = context + table.sum(-1) - 1
    spec = SoftmaxSpec(SIZE**-0.5, mask=tree_mask("t0", "s0")).json()
    mask = torch.cat([torch.ones(batch, width, context, dtype=torch.bool), table], 2)[:, None]
    query, key, value = heads_first(q, k, v)

    def ours() -> torch.Tensor:
        o: torch.Tensor = softmax_attention(q, [k], [v], [], [], [], at, None, None, [table], [context], spec)[0]
        return o

    def peer() -> torch.Tensor:
        o = F.scaled_dot_product_attention(query, key, value, mask, scale=SIZE**-0.5, enable_gqa=heads != kv_heads)
        return o.transpose(1, 2)

    row(
        f"draft tree, B {batch}, {context} keys, {width} nodes, heads {heads}/{kv_heads}: SDPA with mask",
        peer,
        ours,
        rounds,
    )


def pages(length: int, budget: int, heads: int, kv_heads: int, size: int, rounds: int) -> None:
    """Decoding over a budget of pages per KV group against decoding over all keys; and against the same keys gathered."""
    q = torch.randn(1, 1, heads, SIZE)
    k, v = (torch.randn(length // size, size, kv_heads, SIZE) for _ in range(2))
    table = torch.stack([torch.randperm(length // size)[: budget // size].sort().values for _ in range(kv_heads)])[None]
    spec = SoftmaxSpec(SIZE**-0.5).json()
    query = q.transpose(1, 2)
    index = (table[0, :, :, None] * size + torch.arange(size)).flatten(1)[None, :, :, None].expand(-1, -1, -1, SIZE)
    flat = [x.flatten(0, 1)[None].transpose(1, 2) for x in (k, v)]

    def ours() -> torch.Tensor:
        o: torch.Tensor = softmax_attention(q, [k], [v], [table], [], [], None, None, None, [], [], spec)[0]
        return o

    def gathered() -> torch.Tensor:
        keys = (x.gather(2, index) for x in flat)
        return F.scaled_dot_product_attention(query, *keys, scale=SIZE**-0.5, enable_gqa=heads != kv_heads).transpose(
            1, 2
        )

    def dense() -> torch.Tensor:
        o = F.scaled_dot_product_attention(query, *flat, scale=SIZE**-0.5, enable_gqa=heads != kv_heads)
        return o.transpose(1, 2)

    what = f"pages of {size}, {budget} of {length} keys, heads {heads}/{kv_heads}"
    row(f"{what}: gather + SDPA", gathered, ours, rounds)
    times = [(seconds(dense), seconds(ours)) for _ in range(rounds)]
    slow, fast = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    print(
        f"| {what}: SDPA over all keys (another function) | {slow:.3f} | {fast:.3f} | {slow / fast:.2f}× |", flush=True
    )


def main() -> None:
    """Print a row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--only", choices=["prefix", "no-sharing", "tree", "pages"], default=None)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    wanted = lambda name: arguments.only in (None, name)  # noqa: E731
    torch.manual_seed(0)
    native_forms(build=True)
    print(machine.line())
    print("| case | peer ms | ours ms | peer / ours |\n|---|---|---|---|")
    with torch.no_grad():
        if wanted("prefix"):
            for name in arguments.dtypes:
                shared_prefix(32, 1024, 64, 8, 8, 1, getattr(torch, name), rounds)
                shared_prefix(32, 1024, 64, 8, 2, 1, getattr(torch, name), rounds)
            shared_prefix(8, 1024, 64, 8, 8, 1, torch.float32, rounds)
            shared_prefix(2, 1024, 64, 8, 8, 1, torch.float32, rounds)
            shared_prefix(32, 1024, 64, 8, 8, 64, torch.float32, max(3, rounds // 6))
        if wanted("no-sharing"):
            no_sharing(32, 1088, 8, torch.float32, 3 * rounds)
        if wanted("tree"):
            draft_tree(1, 1024, 16, 9, 3, rounds)
            draft_tree(4, 1024, 64, 8, 8, rounds)
        if wanted("pages"):
            pages(16384, 1024, 8, 2, 16, rounds)
            pages(65536, 1024, 8, 2, 64, rounds)


if __name__ == "__main__":
    main()
