"""Decoding loops in further styles: classes with state, penalties and filters by hand, several forwards, searches, streams."""

from __future__ import annotations

import random
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from spelled_models import HandWrittenDecoder

from loops.case import Case
from loops.models import VOCABULARY
from loops.plain import decoder, gpt2, llama

TEXT = [chr(97 + n % 26) * (1 + n % 2) for n in range(VOCABULARY)]


class Writer:
    """Keeps its sequence and its settings."""

    def __init__(self, model: Any, heat: float, eos: list[int]) -> None:
        self.model, self.heat, self.eos = model, heat, eos
        self.sequence = torch.empty(1, 0, dtype=torch.long)
        self.steps = 0

    def choose(self, row: torch.Tensor) -> torch.Tensor:
        if self.heat == 0:
            return row.argmax(-1, keepdim=True)
        return torch.multinomial((row / self.heat).softmax(-1), 1)

    def write(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        self.sequence = ids
        for _ in range(count):
            self.sequence = torch.cat([self.sequence, self.choose(self.model(self.sequence)[:, -1])], 1)
            self.steps += 1
            if self.sequence[0, -1].item() in self.eos:
                break
        return self.sequence


def class_with_state(model, ids, count=14, heat=0.7):
    writer = Writer(model, heat, [3, 8])
    return writer.write(ids, count), writer.steps


def nested_function(model, ids, count=14):
    def following(text):
        return model(text)[:, -1].argmax(-1, keepdim=True)

    for _ in range(count):
        ids = torch.cat((ids, following(ids)), 1)
    return ids


def two_ways_out(model, ids, longest=20, eos=(3, 9)):
    repeats, last = 0, -1
    while True:
        best = int(model(ids)[0, -1].argmax())
        if best in eos:
            break
        ids = torch.cat([ids, torch.tensor([[best]])], 1)
        repeats = repeats + 1 if best == last else 0
        last = best
        if repeats > 3 or ids.size(1) > longest:
            break
    else:
        raise AssertionError
    return ids


def filters_by_hand(model, ids, count=14, min_p=0.05, top_k=12, top_p=0.9, penalty=1.2, heat=0.8):
    for _ in range(count):
        logits = model(ids)[:, -1, :].clone()
        for row in range(ids.shape[0]):
            for token in set(ids[row].tolist()):
                logits[row, token] = (
                    logits[row, token] / penalty if logits[row, token] > 0 else logits[row, token] * penalty
                )
        logits = logits / heat
        logits[logits < torch.topk(logits, top_k).values[..., -1:]] = float("-inf")
        probs = logits.softmax(-1)
        probs = torch.where(probs < min_p * probs.max(-1, keepdim=True).values, torch.zeros_like(probs), probs)
        ordered, places = probs.sort(-1, descending=True)
        ordered[(ordered.cumsum(-1) - ordered) > top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, places, ordered)
        ids = torch.cat([ids, torch.multinomial(probs, 1)], -1)
    return ids


def finished_rows(model, ids, count=16, eos=(3, 5), pad=0):
    alive = torch.ones(ids.shape[0], dtype=torch.long)
    for _ in range(count):
        chosen = model(ids)[:, -1].argmax(-1)
        chosen = chosen * alive + pad * (1 - alive)
        ids = torch.cat([ids, chosen.unsqueeze(1)], 1)
        alive = alive.mul(1 - torch.isin(chosen, torch.tensor(eos)).long())
        if alive.max() == 0:
            break
    return ids


def stop_strings(model, ids, count=20, stops=("ab", "zz", "dd")):
    text = ""
    for _ in range(count):
        best = model(ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
        text += TEXT[best.item()]
        cut = min((text.find(s) for s in stops if s in text), default=-1)
        if cut >= 0:
            return ids, text[:cut]
    return ids, text


def row_by_gather(model, ids, count=12):
    for _ in range(count):
        logits = model(ids)
        place = torch.full((ids.shape[0], 1, 1), ids.shape[1] - 1).expand(-1, -1, logits.shape[-1])
        row = logits.gather(1, place).squeeze(1).clone()
        ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
    return ids


def right_padded(model, ids, count=10):
    rows = torch.arange(ids.shape[0])
    lengths = torch.tensor([ids.shape[1] - 1, ids.shape[1]])[: ids.shape[0]]
    ids = F.pad(ids, (0, count))
    for _ in range(count - 1):
        best = model(ids)[rows, lengths - 1].argmax(-1)
        ids[rows, lengths] = best
        lengths = lengths + 1
    return ids


def streams_to_a_callback(model, ids, count=12, callback=None):
    seen: list[int] = []
    callback = seen.append if callback is None else callback
    for n in range(count, 0, -1):
        best = model(ids)[:, -1].argmax(dim=-1)
        callback(best.item() * n)
        ids = torch.cat((ids, best[:, None]), dim=1)
    return ids, seen


def beams_by_hand(model, ids, count=8, beams=3):
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1))
    ids = ids.expand(beams, -1)
    for _ in range(count):
        row = model(ids)[:, -1].log_softmax(-1)
        total = (scores[:, None] + row).flatten()
        scores, places = total.topk(beams)
        origin, token = places // row.shape[-1], places % row.shape[-1]
        ids = torch.cat([ids[origin], token[:, None]], 1)
    return ids[0], scores[0]


