"""The decoder of a model: prefill, steps, rollback and generation, with programs compiled in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subquad.compilation import Order, compile_orders
from subquad.ir.decoding import Choice, Drafter
from subquad.ir.errors import SubquadError
from subquad.ir.loop_rewrite import LoopRewrite
from subquad.ir.trained import NOTHING, Trained
from subquad.kept_costs import KeptCosts
from subquad.passes.speculate.greedy import Greedy
from subquad.passes.speculate.sample_and_descend import SampleAndDescend
from subquad.runtime.chance import seeded
from subquad.runtime.decode_engine import DecodeEngine, executor
from subquad.runtime.generation import check_prompt, in_step
from subquad.runtime.layout import DecoderLayout
from subquad.runtime.pacing import MOST, MeasuredPacing, Pacing
from subquad.runtime.pass_costs import PassCosts
from subquad.runtime.processors import processors
from subquad.runtime.schedule import Schedule
from subquad.runtime.scoring import score_rows
from subquad.runtime.sharing_plan import SharingPlan
from subquad.runtime.speculation import Ending, Pass, speculate
from subquad.runtime.state import DecoderState, select
from subquad.runtime.tree_stepper import PromptCache, TreeStepper

Report = Callable[[int, int], None]
SHARED = {"joined", "branch"}
"""Schedules of rows that share keys, if a model has them, for calls that no width class takes."""


@dataclass(frozen=True)
class DecoderPrograms:
    """A decoder without its weights: what it needs to know of the model, and a schedule for each width class by name."""

    layout: DecoderLayout
    schedules: dict[str, Schedule]


def _and_then(passes: Iterator[Pass], done: Callable[[], None]) -> Iterator[Pass]:
    """The passes; when the last one was taken, something is done."""
    yield from passes
    done()


def _label(key: tuple[int, int, type]) -> str:
    _, most, drafter = key
    return f"{drafter.__module__}.{drafter.__qualname__}|{most}"


class Decoder:
    """Prefill, step, rollback and generation of one model.  States belong to calls, so threads may share a decoder."""

    def __init__(
        self, programs: DecoderPrograms, weights: Mapping[str, Tensor], speculation: LoopRewrite | None = None
    ) -> None:
        """weights: the tensors that the schedules read, by name.  speculation: what the model's plan says of its loop."""
        self.speculation = speculation
        self.programs, self.weights = programs, weights
        device = next((t.device for t in weights.values()), torch.device("cpu"))
        names = ("step", "first", *sorted(SHARED & programs.schedules.keys()))
        eager = {name: executor(programs.schedules[name], weights) for name in names}
        self.engine = DecodeEngine(programs.layout, eager, device)
        self.prefixes: PromptCache | None = None
        """The cache of prefixes that calls read and fill; see subquad.PrefixCache."""
        self.failure: str | None = None
        self._worker: threading.Thread | None = None
        self._pacing: dict[tuple[int, int, type], MeasuredPacing] = {}
        self._drafters: dict[LoopRewrite, Drafter] = {}
        self._trained = NOTHING
        self._costs = KeptCosts(programs.schedules)

    @property
    def ready(self) -> bool:
        """True when the one-token programs are compiled and in use."""
        return "one" in self.engine.compiled

    @property
    def complete(self) -> bool:
        """True when the programs of every width class are compiled and in use."""
        return len(self.engine.compiled) == len(self.programs.layout.classes)

    def prefill(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, last_only: bool = True, capacity: int = 0
    ) -> tuple[Tensor, DecoderState]:
        """Logits [B, 1 or T, vocabulary] of ids [B, T] and the state behind them; room for `capacity` tokens from the start."""
        state = self.engine.start(ids.shape[0], max(capacity, ids.shape[1]))
        return self.engine.run(state, ids, attention_mask, last_only), state

    def step(self, ids: Tensor, state: DecoderState, *, last_only: bool = False) -> Tensor:
        """Logits [B, w or 1, vocabulary] of w more tokens ids [B, w]; the state moves on."""
        return self.engine.run(state, ids, None, last_only)

    def verify(
        self, ids: Tensor, state: DecoderState, parents: Tensor | None = None, *, skip: Collection[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, w, vocabulary] behind every node of a draft, and the residual stream [B, w, ...] before the final norm.

        ids: int64 [B, w].  parents: int64 [w] or [B, w]; parents[i] < i is the node before node i, -1 hangs it on what is
        committed; None for chains.  A row with fewer nodes is padded with any id and parent -1.  Nothing is committed, and
        the next call forgets what was not.  skip: numbers of blocks (0 .. blocks - 1) left out, for drafts of the model's own.
        Raises GenerationError for trees where `trees` is False, and when the nodes do not fit the position table.
        """
        return self.engine.verify(state, ids, parents, skip)

    def commit(self, state: DecoderState, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of what was verified, the nodes of each row's path from its root on; rows may keep different numbers, or none.

        Raises GenerationError when nothing is pending or a path is none.
        """
        self.engine.commit(state, paths)

    def rollback(self, state: DecoderState, n: int | Sequence[int]) -> None:
        """Take back the last n tokens of every row, or n[b] of row b, and forget what is pending."""
        self.engine.rollback(state, n)

    def select(self, state: DecoderState, rows: Sequence[int]) -> DecoderState:
        """A new state of these rows in this order; rows may be left out and repeated."""
        return select(state, rows)

    @property
    def trees(self) -> bool:
        """True when drafts may be trees; a model with recurrent states verifies chains only."""
        return self.programs.layout.trees

    @property
    def limit(self) -> int | None:
        """Most tokens of a row that the model's position table allows, None without limit."""
        return self.programs.layout.limit

    @property
    def blocks(self) -> int:
        """Blocks that `verify` can skip."""
        return self.engine.blocks

    def generate(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, max_new_tokens: int = 128,
        eos_token_ids: Collection[int] = (), temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        min_p: float = 0.0, repetition_penalty: float = 1.0, no_repeat_ngram_size: int = 0, seed: int | None = None,
        drafter: Drafter | None = None, share: bool = True,
    ) -> Iterator[list[int | None]]:  # fmt: skip
        """Yield one list a step: the new token of every row, None for a row that has ended.

        ids: int64 [B, T], padded on the left where attention_mask [B, T] is 0.  temperature 0 is greedy (the first of equal
        maxima); otherwise tokens are sampled with `seed` (None: from entropy) after top_k (0: all), top_p and min_p.  A row
        ends with an id of eos_token_ids, which is yielded.  drafter: verify what it drafts; the tokens stay those of plain
        decoding (for float32 and float64), drawn ones keep their law.  share: see `decode`.  Raises
        GenerationError for what does not fit.
        """
        found = processors(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram_size)
        choice = Choice(found, temperature == 0, seeded(seed, self.engine.device))
        ending = Ending(max_new_tokens, frozenset(eos_token_ids))
        yield from in_step(
            self.decode(ids, attention_mask, choice=choice, ending=ending, drafter=drafter, share=share), ids.shape[0]
        )

    def decode(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, choice: Choice, ending: Ending,
        drafter: Drafter | None = None, most: int = MOST, pacing: Pacing | None = None, share: bool = True,
        on_sharing: Callable[[SharingPlan], None] = lambda plan: None,
    ) -> Iterator[Pass]:  # fmt: skip
        """Yield what each pass of the model gave; see subquad.runtime.speculation.speculate.

        share: compute and store once what rows have in common, where that pays.  on_sharing: told what was found.  most:
        tokens that a pass may feed in all rows together.  pacing: how much of a draft is verified; None weighs the gain
        against the costs that this decoder has measured.
        """
        check_prompt(ids, attention_mask, ending.max_new_tokens)
        room = ids.shape[1] + ending.max_new_tokens
        plain = Greedy() if choice.greedy else SampleAndDescend()
        stepper = TreeStepper(self.engine, room, share, on_sharing, self.prefixes)
        passes = speculate(
            stepper, ids, attention_mask, choice=choice, plain=plain, ending=ending, drafter=drafter,
            pacing=pacing if pacing is not None else self._measured(min(most, MOST), drafter),
        )  # fmt: skip
        return _and_then(passes, lambda: self._keep(stepper))

    def score(
        self, ids: Tensor, attention_mask: Tensor | None = None, *, start: Sequence[int], share: bool = True,
        on_sharing: Callable[[SharingPlan], None] = lambda plan: None,
    ) -> list[Tensor]:  # fmt: skip
        """Log-probabilities, in fp32 at least, of each row's tokens from its column start[b] on, given all tokens before.

        ids: int64 [B, T], padding (attention_mask 0) at either end.  start: columns count without padding, from 1 on: where an
        answer begins behind its question.  What rows have in common before that is computed once, as for `decode`.
        Raises GenerationError for a start outside its row, and for a mask with holes.
        """
        return score_rows(self.engine, ids, attention_mask, start, share, on_sharing)

    def drafter(self, speculation: LoopRewrite) -> Drafter:
        """The drafter of a way to speculate; it is kept, so that what it learns serves later calls.

        Raises GenerationError when its parameters were never trained, or for another model.
        """
        if speculation not in self._drafters:
            self._drafters[speculation] = speculation.drafter(self.trained)
        return self._drafters[speculation]

    @property
    def trained(self) -> Trained:
        """What was trained for drafters, with this model's head of logits; to be set before drafters are asked for."""
        readout = self.engine.readout
        return replace(self._trained, head=None if readout is None else readout.weight)

    @trained.setter
    def trained(self, trained: Trained) -> None:
        self._trained = trained
        self._drafters.clear()

    def _measured(self, most: int, drafter: Drafter | None) -> MeasuredPacing:
        """What was measured of the programs that are in use now and of drafters of this kind, shared by all calls."""
        key = (len(self.engine.compiled), most, type(drafter))
        if key not in self._pacing:
            costs = self._costs.read(_label(key)) if self.complete and drafter is not None else PassCosts()
            self._pacing.setdefault(key, MeasuredPacing(most, costs))
        pacing = self._pacing[key]
        pacing.begin()
        return pacing

    def _keep(self, stepper: TreeStepper) -> None:
        """At the end of a call: what was computed of its prompt, and what passes were measured to cost."""
        stepper.keep()
        for key, pacing in list(self._pacing.items()):
            if key[0] == len(self.programs.layout.classes) and key[2] is not type(None):
                self._costs.write(_label(key), pacing.costs)

    def compile(self, *, wait: bool = True, report: Report = lambda done, total: None) -> None:
        """Compile the programs of each width class, or load them from the cache; a class is in use once it is whole.

        The one-token programs come first, then those of a few tokens, then those of a prompt; uncompiled ones serve until
        then.  wait: False works in a thread beside generation.  report: called with (programs ready, programs in all).
        When the compiler fails, `failure` holds the sentence, what was compiled before stays in use and, with wait,
        CompilationError is raised.
        """
        if self.complete or self.engine.device.type != "cpu":
            return
        if wait:
            self._wait_for_worker()
            if not self.complete:
                self._compile(report)
        elif self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(
                target=self._in_background, args=(report,), name="subquad-compile", daemon=True
            )
            self._worker.start()

    def _wait_for_worker(self) -> None:
        """Let a compilation that runs beside end first, so that no program is compiled twice."""
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def _in_background(self, report: Report) -> None:
        try:
            self._compile(report)
        except SubquadError:
            return

    def _compile(self, report: Report) -> None:
        schedules = self.programs.schedules
        try:
            orders = {one.name: self._orders(schedules[one.name]) for one in self.programs.layout.classes}
            for name, runners in compile_orders(orders, report):
                self.engine.compiled[name] = executor(schedules[name], self.weights, runners)
        except SubquadError as error:
            self.failure = str(error)
            raise

    def _orders(self, schedule: Schedule) -> list[Order]:
        if not schedule.forms:
            from subquad.input_forms import find_forms
            from subquad.weight_storage import form_of

            find_forms(self.programs, {name: form_of(tensor) for name, tensor in self.weights.items()})
        return [Order(program, schedule.forms[program.key]) for program in schedule.programs()]
