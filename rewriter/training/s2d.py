"""Train S2D's sub-models: copies of the model's first blocks learn through the programs by which the decoder reads prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from subquad.decoder import Decoder
from subquad.passes.speculate.s2d import PREFIX, S2D
from subquad.runtime.decode_engine import entered, executor, named_states
from subquad.runtime.own_model import first_sites, rebound
from subquad.runtime.pass_inputs import prompt_inputs
from subquad.runtime.state import new_state
from subquad.training.exits import ExitTraining
from subquad.training.foretold import Foretold

RATE = 3e-4


def block_weights(decoder: Decoder, blocks: int) -> dict[str, Tensor]:
    """fp32 copies of the weights of a decoder's first blocks, by name, to be trained."""
    calls = decoder.programs.schedules["first"].calls[:blocks]
    names = dict.fromkeys(name for call in calls for name in call.weights)
    own = {name: decoder.weights[name] for name in names}
    return {name: nn.Parameter(t.detach().float().clone()) for name, t in own.items() if t.is_floating_point()}


class SortedTraining(ExitTraining):
    """All exits of all tokens of a batch in one run."""

    def __init__(self, part: S2D, decoder: Decoder, text: Foretold, seed: int = 0) -> None:
        self.models, self.decoder = part, decoder
        schedule = decoder.programs.schedules["first"]
        runners = {program.key: program.differentiable() for program in schedule.programs()}
        self.programs = executor(schedule, decoder.weights, runners)
        super().__init__(part, text, RATE, seed)

    def parameters(self) -> dict[str, Tensor]:
        """The shared norm's and the blocks'."""
        return dict(self.part.named_parameters()) | {PREFIX + name: t for name, t in self.models.weights.items()}

    def streams(self, sequences: Sequence[slice]) -> list[Tensor]:
        """Behind the blocks in front of each exit."""
        engine, exits = self.decoder.engine, self.models.blocks
        ids = pad_sequence([self.text.ids[one] for one in sequences], batch_first=True).to(engine.device)
        layout = first_sites(engine, exits[-1])
        layout = replace(layout, sites=tuple(replace(site, dtype=torch.float32) for site in layout.sites))
        state = new_state(layout, ids.shape[0], ids.shape[1], engine.device)
        state.k, state.v = ([torch.empty_like(keys) for keys in side] for side in (state.k, state.v))
        for number, name in enumerate(layout.inputs):
            state.tokens[name][:, : ids.shape[1]] = ids if number == 0 else 1
        chosen = rebound(self.programs, exits[-1], self.models.weights)
        first, sides = entered(chosen, prompt_inputs(layout, state, ids))
        stream, found, tensors = first.detach().float(), [], named_states(layout, state)
        for number, (runner, used, weights, names, _) in enumerate(chosen.calls, 1):
            stream = runner([stream, *(sides[i] for i in used), *weights, *(tensors[name] for name in names)])[0]
            if number in exits:
                found.append(stream)
        return found
