"""Every drafter that is trained, with parameters that mean nothing: the law of what is drawn, chains, models that cannot branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from enumeration import Outcomes, law_of, variation
from spelled_models import sharp_llama, tiny_llama
from test_context_heads import heads
from test_draft_heads import IDS, random_heads, tokens
from test_prompt_tokens import prompt_tokens

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.decoding import AcceptanceRule, Choice, Drafter, Drafting, Verified
from subquad.ir.draft import DraftTree
from subquad.passes.speculate.context_heads import ContextDrafter
from subquad.passes.speculate.head_drafts import HeadDrafter
from subquad.passes.speculate.prompt_tokens import PromptTokenDrafter, PromptTokens
from subquad.passes.speculate.speculate import HEADS
from subquad.runtime.pacing import FixedPacing
from subquad.runtime.processors import processors
from subquad.runtime.speculation import Ending

MAKERS: dict[str, Callable[[torch.Tensor], Drafter]] = {
    **{name: lambda head, kind=kind: HeadDrafter(random_heads(kind, head), least=0.0) for name, kind in HEADS.items()},  # type: ignore[misc]
    "chimera": lambda head: ContextDrafter(heads("chimera", head), least=0.0),
    "falcon": lambda head: ContextDrafter(heads("falcon", head), least=0.0),
    "ppd": lambda head: PromptTokenDrafter(
        PromptTokens.restored(prompt_tokens(copies=2).parameters_by_name(), head), least=0.0
    ),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True)
class Chains:
    """A drafter whose trees are cut to their first path."""

    whole: Drafter

    @property
    def acceptance(self) -> AcceptanceRule:
        return self.whole.acceptance

    def start(self, tokens: Sequence[int], choice: Choice) -> Drafting:
        return ChainDrafting(self.whole.start(tokens, choice))


@dataclass
class ChainDrafting:
    whole: Any

    def read(self, hidden: torch.Tensor) -> None:
        if hasattr(self.whole, "read"):
            self.whole.read(hidden)

    def propose(self, rows: int, depth: int) -> DraftTree:
        return self.whole.propose(rows, depth).first_path()

    def observe(self, result: Verified) -> None:
        self.whole.observe(result)


@pytest.fixture(scope="module")
def double() -> Decoder:
    model = tiny_llama(2).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return decoder(subquad.rewrite(model, passes="fuse", verify=False))


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_drawn_has_the_law_of_plain_decoding(double: Decoder, name: str) -> None:
    """Every outcome of four draws among two tokens each, in float64."""
    drafter = MAKERS[name](double.trained.found_head(name))

    def answer(chance: Outcomes, drafter: Drafter | None) -> tuple[int, ...]:
        choice = Choice(processors(1.0, 2, 1.0), False, chance)
        passes = double.decode(
            IDS[1:2], choice=choice, ending=Ending(4), drafter=drafter, pacing=FixedPacing(9), share=False
        )
        return tuple(emission.token for one in passes for emission in one.emitted[0])

    plain, drafted = (law_of(lambda chance, by=by: answer(chance, by)) for by in (None, drafter))  # type: ignore[misc]
    assert len(plain) == 16
    assert variation(plain, drafted) < 1e-10


@pytest.fixture(scope="module")
def made() -> Decoder:
    return decoder(subquad.rewrite(sharp_llama(2), passes="fuse", verify=False))


@pytest.fixture(scope="module")
def recurrent() -> Decoder:
    wanted = "linearize:lolcats(window=4, sinks=1, features=8)"
    return decoder(subquad.rewrite(sharp_llama(2), passes=wanted, verify=False))


@pytest.mark.parametrize("name", MAKERS)
def test_chains_keep_the_tokens(made: Decoder, name: str) -> None:
    drafter = Chains(MAKERS[name](made.trained.found_head(name)))
    for ids in (IDS, IDS[1:2]):
        assert tokens(made, ids, drafter, {}, 7)[0] == tokens(made, ids, None, {})[0]


@pytest.mark.parametrize("name", MAKERS)
def test_a_model_that_cannot_branch_gets_chains(recurrent: Decoder, name: str) -> None:
    assert not recurrent.trees
    drafter = MAKERS[name](recurrent.trained.found_head(name))
    for ids in (IDS[1:], IDS[1:2]):
        assert tokens(recurrent, ids, drafter, {}, 9)[0] == tokens(recurrent, ids, None, {})[0]
