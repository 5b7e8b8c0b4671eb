"""Decoding loops that carry a cache of their own from call to call, plainly and with a catch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, StaticCache

from loops.case import Case
from loops.models import VOCABULARY, ReturnedCache
from loops.plain import cache_handed_back, llama


class PairCache(nn.Module):
    """Two blocks over learned positions that return (logits, [(keys, values)]) and take the pairs back.

    kept: how many of the last keys a block hands on, None for all.  counts: False forgets that earlier tokens moved the
    positions.
    """

    def __init__(self, kept: int | None = None, counts: bool = True, longest: int = 64) -> None:
        super().__init__()
        self.kept, self.counts, self.longest = kept, counts, longest
        self.tokens, self.places = nn.Embedding(VOCABULARY, 32), nn.Embedding(longest, 32)
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.head = nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor, kv: Any = None) -> Any:
        held = 0 if kv is None else kv[0][0].shape[2]
        start = held if self.counts else 0
        h = self.tokens(x) + self.places(torch.arange(start, start + x.shape[1], device=x.device))
        handed = []
        for n, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in qkv(h).chunk(3, -1))
            if kv is not None:
                k, v = torch.cat([kv[n][0], k], 2), torch.cat([kv[n][1], v], 2)
            if kv is None:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = F.scaled_dot_product_attention(q, k, v)
            h = h + out(y.transpose(1, 2).flatten(2))
            if self.kept is not None:
                k, v = k[:, :, -self.kept :], v[:, :, -self.kept :]
            handed.append((k, v))
        return self.head(h), handed


def prefill_then_steps(model, ids, count=12):
    out = model(ids, use_cache=True)
    past = out.past_key_values
    made = [out.logits[:, -1:].argmax(-1)]
    for _ in range(count - 1):
        out = model(input_ids=made[-1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        made.append(out.logits[:, -1:].argmax(-1))
    return torch.cat([ids, *made], 1)


def cache_made_by_the_caller(model, ids, count=12):
    cache, feed = DynamicCache(), ids
    for _ in range(count):
        row = model(feed, past_key_values=cache).logits[:, -1].float()
        feed = torch.multinomial((row / 0.7).softmax(-1), 1)
        ids = torch.cat([ids, feed], -1)
    return ids, cache.get_seq_length()


def feeds_what_the_cache_lacks(model, ids, count=12, eos=3):
    cache = DynamicCache(config=model.config)
    while count:
        out = model(ids[:, cache.get_seq_length() :], past_key_values=cache)
        best = out.logits[:, -1, :].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
        if (best == eos).all():
            break
        count -= 1
    return ids


def padded_with_a_growing_mask(model, ids, count=12):
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    past, feed = None, ids
    for _ in range(count):
        out = model(input_ids=feed, attention_mask=mask, past_key_values=past, use_cache=True)
        past, feed = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, feed], 1), torch.cat([mask, torch.ones_like(feed)], 1)
    return ids


def positions_by_hand(model, ids, count=12):
    past, feed, seen = None, ids, 0
    for _ in range(count):
        where = torch.arange(seen, seen + feed.shape[1]).unsqueeze(0)
        out = model(input_ids=feed, position_ids=where, past_key_values=past)
        seen += feed.shape[1]
        past, feed = out.past_key_values, out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, feed], 1)
    return ids


def pairs_of_tensors(model, ids, count=14, k=5):
    cache, x = None, ids
    for _ in range(count):
        logits, cache = model(x, cache)
        best, places = torch.topk(logits[:, -1], k)
        x = places.gather(1, torch.multinomial(best.softmax(-1), 1))
        ids = torch.cat([ids, x], 1)
    return ids, cache[0][0].shape


def two_turns(model, ids, count=6):
    cache, feed = DynamicCache(), ids
    said = []
    for n in range(2 * count):
        best = model(feed, past_key_values=cache).logits[:, -1:].argmax(-1)
        said.append(best)
        feed = torch.cat([best, (ids + 1) % VOCABULARY], 1) if n == count - 1 else best
    return torch.cat(said, 1)


def hands_the_cache_on(model, ids, count=8):
    past, feed = None, ids
    for _ in range(count):
        out = model(feed, past_key_values=past)
        past, feed = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return feed, [(layer.keys, layer.values) for layer in past.layers]


def takes_tokens_back(model, ids, count=12):
    cache, feed, made = DynamicCache(), ids, []
    for n in range(count):
        best = model(feed, past_key_values=cache).logits[:, -1:].argmax(-1)
        if n % 5 == 4:
            cache.crop(-2)
            best = (best + 1) % VOCABULARY
        made.append(best)
        feed = best
    return torch.cat(made, 1), cache.get_seq_length()


def rows_change_places(model, ids, count=10):
    past, feed, made = None, ids, []
    for _ in range(count):
        out = model(feed, past_key_values=past)
        past, order = out.past_key_values, torch.tensor([1, 0])
        past.reorder_cache(order)
        feed = out.logits[:, -1:].argmax(-1)[order]
        made = [row[order] for row in made] + [feed]
    return torch.cat(made, 1)


def weighs_its_keys(model, ids, count=10):
    past, feed, norms = None, ids, 0.0
    for _ in range(count):
        out = model(feed, past_key_values=past)
        past = out.past_key_values
        norms = norms + past.layers[0].keys.norm(dim=-1).sum()
        feed = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, feed], 1)
    return ids, norms


def forgets_old_keys(model, ids, count=14, window=6):
    kv, x = None, ids
    for _ in range(count):
        logits, kv = model(x, kv)
        kv = [(k[:, :, -window:], v[:, :, -window:]) for k, v in kv]
        x = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, x], 1)
    return ids


def keeps_a_copy(model, ids, count=10):
    kv, x, first = None, ids, None
    for n in range(count):
        logits, kv = model(x, kv)
        first = kv if n == 5 else first
        x = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, x], 1)
    again, _ = model(ids[:, -1:], first)
    return ids, again[:, -1].argmax(-1)


def kept_by_the_caller(model, ids, count=7, cache=None):
    cache = DynamicCache() if cache is None else cache
    for _ in range(count):
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    return ids, cache


def writes_to_its_keys(model, ids, count=12):
    kv, x = None, ids
    for n in range(count):
        logits, kv = model(x, kv)
        if n in (6, 7):
            kv[1][0].mul_(0.5)
        x = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, x], 1)
    return ids


def results_by_number(model, ids, count=12):
    out = model(ids)
    past, best = out[1], torch.argmax(out[0][..., -1, :], dim=-1, keepdim=True)
    made = [best]
    for _ in range(count):
        logits, past = model(best, past_key_values=past)[:2]
        best = torch.argmax(logits[..., -1, :], dim=-1, keepdim=True)
        made.append(best)
    return torch.cat([ids, *made], -1)


def options_in_a_dictionary(model, ids, count=12):
    options = {"past_key_values": DynamicCache(), "attention_mask": torch.ones_like(ids)}
    for _ in range(count):
        out = model(input_ids=ids[:, options["past_key_values"].get_seq_length() :], **options)
        best = out.logits[:, -1, :].argmax(-1)
        ids = torch.cat([ids, best[:, None]], -1)
        options["attention_mask"] = torch.cat([options["attention_mask"], torch.ones_like(best[:, None])], -1)
    return ids


def one_call(model, token, past):
    out = model(input_ids=token, past_key_values=past, use_cache=True)
    return out.logits[:, -1, :], out.past_key_values


def chooses_before_it_calls(model, ids, count=12):
    row, past = one_call(model, ids, None)
    for _ in range(count):
        best = row.argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
        row, past = one_call(model, best, past)
    return ids


def preallocated(model, ids, count=12):
    cache, feed, made = StaticCache(config=model.config, max_cache_len=64), ids, []
    for _ in range(count):
        feed = model(feed, past_key_values=cache).logits[:, -1:].argmax(-1)
        made.append(feed)
    return torch.cat(made, 1)


class Keys:
    """A cache as people write it: lists of keys and values by block."""

    def __init__(self) -> None:
        self.pairs: list[Any] = []


class Writing(PairCache):
    """Writes its keys into what it is given: an object with `pairs`, or a dictionary."""

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        table = cache.__dict__ if isinstance(cache, Keys) else cache
        logits, pairs = super().forward(x, (table or {}).get("pairs") or None)
        if table is not None:
            table["pairs"] = pairs
        return logits


def cache_of_an_own_class(model, ids, count=12):
    cache, x = Keys(), ids
    for _ in range(count):
        x = model(x, cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, x], 1)
    return ids, len(cache.pairs)


def cache_in_a_dictionary(model, ids, count=12):
    cache: dict[str, Any] = {}
    x = ids
    for _ in range(count):
        x = model(x, cache)[:, -1:].argmax(-1)
        ids = torch.cat([ids, x], 1)
    return ids


def few_keys() -> PairCache:
    return PairCache(kept=24)


def lost_positions() -> PairCache:
    return PairCache(counts=False)


CASES = [
    Case(prefill_then_steps, llama, batch=2, reads={"context": "last token", "cache": "passed on", "choice": "argmax"}),
    Case(cache_made_by_the_caller, llama, reads={"context": "last token", "cache": "object", "choice": "multinomial"}),
    Case(feeds_what_the_cache_lacks, llama, batch=2, reads={"cache": "object", "write": "cat", "stop": "break"}),
    Case(padded_with_a_growing_mask, llama, batch=2, reads={"cache": "passed on"}),
    Case(positions_by_hand, llama, batch=2, reads={"positions": "counter", "cache": "passed on"}),
    Case(pairs_of_tensors, PairCache, batch=2, reads={"cache": "passed on", "context": "last token"}),
    Case(two_turns, llama, batch=2, reads={"cache": "object"}),
    Case(hands_the_cache_on, llama, batch=2, reads={"cache": "passed on"}),
    Case(takes_tokens_back, llama, batch=2, reads={"cache": "object"}),
    Case(rows_change_places, llama, batch=2, reads={"cache": "passed on"}, partly="read or changed by other code"),
    Case(weighs_its_keys, llama, batch=2, reads={"cache": "passed on"}, partly="read or changed by other code"),
    Case(forgets_old_keys, PairCache, batch=2, reads={"cache": "passed on"}, partly="read or changed by other code"),
    Case(keeps_a_copy, PairCache, reads={"cache": "passed on"}),
    Case(results_by_number, llama, batch=2, reads={"cache": "passed on"}),
    Case(options_in_a_dictionary, llama, batch=2, reads={"cache": "object"}),
    Case(chooses_before_it_calls, llama, batch=2, reads={"cache": "passed on", "choice": "argmax"}),
    Case(preallocated, llama, batch=2, reads={"cache": "object"}),
    Case(cache_of_an_own_class, Writing, batch=2, reads={"cache": "object"}),
    Case(cache_in_a_dictionary, Writing, batch=2, refused=("guard cache", "writes into the dict", "model(x, cache)")),
    Case(pairs_of_tensors, few_keys, batch=2, refused=("guard cache", "64 tokens", "model(x, cache)")),
    Case(pairs_of_tensors, lost_positions, batch=2, refused=("guard loop equality", "differs", "model(x, cache)")),
    Case(cache_handed_back, ReturnedCache, batch=2, refused=("guard causality", "", "out = model(feed, past=past)"),
         reads={"context": "last token", "cache": "passed on"}),
]  # fmt: skip
