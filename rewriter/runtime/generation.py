"""Greedy and sampled generation over a decode engine, one token a row at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from subquad.ir.errors import GenerationError
from subquad.runtime.decode_engine import DecodeEngine


def generate(
    engine: DecodeEngine, ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 128,
    eos_token_ids: Collection[int] = (), temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None,
) -> Iterator[list[int | None]]:  # fmt: skip
    """Yield one list a step: the new token of every row, None for a row that has ended.

    ids: int64 [B, T], padded on the left where attention_mask [B, T] is 0.  temperature 0 is greedy (the first of equal
    maxima); otherwise logits / temperature are cut to the top_k largest (0: all) and to the smallest set whose
    probabilities reach top_p, then sampled with `seed` (None: from entropy).  A row ends with an id of eos_token_ids, which
    is yielded.  Raises GenerationError for ids, masks or knobs that do not fit.
    """
    _check(ids, attention_mask, max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator(device=engine.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    batch, length = ids.shape
    state = engine.start(batch, length + max_new_tokens)
    ended = [False] * batch
    ends = set(eos_token_ids)
    step, mask = ids, attention_mask
    for n in range(max_new_tokens):
        logits = engine.run(state, step, mask)[:, -1]
        tokens = choose(logits, temperature, top_k, top_p, generator)
        values = tokens.tolist()
        yield [None if over else value for over, value in zip(ended, values, strict=True)]
        ended = [over or value in ends for over, value in zip(ended, values, strict=True)]
        if all(ended) or n + 1 == max_new_tokens:
            return
        step, mask = tokens[:, None], None


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token id per row [B] from logits [B, vocabulary]."""
    if temperature == 0:
        return logits.max(-1).indices
    scores = logits.float() / temperature
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ordered, places = scores.sort(-1, descending=True)
        weight = ordered.softmax(-1)
        beyond = weight.cumsum(-1) - weight >= top_p
        scores = scores.masked_fill(torch.zeros_like(beyond).scatter(-1, places, beyond), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _check(ids: Tensor, mask: Tensor | None, count: int, temperature: float, top_k: int, top_p: float) -> None:
    if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise GenerationError(
            f"the prompt has shape {list(ids.shape)} and dtype {ids.dtype}; give token ids [batch, tokens]."
        )
    if mask is not None and (mask.shape != ids.shape or not bool((mask[:, -1] != 0).all())):
        raise GenerationError("the attention mask must have the shape of the ids and be padded on the left.")
    if count < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise GenerationError(
            "max_new_tokens must be at least 1, temperature and top_k at least 0, and top_p in (0, 1]."
        )
