"""Random mask programs of fresh seeds: does every tensor in them equal the formula that the mask algebra reads?

python benchmarks/random_masks.py --programs 2000 [--seed 7]
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import machine
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from mask_formulas import SIZES, disagreement
from mask_programs import Program, programs, traced

TOGETHER = 6
EACH = 50
"""Programs of one graph, and graphs of one seed."""


def tried(number: int) -> tuple[int, int, list[str]]:
    """Programs, tensors with a formula, and the disagreements among the graphs of one seed."""
    met, proved = 0, 0
    wrong: list[str] = []

    @settings(
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        max_examples=EACH,
    )
    @seed(number)
    @given(st.lists(programs, min_size=TOGETHER, max_size=TOGETHER))
    def run(what: list[Program]) -> None:
        nonlocal met, proved
        found, count = disagreement(traced(what))
        met, proved = met + TOGETHER, proved + count
        if found:
            wrong.append(f"{found}\n  in {what}")

    run()
    return met, proved, wrong


def main() -> None:
    """Print every disagreement, and the counts; exit status 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000, help="how many at least")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; drawn when it is not given")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    first = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    met, proved, wrong, number = 0, 0, 0, first
    while met < options.programs:
        programs_, tensors, found = tried(number)
        met, proved, wrong, number = met + programs_, proved + tensors, wrong + len(found), number + 1
        print(*found, sep="\n", end="\n" if found else "", flush=True)
    print(machine.line())
    print(f"seeds {first} to {number - 1}; each tensor at {len(SIZES)} sizes, with plain and far values")
    print("| programs | tensors compared | disagreements |\n|---|---|---|")
    print(f"| {met:,} | {proved:,} | {wrong} |")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