def guided(model, ids, count=10, weight=1.5):
    bare = ids[:, -1:]
    for _ in range(count):
        row = model(bare)[:, -1] + weight * (model(ids)[:, -1] - model(bare)[:, -1])
        best = row.argmax(-1, keepdim=True)
        ids, bare = torch.cat([ids, best], 1), torch.cat([bare, best], 1)
    return ids


def guided_in_one_batch(model, ids, count=10, weight=1.5):
    both = torch.cat([ids, ids.flip(1)], 0)
    for _ in range(count):
        given, free = model(both)[:, -1].chunk(2)
        best = (free + weight * (given - free)).argmax(-1, keepdim=True)
        both = torch.cat([both, best.repeat(2, 1)], 1)
    return both[:1]


def looks_back(model, ids, count=10, k=4, alpha=0.6):
    for _ in range(count):
        best, places = model(ids)[:, -1].softmax(-1).topk(k)
        tried = torch.cat([ids.repeat_interleave(k, 0), places.view(-1, 1)], 1)
        again = model(tried)[:, -1]
        score = (1 - alpha) * best[0] - alpha * again.std(-1)
        ids = torch.cat([ids, places[:, score.argmax().item()].unsqueeze(1)], 1)
    return ids


def heals_the_last_token(model, ids, count=10):
    last = TEXT[ids[0, -1].item()]
    ids = ids[:, :-1]
    allowed = torch.tensor([t.startswith(last[0]) for t in TEXT])
    for n in range(count):
        row = model(ids)[:, -1]
        if n == 0:
            row = row.masked_fill(~allowed, -torch.inf)
        ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
    return ids


def tries_and_cleans_up(model, ids, count=10):
    was, notes = model.training, []
    model.eval()
    try:
        for n in range(count):
            ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            if ids[0, -1] == 4 and n > 2:
                return ids, notes
    finally:
        notes.append("done")
        model.train(was)
    return ids, notes


def padded_on_the_left(model, ids, count=10):
    mask = torch.ones_like(ids)
    mask[0, :1] = 0
    for _ in range(count):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        row = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1, :]
        best = row.argmax(dim=-1)
        ids = torch.cat([ids, best.unsqueeze(-1)], dim=-1)
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], dim=-1)
    return ids


def padded_in_the_second_run(model, ids, count=10):
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    for _ in range(count):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        row = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, -1, :]
        ids = torch.cat([ids, row.argmax(-1, keepdim=True)], -1)
        mask = torch.cat([mask, mask.new_ones((mask.shape[0], 1))], -1)
    return ids


def counts_by_hand(model, ids, count=10):
    for _ in range(count):
        where = torch.arange(ids.shape[1]).unsqueeze(0).expand(ids.shape[0], -1)
        ids = torch.cat([ids, model(input_ids=ids, position_ids=where).logits[:, -1:].argmax(-1)], 1)
    return ids


def counts_from_elsewhere(model, ids, count=10):
    for _ in range(count):
        where = torch.arange(ids.shape[1]).flip(0).unsqueeze(0)
        row = model(ids, position_ids=where).logits[:, -1:]
        ids = torch.cat([ids, row.argmax(-1)], 1)
    return ids


def chooses_in_numpy(model, ids, count=12, seed=3):
    source, tokens = np.random.default_rng(seed), ids[0].tolist()
    for _ in range(count):
        row = model(torch.tensor(tokens).unsqueeze(0))[0, -1].detach().numpy().astype(np.float64)
        chances = np.exp(row - row.max())
        tokens.append(int(source.choice(len(chances), p=chances / chances.sum())))
    return tokens


def appends_and_joins_at_the_end(model, ids, count=12):
    pieces = [ids]
    for _ in range(count):
        pieces.append(model(torch.cat(pieces, dim=1))[:, -1, :].argmax(-1, keepdim=True))
    return torch.cat(pieces, dim=1)


def fetches_ahead(model, ids, count=8):
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(model, ids)
        for _ in range(count):
            best = coming.result()[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
            coming = pool.submit(model, ids)
    return ids


def window_in_a_deque(model, ids, count=14, window=6):
    held = deque(ids[0].tolist(), maxlen=window)
    made = []
    for _ in range(count):
        best = model(torch.tensor([list(held)]))[:, -1].argmax().item()
        held.append(best)
        made.append(best)
    return made


def first_token_apart(model, ids, count=10):
    row = model(ids)[:, -1]
    for _ in range(count):
        best = row.argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], 1)
        row = model(ids)[:, -1]
    return ids


