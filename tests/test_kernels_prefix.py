"""Attention over a tree of shared keys, one by one and in C++, against float64 over the keys copied out for every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from subquad.kernels import SoftmaxSpec, prefix_attention
from subquad.kernels.softmax_native import Stored, add_stored, fits

TREE = [(0, 67, 0, 0, 5), (67, 40, 67, 1, 3), (107, 1, 67, 4, 1), (108, 129, 107, 1, 2)]
"""Three levels over five rows: row 0 reads one node, rows 1 and 2 three."""
COLUMNS = [67, 236, 236, 107, 68]


def drawn(
    heads: int, kv_heads: int, dim: int, out: int, width: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(heads * dim + width)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return {
        "q": draw(5, width, heads, dim), "k": draw(240, kv_heads, dim), "v": draw(240, kv_heads, out),
        "nodes": torch.tensor(TREE), "own_k": draw(5, 6, kv_heads, dim), "own_v": draw(5, 6, kv_heads, out),
    }  # fmt: skip


def oracle(case: dict[str, Any], scale: float, own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, lse) over own keys alone and over all keys, in float64."""
    found = []
    for nodes in ([], TREE):
        outputs, sums = [], []
        for row in range(5):
            slots = [slice(s, s + n) for s, n, _, first, rows in nodes if first <= row < first + rows]
            keys, values = (
                torch.cat([case[name][part] for part in slots] + ([case[f"own_{name}"][row]] if own else []) or [case[name][:0]])
                .double().repeat_interleave(case["q"].shape[2] // case["k"].shape[1], 1)
                for name in ("k", "v")
            )  # fmt: skip
            score = torch.einsum("qhd,nhd->qhn", case["q"][row].double(), keys) * scale
            lse = score.logsumexp(-1)
            outputs.append(torch.einsum("qhn,nhd->qhd", (score - lse[..., None]).exp().nan_to_num(0.0), values))
            sums.append(lse)
        found += [torch.stack(outputs), torch.stack(sums)]
    return found[0], found[1], found[2], found[3]


@pytest.mark.parametrize("own", [True, False], ids=["own", "empty"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    "sizes", [(9, 3, 64, 64), (8, 8, 32, 32), (8, 1, 40, 24), (4, 4, 80, 96), (16, 2, 16, 16), (3, 1, 96, 64)], ids=str
)
def test_trees_and_head_sizes(form: str, sizes: tuple[int, int, int, int], width: int, own: bool) -> None:
    case = drawn(*sizes, width)
    scale = sizes[2] ** -0.5
    o, lse, want, want_lse = oracle(case, scale, own)
    spec = SoftmaxSpec(scale)
    state = (o.float().nan_to_num(0.0), lse.float())
    shared = (case["q"], case["k"], case["v"], case["nodes"])
    at = torch.tensor(COLUMNS)[:, None].expand(5, width) + 6
    got = prefix_attention(*shared, at, *state, [], [], spec.json())
    assert (got - want).abs().max() < 1e-6
    if form == "native":
        mine = (state[0].clone(), state[1].clone())
        nodes = [
            Stored(*(case[name][None, slot : slot + length] for name in "kv"), first, rows, True)
            for slot, length, _, first, rows in TREE
        ]
        assert fits(*shared[:3])
        add_stored(case["q"], nodes, *mine, spec)
        assert (mine[0] - want).abs().max() < 1e-6
        assert (mine[1] - want_lse).abs().max() < 1e-6


def test_large_scores_and_equal_scores(form: str) -> None:
    for factor in (0.0, 1e2):
        case = drawn(6, 2, 32, 32, 2)
        case["q"] *= factor
        case["k"] *= max(factor, 1.0)
        o, lse, want, _ = oracle(case, 1.0, True)
        at = torch.full((5, 2), 300)
        got = prefix_attention(
            case["q"], case["k"], case["v"], case["nodes"], at, o.float(), lse.float(), [], [], SoftmaxSpec(1.0).json()
        )
        assert (got - want).abs().max() < (1e-6 if factor == 0 else 0.05)  # scores of 1e5 are rounded to hundredths


def test_bfloat16_rounds_once(form: str) -> None:
    case = drawn(9, 3, 64, 64, 1, torch.bfloat16)
    o, lse, want, _ = oracle(case, 0.125, True)
    got = prefix_attention(
        case["q"], case["k"], case["v"], case["nodes"], torch.full((5, 1), 300), o.bfloat16(), lse.float(), [], [],
        SoftmaxSpec(0.125).json(),
    )  # fmt: skip
    assert (got.double() - want).abs().max() < 1.5e-2


def test_a_window_hides_nodes_and_parts_of_them(form: str) -> None:
    case = drawn(4, 2, 16, 16, 2)
    at = torch.tensor(COLUMNS)[:, None] + torch.arange(2)
    for window in (1, 5, 60, 400):
        spec = SoftmaxSpec(0.25, mask=f"(q - kv < {window})")
        o, lse = torch.zeros(5, 2, 4, 16), torch.full((5, 2, 4), -torch.inf)
        got = prefix_attention(case["q"], case["k"], case["v"], case["nodes"], at, o, lse, [], [], spec.json())
        for row in range(5):
            parts = [(s, n, c) for s, n, c, first, rows in TREE if first <= row < first + rows]
            columns = torch.cat([torch.arange(c, c + n) for _, n, c in parts])
            keys, values = (
                torch.cat([case[name][s : s + n] for s, n, _ in parts]).double().repeat_interleave(2, 1)
                for name in ("k", "v")
            )
            score = torch.einsum("qhd,nhd->qhn", case["q"][row].double(), keys) * 0.25
            hidden = (at[row][:, None] - columns >= window)[:, None]
            want = torch.einsum(
                "qhn,nhd->qhd", score.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0), values
            )
            assert (got[row] - want).abs().max() < 1e-6, window


def test_strided_keys_and_no_nodes(form: str) -> None:
    case = drawn(9, 3, 64, 64, 1)
    o, lse, want, _ = oracle(case, 0.125, True)
    wide = torch.cat([case["k"], case["v"]], 2)
    k, v = wide[..., :64], wide[..., 64:]
    state = (o.float(), lse.float(), [], [], SoftmaxSpec(0.125).json())
    at = torch.full((5, 1), 300)
    assert (prefix_attention(case["q"], k, v, case["nodes"], at, *state) - want).abs().max() < 1e-6
    none = prefix_attention(case["q"], k, v, torch.empty(0, 5, dtype=torch.int64), at, *state)
    assert torch.equal(none, o.float())
