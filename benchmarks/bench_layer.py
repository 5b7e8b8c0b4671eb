"""One attention layer forward at growing length: lolcats against SDPA, on the sizes of SmolLM2-135M (9/3 heads of 64)."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
import torch.nn.functional as F

from subquad.kernels.spec import RecurrenceSpec
from subquad.passes.linearize.lolcats import HEDGEHOG

HEADS, KV_HEADS, SIZE = 9, 3, 64


def operands(time_steps: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random q [1, T, 9, 64], k, v [1, T, 3, 64], two feature maps [9, 64, 64] and the window gate [9]."""
    generator = torch.Generator().manual_seed(time_steps)
    shapes = ((1, time_steps, HEADS, SIZE), (1, time_steps, KV_HEADS, SIZE), (1, time_steps, KV_HEADS, SIZE))
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    maps = [torch.eye(SIZE).repeat(HEADS, 1, 1) for _ in range(2)]
    return q, k, v, *maps, torch.full((HEADS,), 2.2)


def pair(time_steps: int, dtype: torch.dtype) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """The two forwards: causal SDPA with grouped heads, and the recurrence with window 64 and 4 sinks."""
    q, k, v, map_q, map_k, gate = operands(time_steps, dtype)
    spec = RecurrenceSpec(HEDGEHOG, scale=SIZE**-0.5, window=64, sinks=4).json()
    wide = [x.repeat_interleave(HEADS // KV_HEADS, dim=2).transpose(1, 2) for x in (k, v)]
    query = q.transpose(1, 2)

    def softmax() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, *wide, is_causal=True)

    def linear() -> torch.Tensor:
        empty = (None, None, None, None)
        o: torch.Tensor = torch.ops.subquad.recurrence(
            q, k, v, None, None, [map_q], [map_k], gate, None, *empty, None, spec
        )[0]
        return o

    return softmax, linear


def seconds(call: Callable[[], torch.Tensor]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print a row per length; the two forwards alternate and the median of their ratios counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(machine.line())
    print(f"| T ({arguments.dtype}) | SDPA ms | lolcats ms | SDPA / lolcats |\n|---|---|---|---|")
    cross_over = None
    with torch.no_grad():
        for length in arguments.lengths:
            softmax, linear = pair(length, dtype)
            softmax(), linear()
            rounds = [(seconds(softmax), seconds(linear)) for _ in range(3 if length > 8192 else 9)]
            ratio = statistics.median(a / b for a, b in rounds)
            slow, fast = (statistics.median(column) * 1e3 for column in zip(*rounds, strict=True))
            print(f"| {length} | {slow:.1f} | {fast:.1f} | {ratio:.2f}× |", flush=True)
            if cross_over is None and ratio >= 1:
                cross_over = length
    print(f"\ncross-over: first measured length at which lolcats is faster: {cross_over}")


if __name__ == "__main__":
    main()
