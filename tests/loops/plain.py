"""Decoding loops as people write them, without a catch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from spelled_models import HandWrittenDecoder, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from loops.case import Case
from loops.models import VOCABULARY, FlatRowDecoder, LastRowDecoder, OwnCache, Translator


def decoder() -> HandWrittenDecoder:
    return HandWrittenDecoder(VOCABULARY)


def gpt2() -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
        )
    )
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
    return model.eval()


def llama() -> Any:
    return tiny_llama(1, vocab_size=VOCABULARY)


def cropped_sampler(self, idx, count=20, heat=0.9, k=7):
    for _ in range(count):
        window = idx if idx.size(1) <= self.block_size else idx[:, -self.block_size :]
        logits, _ = self(window)
        logits = logits[:, -1, :] / heat
        if k is not None:
            best, _ = torch.topk(logits, min(k, logits.size(-1)))
            logits[logits < best[:, [-1]]] = -float("inf")
        chances = F.softmax(logits, dim=-1)
        follower = torch.multinomial(chances, num_samples=1)
        idx = torch.cat((idx, follower), dim=1)
    return idx


def sample_or_best(self, x, steps=20, temperature=1.0, do_sample=False):
    for _ in range(steps):
        logits, _ = self(x[:, -self.block_size :])
        probs = F.softmax(logits[:, -1, :] / temperature, dim=-1)
        if do_sample:
            chosen = torch.multinomial(probs, num_samples=1)
        else:
            _, chosen = torch.topk(probs, k=1, dim=-1)
        x = torch.cat((x, chosen), dim=1)
    return x


def notebook_cell(model, ids, eos=3, longest=30):
    while True:
        best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], 1)
        if best == eos or ids.shape[1] >= longest:
            break
    return ids


def list_of_numbers(net, prompt, limit=18):
    numbers = prompt[0].tolist()
    while len(numbers) < limit:
        scores = net(torch.tensor([numbers]))
        numbers.append(int(scores[0, -1].argmax()))
    return numbers


def nucleus(weights, mass):
    ordered, places = torch.sort(weights, dim=-1, descending=True)
    total = torch.cumsum(ordered, dim=-1)
    ordered[total - ordered > mass] = 0.0
    ordered.div_(ordered.sum(dim=-1, keepdim=True))
    drawn = torch.multinomial(ordered, num_samples=1)
    return torch.gather(places, -1, drawn)


def ragged_buffer(model, prompts, total=20, temperature=0.8, top_p=0.9, eos=5):
    rows, least = prompts.shape[0], prompts.shape[1] - 1
    buffer = torch.full((rows, total), -1, dtype=torch.long)
    buffer[:, : prompts.shape[1]] = prompts
    buffer[0, prompts.shape[1] - 1] = -1
    given = buffer != -1
    ended = torch.tensor([False] * rows)
    for place in range(least, total):
        logits = model.forward(buffer[:, :place])
        if temperature > 0:
            chosen = nucleus(torch.softmax(logits[:, -1] / temperature, dim=-1), top_p)
        else:
            chosen = torch.argmax(logits[:, -1], dim=-1)
        chosen = torch.where(given[:, place], buffer[:, place], chosen.reshape(-1))
        buffer[:, place] = chosen
        ended |= (~given[:, place]) & (chosen == eos)
        if all(ended):
            break
    return buffer


def whole_buffer(model, prompt, count=15):
    room = torch.zeros(prompt.shape[0], prompt.shape[1] + count, dtype=torch.long)
    room[:, : prompt.shape[1]] = prompt
    for at in range(prompt.shape[1], room.shape[1]):
        room[:, at] = model(room)[:, at - 1].argmax(-1)
    return room


def race(scores, heat, k):
    scores = scores / max(heat, 1e-5)
    best, _ = torch.topk(scores, k)
    scores = torch.where(scores < best.select(-1, -1).unsqueeze(-1), -float("inf"), scores)
    chances = torch.softmax(scores, dim=-1)
    noise = torch.empty_like(chances).exponential_(1)
    return torch.argmax(chances / noise, dim=-1, keepdim=True).to(dtype=torch.int), chances


def one_token(model, x, places, **knobs):
    return race(model(x, places)[:, -1], **knobs)


def many_tokens(model, current, places, count, callback=lambda _: None, **knobs):
    made = []
    for _ in range(count):
        following, _ = one_token(model, current, places, **knobs)
        places += 1
        made.append(following.clone())
        callback(made[-1])
        current = following.clone()
    return made


def static_cache(model, prompt, count=12, heat=0.8, k=5):
    places = torch.arange(prompt.shape[1])
    first, _ = one_token(model, prompt, places, heat=heat, k=k)
    made = many_tokens(model, first.view(1, -1), torch.tensor([prompt.shape[1]]), count, heat=heat, k=k)
    return torch.cat([prompt[0].int(), first[0], *(m[0] for m in made)])


def slices_of_a_buffer(model, prompt, total=16):
    tokens = torch.zeros(prompt.shape[0], total, dtype=torch.long)
    tokens[:, : prompt.shape[1]] = prompt
    before = 0
    for now in range(prompt.shape[1], total):
        logits = model.forward(tokens[:, before:now], before)
        tokens[:, now] = logits[:, -1].argmax(-1)
        before = now
    return tokens


def cache_handed_back(model, ids, count=10):
    past, feed = None, ids
    for _ in range(count):
        out = model(feed, past=past)
        past = out.past
        feed = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, feed], dim=-1)
    return ids


def translate(model, source, start=1, stop=2, most=12):
    memory = model.encoder(source)
    words = torch.full((source.shape[0], 1), start, dtype=torch.long)
    done = torch.zeros(source.shape[0], dtype=torch.bool)
    while words.shape[1] < most and not done.all():
        nxt = model.decoder(words, memory)[:, -1].argmax(-1)
        nxt = torch.where(done, torch.full_like(nxt, stop), nxt)
        words = torch.cat([words, nxt[:, None]], 1)
        done |= nxt == stop
    return words


def stream(model, ids, count=15):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        yield ids[:, -1].tolist()


def first_of_equals(net, ids, steps=15):
    out = ids.clone()
    for _ in range(steps):
        row = net(out).float()
        row = row.log_softmax(-1)
        value, place = row.max(dim=-1)
        out = torch.hstack([out, place.unsqueeze(1)])
    return out


CASES = [
    Case(cropped_sampler, LastRowDecoder, {"count": 40}, batch=2,
         reads={"context": "full prefix", "window": "crop", "choice": "multinomial", "write": "cat", "bound": "for"}),
    Case(sample_or_best, LastRowDecoder, {"do_sample": True}, batch=2, reads={"choice": "multinomial or top-1", "window": "crop"}),
    Case(notebook_cell, llama, reads={"choice": "argmax", "bound": "while", "write": "cat", "stop": "break"}),
    Case(list_of_numbers, decoder, reads={"write": "append", "context": "full prefix"}),
    Case(ragged_buffer, decoder, batch=2, longest=9,
         reads={"write": "slot write", "stop": "rows that ended", "processors": "temperature"}),
    Case(whole_buffer, decoder, batch=2, reads={"write": "slot write"}),
    Case(static_cache, OwnCache, refused=("context", "cache of its own", "following, _ = one_token"),
         reads={"context": "last token", "positions": "counter", "choice": "exponential race"}),
    Case(slices_of_a_buffer, OwnCache, batch=2, refused=("context", "cache of its own", "model.forward(tokens[:, before:now]"),
         reads={"context": "slice", "positions": "counter"}),
    Case(translate, Translator, batch=2, reads={"context": "full prefix", "stop": "rows that ended"}),
    Case(stream, decoder, batch=2, reads={"result": "yield"}),
    Case(first_of_equals, FlatRowDecoder, batch=2, reads={"choice": "argmax"}),
]  # fmt: skip
