"""Train prompt tokens by gradients through the frozen model: its own decoder, run with them behind places of a text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.decoder import Decoder
from subquad.ir.errors import ConversionError
from subquad.passes.speculate.context_heads import REACH
from subquad.passes.speculate.prompt_tokens import PromptTokens, seen_of
from subquad.runtime.decode_engine import entered, executor, named_states
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.pass_inputs import StepInputs, Tokens
from subquad.runtime.schedule import Runner
from subquad.runtime.state import DecoderState
from subquad.training.checkpoint import optimiser_tensors, restore_optimiser
from subquad.training.foretold import Foretold
from subquad.training.heads import DECAY, HELD_OUT
from subquad.training.stages import cosine

CUTS = 32
"""Places of a text behind which the prompt tokens run at once."""
TEXTS = 400
"""Texts at most that are learnt from, each once (paper: one epoch); so few numbers need no more."""
RATE = 1e-2
"""Learning rate (paper)."""


class PromptTokenTraining:
    """A batch is one text, cut at CUTS places: the prompt tokens behind each cut learn the model's own law further on.

    The loss is the KL to that law, 0.8^i for prompt token i (paper, §3.4).  Nothing but the prompt tokens has gradients.
    """

    size = CUTS

    def __init__(self, decoder: Decoder, head: Tensor, part: PromptTokens, text: Foretold, seed: int = 0) -> None:
        if not decoder.trees:
            raise ConversionError(
                "prompt tokens are trained behind many places of a text at once, and this model has states that cannot branch; "
                "train another drafter."
            )
        self.part, self.text, self.seed = part, text, seed
        self.model = GradientDecoder(decoder)
        self.head = head.detach().float()
        found = [slice(max(s.start, s.stop - REACH), s.stop) for s in text.sequences()]
        found = [s for s in found if s.stop - s.start > part.levels + 2 and bool((~text.asked[s]).any())]
        held = max(1, int(len(found) * HELD_OUT)) if len(found) > 1 else 0
        self.held_out = found[len(found) - held :]
        order = torch.randperm(len(found) - held, generator=torch.Generator().manual_seed(seed)).tolist()
        self.training = [found[n] for n in order[:TEXTS]]
        self.batches = len(self.training)
        self.added = part.added.float().requires_grad_(True)
        self.part.added = self.added
        self.optimiser = torch.optim.AdamW([self.added], lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def work(self, number: int) -> dict[str, float]:
        """Train on batch `number`."""
        self.optimiser.param_groups[0]["lr"] = RATE * cosine(number, self.batches, 5, 0.02)
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        chosen = self.training[number]
        cuts = self._places(chosen)
        cuts = cuts[torch.randperm(len(cuts), generator=source)[:CUTS]]
        with torch.enable_grad():
            found = self._logits(chosen, cuts).log_softmax(-1)
            loss = torch.zeros(())
            for level in range(self.part.levels):
                law = (self.text.hidden[chosen][cuts + 1 + level].float() @ self.head.T).log_softmax(-1)
                loss = loss + DECAY**level * F.kl_div(found[:, level], law, reduction="batchmean", log_target=True)
            loss = loss / self.part.levels
            self.optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([self.added], 1.0)
        self.optimiser.step()
        return {"loss": float(loss.detach())}

    def _places(self, chosen: slice) -> Tensor:
        """Places of a text that have a token for every prompt token behind the one after them."""
        asked = self.text.asked[chosen]
        places = torch.arange(len(asked) - 1 - self.part.levels)
        return places[~asked[places]] if bool((~asked[places]).any()) else places

    def _logits(self, chosen: slice, cuts: Tensor) -> Tensor:
        """[cuts, m, V] behind the prompt tokens, copies averaged."""
        part, ids = self.part, self.text.ids[chosen]
        copies, levels = part.copies, part.levels
        place, copy = torch.arange(levels).repeat(copies), torch.arange(copies).repeat_interleave(levels)
        rows, width = len(cuts) * copies * levels, copies * levels
        seen = torch.zeros(rows, len(ids) + rows, dtype=torch.bool)
        at = cuts.repeat_interleave(width)
        seen[:, : len(ids)] = torch.arange(len(ids)) <= at[:, None]
        own = torch.block_diag(*[seen_of(part.mask, place, copy).float()] * len(cuts)).bool()
        seen[:, len(ids) :] = own
        columns = at + 1 + place.repeat(len(cuts))
        added = self.added.flatten(0, 1).repeat(len(cuts), 1)
        logits = self.model.behind(ids, part.ids[place].repeat(len(cuts)), columns, seen, added)
        return logits.view(len(cuts), copies, levels, -1).mean(1)

    @torch.no_grad()
    def guessed(self) -> list[float]:
        """For every prompt token, the share of held-out tokens that its best guess hits."""
        hits, count = torch.zeros(self.part.levels), 0
        for chosen in self.held_out[:16]:
            cuts = self._places(chosen)
            cuts = cuts[:: max(1, len(cuts) // CUTS)]
            wanted = self.text.wanted[chosen][cuts[:, None] + 1 + torch.arange(self.part.levels)]
            hits += (self._logits(chosen, cuts).argmax(-1) == wanted).float().sum(0)
            count += len(cuts)
        return [float(hit) / max(1, count) for hit in hits]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and optimiser state."""
        return {"added": self.added, **optimiser_tensors(self.optimiser, ["added"], "optimiser/")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave."""
        with torch.no_grad():
            self.added.copy_(tensors["added"])
        restore_optimiser(self.optimiser, ["added"], "optimiser/", tensors)


class GradientDecoder:
    """A decoder's step in fp32 with gradients, for rows that see what they are told of one text and of each other."""

    def __init__(self, decoder: Decoder) -> None:
        weights = {name: t.detach().float() if t.is_floating_point() else t for name, t in decoder.weights.items()}
        schedule = decoder.programs.schedules["step"]
        runners: Mapping[str, Runner] = {program.key: program.differentiable() for program in schedule.programs()}
        self.engine, self.chosen = decoder.engine, executor(schedule, weights, runners)

    def behind(self, ids: Tensor, rows: Tensor, columns: Tensor, seen: Tensor, added: Tensor) -> Tensor:
        """Logits [n, V] of n rows behind a text int64 [T].

        rows, columns: int64 [n], their ids and where they stand.  seen: bool [n, T + n].  added: [n, e].
        """
        state = self.engine.start(1, len(ids) + len(rows))
        state.k, state.v = ([t.float().clone() for t in side] for side in (state.k, state.v))
        with torch.no_grad():
            places = torch.arange(len(ids))
            causal = places <= places[:, None]
            self._run(state, ids, places, places, causal, None)
        return self._run(state, rows, columns, len(ids) + torch.arange(len(rows)), seen, added)

    def _run(
        self, state: DecoderState, ids: Tensor, columns: Tensor, places: Tensor, seen: Tensor, added: Tensor | None
    ) -> Tensor:
        """Logits [n, V] of tokens that are written to slots `places`; seen: bool [n, slots]."""
        slots = seen.shape[1]
        tokens = Tokens(ids[None], columns[None], places[None], None, None, int(columns.max()) + 1, slots)
        inputs = _Told(self.engine.layout, state, tokens, seen)
        stream, sides = entered(self.chosen, inputs)
        stream = stream if added is None else stream + added.to(stream.dtype)[None]
        tensors = named_states(self.engine.layout, state)
        for runner, used, weights, names, _ in self.chosen.calls:
            stream = runner([stream, *(sides[i] for i in used), *weights, *(tensors[name] for name in names)])[0]
        return stream[0]


def entry_width(decoder: Decoder) -> int:
    """e, the numbers of a token in front of the first block."""
    engine, zero = decoder.engine, torch.zeros(1, 1, dtype=torch.int64)
    tokens = Tokens(zero, zero, zero, None, None, 1, 1)
    stream, _ = entered(engine.eager["step"], StepInputs(engine.layout, engine.start(1, 1), tokens))
    return int(stream.shape[-1])


class _Told(StepInputs):
    """Inputs of a step that are told who sees what: `seen` bool [n, slots]; a slot behind the text holds a row's column."""

    def __init__(self, layout: DecoderLayout, state: DecoderState, tokens: Tokens, seen: Tensor) -> None:
        super().__init__(layout, state, tokens)
        self.seen = seen

    def __getitem__(self, name: str) -> Tensor:
        if name == "tree":
            return self.seen[None]
        if name == "keys":
            slots = torch.arange(self.tokens.slots)[None]
            return slots.scatter(1, self.tokens.places, self.tokens.columns)
        return super().__getitem__(name)