def samples_from_a_distribution(model, ids, count=12):
    spread = []
    for _ in range(count):
        chances = torch.distributions.Categorical(logits=model(ids)[:, -1] / 0.9)
        drawn = chances.sample()
        spread.append(chances.entropy())
        ids = torch.cat([ids, drawn.unsqueeze(-1)], -1)
    return ids, torch.stack(spread, 1)


def changes_the_head(model, ids, count=8):
    kept = model.head.weight.clone()
    for n in range(count):
        model.head.weight.data = kept * (1 + n)
        ids = torch.cat([ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1)], 1)
    model.head.weight.data = kept
    return ids


def hooks_while_decoding(model, ids, count=8):
    seen: list[float] = []
    handle = model.norm.register_forward_hook(lambda module, args, out: seen.append(1.0))
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    handle.remove()
    return ids, len(seen)


def gumbel(model, ids, count=12):
    for _ in range(count):
        row = model(ids)[:, -1]
        noise = -torch.log(-torch.log(torch.rand_like(row)))
        ids = torch.cat([ids, (row + noise).argmax(-1, keepdim=True)], 1)
    return ids


def python_dice(model, ids, count=12):
    for _ in range(count):
        weights = model(ids)[0, -1].softmax(-1).tolist()
        (token,) = random.choices(range(len(weights)), weights)
        ids = F.pad(ids, (0, 1), value=token)
    return ids


class Tallying(HandWrittenDecoder):
    """Counts its calls in an attribute."""

    calls = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(ids)


def tallying() -> Tallying:
    return Tallying(VOCABULARY)


def reads_the_tally(model, ids, count=8):
    for _ in range(count):
        ids = torch.cat([ids, (model(ids)[:, -1].argmax(-1, keepdim=True) + model.calls // 5) % VOCABULARY], 1)
    return ids, model.calls


CASES = [
    Case(class_with_state, decoder, reads={"choice": "opaque"}),
    Case(class_with_state, decoder, {"heat": 0}),
    Case(nested_function, decoder, batch=2, reads={"choice": "opaque"}),
    Case(two_ways_out, decoder, reads={"bound": "while", "stop": "break"}),
    Case(filters_by_hand, decoder, batch=2, reads={"processors": "mask", "choice": "multinomial"}),
    Case(finished_rows, decoder, batch=2, reads={"stop": "break"}),
    Case(stop_strings, decoder, reads={"stop": "return"}),
    Case(row_by_gather, decoder, batch=2),
    Case(right_padded, decoder, batch=2, longest=9, reads={"write": "slot write"}),
    Case(streams_to_a_callback, decoder, reads={"effects": "call"}),
    Case(beams_by_hand, decoder, refused=("choice", "as beam search does", "total.topk(beams)")),
    Case(guided, decoder, refused=("model", "more than once", "model(bare)")),
    Case(guided_in_one_batch, decoder, reads={"context": "full prefix"}),
    Case(looks_back, decoder, refused=("model", "more than once", "again = model(tried)")),
    Case(heals_the_last_token, decoder, longest=9, reads={"processors": "mask"}),
    Case(tries_and_cleans_up, decoder, reads={"stop": "return"}),
    Case(padded_on_the_left, llama, batch=2, longest=9),
    Case(padded_on_the_left, gpt2, batch=2, longest=9,
         refused=("guard multi-row", "differ from the model's", "row = model(input_ids=ids, attention_mask=mask")),
    Case(counts_by_hand, llama, batch=2),
    Case(padded_in_the_second_run, gpt2, batch=2, partly="their positions count from the first real token"),
    Case(counts_from_elsewhere, gpt2, partly="it was captured without `position_ids`"),
    Case(chooses_in_numpy, decoder, reads={"choice": "random choice"}),
    Case(appends_and_joins_at_the_end, decoder, batch=2, reads={"write": "append"}),
    Case(window_in_a_deque, decoder, reads={"write": "append"}),
    Case(first_token_apart, decoder, batch=2, reads={"choice": "argmax"}),
    Case(samples_from_a_distribution, decoder, batch=2, reads={"choice": "categorical"}),
    Case(changes_the_head, decoder, batch=2, partly="parameters changed",
         refused=("guard determinism", "parameters changed", "model(ids)")),
    Case(hooks_while_decoding, decoder, batch=2, refused=("guard determinism", "`norm` has a hook", "model(ids)")),
    Case(reads_the_tally, tallying, refused=("guard determinism", "its own attribute `calls`", "model(ids)")),
    Case(gumbel, decoder, batch=2, reads={"choice": "argmax"}),
    Case(python_dice, decoder, reads={"write": "pad", "choice": "random choice"}),
]  # fmt: skip
