"""Several deterministic drafters as one: their trees merged, the likeliest nodes first, within one budget of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from torch import Tensor

from subquad.ir.decoding import (
    AcceptanceRule,
    Choice,
    Drafter,
    Drafting,
    OwnModel,
    ReadingDrafting,
    SelfDrafting,
    Verified,
)
from subquad.ir.draft import DraftTree
from subquad.ir.errors import PassError
from subquad.ir.probes import counts_behind
from subquad.passes.speculate.sample_and_descend import SampleAndDescend


def merge(trees: Sequence[DraftTree], rows: int) -> DraftTree:
    """The trie of all trees' paths, cut to the nodes of highest value; `rows` below the root at most, with probes.

    A path that several trees propose counts once, with the highest of its values.  Of the first tree that has probes those
    behind the root come before any node, those behind other nodes where there is room left.
    """
    tokens, parents, values = [trees[0].tokens[0]], [-1], [1.0]
    place: dict[tuple[int, int], int] = {}
    heap: list[tuple[float, int, int, int]] = []  # (−value, tree, node, parent in the trie)
    probing = next((n for n, tree in enumerate(trees) if tree.probes is not None), 0)
    behind = counts_behind(trees[probing].probes, len(trees[probing]))
    kept, room = {0: 0}, rows - behind[0]

    def push(which: int, node: int, into: int) -> None:
        tree = trees[which]
        for child in tree.children[node]:
            value = tree.values[child] if tree.values else 0.0
            heappush(heap, (-min(value, values[into]), which, child, into))

    for which in range(len(trees)):
        push(which, 0, 0)
    while heap:
        value, which, node, into = heappop(heap)
        key = (into, trees[which].tokens[node])
        if key not in place:
            if len(tokens) > room:
                break
            place[key] = len(tokens)
            tokens.append(key[1])
            parents.append(into)
            values.append(-value)
        if which == probing:
            kept[node] = place[key]
        push(which, node, place[key])
    room -= len(tokens) - 1
    for node in list(kept)[1:]:
        room -= behind[node]
        if room < 0:
            del kept[node]
    probes = trees[probing].probes
    kept_probes = None if probes is None else probes.behind(kept)
    return DraftTree(tuple(tokens), tuple(parents), tuple(values), probes=kept_probes)


@dataclass(frozen=True)
class Union:
    """Each part proposes as if it were alone, and learns from all that is committed.

    Raises PassError for a part whose drafts are drawn: they must not be merged, or their acceptance would not be exact.
    """

    parts: tuple[Drafter, ...]
    acceptance: AcceptanceRule = field(default_factory=SampleAndDescend)

    def __post_init__(self) -> None:
        for part in self.parts:
            if not isinstance(part.acceptance, SampleAndDescend):
                raise PassError(
                    f"{type(part).__name__} draws its drafts at random, so it cannot be united with others."
                )

    def start(self, tokens: Sequence[int], choice: Choice) -> _United:
        """All parts begin the sequence."""
        return _United([part.start(tokens, choice) for part in self.parts])


@dataclass
class _United:
    parts: list[Drafting]

    def attach(self, own: OwnModel) -> None:
        """The parts that draft with the model itself get it."""
        for part in self.parts:
            if isinstance(part, SelfDrafting):
                part.attach(own)

    def read(self, hidden: Tensor) -> None:
        """The parts that go on from the prompt do."""
        for part in self.parts:
            if isinstance(part, ReadingDrafting):
                part.read(hidden)

    def propose(self, rows: int, depth: int) -> DraftTree:
        """The merged tree of at most `rows` nodes."""
        return merge([part.propose(rows, depth) for part in self.parts], rows)

    def observe(self, result: Verified) -> None:
        """Every part learns."""
        for part in self.parts:
            part.observe(result)
