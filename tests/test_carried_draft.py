"""A `torch.while_loop` that drafts inside its graph returns what it returned, in fewer passes, from plain torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spelled_models import HandWrittenDecoder
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

import subquad
from subquad.application import rewritten
from subquad.cli.ending import run as command
from subquad.passes.speculate.carried_draft import drafted

LENGTH, END = 24, 5


class Cycle(nn.Module):
    """Logits that say t + 1 modulo 7 after t: as predictable as text can be; `ahead` lets a row see the token behind it."""

    def __init__(self, ahead: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8)
        self.ahead = ahead
        with torch.no_grad():
            self.table.weight.copy_(torch.eye(8)[(torch.arange(8) + 1) % 7])

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return rows + 0.1 * self.table(ids.roll(-1, 1)) if self.ahead else rows


class Dropping(Cycle):
    """Draws random numbers in every pass."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.table(ids)
        return rows + 0.1 * torch.rand_like(rows)


class Loop(nn.Module):
    """A loop over a buffer; `reads` and `draws` are what the counter-examples change."""

    def __init__(self, model: nn.Module, stops: bool = True, reads: str = "", draws: bool = False) -> None:
        super().__init__()
        self.model, self.stops, self.reads, self.draws = model, stops, reads, draws

    def forward(self, buffer: Tensor, at: Tensor, end: Tensor, done: Tensor) -> Any:
        def going(buffer: Tensor, at: Tensor, end: Tensor, done: Tensor) -> Tensor:
            return (at < end).all() & ~done.all()

        def once(buffer: Tensor, at: Tensor, end: Tensor, done: Tensor) -> Any:
            logits = self.model(buffer)
            if self.reads == "counter":
                logits = logits + at
            row = torch.index_select(logits, 1, at - 1).squeeze(1)
            if self.reads == "all":
                row = row + logits.amax(1)
            token = torch.multinomial(row.softmax(-1), 1) if self.draws else (row / 0.7).argmax(-1, keepdim=True)
            now = done | (token[:, 0] == END) if self.stops else done.clone()
            return buffer.index_copy(1, at, token), at + 1, end.clone(), now

        return while_loop(going, once, (buffer, at, end, done))


def arguments(prompts: Tensor, end: int) -> tuple[Tensor, ...]:
    buffer = torch.zeros(prompts.shape[0], LENGTH, dtype=torch.long)
    buffer[:, : prompts.shape[1]] = prompts
    flags = torch.zeros(prompts.shape[0], dtype=torch.bool)
    return buffer, torch.tensor([prompts.shape[1]]), torch.tensor([end]), flags


def program(loop: Loop, rows: int = 1) -> torch.export.ExportedProgram:
    return torch.export.export(loop.eval(), arguments(torch.ones(rows, 3, dtype=torch.long), 9), strict=False)


def drafting(loop: Loop, depth: int = 4, rows: int = 1) -> nn.Module:
    return subquad.rewrite(program(loop, rows), passes=f"speculate(num_speculative_tokens={depth})")


class Counting(torch.fx.Interpreter):
    """Runs a graph with its while_loop written out, and counts the iterations."""

    count = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.higher_order.while_loop:
            return super().call_function(target, args, kwargs)
        condition, body, carried, fixed = args
        while condition(*carried, *fixed):
            carried = body(*carried, *fixed)
            self.count += 1
        return carried


def passes_of(fast: nn.Module, given: tuple[Tensor, ...]) -> tuple[Any, int]:
    """What the rewritten loop returns, and how often its body ran."""
    record = rewritten(fast)
    assert record is not None
    interpreter = Counting(record.applied.graph)
    return interpreter.run(*given), interpreter.count


