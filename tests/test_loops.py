"""Decoding loops in other people's styles: rewritten with identical tokens and random numbers, or refused with reason and line."""

from __future__ import annotations

import copy
import inspect
import linecache
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from types import GeneratorType
from typing import Any

import pytest
import torch
from loops import cached, plain, styles, translating, traps
from loops.case import Case
from loops.models import Counting
from transformers import DynamicCache

import subquad
from subquad import cached_run
from subquad.cli.inspect_printing import loop_fields
from subquad.generation_loop import generation_loop
from subquad.ir.decoding import Verified
from subquad.ir.draft import DraftTree
from subquad.ir.errors import SubquadError
from subquad.ir.refusal import Refusal
from subquad.passes.recognize.loop_function import read_loop
from subquad.runtime.pacing import FixedPacing
from subquad.step_model import held

SHARED: dict[Any, Any] = {}
"""Models of loops that must be rewritten: they are captured once."""
CASES = [*plain.CASES, *traps.CASES, *cached.CASES, *styles.CASES, *translating.CASES]


@pytest.fixture(autouse=True)
def _as_if_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops with a cache of their own are answered, as they are once programs are compiled."""
    monkeypatch.setattr(cached_run, "pays", lambda step: True)


def test_a_loop_with_a_cache_is_answered_as_soon_as_programs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cached_run, "pays", lambda step: (asked.append(1), len(asked) > 14)[1])
    model, fast = model_of(cached.CASES[0]), subquad.rewrite(cached.prefill_then_steps)
    ids = torch.randint(0, 41, (1, 5))
    with torch.no_grad():
        want = cached.prefill_then_steps(model, ids)
        assert torch.equal(fast(model, ids), want)
        assert not fast.report.applied
        assert any("while the decoder's programs were not compiled" in note for note in fast.report.notes)
        assert not fast.report.loops[0].schedules[0].applies
        assert torch.equal(fast(model, ids), want)
    assert fast.report.applied
    assert "6 calls of the model were answered by the decoder, 18 by itself" in fast.report.notes


def model_of(case: Case) -> Any:
    torch.manual_seed(1)
    if case.refused is not None:
        return case.model().train(case.training)
    if case.model not in SHARED:
        SHARED[case.model] = case.model().eval()
    return SHARED[case.model]


def run(function: Any, model: Any, ids: torch.Tensor, case: Case, capsys: Any) -> tuple[Any, ...]:
    """Everything that can be seen of one run: result, random streams, output."""
    torch.manual_seed(5)
    random.seed(5)
    with torch.no_grad():
        out = function(model, ids.clone(), **case.arguments)
        out = list(out) if isinstance(out, GeneratorType) else out
    return out, torch.get_rng_state(), random.getstate(), capsys.readouterr().out


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        exact = not a.is_floating_point()
        return a.shape == b.shape and (torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-4))
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_loop_gives_the_same_tokens_or_a_reason(case: Case, capsys: Any) -> None:
    model = model_of(case)
    twin = copy.deepcopy(model)
    fast = subquad.rewrite(case.function)
    for length in (1, 3, case.longest) if case.longest > 9 else (3, case.longest):
        ids = torch.randint(8, 41, (case.batch, length))
        want = run(case.function, twin, ids, case, capsys)
        got = run(fast, model, ids, case, capsys)
        assert same(got, want)
    assert "forward" not in model.__dict__
    report = fast.report
    if case.refused is None:
        assert not report.refusals, report.refusals
        assert report.applied or case.partly
        assert bool(report.applied) is ("answered by the decoder" in " ".join(report.notes))
        odd = [note for note in report.notes if "ran the model itself" in note and "captured for sizes" not in note]
        assert bool(odd) is bool(case.partly)
        assert all(case.partly in note for note in odd)
    else:
        slot, words, line = case.refused
        (refusal,) = report.refusals
        assert refusal.what == f"loop: {slot}", refusal
        assert words in refusal.reason
        file, _, number = refusal.source.rpartition(":")
        assert file == inspect.getsourcefile(case.function)
        assert line in linecache.getline(file, int(number))
    for name, kind in case.reads.items():
        slot = getattr(report.loops[0], name)
        kinds = [s.kind for s in slot] if isinstance(slot, tuple) else [slot.kind]
        assert kind in kinds, (name, kinds)


def test_guards_leave_no_trace_in_a_model_that_counts() -> None:
    for model, name in ((Counting(), "calls"), (styles.tallying(), "calls")):
        twin = copy.deepcopy(model.eval())
        with torch.no_grad():
            styles.first_token_apart(twin, torch.ones(1, 3, dtype=torch.long))
            subquad.rewrite(styles.first_token_apart)(model, torch.ones(1, 3, dtype=torch.long))
        assert int(getattr(model, name)) == int(getattr(twin, name)) == 11


def test_calls_from_another_thread_are_the_models_own() -> None:
    model, fast = model_of(traps.CASES[0]), subquad.rewrite(styles.fetches_ahead)
    ids = torch.randint(0, 41, (2, 4))
    with torch.inference_mode(False), torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(model, ids), styles.fetches_ahead(model, ids))
    assert "not called in the thread" in fast.report.refusals[0].reason


def test_a_loop_over_two_modules_is_refused() -> None:
    pair = [plain.decoder().eval(), plain.decoder().eval()]
    two = read_loop(apart, {"large": pair[0], "small": pair[1]})
    assert isinstance(two, Refusal)
    assert two.what == "loop: model"
    assert "`large`" in two.reason
    assert "`small`" in two.reason


def apart(large: Any, small: Any, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        row = large(ids)[:, -1] - small(ids)[:, -1]
        ids = torch.cat([ids, row.argmax(-1, keepdim=True)], 1)
    return ids


def scored(model: Any, ids: torch.Tensor, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    kept = []
    for _ in range(count):
        row = model(ids)[:, -1].log_softmax(-1)
        best = row.argmax(-1, keepdim=True)
        kept.append(row.gather(1, best))
        ids = torch.cat([ids, best], 1)
    return ids, torch.cat(kept, 1)


def test_gradients_through_kept_scores_keep_the_original_loop() -> None:
    model, fast = model_of(traps.CASES[0]), subquad.rewrite(scored)
    ids = torch.randint(0, 41, (2, 4))
    _, scores = fast(model, ids)
    scores.sum().backward()
    assert model.wte.weight.grad is not None
    assert not fast.report.applied
    assert any("gradients may flow" in note for note in fast.report.notes)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(model, ids)[1], scores.detach(), rtol=1e-5, atol=1e-5)
    assert fast.report.applied


def test_weights_that_change_between_runs_are_seen() -> None:
    model, fast = plain.decoder().eval(), subquad.rewrite(traps.sees_both_ways)
    ids = torch.randint(0, 41, (1, 4))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(model, ids), traps.sees_both_ways(model, ids))
            model.head.weight.normal_()
        model.head.weight.data = torch.randn_like(model.head.weight)
        assert torch.equal(fast(model, ids), traps.sees_both_ways(model, ids))


def test_a_function_without_source_is_watched_once() -> None:
    space: dict[str, Any] = {}
    exec(inspect.getsource(traps.window_moves_positions).replace("[:, -window:]", ""), {"torch": torch}, space)
    plainly = space["window_moves_positions"]
    model, fast = model_of(traps.CASES[0]), subquad.rewrite(plainly)
    ids = torch.randint(0, 41, (1, 4))
    with torch.no_grad():
        want = plainly(model, ids)
        for _ in range(2):
            assert torch.equal(fast(model, ids), want)
    assert fast.report.applied
    assert "recorded" in fast.report.loops[0].evidence[0]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_cache_that_is_handed_out_is_what_the_model_would_have_made(copied: Any) -> None:
    model, fast = model_of(cached.CASES[0]), subquad.rewrite(cached.kept_by_the_caller)
    ids = torch.randint(0, 41, (2, 5))
    with torch.inference_mode():
        want, kept = cached.kept_by_the_caller(model, ids)
        for _ in range(2):
            got, cache = fast(model, ids)
        assert torch.equal(got, want)
        assert isinstance(cache, DynamicCache)
        assert cache.get_seq_length() == kept.get_seq_length()
        twin = copied(cache)
        assert type(twin) is DynamicCache
        for found in (cache, twin):
            assert all(torch.equal(a.keys, b.keys) for a, b in zip(found.layers, kept.layers, strict=True))
        _, cache = fast(model, ids)
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids, past_key_values=kept).logits)


def test_a_conversation_goes_on_with_the_cache_of_an_earlier_call() -> None:
    model, fast = model_of(cached.CASES[0]), subquad.rewrite(cached.kept_by_the_caller)
    ids = torch.randint(0, 41, (1, 5))
    with torch.no_grad():
        kept = cache = None
        for turn in range(3):
            want, kept = cached.kept_by_the_caller(model, ids + turn, cache=kept)
            got, cache = fast(model, ids + turn, cache=cache)
            assert torch.equal(got, want)
    assert not [note for note in fast.report.notes if "ran the model itself" in note]


def test_tensors_written_to_after_they_were_read_are_used_as_they_are() -> None:
    model = cached.PairCache().eval()
    fast = subquad.rewrite(cached.writes_to_its_keys)
    ids = torch.randint(0, 41, (1, 5))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(model, ids), cached.writes_to_its_keys(model, ids))


def test_loops_in_two_threads_do_not_meet() -> None:
    model, fast = model_of(traps.CASES[0]), subquad.rewrite(traps.edits_what_was_written)
    prompts = [torch.randint(0, 41, (1, n)) for n in (2, 5, 9)]
    with torch.no_grad():
        want = [traps.edits_what_was_written(model, ids) for ids in prompts]
        fast(model, prompts[0])
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(torch.no_grad()(lambda ids: fast(model, ids)), prompts * 3))
    assert all(torch.equal(a, b) for a, b in zip(got, want * 3, strict=True))
    assert "forward" not in model.__dict__


def test_a_loop_that_stops_by_an_exception_leaves_the_model_as_it_was() -> None:
    def failing(model: Any, ids: torch.Tensor) -> torch.Tensor:
        for n in range(9):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
            if n == 6:
                raise KeyboardInterrupt
        return ids

    model, fast = model_of(traps.CASES[0]), subquad.rewrite(failing)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        fast(model, torch.randint(0, 41, (1, 4)))
    assert "forward" not in model.__dict__
    assert copy.deepcopy(model) is not model


def test_coroutines_and_passes_are_mistakes() -> None:
    async def waits() -> None: ...

    with pytest.raises(SubquadError, match="coroutine"):
        subquad.rewrite(waits)
    with pytest.raises(SubquadError, match="other than speculate, are for models"):
        subquad.rewrite(passes="fuse")(scored)


class WithMethods(plain.LastRowDecoder):
    """A model whose class holds its own loops."""

    generate = plain.cropped_sampler

    def configure(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]


def test_inspect_lists_the_loops_of_a_model_and_of_a_function() -> None:
    model = WithMethods().eval()
    ids = torch.randint(0, 41, (2, 8))
    (loop,) = subquad.inspect(model, (ids,)).loops
    assert loop.path == "WithMethods.generate"
    assert loop.context.kind == "full prefix"
    assert loop.schedules[0].applies
    report = subquad.inspect(plain.slices_of_a_buffer, (plain.OwnCache(), ids))
    assert report.loops[0].context.kind == "slice"
    assert not report.loops[0].schedules[0].applies
    refused = subquad.inspect(traps.unknown_chooser, (model, ids)).refusals
    assert [r.what for r in refused] == ["loop: choice"]


MODES = {
    "greedy_search": ({"repetition_penalty": 1.2}, "repetition penalty → argmax", True),
    "sample": (
        {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0},
        "temperature → top-p → softmax → multinomial",
        True,
    ),
    "beam_search": ({"num_beams": 3}, "beam", False),
    "beam_sample": ({"num_beams": 2, "do_sample": True, "top_k": 0}, "softmax → beam", False),
    "group_beam_search": (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        "diversity penalty → beam",
        False,
    ),
    "contrastive_search": ({"penalty_alpha": 0.6, "top_k": 4}, "argmax", False),
    "assisted_generation": ({"prompt_lookup_num_tokens": 3}, "argmax", False),
    "dola_generation": ({"dola_layers": "high"}, "argmax", False),
    "constrained_beam_search": ({"num_beams": 2, "force_words_ids": [[3]]}, "beam", False),
}


@pytest.mark.parametrize("mode", MODES)
def test_generate_is_recognised_in_every_mode(mode: str) -> None:
    settings, sampler, taken = MODES[mode]
    model = plain.llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    loop = generation_loop(model)
    assert loop is not None
    assert loop.evidence == (f"mode {mode} of the model's generation settings",)
    assert loop.sampler == sampler
    assert loop.schedules[0].applies is taken
    text = "\n".join(f"{name} {words}" for name, words in loop_fields(loop))
    assert "left whole" in text or taken
    assert loop.json()["origin"] == "generate"


def test_a_model_that_does_not_generate_has_no_such_loop() -> None:
    assert generation_loop(plain.decoder()) is None


SPECULATED = [
    plain.CASES[0],
    plain.CASES[2],
    plain.CASES[3],
    traps.CASES[0],
    traps.CASES[2],
    traps.CASES[6],
    traps.CASES[10],
    cached.CASES[0],
    cached.CASES[1],
    cached.CASES[5],
    next(case for case in styles.CASES if case.function is styles.stop_strings),
]


@pytest.mark.parametrize("method", ["auto", "ngram"])
@pytest.mark.parametrize("case", SPECULATED, ids=lambda case: case.name)
def test_drafts_change_neither_tokens_nor_random_numbers(case: Case, method: str, capsys: Any) -> None:
    model, ids = model_of(case), torch.randint(8, 12, (1, 9))
    fast = subquad.rewrite(passes=f"speculate(method={method})")(case.function)
    for _ in range(3):
        assert same(run(fast, model, ids, case, capsys), run(case.function, copy.deepcopy(model), ids, case, capsys))
    assert any(s.name == "draft and verify" and s.applies for s in fast.report.loops[0].schedules)


def outcome(function: Any, model: Any, ids: torch.Tensor, count: int) -> Any:
    """What a run gives: tokens and random state, or the error."""
    torch.manual_seed(2)
    try:
        with torch.no_grad():
            return function(model, ids.clone(), count=count), torch.get_rng_state()
    except (AssertionError, IndexError, RuntimeError) as error:
        return type(error).__name__, str(error)


ODD = {
    "no token": (5, 0),
    "one token": (5, 1),
    "an empty prompt": (0, 3),
    "behind the window": (50, 5),
    "past the window": (30, 6),
}


@pytest.mark.parametrize("passes", [None, "speculate"])
@pytest.mark.parametrize("odd", ODD)
def test_odd_prompts_and_lengths_give_what_the_loop_gives(odd: str, passes: str | None) -> None:
    length, count = ODD[odd]
    for case in (plain.CASES[0], cached.CASES[0]):
        model, ids = model_of(case), torch.randint(0, 41, (1, length))
        fast = subquad.rewrite(case.function) if passes is None else subquad.rewrite(passes=passes)(case.function)
        want = outcome(case.function, model, ids, count)
        for _ in range(2):
            assert same(outcome(fast, model, ids, count), want)


def test_logits_that_are_no_numbers_choose_what_they_chose() -> None:
    model = plain.decoder().eval()
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    ids = torch.randint(0, 41, (1, 5))
    for fast in (subquad.rewrite(traps.unchecked), subquad.rewrite(passes="speculate")(traps.unchecked)):
        assert same(outcome(fast, model, ids, 9), outcome(traps.unchecked, model, ids, 9))


class Told:
    """A drafter that is told the text: it proposes the tokens that will come, or those moved by `off`."""

    acceptance = None

    def __init__(self, text: list[int], off: int) -> None:
        self.text, self.off, self.length, self.seen = text, off, 0, 0

    def start(self, tokens: Any, choice: Any) -> Told:
        self.length = len(tokens)
        return self

    def propose(self, rows: int, depth: int) -> DraftTree:
        coming = [(t + self.off) % 41 for t in self.text[self.length : self.length + depth]]
        return DraftTree.chain((self.text[self.length - 1], *coming))

    def observe(self, result: Verified) -> None:
        self.length += len(result.tokens)
        self.seen += len(result.tokens) - 1


@pytest.mark.parametrize(("off", "passes", "accepted"), [(0, 9, 28), (1, 40, 0)])
def test_accepted_drafts_save_passes_and_wrong_ones_change_nothing(off: int, passes: int, accepted: int) -> None:
    model = model_of(traps.CASES[0])
    fast = subquad.rewrite(passes="speculate(method=ngram)")(traps.unchecked)
    ids = torch.randint(0, 41, (1, 4))
    with torch.no_grad():
        want = traps.unchecked(model, ids)
        assert torch.equal(fast(model, ids), want)
        record = [r for r in held(model).loops.values() if r.speculation is not None][-1]
        decoder, told = record.step.decoder, Told(want[0].tolist(), off)
        record.pacing, decoder._drafters[record.speculation] = FixedPacing(4), told
        ran, whole = [], decoder.engine.run
        decoder.engine.run = lambda *a, **k: (ran.append(a[1].shape[1]), whole(*a, **k))[1]
        try:
            assert torch.equal(fast(model, ids), want)
        finally:
            del decoder.engine.run, decoder._drafters[record.speculation]
    assert len(ran) == passes
    assert told.seen == accepted
