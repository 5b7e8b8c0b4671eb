"""Bytes of decoding state at growing length: the linearized model's recurrent state beside the original's keys and values."""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, DynamicCache

import subquad
from subquad.runtime.hf_cache import with_recurrent_layers


def recurrent_bytes(length: int) -> int:
    """Measured: run `length` tokens through the recurrence with SmolLM2's sizes, one layer at a time, and add up its state."""
    model = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=torch.bfloat16).eval()
    fast = subquad.rewrite(model, passes="linearize:lolcats(window=64, sinks=4)", verify=False)
    layers = model.config.num_hidden_layers
    cache = with_recurrent_layers(DynamicCache(config=model.config), set(range(layers)))
    chunk = 1024
    with torch.no_grad():
        for start in range(0, length, chunk):
            ids = torch.full((1, min(chunk, length - start)), 5)
            fast.model(ids, past_key_values=cache, use_cache=True)
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in layer.state)


def key_value_bytes(length: int) -> int:
    """Keys and values of the original in bf16: 2 · layers · KV heads · head size · 2 bytes per token."""
    return 2 * 30 * 3 * 64 * 2 * length


def main() -> None:
    """Print a row per length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 65536])
    arguments = parser.parse_args()
    print("| tokens | lolcats state MB | original K and V MB (bf16) |\n|---|---|---|")
    for length in arguments.lengths:
        print(f"| {length} | {recurrent_bytes(length) / 1e6:.2f} | {key_value_bytes(length) / 1e6:.1f} |", flush=True)


if __name__ == "__main__":
    main()
