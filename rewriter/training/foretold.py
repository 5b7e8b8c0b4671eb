"""Text with what a model foretells behind every token: what it writes itself, greedily, and what it reads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from subquad.decoder import Decoder
from subquad.runtime.decode_engine import TAIL


@dataclass(frozen=True)
class Foretold:
    """Sequences one after another.

    ids: int64 [N].  wanted: int64 [N], the token that the model finds likeliest behind each.  hidden: [N, d], what its head
    of logits read there.  left: int64 [N], tokens that follow in the same sequence.  asked: bool [N], True for a token of the
    prompt, which is context and nothing to learn from; what is wanted behind it is the token that follows.
    """

    ids: Tensor
    wanted: Tensor
    hidden: Tensor
    left: Tensor
    asked: Tensor

    def __len__(self) -> int:
        """Tokens to learn from."""
        return int((~self.asked).sum())

    @staticmethod
    def joined(parts: Sequence[Foretold]) -> Foretold:
        """The sequences of all parts."""
        return Foretold(*(torch.cat([getattr(part, one.name) for part in parts]) for one in fields(Foretold)))

    def sequences(self) -> list[slice]:
        """The places of each sequence."""
        ends = (self.left == 0).nonzero().flatten() + 1
        return [slice(first, end) for first, end in itertools.pairwise([0, *ends.tolist()])]


def written(decoder: Decoder, rows: Sequence[Sequence[int]], eos: Sequence[int], longest: int) -> Foretold:
    """Prompts with greedy answers of at most `longest` tokens, each up to the token in front of an id of `eos`."""
    engine = decoder.engine
    assert engine.readout is not None
    width, batch = max(map(len, rows)), len(rows)
    ids, mask = (torch.zeros(batch, width, dtype=torch.int64) for _ in range(2))
    for n, row in enumerate(rows):
        ids[n, width - len(row) :] = torch.tensor(row)
        mask[n, width - len(row) :] = 1
    state = engine.start(batch, width + longest)
    given = None if bool(mask.all()) else mask.to(engine.device)
    streams: dict[int, Tensor] = {}
    token = engine.run(state, ids.to(engine.device), given, streams=streams)[:, -1].argmax(-1)
    ends = torch.tensor(eos, dtype=torch.int64, device=engine.device)
    fed: list[Tensor] = []
    read: list[Tensor] = []
    ended = torch.isin(token, ends)
    while len(fed) < longest and not bool(ended.all()):
        logits, stream = engine.verify(state, token[:, None])
        engine.commit(state, [[0]] * batch)
        fed.append(token)
        read.append(engine.readout.reads(stream[:, -1:]))
        token = logits[:, 0].argmax(-1)
        ended |= torch.isin(token, ends)
    tokens = torch.stack([*fed, token], 1).cpu()
    empty = torch.empty(batch, 0, engine.readout.weight.shape[1], dtype=streams[TAIL].dtype)
    hidden = torch.stack(read, 1).cpu() if read else empty
    stops = torch.isin(tokens, ends.cpu())
    found = []
    for n, row in enumerate(rows):
        end = int(stops[n].nonzero()[0]) if bool(stops[n].any()) else len(fed)
        before = engine.readout.reads(streams[TAIL][n, width - len(row) :, None]).cpu()
        whole = torch.cat([torch.tensor(list(row)), tokens[n, : end + 1]])
        found.append(_sequence(whole[:-1], whole[1:], torch.cat([before, hidden[n, :end]]), len(row)))
    return Foretold.joined(found)


def read(decoder: Decoder, ids: Sequence[int]) -> Foretold:
    """One sequence as it stands."""
    engine = decoder.engine
    assert engine.readout is not None
    given = torch.tensor([list(ids)], device=engine.device)
    state = engine.start(1, len(ids))
    engine.run(state, given[:, :1])
    logits, stream = engine.verify(state, given[:, 1:])
    return _sequence(given[0, 1:].cpu(), logits[0].argmax(-1).cpu(), engine.readout.reads(stream[0, :, None]).cpu(), 0)


def _sequence(ids: Tensor, wanted: Tensor, hidden: Tensor, asked: int) -> Foretold:
    left = torch.arange(len(ids) - 1, -1, -1)
    return Foretold(ids.clone(), wanted.clone(), hidden.clone(), left, torch.arange(len(ids)) < asked)
