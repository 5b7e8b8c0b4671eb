"""The C++ attention of few tokens inside a compiled program: widths, batches, groups, masks, sinks, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from subquad import native_library
from subquad.compilation import load_package
from subquad.compile_worker import compile_job
from subquad.kernels.narrow_attention import EMPTY_ROWS, narrow_attention_torch
from subquad.runtime.graph_file import write_graph
from subquad.runtime.schedule import InputForm, Runner, Varying
from subquad.runtime.schedule_file import write_form

CASES = [
    (torch.float32, 9, 3, 64, 64, False, 0.0, "nan"),
    (torch.bfloat16, 9, 3, 64, 64, True, 0.0, "zero"),
    (torch.float32, 4, 4, 20, 33, False, 5.0, "mean"),
    (torch.bfloat16, 8, 1, 128, 96, False, 0.0, "mean"),
    (torch.float32, 6, 2, 16, 16, True, 30.0, "nan"),
]
"""Dtype, heads, KV heads, K, V, sinks, softcap, what a token that sees nothing gives."""
SIZES = [(1, 1, 1), (1, 1, 700), (1, 2, 65), (1, 5, 130), (1, 16, 300), (3, 2, 40), (4, 4, 257)]
"""Rows, tokens of each, slots."""
CAPACITY = 720


@pytest.fixture(scope="module")
def run(native_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A program of one call per case, over the first slots of buffers."""
    native_library.load(native_path)
    graph = torch.fx.Graph()
    seen = graph.placeholder("seen")
    slots = graph.call_function(torch.ops.aten.sym_size.int, (seen, 2))
    forms, outputs = [InputForm(torch.bool, (Varying(2, 16), Varying(3, 16), Varying(53, None)))], []
    for n, (dtype, heads, kv_heads, dim, out, sinks, cap, empty) in enumerate(CASES):
        q, k, v, sink = (graph.placeholder(f"{name}_{n}") for name in ("q", "k", "v", "sink"))
        forms += [
            InputForm(dtype, (Varying(2, 16), Varying(3, 16), heads, dim)),
            InputForm(dtype, (Varying(2, 16), CAPACITY, kv_heads, dim)),
            InputForm(dtype, (Varying(2, 16), CAPACITY, kv_heads, out)),
            InputForm(torch.float32, (heads,)),
        ]
        read = [graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, 0, slots)) for x in (k, v)]
        halved = graph.call_function(torch.ops.aten.mul.Tensor, (q, 0.5))
        how = (sink if sinks else None, 0.3, cap, EMPTY_ROWS.index(empty))
        outputs.append(graph.call_function(torch.ops.subquad.narrow_attention.default, (halved, *read, seen, *how)))
    graph.output(tuple(outputs))
    target = tmp_path_factory.mktemp("narrow") / "program.pt2"
    compile_job({"graph": write_graph(graph), "inputs": [write_form(f) for f in forms], "path": str(target)}, True)
    return load_package(Path(target))


def _inputs(batch: int, width: int, slots: int, case: tuple) -> list[torch.Tensor]:
    dtype, heads, kv_heads, dim, out = case[:5]
    keys, values = (torch.full((batch, CAPACITY, kv_heads, size), 7.0, dtype=dtype) for size in (dim, out))
    keys[:, :slots], values[:, :slots] = (torch.randn(batch, slots, kv_heads, size).to(dtype) for size in (dim, out))
    return [torch.randn(batch, width, heads, dim).to(dtype), keys, values, torch.randn(heads)]


def _wanted(inputs: list[torch.Tensor], seen: torch.Tensor, case: tuple) -> torch.Tensor:
    """Attention in float64, head by head."""
    q, k, v, sink = (x.double() for x in inputs)
    _, heads, kv_heads, _, _, sinks, cap, empty = case
    slots = seen.shape[2]
    k, v = (x[:, :slots].repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * 0.5, k) * 0.3
    scores = cap * torch.tanh(scores / cap) if cap else scores
    hidden = ~seen[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks:
        extra = sink[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
        other = {"zero": 0.0, "mean": 1 / slots, "nan": torch.nan}[empty]
        weights = torch.where(hidden.all(-1, keepdim=True), other, weights)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", ["chain", "random", "one row sees nothing"])
def test_equals_float64(run: Runner, size: tuple[int, int, int], mask: str) -> None:
    torch.manual_seed(sum(size))
    batch, width, slots = size
    chain = torch.arange(slots)[None] <= torch.arange(slots - width, slots)[:, None]
    seen = chain.expand(batch, width, slots).clone()
    if mask != "chain":
        seen = torch.rand(batch, width, slots) < 0.4
        seen[..., 0] = True
    if mask == "one row sees nothing":
        seen[-1, 0] = False
    inputs = [_inputs(batch, width, slots, case) for case in CASES]
    found = run([seen, *(x for one in inputs for x in one)])
    for case, given, got in zip(CASES, inputs, found, strict=True):
        wanted = _wanted(given, seen, case)
        assert got.dtype == case[0]
        assert torch.equal(got.isnan(), wanted.isnan())
        error = (got.double() - wanted).nan_to_num().norm() / wanted.nan_to_num().norm().clamp_min(1e-30)
        assert error <= (2 * 2**-9 if case[0] == torch.bfloat16 else 2e-6), (case, error)
        q, k, v, sink = given
        how = (sink if case[5] else None, 0.3, case[6], EMPTY_ROWS.index(case[7]))
        plain = narrow_attention_torch(0.5 * q, k[:, :slots], v[:, :slots], seen, *how)
        torch.testing.assert_close(plain.double(), wanted, rtol=0.02 if case[0] == torch.bfloat16 else 1e-4,
                                   atol=0.02 if case[0] == torch.bfloat16 else 1e-5, equal_nan=True)  # fmt: skip


def test_what_is_not_a_number_stays_so(run: Runner) -> None:
    """In a key, and so in every score of one head; elsewhere nothing changes."""
    inputs = [_inputs(1, 2, 9, case) for case in CASES]
    inputs[0][1][0, 4, 1] = torch.nan
    found = run([torch.ones(1, 2, 9, dtype=torch.bool), *(x for one in inputs for x in one)])
    assert found[0][:, :, 3:6].isnan().all()
    assert not found[0][:, :, :3].isnan().any()


def test_a_program_without_the_library_takes_the_torch_form(tmp_path: Path) -> None:
    case, seen = CASES[0], torch.ones(1, 3, 5, dtype=torch.bool)
    graph = torch.fx.Graph()
    q, k, v, mask = (graph.placeholder(name) for name in ("q", "k", "v", "mask"))
    graph.output((graph.call_function(torch.ops.subquad.narrow_attention.default, (q, k, v, mask, None, 0.3, 0.0, 1)),))
    given = _inputs(1, 3, 5, case)[:3]
    forms = [InputForm(x.dtype, tuple(x.shape)) for x in (*given, seen)]
    target = tmp_path / "program.pt2"
    compile_job({"graph": write_graph(graph), "inputs": [write_form(f) for f in forms], "path": str(target)}, False)
    (got,) = load_package(target)([*given, seen])
    torch.testing.assert_close(got, narrow_attention_torch(*given, seen, None, 0.3, 0.0, 1), rtol=1e-5, atol=1e-5)
