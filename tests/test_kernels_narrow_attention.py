"""The C++ attention of few tokens inside a compiled program: widths, groups, masks, sinks, shared keys, against float64."""

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
POOL = 400
TREES = {
    "no node": [],
    "one node": [(0, 300, 0, 0, 4)],
    "two levels": [(9, 70, 0, 0, 3), (85, 1, 70, 0, 1), (90, 200, 70, 1, 2)],
    "twice": [(5, 64, 0, 0, 1), (5, 64, 0, 2, 1), (100, 3, 64, 2, 1)],
}
"""Nodes for up to four rows: in "two levels" the last row has none and slots lie between, in "twice" rows are reordered."""


@pytest.fixture(scope="module")
def run(native_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A program of one call per case, over the first slots of buffers."""
    native_library.load(native_path)
    graph = torch.fx.Graph()
    seen = graph.placeholder("seen")
    slots = graph.call_function(torch.ops.aten.sym_size.int, (seen, 2))
    nodes, shown = (graph.placeholder(name) for name in ("nodes", "shown"))
    forms = [InputForm(torch.bool, (Varying(2, 16), Varying(3, 16), Varying(53, None)))]
    forms += [
        InputForm(torch.int64, (Varying(7, None), 5)),
        InputForm(torch.bool, (Varying(2, 16), Varying(3, 16), POOL)),
    ]
    alone, joined = [], []
    for n, (dtype, heads, kv_heads, dim, out, sinks, cap, empty) in enumerate(CASES):
        q, k, v, sink = (graph.placeholder(f"{name}_{n}") for name in ("q", "k", "v", "sink"))
        pool = [graph.placeholder(f"shared_{name}_{n}") for name in ("k", "v")]
        forms += [
            InputForm(dtype, (Varying(2, 16), Varying(3, 16), heads, dim)),
            InputForm(dtype, (Varying(2, 16), CAPACITY, kv_heads, dim)),
            InputForm(dtype, (Varying(2, 16), CAPACITY, kv_heads, out)),
            InputForm(torch.float32, (heads,)),
            *(InputForm(dtype, (POOL, kv_heads, size)) for size in (dim, out)),
        ]
        read = [graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, 0, slots)) for x in (k, v)]
        halved = graph.call_function(torch.ops.aten.mul.Tensor, (q, 0.5))
        how = (sink if sinks else None, 0.3, cap, EMPTY_ROWS.index(empty))
        own = (halved, *read, seen, *how)
        alone.append(graph.call_function(torch.ops.subquad.narrow_attention.default, own))
        above = (*pool, nodes, None if n % 2 else shown)
        joined.append(graph.call_function(torch.ops.subquad.narrow_attention.default, (*own, *above)))
    graph.output((*alone, *joined))
    target = tmp_path_factory.mktemp("narrow") / "program.pt2"
    compile_job({"graph": write_graph(graph), "inputs": [write_form(f) for f in forms], "path": str(target)}, True)
    return load_package(Path(target))


def _inputs(batch: int, width: int, slots: int, case: tuple) -> list[torch.Tensor]:
    dtype, heads, kv_heads, dim, out = case[:5]
    keys, values = (torch.full((batch, CAPACITY, kv_heads, size), 7.0, dtype=dtype) for size in (dim, out))
    keys[:, :slots], values[:, :slots] = (torch.randn(batch, slots, kv_heads, size).to(dtype) for size in (dim, out))
    pool = [torch.randn(POOL, kv_heads, size).to(dtype) for size in (dim, out)]
    return [torch.randn(batch, width, heads, dim).to(dtype), keys, values, torch.randn(heads), *pool]


def _wanted(inputs: list[torch.Tensor], seen: torch.Tensor, below: torch.Tensor, case: tuple) -> torch.Tensor:
    """Attention in float64, head by head; below: which shared slots a token sees, those of every row's own nodes at most."""
    q, k, v, sink, *pool = (x.double() for x in inputs)
    _, heads, kv_heads, _, _, sinks, cap, empty = case
    slots = seen.shape[2]
    k, v = (torch.cat([x[:, :slots], y.expand(len(x), -1, -1, -1)], 1) for x, y in zip((k, v), pool, strict=True))
    k, v = (x.repeat_interleave(heads // kv_heads, 2) for x in (k, v))
    seen = torch.cat([seen, below], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q * 0.5, k) * 0.3
    scores = cap * torch.tanh(scores / cap) if cap else scores
    hidden = ~seen[:, None]
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks:
        extra = sink[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.softmax(torch.cat([scores, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
        other = {"zero": 0.0, "mean": 1 / slots, "nan": torch.nan}[empty] * (torch.arange(seen.shape[2]) < slots)
        weights = torch.where(hidden.all(-1, keepdim=True), other, weights)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def _agree(got: torch.Tensor, plain: torch.Tensor, wanted: torch.Tensor, case: tuple) -> None:
    """The C++ form and the torch form against float64."""
    half = case[0] == torch.bfloat16
    assert got.dtype == case[0]
    assert torch.equal(got.isnan(), wanted.isnan())
    error = (got.double() - wanted).nan_to_num().norm() / wanted.nan_to_num().norm().clamp_min(1e-30)
    assert error <= (2 * 2**-9 if half else 2e-6), (case, error)
    tolerance = {"rtol": 0.02, "atol": 0.02} if half else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(plain.double(), wanted, **tolerance, equal_nan=True)


def _seen(mask: str, batch: int, width: int, slots: int) -> torch.Tensor:
    chain = torch.arange(slots)[None] <= torch.arange(slots - width, slots)[:, None]
    seen = chain.expand(batch, width, slots).clone()
    if mask != "chain":
        seen = torch.rand(batch, width, slots) < 0.4
        seen[..., 0] = True
    if mask == "one row sees nothing":
        seen[-1, 0] = False
    return seen


def _below(nodes: torch.Tensor, batch: int) -> torch.Tensor:
    below = torch.zeros(batch, POOL, dtype=torch.bool)
    for slot, length, _, first, rows in nodes.tolist():
        below[first : first + rows, slot : slot + length] = True
    return below


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mask", ["chain", "random", "one row sees nothing"])
def test_equals_float64(run: Runner, size: tuple[int, int, int], mask: str) -> None:
    torch.manual_seed(sum(size))
    seen = _seen(mask, *size)
    inputs = [_inputs(size[0], size[1], size[2], case) for case in CASES]
    nowhere = torch.zeros(*size[:2], POOL, dtype=torch.bool)
    none = torch.empty(0, 5, dtype=torch.int64)
    found = run([seen, none, nowhere, *(x for one in inputs for x in one)])
    for case, given, *both in zip(CASES, inputs, found[: len(CASES)], found[len(CASES) :], strict=True):
        q, k, v, sink = given[:4]
        how = (sink if case[5] else None, 0.3, case[6], EMPTY_ROWS.index(case[7]))
        plain = narrow_attention_torch(0.5 * q, k[:, : size[2]], v[:, : size[2]], seen, *how)
        for got in both:
            _agree(got, plain, _wanted(given, seen, nowhere, case), case)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 1, 33), (4, 3, 70), (4, 4, 257)])
@pytest.mark.parametrize("mask", ["chain", "one row sees nothing"])
def test_shared_keys_equal_float64(run: Runner, tree: str, size: tuple[int, int, int], mask: str) -> None:
    torch.manual_seed(sum(size))
    batch, width, slots = size
    nodes = torch.tensor(
        [(*node, first, min(rows, batch - first)) for *node, first, rows in TREES[tree] if first < batch],
        dtype=torch.int64,
    ).view(-1, 5)
    seen, shown = _seen(mask, *size), torch.rand(batch, width, POOL) < 0.7
    shown[-1, 0] = False
    inputs = [_inputs(batch, width, slots, case) for case in CASES]
    found = run([seen, nodes, shown, *(x for one in inputs for x in one)])[len(CASES) :]
    for n, (case, given, got) in enumerate(zip(CASES, inputs, found, strict=True)):
        q, k, v, sink, *pool = given
        below = _below(nodes, batch)[:, None].expand(-1, width, -1)
        wanted = _wanted(given, seen, below if n % 2 else below & shown, case)
        how = (sink if case[5] else None, 0.3, case[6], EMPTY_ROWS.index(case[7]))
        above = (*pool, nodes, None if n % 2 else shown)
        plain = narrow_attention_torch(0.5 * q, k[:, :slots], v[:, :slots], seen, *how, *above)
        _agree(got, plain, wanted, case)


def test_what_is_not_a_number_stays_so(run: Runner) -> None:
    """In a key, and so in every score of one head; elsewhere nothing changes."""
    inputs = [_inputs(1, 2, 9, case) for case in CASES]
    inputs[0][1][0, 4, 1] = torch.nan
    nodes, shown = torch.tensor(TREES["one node"])[:, :5].clamp_max(1), torch.ones(1, 2, POOL, dtype=torch.bool)
    found = run([torch.ones(1, 2, 9, dtype=torch.bool), nodes, shown, *(x for one in inputs for x in one)])
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
