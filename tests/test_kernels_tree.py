"""Tests draft-tree masks: any tree, per row, as tables and bits, against attention along each node's own path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad.kernels import (
    SoftmaxSpec,
    ancestor_bits,
    ancestors,
    softmax_attention,
    softmax_attention_reference,
    tree_mask,
)


def walk(parents):
    """Ancestor lists by following parents one by one."""
    table = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        place = node
        while place >= 0:
            table[node, place] = True
            place = parents[place]
    return table


@st.composite
def trees(draw, sizes):
    return [draw(st.integers(-1, node - 1)) for node in range(draw(sizes))]


@settings(max_examples=60, deadline=None)
@given(trees(st.sampled_from([1, 2, 7, 64, 65, 130])))
def test_ancestors_and_bits_are_the_walk_along_parents(parents):
    table = walk(parents)
    assert torch.equal(ancestors(torch.tensor(parents)), table)
    words = ancestor_bits(torch.tensor(parents))
    nodes = torch.arange(len(parents))
    assert torch.equal(((words[:, nodes // 64] >> (nodes % 64)) & 1).bool(), table)


def test_a_parent_behind_its_node_is_refused():
    with pytest.raises(ValueError, match="before"):
        ancestors(torch.tensor([-1, 2, 0]))


@settings(max_examples=25, deadline=None)
@given(
    trees(st.integers(1, 9)),
    st.integers(0, 6),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from([None, 3]),
    st.integers(0, 9),
)
def test_every_node_attends_to_its_path(parents, one, other, words, window, seed):
    """Rows of different context length in one buffer; positions are context + depth, and a window counts positions."""
    torch.manual_seed(seed)
    width, contexts = len(parents), [one, other]
    parents = torch.stack([torch.tensor(parents), torch.arange(width) - 1])
    table = ancestors(parents)
    depth = table.sum(-1) - 1
    slots = max(contexts) + width
    k, v = (torch.randn(2, slots, 2, 4, dtype=torch.float64) for _ in range(2))
    q = torch.randn(2, width, 4, 4, dtype=torch.float64)
    first = torch.tensor(contexts)
    positions = torch.arange(slots).repeat(2, 1)
    for row, context in enumerate(contexts):
        positions[row, context : context + width] = context + depth[row]
    mask = tree_mask("t0", "t1[b]", words)
    if window is not None:
        mask = f"({mask}) & (q - kv < {window})"
    spec = SoftmaxSpec(0.5, mask=mask).json()
    table = ancestor_bits(parents) if words else table
    got = softmax_attention(q, [k], [v], [], [first + width], [positions], first[:, None] + depth, None, None, [table, first], [], spec)  # fmt: skip
    plain = SoftmaxSpec(0.5, mask=None if window is None else f"q - kv < {window}").json()
    for row, context in enumerate(contexts):
        for node in range(width):
            path = walk(parents[row].tolist())[node].nonzero().flatten() + context
            chosen = torch.cat([torch.arange(context), path])
            at = torch.tensor([[len(chosen) - 1]])
            along = ([x[row : row + 1, chosen]] for x in (k, v))
            o, lse = softmax_attention_reference(
                q[row : row + 1, node : node + 1], *along, [], [], [], at, None, None, [], [], plain
            )
            torch.testing.assert_close(got[0][row, node], o[0, 0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got[1][row, node], lse[0, 0], rtol=1e-12, atol=1e-12)
