"""Record what the default drafter promises at every token of greedy generations and what came true: tests/drafts.json."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from speculate import GROUPS, Setup, prompts

from subquad.ir.decoding import Choice, Verified
from subquad.passes.speculate.speculate import Speculate
from subquad.runtime.chance import TorchChance
from subquad.runtime.pacing import MOST, FixedPacing
from subquad.runtime.tree_stepper import TreeStepper


def main() -> None:
    """Write, for every token of each group's prompts, the drafted nodes' values in percent and the numbers of the right ones."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", type=int, default=2, help="per group")
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    setup = Setup(torch.bfloat16, True)
    drafter = Speculate().drafter()
    found: dict[str, list[list[list[list[int]]]]] = {group: [] for group in GROUPS}
    chosen = prompts(2 * arguments.prompts)
    for texts in chosen.values():
        for text in texts[::2]:  # the rates of deeper nodes are learnt where drafts are accepted whole
            setup.ours(setup.ids(text), arguments.tokens, drafter, FixedPacing(MOST - 1))
    for group, texts in chosen.items():
        for text in texts[1::2]:
            ids = setup.ids(text)
            stepper = TreeStepper(setup.decoder.engine, ids.shape[1] + arguments.tokens)
            tokens = [int(stepper.prefill(ids, None)[0].argmax())]
            drafting = drafter.start((*ids[0].tolist(), tokens[0]), Choice((), True, TorchChance()))
            trees = []
            while len(tokens) <= arguments.tokens and tokens[-1] not in setup.ends:
                tree = drafting.propose(MOST - 1, MOST - 1)
                (logits,) = stepper.verify([tree])
                stepper.commit([[0]])
                tokens.append(int(logits[0].argmax()))
                drafting.observe(Verified(tree, (0,), (tokens[-1],), logits))
                trees.append(tree)
            steps = []
            for place, tree in enumerate(trees):
                node, right = tree.child(0, tokens[place + 1]), []
                for after in tokens[place + 2 :]:
                    if node is None:
                        break
                    right.append(node)
                    node = tree.child(node, after)
                steps.append([[round(100 * value) for value in tree.values[1:]], right])
            found[group].append(steps)
    arguments.target.write_text(json.dumps(found, separators=(",", ":")).replace('"],', '"],\n'), encoding="utf-8")


if __name__ == "__main__":
    main()
