"""Decoding loops with a catch: what looks like the plain loop and is not, or what a replacement would easily lose."""

from __future__ import annotations

import random
from typing import Any

import torch

from loops.case import Case
from loops.models import (
    VOCABULARY,
    BothWays,
    Counting,
    DroppingDecoder,
    LengthScaled,
    NoisyDecoder,
)
from loops.plain import decoder, llama


def window_moves_positions(model, ids, count=20, window=6):
    for _ in range(count):
        ids = torch.cat([ids, model(ids[:, -window:])[:, -1:].argmax(-1)], 1)
    return ids


def penalty_over_everything(model, ids, count=15, penalty=1.3):
    for _ in range(count):
        row = model(ids)[:, -1]
        seen = torch.gather(row, 1, ids)
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        row = row.scatter(1, ids, seen)
        ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
    return ids


def sampled_before_cooling(model, ids, count=15, heat=0.3):
    for _ in range(count):
        row = model(ids)[:, -1]
        drawn = torch.multinomial(row.softmax(-1), 1)
        cooled = (row / heat).softmax(-1)
        keep = cooled.gather(1, drawn) > 0.01
        drawn = torch.where(keep, drawn, cooled.argmax(-1, keepdim=True))
        ids = torch.cat([ids, drawn], 1)
    return ids


def logits_changed_in_place(model, ids, count=15):
    for n in range(count):
        logits = model(ids)
        logits[:, -1, n % VOCABULARY] = -1e9
        logits /= 0.7
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def hidden_dice(model, ids, count=15):
    for _ in range(count):
        row = model(ids)[:, -1]
        torch.rand(3)
        if random.random() < 0.3:
            following = torch.randint(0, VOCABULARY, (ids.shape[0], 1))
        else:
            following = torch.multinomial(row.softmax(-1), 1)
        ids = torch.cat([ids, following], 1)
    return ids


def row_before_the_last(model, ids, count=15):
    ids = torch.cat([ids, ids[:, :1]], 1)
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, ids.shape[1] - 2].argmax(-1, keepdim=True)], 1)
    return ids


def stop_looks_at_the_token_before(model, ids, eos=7, count=25):
    previous = None
    for _ in range(count):
        following = model(ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], 1)
        if previous is not None and previous.item() == eos:
            return ids, "stopped"
        previous = following
    return ids, "ran out"


def prints_as_it_goes(model, ids, count=6):
    for n in range(count):
        following = model(ids)[0, -1].argmax()
        print(n, following.item(), end=";")
        ids = torch.cat([ids, following[None, None]], 1)
    return ids


def still_training(model, ids, count=8):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def temperature_on_a_schedule(model, ids, count=15):
    scores = 0.0
    for n in range(count):
        row = model(ids)[:, -1] / (0.5 + 0.1 * n)
        drawn = torch.multinomial(row.softmax(-1), 1)
        scores = scores + row.log_softmax(-1).gather(1, drawn)
        ids = torch.cat([ids, drawn], 1)
    return ids, scores


def edits_what_was_written(model, ids, count=14):
    for n in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
        if n % 4 == 3:
            ids[:, 1] = (ids[:, 1] + 1) % VOCABULARY
    return ids


def sees_both_ways(model, ids, count=8):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


def reads_every_row(model, ids, count=8):
    for _ in range(count):
        mean = model(ids).mean(1)
        ids = torch.cat([ids, mean.argmax(-1, keepdim=True)], 1)
    return ids


def uses_the_cache_too(model, ids, count=6):
    sizes = []
    for _ in range(count):
        out = model(ids)
        sizes.append(out.past_key_values.get_seq_length())
        ids = torch.cat([ids, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids, sizes


def learns_while_decoding(model, ids, count=5):
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    with torch.enable_grad():
        for _ in range(count):
            row = model(ids)[:, -1]
            loss = -row.log_softmax(-1).amax()
            loss.backward()
            optimiser.step()
            ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
    return ids


def unknown_chooser(model, ids, count=10, judge: Any = None):
    for _ in range(count):
        ids = torch.cat([ids, PICKERS["best"](model(ids)[:, -1])], 1)
    return ids


def unchecked(model, ids, count=40):
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    return ids


PICKERS = {"best": lambda row: row.argsort(-1)[:, -1:]}

CASES = [
    Case(window_moves_positions, decoder, batch=2, reads={"window": "crop"}),
    Case(penalty_over_everything, decoder, batch=2, reads={"processors": "penalty"}),
    Case(sampled_before_cooling, decoder, batch=2, reads={"choice": "multinomial or argmax"}),
    Case(logits_changed_in_place, decoder, batch=2, reads={"processors": "mask"}),
    Case(hidden_dice, decoder, batch=2),
    Case(row_before_the_last, decoder, batch=2, reads={"select": "row"}),
    Case(stop_looks_at_the_token_before, decoder, reads={"stop": "return"}),
    Case(prints_as_it_goes, decoder, reads={"effects": "print"}),
    Case(still_training, lambda: DroppingDecoder(VOCABULARY), training=True,
         refused=("guard determinism", "because it is in training mode", "model(ids)")),
    Case(temperature_on_a_schedule, decoder, batch=2, reads={"processors": "temperature"}),
    Case(edits_what_was_written, decoder, batch=2),
    Case(sees_both_ways, BothWays, batch=2, refused=("guard causality", "lets a token see later ones", "model(ids)")),
    Case(sees_both_ways, lambda: LengthScaled(VOCABULARY), batch=2,
         refused=("guard capture", "computes with the number of tokens", "model(ids)")),
    Case(sees_both_ways, lambda: NoisyDecoder(VOCABULARY), refused=("guard determinism", "random", "model(ids)")),
    Case(sees_both_ways, Counting, refused=("guard determinism", "buffers", "model(ids)")),
    Case(reads_every_row, decoder, batch=2),
    Case(uses_the_cache_too, llama, refused=("guard result", "more than its logits", "model(ids)")),
    Case(learns_while_decoding, decoder, refused=("effects", "trains the model", "loss.backward()")),
    Case(unknown_chooser, decoder, refused=("choice", "no token is chosen", "model(ids)")),
]  # fmt: skip
