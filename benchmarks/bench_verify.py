"""What a pass of the compiled decoder costs by the number of rows that it verifies, as a chain and as a tree."""

from __future__ import annotations

import argparse
import statistics
import time

import machine
import torch

import subquad

ROWS = (1, 2, 3, 4, 6, 8, 12, 16)


def main() -> None:
    """Print milliseconds a pass, alternating over the row counts, and what each costs in passes of one row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=256, help="tokens before the draft")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from subquad.incremental import decoder

    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(subquad.demo_weights(), dtype=dtype).eval()
    made = decoder(subquad.rewrite(model, passes="fuse", verify=False))
    made.compile()
    generator = torch.Generator().manual_seed(0)
    _, state = made.prefill(torch.randint(5, 1000, (1, arguments.columns), generator=generator))
    drafts = {rows: torch.randint(5, 1000, (1, rows), generator=generator) for rows in ROWS}
    trees = {rows: torch.tensor([(node - 1) // 2 if node else -1 for node in range(rows)]) for rows in ROWS}
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.repeats + 1):
        for kind, parents in (("chain", None), ("tree", trees)):
            for rows, ids in drafts.items():
                start = time.perf_counter()
                made.verify(ids, state, None if parents is None else parents[rows])
                times.setdefault((kind, rows), []).append(time.perf_counter() - start)
    print(machine.line())
    print(f"{arguments.dtype}, {arguments.columns} tokens before; medians of {arguments.repeats}")
    print("| rows | chain (ms) | tree (ms) | chain, in passes of one row |\n|---|---|---|---|")
    middle = {key: statistics.median(found[1:]) * 1e3 for key, found in times.items()}
    for rows in ROWS:
        chain, tree = middle["chain", rows], middle["tree", rows]
        print(f"| {rows} | {chain:.2f} | {tree:.2f} | {chain / middle['chain', 1]:.2f} |")


if __name__ == "__main__":
    main()
