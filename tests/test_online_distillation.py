"""Heads that learn while they draft: tokens stay, guesses get better, and updates happen between passes only."""

from __future__ import annotations

import pytest
import torch
from spelled_models import sharp_llama
from test_draft_heads import KNOBS, random_heads, tokens

import subquad
from subquad.decoder import Decoder
from subquad.incremental import decoder
from subquad.ir.errors import PassError
from subquad.ir.trained import Trained, head_digest
from subquad.passes.speculate.head_drafts import HeadDrafter
from subquad.passes.speculate.hydra import Hydra
from subquad.passes.speculate.online_distillation import OnlineDistillation
from subquad.passes.speculate.speculate import HEADS, Speculate
from subquad.speculation_words import spoken

IDS = torch.tensor([[3, 4, 3, 4, 3, 4, 3], [3, 4, 3, 4, 8, 8, 8], [9, 8, 7, 6, 5, 4, 3]])


@pytest.fixture(scope="module")
def made() -> Decoder:
    return decoder(subquad.rewrite(sharp_llama(2), passes="fuse", verify=False))


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tokens_stay_while_weights_move(made: Decoder, name: str, mode: type) -> None:
    head = made.trained.found_head(name)
    with mode():
        drafter = OnlineDistillation(HeadDrafter(random_heads(HEADS[name], head), least=0.0), interval=3, rate=1e-2)
        before = {n: p.clone() for n, p in drafter.drafter.heads.named_parameters()}
        for knobs in KNOBS[:2]:
            for ids in (IDS, IDS[1:2]):
                if knobs.get("temperature") and len(ids) > 1:
                    continue
                assert tokens(made, ids, drafter, knobs)[0] == tokens(made, ids, None, knobs)[0]
        assert drafter.pupil.updates > 2
        moved = [n for n, p in drafter.drafter.heads.named_parameters() if not torch.equal(p, before[n])]
        assert "words.weight" in moved


def test_passes_get_fewer_with_use(made: Decoder) -> None:
    torch.manual_seed(2)
    head = made.trained.found_head("hydra")
    heads = Hydra(48, torch.arange(64), 48, 3).fitted(head)
    restored = Hydra.restored(heads.parameters_by_name(), head)
    drafter = OnlineDistillation(HeadDrafter(restored), interval=4, rate=3e-3)
    counts = [tokens(made, IDS, drafter, {})[1] for _ in range(12)]
    assert counts[-1] < 0.8 * counts[0]


def test_the_word_for_it() -> None:
    head = torch.randn(64, 48)
    kept = Trained({"hydra": random_heads(Hydra, head).parameters_by_name()}, {"hydra": head_digest(head)}, head)
    way = spoken({"method": "hydra", "online_update_interval": 8}, None)
    assert isinstance(way, Speculate)
    drafter = way.drafter(kept)
    assert isinstance(drafter, OnlineDistillation)
    assert drafter.interval == 8
    with pytest.raises(PassError, match="online_update_interval is -1"):
        spoken({"method": "hydra", "online_update_interval": -1}, None)
