"""Linear, gated and delta recurrences on the CPU at growing length, against SDPA and flash-linear-attention's naive forms."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import machine
import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.spec import RecurrenceSpec

HEADS, SIZE = 9, 64
CASES = {
    "plain (P1)": {},
    "scalar gate (P2)": {"decay": "token"},
    "channel gate (P3)": {"decay": "channel"},
    "delta (P4)": {"update": "delta"},
    "gated delta (P4)": {"decay": "token", "update": "delta"},
}
SOFTMAX_LIMIT, NAIVE_LIMIT = 32768, 8192
"""Lengths up to which the peers run."""
Operands = dict[str, Tensor]


def operands(length: int) -> Operands:
    """q, k (unit norm), v [1, T, 9, 64]; log decays, logsigmoid of normal numbers / 16, per token and per channel; beta."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = (1, length, HEADS, SIZE)
    return {
        "q": normal(*rows), "k": F.normalize(normal(*rows), dim=-1), "v": normal(*rows),
        "token": F.logsigmoid(normal(*rows[:3])) / 16, "channel": F.logsigmoid(normal(*rows)) / 16,
        "beta": torch.sigmoid(normal(*rows[:3])),
    }  # fmt: skip


def ours(case: str) -> Callable[[Operands], Tensor]:
    """The operator subquad::recurrence."""
    spec = RecurrenceSpec(("x",), SIZE**-0.5, normaliser="none", **CASES[case])  # type: ignore[arg-type]
    text = spec.json()

    def run(x: Operands) -> Tensor:
        decay, beta = x.get(spec.decay), x["beta"] if spec.update == "delta" else None
        o: Tensor = torch.ops.subquad.recurrence(
            x["q"], x["k"], x["v"], decay, beta, [], [], None, None, None, None, None, None, None, text
        )[0]
        return o

    return run


def naive(case: str) -> tuple[str, Callable[[Operands], Tensor]]:
    """(name, flash-linear-attention's naive form), chunked where it has one; one token after another where it is not
    installed.
    """
    try:
        from fla.ops.delta_rule.naive import delta_rule_chunkwise
        from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule
        from fla.ops.gla.naive import naive_recurrent_gla
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla
    except ImportError:
        return "token loop", lambda x: token_loop(case, x)

    def head_first(x: Operands) -> Tensor:
        o = delta_rule_chunkwise(*(x[name].transpose(1, 2) for name in ("q", "k", "v", "beta")))
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    forms: dict[str, Callable[[Operands], Any]] = {
        "plain (P1)": lambda x: naive_chunk_linear_attn(x["q"], x["k"], x["v"]),
        "scalar gate (P2)": lambda x: naive_chunk_simple_gla(x["q"], x["k"], x["v"], x["token"]),
        "channel gate (P3)": lambda x: naive_recurrent_gla(x["q"], x["k"], x["v"], x["channel"]),
        "delta (P4)": head_first,
        "gated delta (P4)": lambda x: naive_chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["token"], x["beta"]),
    }

    def run(x: Operands) -> Tensor:
        o = forms[case](x)
        return o[0] if isinstance(o, tuple) else o

    return "fla naive", run


def token_loop(case: str, x: Operands) -> Tensor:
    """S <- e^g S; S <- S + k (v - k S beta ..); o = q S / sqrt(K), one token after another."""
    fields = CASES[case]
    state = x["q"].new_zeros(HEADS, SIZE, SIZE)
    outs = []
    for t in range(x["q"].shape[1]):
        q, k, v = (x[name][0, t] for name in "qkv")
        if "decay" in fields:
            state = state * x[fields["decay"]][0, t].view(HEADS, -1, 1).exp()
        if "update" in fields:
            v = x["beta"][0, t][:, None] * (v - torch.einsum("hk,hkv->hv", k, state))
        state = state + k[:, :, None] * v[:, None]
        outs.append(torch.einsum("hk,hkv->hv", q, state) * SIZE**-0.5)
    return torch.stack(outs)[None]


def softmax(x: Operands) -> Tensor:
    """Causal SDPA."""
    return F.scaled_dot_product_attention(*(x[name].transpose(1, 2) for name in "qkv"), is_causal=True).transpose(1, 2)


def seconds(form: Callable[[Operands], Tensor], x: Operands, training: bool) -> float:
    """Wall time of one forward, or one forward and backward to every input."""
    if training:
        x = {name: value.detach().requires_grad_() for name, value in x.items()}
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        o = form(x)
        if training:
            o.sum().backward()
    return time.perf_counter() - start


def cell(times: list[float], peers: list[float]) -> str:
    """Median milliseconds of a peer and the median of its ratios to ours."""
    if not peers:
        return "— | —"
    ratio = statistics.median(peer / own for peer, own in zip(peers, times, strict=True))
    return f"{statistics.median(peers) * 1e3:.1f} | {ratio:.2f}×"


def main() -> None:
    """Print a row per length and case; ours and the peers alternate, and the median of their ratios counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--training", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--rounds", type=int, default=3, help="rounds up to 8192 tokens; one third of it beyond")
    arguments = parser.parse_args()
    peers = {case: naive(case) for case in arguments.cases}
    name = peers[arguments.cases[0]][0]
    print(machine.line())
    print(f"fp32, {HEADS} heads of {SIZE}, batch 1, {'forward and backward' if arguments.training else 'forward'}\n")
    print(
        f"| T | recurrence | ms | growth | SDPA ms | SDPA / ours | {name} ms | {name} / ours |\n|---|---|---|---|---|---|---|---|"
    )
    before: dict[str, float] = {}
    cross_over: dict[str, int] = {}
    for length in arguments.lengths:
        x = operands(length)
        rounds = arguments.rounds if length <= NAIVE_LIMIT else max(arguments.rounds // 3, 1)
        own: dict[str, list[float]] = {case: [] for case in arguments.cases}
        loops: dict[str, list[float]] = {case: [] for case in arguments.cases}
        dense: list[float] = []
        for case in arguments.cases:
            o = ours(case)(x)
            if length <= min(arguments.lengths):
                difference = (o - peers[case][1](x)).norm() / o.norm()
                assert difference < 1e-4, f"{case} differs from {name} by {difference:.1e}"
        for _ in range(rounds):
            if length <= SOFTMAX_LIMIT:
                dense.append(seconds(softmax, x, arguments.training))
            for case in arguments.cases:
                own[case].append(seconds(ours(case), x, arguments.training))
                if length <= NAIVE_LIMIT:
                    loops[case].append(seconds(peers[case][1], x, arguments.training))
        for case in arguments.cases:
            now = statistics.median(own[case])
            growth = f"{now / before[case]:.2f}×" if case in before else "—"
            before[case] = now
            print(
                f"| {length} | {case} | {now * 1e3:.1f} | {growth} | {cell(own[case], dense)} | {cell(own[case], loops[case])} |",
                flush=True,
            )
            if dense and case not in cross_over and statistics.median(dense) >= now:
                cross_over[case] = length
    print("\nfirst measured length at which the recurrence is faster than SDPA:", cross_over)


if __name__ == "__main__":
    main()
