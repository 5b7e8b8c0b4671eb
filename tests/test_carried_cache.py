"""A `torch.while_loop` that carries a cache and feeds one token drafts inside its graph: tokens, caches and draws stay the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_carried_draft import passes_of
from torch import Tensor, nn
from torch._higher_order_ops import while_loop

import subquad
from subquad.application import rewritten
from subquad.program_export import exported

LENGTH, WORDS, END = 20, 9, 5


class Cached(nn.Module):
    """Two blocks that are fed one token, write its keys at its place and read the places up to it.

    sees: places beside its own that a token may read, 0 for a causal model.  copies: adds logits that repeat the text.
    """

    def __init__(self, sees: int = 0, spelling: str = "index_copy") -> None:
        super().__init__()
        self.sees, self.spelling = sees, spelling
        self.tokens, self.places = nn.Embedding(WORDS, 16), nn.Embedding(LENGTH, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, WORDS)

    def forward(self, token: Tensor, at: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        x, handed = self.tokens(token) + self.places(at), []
        seen = torch.arange(LENGTH) <= at + self.sees
        for n, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in qkv(x).chunk(3, -1))
            keys, values = self.written(caches[2 * n], at, k), self.written(caches[2 * n + 1], at, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[None, None, None])
            x = x + out(y.transpose(1, 2).flatten(2))
            handed += [keys, values]
        return self.head(x)[:, -1], *handed

    def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        if self.spelling == "index_copy":
            return cache.index_copy(2, at, new)
        cache = cache.clone()
        cache[:, :, at] = new
        return cache


class Loop(nn.Module):
    """A loop over a buffer; `carried`: the token is carried beside it; `draws`, `state`: what it does besides."""

    def __init__(self, model: nn.Module, draws: bool = False, carried: bool = False, state: bool = False) -> None:
        super().__init__()
        self.model, self.draws, self.carried, self.state = model, draws, carried, state

    def forward(self, buffer: Tensor, at: Tensor, end: Tensor, done: Tensor, *caches: Tensor) -> Any:
        def going(buffer: Tensor, at: Tensor, end: Tensor, done: Tensor, *rest: Tensor) -> Tensor:
            return (at < end).all() & ~done.all()

        def once(buffer: Tensor, at: Tensor, end: Tensor, done: Tensor, *rest: Tensor) -> Any:
            held, caches = rest[0], rest[1:]
            fed = held if self.carried else torch.index_select(buffer, 1, at - 1)
            row, *caches = self.model(fed, at - 1, *caches)
            if self.state:
                held = 0.5 * held + self.model.tokens(fed)[:, 0]
                row = row + self.model.head(held)
            if self.draws:
                token = torch.multinomial((3 * row).softmax(-1), 1)
            else:
                token = row.scatter_add(1, buffer, torch.full_like(buffer, -0.01, dtype=row.dtype)).argmax(
                    -1, keepdim=True
                )
            token = torch.where(done[:, None], 0, token)
            if self.carried:
                held = token.clone()
            elif not self.state:
                held = held.clone()
            return buffer.index_copy(1, at, token), at + 1, end.clone(), done | (token[:, 0] == END), held, *caches

        held = torch.zeros(buffer.shape[0], 16) if self.state else torch.index_select(buffer, 1, at - 1)
        return while_loop(going, once, (buffer, at, end, done, held, *caches))


def arguments(prompts: Tensor, end: int, model: Cached | None = None) -> tuple[Tensor, ...]:
    """The loop's inputs, with the keys of all but the last token of the prompt in the caches."""
    rows, length = prompts.shape
    buffer = torch.zeros(rows, LENGTH, dtype=torch.long)
    buffer[:, :length] = prompts
    caches: list[Tensor] = [
        torch.randn(rows, 2, LENGTH, 8, generator=torch.Generator().manual_seed(4)) for _ in range(4)
    ]
    if model is not None:
        for place in range(length - 1):
            _, *caches = model(buffer[:, [place]], torch.tensor([place]), *caches)
    return buffer, torch.tensor([length]), torch.tensor([end]), torch.zeros(rows, dtype=torch.bool), *caches


def exported_loop(loop: Loop, rows: int = 1) -> torch.export.ExportedProgram:
    return torch.export.export(loop.eval(), arguments(torch.ones(rows, 3, dtype=torch.long), 9), strict=False)


def drafting(loop: Loop, depth: int = 3, rows: int = 1) -> nn.Module:
    return subquad.rewrite(exported_loop(loop, rows), passes=f"speculate(num_speculative_tokens={depth})")


LOOPS = {
    "greedy": ({}, {}, 1),
    "greedy, index_put, two rows": ({"spelling": "index_put"}, {}, 2),
    "drawn": ({}, {"draws": True}, 1),
    "drawn, token carried": ({}, {"draws": True, "carried": True}, 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_tokens_caches_flags_and_random_stream_are_those_of_the_loop(name: str) -> None:
    torch.manual_seed(0)
    model, how, rows = LOOPS[name]
    loop = Loop(Cached(**model), **how)
    fast, plain = drafting(loop, 3, rows), exported_loop(loop, rows).module()
    assert not fast.report.refused, fast.report.refused
    fewer = 0
    for length in (1, 5, 18):
        for end in (length + 1, LENGTH):
            with torch.no_grad():
                given = arguments(torch.randint(0, 4, (rows, length)), end, loop.model)
                torch.manual_seed(length)
                expected, state = plain(*(x.clone() for x in given)), torch.get_rng_state()
                torch.manual_seed(length)
                found, passes = passes_of(fast, tuple(x.clone() for x in given))
            assert torch.equal(state, torch.get_rng_state())
            for one, other in zip(expected, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
                assert one.is_floating_point() or torch.equal(one, other)
            fewer += int(expected[1]) - length - passes
    assert fewer > 0


def test_the_loop_is_read() -> None:
    (loop,) = subquad.inspect(exported_loop(Loop(Cached()))).loops
    assert (loop.context.kind, loop.cache.detail, loop.choice.kind) == (
        "last token",
        "4 tensors written at arg1_1",
        "argmax",
    )
    assert loop.schedules[1].applies


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (Loop(Cached(sees=1)), "several tokens in one pass"),
        (Loop(Cached(), state=True), "cannot be taken back"),
    ],
)
def test_a_loop_that_cannot_take_drafts_back_stays_and_says_why(loop: Loop, reason: str) -> None:
    fast = drafting(loop)
    assert len(fast.report.refused) == 1
    assert reason in fast.report.refused[0].reason
    assert fast.report.applied == []


@pytest.mark.slow
def test_the_program_runs_from_plain_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loop = Loop(Cached(), draws=True)
    record = rewritten(drafting(loop))
    assert record is not None
    torch.export.save(exported(record), tmp_path / "out.pt2")
    given = arguments(torch.tensor([[1, 2, 3, 1, 2]]), LENGTH, loop.model)
    torch.manual_seed(1)
    torch.save((given, exported_loop(loop).module()(*(x.clone() for x in given))), tmp_path / "case.pt")
    script = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1])\n"
        "given, expected = torch.load(sys.argv[2])\n"
        "torch.manual_seed(1)\n"
        "found = program.module()(*given)\n"
        "assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))\n"
        "assert 'subquad' not in sys.modules\n"
    )
    run = [sys.executable, "-P", "-c", script, str(tmp_path / "out.pt2"), str(tmp_path / "case.pt")]
    plain = subprocess.run(run, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
