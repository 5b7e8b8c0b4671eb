"""PPD: trained prompt tokens run through the model beside the draft, and foretell tokens further on (2405.18628)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from subquad.ir.decoding import AcceptanceRule, Choice, Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import GenerationError
from subquad.ir.probes import Probes
from subquad.passes.speculate.likeliest_tree import Guess, grow
from subquad.passes.speculate.probe_budget import with_most_worth
from subquad.passes.speculate.rates import Rates
from subquad.passes.speculate.sample_and_descend import SampleAndDescend

MASKS = ("ensemble", "decoder", "encoder")
"""What copy c of prompt token i sees of the others (paper, §3.2): copy c of the tokens up to i; all copies of the tokens before i
and itself; or all copies of the tokens up to i."""


class PromptTokens:
    """Prompt token i of a copy is the embedding of an id and what was trained to be added to it; it guesses i places ahead.

    ids: int64 [m].  added: [copies, m, e] (the paper's ensemble prompt tokens; their logits are averaged).  mask: one of MASKS.
    vocabulary: V.
    """

    name: ClassVar[str] = "ppd"

    def __init__(self, ids: Tensor, added: Tensor, mask: str, vocabulary: int) -> None:
        self.ids, self.added, self.mask, self.vocabulary = ids, added, mask, vocabulary

    @property
    def levels(self) -> int:
        """m."""
        return self.added.shape[1]

    @property
    def copies(self) -> int:
        """Of every prompt token."""
        return self.added.shape[0]

    @classmethod
    def restored(cls, parameters: Mapping[str, Tensor], head: Tensor) -> Self:
        """From stored parameters, for a model with this head of logits [V, d]; raises GenerationError for any others."""
        try:
            ids, added, mask = (
                parameters["ids"].clone(),
                parameters["added"].to(head.dtype),
                MASKS[int(parameters["mask"])],
            )
            if added.dim() != 3 or ids.shape != added.shape[1:2] or not added.numel():
                raise ValueError(f"{list(added.shape)} numbers for {list(ids.shape)} ids")
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise GenerationError(
                f"the stored parameters are no ppd prompt tokens ({error}); train them again."
            ) from error
        if int(ids.max()) >= head.shape[0]:
            raise GenerationError(
                f"the ppd prompt tokens begin as token {int(ids.max())}, but the model has {head.shape[0]} tokens; "
                "train them again."
            )
        return cls(ids, added, mask, head.shape[0])

    def parameters_by_name(self) -> dict[str, Tensor]:
        """What `restored` reads."""
        return {"ids": self.ids, "added": self.added.detach(), "mask": torch.tensor(MASKS.index(self.mask))}

    def drafter(self) -> PromptTokenDrafter:
        """What drafts with them."""
        return PromptTokenDrafter(self)

    def probes(self, counts: Sequence[int]) -> Probes | None:
        """The first counts[n] prompt tokens, in all copies, behind each node n."""
        found = [(n, i, c) for n, count in enumerate(counts) for c in range(self.copies) for i in range(count)]
        if not found:
            return None
        nodes, places, copies = (tuple(part) for part in zip(*found, strict=True))
        node, place, copy = (torch.tensor(part) for part in (nodes, places, copies))
        ids = tuple(int(self.ids[i]) for i in places)
        seen = (node[:, None] == node) & seen_of(self.mask, place, copy)
        return Probes(nodes, tuple(i + 1 for i in places), copies, ids, self.added[copy, place], seen)


def seen_of(mask: str, place: Tensor, copy: Tensor) -> Tensor:
    """bool [n, n]: which prompt tokens behind one node each sees; place, copy: int64 [n]."""
    before, level = place[None] < place[:, None], place[None] == place[:, None]
    same = copy[None] == copy[:, None]
    return {"ensemble": (before | level) & same, "decoder": before | (level & same), "encoder": before | level}[mask]


def prior(level: int) -> float:
    """The rate of a level's best guesses before anything was counted."""
    return 0.4


@dataclass(frozen=True, eq=False)
class PromptTokenDrafter:
    """Trees from what the prompt tokens behind the last accepted node foretold.

    Every node of a tree may have prompt tokens behind it, so that whichever is accepted last, there are guesses for the next
    pass.  How many rows are nodes, and how many prompt tokens stand behind which, is what promises the most tokens by the
    measured rates (the paper's dynamic sparse tree).  branch, least: see `likeliest_tree.grow`.
    """

    prompt: PromptTokens
    branch: int = 4
    least: float = 0.04
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)
    rates: Rates = field(default_factory=lambda: Rates(prior))

    def start(self, tokens: Sequence[int], choice: Choice) -> _Prompting:
        """A sequence; the rates stay."""
        return _Prompting(self, tokens[-1])

    def worth(self) -> list[float]:
        """Tokens that are expected to be accepted with guesses of 0, 1, … m levels."""
        found, chance = [0.0], 1.0
        for level in range(self.prompt.levels):
            chance *= self.rates.rate(level)
            found.append(found[-1] + chance)
        return found


@dataclass
class _Prompting:
    drafter: PromptTokenDrafter
    last: int
    _scores: list[Tensor] = field(default_factory=list)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The most probable nodes, with prompt tokens behind those that are likely to be the last accepted ones."""
        one, root = self.drafter, DraftTree((self.last,), (-1,), (1.0,))
        if rows <= 0:
            return root
        with torch.inference_mode():
            tree = root
            if self._scores:
                ids = torch.arange(one.prompt.vocabulary)
                tree = grow(self.last, self._guess(), ids, rows, min(depth, len(self._scores)), one.branch, one.least)
            return with_most_worth(tree, rows, one.prompt, one.worth())

    def _guess(self) -> Guess:
        """What was foretold of a level does not depend on the path."""
        return lambda level, paths: self._scores[level][None].expand(len(paths), -1)

    def observe(self, result: Verified) -> None:
        """Keep what was foretold behind the last accepted node, and count how far the guesses were right."""
        one, accepted = self.drafter, len(result.path) - 1
        for level in range(min(max(result.tree.depths), accepted + 1)):
            one.rates.add(level, level < accepted)
        self._scores, self.last = [], result.tokens[-1]
        probes = result.tree.probes
        if probes is None or result.probed is None:
            return
        own = [n for n, node in enumerate(probes.nodes) if node == result.path[-1]]
        for depth in range(1, one.prompt.levels + 1):
            rows = [n for n in own if probes.depths[n] == depth]
            if not rows:
                break
            self._scores.append(result.probed[rows].float().mean(0))
