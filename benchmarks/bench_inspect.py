"""`subquad inspect smollm2`: sites found, masks proved, and the time of recognition beside the time of capture."""

from __future__ import annotations

import argparse
import time

import machine
import torch
from transformers import AutoModelForCausalLM

import subquad


def main() -> None:
    """Print one row per spelling of the attention."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(machine.line())
    print("| spelling | sites | heads / KV heads | masks | refusals | capture s | recognition s |")
    print("|---|---|---|---|---|---|---|")
    for spelling in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(
            subquad.demo_weights(), dtype=torch.bfloat16, attn_implementation=spelling
        ).eval()
        start = time.perf_counter()
        report = subquad.inspect(model)
        total = time.perf_counter() - start
        heads = {f"{site.heads} / {site.kv_heads}" for site in report.sites}
        masks = {site.mask.family for site in report.sites}
        beyond = total - report.seconds["capture"]
        print(
            f"| {spelling} | {len(report.sites)} of {model.config.num_hidden_layers} | {', '.join(heads)} | {', '.join(masks)} "
            f"| {len(report.refusals)} | {report.seconds['capture']:.1f} | {beyond:.2f} |"
        )


if __name__ == "__main__":
    main()
