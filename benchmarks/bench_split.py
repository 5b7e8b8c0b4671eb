"""A network cut at the columns that all rows share: a language model behind a learned prefix, original against split."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import machine
import torch
from torch import nn

import subquad


class Prefixed(nn.Module):
    """A random Llama behind a learned prefix of P embeddings, logits of the rows' own tokens."""

    def __init__(self, layers: int, prefix: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=4000, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
            num_key_value_heads=8, max_position_embeddings=8192,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        self.prefix = nn.Parameter(torch.randn(prefix, 512))
        self.columns = prefix

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = self.model.get_input_embeddings()(ids)
        x = torch.cat([self.prefix[None].expand(ids.shape[0], -1, -1), own], 1)
        h = self.model.model(inputs_embeds=x, use_cache=False).last_hidden_state
        logits: torch.Tensor = self.model.lm_head(h[:, self.columns :])
        return logits


def seconds(call: Callable[[], torch.Tensor]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Print a row per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prefix", type=int, default=512)
    parser.add_argument("--own", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = Prefixed(asked.layers, asked.prefix).eval()
    plain = Prefixed(asked.layers, asked.prefix).eval()
    plain.load_state_dict(model.state_dict())
    subquad.rewrite(model, passes=["share_prefix"], example_inputs=(torch.randint(0, 4000, (3, 7)),))
    print(machine.line())
    print("; ".join(str(entry.get("what")) for entry in model.report.applied if entry.get("what")))  # type: ignore[union-attr]
    print(
        "| rows | original ms | split ms | original / split | bound by tokens | largest difference |\n|---|---|---|---|---|---|"
    )
    with torch.no_grad():
        for batch in asked.batches:
            ids = torch.randint(0, 4000, (batch, asked.own))
            apart = float((model(ids) - plain(ids)).abs().max())
            pairs = [
                (seconds(lambda ids=ids: plain(ids)), seconds(lambda ids=ids: model(ids))) for _ in range(asked.rounds)
            ]
            slow, fast = (statistics.median(side) * 1e3 for side in zip(*pairs, strict=True))
            bound = batch * (asked.prefix + asked.own) / (asked.prefix + batch * asked.own)
            ratio = statistics.median(a / b for a, b in pairs)
            print(f"| {batch} | {slow:.0f} | {fast:.0f} | {ratio:.2f}× | {bound:.1f}× | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
