"""What drafters that read a context learn from texts: Chimera's imitation of hidden states, Falcon's glancing distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.passes.speculate.chimera import Chimera
from subquad.passes.speculate.falcon import Falcon
from subquad.training.heads import DECAY
from subquad.training.sequences import Lesson, Texts

IMITATED = 0.1
"""Weight of the distance to the model's hidden states, beside the cross-entropy of the tokens."""


def imitation(heads: Chimera) -> Lesson:
    """Every level's cross-entropy, and how far the context layer is from what the model's head read (Chimera, §3.3)."""

    def lesson(texts: Texts, done: float, source: torch.Generator) -> dict[str, Tensor]:
        fast = heads.along(texts.hidden, texts.ids)
        read = F.linear(texts.hidden, heads.narrow)
        size = read[texts.real].square().mean()
        loss = far = torch.zeros(())
        for level in range(heads.levels):
            wanted, there = texts.ahead(level + 1)
            if not bool(there.any()):
                continue
            found = fast[:, :, level][there]
            target = read.roll(-level - 1, 1)[there]
            far = far + DECAY**level * F.mse_loss(found, target) / size
            scores = heads.product(heads.features(level, texts.hidden[there], found), heads.words.weight)
            loss = loss + DECAY**level * F.cross_entropy(scores, wanted[there])
        return {"loss": loss + IMITATED * far, "ce": loss, "far": far}

    return lesson


NOISE = 0.2
"""Width of the uniform noise on what was read, for a d of 512 (Falcon's training)."""
FEATURES, TOKENS, HARD = 1.0, 0.1, 0.1
"""Weights of the smooth distance to what was read, of the tokens' losses, and in these of the cross-entropy beside the KL."""
FIRST, LAST = 0.4, 0.0
"""Share of the wrong rows that are shown at first and at last (Falcon, §3.2)."""


def glancing(heads: Falcon, head: Tensor) -> Lesson:
    """Coupled sequential glancing distillation (Falcon, §3.2); head: the weight [V, d] of the model's head of logits.

    A first pass counts the rows whose guess is wrong.  Before the second one a falling share of so many rows, block by block, is
    replaced by what it should foresee, the token and what was read together, so that hard texts begin easy; the loss is that of
    the other rows.
    """
    known = head.detach()[heads.ids].float()

    def lesson(texts: Texts, done: float, source: torch.Generator) -> dict[str, Tensor]:
        k = heads.k
        noise = NOISE * 512 / texts.hidden.shape[-1] * (torch.rand(texts.hidden.shape, generator=source) - 0.5)
        hidden, tokens = texts.hidden + noise, texts.ids.roll(-1, 1)
        aim, behind = texts.hidden.roll(-k, 1), tokens.roll(-k, 1)
        wanted, there = texts.ahead(k)
        offset = int(torch.randint(k, (1,), generator=source))
        with torch.no_grad():
            first = heads.product(heads.along(hidden, tokens, offset)[there], heads.words.weight)
            wrong = int((first.argmax(-1) != wanted[there]).sum())
        count = int(wrong * (LAST + (FIRST - LAST) * (1 - done)))
        shown = _shown(there & texts.ahead(k + 1)[1], k, offset, count, source)
        tokens = torch.where(shown, behind, tokens)
        hidden = torch.where(shown[..., None], aim, hidden)
        there = there & ~shown
        found = heads.along(hidden, tokens, offset)[there]
        scores = heads.product(found, heads.words.weight)
        hard = F.cross_entropy(scores, wanted[there])
        law = (aim[there] @ known.T).log_softmax(-1)
        soft = F.kl_div(scores.log_softmax(-1), law, reduction="batchmean", log_target=True)
        size = aim[there].square().mean().sqrt()
        far = F.smooth_l1_loss(heads.product(found, heads.foreseen.weight) / size, aim[there] / size)
        return {"loss": FEATURES * far + TOKENS * ((1 - HARD) * soft + HARD * hard), "ce": hard, "kl": soft, "far": far}

    return lesson


def _shown(there: Tensor, block: int, offset: int, count: int, source: torch.Generator) -> Tensor:
    """bool [B, T]: about `count` of the rows that are there, in runs that begin where a block does."""
    starts = there.clone()
    places = torch.arange(there.shape[1])
    starts[:, (places - offset) % block != 0] = False
    found = starts.nonzero()
    chosen = found[torch.randperm(len(found), generator=source)[: count // max(1, block - 1)]]
    shown = torch.zeros_like(there)
    for more in range(max(1, block - 1)):
        at = (chosen[:, 1] + more).clamp_max(there.shape[1] - 1)
        shown[chosen[:, 0], at] = True
    return shown & there
