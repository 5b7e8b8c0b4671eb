"""Tests the search for shared prefixes in token ids against comparing rows pair by pair."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.kernels import SoftmaxSpec, softmax_attention
from subquad.runtime.prefix_tree import common_columns, find_sharing


@st.composite
def batches(draw):
    """Rows that grow from each other, ragged, padded left or right, in random order."""
    vocabulary = draw(st.integers(1, 3))
    rows = [draw(st.lists(st.integers(0, vocabulary), max_size=8))]
    for _ in range(draw(st.integers(0, 7))):
        stem = draw(st.sampled_from(rows))
        rows.append(stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(st.integers(0, vocabulary), max_size=5)))
    rows = draw(st.permutations(rows))
    width = max(max(map(len, rows)), 1)
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    left = draw(st.booleans())
    for n, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[n, at], mask[n, at] = torch.tensor(row, dtype=torch.int64), 1
    return rows, ids, mask


def lcp(one, other):
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@settings(max_examples=200, deadline=None)
@given(batches(), st.integers(0, 2), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_nodes_hold_what_their_rows_share(batch, least, levels, own, keyed):
    rows, ids, mask = batch
    keys = torch.arange(len(rows)) % 2 if keyed else None
    found = find_sharing(ids, mask, keys, least=least, levels=levels, own=own)
    ordered = [rows[n] for n in found.order.tolist()]
    assert torch.equal(found.order[found.place], torch.arange(len(rows)))
    reached, depth = [0] * len(rows), [0] * len(rows)
    for node in found.nodes:
        inside = range(node.first, node.first + node.rows)
        assert node.rows > 1
        assert (node.rows - 1) * (node.stop - node.start) >= least * node.rows
        assert len({tuple(ordered[n][: node.stop]) for n in inside}) == 1
        for n in inside:
            assert node.stop <= len(ordered[n]) - own
            assert reached[n] == node.start
            assert keys is None or keys[found.order[n]] == keys[found.order[node.first]]
            reached[n], depth[n] = node.stop, depth[n] + 1
    assert max(depth) <= levels
    assert reached == found.shared.tolist()
    for n in range(len(rows)):
        row = ids[found.order[n], found.begin[found.order[n]] :][: found.shared[n]]
        assert row.tolist() == ordered[n][: found.shared[n]]
    for number, level in enumerate(found.levels):
        for n in range(len(rows)):
            if depth[n] > number:
                assert level.lengths[level.rows[n]] > 0
            else:
                assert level.lengths[level.rows[n]] == 0
    for n in range(len(rows)):
        assert sum(level.lengths[level.rows[n]] for level in found.levels) == reached[n]


@settings(max_examples=100, deadline=None)
@given(batches())
def test_nothing_shared_is_missed(batch):
    """Without a cost and with levels enough, neighbours share all that they have in common."""
    rows, ids, mask = batch
    found = find_sharing(ids, mask, least=0, levels=99, own=0)
    ordered = [rows[n] for n in found.order.tolist()]
    for n in range(len(rows) - 1):
        both = [node.stop for node in found.nodes if node.first <= n and n + 1 < node.first + node.rows]
        assert max(both, default=0) == lcp(ordered[n], ordered[n + 1])


def test_one_group():
    ids = torch.randint(0, 50, (1, 40)).repeat(6, 1)
    assert common_columns(ids) == 40
    ids[4, 33] += 1
    assert common_columns(ids) == 33
    found = find_sharing(ids)
    assert [(node.start, node.stop, node.rows) for node in found.nodes] == [(0, 33, 6)]
    assert found.saved == 5 * 33


def test_a_mask_with_holes_is_refused():
    with pytest.raises(ValueError, match="row 1"):
        find_sharing(torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]]))


def test_the_tree_is_what_segments_take():
    """Keys stored once per node and read through the levels' row maps give the attention of the whole rows."""
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 1, 1, 1, 5, 5, 7], [1, 1, 1, 1, 5, 5, 8], [1, 1, 1, 1, 6, 2, 3], [4, 1, 2, 3, 4, 5, 6]])
    found = find_sharing(tokens, least=0)
    table, at = torch.randn(9, 2, 8, dtype=torch.float64), torch.full((4, 1), 6)
    ordered = tokens[found.order]
    spec = SoftmaxSpec(0.3, mask="q >= kv").json()
    q = torch.randn(4, 1, 4, 8, dtype=torch.float64)
    k, rows, lengths = [], [], []
    for level in found.levels:
        longest = max(level.lengths)
        readers = [level.rows.index(n) for n in range(len(level.starts))]
        stored = [ordered[row, start : start + longest] for row, start in zip(readers, level.starts, strict=True)]
        k.append(table[torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x in stored])])
        rows.append(torch.tensor(level.rows))
        lengths.append(torch.tensor([level.lengths[n] for n in level.rows]))
    rest = [ordered[n, found.shared[n] :] for n in range(4)]
    longest = max(map(len, rest))
    k.append(table[torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x in rest])])
    rows.append(torch.empty(0, dtype=torch.int64))
    lengths.append(torch.tensor([len(x) for x in rest]))
    assert found.saved > 0
    got = softmax_attention(q[found.order], k, k, rows, lengths, [], at, None, None, [], [], spec)[0][found.place]
    whole = softmax_attention(q, [table[tokens]], [table[tokens]], [], [], [], at, None, None, [], [], spec)[0]
    torch.testing.assert_close(got, whole, rtol=1e-12, atol=1e-12)
