"""A decoding loop that feeds its whole prefix each time, as it stands and under @subquad.rewrite: tokens, seconds, ratio."""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch
import torch.nn.functional as F
from torch import nn

import subquad
from subquad.step_model import held


class Block(nn.Module):
    """Pre-norm attention and MLP over fused projections."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, tokens, width]; returns the same shape."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.before(x)).split(width, dim=2)
        q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.between(x))


class Model(nn.Module):
    """A language model with learned positions that returns the last token's logits and no loss, as training code does."""

    def __init__(self, vocabulary: int, width: int, layers: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, width // 64) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        """ids: [batch, tokens]; returns (logits [batch, 1, vocabulary], None)."""
        assert ids.shape[1] <= self.longest
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, [-1], :]), None


def generate(model: Model, ids: torch.Tensor, count: int, heat: float, k: int) -> torch.Tensor:
    """The loop: crop, temperature, top-k, sample, append."""
    for _ in range(count):
        window = ids if ids.size(1) <= model.longest else ids[:, -model.longest :]
        logits, _ = model(window)
        logits = logits[:, -1, :] / heat
        best, _ = torch.topk(logits, k)
        logits[logits < best[:, [-1]]] = -float("inf")
        ids = torch.cat((ids, torch.multinomial(F.softmax(logits, dim=-1), 1)), dim=1)
    return ids


def main() -> None:
    """Alternate the two, check their tokens, print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32000)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Model(arguments.vocabulary, arguments.width, arguments.layers, 1024).eval()
    fast = subquad.rewrite(generate)
    ids = torch.randint(arguments.vocabulary, (1, arguments.prompt))
    print(machine.line(), flush=True)
    with torch.no_grad():
        start = time.perf_counter()
        fast(model, ids, 8, 0.8, 50)
        first = time.perf_counter() - start
        start = time.perf_counter()
        if not held(model).steps:
            raise SystemExit(f"the loop was not rewritten: {fast.report.refusals}")
        held(model).steps[0].decoder.compile()
        compiled = time.perf_counter() - start
        print(f"first 8 tokens {first:.1f} s, programs ready after {compiled:.1f} s", flush=True)
        seconds: dict[str, list[float]] = {"original": [], "subquad": []}
        equal = 0
        for n in range(arguments.pairs):
            made = []
            for name, run in (("original", generate), ("subquad", fast)):
                torch.manual_seed(n)
                start = time.perf_counter()
                made.append(run(model, ids, arguments.tokens, 0.8, 50))
                seconds[name].append(time.perf_counter() - start)
            equal += int(torch.equal(*made))
    size = sum(p.numel() for p in model.parameters()) / 1e6
    ratio = statistics.median(a / b for a, b in zip(seconds["original"], seconds["subquad"], strict=True))
    print(f"{size:.0f}M parameters, fp32, {arguments.prompt} + {arguments.tokens} tokens, sampled")
    print("| loop | seconds (median) | tokens/s |\n|---|---|---|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} | {arguments.tokens / statistics.median(found):.1f} |")
    print(f"ratio {ratio:.1f}x, identical tokens in {equal} of {arguments.pairs} runs")
    print("; ".join([*fast.report.notes, *map(str, fast.report.refusals)]))


if __name__ == "__main__":
    main()
