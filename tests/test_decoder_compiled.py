"""Blocks of a decoder, its stored graphs, and its compiled one-token programs."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from spelled_models import HandWrittenDecoder, tiny_llama
from torch import nn

import subquad
from subquad.blocks import cut
from subquad.compilation import CompilationError
from subquad.decoder import Decoder
from subquad.derivation import derive
from subquad.incremental import assembled, attributes, decoder
from subquad.ir.errors import ArtifactError
from subquad.narrow_graphs import one_token_graph
from subquad.runtime.graph_file import read_graph, write_graph
from subquad.runtime.width_class import width_classes

LOLCATS = "linearize:lolcats(window=4, sinks=2)"


def rewritten(model: nn.Module, passes: str = "fuse") -> nn.Module:
    inputs = None if hasattr(model, "config") else (torch.zeros(2, 5, dtype=torch.int64),)
    return subquad.rewrite(model, passes=passes, example_inputs=inputs, verify=False)


def captured(model: nn.Module) -> torch.fx.GraphModule:
    return model.__dict__["_subquad"].applied.graph


@pytest.mark.parametrize("passes", ["fuse", LOLCATS])
@pytest.mark.parametrize("build", [lambda: tiny_llama(5), lambda: HandWrittenDecoder(layers=5).eval()])
def test_equal_layers_share_one_program(build, passes: str) -> None:
    graph = derive(captured(rewritten(build(), passes)))
    schedule = cut(graph.step)
    keys = [call.program.key for call in schedule.calls]
    assert len(keys) == 6
    assert len(set(keys[:5])) == 1
    assert schedule.tail == 5
    assert len(schedule.programs()) == 3
    one = cut(one_token_graph(graph.step))
    assert len(one.programs()) == 3


def test_a_layer_with_another_constant_is_another_program() -> None:
    model = HandWrittenDecoder(layers=4).eval()
    model.blocks[2].ln1.eps = 1e-3
    plain = HandWrittenDecoder(layers=4).eval()
    counts = []
    for one in (plain, model):
        graph = derive(captured(rewritten(one)))
        counts.append(len(cut(graph.step).programs()))
    assert counts[1] > counts[0] == 3


def test_one_layer_and_no_repetition_still_decode() -> None:
    model = HandWrittenDecoder(layers=1).eval()
    ids = torch.randint(0, 50, (1, 9))
    with torch.no_grad():
        want = model(ids)
    made = decoder(rewritten(model))
    logits, state = made.prefill(ids[:, :4], last_only=False)
    torch.testing.assert_close(torch.cat([logits, made.step(ids[:, 4:], state)], 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", ["fuse", LOLCATS])
def test_graphs_survive_json(passes: str) -> None:
    fast = rewritten(tiny_llama(2), passes)
    graph = derive(captured(fast))
    tensors = attributes(captured(fast))
    ids = torch.randint(0, 50, (1, 9))
    want, _ = assembled(graph, tensors).prefill(ids, last_only=False)
    for name in ("step", "first"):
        module = getattr(graph, name)
        text = json.dumps(write_graph(module.graph))
        setattr(graph, name, torch.fx.GraphModule(module, read_graph(json.loads(text))))
    made = assembled(graph, tensors)
    logits, state = made.prefill(ids[:, :5], last_only=False)
    torch.testing.assert_close(torch.cat([logits, made.step(ids[:, 5:], state)], 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": "aten.from_file.default"}, "not allowed"),
        ({"target": "os.system"}, "not allowed"),
        ({"target": "operator.setitem"}, "not allowed"),
        ({"op": "call_method"}, "not allowed"),
        ({"args": {"tuple": [{"node": "absent"}]}}, "damaged"),
        ({"args": {"tuple": [{"code": "1"}]}}, "not allowed"),
        ({"args": None}, "damaged"),
    ],
)
def test_a_stored_graph_cannot_bring_code(change: dict, words: str) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.neg.default, (x,)),))
    data = write_graph(graph)
    data[1] |= change
    with pytest.raises(ArtifactError, match=words):
        read_graph(json.loads(json.dumps(data)))


CALLS = [(1, (5, 2, 5, 1, 16)), (1, (40, 16, 3)), (2, (6, 1, 3, 8)), (4, (1, 1, 4)), (16, (2, 1))]
"""Rows, and the tokens of a prompt and of the steps after it."""


def every_width(made: Decoder) -> list[torch.Tensor]:
    """Logits of calls of many shapes, all tokens and the last only, padded where the model takes a mask."""
    found = []
    for rows, (prompt, *widths) in CALLS:
        ids = torch.randint(0, 50, (rows, prompt + sum(widths)), generator=torch.Generator().manual_seed(rows))
        mask = None
        if len(made.engine.layout.inputs) > 1 and rows > 1 and prompt > 1:
            mask = torch.ones(rows, prompt, dtype=torch.int64)
            mask[0, : prompt // 2] = 0
        real = slice(0 if mask is None else prompt // 2, None)
        for last_only in (False, True):
            logits, state = made.prefill(ids[:, :prompt], mask, last_only=last_only)
            found.append(logits if last_only else logits[:, real])
            for width, end in zip(widths, itertools.accumulate(widths, initial=prompt), strict=False):
                found.append(made.step(ids[:, end : end + width], state, last_only=last_only))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "passes", "dtype", "error"),
    [
        (lambda: tiny_llama(3), "fuse", torch.float32, 1e-5),
        (lambda: tiny_llama(2), LOLCATS, torch.float32, 1e-5),
        (lambda: HandWrittenDecoder().eval(), "fuse", torch.float64, 1e-10),
    ],
)
def test_compiled_programs_compute_the_same(
    build, passes: str, dtype: torch.dtype, error: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fast = rewritten(build().to(dtype), passes)
    made = decoder(fast)
    ids = torch.randint(0, 50, (1, 20))
    want, _ = made.prefill(ids, last_only=False)
    uncompiled = every_width(made)
    seen: list[tuple[int, int]] = []
    made.compile(report=lambda done, total: seen.append((done, total)))
    assert made.ready
    assert made.complete
    assert seen == [(n, seen[0][1]) for n in range(seen[0][1] + 1)]
    logits, state = made.prefill(ids[:, :4], last_only=False)
    parts = [logits, *(made.step(ids[:, n : n + 1], state) for n in range(4, 20))]
    assert (torch.cat(parts, 1) - want).abs().max() < error
    made.rollback(state, 6)
    assert (made.step(ids[:, 14:15], state) - want[:, 14:15]).abs().max() < error
    for expected, found in zip(uncompiled, every_width(made), strict=True):
        assert (found - expected).abs().max() < error
    second = decoder(fast)
    seen.clear()
    second.compile(report=lambda done, total: seen.append((done, total)))
    assert seen == [(seen[0][1], seen[0][1])]


def test_a_later_class_that_fails_leaves_the_earlier_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made = decoder(rewritten(HandWrittenDecoder().eval()))

    def compiled(wanted: dict, report: Callable[[int, int], None]) -> Iterator[tuple[str, dict]]:
        yield "one", {}
        yield "few", {}
        raise CompilationError("a decoder program could not be compiled (no room).")

    monkeypatch.setattr("subquad.decoder.compile_orders", compiled)
    with pytest.raises(CompilationError, match="no room"):
        made.compile()
    assert made.ready
    assert not made.complete
    assert made.failure is not None
    assert len(list(made.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=3))) == 3


@pytest.mark.parametrize(
    ("before", "rows", "wanted"),
    [(0, 1, None), (0, 2, "first"), (0, 512, "first"), (0, 513, None), (3, 1, "one"), (3, 2, "few"), (3, 64, "few"),
     (3, 65, None)],
)  # fmt: skip
def test_a_call_has_one_class_or_none(before: int, rows: int, wanted: str | None) -> None:
    assert [one.name for one in width_classes(False) if one.covers(before, rows)] == [wanted] * (wanted is not None)


@pytest.mark.slow
def test_a_failing_compiler_is_one_sentence_and_the_fallback_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    made = decoder(rewritten(HandWrittenDecoder().eval()))
    with pytest.raises(CompilationError, match="could not be compiled"):
        made.compile()
    assert len(list(made.generate(torch.zeros(1, 3, dtype=torch.int64), max_new_tokens=3))) == 3
