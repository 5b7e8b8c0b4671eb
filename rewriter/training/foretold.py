"""Text with what a model foretells behind every token: what it writes itself, greedily, and what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subquad.decoder import Decoder


@dataclass(frozen=True)
class Foretold:
    """Sequences one after another.

    ids: int64 [N].  wanted: int64 [N], the token that the model finds likeliest behind each.  hidden: [N, d], what its head
    of logits read there.  left: int64 [N], tokens that follow in the same sequence.
    """

    ids: Tensor
    wanted: Tensor
    hidden: Tensor
    left: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def joined(parts: Sequence[Foretold]) -> Foretold:
        """The sequences of all parts."""
        names = ("ids", "wanted", "hidden", "left")
        return Foretold(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def written(decoder: Decoder, rows: Sequence[Sequence[int]], eos: Sequence[int], longest: int) -> Foretold:
    """Greedy answers of at most `longest` tokens to prompts, each up to the token in front of an id of `eos`."""
    engine = decoder.engine
    assert engine.readout is not None
    width, batch = max(map(len, rows)), len(rows)
    ids, mask = (torch.zeros(batch, width, dtype=torch.int64) for _ in range(2))
    for n, row in enumerate(rows):
        ids[n, width - len(row) :] = torch.tensor(row)
        mask[n, width - len(row) :] = 1
    state = engine.start(batch, width + longest)
    given = None if bool(mask.all()) else mask.to(engine.device)
    token = engine.run(state, ids.to(engine.device), given)[:, -1].argmax(-1)
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
    hidden = torch.stack(read, 1).cpu() if read else torch.empty(batch, 0, engine.readout.weight.shape[1])
    stops = torch.isin(tokens, ends.cpu())
    lengths = [int(row.nonzero()[0]) if bool(row.any()) else len(fed) for row in stops]
    return Foretold.joined(
        [_sequence(tokens[n, :end], tokens[n, 1 : end + 1], hidden[n, :end]) for n, end in enumerate(lengths)]
    )


def read(decoder: Decoder, ids: Sequence[int]) -> Foretold:
    """One sequence as it stands."""
    engine = decoder.engine
    assert engine.readout is not None
    given = torch.tensor([list(ids)], device=engine.device)
    state = engine.start(1, len(ids))
    engine.run(state, given[:, :1])
    logits, stream = engine.verify(state, given[:, 1:])
    return _sequence(given[0, 1:].cpu(), logits[0].argmax(-1).cpu(), engine.readout.reads(stream[0, :, None]).cpu())


def _sequence(ids: Tensor, wanted: Tensor, hidden: Tensor) -> Foretold:
    return Foretold(ids.clone(), wanted.clone(), hidden.clone(), torch.arange(len(ids) - 1, -1, -1))