@pytest.fixture(scope="module")
def random_loops() -> list[tuple[Loop, nn.Module]]:
    torch.manual_seed(0)
    models = [HandWrittenDecoder(9, 16, 2, LENGTH, 1).eval() for _ in range(2)]
    loops = [(Loop(m, stops), rows) for m, stops, rows in ((models[0], True, 1), (models[1], False, 2))]
    return [(loop, drafting(loop, depth, rows)) for (loop, rows), depth in zip(loops, (3, 6), strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tokens_counter_and_flags_are_those_of_the_loop(
    random_loops: list[tuple[Loop, nn.Module]], data: st.DataObject
) -> None:
    which = data.draw(st.sampled_from([0, 1]))
    loop, fast = random_loops[which]
    length = data.draw(st.integers(1, 12))
    ids = data.draw(
        st.lists(st.lists(st.integers(0, 8), min_size=length, max_size=length), min_size=1 + which, max_size=1 + which)
    )
    given_ = arguments(torch.tensor(ids), data.draw(st.integers(0, LENGTH)))
    with torch.no_grad():
        expected, found = loop(*(x.clone() for x in given_)), fast(*(x.clone() for x in given_))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


class Telling(Loop):
    """A loop with a repetition penalty that also carries a step count, a sum and a table of log-probabilities, and counts."""

    def forward(self, buffer: Tensor, at: Tensor, end: Tensor, done: Tensor) -> Any:
        def going(buffer: Tensor, at: Tensor, end: Tensor, done: Tensor, *told: Tensor) -> Tensor:
            return (at < end).all() & ~done.all()

        def once(
            buffer: Tensor,
            at: Tensor,
            end: Tensor,
            done: Tensor,
            steps: Tensor,
            total: Tensor,
            table: Tensor,
            seen: Tensor,
        ) -> Any:
            row = torch.index_select(self.model(buffer), 1, at - 1).squeeze(1) - 0.4 * seen
            token = row.argmax(-1, keepdim=True)
            score = row.log_softmax(-1).gather(1, token)
            table = table.index_copy(1, at, score)
            seen = seen.scatter_add(1, token, torch.ones_like(score))
            now = done | (token[:, 0] == END)
            return (
                buffer.index_copy(1, at, token),
                at + 1,
                end.clone(),
                now,
                steps + 1,
                total + score[:, 0],
                table,
                seen,
            )

        rows = buffer.shape[0]
        told = (torch.zeros(1, dtype=torch.long), torch.zeros(rows), torch.zeros(rows, LENGTH), torch.zeros(rows, 9))
        return while_loop(going, once, (buffer, at, end, done, *told))


@pytest.mark.parametrize("rows", [1, 2])
def test_what_a_loop_tells_beside_its_tokens_stays_the_same(rows: int) -> None:
    torch.manual_seed(2)
    loop = Telling(HandWrittenDecoder(9, 16, 2, LENGTH, 1)).eval()
    fast = drafting(loop, 3, rows)
    assert [slot.detail for slot in fast.report.loops[0].effects] != []
    fewer = 0
    for length in range(1, 13):
        given_ = arguments(torch.randint(0, 9, (rows, length)), LENGTH)
        with torch.no_grad():
            expected = loop(*(x.clone() for x in given_))
            found, passes = passes_of(fast, tuple(x.clone() for x in given_))
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
        fewer += int(expected[4].item()) - passes
    assert fewer > 0


@pytest.mark.parametrize("rows", [1, 2])
def test_drawn_tokens_and_the_random_stream_are_those_of_the_loop(rows: int) -> None:
    loop = Loop(Cycle(), draws=True)
    fast = drafting(loop, 3, rows)
    fewer = 0
    for seed in range(12):
        given_ = arguments((torch.arange(9) % 7).expand(rows, -1), LENGTH)
        with torch.no_grad():
            torch.manual_seed(seed)
            expected, state = loop(*(x.clone() for x in given_)), torch.get_rng_state()
            torch.manual_seed(seed)
            found, passes = passes_of(fast, tuple(x.clone() for x in given_))
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        fewer += int(expected[1]) - 9 - passes
    assert fewer > 0


@pytest.mark.parametrize("depth", [1, 3, 15])
def test_what_repeats_takes_fewer_passes(depth: int) -> None:
    loop = Loop(Cycle(), stops=False)
    fast = drafting(loop, depth)
    given_ = arguments(torch.arange(9)[None] % 7, LENGTH)
    found, passes = passes_of(fast, given_)
    assert torch.equal(found[0], torch.arange(LENGTH)[None] % 7)
    assert found[1].item() == LENGTH
    assert passes == -(-(LENGTH - 9) // (depth + 1))


@pytest.mark.parametrize("first", range(7))
def test_a_stop_inside_a_draft_ends_the_loop_there(first: int) -> None:
    loop = Loop(Cycle())
    given_ = arguments((torch.arange(8)[None] + first) % 7, LENGTH)
    found, _ = passes_of(drafting(loop), given_)
    for one, other in zip(loop(*(x.clone() for x in given_)), found, strict=True):
        assert torch.equal(one, other)
    assert found[0][0, found[1].item() - 1] == END


def test_the_program_is_saved_by_the_command_and_runs_from_plain_torch(tmp_path: Path) -> None:
    loop = Loop(Cycle())
    torch.export.save(program(loop), tmp_path / "in.pt2")
    out = str(tmp_path / "out.pt2")
    assert command(["rewrite", str(tmp_path / "in.pt2"), "-p", "speculate", "-o", out, "--trust"]) == 0
    given_ = arguments(torch.tensor([[6, 0, 1, 2, 3, 4, 6, 0, 1]]), LENGTH)
    torch.save((given_, loop(*(x.clone() for x in given_))), tmp_path / "case.pt")
    script = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "given, expected = torch.load(sys.argv[2])\n"
        "found = program.module()(*given)\n"
        "assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))\n"
        "assert sum('while_loop' in str(n.target) and n.op == 'call_function' for n in program.graph.nodes) == 1\n"
        "assert 'subquad' not in sys.modules\n"
    )
    plain = subprocess.run(
        [sys.executable, "-P", "-c", script, out, str(tmp_path / "case.pt")], capture_output=True, text=True
    )
    assert plain.returncode == 0, plain.stderr


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (Loop(Cycle(ahead=True)), "change with the tokens behind it"),
        (Loop(Dropping(), reads=""), "draws random numbers"),
        (Loop(Cycle(), reads="all"), "read beside the row"),
        (Loop(Cycle(), reads="counter"), "reads the counter"),
    ],
)  # fmt: skip
def test_a_loop_that_cannot_draft_stays_and_says_why(loop: Loop, reason: str) -> None:
    fast = drafting(loop)
    assert len(fast.report.refused) == 1
    assert reason in fast.report.refused[0].reason
    assert fast.report.applied == []


def test_drafts_follow_the_longest_and_latest_earlier_match() -> None:
    text = torch.tensor([[1, 2, 3, 4, 9, 2, 3, 5, 9, 1, 2, 3, 0, 0, 0, 0]])
    assert drafted(text, torch.tensor([12]), 3)[0, 12:15].tolist() == [4, 9, 2]
    assert drafted(text[:, 1:], torch.tensor([11]), 3)[0, 11:14].tolist() == [5, 9, 1]
    turning = torch.tensor([[7, 1, 2, 1, 2, 0, 0, 0, 0]])
    assert drafted(turning, torch.tensor([5]), 4)[0, 5:].tolist() == [1, 2, 1, 2]
    full = torch.tensor([[1, 2, 1, 2]])
    assert torch.equal(drafted(full, torch.tensor([4]), 3), full)
    assert drafted(torch.tensor([[3, 0, 0]]), torch.tensor([1]), 2).shape == (1, 3)
